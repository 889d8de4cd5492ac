"""Broken or hostile input to the recipes raises a clear error, before the first step if possible, and runs no code."""

import contextlib
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))


from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.deploy.conversion import from_nanogpt
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.recipes import pretrain
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.checkpoints.sealing import seal_checkpoint
from hf_minigpt.training.checkpoints.train_safely import train_safely
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.tiny import tiny_config, tiny_model


TEXT = "In the town a cat met seven mice and said to the third: run, or I eat you!\n\n"
SMALL = ["--vocab_size", "320", "--context_length", "16", "--max_steps", "2", "--per_device_train_batch_size", "2"]
SMALL += ["--config_overrides", "hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1"]


class Program:
    """Unpickling this, or running its source, creates the file `ran` in the current folder."""

    SOURCE = "open('ran', 'w').close()\n"

    def __reduce__(self):
        return exec, (self.SOURCE,)


def run(*arguments: str) -> dict[str, float]:
    common = ["--cache_dir", "cache", "--output_dir", "run", "--cpu_threads", "1", "--disable_tqdm", "true"]
    return pretrain.main([*common, *arguments])


RUN = [*SMALL, "--dataset", "books", "--save_steps", "1"]
CONTINUE = ["--model", "model", "--dataset", "books", "--max_steps", "1"]


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """Change to a folder with a corpus in `books`."""
    monkeypatch.chdir(tmp_path)
    write_books(tmp_path)
    yield tmp_path
    assert not Path("ran").exists(), "foreign code ran"


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> Path:
    """Return a folder in which `run(*RUN)` wrote checkpoints and `run(*CONTINUE)` trained the model in `model`."""
    folder = tmp_path_factory.mktemp("undamaged")
    write_books(folder)
    (folder / "books/long.txt").write_text("word " * 5000)
    tokenizer = train_tokenizer([TEXT * 9], 320, model_max_length=16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"vocab_size": 320, "unpadded_vocab_size": len(tokenizer), "max_position_embeddings": 16}
    with contextlib.chdir(folder):
        MiniGPTForCausalLM(tiny_config("modern", **sizes, **ids)).save_pretrained("model")
        tokenizer.save_pretrained("model")
        run(*CONTINUE, "--output_dir", "first")
        Path("metrics.json").write_text(json.dumps(run(*RUN)))
    return folder


@pytest.fixture
def trained(undamaged, tmp_path, monkeypatch) -> Path:
    """Change to a copy of the folder `undamaged`."""
    shutil.copytree(undamaged, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path("ran").exists(), "foreign code ran"


def write_books(folder: Path) -> None:
    (folder / "books").mkdir()
    for i in range(4):
        (folder / f"books/{i}.txt").write_text(TEXT * 20 + str(i))


# Corpora


def latin_1(folder):
    (folder / "9.txt").write_bytes("Bär".encode("latin1"))


def zip_archive(folder):
    with zipfile.ZipFile(folder / "9.txt", "w") as archive:
        archive.writestr("book.txt", TEXT)


def other_columns(folder):
    (folder / "9.csv").write_text("title,body\na,b\n")


def link_to_itself(folder):
    (folder / "loop").symlink_to(folder)


def empty_file(folder):
    (folder / "9.txt").touch()


def too_little(folder):
    for path in folder.iterdir():
        path.write_text(path.stem)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (latin_1, r"9\.txt is not UTF-8 text.*iconv"),
        (zip_archive, r"9\.txt is binary, not text"),
        (other_columns, r"9\.csv has no column 'text'.*\['title', 'body'\]"),
        (link_to_itself, r"loop is a symbolic link to one of its parent folders\. Remove"),
        (empty_file, r"9\.txt is empty\. Remove"),
        (too_little, r"one row of context_length=16 requires 17\. Provide more text"),
    ],
)
def test_damaged_corpus_is_refused(work, damage, message):
    damage(work / "books")
    with pytest.raises(ValueError, match=message):
        run(*SMALL, "--dataset", "books")
    assert not Path("run/model.safetensors").exists()


def test_text_longer_than_the_context_is_cut_into_rows(undamaged):
    assert (undamaged / "books/long.txt").stat().st_size > 10_000
    assert json.loads((undamaged / "metrics.json").read_text())["train_tokens"] == 2 * 2 * 16


# Models


def flip(place):
    def damage(folder):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[place] ^= 1
        (folder / "model.safetensors").write_bytes(content)

    return damage


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def with_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def with_config(**fields):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return damage


def with_pickled_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.embed_tokens.weight": Program()}))


def with_code(folder):
    (folder / "modeling_evil.py").write_text(Program.SOURCE)
    fields = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    with_config(model_type="evil", auto_map=fields)(folder)


def with_other_tokenizer(folder):
    train_tokenizer([TEXT * 9 + "another text of other words"], 384, model_max_length=16).save_pretrained(folder)


NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model='model' cannot be loaded: .*Download or save them again"),
        (flip(9), "model='model' cannot be loaded: .*Download or save them again"),
        (with_tensors(lambda tensors: tensors.pop(NAME)), f"model='model' has no {NAME}.*Download or save them again"),
        (
            with_tensors(lambda tensors: tensors.update({NAME: torch.zeros(3, 3)})),
            rf"{NAME} of shape \(3, 3\), but .*save them",
        ),
        (
            with_config(hidden_size=32),
            r"lm_head.weight of shape \(320, 24\), but its config.json requires \(320, 32\)",
        ),
        (with_config(hidden_act="nonsense"), "nonsense"),
        (with_pickled_weights, "model='model' cannot be loaded: Weights only"),
        (with_code, "trust_remote_code"),
        (with_other_tokenizer, "tokenizer.*the model"),
    ],
)
def test_damaged_model_is_refused(trained, damage, message):
    damage(trained / "model")
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        run(*CONTINUE, "--output_dir", "second")
    assert not Path("second/checkpoint-1").exists()


def test_flipped_bit_in_the_weights_of_a_checkpoint_is_detected(trained):
    """The checkpoint's manifest has checksums. The format of the weights has none."""
    flip(-1)(trained / "run/checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2/model\.safetensors has changed: checksum mismatch"):
        run("--model", "run/checkpoint-2", "--dataset", "books", "--output_dir", "second")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_pickles_in_a_checkpoint_are_not_run(trained, name):
    """They are not run even if the manifest has their checksum."""
    checkpoint = trained / "run/checkpoint-1"
    (checkpoint / name).write_bytes(pickle.dumps(Program()))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    seal_checkpoint(checkpoint, manifest["run"])
    if name == "training_args.bin":
        # resuming does not read this file
        run(*RUN, "--resume_from_checkpoint", str(checkpoint))
        return
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        run(*RUN, "--resume_from_checkpoint", str(checkpoint))


def test_pickle_in_a_nanogpt_checkpoint_is_not_run(work):
    torch.save({"model_args": {}, "model": Program()}, "ckpt.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights.only"):
        from_nanogpt("ckpt.pt")


def test_code_in_a_minigpt_folder_is_not_run(work):
    """Saved models include their code for users without this package. With the package, its own code is used."""
    MiniGPTForCausalLM(tiny_config("modern")).save_pretrained("model")
    assert Path("model/modeling_minigpt.py").is_file()
    Path("model/modeling_minigpt.py").write_text(Program.SOURCE)
    assert isinstance(AutoModelForCausalLM.from_pretrained("model"), MiniGPTForCausalLM)


# Folders and flags


@pytest.mark.parametrize("folder", ["file/run", "/proc/run"])
def test_unwritable_output_folder_is_refused(work, folder):
    Path("file").touch()
    with pytest.raises(ValueError, match=f"output_dir={folder} cannot be written .*choose another"):
        run(*SMALL, "--dataset", "books", "--output_dir", folder)


def test_misspelled_key_in_yaml_is_named(work, capsys):
    Path("run.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(SystemExit):
        run("--config", "run.yaml")
    assert "run.yaml: unknown key 'learning_rat'. Did you mean learning_rate?" in capsys.readouterr().err


# Rows


def row(*ids: int, targets: list[int] | None = None) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(ids), "shift_labels": torch.tensor(list(ids) if targets is None else targets)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 2), row(3, 67)], "input_ids contains 67, and the model's largest id is 66"),
        ([row(1, -1)], "input_ids contains -1"),
        ([row(1, 2, targets=[2, 67])], "shift_labels contains 67"),
        ([row(1, 2, targets=[2, -5])], "shift_labels contains -5"),
        ([], "has 0 rows"),
        ([row(1, 2), {"input_ids": torch.tensor([]), "shift_labels": torch.tensor([])}], "Leave out empty rows"),
    ],
)
def test_invalid_rows_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelCollator(pad_token_id=1, num_ids=67)(rows)


@pytest.mark.parametrize("switches", ["gpt2", "modern"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_row_of_only_padding_does_not_change_the_loss(switches, attention):
    model = MiniGPTForCausalLM(tiny_config(switches))
    model.set_attn_implementation(attention)
    ids = torch.randint(60, (2, 8))
    mask = torch.tensor([[1] * 8, [0] * 8])
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(loss, model(ids[:1], labels=ids[:1]).loss)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # without targets the loss is 0, not NaN
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0


# Out of memory


class Rows(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return row(*range(index % 50, index % 50 + 8))


class SmallDevice(TrainerCallback):
    """Simulates a device with memory for two rows."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def forward(*args, input_ids, **kwargs):
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return type(model).forward(model, *args, input_ids=input_ids, **kwargs)

        model.forward = forward


def train_on_small_device(folder, batch_size, **arguments) -> LanguageModelTrainer:
    sizes = {"per_device_train_batch_size": batch_size, "max_steps": 3}
    args = PretrainArguments(str(folder), **sizes, eval_strategy="no", disable_tqdm=True, **arguments)
    model = MiniGPTForCausalLM(tiny_config("modern"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = LanguageModelTrainer(
        model,
        args,
        train_dataset=Rows(),
        data_collator=LanguageModelCollator(pad_token_id=1, num_ids=67),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        callbacks=[SmallDevice()],
    )
    train_safely(trainer)
    return trainer


def test_out_of_memory_error_names_flags_that_need_less(tmp_path):
    same = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    with pytest.raises(MemoryError, match=f"per_device_train_batch_size=8: CUDA out of memory.*{same}.*auto_find"):
        train_on_small_device(tmp_path, 8)


def test_auto_find_batch_size_reduces_the_batch_until_it_fits(tmp_path):
    trainer = train_on_small_device(tmp_path, 3, auto_find_batch_size=True)
    assert (trainer.state.global_step, trainer._train_batch_size) == (3, 2)
    assert (tmp_path / "checkpoint-3/manifest.json").is_file()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("label", [-5, 10**6])
def test_error_names_a_label_out_of_range(label, training):
    model = tiny_model("modern").train(training)
    ids = torch.zeros((1, 4), dtype=torch.long)
    labels = torch.tensor([[0, 1, label, 2]])
    with pytest.raises(ValueError, match=f"Label {label} is out of range"):
        model(ids, labels=labels)


def test_error_names_a_class_out_of_range():
    model = tiny_model("gpt2", model_class=MiniGPTForSequenceClassification, num_labels=3, pad_token_id=0)
    with pytest.raises(ValueError, match="Label 3 is out of range: there are 3 ids or classes"):
        model(torch.ones((1, 4), dtype=torch.long), labels=torch.tensor([3]))
