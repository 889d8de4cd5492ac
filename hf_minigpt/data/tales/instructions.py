"""Embedded instructions: questions and tasks about the tales, whose right answers the grammar knows.

A conversation shows the beginning of a tale and asks several things about it, or sets small tasks that need none. What
a question turns on is its combination: what is asked about and what is true of it, beside what is true of the others
of its kind (Anna is the baker, where Otto is the sailor). A tenth of all combinations, the same ones always, is held
out: no training conversation asks for them, and every held-out one ends with one of them, so that a model that has
only learnt by heart cannot answer.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from . import grammar as tales
from .grammar import World


HELD_OUT_SHARE = 0.1
# two people and a thing at least, and with all the turns no longer than the context of a base model on the tales
MIN_SENTENCES, MAX_SENTENCES = 5, 11
MAX_TURNS = 5


@dataclass(frozen=True)
class Question:
    """A question with its answer; `combination` is what it turns on, its category first."""

    text: str
    answer: str
    combination: tuple[str, ...]


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a tale: its text, and the world at its end."""

    text: str
    world: World

    @property
    def cast(self) -> tuple[str, ...]:
        """The people and their trades, in turns."""
        return _flat(self.world.roles)


def _flat(facts: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(part for fact in facts.items() for part in fact)


def draw_excerpt(rng: random.Random) -> Excerpt:
    """The first sentences of a tale."""
    text = tales.generate_tale(rng).text
    sentences = tales.split_sentences(text)
    num = MIN_SENTENCES + int(rng.random() * (min(len(sentences), MAX_SENTENCES) - MIN_SENTENCES + 1))
    end = 0
    for sentence in sentences[:num]:
        end = text.index(sentence, end) + len(sentence)
    return Excerpt(text[:end], tales.parse(text[:end]).world)


def _pick(options: Sequence[str], rng: random.Random) -> str:
    # random() is the one method whose stream Python promises to keep
    return options[int(rng.random() * len(options))]


def _ask_place(excerpt: Excerpt, rng: random.Random) -> Question:
    person = _pick(excerpt.world.people, rng)
    place = excerpt.world.where[person]
    text = _pick((f"Where is {person}?", f"Tell me where {person} is."), rng)
    return Question(text, f"Now {person} is in the {place}.", ("place", person, *_flat(excerpt.world.where)))


def _ask_thing(excerpt: Excerpt, rng: random.Random) -> Question:
    thing = _pick(excerpt.world.things, rng)
    keeper = excerpt.world.keeper[thing]
    text = _pick((f"Where is the {thing}?", f"Tell me where the {thing} is."), rng)
    fate = f"belonged to {keeper}" if keeper in excerpt.world.roles else f"stayed in the {keeper}"
    combination = ("thing", thing, *excerpt.cast, *_flat(excerpt.world.keeper))
    return Question(text, f"At last the {thing} {fate}.", combination)


def _ask_people(excerpt: Excerpt, rng: random.Random) -> Question:
    people = [f"{person} the {role}" for person, role in excerpt.world.roles.items()]
    text = _pick(("Who is in the tale?", "Tell me who is in the tale."), rng)
    return Question(text, f"There are {' and '.join(people)}.", ("people", *excerpt.cast))


def _ask_hero(excerpt: Excerpt, rng: random.Random) -> Question:
    hero, role = next(iter(excerpt.world.roles.items()))
    text = _pick(("Who is the tale about?", "Tell me whom the tale is about."), rng)
    return Question(text, f"This is a tale of {hero} the {role}.", ("hero", *excerpt.cast))


def _ask_homes(excerpt: Excerpt, rng: random.Random) -> Question:
    # each person comes with a place; only then are there others
    homes = tuple(zip(excerpt.world.people, excerpt.world.places, strict=False))
    text = _pick(("Where do they live?", "Tell me where they live."), rng)
    answer = " and ".join(f"{person} lived in a {place}" for person, place in homes)
    return Question(text, f"{answer}.", ("homes", *(part for home in homes for part in home)))


def _ask_things(excerpt: Excerpt, rng: random.Random) -> Question:
    things = excerpt.world.things
    text = _pick(("Which things are in the tale?", "Tell me which things are in the tale."), rng)
    answer = " and ".join(f"a {thing}" for thing in things)
    return Question(text, f"The tale has {answer}.", ("things", *things))


def _ask_opening(rng: random.Random) -> Question:
    person, role, place = _pick(tales.NAMES, rng), _pick(tales.ROLES, rng), _pick(tales.PLACES, rng)
    text = _pick(
        (
            f"Open a tale of {person} the {role} in a {place}.",
            f"Open a tale in a {place}, of {person} the {role}.",
        ),
        rng,
    )
    answer = f"Once upon a time, {person} the {role} lived in a {place}."
    return Question(text, answer, ("opening", person, role, place))


def _ask_rewrite(rng: random.Random) -> Question:
    giver, receiver = _pick(tales.NAMES, rng), _pick(tales.NAMES, rng)
    while receiver == giver:
        receiver = _pick(tales.NAMES, rng)
    thing = _pick(tales.THINGS, rng)
    given, handed = f"{giver} gave {receiver} the {thing}.", f"{giver} handed the {thing} to {receiver}."
    if rng.random() < 0.5:
        given, handed = handed, given
    text = _pick((f"Tell it again, but not so: {given}", f"What is another way of telling this? {given}"), rng)
    return Question(text, handed, ("rewrite", giver, receiver, thing))


# What is asked about an excerpt, and what is asked without one. Answers have the tales' own turns of phrase where
# there are any, and what decides a word stands right before it. Two layers learn no more in the time: asked who the
# baker is, what Otto's trade is or what the lantern looks like, they stay at chance.
ABOUT_A_TALE: dict[str, Callable[[Excerpt, random.Random], Question]] = {
    "hero": _ask_hero,
    "people": _ask_people,
    "homes": _ask_homes,
    "place": _ask_place,
    "things": _ask_things,
    "thing": _ask_thing,
}
WITHOUT_A_TALE: dict[str, Callable[[random.Random], Question]] = {"opening": _ask_opening, "rewrite": _ask_rewrite}
CATEGORIES = (*ABOUT_A_TALE, *WITHOUT_A_TALE)


def is_held_out(combination: tuple[str, ...]) -> bool:
    """Whether a combination is kept from training: told by its hash, hence the same in every run."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


Record = dict[str, object]


def training_records(num: int, seed: int = 0) -> Iterator[Record]:
    """Conversations of one to five turns on combinations that are not held out.

    Returns:
        `{"messages": [...], "category": ...}`; the category is the last question's.
    """
    rng = random.Random(f"training {seed}")
    for _ in range(num):
        num_turns = 1 + int(rng.random() * MAX_TURNS)
        yield _record(rng, num_turns, last=None)


def held_out_records(num: int, seed: int = 0) -> Iterator[Record]:
    """As `training_records`, each category equally often, but the last question is of a held-out combination."""
    rng = random.Random(f"held out {seed}")
    for i in range(num):
        num_turns = 1 + int(rng.random() * MAX_TURNS)
        yield _record(rng, num_turns, last=CATEGORIES[i % len(CATEGORIES)])


def _record(rng: random.Random, num_turns: int, last: str | None) -> Record:
    """A conversation; one that gets stuck, its tale having nothing that may be asked, is drawn anew."""
    while True:
        category = last or _pick(CATEGORIES, rng)
        excerpt = draw_excerpt(rng) if category in ABOUT_A_TALE else None
        questions = _questions(rng, excerpt, num_turns, category, ends_held_out=last is not None)
        if questions is None:
            continue
        messages = []
        for i, question in enumerate(questions):
            text = f"{excerpt.text}\n\n{question.text}" if excerpt and i == 0 else question.text
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": question.answer}]
        return {"messages": messages, "category": category}


def _questions(
    rng: random.Random, excerpt: Excerpt | None, num_turns: int, category: str, ends_held_out: bool
) -> list[Question] | None:
    questions: list[Question] = []
    kinds = ABOUT_A_TALE if excerpt else WITHOUT_A_TALE
    for turn in range(num_turns):
        is_last = turn == num_turns - 1
        for _ in range(20):
            kind = category if is_last else _pick(list(kinds), rng)
            question = ABOUT_A_TALE[kind](excerpt, rng) if excerpt else WITHOUT_A_TALE[kind](rng)
            is_new = question.combination not in [q.combination for q in questions]
            if is_new and is_held_out(question.combination) == (is_last and ends_held_out):
                questions.append(question)
                break
        else:
            return None
    return questions
