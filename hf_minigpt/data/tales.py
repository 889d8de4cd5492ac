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
ROLES = tuple("baker carpenter fiddler gardener miller painter potter sailor shepherd tailor teacher weaver".split())
PLACE_ADJECTIVES = tuple("crooked green lonely misty narrow quiet ruined snowy sunny warm white windy".split())
PLACE_NOUNS = tuple("barn castle cellar chapel garden harbour inn library market mill tower workshop".split())
THING_ADJECTIVES = tuple("blue broken copper dusty golden heavy painted red silver striped tiny wooden".split())
THING_NOUNS = tuple("bell book clock drum fiddle hat kettle key kite lantern map mirror ring scarf spoon teapot".split())

TRAVELS = tuple("climbed crept danced drove hurried limped marched raced rode rushed sailed skipped strolled".split()) + (
    "travelled",
    "walked",
    "wandered",
)
PASTIMES = tuple("baking counting cooking dancing dreaming drawing humming knitting laughing reading".split()) + tuple(
    "resting sewing singing sweeping whistling writing".split()
)
SPOTS = tuple("bed bench bridge carpet chair cupboard door fence hedge ladder pillow rock".split()) + tuple(
    "stairs stove table tree".split()
)
TOPICS = tuple("bread dragons dreams ghosts giants gold horses love money music pirates school".split()) + tuple(
    "stars summer winter wolves".split()
)

MAX_PLACES = 3
MAX_THINGS = 3
MAX_JOURNEYS = 3
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
        asked: The thing that somebody has just asked for.
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


def _pair(adjectives: Sequence[str], nouns: Sequence[str]) -> str:
    return f"(?:{_any_of(adjectives)}) (?:{_any_of(nouns)})"


def _unused_pairs(adjectives: Sequence[str], nouns: Sequence[str], used: Sequence[str]) -> Options:
    """No two places, and no two things, of a tale share a word: the adjective alone tells which is meant."""
    used_words = {word for pair in used for word in pair.split()}
    return [f"{a} {n}" for a in adjectives if a not in used_words for n in nouns if n not in used_words]


def _only(value: str | None) -> Options:
    return [value] if value else []


def _person(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_any_of(NAMES), options, is_claim=True)


def _place(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_pair(PLACE_ADJECTIVES, PLACE_NOUNS), options, is_claim=True)


def _thing(options: Callable[[World, Values], Options]) -> Slot:
    return Slot(_pair(THING_ADJECTIVES, THING_NOUNS), options, is_claim=True)


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
    "new_place": Slot(
        _pair(PLACE_ADJECTIVES, PLACE_NOUNS),
        lambda world, bound: _unused_pairs(PLACE_ADJECTIVES, PLACE_NOUNS, world.places),
    ),
    "new_thing": Slot(
        _pair(THING_ADJECTIVES, THING_NOUNS),
        lambda world, bound: _unused_pairs(THING_ADJECTIVES, THING_NOUNS, world.things),
    ),
    # the subject
    "She": _pronoun("She", "He"),
    "she": _pronoun("she", "he"),
    "Her": _pronoun("Her", "His"),
    "her": _pronoun("her", "his"),
    "him": _pronoun("her", "him"),
    "subject": _person(lambda world, bound: _only(world.subject)),
    "here": _place(lambda world, bound: _only(world.here)),
    "held": _thing(lambda world, bound: world.things_of(world.subject)),
    "lying": _thing(lambda world, bound: world.things_of(world.here)),
    # the others
    "company": _person(lambda world, bound: world.company_of(world.subject)),
    "company_role": _role_of("company"),
    "company_held": _thing(lambda world, bound: world.things_of(bound["company"])),
    "absent": _person(lambda world, bound: world.absent_from(world.subject)),
    "absent_role": _role_of("absent"),
    "absent_place": _place(lambda world, bound: _only(world.where.get(bound["absent"]))),
    # travelling
    "traveller": _person(lambda world, bound: world.people),
    "goal": _place(
        lambda world, bound: [place for place in world.places if place != world.where.get(bound["traveller"])]
    ),
    # questions
    "wanted": _thing(
        lambda world, bound: [thing for thing in world.things if world.keeper[thing] not in world.company_of(world.subject)]
    ),
    "asked": _thing(lambda world, bound: _only(world.asked)),
    "asked_held": _thing(lambda world, bound: _only(world.asked if world.asked in world.things_of(world.subject) else None)),
    "asked_place": _place(lambda world, bound: [place for place in world.places if place == world.keeper.get(world.asked)]),
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
        "At noon", "Before lunch", "After lunch", "That afternoon", "Later that day", "An hour later", "Two hours later"
    ),
    "third_time": _free(
        "At dusk", "At sunset", "At nightfall", "After dinner", "Before dinner", "That evening", "Late that day"
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
    world.keeper[values["held"]] = values["company"]


def _receive(world: World, values: Values) -> None:
    world.keeper[values["company_held"]] = world.subject


def _pick_up(world: World, values: Values) -> None:
    world.keeper[values["lying"]] = world.subject


def _leave(world: World, values: Values) -> None:
    world.keeper[values["held"]] = world.here


def _ask(world: World, values: Values) -> None:
    world.asked = values["wanted"]


def _journey(time: str) -> Kind:
    return Kind((f"{{{time}}} {{traveller}} {{went}} to the {{goal}}.",), _travel, starts_paragraph=True)


def _discovery(time: str) -> Kind:
    return Kind((f"{{{time}}} {{traveller}} {{went}} to a {{new_place}}.",), _travel, starts_paragraph=True)


KINDS: dict[str, Kind] = {
    "opening": Kind(
        (
            "Once upon a time, {new_person} the {new_role} lived in a {new_place}.",
            "This is the story of {new_person} the {new_role}, who lived in a {new_place}.",
            "Long ago, {new_person} the {new_role} lived all alone in a {new_place}.",
            "Everybody knew {new_person} the {new_role}, who lived in a {new_place}.",
        ),
        _introduce,
    ),
    "treasure": Kind(
        (
            "{She} owned a {new_thing}.",
            "{She} loved nothing more than a {new_thing}.",
            "{Her} grandmother had left {him} a {new_thing}.",
            "Every day {she} carried a {new_thing}.",
        ),
        _acquire,
    ),
    "friend": Kind(
        (
            "{Her} best friend was {new_person} the {new_role}, who lived in a {new_place}.",
            "{Her} cousin was {new_person} the {new_role}, who lived in a {new_place}.",
            "{Her} neighbour was {new_person} the {new_role}, who lived in a {new_place}.",
        ),
        _introduce,
    ),
    "journey_1": _journey("first_time"),
    "journey_2": _journey("second_time"),
    "journey_3": _journey("third_time"),
    "discovery_1": _discovery("first_time"),
    "discovery_2": _discovery("second_time"),
    "discovery_3": _discovery("third_time"),
    "meeting": Kind(
        (
            "There {subject} met {company} the {company_role}, who was {doing}.",
            "{company} the {company_role} was there, {doing}.",
            "{company} the {company_role} stopped {doing} and opened the door.",
        )
    ),
    "give": Kind(("{subject} gave {company} the {held}.", "{company} asked for the {held} and got it."), _give),
    "receive": Kind(("{company} gave {subject} the {company_held}.",), _receive),
    "show": Kind(("{subject} showed {company} the {held}.", "{company} praised the {held}.")),
    "talk": Kind(("{subject} and {company} talked about {topic}.", "{subject} told {company} a story about {topic}.")),
    "question": Kind(('"Where is the {wanted}?" asked {company}.',), _ask),
    "answer_held": Kind(('"I have the {asked_held}," said {subject}.',)),
    "answer_place": Kind(('"The {asked} is in the {asked_place}," said {subject}.',)),
    "leave": Kind(("{subject} left the {held} in the {here}.", "{subject} hid the {held} in the {here}."), _leave),
    "pick_up": Kind(("{subject} picked up the {lying}.", "The {lying} was still there, and {subject} took it."), _pick_up),
    "find": Kind(("Under the {spot} {subject} found a {new_thing}.", "Behind the {spot} {subject} found a {new_thing}."), _acquire),
    "think": Kind(
        (
            "{subject} thought of {absent} the {absent_role}, who was in the {absent_place}.",
            "{subject} wrote to {absent} the {absent_role}, who was in the {absent_place}.",
        )
    ),
    "keep": Kind(("{subject} still had the {held}.", "{subject} cleaned the {held}.")),
    "rest": Kind(("{subject} spent an hour {doing}.", "{subject} sat down and started {doing}.")),
    "fate_kept": Kind(("In the end the {kept} belonged to {keeper}.",), starts_paragraph=True),
    "fate_left": Kind(("In the end the {left} stayed in the {left_place}.",), starts_paragraph=True),
    "night_apart": Kind(
        (
            "That night {sleeper} slept in the {sleeper_place} and {other} in the {other_place}.",
            "When the stars came out, {sleeper} was in the {sleeper_place} and {other} in the {other_place}.",
        )
    ),
    "night_together": Kind(
        (
            "That night {sleeper} and {other} slept in the {sleeper_place}.",
            "When the stars came out, {sleeper} and {other} were in the {sleeper_place}.",
        )
    ),
    "moral": Kind(
        (
            "And that was the end of the day.",
            "They told the story for years.",
            "Nobody ever forgot it.",
            "The next day everything began again.",
        )
    ),
}
END = "end"


def _scene(world: World) -> dict[str, float]:
    """What may happen in the place where the subject has gone."""
    holds = bool(world.things_of(world.subject))
    weights: dict[str, float] = {}
    if lying := world.things_of(world.here):
        weights["pick_up"] = 2 * len(lying)
    if company := world.company_of(world.subject):
        weights["talk"] = 1
        if holds:
            weights["give"] = 2
            weights["show"] = 1
        if world.things_of(company[0]):
            weights["receive"] = 2
        if not world.num_deeds and any(holder not in company for holder in world.keeper.values()):
            weights["question"] = 2
        return weights
    weights["think"] = 2
    weights["rest"] = 1
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
        weights[f"journey_{number}"] = 3
        if len(world.places) < MAX_PLACES:
            weights[f"discovery_{number}"] = 1
    if number > 2:
        held = sum(keeper in world.roles for keeper in world.keeper.values())
        weights["fate_kept"] = held
        weights["fate_left"] = len(world.keeper) - held
    return weights


def _normalize(weights: Mapping[str, float], total: float = 1.0) -> dict[str, float]:
    scale = total / sum(weights.values())
    return {kind: weight * scale for kind, weight in weights.items() if weight}


def continuations(world: World) -> dict[str, float]:
    """The probability of each kind of sentence to come next, `END` for the end of the tale among them."""
    kind = world.kind
    if not kind:
        return {"opening": 1.0}
    if kind in ("opening", "treasure") and len(world.people) == 1:
        return {"treasure" if kind == "opening" else "friend": 1.0}
    if kind == "friend":
        return {"treasure": 1.0}
    if kind == "question":
        return {"answer_held" if world.asked in world.things_of(world.subject) else "answer_place": 1.0}
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
    if world.num_deeds < MAX_DEEDS:
        return _normalize(_scene(world), 0.5) | _normalize(_onward(world), 0.5)
    return _normalize(_onward(world))


_NOT_DEEDS = ("opening", "treasure", "friend", "journey", "discovery", "meeting", "question", "fate", "night", "moral")


def advance(world: World, kind: str, values: Values) -> None:
    """Change `world` as a sentence of that kind with those slot values does."""
    KINDS[kind].effect(world, values)
    world.kind = kind
    world.num_deeds += not kind.startswith(_NOT_DEEDS)


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


def _separator(kind: str) -> str:
    return "\n\n" if KINDS[kind].starts_paragraph else " "


def generate_tale(rng: random.Random) -> Tale:
    """Draw one tale."""
    world, text, log2_probability = World(), "", 0.0
    while True:
        weights = continuations(world)
        threshold = rng.random()
        for kind, probability in weights.items():
            threshold -= probability
            if threshold < 0:
                break
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
    """Read any text as a tale. An unfinished last sentence is left out; a sentence with a false claim changes nothing."""
    world, num_parsed, num_claims, num_true = World(), 0, 0, 0
    sentences = split_sentences(text)
    if sentences and not _SENTENCE_END.search(sentences[-1]):
        sentences.pop()
    for sentence in sentences:
        match = match_sentence(sentence)
        if match is None:
            continue
        kind, values = match
        claims = [value in SLOTS[name].options(world, values) for name, value in values.items() if SLOTS[name].is_claim]
        num_parsed += 1
        num_claims += len(claims)
        num_true += sum(claims)
        if all(claims):
            advance(world, kind, values)
    return TaleReport(len(sentences), num_parsed, num_claims, num_true, world)
