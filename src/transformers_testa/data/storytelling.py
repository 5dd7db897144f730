"""Tell a story of the demo world in English, and ask questions about it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .stories import NUMBERS, Scene, Story, StoryObject


ORIGIN = {"left": "right", "right": "left", "up": "bottom", "down": "top"}
DESTINATION = {"left": "left", "right": "right", "up": "top", "down": "bottom"}

# Words and punctuation marks of a sentence: 12 sentences fit the 150 tokens that paragraphs are cut to.
MAX_SENTENCE_TOKENS = 12

WORDS = {
    "large": ("large", "big"),
    "small": ("small", "little", "tiny"),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
    "circle": ("circle", "disk", "ball"),
    "square": ("square", "box"),
    "moon": ("moon", "crescent"),
    "cross": ("cross", "plus"),
    **{number: (number, f"digit {number}", f"number {number}") for number in NUMBERS},
}

TEMPLATES = {
    "enter": (
        "{object} comes in from the {origin}",
        "{object} enters from the {origin}",
        "{object} arrives from the {origin}",
        "from the {origin} {object} slides in",
        "in comes {object} from the {origin}",
    ),
    "leave": (
        "{object} leaves at the {destination}",
        "{object} goes out on the {destination}",
        "{object} disappears at the {destination}",
        "{object} slides out at the {destination}",
        "away goes {object} at the {destination}",
    ),
    "move": (
        "{object} moves from {origin} to {destination}",
        "{object} travels from {origin} to {destination}",
        "{object} crosses from {origin} to {destination}",
        "from {origin} to {destination} {object} glides along",
        "we follow {object} from {origin} to {destination}",
    ),
    "meet": (
        "{object} meets {other}",
        "{object} and {other} meet",
        "{object} and {other} come together",
        "{object} runs into {other}",
        "{object} bumps into {other}",
    ),
    "grow": (
        "{object} grows",
        "{object} gets bigger",
        "{object} becomes larger",
        "we watch {object} grow",
        "{object} starts to grow",
    ),
    "shrink": (
        "{object} shrinks",
        "{object} gets smaller",
        "{object} becomes smaller",
        "we watch {object} shrink",
        "{object} starts to shrink",
    ),
    "turn": (
        "{object} turns {new_color}",
        "{object} becomes {new_color}",
        "{object} changes to {new_color}",
        "the color of {object} changes to {new_color}",
        "we watch {object} turn {new_color}",
    ),
    "gather": (
        "there are {objects}",
        "we see {objects} together",
        "{objects} dance together",
        "{objects} hop around",
        "a group of {objects} dances",
    ),
}

BACKGROUND_PHRASES = {
    "plain": ("on {color}", "on a plain {color} background"),
    "gradient": ("on shaded {color}", "on a shaded {color} background"),
    "stripes": ("over {color} stripes", "on a wall of {color} stripes"),
    "checks": ("over {color} checks", "on a floor of {color} tiles"),
    "noise": ("over {color} sand", "on rough {color} ground"),
}

FIRST_WORDS = ("first,", "at first,", "to begin with,", "in the beginning,", "the video starts:")
MIDDLE_WORDS = ("then", "next,", "after that,", "later,", "now", "soon", "a moment later,", "afterwards,")
LAST_WORDS = ("finally,", "at last,", "in the end,", "to finish,", "at the very end,")


def tell(story: Story, rng: random.Random) -> str:
    """The paragraph of a story: one sentence a scene, in order, in wording that `rng` varies."""
    position_words: list[tuple[str, ...]] = [MIDDLE_WORDS] * len(story.scenes)
    if len(story.scenes) > 1:
        position_words[0], position_words[-1] = FIRST_WORDS, LAST_WORDS
    return " ".join(_sentence(scene, words, rng) for scene, words in zip(story.scenes, position_words, strict=True))


def name_object(item: StoryObject, count: int = 1) -> str:
    """The phrase for an object, or so many of its kind: "a red star", "three red stars"."""
    return _with_article(_named(item)) if count == 1 else _counted(item, count)


def _sentence(scene: Scene, position_words: tuple[str, ...], rng: random.Random) -> str:
    template = rng.choice(TEMPLATES[scene.action])
    order, background = rng.choice(position_words), _background_phrase(scene, rng)
    details = [detail for detail in ("order", "background", "texture", "size") if rng.random() < 0.35]
    rng.shuffle(details)
    words_seed = rng.getrandbits(32)
    while True:
        clause = _clause(scene, template, details, random.Random(words_seed))
        parts = (order if "order" in details else "", clause, background if "background" in details else "")
        text = " ".join(part for part in parts if part) + "."
        if not details or _num_tokens(text) <= MAX_SENTENCE_TOKENS:
            return text[0].upper() + text[1:]
        details.pop()


def _num_tokens(text: str) -> int:
    return len(text.split()) + sum(text.count(mark) for mark in ".,:")


def _clause(scene: Scene, template: str, details: list[str], rng: random.Random) -> str:
    shows_size = scene.action in ("enter", "leave", "move")
    shown = [detail for detail in details if detail != "size" or shows_size]
    adjectives = [_adjectives(item, shown, rng) for item in scene.objects]
    nouns = [rng.choice(WORDS.get(item.name, (item.name,))) for item in scene.objects]
    singular = [_with_article(f"{adjective} {noun}") for adjective, noun in zip(adjectives, nouns, strict=True)]
    return template.format(
        object=singular[0],
        other=singular[-1],
        objects=" ".join(f"{NUMBERS[scene.count]} {adjectives[0]} {scene.objects[0].plural}".split()),
        origin=ORIGIN.get(scene.direction),
        destination=DESTINATION.get(scene.direction),
        new_color=scene.new_color,
    )


def _adjectives(item: StoryObject, details: list[str], rng: random.Random) -> str:
    words = [rng.choice(WORDS[item.size])] if "size" in details else []
    if "texture" in details and item.texture != "plain":
        words.append(rng.choice(WORDS[item.texture]))
    return " ".join([*words, item.color] if item.color else words)


def _with_article(noun_phrase: str) -> str:
    noun_phrase = noun_phrase.strip()
    return f"{'an' if noun_phrase[0].lower() in 'aeiou' else 'a'} {noun_phrase}"


def _background_phrase(scene: Scene, rng: random.Random) -> str:
    if scene.background.photograph:
        return ""
    return rng.choice(BACKGROUND_PHRASES[scene.background.pattern]).format(color=scene.background.color)


@dataclass(frozen=True)
class Question:
    """A question with its only right answer; `question_type` is color, what, count, order, direction or name."""

    question_type: str
    question: str
    answer: str


def _named(item: StoryObject, count: int = 1) -> str:
    return " ".join(filter(None, (item.color, item.name if count == 1 else item.plural)))


def _counted(item: StoryObject, count: int) -> str:
    return _named(item) if count == 1 else f"{NUMBERS[count]} {_named(item, count)}"


def _only(scenes: list[Scene]) -> Iterator[Scene]:
    """The scene that stands alone in its list, or nothing."""
    if len(scenes) == 1:
        yield scenes[0]


def _what_is_shown(story: Story) -> Iterator[tuple[str, str]]:
    for scene in story.scenes:
        if scene.action != "turn":
            yield "What is shown?", " and ".join(_counted(item, scene.count) for item in scene.objects)


def _what_has_the_color(story: Story) -> Iterator[tuple[str, str]]:
    seen = [(item.color, item.name) for scene in story.scenes for item in scene.objects]
    colors = Counter([color for color, _ in seen] + [scene.new_color for scene in story.scenes if scene.new_color])
    for color, name in seen:
        if color and colors[color] == 1:
            yield f"What is {color}?", name


def _which_color(story: Story) -> Iterator[tuple[str, str]]:
    names = Counter(item.name for scene in story.scenes for item in scene.objects)
    for scene in story.scenes:
        for item in scene.objects:
            if item.color and names[item.name] == 1 and scene.action != "turn":
                noun = f"is the {item.name}" if scene.count == 1 else f"are the {item.plural}"
                yield f"What color {noun}?", item.color


def _which_new_color(story: Story) -> Iterator[tuple[str, str]]:
    for scene in story.scenes:
        if scene.action == "turn":
            yield f"Which color does the {_named(scene.objects[0])} turn?", scene.new_color


def _what_does_it(story: Story) -> Iterator[tuple[str, str]]:
    for action, verb in (("grow", "grows"), ("shrink", "shrinks"), ("turn", "changes its color")):
        for scene in _only([scene for scene in story.scenes if scene.action == action]):
            yield f"What {verb}?", scene.objects[0].name
    for side in ("left", "right", "top", "bottom"):
        for action, sides, verb in (("enter", ORIGIN, "comes in from"), ("leave", DESTINATION, "leaves at")):
            scenes = [scene for scene in story.scenes if scene.action == action and sides[scene.direction] == side]
            for scene in _only(scenes):
                yield f"What {verb} the {side}?", scene.objects[0].name


def _what_is_met(story: Story) -> Iterator[tuple[str, str]]:
    for scene in story.scenes:
        if scene.action == "meet":
            one, other = scene.objects
            yield f"What does the {_named(one)} meet?", other.name
            yield f"What does the {_named(other)} meet?", one.name


def _how_many(story: Story) -> Iterator[tuple[str, str]]:
    for scene in story.scenes:
        if scene.action == "gather":
            yield (
                f"How many {_named(scene.objects[0], scene.count)} are there?",
                NUMBERS[scene.count],
            )


def _what_is_next_to_it(story: Story) -> Iterator[tuple[str, str]]:
    for earlier, later in zip(story.scenes, story.scenes[1:], strict=False):
        for item in earlier.objects:
            if later.action not in ("meet", "gather"):
                yield f"What is shown right after the {_named(item, earlier.count)}?", later.objects[0].name
        for item in later.objects:
            if earlier.action not in ("meet", "gather"):
                yield f"What is shown right before the {_named(item, later.count)}?", earlier.objects[0].name


def _does_it_come_before(story: Story) -> Iterator[tuple[str, str]]:
    for place, scene in enumerate(story.scenes):
        for other_place, other in enumerate(story.scenes):
            if place != other_place:
                verb = "Does" if scene.count == 1 else "Do"
                one, two = _named(scene.objects[0], scene.count), _named(other.objects[0], other.count)
                yield f"{verb} the {one} come before the {two}?", "yes" if place < other_place else "no"
                yield f"{verb} the {one} come after the {two}?", "no" if place < other_place else "yes"


def _which_way(story: Story) -> Iterator[tuple[str, str]]:
    for scene in story.scenes:
        name = _named(scene.objects[0])
        if scene.action == "enter":
            yield f"From which side does the {name} come in?", ORIGIN[scene.direction]
        elif scene.action == "leave":
            yield f"On which side does the {name} leave?", DESTINATION[scene.direction]
        elif scene.action == "move":
            yield f"Which way does the {name} move?", scene.direction


# Type of a question, and the function that gives all of this form with their answers.
QuestionForm = tuple[str, Callable[[Story], Iterator[tuple[str, str]]]]

# Lessons for a model that knows no word: what things are called,
NAMING_FORMS: tuple[QuestionForm, ...] = (("name", _what_is_shown),)
# what there is of several, and which color or name it has,
FINDING_FORMS: tuple[QuestionForm, ...] = (
    ("color", _which_color),
    ("what", _what_has_the_color),
    ("count", _how_many),
)
# and where it goes or what it becomes.
MOVING_FORMS: tuple[QuestionForm, ...] = (
    ("direction", _which_way),
    ("color", _which_new_color),
)
QUESTION_FORMS: tuple[QuestionForm, ...] = (
    ("color", _which_color),
    ("color", _which_new_color),
    ("what", _what_does_it),
    ("what", _what_is_met),
    ("count", _how_many),
    ("order", _what_is_next_to_it),
    ("order", _does_it_come_before),
    ("direction", _which_way),
)


def ask(story: Story, rng: random.Random, forms: tuple[QuestionForm, ...] = QUESTION_FORMS) -> list[Question]:
    """Questions about a story, at most one of each form.

    The answer is drawn before the question, so that frequent answers aren't asked for more often than rare ones.
    """
    questions = []
    for question_type, form in forms:
        candidates = [Question(question_type, *candidate) for candidate in form(story)]
        if candidates:
            answer = rng.choice(sorted({candidate.answer for candidate in candidates}))
            questions.append(rng.choice([candidate for candidate in candidates if candidate.answer == answer]))
    return questions
