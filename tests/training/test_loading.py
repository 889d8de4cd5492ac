"""Loading base models: MiniGPT checkpoints, and converted ones whose tokenizer needs more rows."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel, PreTrainedTokenizerFast

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.tokenization import END_OF_TEXT, PAD
from hf_minigpt.training.loading import check_base_exists, load_base_model
from tests.tiny import shake, tiny_model


WORDS = {f"w{i}": i for i in range(60)}


def save_words(folder, **special):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(WORDS, unk_token="w0")), **special)
    tokenizer.save_pretrained(folder)


def gpt2(folder):
    torch.manual_seed(0)
    model = shake(GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=32)))
    model.save_pretrained(folder)
    save_words(folder, bos_token="w59", eos_token="w59")
    return model


@pytest.mark.parametrize("model_class", [MiniGPTForCausalLM, MiniGPTForSequenceClassification])
def test_a_converted_gpt2_has_a_row_for_the_padding_token(tmp_path, model_class):
    source = gpt2(tmp_path)
    model, tokenizer = load_base_model(model_class, str(tmp_path), resid_pdrop=0.3)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token_id) == (PAD, 60, 59)
    assert tokenizer.model_max_length == 32
    config = model.config
    assert (config.vocab_size, config.unpadded_vocab_size, config.pad_token_id) == (64, 61, 60)
    assert config.resid_pdrop == 0.3
    ids = torch.arange(10)[None]
    expected = source.transformer(ids).last_hidden_state
    torch.testing.assert_close(model.model(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_a_converted_gpt1_has_rows_for_end_of_text_and_padding(tmp_path):
    torch.manual_seed(0)
    source = shake(OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=60, n_embd=24, n_layer=2, n_head=2)))
    source.save_pretrained(tmp_path)
    save_words(tmp_path, unk_token="w0")
    model, tokenizer = load_base_model(MiniGPTForSequenceClassification, str(tmp_path), num_labels=3)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_OF_TEXT, 60, 61)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.unpadded_vocab_size) == (60, 61, 62)
    assert model(torch.tensor([[1, 2, 60]])).logits.shape == (1, 3)


def test_a_language_model_loads_as_a_classifier_with_an_auxiliary_head(tmp_path):
    special = {"bos_token": "w59", "eos_token": "w59", "pad_token": "w58"}
    source = tiny_model("modern", vocab_size=64, unpadded_vocab_size=60, bos_token_id=59, eos_token_id=59)
    source.config.pad_token_id = 58
    source.save_pretrained(tmp_path)
    save_words(tmp_path, **special)
    model, _ = load_base_model(
        MiniGPTForSequenceClassification, str(tmp_path), num_labels=2, pooling="mean", auxiliary_lm_weight=0.5
    )
    assert (model.config.pooling, model.config.num_labels) == ("mean", 2)
    torch.testing.assert_close(model.lm_head.weight, source.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(model.model.embed_tokens.weight, source.model.embed_tokens.weight, rtol=0, atol=0)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    source = tiny_model("modern", vocab_size=64, unpadded_vocab_size=50, bos_token_id=1, eos_token_id=1)
    source.save_pretrained(tmp_path)
    save_words(tmp_path, bos_token="w1", eos_token="w1", pad_token="w2")
    with pytest.raises(ValueError, match="the tokenizer has 60 tokens, the model was made for 50"):
        load_base_model(MiniGPTForCausalLM, str(tmp_path))


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        ("no/model", None, "model='no/model' is neither a folder with a model nor a name on the Hub"),
        (None, "no/tokenizer", "tokenizer='no/tokenizer' is neither a folder with a tokenizer nor a name on the Hub"),
    ],
)
def test_a_missing_base_model_or_tokenizer_is_named(model, tokenizer, message):
    check_base_exists(None)
    with pytest.raises(ValueError, match=message):
        check_base_exists(model, tokenizer)
