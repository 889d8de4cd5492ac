"""Runs are pushed to the Hub and loaded from it by the real clients, through a local server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM

from hf_minigpt.publishing.hub import prepare_push, push_run
from hf_minigpt.recipes import ladder, pretrain, pretrain_loop
from tests.programs.hub_server import HubServer
from tests.test_registration import WITHOUT_THE_PACKAGE


ROOT = Path(__file__).parents[2]
TOKEN, OTHER_TOKEN = "hf_someones_secret", "hf_somebody_elses_secret"
SMALL = [
    *("--context_length", "32", "--vocab_size", "320", "--per_device_train_batch_size", "4", "--cpu_threads", "1"),
    *("--config_overrides", "hidden_size=32", "num_attention_heads=2", "num_hidden_layers=2"),
    *("--max_steps", "2", "--disable_tqdm", "true"),
]


@pytest.fixture
def hub():
    with HubServer({TOKEN: "someone", OTHER_TOKEN: "somebody-else"}) as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """Let the clients in this process use the local server."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace("https://huggingface.co", hub.url))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # transformers keeps one client for the whole process; one that an earlier test created asks huggingface.co.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    for name, value in (
        ("HF_ENDPOINT", hub.url),
        ("HF_HUB_OFFLINE", False),
        ("HF_DATASETS_CACHE", tmp_path / "cached"),
    ):
        monkeypatch.setattr(datasets.config, name, value)
    # Retry without delay.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return HfApi(endpoint=hub.url, token=TOKEN)


USE = """
import sys

import torch
from datasets import load_dataset
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained("someone/tiny", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
tokenizer = AutoTokenizer.from_pretrained("someone/tiny")
texts = load_dataset("someone/town", split="train")["text"][:]
assert len(texts) == 200 and texts[8].startswith("In the town 8 a cat met 1 mice"), texts[8]
ids = tokenizer(texts[:2], return_tensors="pt", padding=True)
write = pipeline("text-generation", model="someone/tiny", trust_remote_code=True)
text = write("In the town", max_new_tokens=4, do_sample=False)[0]["generated_text"]

# Change the loaded model and push it. The former revision can still be loaded.
commits = HfApi().list_repo_commits("someone/tiny")
(revision,) = (commit.commit_id for commit in commits if commit.title == "End of training")
logits = model(**ids).logits
with torch.no_grad():
    for parameter in model.parameters():
        parameter.mul_(1.5)
model.push_to_hub("someone/tiny", commit_message="Half as much again")
tokenizer.push_to_hub("someone/tiny")
changed = AutoModelForCausalLM.from_pretrained("someone/tiny", trust_remote_code=True)
assert not torch.allclose(changed(**ids).logits, logits)
former = AutoModelForCausalLM.from_pretrained("someone/tiny", trust_remote_code=True, revision=revision)
assert torch.equal(former(**ids).logits, logits)
assert "hf_minigpt" not in sys.modules
torch.save({"ids": ids["input_ids"], "mask": ids["attention_mask"], "logits": logits, "text": text}, "seen.pt")
"""


def test_run_is_pushed_and_loaded_without_the_package(hub, online, tmp_path, monkeypatch, capsys):
    """Train on a dataset from the Hub, push the model, and use both in a process without this package."""
    texts = [
        f"In the town {i % 9} a cat met {i % 7} mice and said to the {i % 3}rd: run, or I eat!" for i in range(200)
    ]
    datasets.Dataset.from_dict({"text": texts}).push_to_hub("someone/town", token=TOKEN)
    output = tmp_path / "output"
    flags = ["--dataset", "someone/town", "--output_dir", str(output), "--cache_dir", str(tmp_path / "cache")]
    flags += ["--push_to_hub", "true", "--hub_model_id", "tiny", "--hub_token", TOKEN]
    # The flag takes precedence over the environment.
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / "pretrain.py"), *SMALL, *flags])
    pretrain.main()
    assert f"Pushed to {hub.url}/someone/tiny" in capsys.readouterr().out

    repo = hub.repos["models", "someone/tiny"]
    code = {path.name for path in (ROOT / "hf_minigpt" / "model").glob("*_minigpt.py")}
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert code | files | {"README.md", "loss.png", "all_results.json"} <= set(repo.files)
    assert not [path for path in repo.files if path.startswith(("_", "checkpoint-"))]
    for path, file in repo.files.items():
        if path != ".gitattributes":
            assert file.content == (output / path).read_bytes(), path
    # The card is that of the recipe, with the name on the Hub. No file contains the token.
    card = ModelCard(repo.files["README.md"].content.decode())
    assert card.data.datasets == ["someone/town"] and card.data.model_name == "someone/tiny"
    assert 'model="someone/tiny"' in card.text and "--hub_token ..." in card.text
    pushed = [file.content for files in repo.commits.values() for file in files.values()]
    kept = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert not [content for content in pushed + kept if TOKEN.encode() in content]

    environment = {name: value for name, value in os.environ.items() if name != "HF_MODULES_CACHE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": TOKEN}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE + USE],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    seen = torch.load(folder / "seen.pt")
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        logits = model(seen["ids"], attention_mask=seen["mask"]).logits
    torch.testing.assert_close(logits, seen["logits"])
    assert seen["text"].startswith("In the town")
    assert "Half as much again" in repo.messages
    assert code <= set(repo.files)


def arguments(folder: Path, **changes) -> SimpleNamespace:
    values = {"push_to_hub": True, "process_index": 0, "output_dir": str(folder), "hub_model_id": None}
    values |= {"hub_token": TOKEN, "hub_private_repo": None, "hub_revision": None}
    return SimpleNamespace(**(values | changes))


def test_pretrain_loop_pushes(hub, online, tmp_path):
    books = tmp_path / "books"
    books.mkdir()
    for i in range(4):
        (books / f"{i}.txt").write_text("\n".join(f"In the town {i} a cat met {j} mice." for j in range(60)))
    output = tmp_path / "looped"
    flags = ["--dataset", str(books), "--output_dir", str(output), "--cache_dir", str(tmp_path / "cache")]
    pretrain_loop.main([*SMALL, *flags, "--push_to_hub", "true", "--hub_token", TOKEN, "--hub_private_repo", "true"])
    repo = hub.repos["models", "someone/looped"]
    assert repo.private and repo.messages == ["initial commit", "End of training"]
    assert repo.files["model.safetensors"].content == (output / "model.safetensors").read_bytes()
    assert not [path for path in repo.files if path.startswith(("_", "checkpoint-"))]


def test_ladder_is_pushed_as_one_repository(hub, online, tmp_path):
    output = tmp_path / "climb"
    flags = ["--output_dir", str(output), "--cache_dir", str(tmp_path / "cache"), "--max_examples", "60"]
    short = ["--max_steps", "2", "--eval_batches", "1", "--rungs", "bigram", "one-head", "--report_to", "none"]
    ladder.main([*flags, *short, "--push_to_hub", "true", "--hub_token", TOKEN])
    repo = hub.repos["models", "someone/climb"]
    assert repo.messages == ["initial commit", "End of training"]
    assert {"ladder.png", "bigram/model.safetensors", "one-head/config.json"} <= set(repo.files)


def test_only_the_main_process_pushes_and_only_with_push_to_hub(hub, online, tmp_path):
    for path in ("config.json", "_run.lock", "checkpoint-3/optimizer.pt", "seed-1/_run.lock", "seed-1/loss.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("{}")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "seed-1" / "checkpoint-3")
    for args in (arguments(tmp_path, push_to_hub=False), arguments(tmp_path, process_index=1)):
        prepare_push(args)
        assert push_run(args) is None
    assert not hub.log
    args = arguments(tmp_path, hub_model_id="someone/other-name")
    prepare_push(args)
    commit = push_run(args)
    assert commit is not None and commit.oid == hub.repos["models", "someone/other-name"].branches["main"]
    files = hub.repos["models", "someone/other-name"].files
    assert set(files) == {".gitattributes", "config.json", "seed-1/loss.png"}
    # Pushing unchanged files makes no commit.
    assert push_run(args).oid == commit.oid


def test_failed_uploads_are_retried(hub, online, tmp_path):
    weights = os.urandom(100_000)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text("{}")
    args = arguments(tmp_path, hub_model_id="someone/model")
    prepare_push(args)
    # First the connection closes within the weights, then the storage is overloaded.
    hub.failures = [("PUT", "/lfs/", "drop"), ("PUT", "/lfs/", 503), ("POST", "/preupload/", 502)]
    push_run(args)
    assert len([line for line in hub.log if line.startswith("PUT")]) == 3
    assert hub.repos["models", "someone/model"].files["model.safetensors"].content == weights


@pytest.mark.parametrize(
    "token, name, message",
    [
        ("hf_mistyped", "tiny", "401.*Invalid credentials in Authorization header"),
        (False, "tiny", "401.*Invalid username or password"),
        (OTHER_TOKEN, "someone/tiny", "403 Forbidden.*have the rights to create a model under the namespace"),
        (OTHER_TOKEN, "someone/there", "403 Forbidden.*have the rights to write to someone/there"),
    ],
)
def test_insufficient_token_is_refused_before_the_training(hub, online, tmp_path, monkeypatch, token, name, message):
    online.create_repo("someone/there")
    monkeypatch.setattr(pretrain, "prepare_data", lambda *args: pytest.fail("data was prepared"))
    with pytest.raises(HfHubHTTPError, match=f"(?s){message}"):
        prepare_push(arguments(tmp_path, hub_token=token, hub_model_id=name))
    if token:
        flags = ["--push_to_hub", "true", "--hub_model_id", name, "--hub_token", token]
        with pytest.raises(HfHubHTTPError, match=f"(?s){message}"):
            pretrain.main([*SMALL, "--output_dir", str(tmp_path / "output"), *flags])


def test_unreadable_repositories_are_refused_with_the_reason(hub, online, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "minigpt"}))
    for name in ("private", "gated"):
        args = arguments(folder, hub_model_id=f"someone/{name}", hub_private_repo=name == "private")
        prepare_push(args)
        push_run(args)
    hub.repos["models", "someone/gated"].gated = True
    assert Path(hf_hub_download("someone/private", "config.json", token=TOKEN)).is_file()
    for name, token, error, message in (
        ("private", OTHER_TOKEN, RepositoryNotFoundError, "make sure you are authenticated"),
        ("private", False, RepositoryNotFoundError, "make sure you are authenticated"),
        ("missing", TOKEN, RepositoryNotFoundError, "correct `repo_id`"),
        ("gated", OTHER_TOKEN, GatedRepoError, "not in the authorized list"),
    ):
        with pytest.raises(error, match=message):
            hf_hub_download(f"someone/{name}", "config.json", token=token, cache_dir=tmp_path / "other")
        # the error of transformers
        with pytest.raises(OSError, match=r"token|gated"):
            AutoModelForCausalLM.from_pretrained(f"someone/{name}", token=token, cache_dir=tmp_path / "other")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("someone/private", "config.json", token=TOKEN, revision="v2")
