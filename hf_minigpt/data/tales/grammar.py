"""The embedded corpus: short tales from a generative grammar whose exact probability is known.

A tale tells who is where and who holds what, and it stays true: most words after the introductions are determined by
sentences told long before, so that a model has to track the tale's state, and an n-gram model cannot. Every text has
exactly one derivation, hence the grammar knows the probability of each of its tales, and no model can do better, in
the long run, than the entropy that these probabilities give.

A tale is a chain of sentences. Given the state told so far (a `World`), a kind of sentence is drawn with the
probabilities of `continuations`, then one of its wordings, then the value of each of the wording's slots, the last two
uniformly; the kind's effect changes the world. `log2_probability` and `parse` go the other way, from a text alone.
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
    """What a tale has told so far.

    Attributes:
        roles: Each person's trade, in the order of introduction: the first is the hero.
        where: The place where each person is.
        places: The known places.
        keeper: For each known thing the person who holds it or the place where it lies.
        subject: The person whom "she" or "he" means.
        asked: The thing that `asker` has just asked for.
        asker: Who asked the last question.
        kind: The kind of the last sentence.
        num_journeys: Journeys so far.
        num_deeds: What happened since the last journey.
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
        """The things that a person holds, or that lie in a place."""
        return [thing for thing, holder in self.keeper.items() if holder == keeper]

    def company_of(self, person: str) -> list[str]:
        """The other people in the place where `person` is."""
        return [other for other in self.roles if other != person and self.where[other] == self.where.get(person)]

    def absent_from(self, person: str) -> list[str]:
        """The people who are in another place than `person`."""
        return [other for other in self.roles if other != person and self.where[other] != self.where.get(person)]

    @property
    def present(self) -> list[str]:
        """The people in the place where the subject is, in the order of introduction."""
        return [person for person in self.roles if self.where[person] == self.here]

    @property
    def here(self) -> str:
        """The place where the subject is."""
        return self.where.get(self.subject, "")


Values = Mapping[str, str]
Options = Sequence[str]


@dataclass(frozen=True)
class Slot:
    """A gap in a wording.

    `options(world, values)` lists the values that the slot may take, given the values of the slots before it in the
    sentence; each is equally likely. `vocabulary` is a regular expression for what can stand there at all. Where
    `is_claim`, a value asserts something that the world decides.
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
    # the others
    "company": _person(lambda world, bound: world.company_of(world.subject)),
    "subject_role": Slot(_any_of(ROLES), lambda world, bound: _only(world.roles.get(world.subject)), is_claim=True),
    "company_role": _role_of("company"),
    "absent": _person(lambda world, bound: world.absent_from(world.subject)),
    "absent_role": _role_of("absent"),
    "absent_place": _place(lambda world, bound: _only(world.where.get(bound["absent"]))),
    # travelling
    # the friend, of whom the tale has just told, leaves home first
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
    # no state behind them
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
    """A kind of sentence: what it does to the world, and the ways to say it. All its wordings are equally likely."""

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


def _scene(world: World) -> dict[str, float]:
    """What may happen in the place where the subject has gone."""
    arriving = world.num_deeds == 0
    holds = bool(world.things_of(world.subject))
    weights: dict[str, float] = {}
    if arriving and world.things_of(world.here):
        weights["pick_up"] = 8
    if world.company_of(world.subject):
        weights["talk"] = 2
        if any(world.things_of(person) for person in world.present):
            weights["show"] = 1
            # nothing goes back at once
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


def _onward(world: World) -> dict[str, float]:
    """How the tale goes on after a scene: a journey to a known or a new place, or the beginning of the end."""
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
    """The probability of each kind of sentence to come next, `END` for the end of the tale among them."""
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
        return _normalize(_onward(world))
    if world.num_deeds == 0:
        return _normalize(_scene(world))
    if world.num_deeds < MAX_DEEDS and world.num_journeys < MAX_JOURNEYS:
        return _normalize(_scene(world), 0.4) | _normalize(_onward(world), 0.6)
    return _normalize(_onward(world))


# what fills a scene; a question counts when it is answered
DEEDS = {"give", "show", "talk", "answer_held", "answer_place", "leave", "pick_up", "find", "think", "keep", "rest"}


def advance(world: World, kind: str, values: Values) -> None:
    """Change `world` as a sentence of that kind with those slot values does."""
    KINDS[kind].effect(world, values)
    world.kind = kind
    world.num_deeds += kind in DEEDS


@dataclass(frozen=True)
class Tale:
    """A tale, the log2 of its probability (that of ending where it ends included) and the world at its end."""

    text: str
    log2_probability: float
    world: World


_SLOT = re.compile(r"{(\w+)}")


def _pick(options: Options, rng: random.Random) -> str:
    # random() is the one method whose stream Python promises to keep
    return options[int(rng.random() * len(options))]


def _draw(weights: Mapping[str, float], rng: random.Random) -> str:
    threshold = rng.random()
    for outcome, probability in weights.items():
        threshold -= probability
        if threshold < 0:
            return outcome
    # rounding left the sum a hair below one
    return outcome


def _separator(kind: str) -> str:
    return "\n\n" if KINDS[kind].starts_paragraph else " "


def generate_tale(rng: random.Random) -> Tale:
    """Draw one tale."""
    world, text, log2_probability = World(), "", 0.0
    while True:
        weights = continuations(world)
        kind = _draw(weights, rng)
        log2_probability += math.log2(weights[kind])
        if kind == END:
            return Tale(text, log2_probability, world)
        wordings = KINDS[kind].wordings
        wording = _pick(wordings, rng)
        log2_probability -= math.log2(len(wordings))
        values: dict[str, str] = {}
        for name in _SLOT.findall(wording):
            options = SLOTS[name].options(world, values)
            values[name] = _pick(options, rng)
            log2_probability -= math.log2(len(options))
        text += (_separator(kind) if text else "") + wording.format_map(values)
        advance(world, kind, values)


def tales(num: int, seed: int = 0) -> Iterator[str]:
    """The texts of `num` tales; more tales of a seed begin with the fewer ones."""
    rng = random.Random(seed)
    return (generate_tale(rng).text for _ in range(num))


def _compile(wording: str) -> re.Pattern[str]:
    return re.compile(_SLOT.sub(r"{\1}", _gaps(wording)))


def _gaps(wording: str) -> str:
    parts = _SLOT.split(wording)
    literals, names = map(re.escape, parts[::2]), parts[1::2]
    gaps = [f"(?P<{name}>{SLOTS[name].vocabulary})" for name in names] + [""]
    return "".join(literal + gap for literal, gap in zip(literals, gaps, strict=True))


_PATTERNS = [(kind, _compile(wording)) for kind, entry in KINDS.items() for wording in entry.wordings]
# a sentence ends with its mark unless a small letter follows: '"Where is it?" asked Otto.' is one sentence
_SENTENCE_BREAK = re.compile(r"""(?<=[.!?])\s+(?=["A-Z])|(?<=[.!?]["])\s+(?=["A-Z])""")
_SENTENCE_END = re.compile(r'[.!?]"?\Z')


def split_sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE_BREAK.split(text.strip()) if sentence]


def match_sentence(sentence: str) -> tuple[str, dict[str, str]] | None:
    """The kind of a sentence and the values of its slots; None if no wording gives it. Truth is not looked at."""
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    return None


def log2_probability(text: str) -> float:
    """The log2 of a text's probability under the grammar, from the text alone; -inf if it is not a tale."""
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
    """How much of a text is a tale.

    Attributes:
        num_sentences: Finished sentences.
        num_parsed: Those that some wording of the grammar gives.
        num_claims: Statements, in the parsed sentences, whose truth earlier sentences decide.
        num_true: Those that are true.
        world: The world as the text's true sentences leave it.
    """

    num_sentences: int
    num_parsed: int
    num_claims: int
    num_true: int
    world: World


def parse(text: str) -> TaleReport:
    """Read any text as a tale.

    An unfinished last sentence is left out. A sentence with a false claim changes nothing.
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
