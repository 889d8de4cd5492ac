"""Generate the embedded reviews, labelled by a sentiment that depends on the order of the words.

Most judgements contain a positive and a negative word, and the sentence structure decides which one counts: "At first
I found it quite dull indeed, yet in the end I found it quite charming indeed" is positive. With the two words
exchanged it is negative, with the same words and the same pairs of neighbouring words. Other judgements negate a word
from a distance ("Nobody who reads it will call it quite dull indeed"). Only one review in three also has a direct
judgement, so counts of words or word pairs classify only about two thirds of the reviews correctly.
"""

import random
from collections.abc import Sequence

from .grammar import NAMES, PASTIMES, PLACE_ADJECTIVES, PLACES, ROLES, THING_ADJECTIVES, THINGS


TALE_REVIEW_LABELS = ("negative", "positive")

PRAISE = ("charming", "clever", "delightful", "funny", "gripping", "lively", "moving", "splendid", "tender", "witty")
BLAME = ("boring", "clumsy", "confused", "dull", "empty", "flat", "hollow", "silly", "stale", "tiresome")

# {yes} is a word of the review's sentiment, {no} one of the opposite sentiment
JUDGEMENTS = (
    "At first I found it quite {no} indeed, yet in the end I found it quite {yes} indeed.",
    "In the end I found it quite {yes} indeed, though at first I found it quite {no} indeed.",
    "My {kin} found it quite {no} indeed, but I found it quite {yes} indeed.",
    "I found it quite {yes} indeed, but my {kin} found it quite {no} indeed.",
    "The tale before it was quite {no} indeed, while this one was quite {yes} indeed.",
    "This one was quite {yes} indeed, while the tale before it was quite {no} indeed.",
    "Everyone who reads it will call it quite {yes} indeed.",
    "Nobody who reads it will call it quite {no} indeed.",
    "I am sure that a {role} would find it quite {yes} indeed.",
    "I doubt that a {role} would find it quite {no} indeed.",
)
PLAIN = ("What {a_yes} tale!", "It is {a_yes} tale, all in all.")
STORY = (
    "It is about {name} the {role} and {a_thing}.",
    "A {role} loses {a_thing} in a {place}.",
    "{name} comes to a {where} {place} and meets a {role}.",
    "There is much {pastime} in it.",
    "Most of it happens in a {where} {place}.",
    "I read it in the {place} on a {day}.",
    "{name} gave it to me for my birthday.",
    "The pictures show {name}, who is {pastime} in a {place}.",
)
KIN = ("aunt", "brother", "cousin", "father", "mother", "neighbour", "sister", "teacher", "uncle")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

PLAIN_SHARE = 1 / 3


def tale_reviews(num: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Return distinct reviews and their labels, negative (0) and positive (1) in turn.

    Args:
        num: number of reviews. The first reviews of a seed are the same for any `num`.
        seed: seed of the generator.
    """
    generator = random.Random(seed)
    texts: dict[str, int] = {}
    while len(texts) < num:
        label = len(texts) % 2
        texts.setdefault(_review(label, generator), label)
    return list(texts), list(texts.values())


def _review(label: int, generator: random.Random) -> str:
    sentences = generator.sample(STORY, generator.randint(1, 3))
    sentences += generator.sample(JUDGEMENTS, generator.randint(1, 2))
    if generator.random() < PLAIN_SHARE:
        sentences.append(generator.choice(PLAIN))
    generator.shuffle(sentences)
    praise, blame = PRAISE, BLAME
    yes, no = (praise, blame) if label else (blame, praise)
    return " ".join(sentence.format_map(_words(yes, no, generator)) for sentence in sentences)


def _words(yes: Sequence[str], no: Sequence[str], generator: random.Random) -> dict[str, str]:
    choose = generator.choice
    return {
        "yes": choose(yes),
        "no": choose(no),
        "a_yes": _with_article(choose(yes)),
        "kin": choose(KIN),
        "name": choose(NAMES),
        "role": choose(ROLES),
        "place": choose(PLACES),
        "where": choose(PLACE_ADJECTIVES),
        "a_thing": _with_article(f"{choose(THING_ADJECTIVES)} {choose(THINGS)}"),
        "pastime": choose(PASTIMES),
        "day": choose(DAYS),
    }


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
