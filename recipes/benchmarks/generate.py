"""How fast text is written: ours against `GPT2LMHeadModel.generate` with the same weights, and against the memory.

    python recipes/benchmarks/generate.py                           # all shapes, some minutes on two cores
    python recipes/benchmarks/generate.py --shapes nano --rounds 9

Both write 64 tokens greedily after a prompt of 16 and have to write the same text. They take turns, and the median
turn counts. Ours is `generate()` as it comes, nothing compiled, which is our best and our default in one: the names
with `_eager` are the same figures. `_int8` is `quantize_int8`. What int8 does to the loss is measured on a model
trained for a moment on the embedded tales. `floor` is the time to read all weights once, over that of our fastest
token in float32.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
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


def write(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )


def seconds(function: Callable, *args) -> float:
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def read_weights(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.sum()


def measure(name: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds a token by contender (and `read`, of the weights), and the ratios that follow."""
    num_layers, width, num_heads, vocab_size, batch_size = SHAPES[name]
    torch.manual_seed(0)
    # Weights ten times GPT-2's initial ones: text that does not repeat one token, so that equality means something.
    config = GPT2Config(
        n_layer=num_layers,
        n_embd=width,
        n_head=num_heads,
        vocab_size=vocab_size,
        # nothing ends a text before its 64 tokens
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    )
    theirs = GPT2LMHeadModel(config).eval()
    eager = from_gpt2(theirs).eval()
    contenders: dict[str, PreTrainedModel] = {"theirs": theirs, "eager": eager}
    if name == "gpt2_small":
        contenders["int8"] = quantize_int8(copy.deepcopy(eager))

    prompt = torch.randint(1, vocab_size, (batch_size, 16))
    texts, first = {}, {}
    for contender, model in contenders.items():
        begin = time.perf_counter()
        texts[contender] = write(model, prompt)
        first[contender] = time.perf_counter() - begin
    same = all(torch.equal(texts[contender], texts["theirs"]) for contender in texts if contender != "int8")
    if not same:
        raise SystemExit(f"{name}: the texts differ.")

    times: dict[str, list[float]] = {contender: [] for contender in (*contenders, "read")}
    with torch.no_grad():
        for i in range(rounds):
            order = list(contenders)[:: 1 if i % 2 else -1]
            for contender in order:
                times[contender].append(seconds(write, contenders[contender], prompt) / NEW_TOKENS)
            times["read"].append(min(seconds(read_weights, theirs) for _ in range(3)))
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

    ours = token["eager"]
    ratios = {name: token["theirs"] / ours}
    if batch_size == 1:
        ratios[f"{name}_eager"] = token["theirs"] / token["eager"]
    if name == "gpt2_small":
        ratios["gpt2_small_int8"] = token["theirs"] / token["int8"]
        ratios["floor"] = token["read"] / ours
    return token, ratios


def int8_loss(steps: int) -> tuple[float, float]:
    """The held-out loss of a GPT-2 of 4 x 128 on the tales' bytes, in float32 and in int8."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--train_steps", type=int, default=150, help="of the model whose loss int8 is tested on")
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
    print(json.dumps({**result, "ratios": ratios}))


if __name__ == "__main__":
    main()
