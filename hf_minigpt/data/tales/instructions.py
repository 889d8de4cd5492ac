"""Generate the embedded instructions: conversations about the tales, with answers that the grammar knows.

A conversation shows the beginning of a tale and asks questions about it, or sets small tasks without a tale. The
combination of a question is what its answer depends on: what is asked about, and the facts of the tale that decide the
answer, including those about other people or things (Anna is the baker and Otto is the sailor). A fixed tenth of all
combinations is held out. Training conversations never ask about them, and each held-out conversation ends with one, so
a model cannot answer from memory.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from . import grammar
from .grammar import World, pick


HELD_OUT_SHARE = 0.1
# Enough for two people and a thing, and short enough that all turns fit in the context of a base model on the tales.
MIN_SENTENCES, MAX_SENTENCES = 5, 11
MAX_TURNS = 5


@dataclass(frozen=True)
class Question:
    """A question with its answer and its combination: the category, then what the answer depends on."""

    text: str
    answer: str
    combination: tuple[str, ...]


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a tale: its text, and the state after it."""

    text: str
    world: World

    @property
    def cast(self) -> tuple[str, ...]:
        """The people and their trades, alternating."""
        return _flat(self.world.roles)


def _flat(facts: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(part for fact in facts.items() for part in fact)


def draw_excerpt(rng: random.Random) -> Excerpt:
    """Return the first sentences of a random tale."""
    text = grammar.generate_tale(rng).text
    sentences = grammar.split_sentences(text)
    num = MIN_SENTENCES + int(rng.random() * (min(len(sentences), MAX_SENTENCES) - MIN_SENTENCES + 1))
    end = 0
    for sentence in sentences[:num]:
        end = text.index(sentence, end) + len(sentence)
    return Excerpt(text[:end], grammar.parse(text[:end]).world)


def _ask_place(excerpt: Excerpt, rng: random.Random) -> Question:
    person = pick(excerpt.world.people, rng)
    place = excerpt.world.where[person]
    text = pick((f"Where is {person}?", f"Tell me where {person} is."), rng)
    return Question(text, f"Now {person} is in the {place}.", ("place", person, *_flat(excerpt.world.where)))


def _ask_thing(excerpt: Excerpt, rng: random.Random) -> Question:
    thing = pick(excerpt.world.things, rng)
    keeper = excerpt.world.keeper[thing]
    text = pick((f"Where is the {thing}?", f"Tell me where the {thing} is."), rng)
    fate = f"belonged to {keeper}" if keeper in excerpt.world.roles else f"stayed in the {keeper}"
    combination = ("thing", thing, *excerpt.cast, *_flat(excerpt.world.keeper))
    return Question(text, f"At last the {thing} {fate}.", combination)


def _ask_people(excerpt: Excerpt, rng: random.Random) -> Question:
    people = [f"{person} the {role}" for person, role in excerpt.world.roles.items()]
    text = pick(("Who is in the tale?", "Tell me who is in the tale."), rng)
    return Question(text, f"There are {' and '.join(people)}.", ("people", *excerpt.cast))


def _ask_hero(excerpt: Excerpt, rng: random.Random) -> Question:
    hero, role = next(iter(excerpt.world.roles.items()))
    text = pick(("Who is the tale about?", "Tell me whom the tale is about."), rng)
    return Question(text, f"This is a tale of {hero} the {role}.", ("hero", *excerpt.cast))


def _ask_homes(excerpt: Excerpt, rng: random.Random) -> Question:
    # the first places are those that the people were introduced with
    homes = tuple(zip(excerpt.world.people, excerpt.world.places, strict=False))
    text = pick(("Where do they live?", "Tell me where they live."), rng)
    answer = " and ".join(f"{person} lived in a {place}" for person, place in homes)
    return Question(text, f"{answer}.", ("homes", *(part for home in homes for part in home)))


def _ask_things(excerpt: Excerpt, rng: random.Random) -> Question:
    things = excerpt.world.things
    text = pick(("Which things are in the tale?", "Tell me which things are in the tale."), rng)
    answer = " and ".join(f"a {thing}" for thing in things)
    return Question(text, f"The tale has {answer}.", ("things", *things))


def _ask_opening(rng: random.Random) -> Question:
    person, role, place = pick(grammar.NAMES, rng), pick(grammar.ROLES, rng), pick(grammar.PLACES, rng)
    text = pick(
        (
            f"Open a tale of {person} the {role} in a {place}.",
            f"Open a tale in a {place}, of {person} the {role}.",
        ),
        rng,
    )
    answer = f"Once upon a time, {person} the {role} lived in a {place}."
    return Question(text, answer, ("opening", person, role, place))


def _ask_rewrite(rng: random.Random) -> Question:
    giver, receiver = pick(grammar.NAMES, rng), pick(grammar.NAMES, rng)
    while receiver == giver:
        receiver = pick(grammar.NAMES, rng)
    thing = pick(grammar.THINGS, rng)
    given, handed = f"{giver} gave {receiver} the {thing}.", f"{giver} handed the {thing} to {receiver}."
    if rng.random() < 0.5:
        given, handed = handed, given
    text = pick((f"Tell it again, but not so: {given}", f"What is another way of telling this? {given}"), rng)
    return Question(text, handed, ("rewrite", giver, receiver, thing))


# Questions about an excerpt, and tasks without one. Answers use the phrases of the tales where possible, with the word
# that determines the next one right before it. A two-layer model learns no more in a short run: on the trade of a
# person, the person of a trade or the look of a thing, it stays at chance.
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
    """Return whether a combination is held out. It depends only on its hash, so it is the same in every run."""
    digest = hashlib.blake2b("|".join(combination).encode(), digest_size=8).digest()
    return int.from_bytes(digest) < HELD_OUT_SHARE * 2**64


Record = dict[str, object]


def training_records(num: int, seed: int = 0) -> Iterator[Record]:
    """Yield conversations of one to five turns without held-out combinations.

    Args:
        num: number of conversations.
        seed: seed of the generator.

    Yields:
        `{"messages": [...], "category": ...}`, with the category of the last question.
    """
    rng = random.Random(f"training {seed}")
    for _ in range(num):
        num_turns = 1 + int(rng.random() * MAX_TURNS)
        yield _record(rng, num_turns, last=None)


def held_out_records(num: int, seed: int = 0) -> Iterator[Record]:
    """Yield conversations whose last question has a held-out combination, with all categories equally frequent."""
    rng = random.Random(f"held out {seed}")
    for i in range(num):
        num_turns = 1 + int(rng.random() * MAX_TURNS)
        yield _record(rng, num_turns, last=CATEGORIES[i % len(CATEGORIES)])


def _record(rng: random.Random, num_turns: int, last: str | None) -> Record:
    """Draw a conversation, again if no allowed question can be found for its tale."""
    while True:
        category = last or pick(CATEGORIES, rng)
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
            kind = category if is_last else pick(list(kinds), rng)
            question = ABOUT_A_TALE[kind](excerpt, rng) if excerpt else WITHOUT_A_TALE[kind](rng)
            is_new = question.combination not in [q.combination for q in questions]
            if is_new and is_held_out(question.combination) == (is_last and ends_held_out):
                questions.append(question)
                break
        else:
            return None
    return questions
