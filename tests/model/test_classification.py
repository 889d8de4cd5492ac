"""The classifier: pooling, losses, problem types, truncation, and agreement with transformers' GPT-2."""

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, TrainingArguments, pipeline

from hf_minigpt import MiniGPTForCausalLM, MiniGPTForSequenceClassification
from hf_minigpt.deploy.conversion import from_gpt2
from tests.model.test_generation import tiny_tokenizer
from tests.tiny import POSITIONS, gradients, random_ids, tiny_model


PAD = 66
LENGTHS = [9, 3, 1, 6]
POOLINGS = ["last", "mean", "attention"]


def classifier(name="gpt2", **overrides):
    options = {"num_labels": 3, "pad_token_id": PAD, **overrides}
    model = tiny_model(name, model_class=MiniGPTForSequenceClassification, **options)
    if model.pool_query is not None:
        # The initial zero equals mean pooling.
        torch.nn.init.normal_(model.pool_query.weight, generator=torch.Generator().manual_seed(0))
    return model


def rows_of_text(lengths=LENGTHS):
    return [random_ids(1, length, vocab_size=PAD, seed=length) for length in lengths]


def padded(rows, side="right", length=None, pad=PAD):
    length = length or max(row.shape[1] for row in rows)
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, row.shape[1]) if side == "right" else slice(length - row.shape[1], None)
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def plain_logits(model, row):
    """The definition: the head of the last hidden state, or of a mean, of a row without padding."""
    hidden = model.model(row).last_hidden_state[0]
    if model.config.pooling == "attention":
        factors = torch.exp(hidden @ model.pool_query.weight[0])
        pooled = (factors[:, None] * hidden).sum(0) / factors.sum()
    else:
        pooled = hidden.mean(0) if model.config.pooling == "mean" else hidden[-1]
    return model.score.weight @ pooled


def assert_close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", POSITIONS)
def test_padded_rows_score_as_unpadded_ones(name, side, pooling, attention):
    model = classifier(name, pooling=pooling, attn_implementation=attention)
    rows = rows_of_text()
    expected = torch.stack([plain_logits(model, row) for row in rows])
    for length in (9, 14):
        ids, mask = padded(rows, side, length)
        assert_close(model(ids, attention_mask=mask).logits, expected)
        embeds = model.get_input_embeddings()(ids)
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, expected)
    for row, alone in zip(rows, expected, strict=True):
        assert_close(model(row).logits[0], alone)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_a_mask_the_pad_token_marks_padding(pooling):
    model = classifier(pooling=pooling)
    rows = rows_of_text()
    ids, _ = padded(rows)
    assert_close(model(ids).logits, torch.stack([plain_logits(model, row) for row in rows]))


def test_a_final_eos_equal_to_the_pad_token_is_text():
    model = classifier(eos_token_id=PAD)
    rows = [torch.cat([row, torch.tensor([[PAD]])], 1) for row in rows_of_text()]
    expected = torch.stack([plain_logits(model, row) for row in rows])
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        assert_close(model(ids, attention_mask=mask).logits, expected)


def test_a_pad_token_inside_the_text_is_text():
    model = classifier(pooling="mean")
    row = torch.cat([random_ids(1, 4, vocab_size=PAD), torch.tensor([[PAD]]), random_ids(1, 3, vocab_size=PAD)], 1)
    other = random_ids(1, 5, vocab_size=PAD)
    ids, _ = padded([row, other])
    assert_close(model(ids).logits, torch.stack([plain_logits(model, row), plain_logits(model, other)]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_unknown_padding_is_refused(pooling):
    rows = rows_of_text([5, 5])
    ids, mask = padded(rows)
    model = classifier(pooling=pooling, pad_token_id=None)
    expected = torch.stack([plain_logits(model, row) for row in rows])
    with pytest.raises(ValueError, match="pad_token_id"):
        model(ids)
    assert_close(model(ids, attention_mask=mask).logits, expected)
    assert_close(model(ids[:1]).logits, expected[:1])
    model = classifier(pooling=pooling)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="attention_mask"):
        model(inputs_embeds=embeds)
    assert_close(model(inputs_embeds=embeds[:1]).logits, expected[:1])


def test_a_row_of_padding_does_not_change_other_rows():
    for pooling in POOLINGS:
        model = classifier(pooling=pooling)
        ids, mask = padded(rows_of_text([4, 6]))
        expected = model(ids, attention_mask=mask).logits
        ids, mask = torch.cat([ids, torch.full((1, 6), PAD)]), torch.cat([mask, torch.zeros(1, 6, dtype=torch.long)])
        logits = model(ids, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        assert_close(logits[:2], expected)


LOSSES = {
    "many": ({"num_labels": 3}, torch.tensor([2, 0, 1, 1]), lambda logits, y: F.cross_entropy(logits, y)),
    "regression": (
        {"num_labels": 1},
        torch.tensor([0.5, -1.0, 2.0, 0.0]),
        lambda logits, y: ((logits[:, 0] - y) ** 2).mean(),
    ),
    "several_regressions": (
        {"num_labels": 3, "problem_type": "regression"},
        torch.arange(12.0).view(4, 3) / 6,
        lambda logits, y: ((logits - y) ** 2).mean(),
    ),
    "multi_label": (
        {"num_labels": 3},
        torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        lambda logits, y: -(y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log()).mean(),
    ),
    "given_multi_label": (
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]]),
        lambda logits, y: -(y * logits.sigmoid().log() + (1 - y) * (1 - logits.sigmoid()).log()).mean(),
    ),
    "given_single_label": (
        {"num_labels": 3, "problem_type": "single_label_classification"},
        torch.tensor([2, 0, 1, 1], dtype=torch.int32),
        lambda logits, y: F.cross_entropy(logits, y.long()),
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_equal_their_definitions(kind):
    options, labels, definition = LOSSES[kind]
    model = classifier(**options)
    ids, mask = padded(rows_of_text())
    output = model(ids, attention_mask=mask, labels=labels)
    expected = definition(output.logits.double(), labels).float()
    assert_close(output.loss, expected)
    twice = torch.tensor(2 * labels.numel())
    assert_close(model(ids, attention_mask=mask, labels=labels, num_items_in_batch=twice).loss, expected / 2)
    assert_close(
        model(ids, attention_mask=mask, labels=labels, num_items_in_batch=3).loss * 3 / labels.numel(), expected
    )
    output.loss.backward()
    assert model.score.weight.grad.any() and model.model.embed_tokens.weight.grad.any()


def test_ignored_labels_do_not_change_the_loss():
    model = classifier()
    ids, mask = padded(rows_of_text())
    labels = torch.tensor([2, -100, -100, 1])
    logits = model(ids, attention_mask=mask).logits
    loss = model(ids, attention_mask=mask, labels=labels).loss
    assert_close(loss, F.cross_entropy(logits[[0, 3]], labels[[0, 3]]))
    loss = model(ids, attention_mask=mask, labels=torch.full((4,), -100)).loss
    loss.backward()
    assert loss == 0 and not any(gradient.any() for gradient in gradients(model).values())


def plain_auxiliary_loss(model, rows):
    """Compute the mean over the rows of the mean over each row's tokens."""
    language_model = MiniGPTForCausalLM(model.config).eval()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("score")}
    language_model.load_state_dict(state)
    losses = []
    for row in rows:
        logits = language_model(row).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, row[0, 1:]) if row.shape[1] > 1 else logits.sum() * 0)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*POSITIONS, "rope"])
def test_auxiliary_loss_equals_its_definition(name, side):
    rows, labels = rows_of_text(), torch.tensor([2, 0, 1, 1])
    ids, mask = padded(rows, side)
    model = classifier(name, auxiliary_lm_weight=0.5)
    plain = classifier(name)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    expected = plain(ids, attention_mask=mask, labels=labels).loss + 0.5 * plain_auxiliary_loss(model, rows)
    for training in (True, False):
        output = model.train(training)(ids, attention_mask=mask, labels=labels)
        assert_close(output.loss.double(), expected.double())
        assert output.logits.shape == (4, 3)
    output.loss.backward()
    assert model.lm_head.weight.grad.any()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    counted = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(8)).loss
    assert_close(counted, output.loss / 2)


def test_auxiliary_loss_is_a_mean_over_rows_for_every_problem_type():
    rows = rows_of_text()
    ids, mask = padded(rows)
    for kind in ("regression", "multi_label"):
        options, labels, definition = LOSSES[kind]
        model = classifier(auxiliary_lm_weight=0.5, **options)
        output = model(ids, attention_mask=mask, labels=labels)
        expected = definition(output.logits.double(), labels) + 0.5 * plain_auxiliary_loss(model, rows)
        assert_close(output.loss.double(), expected)


def test_auxiliary_loss_requires_ids():
    model = classifier(auxiliary_lm_weight=0.5)
    ids, mask = padded(rows_of_text())
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="auxiliary_lm_weight"):
        model(inputs_embeds=embeds, attention_mask=mask, labels=torch.tensor([0, 1, 2, 0]))
    assert model(inputs_embeds=embeds, attention_mask=mask).loss is None


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_auxiliary_head_comes_from_the_language_model_and_is_saved(name, tmp_path):
    language_model = tiny_model(name)
    language_model.save_pretrained(tmp_path / "lm")
    model, info = MiniGPTForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=3, pad_token_id=PAD, auxiliary_lm_weight=0.5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"} and not info["unexpected_keys"]
    assert torch.equal(model.lm_head.weight, language_model.lm_head.weight)
    assert abs(model.score.weight.std().item() - 0.02) < 0.01
    model.save_pretrained(tmp_path / "classifier")
    again = MiniGPTForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    ids, mask = padded(rows_of_text())
    labels = torch.tensor([2, 0, 1, 1])
    before, after = (m.eval()(ids, attention_mask=mask, labels=labels) for m in (model, again))
    assert torch.equal(before.loss, after.loss) and torch.equal(before.logits, after.logits)
    # With a weight of 0 the head is not loaded.
    plain = MiniGPTForSequenceClassification.from_pretrained(tmp_path / "classifier", auxiliary_lm_weight=0.0).eval()
    assert torch.equal(plain(ids, attention_mask=mask).logits, before.logits)


def test_equals_gpt2_of_transformers(tmp_path):
    config = GPT2Config(
        vocab_size=67, n_embd=24, n_layer=2, n_head=3, n_positions=64, num_labels=3, pad_token_id=PAD,
        initializer_range=0.3,
    )  # fmt: skip
    gpt2 = GPT2ForSequenceClassification(config).eval()
    model = from_gpt2(gpt2).eval()
    assert isinstance(model, MiniGPTForSequenceClassification)
    ids, mask = padded(rows_of_text())
    labels = torch.tensor([2, 0, 1, 1])
    ours = model(ids, attention_mask=mask, labels=labels)
    theirs = gpt2(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-5)


def gpt2_and_ours(**options):
    """Return transformers' GPT-2 classifier, and a MiniGPT with the same weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=28, n_embd=12, n_layer=1, n_head=2, n_positions=16, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, initializer_range=0.3, **options,
    )  # fmt: skip
    gpt2 = GPT2ForSequenceClassification(config).eval()
    return gpt2, from_gpt2(gpt2).eval()


NUMBERS = [1, 0, 1, 1]
# number of labels, labels of four rows, problem type in the config before, and after
PROBLEMS = [
    (1, torch.tensor([4.0, 2.5, -1.0, 0.0]), None, "regression"),
    (1, torch.tensor([[4.0], [2.5], [-1.0], [0.0]]), None, "regression"),
    (1, torch.tensor([4.0, 2.5, -1.0, 0.0], dtype=torch.float64), None, "regression"),
    (1, torch.tensor([4, 2, -1, 0]), None, "regression"),
    (1, torch.tensor([-100.0, 2.5, -1.0, 0.0]), None, "regression"),
    (1, torch.tensor([[1.0], [0.0], [1.0], [1.0]]), "multi_label_classification", "multi_label_classification"),
    (2, torch.tensor(NUMBERS), None, "single_label_classification"),
    (2, torch.tensor(NUMBERS, dtype=torch.uint8), "single_label_classification", "single_label_classification"),
    (2, torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1]]), None, "multi_label_classification"),
    (2, torch.tensor([[1.5, 0], [0, 3], [1, 1], [0, 1]]), "regression", "regression"),
    (3, torch.tensor([2, 0, 1, 1]), None, "single_label_classification"),
    (3, torch.tensor([[2], [0], [1], [1]]), None, "single_label_classification"),
    (3, torch.tensor([2, -100, 1, -100]), None, "single_label_classification"),
    (3, torch.eye(4, 3), None, "multi_label_classification"),
    (3, torch.eye(4, 3, dtype=torch.float64), None, "multi_label_classification"),
    (3, torch.eye(4, 3) * 2.5, "regression", "regression"),
    (3, torch.eye(4, 3, dtype=torch.long), "regression", "regression"),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("num_labels, labels, given, expected_type", PROBLEMS)
def test_the_problem_type_is_inferred_as_in_transformers_gpt2(num_labels, labels, given, expected_type, training):
    dropout = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    gpt2, model = gpt2_and_ours(num_labels=num_labels, problem_type=given, **dropout)
    ids, mask = random_ids(4, 6, vocab_size=28), torch.ones(4, 6, dtype=torch.long)
    expected = gpt2.train(training)(ids, attention_mask=mask, labels=labels)
    loss = model.train(training)(ids, attention_mask=mask, labels=labels).loss
    assert_close(loss, expected.loss.float())
    assert model.config.problem_type == gpt2.config.problem_type == expected_type
    loss.backward()
    assert model.score.weight.grad.any()


@pytest.mark.parametrize(
    "num_labels, labels, given, expected_type",
    [
        # PyTorch's losses refuse these dtypes, but their meaning is clear.
        (2, torch.tensor(NUMBERS, dtype=torch.int32), None, "single_label_classification"),
        (2, torch.tensor(NUMBERS).bool(), "single_label_classification", "single_label_classification"),
        (3, torch.eye(4, 3).bool(), None, "multi_label_classification"),
        (3, torch.eye(4, 3, dtype=torch.long), "multi_label_classification", "multi_label_classification"),
        (1, torch.tensor(NUMBERS).float(), "multi_label_classification", "multi_label_classification"),
    ],
)
def test_labels_of_other_dtypes_are_converted(num_labels, labels, given, expected_type):
    _, model = gpt2_and_ours(num_labels=num_labels, problem_type=given)
    ids, mask = random_ids(4, 6, vocab_size=28), torch.ones(4, 6, dtype=torch.long)
    output = model(ids, attention_mask=mask, labels=labels)
    if expected_type == "single_label_classification":
        expected = F.cross_entropy(output.logits, labels.long())
    else:
        expected = F.binary_cross_entropy_with_logits(output.logits, labels.float().view(4, -1))
    assert_close(output.loss, expected)
    assert model.config.problem_type == expected_type


@pytest.mark.parametrize(
    "num_labels, labels, given, remedy",
    [
        (3, torch.eye(4, 3, dtype=torch.long), None, "'multi_label_classification'"),
        (3, torch.tensor([2.0, 0, 1, 1]), None, "'single_label_classification'"),
        (3, torch.tensor([2.0, 0, 1, 1]), "single_label_classification", "int64"),
        (4, torch.tensor([2.0, 0, 1, 1]), "regression", r"\(B, num_labels\)"),
        (3, torch.eye(3, 4), "regression", r"\(B, num_labels\)"),
        (1, torch.eye(4, 2), None, r"\(B,\)"),
        (2, torch.tensor(NUMBERS, dtype=torch.uint8), None, "int64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(num_labels, labels, given, remedy):
    _, model = gpt2_and_ours(num_labels=num_labels, problem_type=given)
    ids, mask = random_ids(4, 6, vocab_size=28), torch.ones(4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=rf"labels of shape .*num_labels.*{remedy}"):
        model(ids, attention_mask=mask, labels=labels)
    # The refused labels did not set the problem type.
    assert model.config.problem_type == given


@pytest.mark.parametrize(
    "num_labels, labels",
    [
        (1, torch.tensor([4.0, 2.0])),
        (1, torch.tensor([4, 2])),
        (2, torch.tensor([1, 0])),
        (2, torch.tensor([[1.0, 1.0], [0.0, 1.0]])),
        (3, torch.tensor([2, 0])),
        (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])),
    ],
)
def test_a_pipeline_on_the_saved_model_scores_by_problem_type(num_labels, labels, tmp_path):
    """Plain numbers for regression, a softmax over classes, a sigmoid for each of several labels, as with GPT-2."""
    texts, tokenizer = ["good film", "bad"], tiny_tokenizer()
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    scores = []
    for name, model in zip(("gpt2", "minigpt"), gpt2_and_ours(num_labels=num_labels), strict=True):
        model.train()(**batch, labels=labels)
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        classify = pipeline("text-classification", model=str(tmp_path / name), top_k=None)
        sorted_scores = [sorted(row, key=lambda score: score["label"]) for row in classify(texts)]
        scores.append(torch.tensor([[score["score"] for score in row] for row in sorted_scores]))
    with torch.no_grad():
        logits = model(**batch).logits
    expected = logits
    if num_labels > 1:
        expected = logits.sigmoid() if labels.is_floating_point() else logits.softmax(-1)
    assert_close(scores[0], expected)
    assert_close(scores[1], expected)


class Examples(torch.utils.data.Dataset):
    def __init__(self, ids, mask, labels):
        self.columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def __len__(self):
        return len(self.columns["labels"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


@pytest.mark.parametrize("kind", ["many", "regression", "multi_label", "auxiliary"])
def test_the_trainer_accumulates_the_gradient_of_the_whole_batch(kind, tmp_path):
    options, labels, _ = LOSSES["many" if kind == "auxiliary" else kind]
    options = {**options, "auxiliary_lm_weight": 0.5 if kind == "auxiliary" else 0.0}
    labels = torch.cat([labels, labels.flip(0)])
    ids, mask = padded(rows_of_text([9, 3, 1, 6, 2, 8, 4, 7]))
    reference = classifier(**options)
    reference(ids, attention_mask=mask, labels=labels).loss.backward()
    for size, steps in ((8, 1), (2, 4)):
        model = classifier(**options)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=Examples(ids, mask, labels)).train()
        for key, gradient in gradients(reference).items():
            change = before[key] - dict(model.named_parameters())[key].detach()
            torch.testing.assert_close(change, gradient, rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_pipeline_classifies(padding_side):
    model = classifier(vocab_size=28, pad_token_id=0)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = padding_side
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    texts = ["good film", "no", "the end"]
    together = classify(texts, batch_size=3)
    for text, scores in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = plain_logits(model, ids).softmax(-1)
        assert {s["label"]: pytest.approx(s["score"], abs=1e-5) for s in scores} == {
            f"LABEL_{i}": p.item() for i, p in enumerate(expected)
        }


def test_the_classifier_compiles_and_exports():
    model = classifier()
    ids, mask = padded(rows_of_text())
    expected = model(ids, attention_mask=mask).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    program = torch.export.export(
        model, (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}, strict=False
    )
    with torch.no_grad():
        assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
        exported = program.module()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert_close(exported, expected)
