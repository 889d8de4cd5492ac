"""transformers and PEFT find MiniGPT in a process with the package, and in one that has only a saved checkpoint."""

import json
import os
import subprocess
import sys
import types

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto import modeling_auto

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM, MiniGPTForSequenceClassification, MiniGPTModel
from hf_minigpt.registration import add_class_name, add_peft_targets, register
from tests.model.test_generation import tiny_tokenizer
from tests.tiny import random_ids, tiny_config, tiny_model


CODE = {
    f"{part}_minigpt.py"
    for part in ("configuration", "modeling", "attention", "loss", "pooling", "generation", "products")
}

# Start of a program: hides the package, as if it were not installed.
WITHOUT_THE_PACKAGE = """
import sys


class PackageHider:
    def find_spec(self, name, path=None, target=None):
        if name == "hf_minigpt" or name.startswith("hf_minigpt."):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, PackageHider())
"""


def run_python(script, folder, *arguments):
    """Run a script in a new process, isolated from PYTHONPATH and from this process's cache of remote code."""
    environment = {**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.smoke
def test_auto_classes_build_and_load(tmp_path):
    assert AutoConfig.for_model("minigpt", hidden_size=24, num_attention_heads=3).hidden_size == 24
    for auto_class, model_class in {
        AutoModel: MiniGPTModel,
        AutoModelForCausalLM: MiniGPTForCausalLM,
        AutoModelForSequenceClassification: MiniGPTForSequenceClassification,
    }.items():
        model = auto_class.from_config(tiny_config("gpt2"))
        assert type(model) is model_class
        model.save_pretrained(tmp_path / model_class.__name__)
        loaded = auto_class.from_pretrained(tmp_path / model_class.__name__)
        # The imported package is used, not the code next to the weights.
        assert type(loaded) is model_class


def test_tables_list_the_classes_by_name():
    """Parts of transformers look up names instead of classes."""
    assert modeling_auto.MODEL_MAPPING_NAMES["minigpt"] == "MiniGPTModel"
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["minigpt"] == "MiniGPTForCausalLM"
    names = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert names["minigpt"] == "MiniGPTForSequenceClassification"
    architecture = tiny_model("gpt2").config.architectures or ["MiniGPTForCausalLM"]
    assert getattr(transformers, architecture[0]) is MiniGPTForCausalLM


def test_registering_again_changes_nothing():
    finders = list(sys.meta_path)
    register()
    register()
    assert AutoConfig.for_model("minigpt").__class__ is MiniGPTConfig
    assert sys.meta_path == finders


def test_transformers_still_works():
    """The added names must not break code that iterates over the tables."""
    gpt2 = transformers.GPT2Config(vocab_size=67, n_embd=24, n_layer=1, n_head=3)
    assert type(AutoModelForCausalLM.from_config(gpt2)) is transformers.GPT2LMHeadModel
    assert transformers.GPT2Config in AutoModelForCausalLM._model_mapping
    assert len(list(AutoModelForCausalLM._model_mapping.values())) > 50
    assert MiniGPTForCausalLM in list(AutoModelForCausalLM._model_mapping.values())


def test_lora_finds_its_default_targets():
    from peft import LoraConfig, get_peft_model

    for model_class, task in ((MiniGPTForCausalLM, "CAUSAL_LM"), (MiniGPTForSequenceClassification, "SEQ_CLS")):
        model = get_peft_model(model_class(tiny_config("gpt2", pad_token_id=0)), LoraConfig(task_type=task))
        adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
        assert len(adapted) == 4 and all(name.split(".")[-2] in ("q_proj", "v_proj") for name in adapted)


@pytest.mark.parametrize("method", ["IA3Config", "AdaLoraConfig", "VeraConfig", "OFTConfig"])
def test_other_adapters_find_their_default_targets(method):
    import peft

    options = {"total_step": 9} if method == "AdaLoraConfig" else {}
    options |= {"r": 0, "oft_block_size": 4} if method == "OFTConfig" else {}
    model = peft.get_peft_model(tiny_model(), getattr(peft, method)(task_type="CAUSAL_LM", **options))
    assert model.get_nb_trainable_parameters()[0] > 0


def test_a_missing_table_gives_a_warning():
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        add_class_name("NO_SUCH_TABLE", "MiniGPTModel")
    with pytest.warns(UserWarning, match="target_modules"):
        add_peft_targets(types.ModuleType("constants"))


@pytest.mark.smoke
@pytest.mark.parametrize("model_class", [MiniGPTModel, MiniGPTForCausalLM, MiniGPTForSequenceClassification])
def test_a_checkpoint_contains_its_code(model_class, tmp_path):
    model_class(tiny_config("gpt2")).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.py")} == CODE
    for name in CODE:
        # Relative imports are found, the package is not.
        assert "hf_minigpt" not in "".join(
            line for line in (tmp_path / name).read_text().splitlines() if "import" in line
        )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [model_class.__name__]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_minigpt.MiniGPTConfig",
        "AutoModel": "modeling_minigpt.MiniGPTModel",
        "AutoModelForCausalLM": "modeling_minigpt.MiniGPTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_minigpt.MiniGPTForSequenceClassification",
    }


REMOTE = """
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

folder, again = Path(sys.argv[1]), Path(sys.argv[2])
expected = torch.load(folder / "expected.pt")
ids = expected["ids"]
options = {"trust_remote_code": True}
for name, auto_class in (
    ("language_model", AutoModelForCausalLM),
    ("base", AutoModel),
    ("classifier", AutoModelForSequenceClassification),
):
    for position in ("gpt2", "modern"):
        for source in (folder, again):
            source = source / f"{position}_{name}"
            model = auto_class.from_pretrained(source, **options)
            assert type(model).__module__.startswith("transformers_modules"), type(model)
            output = model(ids, use_cache=False)[0]
            assert torch.equal(output, expected[f"{position}_{name}"]), (name, position, source)
            if source.parent == folder:
                # A loaded checkpoint can be saved and loaded again.
                model.save_pretrained(again / source.name)

# A language model's checkpoint also loads as a classifier and as a base model.
source = folder / "gpt2_language_model"
classifier = AutoModelForSequenceClassification.from_pretrained(source, num_labels=5, pad_token_id=0, **options)
assert classifier(ids).logits.shape == (2, 5)
assert torch.equal(AutoModel.from_pretrained(source, **options)(ids)[0], expected["gpt2_base"])
tokenizer = AutoTokenizer.from_pretrained(source)

generate = pipeline("text-generation", model=str(source), **options)
text = generate("the cat", max_new_tokens=5, do_sample=False)[0]["generated_text"]
assert text == expected["text"], text
classify = pipeline("text-classification", model=str(folder / "gpt2_classifier"), tokenizer=tokenizer, **options)
assert abs(classify("the cat")[0]["score"] - expected["score"]) < 1e-5

config = AutoConfig.from_pretrained(source, **options)
config.residual_init, config.num_hidden_layers, config.hidden_size, config.head_dim = "gpt2", 8, 96, 32
fresh = AutoModelForCausalLM.from_config(config, **options)
std = fresh.model.layers[0].mlp.down_proj.weight.std().item()
assert abs(std - 0.02 / 4) < 0.0005, std
fresh.train()(ids, labels=ids).loss.backward()
assert "hf_minigpt" not in sys.modules
print("checkpoints equal")
"""


def test_a_process_without_the_package_loads_a_checkpoint(tmp_path):
    ids = random_ids(2, 9, vocab_size=28)
    expected = {"ids": ids}
    tokenizer = tiny_tokenizer()
    folder = tmp_path / "saved"
    for position in ("gpt2", "modern"):
        for name, model_class in (
            ("language_model", MiniGPTForCausalLM),
            ("base", MiniGPTModel),
            ("classifier", MiniGPTForSequenceClassification),
        ):
            model = tiny_model(
                position, model_class=model_class, vocab_size=28, unpadded_vocab_size=28, pad_token_id=0
            )
            # The same base model in all three.
            base = tiny_model(position, vocab_size=28, unpadded_vocab_size=28).model
            (model if name == "base" else model.model).load_state_dict(base.state_dict())
            model.save_pretrained(folder / f"{position}_{name}")
            tokenizer.save_pretrained(folder / f"{position}_{name}")
            expected[f"{position}_{name}"] = model(ids, use_cache=False)[0].detach()
    generate = pipeline("text-generation", model=str(folder / "gpt2_language_model"))
    expected["text"] = generate("the cat", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    classify = pipeline("text-classification", model=str(folder / "gpt2_classifier"))
    expected["score"] = classify("the cat")[0]["score"]
    torch.save(expected, folder / "expected.pt")
    assert isinstance(AutoTokenizer.from_pretrained(folder / "gpt2_base"), transformers.PreTrainedTokenizerBase)
    output = run_python(WITHOUT_THE_PACKAGE + REMOTE, tmp_path, folder, tmp_path / "again")
    assert "checkpoints equal" in output


IMPORTS = """
import sys

# transformers before 5.21 imports some of them itself.
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

heavy = {"datasets", "trl", "peft", "matplotlib", "pandas", "sklearn", "evaluate"} - set(sys.modules)

import hf_minigpt

heavy &= set(sys.modules)
assert not heavy, heavy
model = AutoModelForCausalLM.from_config(hf_minigpt.preset("gpt2", n_layer=1, n_embd=24, n_head=3, vocab_size=67))
assert type(model) is hf_minigpt.MiniGPTForCausalLM

# PEFT, imported later, has the targets, and those of other models are unchanged.
import peft

adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
assert adapted.get_nb_trainable_parameters()[0] > 0
mapping = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert mapping["minigpt"] == ["q_proj", "v_proj"] and mapping["gpt2"] == ["c_attn"]
print("light")
"""


def test_the_import_loads_no_heavy_package(tmp_path):
    assert "light" in run_python(IMPORTS, tmp_path)
