"""`recipes/pretrain.py --streaming`, and its resume."""

import json
import shlex
from pathlib import Path

import pytest

from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.recipes import pretrain


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "corpus").mkdir()
    texts = list(tales(25, seed=5))
    for shard in range(3):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[shard::3])
        (folder / f"corpus/{shard}.jsonl").write_text(rows)
    return shlex.split(
        f"--dataset {folder / 'corpus'} --cache_dir {folder / 'cache'} --streaming true --streaming_sample 20 "
        "--shuffle_characters 5000 --validation_fraction 0.2 --vocab_size 320 --context_length 64 --cpu_threads 1 "
        "--per_device_train_batch_size 5 --gradient_accumulation_steps 3 --max_steps 16 --save_steps 5 "
        "--config_overrides hidden_size=32 num_attention_heads=2 num_hidden_layers=1 --disable_tqdm true "
        "--save_total_limit 9 --eval_strategy no"
    )


def test_a_resumed_stream_ends_with_the_same_weights(arguments, tmp_path):
    outputs = [tmp_path / name for name in ("untouched", "resumed")]
    expected = pretrain.main([*arguments, "--output_dir", str(outputs[0])])
    checkpoint = outputs[0] / "checkpoint-10"
    position = json.loads((checkpoint / "stream_0.json").read_text())
    assert position["num_rows"] == 150
    # in the second pass over the corpus, and in the middle of a document
    assert position["position"]["epoch"] >= 1 and position["position"]["token"] > 0
    found = pretrain.main([*arguments, "--output_dir", str(outputs[1]), "--resume_from_checkpoint", str(checkpoint)])
    assert found["eval_loss"] == expected["eval_loss"]
    weights = [Path(output, "model.safetensors").read_bytes() for output in outputs]
    assert weights[0] == weights[1]
    assert "a stream of 3 shards" in (outputs[1] / "README.md").read_text()
    # another order of the documents is a changed run
    with pytest.raises(ValueError, match=r"dataset: .* in the checkpoint, .* now"):
        changed = ["--shuffle_characters", "6000", "--output_dir", str(tmp_path / "changed")]
        pretrain.main([*arguments, *changed, "--resume_from_checkpoint", str(checkpoint)])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            ["--max_steps", "-1"],
            "streaming=True conflicts with max_steps=-1, but a stream has no length. Set --max_steps",
        ),
        (["--max_examples", "9"], "remove --max_examples"),
        (["--dataloader_num_workers", "2"], "dataloader_num_workers"),
    ],
)
def test_flags_that_a_stream_does_not_support_are_refused(wrong, message, arguments, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrain.main([*arguments, *wrong, "--output_dir", str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists()
