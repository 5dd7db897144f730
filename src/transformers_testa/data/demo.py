"""Make the demo world: long videos that tell stories, with paragraphs and questions, in the ordinary file format.

    python -m transformers_testa.data.demo --output_dir demo_stories

Videos come in pairs of twins: the same scenes in two orders. Each names the other as its `distractor`. Short clips of
the training videos, told by themselves, are a first lesson for a model that knows nothing yet.
"""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser

from .rendering import count_frames, render_scene, write_video
from .sprites import SPLITS, cutout_kinds, digit_kinds, readable_images, shape_kinds
from .stories import ObjectKind, Story, World, plan_story, twin_of
from .storytelling import FINDING_FORMS, MOVING_FORMS, NAMING_FORMS, QUESTION_FORMS, QuestionForm, ask, tell


# Each training video gives one clip of so many scenes in a row, with a paragraph.
SCENES_PER_CLIP = (1, 1, 2, 3)


@dataclass(frozen=True)
class Questions:
    """How a training video is questioned.

    Args:
        scenes: Of how many scenes in a row a clip is.
        clips: How many clips there are of each length. None is there twice, though the same scenes
            may be, at other moments.
        forms: What is asked.
        rounds: How often, of each clip.
        moments: If not 0, clips are cut so that frames from the middle of so many equal parts show their scenes with the
            objects in the picture: one scene, two of which each has a frame, or one in a frame early and one late.
            Else clips are whole scenes.
    """

    scenes: tuple[int, ...]
    clips: int
    forms: tuple[QuestionForm, ...]
    rounds: int
    moments: int = 0


# The lessons before those about whole stories. All but the last are for a model that sees one or two frames.
LESSONS = {
    "train_scenes_qa": Questions(scenes=(1,), clips=9, forms=NAMING_FORMS, rounds=1, moments=1),
    "train_pairs_qa": Questions(scenes=(2,), clips=14, forms=FINDING_FORMS, rounds=4, moments=2),
    "train_moves_qa": Questions(scenes=(1,), clips=18, forms=MOVING_FORMS, rounds=1, moments=2),
    "train_clips_qa": Questions(scenes=(2, 3, 4, 5), clips=1, forms=QUESTION_FORMS, rounds=2),
}
# When things that come and go are in the picture, in shares of the scene.
IN_PICTURE = {"enter": (0.45, 1.0), "leave": (0.0, 0.55), "move": (0.2, 0.8)}
# Of what turns, a single frame shows the color that it is called by.
IN_ONE_FRAME = {**IN_PICTURE, "turn": (0.0, 0.5)}
ROUNDS_OF_QUESTIONS = {"train": 4, "validation": 1, "test": 1}
PHOTOGRAPH_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass
class DemoArguments:
    output_dir: str = field(metadata={"help": "Folder for the videos and annotation files."})
    num_train: int = field(default=1600, metadata={"help": "Number of training videos, twins included: even."})
    num_validation: int = field(default=100, metadata={"help": "Number of validation videos, even."})
    num_test: int = field(default=200, metadata={"help": "Number of test videos, even."})
    objects: str = field(
        default="shapes",
        metadata={"help": "'shapes', or a folder of cut-outs: PNG files, each with its caption in a .txt beside it."},
    )
    digits: bool = field(
        default=True, metadata={"help": "Whether handwritten digits from scikit-learn join the shapes."}
    )
    backgrounds: str | None = field(
        default=None, metadata={"help": "Folder of photographs (jpg, png) to use instead of drawn backgrounds."}
    )
    image_size: int = field(default=96, metadata={"help": "Width and height of the videos in pixels, even."})
    fps: int = field(default=8, metadata={"help": "Frames per second of the videos."})
    seconds_per_scene: list[float] = field(
        default_factory=lambda: [2.0, 4.0], metadata={"help": "Least and greatest length of a scene in seconds."}
    )
    min_scenes: int = field(default=6, metadata={"help": "Least number of scenes in a video."})
    max_scenes: int = field(default=12, metadata={"help": "Greatest number of scenes in a video."})
    seed: int = field(default=0, metadata={"help": "All files follow from this number and the options above."})
    num_processes: int | None = field(
        default=None, metadata={"help": "Number of processes that draw videos; one for each core if not given."}
    )

    def __post_init__(self) -> None:
        for split in SPLITS:
            number = getattr(self, f"num_{split}")
            if number < 2 or number % 2:
                raise ValueError(f"num_{split}={number} should be even and at least 2: each video has a twin.")
        if self.image_size < 16 or self.image_size % 2:
            raise ValueError(f"image_size={self.image_size} should be even, as H.264 needs it, and at least 16.")
        if self.fps < 1:
            raise ValueError(f"fps={self.fps} should be at least 1.")
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} should be at least 1.")
        if len(self.seconds_per_scene) != 2:
            raise ValueError(f"seconds_per_scene={self.seconds_per_scene} should be two numbers: least and greatest.")


def make_demo(arguments: DemoArguments) -> int:
    """Write the videos and, once all are there, the annotation files.

    Videos that exist are kept, so an interrupted run can be repeated to finish it. The files are:

    - `{train,validation,test}.jsonl`: `video`, `video_id`, `text`, `distractor`;
    - `train_clips.jsonl`: `video`, `video_id` (of the clip), `start`, `end` (seconds), `text`;
    - `{train,validation,test}_qa.jsonl`: `video`, `video_id`, `question_id`, `question`, `answers`, `answer_weights`,
      `question_type`; of the lessons `train_{scenes,pairs,moves,clips}_qa.jsonl`, about parts of the video,
      `start` and `end` too;
    - `videos/*.mp4`, and `demo.json` with the arguments.

    Returns:
        How many videos were written: 0 if the folder was complete.

    Raises:
        ValueError: If the folder holds a demo made with other arguments, or there are not enough objects.
    """
    output_dir = Path(arguments.output_dir)
    stories = plan_demo(arguments)
    _claim_folder(output_dir, arguments)
    (output_dir / "videos").mkdir(exist_ok=True)
    missing = [
        (output_dir / _video_file(video_id), story)
        for split in SPLITS
        for video_id, story in stories[split].items()
        if not (output_dir / _video_file(video_id)).is_file()
    ]
    _write_videos(missing, arguments)
    for split in SPLITS:
        rows, questions = _annotate(stories[split], arguments.seed, ROUNDS_OF_QUESTIONS[split])
        _write_lines(output_dir / f"{split}.jsonl", rows)
        _write_lines(output_dir / f"{split}_qa.jsonl", questions)
    _write_lines(output_dir / "train_clips.jsonl", _tell_clips(stories["train"], arguments))
    for name, lesson in LESSONS.items():
        _write_lines(output_dir / f"{name}.jsonl", _ask_about_clips(stories["train"], arguments, name, lesson))
    return len(missing)


def read_arguments(folder: Path) -> DemoArguments:
    """Return the arguments that a demo was made with, as its folder keeps them."""
    made = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    return DemoArguments(output_dir=str(folder), **made)


def plan_demo(arguments: DemoArguments) -> dict[str, dict[str, Story]]:
    """Plan the stories of each split, by `video_id`; the same arguments always give the same stories.

    Raises:
        ValueError: If there are not enough objects.
    """
    worlds = _build_worlds(arguments)
    return {
        split: _plan_split(worlds[split], split, getattr(arguments, f"num_{split}"), arguments.seed)
        for split in SPLITS
    }


def _build_worlds(arguments: DemoArguments) -> dict[str, World]:
    kinds = _find_kinds(arguments)
    photographs = _find_photographs(arguments.backgrounds) if arguments.backgrounds else ()
    least, greatest = arguments.seconds_per_scene
    worlds = {}
    for split in SPLITS:
        try:
            worlds[split] = World(
                kinds=kinds[split],
                photographs=photographs,
                min_scenes=arguments.min_scenes,
                max_scenes=arguments.max_scenes,
                seconds_per_scene=(least, greatest),
            )
        except ValueError as error:
            raise ValueError(f"The {split} split can't be made: {error}") from error
    return worlds


def _find_kinds(arguments: DemoArguments) -> dict[str, tuple[ObjectKind, ...]]:
    if arguments.objects != "shapes":
        return cutout_kinds(arguments.objects)
    return {split: shape_kinds() + (digit_kinds(split) if arguments.digits else ()) for split in SPLITS}


def _find_photographs(folder: str) -> tuple[str, ...]:
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PHOTOGRAPH_SUFFIXES)
    photographs = readable_images(paths)
    if not photographs:
        raise ValueError(f"backgrounds={folder!r} should be a folder that holds .jpg or .png files; it holds none.")
    return tuple(str(path) for path in photographs)


def _claim_folder(output_dir: Path, arguments: DemoArguments) -> None:
    """Record what is made here, or check that it is what was made here before."""
    wanted = {name: value for name, value in asdict(arguments).items() if name not in ("output_dir", "num_processes")}
    file = output_dir / "demo.json"
    if not file.is_file():
        output_dir.mkdir(parents=True, exist_ok=True)
        _replace(file, json.dumps(wanted, indent=2) + "\n")
        return
    made = json.loads(file.read_text(encoding="utf-8"))
    if changed := [name for name in wanted if made.get(name) != wanted[name]]:
        differences = ", ".join(f"{name}={made.get(name)!r} (now {wanted[name]!r})" for name in changed)
        raise ValueError(
            f"{output_dir} holds a demo made with {differences}. Give another output_dir, or delete this folder first."
        )


def _plan_split(world: World, split: str, num_videos: int, seed: int) -> dict[str, Story]:
    """Stories by video_id, each followed by its twin."""
    stories = {}
    for index in range(0, num_videos, 2):
        rng = random.Random(f"plan {seed} {split} {index}")
        story = plan_story(world, rng)
        stories[f"{split}-{index:05}"] = story
        stories[f"{split}-{index + 1:05}"] = twin_of(story, rng)
    return stories


def _video_file(video_id: str) -> str:
    return f"videos/{video_id}.mp4"


def _write_videos(videos: list[tuple[Path, Story]], arguments: DemoArguments) -> None:
    draw = partial(_draw_video, image_size=arguments.image_size, fps=arguments.fps)
    num_processes = min(arguments.num_processes or os.cpu_count() or 1, len(videos))
    progress = partial(tqdm, total=len(videos), desc="Drawing videos", unit="video", disable=not videos)
    if num_processes <= 1:
        list(progress(map(draw, videos)))
        return
    with ProcessPoolExecutor(num_processes) as pool:
        list(progress(pool.map(draw, videos, chunksize=4)))


def _draw_video(video: tuple[Path, Story], image_size: int, fps: int) -> None:
    path, story = video
    frames = chain.from_iterable(render_scene(scene, image_size, fps) for scene in story.scenes)
    write_video(path, frames, image_size, fps)


def _annotate(stories: dict[str, Story], seed: int, rounds: int) -> tuple[list[dict], list[dict]]:
    """The rows of a split: one a video, and one a question."""
    video_ids = list(stories)
    rows, questions = [], []
    for index, (video_id, story) in enumerate(stories.items()):
        rng = random.Random(f"tell {seed} {video_id}")
        video = {"video": _video_file(video_id), "video_id": video_id}
        rows.append({**video, "text": tell(story, rng), "distractor": video_ids[index ^ 1]})
        questions += _questions(video, story, rng, QUESTION_FORMS, rounds)
    return rows, questions


def _questions(
    video: dict, story: Story, rng: random.Random, forms: tuple[QuestionForm, ...], rounds: int
) -> list[dict]:
    """The rows of the questions about a story, or a part of one, that `video` names."""
    questions = {question.question: question for _ in range(rounds) for question in ask(story, rng, forms)}
    return [
        {
            **video,
            "question_id": f"{video['video_id']}-{number}",
            "question": question.question,
            "answers": [question.answer],
            "answer_weights": [1.0],
            "question_type": question.question_type,
        }
        for number, question in enumerate(questions.values())
    ]


def _tell_clips(stories: dict[str, Story], arguments: DemoArguments) -> list[dict]:
    """The rows of clips with their paragraphs."""
    rows = []
    for video_id, story in stories.items():
        rng = random.Random(f"clips {arguments.seed} {video_id}")
        for number, num_scenes in enumerate(SCENES_PER_CLIP):
            first = rng.randint(0, len(story.scenes) - num_scenes)
            clip, video = _cut_clip(video_id, story, first, num_scenes, f"{video_id}-clip{number}", arguments.fps)
            rows.append({**video, "text": tell(clip, rng)})
    return rows


def _ask_about_clips(stories: dict[str, Story], arguments: DemoArguments, name: str, lesson: Questions) -> list[dict]:
    """The rows of questions about clips."""
    questions = []
    for video_id, story in stories.items():
        rng = random.Random(f"{name} {arguments.seed} {video_id}")
        kind = name.removeprefix("train_").removesuffix("_qa")
        cuts: list[tuple[int, int]] = []
        shown: list[tuple[tuple[int, int], dict]] = []
        for num_scenes in (min(length, len(story.scenes)) for length in lesson.scenes):
            places = range(len(story.scenes) - num_scenes + 1)
            rounds = -(-lesson.clips // len(places)) if lesson.moments else 1
            chosen = [first for _ in range(rounds) for first in rng.sample(places, len(places))][: lesson.clips]
            cuts += [(first, num_scenes) for first in chosen]
        for number, cut in enumerate(cuts):
            clip, video = _cut_clip(video_id, story, *cut, f"{video_id}-{kind}{number}", arguments.fps)
            if lesson.moments:
                moments = _cut_moments(clip, story, cut[0], lesson.moments, arguments.fps, rng)
                if moments is None or (cut, moments) in shown:
                    continue
                shown.append((cut, moments))
                video |= moments
            questions += _questions(video, clip, rng, lesson.forms, lesson.rounds)
    return questions


def _cut_clip(video_id: str, story: Story, first: int, num_scenes: int, clip_id: str, fps: int) -> tuple[Story, dict]:
    """Scenes in a row, and the columns that name their part of the video: from when the first begins to the last's end."""
    beginnings = _beginnings(story, fps)
    video = {
        "video": _video_file(video_id),
        "video_id": clip_id,
        "start": beginnings[first] / fps,
        "end": beginnings[first + num_scenes] / fps,
    }
    return Story(story.scenes[first : first + num_scenes]), video


def _cut_moments(clip: Story, story: Story, first: int, num_moments: int, fps: int, rng: random.Random) -> dict | None:
    """The columns that name a part of the video whose middle frame, or those of whose halves, show the clip's scenes.

    None where chance finds none: two moments near the video's beginning or end leave no room around them.
    """
    beginnings = _beginnings(story, fps)
    for _ in range(20):
        moments = [
            beginnings[place] + int(share * (count_frames(story.scenes[place], fps) - 1))
            for place, share in _draw_moments(clip, first, num_moments, rng)
        ]
        # The middle of a half is a fourth of the part from its beginning, rounded down.
        num_frames = 1 if num_moments == 1 else 2 * (moments[1] - moments[0])
        start = moments[0] - num_frames // 4
        if num_frames and start >= 0 and start + num_frames <= beginnings[-1]:
            return {"start": start / fps, "end": (start + num_frames) / fps}
    return None


def _draw_moments(clip: Story, first: int, num_moments: int, rng: random.Random) -> list[tuple[int, float]]:
    """The scene of each moment, and the share of it that is over."""
    if num_moments == len(clip.scenes):
        parts = [IN_ONE_FRAME.get(scene.action, (0.0, 1.0)) for scene in clip.scenes]
        return [(first + number, rng.uniform(*part)) for number, part in enumerate(parts)]
    begin, end = IN_PICTURE.get(clip.scenes[0].action, (0.0, 1.0))
    return [(first, rng.uniform(begin, begin + 0.1)), (first, rng.uniform(end - 0.15, end))]


def _beginnings(story: Story, fps: int) -> list[int]:
    """The number of each scene's first frame, and how many frames there are in all."""
    return [0, *accumulate(count_frames(scene, fps) for scene in story.scenes)]


def _write_lines(file: Path, rows: list[dict]) -> None:
    if not file.is_file():
        _replace(file, "".join(json.dumps(row) + "\n" for row in rows))


def _replace(file: Path, text: str) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)


def main() -> None:
    parser = HfArgumentParser(DemoArguments)  # type: ignore[arg-type]  # it means dataclasses
    (arguments,) = parser.parse_args_into_dataclasses()
    num_written = make_demo(arguments)
    num_videos = arguments.num_train + arguments.num_validation + arguments.num_test
    if num_written:
        print(f"{arguments.output_dir} holds {num_videos} videos, {num_written} of them new, and their annotations.")
    else:
        print(f"{arguments.output_dir} already held all {num_videos} videos: nothing to do.")


if __name__ == "__main__":
    main()
