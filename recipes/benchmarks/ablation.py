"""Tokens to a fixed held-out loss with and without each switch of the modern preset.

    python recipes/benchmarks/ablation.py --dataset path/to/reviews.parquet

The shape, the corpus and the rows are those of time_to_loss.py. The learning rates stay constant after the warmup, so
that no schedule favours one side. The held-out loss is measured every 10 steps and interpolated. Each line sets one
switch back to GPT-2's. `ratios` are tokens without the switch over tokens with it, medians over the seeds; a run that
does not reach the loss counts with all its steps.
"""

import statistics
import tempfile

from common import make_parser, print_result
from time_to_loss import LEARNING_RATES, Race, add_arguments, held_out_loss
from transformers import TrainerCallback, set_seed

from hf_minigpt.pretraining.arguments import PretrainArguments
from hf_minigpt.training.optimizers import optimizer_cls_and_kwargs
from hf_minigpt.training.processes import use_all_cores
from hf_minigpt.training.trainer import LanguageModelTrainer


# the switch set back: fields of the configuration, and flags of the recipe
WITHOUT: dict[str, tuple[dict, dict]] = {
    "Muon (AdamW at 2e-3 for all)": ({}, {"optimizer": "adamw", "learning_rate": 2e-3}),
    "rotary positions (learned)": ({"position_embedding_type": "learned"}, {}),
    "query-key norm": ({"qk_norm": False}, {}),
    "squared ReLU (GELU)": ({"hidden_act": "gelu_new"}, {}),
    "RMSNorm without parameters (LayerNorm)": ({"norm_type": "layernorm", "norm_affine": True}, {}),
    "norm after the embedding": ({"embedding_norm": False}, {}),
    "branches and head that start at zero": ({"residual_init": "gpt2"}, {}),
    "untied head": ({"tie_word_embeddings": True, "initializer_range": 0.02}, {}),
    "soft cap": ({"final_logit_softcapping": None}, {}),
    "no biases": ({"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}, {}),
}


class StopAt(TrainerCallback):
    """Stops at a held-out loss; `step` is the interpolated step at which it was reached, or None."""

    def __init__(self, race: Race, target: float, num_rows: int):
        self.race, self.target, self.num_rows = race, target, num_rows
        self.step: float | None = None
        self._before: tuple[int, float] | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % 10:
            return
        loss = held_out_loss(model, self.race.held_out, self.race.collator, self.num_rows)
        model.train()
        if loss <= self.target:
            step, before = self._before or (0, loss + 1)
            share = (before - self.target) / (before - loss)
            self.step = step + share * (state.global_step - step)
            control.should_training_stop = True
        self._before = (state.global_step, loss)


def steps_to(race: Race, seed: int, target: float, fields: dict, flags: dict) -> float | None:
    set_seed(seed)
    model = race.build_ours(**fields)
    stop = StopAt(race, target, min(race.args.eval_rows, len(race.held_out)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = race.arguments(folder, seed, race.args.max_steps) | LEARNING_RATES
        constant = {"decay_fraction": 0.0, "warmup_steps": 5}
        training_args = PretrainArguments(**(arguments | constant | flags))
        LanguageModelTrainer(
            model,
            training_args,
            data_collator=race.collator,
            train_dataset=race.rows(seed),
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(training_args),
            callbacks=[stop],
        ).train()
    return stop.step


def main() -> None:
    parser = make_parser(__doc__)
    add_arguments(parser)
    parser.set_defaults(eval_rows=64)
    parser.add_argument("--target", type=float, default=5.9)
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=WITHOUT, default=list(WITHOUT))
    args = parser.parse_args()
    use_all_cores()
    race = Race(args)
    tokens_per_step = args.rows * args.context_length

    def median_steps(fields: dict, flags: dict) -> tuple[float, bool]:
        found = [steps_to(race, seed, args.target, fields, flags) for seed in args.seeds]
        return statistics.median(step or args.max_steps for step in found), None not in found

    whole, reached = median_steps({}, {})
    if not reached:
        raise RuntimeError(
            f"The preset did not reach --target {args.target} in --max_steps {args.max_steps}. Raise one of them."
        )
    print(f"{'the preset':42} {whole * tokens_per_step:10,.0f} tokens to {args.target}", flush=True)
    ratios = {}
    for name in args.only:
        steps, reached = median_steps(*WITHOUT[name])
        ratios[name] = steps / whole
        more = "" if reached else " or more (not reached)"
        print(f"without {name:34} {steps * tokens_per_step:10,.0f} tokens: {ratios[name]:.2f} x{more}", flush=True)
    print_result(ratios=ratios)


if __name__ == "__main__":
    main()
