import importlib.util
import math
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_minigpt.data.tales import grammar
from hf_minigpt.data.tales.grammar import World, generate_tale, log2_probability, parse, tales


def load_kneser_ney():
    path = Path(__file__).parents[3] / "recipes" / "benchmarks" / "kneser_ney.py"
    spec = importlib.util.spec_from_file_location("kneser_ney", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sample() -> list[grammar.Tale]:
    rng = random.Random(7)
    return [generate_tale(rng) for _ in range(1200)]


@pytest.mark.smoke
def test_parsed_text_has_the_probability_of_its_generation(sample):
    for tale in sample:
        assert log2_probability(tale.text) == pytest.approx(tale.log2_probability, abs=1e-9)


def test_generated_tales_are_true_and_parse_back_to_their_world(sample):
    for tale in sample:
        report = parse(tale.text)
        assert report.num_parsed == report.num_sentences > 0
        assert report.num_true == report.num_claims > 0
        assert report.world == tale.world


def test_every_sentence_has_one_wording_and_every_wording_occurs(sample):
    seen = set()
    for tale in sample:
        for sentence in grammar.split_sentences(tale.text):
            matches = [i for i, (_, pattern) in enumerate(grammar._PATTERNS) if pattern.fullmatch(sentence)]
            assert len(matches) == 1
            seen.update(matches)
    assert seen == set(range(len(grammar._PATTERNS)))
    wordings = [wording for entry in grammar.KINDS.values() for wording in entry.wordings]
    assert set(re.findall(r"{(\w+)}", " ".join(wordings))) == set(grammar.SLOTS)


def test_probabilities_of_all_tales_of_a_small_grammar_sum_to_one(monkeypatch):
    def shorten(slot: grammar.Slot) -> grammar.Slot:
        if slot.is_claim:
            return slot
        return replace(slot, options=lambda world, values: slot.options(world, values)[:1])

    def endings(world: World, text: str) -> Iterator[str]:
        for kind in grammar.continuations(world):
            if kind == grammar.END:
                yield text
                continue
            for wording in grammar.KINDS[kind].wordings:
                for values in fillings(world, wording):
                    after = deepcopy(world)
                    grammar.advance(after, kind, values)
                    separator = "\n\n" if grammar.KINDS[kind].starts_paragraph else " "
                    yield from endings(after, text + (separator if text else "") + wording.format_map(values))

    def fillings(world: World, wording: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = [{}]
        for name in re.findall(r"{(\w+)}", wording):
            found = [{**v, name: option} for v in found for option in grammar.SLOTS[name].options(world, v)]
        return found

    kept = ("opening", "give", "moral")
    kinds = {k: e if k in kept else replace(e, wordings=e.wordings[:1]) for k, e in grammar.KINDS.items()}
    monkeypatch.setattr(grammar, "KINDS", kinds)
    monkeypatch.setattr(grammar, "SLOTS", {name: shorten(slot) for name, slot in grammar.SLOTS.items()})
    monkeypatch.setattr(grammar, "MAX_JOURNEYS", 1)
    texts = list(endings(World(), ""))
    assert len(texts) == len(set(texts)) > 1000
    assert math.fsum(2 ** log2_probability(text) for text in texts) == pytest.approx(1, abs=1e-9)


def test_first_tales_of_a_seed_do_not_depend_on_their_number():
    assert list(tales(5, seed=3)) == list(tales(9, seed=3))[:5]
    assert set(tales(5, seed=3)).isdisjoint(tales(5, seed=4))


def test_changed_claims_are_false(sample):
    for tale in sample[:60]:
        world, position = World(), 0
        for sentence in grammar.split_sentences(tale.text):
            position = tale.text.index(sentence, position)
            kind, values = grammar.match_sentence(sentence)
            (match,) = [m for _, pattern in grammar._PATTERNS if (m := pattern.fullmatch(sentence))]
            for name in values:
                slot = grammar.SLOTS[name]
                if not slot.is_claim:
                    continue
                allowed = slot.options(world, values)
                wrong = next(word for word in slot.vocabulary.split("|") if word not in allowed)
                start, end = match.span(name)
                changed = tale.text[: position + start] + wrong + tale.text[position + end :]
                report = parse(changed)
                assert report.num_parsed == report.num_sentences
                assert report.num_true < report.num_claims
                assert log2_probability(changed) == -math.inf
            grammar.advance(world, kind, values)


def test_incomplete_tales_have_no_probability(sample):
    text = sample[0].text
    assert log2_probability("") == -math.inf
    assert log2_probability(text + " ") == -math.inf
    assert log2_probability(text.replace("\n\n", " ")) == -math.inf
    sentences = grammar.split_sentences(text)
    for num_sentences in range(len(sentences) - 2):
        assert log2_probability(text[: text.index(sentences[num_sentences])].rstrip()) == -math.inf


def test_an_unfinished_last_sentence_is_not_counted(sample):
    whole = parse(sample[0].text)
    cut = parse(sample[0].text[:-3])
    assert cut.num_sentences == cut.num_parsed == whole.num_sentences - 1
    assert parse("The cat. Sat.").num_sentences == 2
    assert parse("The cat. Sat.").num_parsed == 0


SENTENCES = [sentence for text in tales(50, seed=5) for sentence in grammar.split_sentences(text)]


@given(
    st.text()
    | st.lists(st.sampled_from(SENTENCES), max_size=12).map(" ".join)
    | st.lists(st.sampled_from(["Anna", "the", "mill", ".", '"', "?", "\n", "baker", "gave"])).map(" ".join)
)
def test_any_text_can_be_parsed(text):
    report = parse(text)
    assert 0 <= report.num_parsed <= report.num_sentences
    assert 0 <= report.num_true <= report.num_claims
    assert log2_probability(text) <= 0


def test_tales_are_short_and_have_a_small_vocabulary(sample):
    lengths = [len(tale.text.split()) for tale in sample]
    assert min(lengths) >= 60
    assert max(lengths) <= 150
    assert all(tale.text.isascii() for tale in sample)
    assert 150 <= len({word for tale in sample for word in re.findall(r"\w+", tale.text)}) <= 400


def test_n_gram_loss_is_far_above_the_entropy():
    kneser_ney = load_kneser_ney()
    held_out = list(tales(120, seed=1))
    bits = kneser_ney.bits_per_byte(list(tales(2500, seed=0)), held_out)
    assert bits >= 1.4 * kneser_ney.entropy_per_byte(held_out)


def test_kneser_ney_probabilities_sum_to_one():
    kneser_ney = load_kneser_ney()
    rng = random.Random(0)
    train = [[rng.choice("abcde") for _ in range(rng.randint(0, 12))] for _ in range(200)]
    model = kneser_ney.KneserNey(train, 4, "abcdefg")
    for context in ("", "a", "abc", "fga", "bcdea", "g"):
        followed = [model.log2_probabilities([[*context, symbol]])[len(context)] for symbol in "abcdefg"]
        ended = model.log2_probabilities([list(context)])[-1]
        assert sum(2**x for x in (*followed, ended)) == pytest.approx(1)


def test_unknown_words_cost_bits():
    kneser_ney = load_kneser_ney()
    train = ["a cat sat", "a dog sat", "a cat ran", "a bird sang"]
    plain = kneser_ney.bits_per_byte(train, ["a cat sat"], order=3)
    strange = kneser_ney.bits_per_byte(train, ["a zyx sat"], order=3)
    # three bytes that do not occur in training cost more than three uniform guesses among 26 letters
    assert (strange - plain) * len("a cat sat") > 3 * math.log2(26)
