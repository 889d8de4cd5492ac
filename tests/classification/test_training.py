"""Classifiers are built, trained, saved and loaded as independent computations expect."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, pipeline

from hf_minigpt import MiniGPTForSequenceClassification
from hf_minigpt.classification import report
from hf_minigpt.classification.arguments import ClassificationArguments, ReviewArguments
from hf_minigpt.classification.batching import ReviewCollator, ReviewRows, model_truncation
from hf_minigpt.classification.data import LabelledTexts, ReviewSplits, clean_text
from hf_minigpt.classification.model import (
    build_classifier,
    check_lora_possible,
    frame_with_end_of_text,
    load_classifier,
)
from hf_minigpt.classification.trainer import ClassificationTrainer, classification_optimizer, predict_logits
from hf_minigpt.tokenization import train_tokenizer
from hf_minigpt.training.arguments import ModelArguments
from hf_minigpt.training.lora import LoraArguments, add_lora
from tests.tiny import tiny_model


TEXTS = ["good " * (1 + i % 7) + "film" if i % 2 else "a bad " * (1 + i % 5) for i in range(40)]
LABELS = [i % 2 for i in range(40)]
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return frame_with_end_of_text(train_tokenizer(TEXTS, 320, model_max_length=LENGTH, show_progress=False))


def classifier(tokenizer, name="modern", **options):
    options = {"vocab_size": 320, "unpadded_vocab_size": len(tokenizer), "num_labels": 2} | options
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 0, "bos_token_id": 0}
    return tiny_model(name, model_class=MiniGPTForSequenceClassification, **special, **options)


def arguments(folder, **options):
    options = {"num_train_epochs": 2, "cpu_threads": 1, "disable_tqdm": True, "tokens_per_batch": 128} | options
    return ClassificationArguments(output_dir=str(folder), **options)


def trainer_of(folder, tokenizer, model=None, rows=None, **options):
    args = arguments(folder, **options)
    rows = rows or ReviewRows(TEXTS, LABELS, tokenizer, LENGTH, training=True)
    return ClassificationTrainer(
        model=model or classifier(tokenizer),
        args=args,
        train_dataset=rows,
        eval_dataset=ReviewRows(TEXTS, LABELS, tokenizer, LENGTH),
        data_collator=ReviewCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=classification_optimizer(args),
    )


@pytest.mark.parametrize("pooling", ["mean", "last", "attention"])
@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_batched_predictions_equal_those_of_single_and_of_left_padded_texts(tokenizer, name, pooling):
    model = classifier(tokenizer, name, pooling=pooling, truncation_length=LENGTH)
    rows = ReviewRows(TEXTS, None, tokenizer, LENGTH)
    together = predict_logits(model, rows, ReviewCollator(tokenizer.pad_token_id), 200)
    alone = torch.cat([model(rows[i]["input_ids"][None]).logits for i in range(40)])
    torch.testing.assert_close(together, alone.detach(), rtol=1e-4, atol=1e-4)
    tokenizer.padding_side = "left"
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokenizer.padding_side = "right"
    assert (batch["attention_mask"][:, 0] == 0).any()
    left = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(together, left.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("truncation", ["head", "tail", "head_tail", "windows"])
@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_pipeline_truncates_long_texts_as_the_training_does(tokenizer, tmp_path, name, truncation):
    model = classifier(tokenizer, name, truncation_length=LENGTH, truncation=model_truncation(truncation))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["good", "bad <br /> film " * 20, "a good film " * 9, "  bad\n\n"]
    rows = ReviewRows([clean_text(text) for text in texts], None, tokenizer, LENGTH, truncation)
    expected = predict_logits(model, rows, ReviewCollator(tokenizer.pad_token_id), 40)
    classify = pipeline("text-classification", model=str(tmp_path), top_k=None, function_to_apply="none")
    for answers in (classify(texts, batch_size=4), classify(texts), classify(texts, truncation=True)):
        given = [{answer["label"]: answer["score"] for answer in answer} for answer in answers]
        given = torch.tensor([[scores[model.config.id2label[i]] for i in range(2)] for scores in given])
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def loss_of_one(model, row, adversarial_epsilon=0.0):
    """Return the loss of a single row, with its embeddings perturbed along the gradient."""
    embeddings, labels = model.model.embed_tokens(row["input_ids"][None]), torch.tensor([row["labels"]])
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeddings, labels=labels).loss, embeddings)
    step = adversarial_epsilon * embeddings.detach().norm() * gradient / gradient.norm()
    return model(inputs_embeds=embeddings + step, labels=labels).loss


@pytest.mark.parametrize("adversarial_epsilon", [0.0, 0.1])
def test_optimizer_step_follows_the_gradient_of_the_mean_loss_over_texts(tokenizer, adversarial_epsilon, tmp_path):
    reference = classifier(tokenizer)
    rows = ReviewRows(TEXTS, LABELS, tokenizer, LENGTH, training=True)
    losses = torch.stack([loss_of_one(reference, row, adversarial_epsilon) for row in rows])
    if adversarial_epsilon:
        assert (losses > torch.stack([loss_of_one(reference, row) for row in rows])).all()
    losses.mean().backward()
    model = classifier(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"optimizer": "trainer", "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    options |= {"max_steps": 1, "max_grad_norm": 0.0, "save_strategy": "no", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "early_stopping_patience": None, "weight_decay": 0.0}
    options["adversarial_epsilon"] = adversarial_epsilon
    # One step accumulates all batches of an epoch, which have different numbers of texts.
    trainer = trainer_of(tmp_path, tokenizer, model, gradient_accumulation_steps=50, **options)
    assert len({len(batch) for batch in trainer.get_train_dataloader().batch_sampler}) > 1
    metrics = trainer.train().metrics
    assert metrics["train_examples"] == 40
    for name, p in reference.named_parameters():
        if p.grad is not None:
            change = before[name] - dict(model.named_parameters())[name].detach()
            torch.testing.assert_close(change, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_layer_decay_scales_the_learning_rates_of_lower_blocks(tokenizer, name, optimizer, tmp_path):
    model = classifier(tokenizer, name, auxiliary_lm_weight=0.5)

    def rates(decay):
        args = arguments(tmp_path, optimizer=optimizer, layer_decay=decay)
        factory, kwargs = classification_optimizer(args)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = factory()(model, **kwargs).param_groups
        found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
        assert sum(len(group["params"]) for group in groups) == len(found) == len(names)
        return found

    plain, decayed = rates(1.0), rates(0.5)
    for parameter, (rate, weight_decay) in decayed.items():
        steps = {"layers.1.": 1, "layers.0.": 2, "embed": 3}
        depth = next((steps[key] for key in steps if key in parameter), 0)
        assert rate == pytest.approx(plain[parameter][0] * 0.5**depth), parameter
        assert weight_decay == plain[parameter][1]
    assert {"score.weight"} <= set(decayed)


def test_training_keeps_the_best_checkpoint_and_resumes_exactly(tokenizer, tmp_path):
    from hf_minigpt.training.checkpoints.train_safely import train_safely

    def run(folder, **options):
        torch.manual_seed(0)
        rows = ReviewRows(TEXTS, LABELS, tokenizer, LENGTH, training=True, token_dropout=0.2, seed=1)
        model = classifier(tokenizer, embd_pdrop=0.1)
        trainer = trainer_of(tmp_path / folder, tokenizer, model, rows, num_train_epochs=3, **options)
        return trainer, train_safely(trainer)

    whole, output = run("whole")
    assert output.metrics["train_examples"] == 120
    # Of equally good epochs, the first is kept.
    best = max((e for e in whole.state.log_history if "eval_accuracy" in e), key=lambda e: e["eval_accuracy"])
    found = whole.evaluate()
    assert found["eval_accuracy"] == best["eval_accuracy"] > 0.9 and found["eval_loss"] == best["eval_loss"]

    options = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    options |= {"load_best_model_at_end": False, "early_stopping_patience": None, "save_total_limit": None}
    first, _ = run("steps", **options)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "steps").glob("checkpoint-*"))
    middle = tmp_path / "steps" / f"checkpoint-{steps[len(steps) // 2]}"
    second, _ = run("steps", **options, resume_from_checkpoint=str(middle))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_train_without_train_safely_sets_the_epoch(tokenizer, tmp_path):
    seen = []

    class RecordingRows(ReviewRows):
        def set_epoch(self, epoch):
            seen.append(epoch)
            super().set_epoch(epoch)

    rows = RecordingRows(TEXTS, LABELS, tokenizer, LENGTH, training=True)
    options = {"save_strategy": "no", "eval_strategy": "no"}
    options |= {"load_best_model_at_end": False, "early_stopping_patience": None}
    trainer_of(tmp_path, tokenizer, rows=rows, **options).train()
    assert seen[0] == 0 and set(seen) == {0, 1}


SPLITS = ReviewSplits("mine", ["no", "yes"], *[LabelledTexts(TEXTS, LABELS)] * 3, [], 0, 0, 0)


def test_flags_reach_the_config_and_the_frozen_parameters(tmp_path):
    overrides = ["hidden_size=32", "num_attention_heads=2", "num_hidden_layers=3"]
    model_args = ModelArguments(vocab_size=320, context_length=40, config_overrides=overrides)
    args = arguments(tmp_path, frozen_layers=2, dropout=0.3, attention_dropout=0.2, pooling="last")
    model, _ = build_classifier(model_args, args, SPLITS, "tail")
    config = model.config
    assert config.id2label == {0: "no", 1: "yes"} and config.label2id == {"no": 0, "yes": 1}
    assert (config.embd_pdrop, config.resid_pdrop, config.attn_pdrop) == (0.3, 0.3, 0.2)
    assert (config.pooling, config.max_position_embeddings) == ("last", 40)
    assert (config.truncation_length, config.truncation) == (40, "tail")
    assert model.lm_head is None
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad and "layers" in name}
    assert frozen == {"0", "1"} and not model.model.embed_tokens.weight.requires_grad
    assert model.score.weight.requires_grad
    auxiliary, _ = build_classifier(model_args, arguments(tmp_path, auxiliary_lm_weight=0.5), SPLITS, "head")
    assert auxiliary.lm_head is not None
    attentive, _ = build_classifier(model_args, arguments(tmp_path, pooling="attention"), SPLITS, "head")
    assert (attentive.pool_query.weight == 0).all() and attentive.pool_query.weight.requires_grad
    with pytest.raises(ValueError, match="frozen_layers=4"):
        build_classifier(model_args, arguments(tmp_path, frozen_layers=4), SPLITS, "head")


def test_classifier_starts_from_a_gpt2_checkpoint(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 320, model_max_length=32, show_progress=False)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=24, n_layer=2, n_head=3, n_positions=32))
    gpt2.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, framed = build_classifier(ModelArguments(model=str(tmp_path)), arguments(tmp_path / "o"), SPLITS, "head")
    torch.testing.assert_close(model.model.embed_tokens.weight, gpt2.transformer.wte.weight)
    assert model.config.id2label == {0: "no", 1: "yes"} and model.config.truncation_length == 32
    assert framed("a bad")["input_ids"][0] == framed("a bad")["input_ids"][-1] == framed.eos_token_id
    with pytest.raises(ValueError, match="32 learned positions"):
        build_classifier(ModelArguments(model=str(tmp_path), context_length=64), arguments(tmp_path), SPLITS, "head")
    with pytest.raises(ValueError, match="merge_lora"):
        check_lora_possible(LoraArguments(lora_rank=8), ModelArguments(model=str(tmp_path)))


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_adapters_are_trained_saved_loaded_and_merged(tokenizer, tmp_path, pooling):
    tiny_model("modern", vocab_size=320, unpadded_vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0,
               pad_token_id=tokenizer.pad_token_id).save_pretrained(tmp_path / "base")  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "base")
    lora_args = LoraArguments(lora_rank=4)
    model_args = ModelArguments(model=str(tmp_path / "base"), context_length=LENGTH)
    check_lora_possible(lora_args, model_args)
    model, _ = build_classifier(model_args, arguments(tmp_path, pooling=pooling), SPLITS, "head")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = add_lora(model, lora_args)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    num_heads = sum("lora_" not in name for name in trainable)
    assert len(trainable) == 2 * 6 * 2 + num_heads and num_heads == (1 if pooling == "mean" else 2)
    options = {"optimizer": "adamw", "learning_rate": 0.01, "num_train_epochs": 3}
    trainer = trainer_of(tmp_path / "out", tokenizer, model, **options)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    model.config.save_pretrained(tmp_path / "out")
    loaded = load_classifier(tmp_path / "out")
    rows = ReviewRows(TEXTS, None, tokenizer, LENGTH)
    collator = ReviewCollator(tokenizer.pad_token_id)
    expected = predict_logits(model, rows, collator, 200)
    torch.testing.assert_close(predict_logits(loaded, rows, collator, 200), expected)
    assert (expected.argmax(-1).numpy() == LABELS).mean() == accuracy > 0.9
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    whole = load_classifier(tmp_path / "merged").eval()
    assert isinstance(whole, MiniGPTForSequenceClassification)
    torch.testing.assert_close(predict_logits(whole, rows, collator, 200), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(base["score.weight"], whole.score.weight)


def test_pipeline_accuracy_equals_that_of_the_trainer(tokenizer, monkeypatch):
    monkeypatch.setattr(report, "NUM_RESAMPLES", 20)
    model = classifier(tokenizer, id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    data = LabelledTexts(TEXTS[:12], LABELS[:12])
    rows = ReviewRows(data.texts, data.labels, tokenizer, LENGTH)
    logits = predict_logits(model, rows, ReviewCollator(tokenizer.pad_token_id), 200)
    accuracy = (logits.argmax(-1).numpy() == data.labels).mean()
    result = report.evaluate_pipeline(model, tokenizer, data, logits)
    assert result["pipeline_accuracy"] == result["same_texts_accuracy"] == accuracy
    assert result["pipeline_accuracy_low"] <= accuracy <= result["pipeline_accuracy_high"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_dropout": 1.0}, "token_dropout=1.0"),
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"adversarial_epsilon": 1.0}, "adversarial_epsilon=1.0"),
        ({"adversarial_epsilon": 0.01, "torch_compile": True}, "adversarial_epsilon=0.01 with torch_compile"),
        ({"frozen_layers": -1}, "frozen_layers=-1"),
        ({"optimizer": "trainer", "layer_decay": 0.9}, "layer_decay=0.9 requires"),
        ({"per_device_train_batch_size": 16}, "tokens_per_batch"),
        ({"train_sampling_strategy": "group_by_length"}, "already grouped by length"),
        ({"label_smoothing_factor": 0.1, "auxiliary_lm_weight": 0.5}, "label_smoothing_factor=0.1"),
        ({"load_best_model_at_end": False}, "early_stopping_patience=3 requires --load_best_model_at_end"),
    ],
)
def test_contradictory_training_flags_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **options)


def test_invalid_data_and_lora_flags_are_named():
    with pytest.raises(ValueError, match="merge_lora"):
        LoraArguments(merge_lora=True)
    with pytest.raises(ValueError, match="class_names"):
        ReviewArguments(class_names=["a", "a"])
    with pytest.raises(ValueError, match="VALUE=NAME"):
        ReviewArguments(label_map=["neg"])
    with pytest.raises(ValueError, match="must end in"):
        ReviewArguments(write_training_texts="a.csv")
    with pytest.raises(ValueError, match="without --model"):
        check_lora_possible(LoraArguments(lora_rank=8), ModelArguments())
