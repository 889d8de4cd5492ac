"""The metrics equal a plain computation in float64, and the Trainer reports them."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_minigpt import MiniGPTConfig, MiniGPTForCausalLM
from hf_minigpt.data.collators import LanguageModelCollator
from hf_minigpt.data.corpora import load_documents
from hf_minigpt.data.rows import DocumentRows, ShuffledDocumentRows
from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.data.token_store import prepare_corpus
from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.tokenization import padded_vocab_size, train_tokenizer
from hf_minigpt.training.callbacks import PrintSample, SetEpoch
from hf_minigpt.training.evaluation import decode_documents, evaluate_language_model, sample_texts, tale_metrics
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.trainer import LanguageModelTrainer
from tests.tiny import NO_DROPOUT, SIZES, SWITCHES


CONTEXT = 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    documents = load_documents(None, max_examples=60)
    tokenizer = train_tokenizer(documents, 384, model_max_length=CONTEXT, show_progress=False)
    return tokenizer, prepare_corpus(documents, tokenizer, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def model(corpus):
    tokenizer, _ = corpus
    torch.manual_seed(0)
    sizes = SIZES | {
        "vocab_size": padded_vocab_size(tokenizer, 100),
        "unpadded_vocab_size": len(tokenizer),
        "initializer_range": 0.3,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    switches = SWITCHES["modern"] | {"residual_init": "normal"}
    return MiniGPTForCausalLM(MiniGPTConfig(**(switches | NO_DROPOUT | sizes)))


def test_evaluation_equals_a_plain_computation(corpus, model):
    tokenizer, prepared = corpus
    store = prepared.validation
    rows = DocumentRows(store, CONTEXT)
    nats = hits = tokens = 0
    reference = model.double().eval()
    for row in rows:
        with torch.no_grad():
            log_probabilities = reference(input_ids=row["input_ids"][None]).logits[0].double().log_softmax(-1)
        nats -= log_probabilities.gather(1, row["shift_labels"][:, None]).sum().item()
        hits += (log_probabilities.argmax(-1) == row["shift_labels"]).sum().item()
        tokens += len(row["shift_labels"])
    model.float()

    model.train()
    results = evaluate_language_model(model, rows, LanguageModelCollator(tokenizer.pad_token_id), batch_size=3)
    assert model.training
    assert results["tokens"] == tokens == store.num_tokens - 1
    assert results["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert results["accuracy"] == hits / tokens
    text_bytes = sum(len(text.encode()) for text in decode_documents(store, tokenizer))
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_evaluation_of_some_rows_uses_the_bytes_per_token_of_all(corpus, model):
    tokenizer, prepared = corpus
    rows = DocumentRows(prepared.validation, CONTEXT)
    collator = LanguageModelCollator(tokenizer.pad_token_id)
    results = evaluate_language_model(model, rows, collator, batch_size=4, max_rows=5)
    chosen = [rows[i * len(rows) // 5] for i in range(5)]
    assert results["tokens"] == sum(len(row["shift_labels"]) for row in chosen)
    bytes_per_token = prepared.validation.num_bytes / (prepared.validation.num_tokens - 1)
    assert results["bits_per_byte"] == pytest.approx(results["loss"] / math.log(2) / bytes_per_token)


def test_documents_decode_to_themselves(corpus):
    tokenizer, prepared = corpus
    texts = set(tales.tales(60))
    assert all(text in texts for text in decode_documents(prepared.validation, tokenizer))


def test_sampling_is_seeded_and_keeps_the_random_state(corpus, model):
    tokenizer, _ = corpus
    before = torch.get_rng_state()
    first = sample_texts(model, tokenizer, 3, max_new_tokens=20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample_texts(model, tokenizer, 3, max_new_tokens=20, seed=1) == first
    assert sample_texts(model, tokenizer, 3, max_new_tokens=20, seed=2) != first
    assert len(first) == 3 and len(set(first)) == 3
    prompted = sample_texts(model, tokenizer, 1, prompt="Mira went", max_new_tokens=5)
    assert prompted[0].startswith("Mira went")


def test_tale_metrics_compare_with_entropy_and_grammar():
    held_out = list(tales.tales(20, seed=3))
    num_bytes = sum(len(text.encode()) for text in held_out)
    entropy = -sum(tales.log2_probability(text) for text in held_out) / num_bytes
    perfect = tale_metrics(entropy, held_out, held_out)
    assert perfect == pytest.approx(
        {
            "entropy_bits_per_byte": entropy,
            "bits_per_byte_over_entropy": 1.0,
            "sentences_parsed": 1.0,
            "claims_true": 1.0,
        }
    )
    garbage = tale_metrics(2 * entropy, held_out, ["Nothing of the kind. Not at all.", ""])
    assert (garbage["bits_per_byte_over_entropy"], garbage["sentences_parsed"]) == (pytest.approx(2.0), 0.0)


def make_trainer(corpus, model, folder, **kwargs) -> LanguageModelTrainer:
    tokenizer, prepared = corpus
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "logging_steps": 2,
        "eval_steps": 4,
        "save_steps": 1000,
        "disable_tqdm": True,
    }
    args = PretrainArguments(**(defaults | kwargs))
    return LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=ShuffledDocumentRows(prepared.train, CONTEXT, seed=0),
        eval_dataset=DocumentRows(prepared.validation, CONTEXT),
        data_collator=LanguageModelCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args),
        callbacks=[SetEpoch(), PrintSample(tokenizer, max_new_tokens=3)],
    )


def test_trainer_logs_tokens_and_held_out_metrics(corpus, model, tmp_path):
    trainer = make_trainer(corpus, model, tmp_path, eval_max_rows=3, gradient_accumulation_steps=2)
    output = trainer.train()
    history = trainer.state.log_history
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["num_input_tokens_seen"] for entry in losses] == [2 * 4 * CONTEXT * step for step in (1, 2, 4, 6, 8)]
    # every matrix product of a token, counted by hand: forward 2, backward 4 times its parameters; attention's two
    # products over all keys
    config = trainer.model.config
    matrices = config.num_hidden_layers * (
        4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    )
    matrices += config.vocab_size * config.hidden_size
    flops = 6 * matrices + 6 * config.num_hidden_layers * 2 * config.hidden_size * CONTEXT
    for entry in losses:
        assert entry["tflops_per_second"] == pytest.approx(entry["tokens_per_second"] * flops / 1e12, abs=1e-6)
        assert entry["mfu"] == pytest.approx(entry["tokens_per_second"] * flops / trainer._peak_flops, abs=1e-5)
    assert losses[-1]["tflops_per_second"] > 1e-5
    evaluations = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [4, 8]
    assert evaluations[-1]["eval_loss"] < losses[0]["loss"]
    assert output.metrics["train_tokens"] == 2 * 4 * CONTEXT * 8
    # the evaluation after training reads all rows
    assert (
        trainer.evaluate()["eval_tokens"] == trainer.eval_dataset.store.num_tokens - 1 > evaluations[0]["eval_tokens"]
    )


def test_the_log_has_the_accuracy_of_the_steps_since_the_last_entry(corpus, model, tmp_path):
    _, prepared = corpus
    rows = ShuffledDocumentRows(prepared.train, CONTEXT)
    hits = 0
    for row in rows:
        with torch.no_grad():
            hits += (model(row["input_ids"][None]).logits[0].argmax(-1) == row["shift_labels"]).sum().item()
    # one epoch in which nothing is learned, two batches a step: every row counts once
    options = {"matrix_learning_rate": 0.0, "learning_rate": 0.0, "embedding_learning_rate": 0.0, "weight_decay": 0.0}
    trainer = make_trainer(
        corpus, model, tmp_path, max_steps=-1, num_train_epochs=1, gradient_accumulation_steps=2, **options
    )
    trainer.args.logging_first_step, trainer.args.logging_steps = False, 10**6
    trainer.add_callback(LogAtTheEnd())
    trainer.train()
    (accuracy,) = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
    assert hits > 0 and accuracy == pytest.approx(hits / (len(rows) * CONTEXT), rel=1e-9)


class LogAtTheEnd(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = state.global_step == state.max_steps


def test_learning_rates_go_down_linearly_over_the_decay(corpus, model, tmp_path):
    trainer = make_trainer(
        corpus, model, tmp_path, max_steps=10, warmup_steps=0, decay_fraction=0.5, logging_steps=1, eval_strategy="no"
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.01] * 6 + [0.008, 0.006, 0.004, 0.002])


def test_resuming_inside_an_epoch_ends_with_the_same_weights(corpus, model, tmp_path):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows_per_epoch = len(ShuffledDocumentRows(corpus[1].train, CONTEXT))
    # a checkpoint in the middle of the second epoch: the rows must then be those of epoch 1, not 0
    middle = -(-rows_per_epoch // 16) + 2
    options = {"max_steps": middle + 4, "save_steps": middle, "eval_strategy": "no", "per_device_train_batch_size": 16}
    straight = make_trainer(corpus, model, tmp_path, **options)
    straight.train()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    model.load_state_dict(state)
    resumed = make_trainer(corpus, model, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{middle}"))
    assert resumed.train_dataset.epoch == 1
    assert resumed.state.num_input_tokens_seen == straight.state.num_input_tokens_seen
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name, atol=1e-6, rtol=1e-5)


def test_the_optimizers_of_transformers_can_be_used(corpus, model, tmp_path):
    trainer = make_trainer(corpus, model, tmp_path, optimizer="trainer", optim="sgd", max_steps=2, eval_strategy="no")
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
