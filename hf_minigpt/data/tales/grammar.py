"""Generate the embedded corpus: short tales from a grammar that knows the exact probability of each tale.

A tale says who is where and who has what, and stays consistent. Most words after the introductions depend on much
earlier sentences, so a model has to track the state of the tale, which an n-gram model cannot. Each text has exactly
one derivation, so the grammar knows its probability. The expected loss of any model is at least the entropy of this
distribution.

A tale is a sequence of sentences. Given the state so far (a `World`), a kind of sentence is drawn with the
probabilities of `continuations`, then uniformly one of its wordings and a value for each slot of the wording. The
kind's effect updates the world. `log2_probability` and `parse` do the reverse from a text alone.
"""

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field


WOMEN = ("Anna", "Clara", "Dora", "Flora", "Greta", "Lena", "Mira", "Ruth")
MEN = ("Bruno", "Emil", "Felix", "Hugo", "Jonas", "Otto", "Paul", "Simon")
NAMES = WOMEN + MEN
ROLES = ("baker", "carpenter", "gardener", "miller", "painter", "potter", "sailor", "shepherd", "tailor", "weaver")
PLACES = ("barn", "castle", "chapel", "garden", "harbour", "library", "market", "mill", "tower", "workshop")
PLACE_ADJECTIVES = (
    "bright",
    "cold",
    "dark",
    "lonely",
    "narrow",
    "noisy",
    "quiet",
    "small",
    "sunny",
    "warm",
    "white",
    "windy",
)
THINGS = ("bell", "book", "clock", "drum", "hat", "kettle", "key", "lantern", "map", "mirror", "ring", "teapot")
THING_ADJECTIVES = (
    "blue",
    "broken",
    "copper",
    "dusty",
    "golden",
    "heavy",
    "painted",
    "red",
    "silver",
    "striped",
    "tiny",
    "wooden",
)
TRAVELS = (
    "climbed",
    "crept",
    "drove",
    "hurried",
    "marched",
    "raced",
    "rode",
    "sailed",
    "skipped",
    "strolled",
    "travelled",
    "walked",
)
PASTIMES = (
    "baking",
    "cooking",
    "dancing",
    "drawing",
    "humming",
    "knitting",
    "reading",
    "resting",
    "sewing",
    "singing",
    "whistling",
    "writing",
)
SPOTS = (
    "bed",
    "bench",
    "bridge",
    "carpet",
    "chair",
    "cupboard",
    "fence",
    "hedge",
    "ladder",
    "stairs",
    "table",
    "tree",
)
TOPICS = (
    "dragons",
    "ghosts",
    "giants",
    "gold",
    "horses",
    "love",
    "money",
    "music",
    "pirates",
    "stars",
    "winter",
    "wolves",
)

MAX_PLACES = 3
MAX_THINGS = 3
MAX_JOURNEYS = 2
MAX_DEEDS = 2


@dataclass
class World:
    """The state of a tale after the sentences so far.

    Attributes:
        roles: trade of each person, in order of introduction. The first person is the hero.
        where: place of each person.
        places: places mentioned so far.
        keeper: for each thing, the person who has it or the place where it is.
        subject: the person that the current scene is about.
        asked: thing that the last question was about.
        asker: person who asked the last question.
        kind: kind of the last sentence.
        num_journeys: number of journeys so far.
        num_deeds: number of deeds since the last journey.
    """

    roles: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    keeper: dict[str, str] = field(default_factory=dict)
    subject: str = ""
    asked: str = ""
    asker: str = ""
    kind: str = ""
    num_journeys: int = 0
    num_deeds: int = 0

    @property
    def people(self) -> list[str]:
        return list(self.roles)

    @property
    def things(self) -> list[str]:
        return list(self.keeper)

    def things_of(self, keeper: str) -> list[str]:
        """Return the things that a person has or that are in a place."""
        return [thing for thing, holder in self.keeper.items() if holder == keeper]

    def company_of(self, person: str) -> list[str]:
        """Return the other people in the same place as `person`."""
        return [other for other in self.roles if other != person and self.where[other] == self.where.get(person)]

    def absent_from(self, person: str) -> list[str]:
        """Return the people in other places than `person`."""
        return [other for other in self.roles if other != person and self.where[other] != self.where.get(person)]

    @property
    def present(self) -> list[str]:
        """The people in the subject's place, in order of introduction."""
        return [person for person in self.roles if self.where[person] == self.here]

    @property
    def here(self) -> str:
        """The subject's place."""
        return self.where.get(self.subject, "")


Values = Mapping[str, str]
Options = Sequence[str]


@dataclass(frozen=True)
class Slot:
    """A variable part of a wording.

    Attributes:
        vocabulary: regular expression of all values that can ever occur.
        options: `options(world, values)` returns the possible values, each equally likely, given the world and the
            values of earlier slots in the sentence.
        is_claim: whether a value makes a statement that is true or false in the world.
    """

    vocabulary: str
    options: Callable[[World, Values], Options]
    is_claim: bool = False


def _free(*values: str) -> Slot:
    return Slot(_any_of(values), lambda world, bound: values)


def _any_of(values: Sequence[str]) -> str:
    return "|".join(map(re.escape, values))


def _only(value: str | None) -> Options:
    return [value] if value else []


def _person(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_any_of(NAMES), options, is_claim=True)


def _place(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_any_of(PLACES), options, is_claim=True)


def _thing(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_any_of(THINGS), options, is_claim=True)


def _role_of(slot: str) -> Slot:
    return Slot(_any_of(ROLES), lambda world, bound: _only(world.roles.get(bound[slot])), is_claim=True)


def _pronoun(woman: str, man: str) -> Slot:
    return Slot(f"{woman}|{man}", lambda world, bound: [woman if world.subject in WOMEN else man])


SLOTS: dict[str, Slot] = {
    # introductions
    "new_person": Slot(_any_of(NAMES), lambda world, bound: [name for name in NAMES if name not in world.roles]),
    "new_role": Slot(
        _any_of(ROLES), lambda world, bound: [role for role in ROLES if role not in world.roles.values()]
    ),
    "place_adjective": _free(*PLACE_ADJECTIVES),
    "new_place": Slot(_any_of(PLACES), lambda world, bound: [place for place in PLACES if place not in world.places]),
    "thing_adjective": _free(*THING_ADJECTIVES),
    "new_thing": Slot(_any_of(THINGS), lambda world, bound: [thing for thing in THINGS if thing not in world.keeper]),
    "same_thing": _thing(lambda world, bound: _only(bound.get("new_thing"))),
    # the subject
    "Her": _pronoun("Her", "His"),
    "subject": _person(lambda world, bound: _only(world.subject)),
    "here": _place(lambda world, bound: _only(world.here)),
    "held": _thing(lambda world, bound: world.things_of(world.subject)),
    "held_again": _thing(lambda world, bound: [bound["held"]]),
    "lying": _thing(lambda world, bound: world.things_of(world.here)),
    # other people
    "company": _person(lambda world, bound: world.company_of(world.subject)),
    "subject_role": Slot(_any_of(ROLES), lambda world, bound: _only(world.roles.get(world.subject)), is_claim=True),
    "company_role": _role_of("company"),
    "absent": _person(lambda world, bound: world.absent_from(world.subject)),
    "absent_role": _role_of("absent"),
    "absent_place": _place(lambda world, bound: _only(world.where.get(bound["absent"]))),
    # travelling
    # the friend, who was introduced last, travels first
    "traveller": _person(lambda world, bound: world.people if world.num_journeys else _only(world.subject)),
    "goal": _place(
        lambda world, bound: [place for place in world.places if place != world.where.get(bound["traveller"])]
    ),
    # two people in one place
    "giver": _person(lambda world, bound: [person for person in world.present if world.things_of(person)]),
    "given": _thing(lambda world, bound: world.things_of(bound["giver"])),
    "receiver": _person(lambda world, bound: world.company_of(bound["giver"])),
    "speaker": _person(lambda world, bound: world.present),
    "listener": _person(lambda world, bound: world.company_of(bound["speaker"])),
    "wanted": _thing(lambda world, bound: world.things),
    "asker": _person(
        lambda world, bound: [person for person in world.present if person != world.keeper.get(bound["wanted"])]
    ),
    "answerer": _person(lambda world, bound: world.company_of(world.asker)),
    "asked": _thing(lambda world, bound: _only(world.asked)),
    "asked_held": _thing(
        lambda world, bound: _only(world.asked if world.keeper.get(world.asked) in world.roles else "")
    ),
    "asked_place": _place(
        lambda world, bound: [place for place in world.places if place == world.keeper.get(world.asked)]
    ),
    # the end
    "kept": _thing(lambda world, bound: [thing for thing, holder in world.keeper.items() if holder in world.roles]),
    "keeper": _person(lambda world, bound: _only(world.keeper.get(bound["kept"]))),
    "left": _thing(lambda world, bound: [thing for thing, holder in world.keeper.items() if holder in world.places]),
    "left_place": _place(lambda world, bound: _only(world.keeper.get(bound["left"]))),
    "sleeper": _person(lambda world, bound: world.people),
    "sleeper_place": _place(lambda world, bound: _only(world.where.get(bound["sleeper"]))),
    "other": _person(lambda world, bound: [person for person in world.people if person != bound["sleeper"]]),
    "other_place": _place(lambda world, bound: _only(world.where.get(bound["other"]))),
    # independent of the state
    "first_time": _free(
        "One morning", "At dawn", "At sunrise", "After breakfast", "One fine day", "One rainy day", "Before breakfast"
    ),
    "second_time": _free(
        "At noon", "Before lunch", "After lunch", "That afternoon", "Later that day", "An hour later"
    ),
    "went": _free(*TRAVELS),
    "doing": _free(*PASTIMES),
    "spot": _free(*SPOTS),
    "topic": _free(*TOPICS),
}


Effect = Callable[[World, Values], None]


@dataclass(frozen=True)
class Kind:
    """A kind of sentence.

    Attributes:
        wordings: templates with slots, each equally likely.
        effect: updates the world, given the slot values.
        starts_paragraph: whether a paragraph break precedes the sentence.
    """

    wordings: tuple[str, ...]
    effect: Effect = lambda world, values: None
    starts_paragraph: bool = False


def _introduce(world: World, values: Values) -> None:
    person, place = values["new_person"], values["new_place"]
    world.roles[person] = values["new_role"]
    world.where[person] = place
    world.places.append(place)
    world.subject = person


def _acquire(world: World, values: Values) -> None:
    world.keeper[values["new_thing"]] = world.subject


def _travel(world: World, values: Values) -> None:
    world.subject = values["traveller"]
    if "new_place" in values:
        world.places.append(values["new_place"])
    world.where[world.subject] = values["goal"] if "goal" in values else values["new_place"]
    world.num_journeys += 1
    world.num_deeds = 0


def _give(world: World, values: Values) -> None:
    world.keeper[values["given"]] = values["receiver"]


def _pick_up(world: World, values: Values) -> None:
    world.keeper[values["lying"]] = world.subject


def _leave(world: World, values: Values) -> None:
    world.keeper[values["held"]] = world.here


def _ask(world: World, values: Values) -> None:
    world.asked, world.asker = values["wanted"], values["asker"]


def _journey(time: str) -> Kind:
    return Kind((f"{{{time}}} {{traveller}} {{went}} to the {{goal}}.",), _travel, starts_paragraph=True)


def _discovery(time: str) -> Kind:
    return Kind(
        (f"{{{time}}} {{traveller}} {{went}} to a {{place_adjective}} {{new_place}}.",), _travel, starts_paragraph=True
    )


KINDS: dict[str, Kind] = {
    "opening": Kind(
        (
            "Once upon a time, {new_person} the {new_role} lived in a {new_place}.",
            "This is a tale of {new_person} the {new_role}, who lived in a {new_place}.",
            "Long ago, {new_person} the {new_role} lived all alone in a {new_place}.",
            "Everybody knew {new_person} the {new_role}, who lived in a {new_place}.",
        ),
        _introduce,
    ),
    "home": Kind(
        (
            "The {subject_role} liked the {here}, because it was {place_adjective}.",
            "The {subject_role} found the {here} too {place_adjective}.",
        )
    ),
    "treasure": Kind(
        (
            "The {subject_role} owned a {thing_adjective} {new_thing} and was proud of the {same_thing}.",
            "{Her} aunt gave the {subject_role} a {thing_adjective} {new_thing} but missed the {same_thing}.",
            "The {subject_role} carried a {thing_adjective} {new_thing} and often polished the {same_thing}.",
        ),
        _acquire,
    ),
    "friend": Kind(
        (
            "{new_person} the {new_role}, a friend of {subject}, looked after a {new_place}.",
            "{new_person} the {new_role}, a cousin of {subject}, watched over a {new_place}.",
            "Not far away, {new_person} the {new_role} rented a {new_place}.",
        ),
        _introduce,
    ),
    "journey_1": _journey("first_time"),
    "journey_2": _journey("second_time"),
    "discovery_1": _discovery("first_time"),
    "discovery_2": _discovery("second_time"),
    "meeting": Kind(
        (
            "In the {here} {subject} met {company} the {company_role}, who was {doing}.",
            "{company} the {company_role} was in the {here}, {doing}.",
            "{company} the {company_role} stopped {doing} and opened the door of the {here}.",
        )
    ),
    "give": Kind(("{giver} gave {receiver} the {given}.", "{giver} handed the {given} to {receiver}."), _give),
    "show": Kind(("{giver} showed {receiver} the {given}.",)),
    "talk": Kind(
        ("{speaker} and {listener} talked about {topic}.", "{speaker} told {listener} a story about {topic}.")
    ),
    "question": Kind(('"Where is the {wanted}?" asked {asker}.',), _ask),
    "answer_held": Kind(('"I have the {asked_held}," said {answerer}.',)),
    "answer_place": Kind(('"The {asked} is in the {asked_place}," said {answerer}.',)),
    "leave": Kind(("{subject} left the {held} in the {here}.", "{subject} hid the {held} in the {here}."), _leave),
    "pick_up": Kind(
        ("{subject} picked up the {lying}.", "The {lying} was still there, and {subject} took it."), _pick_up
    ),
    "find": Kind(
        (
            "Under the {spot} {subject} found a {thing_adjective} {new_thing}, and nobody claimed the {same_thing}.",
            "Behind the {spot} {subject} found a {thing_adjective} {new_thing}, and nobody claimed the {same_thing}.",
        ),
        _acquire,
    ),
    "think": Kind(
        (
            "{subject} thought of {absent} the {absent_role}, who was in the {absent_place}.",
            "{subject} wrote to {absent} the {absent_role}, who was in the {absent_place}.",
        )
    ),
    "keep": Kind(
        (
            "{subject} still had the {held} and cleaned the {held_again}.",
            "{subject} looked at the {held} and loved the {held_again}.",
        )
    ),
    "rest": Kind(
        ("{subject} spent an hour {doing} in the {here}.", "{subject} liked the {here} and started {doing}.")
    ),
    "fate_kept": Kind(("At last the {kept} belonged to {keeper}.",), starts_paragraph=True),
    "fate_left": Kind(
        ("At last the {left} stayed in the {left_place}.",),
        starts_paragraph=True,
    ),
    "night_apart": Kind(
        (
            "That night {sleeper} slept in the {sleeper_place} and {other} in the {other_place}.",
            "At midnight {sleeper} was in the {sleeper_place} and {other} in the {other_place}.",
        )
    ),
    "night_together": Kind(
        (
            "That night {sleeper} and {other} slept in the {sleeper_place}.",
            "At midnight {sleeper} and {other} were in the {sleeper_place}.",
        )
    ),
    "moral": Kind(
        (
            "And so the day ended.",
            "People told it for years.",
            "Nobody ever forgot it.",
            "Then the moon came out.",
        )
    ),
}
END = "end"


def _scene_weights(world: World) -> dict[str, float]:
    """Return unnormalized weights of the deeds in the subject's place."""
    arriving = world.num_deeds == 0
    holds = bool(world.things_of(world.subject))
    weights: dict[str, float] = {}
    if arriving and world.things_of(world.here):
        weights["pick_up"] = 8
    if world.company_of(world.subject):
        weights["talk"] = 2
        if any(world.things_of(person) for person in world.present):
            weights["show"] = 1
            # a thing is not given back at once
            if world.kind != "give":
                weights["give"] = 4
        if arriving:
            weights["question"] = 2
        return weights
    weights["think"] = 2
    weights["rest"] = 2
    if len(world.keeper) < MAX_THINGS:
        weights["find"] = 2
    if holds:
        weights["leave"] = 2
        weights["keep"] = 1
    return weights


def _next_part_weights(world: World) -> dict[str, float]:
    """Return unnormalized weights of what follows a scene: a journey, or the ending after the last journey."""
    number = world.num_journeys + 1
    weights: dict[str, float] = {}
    if number <= MAX_JOURNEYS:
        weights[f"journey_{number}"] = 2
        if len(world.places) < MAX_PLACES:
            weights[f"discovery_{number}"] = 1
    else:
        num_kept = sum(keeper in world.roles for keeper in world.keeper.values())
        weights["fate_kept"], weights["fate_left"] = num_kept, len(world.keeper) - num_kept
    return weights


def _normalize(weights: Mapping[str, float], total: float = 1.0) -> dict[str, float]:
    scale = total / sum(weights.values())
    return {kind: weight * scale for kind, weight in weights.items() if weight}


def continuations(world: World) -> dict[str, float]:
    """Return the probability of each kind of next sentence, and of `END` for the end of the tale."""
    kind = world.kind
    if not kind:
        return {"opening": 1.0}
    if kind in ("opening", "friend"):
        return {"home": 1.0}
    if kind == "home":
        return {"treasure": 1.0}
    if kind == "treasure" and len(world.people) == 1:
        return {"friend": 1.0}
    if kind == "question":
        return {"answer_held" if world.keeper.get(world.asked) in world.roles else "answer_place": 1.0}
    if kind.startswith(("journey", "discovery")) and world.company_of(world.subject):
        return {"meeting": 1.0}
    if kind.startswith("fate"):
        together = len(set(world.where.values())) == 1
        return {"night_together" if together else "night_apart": 1.0}
    if kind.startswith("night"):
        return {"moral": 0.5, END: 0.5}
    if kind == "moral":
        return {END: 1.0}
    if kind == "treasure":
        return _normalize(_next_part_weights(world))
    if world.num_deeds == 0:
        return _normalize(_scene_weights(world))
    if world.num_deeds < MAX_DEEDS and world.num_journeys < MAX_JOURNEYS:
        return _normalize(_scene_weights(world), 0.4) | _normalize(_next_part_weights(world), 0.6)
    return _normalize(_next_part_weights(world))


# a question and its answer count as one deed
DEEDS = {"give", "show", "talk", "answer_held", "answer_place", "leave", "pick_up", "find", "think", "keep", "rest"}


def advance(world: World, kind: str, values: Values) -> None:
    """Update `world` by a sentence of this kind with these slot values."""
    KINDS[kind].effect(world, values)
    world.kind = kind
    world.num_deeds += kind in DEEDS


@dataclass(frozen=True)
class Tale:
    """A tale.

    Attributes:
        text: the text.
        log2_probability: log2 of the tale's probability, including that of its end.
        world: state at the end.
    """

    text: str
    log2_probability: float
    world: World


_SLOT = re.compile(r"{(\w+)}")


def pick(options: Options, rng: random.Random) -> str:
    """Return a random option, each equally likely."""
    # Python guarantees reproducible streams only for random()
    return options[int(rng.random() * len(options))]


def _draw(weights: Mapping[str, float], rng: random.Random) -> str:
    threshold = rng.random()
    for outcome, probability in weights.items():
        threshold -= probability
        if threshold < 0:
            return outcome
    # reached if rounding makes the sum slightly less than one
    return outcome


def _separator(kind: str) -> str:
    return "\n\n" if KINDS[kind].starts_paragraph else " "


def generate_tale(rng: random.Random) -> Tale:
    """Generate one tale."""
    world, text, log2_probability = World(), "", 0.0
    while True:
        weights = continuations(world)
        kind = _draw(weights, rng)
        log2_probability += math.log2(weights[kind])
        if kind == END:
            return Tale(text, log2_probability, world)
        wordings = KINDS[kind].wordings
        wording = pick(wordings, rng)
        log2_probability -= math.log2(len(wordings))
        values: dict[str, str] = {}
        for name in _SLOT.findall(wording):
            options = SLOTS[name].options(world, values)
            values[name] = pick(options, rng)
            log2_probability -= math.log2(len(options))
        text += (_separator(kind) if text else "") + wording.format_map(values)
        advance(world, kind, values)


def tales(num: int, seed: int = 0) -> Iterator[str]:
    """Return the texts of `num` tales. The first tales of a seed are the same for any `num`."""
    rng = random.Random(seed)
    return (generate_tale(rng).text for _ in range(num))


def _compile_wording(wording: str) -> re.Pattern[str]:
    parts = _SLOT.split(wording)
    literals, names = map(re.escape, parts[::2]), parts[1::2]
    groups = [f"(?P<{name}>{SLOTS[name].vocabulary})" for name in names] + [""]
    return re.compile("".join(literal + group for literal, group in zip(literals, groups, strict=True)))


_PATTERNS = [(kind, _compile_wording(wording)) for kind, entry in KINDS.items() for wording in entry.wordings]
# a punctuation mark followed by a lower-case letter ends no sentence: '"Where is it?" asked Otto.'
_SENTENCE_BREAK = re.compile(r"""(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]["])\s+(?=["A-Z])""")
_SENTENCE_END = re.compile(r'[.!?]"?\Z')


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a text, without the white space between them."""
    return [sentence for sentence in _SENTENCE_BREAK.split(text.strip()) if sentence]


def match_sentence(sentence: str) -> tuple[str, dict[str, str]] | None:
    """Return a sentence's kind and slot values, or None if it matches no wording. Claims are not checked."""
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return None


def log2_probability(text: str) -> float:
    """Return log2 of a text's probability under the grammar, or -inf if it is not a tale."""
    world, total, rebuilt = World(), 0.0, ""
    for sentence in split_sentences(text):
        match = match_sentence(sentence)
        if match is None:
            return -math.inf
        kind, values = match
        probability = continuations(world).get(kind, 0.0) / len(KINDS[kind].wordings)
        for name, value in values.items():
            options = SLOTS[name].options(world, values)
            probability *= options.count(value) / max(len(options), 1)
        if not probability:
            return -math.inf
        total += math.log2(probability)
        rebuilt += (_separator(kind) if rebuilt else "") + sentence
        advance(world, kind, values)
    ending = continuations(world).get(END, 0.0)
    return total + math.log2(ending) if ending and rebuilt == text else -math.inf


@dataclass(frozen=True)
class TaleReport:
    """How well a text follows the grammar.

    Attributes:
        num_sentences: number of complete sentences.
        num_parsed: number of sentences that match a wording of the grammar.
        num_claims: number of statements in the parsed sentences that earlier sentences make true or false.
        num_true: number of true statements.
        world: state after the sentences without false statements.
    """

    num_sentences: int
    num_parsed: int
    num_claims: int
    num_true: int
    world: World


def parse(text: str) -> TaleReport:
    """Parse any text as a tale.

    An unfinished last sentence is ignored. A sentence with a false claim does not change the world.
    """
    world, num_parsed, num_claims, num_true = World(), 0, 0, 0
    sentences = split_sentences(text)
    if sentences and not _SENTENCE_END.search(sentences[-1]):
        sentences.pop()
    for sentence in sentences:
        match = match_sentence(sentence)
        if match is None:
            continue
        kind, values = match
        claims = [
            value in SLOTS[name].options(world, values) for name, value in values.items() if SLOTS[name].is_claim
        ]
        num_parsed += 1
        num_claims += len(claims)
        num_true += sum(claims)
        if all(claims):
            advance(world, kind, values)
    return TaleReport(len(sentences), num_parsed, num_claims, num_true, world)
