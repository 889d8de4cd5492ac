"""The embedded questions about the tales: right answers, and held-out combinations that training does not contain."""

import collections
import random
import re

import pytest

from hf_minigpt.data.tales import grammar as tales
from hf_minigpt.data.tales import instructions as tale_instructions
from hf_minigpt.instructions.records import tale_conversations


TALE = (
    "Once upon a time, Anna the baker lived in a mill. The baker liked the mill, because it was cold. The baker "
    "owned a golden key and was proud of the key. Not far away, Otto the sailor rented a barn. The sailor found the "
    "barn too dark. His aunt gave the sailor a blue drum but missed the drum.\n\nAt dawn Otto drove to the mill. Anna "
    "the baker was in the mill, reading. Anna gave Otto the key.\n\nAt noon Otto rode to a white tower. Otto hid the "
    "drum in the tower."
)
ANSWERS = {
    "Who is the tale about?": "This is a tale of Anna the baker.",
    "Who is in the tale?": "There are Anna the baker and Otto the sailor.",
    "Where do they live?": "Anna lived in a mill and Otto lived in a barn.",
    "Where is Anna?": "Now Anna is in the mill.",
    "Where is Otto?": "Now Otto is in the tower.",
    "Which things are in the tale?": "The tale has a key and a drum.",
    "Where is the key?": "At last the key belonged to Otto.",
    "Where is the drum?": "At last the drum stayed in the tower.",
}


def test_answers_about_a_tale_are_right():
    excerpt = tale_instructions.Excerpt(TALE, tales.parse(TALE).world)
    rng = random.Random(0)
    found = {}
    for _ in range(400):
        for ask in tale_instructions.ABOUT_A_TALE.values():
            question = ask(excerpt, rng)
            found[question.text] = question.answer
    assert {text: found[text] for text in ANSWERS} == ANSWERS
    assert found["Tell me where Anna is."] == ANSWERS["Where is Anna?"]


def test_tasks_without_a_tale_are_right():
    rng = random.Random(0)
    for _ in range(50):
        rewrite, opening = (tale_instructions.WITHOUT_A_TALE[kind](rng) for kind in ("rewrite", "opening"))
        assert tales.match_sentence(rewrite.answer)[0] == "give" and rewrite.answer not in rewrite.text
        for word in rewrite.combination[1:]:
            assert word in rewrite.text and word in rewrite.answer
        kind, values = tales.match_sentence(opening.answer)
        assert kind == "opening" and set(values.values()) == set(opening.combination[1:])
        assert all(word in opening.text for word in opening.combination[1:])


def test_training_contains_no_held_out_combination():
    training = list(tale_instructions.training_records(400))
    held_out = list(tale_instructions.held_out_records(120))
    assert collections.Counter(r["category"] for r in held_out) == dict.fromkeys(tale_instructions.CATEGORIES, 15)

    def asked(record, turns):
        """The combinations of a record's questions, read from its text: the people in the tale, and the answer."""
        tale = record["messages"][0]["content"]
        cast = tuple(dict.fromkeys(re.findall(r"[A-Z][a-z]+ the [a-z]+(?=[ ,])", tale)))
        return {(cast, record["messages"][turn]["content"]) for turn in turns if len(cast) == 2}

    trained = set().union(*(asked(record, range(1, len(record["messages"]), 2)) for record in training))
    about_people = [record for record in held_out if record["category"] in ("hero", "people")]
    combinations = set().union(*(asked(record, [-1]) for record in about_people))
    assert len(combinations) > 20 and len(trained) > 400 and not trained & combinations
    # a tenth of the combinations is held out
    rng = random.Random(0)
    shares = [
        tale_instructions.is_held_out(ask(tale_instructions.draw_excerpt(rng), rng).combination)
        for ask in tale_instructions.ABOUT_A_TALE.values()
        for _ in range(60)
    ]
    assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.05)
    assert list(tale_instructions.training_records(5)) == training[:5]


def test_embedded_conversations_have_all_categories():
    training, held_out, counts = tale_conversations(200, 16)
    assert counts.read == 200 and len(training) == 200 - counts.num_lost
    assert max(len(c.messages) for c in training) == 10 and {c.category for c in held_out} == set(
        tale_instructions.CATEGORIES
    )
