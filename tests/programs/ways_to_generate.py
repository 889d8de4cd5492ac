"""
Compare every way of `generate` with full forward passes without a cache. As a program, without the package:

    python -I ways_to_generate.py FOLDER SITE_PACKAGES [NAME]

It loads the checkpoint in FOLDER with the code in FOLDER. With NAME, transformers uses that name for the cache.
"""

import copy
import importlib.machinery
import sys
from pathlib import Path


class PackageHider:
    """Import finder that hides the package, as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_minigpt":
            raise ModuleNotFoundError(name)


def rename_cache(new_name):
    """Import transformers with another name for `past_key_values`, as later versions may have."""
    get_code = importlib.machinery.SourceFileLoader.get_code

    def get_renamed_code(self, module):
        if not module.startswith("transformers."):
            return get_code(self, module)
        source = Path(self.path).read_text(encoding="utf-8")
        return compile(source.replace("past_key_values", new_name), self.path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = get_renamed_code


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageHider())
    sys.path.insert(0, sys.argv[2])
    if len(sys.argv) > 3:
        rename_cache(sys.argv[3])

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402


def by_hand(model, ids, new_tokens):
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def beams_by_hand(model, ids, new_tokens, num_beams):
    """Return the best row of a beam search from `ids` (1, T), by the sum of log-probabilities."""
    beams = [(0.0, ids)]
    for _ in range(new_tokens):
        grown = []
        for score, row in beams:
            values, tokens = model(row, use_cache=False).logits[0, -1].log_softmax(-1).topk(num_beams)
            for value, token in zip(values.tolist(), tokens, strict=True):
                grown.append((score + value, torch.cat([row, token.view(1, 1)], 1)))
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return beams[0][1]


def generate(model, ids, new_tokens, **options):
    options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0, **options}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return getattr(written, "sequences", written)


def assisted(model, ids, new_tokens, **options):
    """Generate row by row: assisted generation supports one row only."""
    return torch.cat([generate(model, row, new_tokens, **options) for row in ids.split(1)])


def given_cache(model, ids, new_tokens):
    """Continue from a cache that holds the beginning, passed under the name that this version uses."""
    options = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    begun = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **options)
    [(name, cache)] = [(name, value) for name, value in begun.items() if isinstance(value, DynamicCache)]
    assert cache.get_seq_length() == ids.shape[1] + 1
    return generate(model, begun.sequences, new_tokens - 2, **{name: cache})


def continuous_batching(model, ids, new_tokens):
    batching = ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=64)
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = copy.deepcopy(model).generate_batch(
        inputs=ids.tolist(), generation_config=config, continuous_batching_config=batching
    )
    found = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    return torch.tensor([row + found[tuple(row)] for row in ids.tolist()])


WAYS = {
    "greedy": generate,
    "in training mode": lambda *args: generate(args[0].train(), *args[1:]),
    "without a cache": lambda *args: generate(*args, use_cache=False),
    "static cache": lambda *args: generate(*args, cache_implementation="static"),
    "prompt in pieces": lambda *args: generate(*args, prefill_chunk_size=2),
    "prompt lookup": lambda *args: assisted(*args, prompt_lookup_num_tokens=2),
    "early exit": lambda *args: assisted(*args, assistant_early_exit=1),
    "assisted": lambda *args: assisted(*args, assistant_model=copy.deepcopy(args[0])),
    "given cache": given_cache,
    "continuous batching": continuous_batching,
    "beams": lambda *args: generate(*args, num_beams=3, length_penalty=0.0),
}


@torch.no_grad()
def check_way(way, model, new_tokens=6):
    ids = torch.randint(28, (2, 5), generator=torch.Generator().manual_seed(1))
    if way == "beams":
        expected = torch.cat([beams_by_hand(model, row, new_tokens, 3) for row in ids.split(1)])
    else:
        expected = by_hand(model, ids, new_tokens)
    written = WAYS[way](model, ids, new_tokens)
    model.eval()
    assert torch.equal(written, expected), f"{way}: {written.tolist()} instead of {expected.tolist()}"


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules") and "hf_minigpt" not in sys.modules
    assert len(sys.argv) == 3 or sys.argv[3] in BaseModelOutputWithPast.__dataclass_fields__
    for way in WAYS:
        check_way(way, model)
    print(f"{len(WAYS)} ways are correct")
