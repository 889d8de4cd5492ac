"""The folder of a LoRA adapter works wherever the folder of a whole model works."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.adapters import load_causal_lm, merged
from hf_minigpt.deploy import conversion
from hf_minigpt.instructions.model import prepare_for_chat
from hf_minigpt.recipes import chat, demo, export, perplexity
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.loading import load_base_model
from hf_minigpt.training.lora import LoraArguments, add_lora
from tests.tiny import shake, tiny_model


IDS = torch.tensor([[0, 70, 71, 5, 200]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The output of sft.py --lora_rank, with two more tokens in the tokenizer; ids and their logits."""
    folder = tmp_path_factory.mktemp("adapter")
    texts = ["what is the answer to it? the answer is in the box, and the box is here."] * 9
    tokenizer = train_tokenizer(texts, 320, model_max_length=64, show_progress=False)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    tiny_model("gpt2", vocab_size=len(tokenizer), **ids).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = MiniGPTForCausalLM.from_pretrained(folder / "base")
    model = add_lora(base, LoraArguments(lora_rank=2), prepare_for_chat(base, tokenizer))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shake(torch.nn.ParameterDict({name.replace(".", "_"): parameter}))
    model.eval().save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    with torch.no_grad():
        ids = torch.cat([IDS, torch.tensor([[len(tokenizer) - 1]])], 1)
        return str(folder / "adapter"), ids, model(ids).logits[..., : len(tokenizer)]


@torch.no_grad()
def check_logits(model, ids, expected):
    torch.testing.assert_close(model.eval()(ids).logits[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_loads_merged(adapter, tmp_path):
    folder, *expected = adapter
    check_logits(load_causal_lm(folder), *expected)
    with merged(folder) as whole:
        check_logits(AutoModelForCausalLM.from_pretrained(whole), *expected)
        assert AutoTokenizer.from_pretrained(whole).chat_template is not None
    with merged("gpt2") as name:
        assert name == "gpt2"
    with pytest.raises(ValueError, match=r"is an adapter. Merge it into its base model first"):
        conversion.detect_layout(folder)


def test_finetuning_starts_from_an_adapter(adapter):
    folder, *expected = adapter
    check_logits(load_base_model(MiniGPTForCausalLM, folder)[0], *expected)
    classifier, _ = load_base_model(MiniGPTForSequenceClassification, folder, num_labels=3)
    assert classifier.config.num_labels == 3


def test_recipes_accept_an_adapter(adapter, tmp_path):
    folder, *expected = adapter
    assert export.main([folder, str(tmp_path / "out"), "--to", "gpt2"]) < 1e-2
    check_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), *expected)
    assert chat.main([folder, "--prompt", "what", "--greedy", "--max_new_tokens", "3"])
    text = tmp_path / "text.txt"
    text.write_text("the answer is in the box")
    perplexity.main([folder, "--dataset", str(text), "--part", "all"])


def test_a_space_holds_the_whole_model(adapter, tmp_path):
    folder, *expected = adapter
    demo.write_space(tmp_path / "space", folder, None, "title", "prompt")
    assert not (tmp_path / "space/model/adapter_config.json").exists()
    check_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "space/model"), *expected)
    AutoTokenizer.from_pretrained(tmp_path / "space/model")


def test_a_missing_base_model_is_named(adapter, tmp_path):
    shutil.copytree(adapter[0], tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"base_model_name_or_path='.*gone', which cannot be loaded. Restore it"):
        load_causal_lm(tmp_path / "adapter")
