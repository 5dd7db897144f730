"""Plan the stories of the demo world: which objects appear in which scene, and what they do there.

A story is data. `storytelling` turns it into a paragraph and questions, `rendering` into frames.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


ACTIONS = ("enter", "leave", "move", "meet", "grow", "shrink", "turn", "gather")
DIRECTIONS = ("left", "right", "up", "down")
PATTERNS = ("plain", "gradient", "stripes", "checks", "noise")
BACKGROUND_COLORS = ("gray", "brown", "beige", "olive", "navy")
GROUP_SIZES = (2, 3, 4, 5)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class ObjectKind:
    """What a source of objects offers: everything that goes by one name.

    Args:
        name: Noun, such as "star"; unique among the kinds of a world.
        plural: Noun for several of them.
        source: "shape", "digit" or "cutout": which drawing function knows `pictures`.
        pictures: Shape name, numbers of handwritten samples, or files; a story picks one of them.
        colors: Colors it can have; empty where the picture brings its own.
        textures: Textures it can have.
        sizes: Sizes it can have.
        weight: How often it is picked, relative to the other kinds.
    """

    name: str
    plural: str
    source: str
    pictures: tuple[str, ...]
    colors: tuple[str, ...] = ()
    textures: tuple[str, ...] = ("plain",)
    sizes: tuple[str, ...] = ("small", "large")
    weight: float = 1.0


@dataclass(frozen=True)
class StoryObject:
    """One object as it looks in its scene."""

    name: str
    plural: str
    source: str
    picture: str
    color: str | None
    texture: str
    size: str


@dataclass(frozen=True)
class Background:
    """A drawn pattern, or a crop of a photograph; `seed` fixes what is random in either."""

    pattern: str
    color: str
    seed: int
    photograph: str | None = None


@dataclass(frozen=True)
class Scene:
    """A few seconds in which one thing happens.

    Args:
        action: One of `ACTIONS`.
        objects: Two objects where they "meet", else one.
        background: What is behind them.
        seconds: Length of the scene.
        lane: Where the path of a moving object lies, across its direction, between 0 and 1.
        direction: Of the motion, one of `DIRECTIONS`, where the action is "enter", "leave" or "move"; else empty.
        count: How many copies of the object there are, more than one where they "gather".
        new_color: Color at the end, where the action is "turn"; else empty.
    """

    action: str
    objects: tuple[StoryObject, ...]
    background: Background
    seconds: float
    lane: float
    direction: str = ""
    count: int = 1
    new_color: str = ""


@dataclass(frozen=True)
class Story:
    """Scenes in the order in which they are shown and told."""

    scenes: tuple[Scene, ...]


@dataclass(frozen=True)
class World:
    """What stories are made of.

    Args:
        kinds: The objects to choose from.
        photographs: Files to use as backgrounds; drawn patterns where empty.
        min_scenes: Least number of scenes of a story, at least 3: two have only one other order.
        max_scenes: Greatest number of scenes.
        seconds_per_scene: Least and greatest length of a scene.

    Raises:
        ValueError: If there are not enough objects for a story in which each is seen once.
    """

    kinds: tuple[ObjectKind, ...]
    photographs: tuple[str, ...] = ()
    min_scenes: int = 6
    max_scenes: int = 12
    seconds_per_scene: tuple[float, float] = (2.0, 4.0)

    def __post_init__(self) -> None:
        if not 3 <= self.min_scenes <= self.max_scenes:
            raise ValueError(
                f"min_scenes={self.min_scenes} and max_scenes={self.max_scenes} should be at least 3 and in this order."
            )
        if not 0 < self.seconds_per_scene[0] <= self.seconds_per_scene[1]:
            raise ValueError(
                f"seconds_per_scene={self.seconds_per_scene} should be a least and a greatest length, above 0."
            )
        # A scene shows at most two looks (name and color). The reserve makes sure that, whatever was taken before,
        # some kind still has two colors to "turn" between.
        looks = sum(len(kind.colors) or 1 for kind in self.kinds)
        needed = 2 * self.max_scenes + sum(bool(kind.colors) for kind in self.kinds)
        if looks < needed:
            raise ValueError(
                f"Stories of up to max_scenes={self.max_scenes} scenes need {needed} different objects, and there are "
                f"{looks}. Give more objects or lower max_scenes."
            )

    @property
    def actions(self) -> tuple[str, ...]:
        has_colors = any(len(kind.colors) > 1 for kind in self.kinds)
        return tuple(action for action in ACTIONS if action != "turn" or has_colors)


def plan_story(world: World, rng: random.Random) -> Story:
    """Plan one story. No two scenes share an object of the same name and color."""
    taken: set[tuple[str, str | None]] = set()
    return Story(tuple(_plan_scene(world, taken, rng) for _ in range(rng.randint(world.min_scenes, world.max_scenes))))


def twin_of(story: Story, rng: random.Random) -> Story:
    """The same scenes in another order that leaves none of them in its place."""
    order = list(range(len(story.scenes)))
    while any(place == scene for place, scene in enumerate(order)):
        rng.shuffle(order)
    return Story(tuple(story.scenes[scene] for scene in order))


def _plan_scene(world: World, taken: set[tuple[str, str | None]], rng: random.Random) -> Scene:
    action = rng.choice(world.actions)
    new_color: str | None = None
    if action == "turn":
        kind, (color, new_color) = _pick_look(world.kinds, taken, rng, num_colors=2)
        looks = [(kind, color)]
    else:
        picks = (_pick_look(world.kinds, taken, rng) for _ in range(2 if action == "meet" else 1))
        looks = [(kind, colors[0]) for kind, colors in picks]
    return Scene(
        action=action,
        objects=tuple(_plan_object(kind, color, rng) for kind, color in looks),
        background=_plan_background(world.photographs, rng),
        seconds=rng.uniform(*world.seconds_per_scene),
        lane=rng.uniform(0.3, 0.7),
        direction=rng.choice(DIRECTIONS) if action in ("enter", "leave", "move") else "",
        count=rng.choice(GROUP_SIZES) if action == "gather" else 1,
        new_color=new_color or "",
    )


def _pick_look(
    kinds: tuple[ObjectKind, ...], taken: set[tuple[str, str | None]], rng: random.Random, num_colors: int = 1
) -> tuple[ObjectKind, list[str | None]]:
    """A kind and so many of its colors that the story has not shown yet."""
    weights = [kind.weight for kind in kinds]
    while True:
        kind = rng.choices(kinds, weights)[0]
        free = [color for color in kind.colors or (None,) if (kind.name, color) not in taken]
        if len(free) >= num_colors:
            colors = rng.sample(free, num_colors)
            taken.update((kind.name, color) for color in colors)
            return kind, colors


def _plan_object(kind: ObjectKind, color: str | None, rng: random.Random) -> StoryObject:
    return StoryObject(
        name=kind.name,
        plural=kind.plural,
        source=kind.source,
        picture=rng.choice(kind.pictures),
        color=color,
        texture=rng.choice(kind.textures),
        size=rng.choice(kind.sizes),
    )


def _plan_background(photographs: tuple[str, ...], rng: random.Random) -> Background:
    return Background(
        pattern=rng.choice(PATTERNS),
        color=rng.choice(BACKGROUND_COLORS),
        seed=rng.getrandbits(32),
        photograph=rng.choice(photographs) if photographs else None,
    )
