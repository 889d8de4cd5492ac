"""The loss, with and without logits, equals its definition in value and gradient, also in a Trainer."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_minigpt import MiniGPTForCausalLM
from hf_minigpt.model import loss_minigpt
from tests.tiny import SWITCHES, gradients, random_ids, tiny_model


LOSS_SWITCHES = ["gpt2", "transformer", "modern", "rope"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Use the smallest chunks. By default the small batches of these tests fit into one chunk."""
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cpu", 1)


def batch(rows=14, length=11):
    """Return ids, and labels of which each row ignores a different number."""
    ids = random_ids(rows, length)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row % length] = -100
    return ids, labels


def plain_losses(model, ids, labels):
    """The definition: minus the log-probability, among the unpadded ids, of each label that is not ignored."""
    logits = model(ids).logits[..., : model.config.unpadded_vocab_size].double()
    log_probabilities = logits.log_softmax(-1)
    return torch.stack(
        [
            -log_probabilities[row, t, labels[row, t + 1]]
            for row in range(ids.shape[0])
            for t in range(ids.shape[1] - 1)
            if labels[row, t + 1] != -100
        ]
    )


def assert_same_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.smoke
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_loss_and_gradients_equal_the_definition(name, skip_logits):
    ids, labels = batch()
    reference = tiny_model(name)
    expected = plain_losses(reference, ids, labels).mean()
    expected.backward()
    model = tiny_model(name)
    output = model(ids, labels=labels, skip_logits=skip_logits)
    assert (output.logits is None) == skip_logits
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert_same_gradients(gradients(model), gradients(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("elements", [1, 2**23])
def test_linear_cross_entropy_equals_autograd(elements, with_bias, softcap, monkeypatch):
    monkeypatch.setitem(loss_minigpt.CHUNK_ELEMENTS, "cpu", elements)
    hidden = torch.randn(150, 24, requires_grad=True)
    weight = torch.randn(72, 24, requires_grad=True)
    bias = torch.randn(72, requires_grad=True) if with_bias else None
    targets = torch.randint(67, (150,))
    targets[::7] = -100
    row_weights = torch.rand(150)
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]

    logits = hidden @ weight.t()
    logits = logits if bias is None else logits + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits[:, :67], targets, reduction="none", ignore_index=-100)
    expected = (losses * row_weights).sum()
    expected_correct = (logits[:, :67].argmax(1) == targets).sum()

    total, correct = loss_minigpt.linear_cross_entropy(
        hidden, weight, bias, targets, row_weights=row_weights, softcap=softcap, num_ids=67, count_correct=True
    )
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)
    assert correct.dtype == torch.int64 and correct == expected_correct
    # The factor gives an upstream gradient other than 1.
    actual_gradients = torch.autograd.grad(total * 0.3, inputs)
    for actual, gradient in zip(actual_gradients, torch.autograd.grad(expected * 0.3, inputs), strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_bfloat16_autocast_stays_close(name):
    ids, labels = batch()
    exact = tiny_model(name)
    exact_loss = exact(ids, labels=labels).loss
    exact_loss.backward()
    losses, all_gradients = [], []
    for skip_logits in (False, True):
        model = tiny_model(name)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=labels, skip_logits=skip_logits).loss
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(loss)
        all_gradients.append(gradients(model))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(losses[1], exact_loss, rtol=3e-2, atol=3e-2)
    for key, gradient in gradients(exact).items():
        scale = gradient.norm()
        errors = [(other[key] - gradient).norm() / scale for other in all_gradients]
        # The loss without logits must not lose more precision than the plain loss.
        assert errors[1] < max(1.5 * errors[0], 0.02), (key, errors)


def test_bfloat16_weights_stay_close():
    ids, labels = batch()
    exact = tiny_model("modern")(ids, labels=labels).loss
    model = tiny_model("modern").bfloat16()
    loss = model(ids, labels=labels, skip_logits=True).loss
    loss.backward()
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(model).values())
    torch.testing.assert_close(loss.float(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("num_items", [7, torch.tensor(7), torch.tensor(7.0)])
@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_num_items_in_batch_divides_the_sum(name, num_items, skip_logits):
    ids, labels = batch()
    model = tiny_model(name)
    expected = plain_losses(model, ids, labels).sum() / 7
    loss = model(ids, labels=labels, num_items_in_batch=num_items, skip_logits=skip_logits).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_shifted_labels_are_used_unchanged(skip_logits):
    ids, labels = batch()
    model = tiny_model("modern")
    shifted = torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], 1)
    expected = plain_losses(model, ids, labels).mean()
    loss = model(ids, shift_labels=shifted, skip_logits=skip_logits).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    # They take precedence over labels.
    both = model(ids, labels=random_ids(*ids.shape, seed=9), shift_labels=shifted, skip_logits=skip_logits).loss
    assert torch.equal(both, loss)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_ignore_index_can_be_changed(skip_logits):
    ids, labels = batch()
    model = tiny_model("modern")
    expected = plain_losses(model, ids, labels).mean()
    other = labels.masked_fill(labels == -100, -7)
    loss = model(ids, labels=other, ignore_index=-7, skip_logits=skip_logits).loss
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_a_batch_without_labels_has_zero_loss_and_gradients(name, skip_logits, num_items):
    model = tiny_model(name).train()
    ids = random_ids(3, 8)
    loss = model(ids, labels=torch.full_like(ids, -100), num_items_in_batch=num_items, skip_logits=skip_logits).loss
    assert loss.item() == 0
    loss.backward()
    assert gradients(model)
    for name, gradient in gradients(model).items():
        assert not gradient.any(), name


@pytest.mark.parametrize("skip_logits", [False, True])
def test_one_token_rows_have_no_loss(skip_logits):
    model = tiny_model("gpt2").train()
    ids = random_ids(3, 1)
    loss = model(ids, labels=ids, skip_logits=skip_logits).loss
    loss.backward()
    assert loss.item() == 0


def test_logits_are_returned_unless_skipped():
    model = tiny_model("gpt2")
    ids, labels = batch()
    expected = model(ids, labels=labels)
    for training in (False, True):
        model.train(training)
        output = model(ids, labels=labels)
        assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
        assert model(ids, shift_labels=labels).logits is not None
        assert model(ids, labels=labels, skip_logits=True).logits is None
        pair = model(ids, labels=labels, use_cache=False, return_dict=False)
        assert len(pair) == 2 and torch.equal(pair[1], expected.logits)
        # Without labels there is no loss, so the logits are returned.
        assert model(ids, skip_logits=True).logits is not None


def test_the_configuration_can_skip_the_logits_in_training(tmp_path):
    ids, labels = batch()
    tiny_model("gpt2", skip_logits=True).save_pretrained(tmp_path)
    model = MiniGPTForCausalLM.from_pretrained(tmp_path).train()
    expected = model(ids, labels=labels, skip_logits=False)
    assert expected.logits is not None
    for inputs in ({"labels": labels}, {"shift_labels": labels}):
        assert model(ids, **inputs).logits is None
    torch.testing.assert_close(model(ids, labels=labels).loss, expected.loss)
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=labels).logits is not None


def custom_losses(logits, labels, teacher):
    """Compute losses as users write them, on logits (B, T, V) of a model and its teacher."""
    logits, targets, teacher = logits[..., :-1, :], labels[..., 1:], teacher[..., :-1, :]
    log_probabilities, is_target = logits.log_softmax(-1), (targets != -100)
    chosen = log_probabilities.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * is_target
    half = len(logits) // 2
    return {
        "cross_entropy": F.cross_entropy(logits.flatten(0, 1), targets.flatten()),
        "weighted": F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), weight=torch.linspace(0.5, 2, 72)[: logits.shape[-1]]
        ),
        "distillation": F.kl_div(
            (logits / 0.5).log_softmax(-1), (teacher / 0.5).log_softmax(-1), reduction="batchmean", log_target=True
        ),
        "soft_targets": F.kl_div(log_probabilities, teacher.softmax(-1), reduction="sum"),
        "preference": -F.logsigmoid(0.1 * (chosen[:half].sum(-1) - chosen[half:].sum(-1))).mean(),
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1).mean(),
        "entropy_when_cold": torch.distributions.Categorical(logits=logits / 0.1).entropy().mean(),
    }


@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_custom_losses_on_logits_ignore_padded_ids(name):
    """Their values and gradients equal those on the logits of the unpadded ids."""
    ids, labels = batch(rows=4)
    model, teacher = tiny_model(name).train(), tiny_model(name)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(1.1)
        taught = teacher(ids, labels=labels).logits
    num_ids = model.config.unpadded_vocab_size
    plain = custom_losses(model(ids).logits[..., :num_ids], labels, taught[..., :num_ids])
    for kind, loss in custom_losses(model(ids, labels=labels).logits, labels, taught).items():
        expected = plain[kind]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")
        parameters = list(model.parameters())
        ours, theirs = (torch.autograd.grad(x, parameters, retain_graph=True) for x in (loss, expected))
        for actual, gradient in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-5, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.parametrize("skip_logits", [None, True])
@pytest.mark.parametrize("keep", [3, torch.tensor([2, 5])])
def test_logits_to_keep_does_not_change_the_loss(keep, skip_logits):
    model = tiny_model("gpt2")
    ids, labels = batch()
    expected = model(ids, labels=labels)
    for training in (False, True):
        output = model.train(training)(ids, labels=labels, logits_to_keep=keep, skip_logits=skip_logits)
        positions = keep if torch.is_tensor(keep) else slice(-keep, None)
        torch.testing.assert_close(output.logits, expected.logits[:, positions])
        torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("name", ["gpt2", "modern", "rope"])
def test_correct_labels_are_counted(name):
    model = tiny_model(name)
    ids, labels = batch(rows=30)
    # Make every other label correct.
    predicted = model(ids).logits.argmax(-1)
    labels[:, 1::2] = torch.where(labels[:, 1::2] == -100, -100, predicted[:, 0:-1:2])
    expected = ((predicted[:, :-1] == labels[:, 1:]) & (labels[:, 1:] != -100)).sum()
    assert expected > 10
    for skip_logits in (False, True):
        output = model(ids, labels=labels, skip_logits=skip_logits, count_correct=True)
        assert output.num_correct.shape == () and output.num_correct.dtype == torch.int64
        assert output.num_correct == expected
        assert model(ids, labels=labels, skip_logits=skip_logits).num_correct is None


@pytest.mark.parametrize("name", ["modern", "transformer"])
def test_a_frozen_head_gets_no_gradient(name):
    ids, labels = batch()
    results = []
    for skip_logits in (False, True):
        model = tiny_model(name)
        model.lm_head.requires_grad_(False)
        model(ids, labels=labels, skip_logits=skip_logits).loss.backward()
        results.append(gradients(model))
    assert "lm_head.weight" not in results[0]
    assert_same_gradients(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_frozen_body_gets_no_gradient():
    ids, labels = batch()
    results = []
    for skip_logits in (False, True):
        model = tiny_model("modern")
        model.model.requires_grad_(False)
        model(ids, labels=labels, skip_logits=skip_logits).loss.backward()
        results.append(gradients(model))
    assert results[0].keys() == {"lm_head.weight"}
    assert_same_gradients(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_head_runs():
    ids, labels = batch()
    model = tiny_model("gpt2").train()
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    assert model(ids, labels=labels, skip_logits=True).loss.item() == pytest.approx(math.log(67), rel=1e-5)
    handle.remove()
    assert model(ids, labels=labels, skip_logits=True).loss.item() > 1.05 * math.log(67)


def test_a_parametrized_head_is_called():
    ids, labels = batch()
    model = tiny_model("modern").train()
    expected = model.eval()(ids, labels=labels).loss
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    for training in (False, True):
        loss = model.train(training)(ids, labels=labels, skip_logits=True).loss
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.lm_head.parameters())


def test_a_custom_loss_function_is_used():
    model = tiny_model("gpt2").train()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum() * 0 + 5
    ids, labels = batch()
    assert model(ids, labels=labels).loss == 5
    assert model(ids, labels=labels, skip_logits=True).loss == 5


def second_order(model, loss):
    """Return gradients, and a Hessian-vector product."""
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    product = sum((a * b).sum() for a, b in zip(grads, vector, strict=True))
    seconds = torch.autograd.grad(product, parameters, allow_unused=True, materialize_grads=True)
    return [*grads, *seconds]


@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_the_loss_without_logits_differentiates_twice(name):
    ids, labels = batch()
    model = tiny_model(name, attn_implementation="eager").double().train()
    expected = second_order(model, plain_losses(model, ids, labels).mean())
    loss = model(ids, labels=labels, skip_logits=True).loss
    for actual, gradient in zip(second_order(model, loss), expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_a_gradient_penalty_on_the_embeddings_works(dtype, tolerance, checkpointing):
    ids = random_ids(14, 11)
    results = []
    for model_dtype, skip_logits in ((torch.float64, False), (dtype, True)):
        model = tiny_model("modern", attn_implementation="eager").to(model_dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeddings, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        (slope,) = torch.autograd.grad(loss, embeddings, create_graph=True)
        (loss + 100 * slope.double().square().sum()).backward()
        results.append(torch.cat([gradient.double().flatten() for gradient in gradients(model).values()]))
    exact, actual = results
    assert (actual - exact).norm() < tolerance * exact.norm()


def test_second_derivatives_include_the_scale_of_the_loss():
    hidden, weight = torch.randn(40, 8, requires_grad=True), torch.randn(9, 8)
    scale = torch.tensor(0.7, requires_grad=True)
    targets = torch.randint(9, (40,))
    results = []
    for loss in (
        loss_minigpt.linear_cross_entropy(hidden, weight, None, targets)[0],
        F.cross_entropy(hidden @ weight.t(), targets, reduction="sum"),
    ):
        (grad,) = torch.autograd.grad(loss * scale, hidden, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), (hidden, scale)))
    for actual, gradient in zip(*results, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LOSS_SWITCHES)
def test_torch_func_transforms_work(name, training):
    """Gradients of the batch, of each row (with its mask and positions), and along a direction."""
    model = tiny_model(name, attn_implementation="eager").double().train(training)
    ids, labels = batch(rows=3)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    positions = torch.arange(ids.shape[1]).repeat(3, 1)

    def loss(parameters, ids, labels, **kwargs):
        inputs = {"input_ids": ids, "labels": labels, "use_cache": False, "skip_logits": training, **kwargs}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    def loss_of_row(parameters, ids, labels, positions, mask):
        mask = None if mask is None else mask[None]
        return loss(parameters, ids[None], labels[None], position_ids=positions[None], attention_mask=mask)

    whole = torch.func.grad(loss)(parameters, ids, labels, attention_mask=torch.ones_like(ids))
    of_rows = torch.func.vmap(torch.func.grad(loss_of_row), (None, 0, 0, 0, None))
    rows = of_rows(parameters, ids, labels, positions, None)
    of_rows = torch.func.vmap(torch.func.grad(loss_of_row), (None, 0, 0, 0, 0))
    masked_rows = of_rows(parameters, ids, labels, positions, torch.ones_like(ids))
    direction = {key: torch.ones_like(p) for key, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, ids, labels), (parameters,), (direction,))

    def gradient_of(ids, labels):
        model.zero_grad()
        plain_losses(model, ids, labels).mean().backward()
        return gradients(model)

    expected = gradient_of(ids, labels)
    assert_same_gradients(whole, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope.double(), sum(g.sum() for g in expected.values()), rtol=1e-4, atol=1e-6)
    for row in range(3):
        expected = gradient_of(ids[row : row + 1], labels[row : row + 1])
        for found in (rows, masked_rows):
            assert_same_gradients({key: g[row] for key, g in found.items()}, expected, rtol=1e-4, atol=1e-6)


def test_a_backward_hook_on_the_head_runs():
    ids, labels = batch()
    model = tiny_model("gpt2").train()
    seen = []
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    model(ids, labels=labels, skip_logits=True).loss.backward()
    assert seen == [(*ids.shape, 67)]


class Examples(torch.utils.data.Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def trainer_for(model, folder, examples, trainer_class=Trainer, compute_metrics=None, **arguments):
    defaults = {
        "use_cpu": True,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    datasets = {"train_dataset": examples, "eval_dataset": examples}
    return trainer_class(model=model, args=arguments, compute_metrics=compute_metrics, **datasets)


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_trainer_accumulates_the_gradient_of_the_whole_batch(name, tmp_path):
    """After one step of SGD with learning rate 1, the change of the weights is the gradient."""
    ids, labels = batch(rows=8)
    reference = tiny_model(name)
    reference(ids, labels=labels).loss.backward()
    expected = gradients(reference)
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        model = tiny_model(name)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        trainer = trainer_for(
            model,
            tmp_path,
            Examples(input_ids=ids, labels=labels),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        result = trainer.train()
        change = {key: before[key] - p.detach() for key, p in model.named_parameters()}
        assert_same_gradients(change, expected, rtol=1e-4, atol=2e-6)
        assert result.training_loss == pytest.approx(
            plain_losses(tiny_model(name), ids, labels).mean().item(), rel=1e-4
        )


@pytest.mark.parametrize("name", ["gpt2", "modern", "transformer"])
def test_the_trainers_label_smoothing_ignores_padded_ids(name, tmp_path):
    """In training and in evaluation. Otherwise a padded embedding makes the loss infinite."""
    ids, labels = batch(rows=8)
    model = tiny_model(name)
    logits = model(ids).logits[..., : model.config.unpadded_vocab_size].double()
    losses = -logits.log_softmax(-1)[:, :-1]
    counts = labels[:, 1:] != -100
    label_losses = losses.gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
    expected = (0.8 * label_losses + 0.2 * losses.mean(-1))[counts].mean()
    expected.backward()
    expected_gradients = gradients(model)
    model = tiny_model(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = trainer_for(
        model,
        tmp_path,
        Examples(input_ids=ids, labels=labels),
        label_smoothing_factor=0.2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        per_device_eval_batch_size=8,
    )
    evaluated = trainer.evaluate()["eval_loss"]
    trained = trainer.train().training_loss
    change = {key: before[key] - p.detach() for key, p in model.named_parameters()}
    assert trained == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(change, expected_gradients, rtol=1e-4, atol=2e-6)
    assert evaluated == pytest.approx(expected.item(), rel=1e-4)


def test_the_trainer_evaluates_to_the_mean_loss(tmp_path):
    ids, labels = batch(rows=8)
    model = tiny_model("modern")
    trainer = trainer_for(model, tmp_path, Examples(input_ids=ids, labels=labels), per_device_eval_batch_size=8)
    expected = plain_losses(model, ids, labels).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    predictions = trainer.predict(Examples(input_ids=ids, labels=labels)).predictions
    assert predictions.shape == (8, 11, 72)


class WeightedTrainer(Trainer):
    """A custom loss, as in transformers' documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        logits, targets = outputs.logits[..., :-1, :], inputs["labels"][..., 1:]
        loss = 3 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("name", ["gpt2", "modern"])
def test_the_trainer_can_compute_a_custom_loss(name, tmp_path):
    ids, labels = batch(rows=8)
    model = tiny_model(name)
    expected = 3 * plain_losses(model, ids, labels).mean()
    expected.backward()
    expected_gradients = gradients(model)
    hits = (model(ids).logits.argmax(-1)[:, :-1] == labels[:, 1:]).sum().item()
    model = tiny_model(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    trainer = trainer_for(
        model,
        tmp_path,
        Examples(input_ids=ids, labels=labels),
        trainer_class=WeightedTrainer,
        compute_metrics=lambda p: {"hits": (p.predictions.argmax(-1)[:, :-1] == p.label_ids[:, 1:]).sum()},
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
    )
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected.item(), rel=1e-4) and evaluated["eval_hits"] == hits
    assert trainer.train().training_loss == pytest.approx(expected.item(), rel=1e-4)
    change = {key: before[key] - p.detach() for key, p in model.named_parameters()}
    assert_same_gradients(change, expected_gradients, rtol=1e-4, atol=5e-6)
