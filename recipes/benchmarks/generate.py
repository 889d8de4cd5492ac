"""Speed of generation: MiniGPT against `GPT2LMHeadModel.generate` with the same weights, and against the memory.

    python recipes/benchmarks/generate.py                           # all shapes, some minutes on two cores
    python recipes/benchmarks/generate.py --shapes nano --rounds 9

Both sides generate 64 tokens greedily from a prompt of 16 tokens, and must generate the same text. They take turns;
figures are medians over the rounds. Nothing is compiled. `gpt2_small_int8` is the model after `quantize_int8`; the
effect of int8 on the loss is measured on a small model that is first trained on the embedded tales. `floor` is the
time to read all weights once over the time of one of our tokens in float32.
"""

import copy
import statistics
from functools import partial

import torch
from common import make_parser, print_result, take_turns, timed
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_minigpt import MiniGPTForCausalLM, preset
from hf_minigpt.data.tales.grammar import tales
from hf_minigpt.deploy.conversion import from_gpt2
from hf_minigpt.deploy.quantization import quantize_int8
from hf_minigpt.training.processes import use_all_cores


NEW_TOKENS = 64
# layers, width, heads, vocabulary, batch
SHAPES = {
    "nano": (4, 128, 4, 1024, 1),
    "medium": (6, 384, 6, 50257, 1),
    "gpt2_small": (12, 768, 12, 50257, 1),
    "batch16": (6, 384, 6, 50257, 16),
}


def greedy_text(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )


def seconds_per_token(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    return timed(greedy_text, model, prompt) / NEW_TOKENS


def read_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.sum()


def measure(name: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return milliseconds per token by contender (`read`: to read the weights once), and the ratios of them."""
    num_layers, width, num_heads, vocab_size, batch_size = SHAPES[name]
    torch.manual_seed(0)
    # ten times GPT-2's range, so that the text does not repeat one token and equal texts mean something
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=num_heads,
        vocab_size=vocab_size,
        # no text ends before its 64 tokens
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    theirs = GPT2LMHeadModel(config).eval()
    ours = from_gpt2(theirs).eval()
    contenders: dict[str, PreTrainedModel] = {"theirs": theirs, "ours": ours}
    if name == "gpt2_small":
        contenders["int8"] = quantize_int8(copy.deepcopy(ours))

    prompt = torch.randint(1, vocab_size, (batch_size, 16))
    texts, first = {}, {}
    for contender, model in contenders.items():
        first[contender] = timed(lambda: texts.update({contender: greedy_text(model, prompt)}))  # noqa: B023
    same = all(torch.equal(texts[contender], texts["theirs"]) for contender in texts if contender != "int8")
    if not same:
        raise SystemExit(f"{name}: the texts differ.")

    sides = {contender: partial(seconds_per_token, model, prompt) for contender, model in contenders.items()}
    with torch.no_grad():
        times = take_turns({**sides, "read": lambda: min(timed(read_weights, theirs) for _ in range(3))}, rounds)
    token = {contender: 1000 * statistics.median(values) for contender, values in times.items()}
    for contender in contenders:
        ratio = token["theirs"] / token[contender]
        extra = first[contender] - token[contender] * NEW_TOKENS / 1000
        print(
            f"{name:>10} {contender:>8}: {token[contender]:7.2f} ms a token, {ratio:5.2f} x; "
            f"the first text took {extra:.1f} s more",
            flush=True,
        )
    print(f"{name:>10} {'read':>8}: {token['read']:7.2f} ms for all weights once; texts equal", flush=True)

    ratios = {name: token["theirs"] / token["ours"]}
    if name == "gpt2_small":
        ratios["gpt2_small_int8"] = token["theirs"] / token["int8"]
        ratios["floor"] = token["read"] / token["ours"]
    return token, ratios


def int8_loss(steps: int) -> tuple[float, float]:
    """Return the held-out loss of a GPT-2 of 4 x 128 on the tales' bytes, in float32 and in int8."""
    torch.manual_seed(0)
    ids = torch.tensor(list("\n".join(tales(2000)).encode()))
    model = MiniGPTForCausalLM(
        preset("gpt2", vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    split = len(ids) * 9 // 10
    for _ in range(steps):
        starts = torch.randint(split - 128, (16,))
        rows = torch.stack([ids[start : start + 128] for start in starts])
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = ids[split:][: 64 * 128].view(64, 128)
    model.eval()
    with torch.no_grad():
        exact = model(held_out, labels=held_out).loss.item()
        return exact, quantize_int8(model)(held_out, labels=held_out).loss.item()


def main() -> None:
    parser = make_parser(__doc__, rounds=5, threads=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--train_steps", type=int, default=150, help="of the model that measures int8's loss")
    args = parser.parse_args()

    use_all_cores(args.threads)
    ratios: dict[str, float] = {}
    tokens = {}
    for name in args.shapes:
        tokens[name], more = measure(name, args.rounds)
        ratios |= more
    result = {"milliseconds_a_token": tokens}
    if "gpt2_small" in args.shapes:
        exact, quantized = int8_loss(args.train_steps)
        print(f"held-out loss {exact:.4f} in float32, {quantized:.4f} in int8: {quantized / exact - 1:+.2%}")
        result["int8_loss_increase"] = quantized / exact - 1
    print_result(**result, ratios=ratios)


if __name__ == "__main__":
    main()
