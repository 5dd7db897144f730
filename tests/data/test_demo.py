import json
import logging
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw

from transformers_testa.data import sprites
from transformers_testa.data.annotations import load_annotations
from transformers_testa.data.demo import (
    IN_PICTURE,
    LESSONS,
    SCENES_PER_CLIP,
    DemoArguments,
    main,
    make_demo,
    plan_demo,
)
from transformers_testa.data.rendering import count_frames
from transformers_testa.data.sprites import cutout_kinds, digit_kinds
from transformers_testa.video_decoding_testa import sample_frame_indices


SMALL = {
    "num_train": 6,
    "num_validation": 2,
    "num_test": 4,
    "image_size": 32,
    "fps": 4,
    "seconds_per_scene": [0.5, 1.0],
    "min_scenes": 3,
    "max_scenes": 5,
    "num_processes": 1,
}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_cutouts(folder, number, captions=("A grey wolf.", "An owl.")):
    """Cut-outs in two sub-folders, every one with a caption of its own."""
    for index in range(number):
        path = folder / f"kind{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (40, 30))
        ImageDraw.Draw(picture).ellipse([5, 5, 35, 25], fill=(index % 250, 200, 100, 255))
        picture.save(path)
        path.with_suffix(".txt").write_text(f"{captions[index % 2][:-1]} {index}.\nThe second line.\n")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert make_demo(DemoArguments(str(folder), **SMALL)) == 12
    return folder


def test_the_files_are_those_of_an_ordinary_data_set(demo):
    for split, number in (("train", 6), ("validation", 2), ("test", 4)):
        table = load_annotations(demo / f"{split}.jsonl")
        assert table["video_id"][:] == [f"{split}-{index:05}" for index in range(number)]
        for row in read_lines(demo / f"{split}_qa.jsonl"):
            assert set(row) == {
                *("video", "video_id", "question_id", "question", "answers", "answer_weights", "question_type")
            }
            assert (demo / row["video"]).is_file()
            assert len(row["answers"]) == len(row["answer_weights"]) == 1
    assert not list(demo.rglob("*.unfinished"))


def test_clips_are_whole_scenes_with_their_own_sentences(demo):
    table = load_annotations(demo / "train_clips.jsonl")
    stories = {row["video"]: row["text"] for row in load_annotations(demo / "train.jsonl")}
    assert len(table) == 6 * len(SCENES_PER_CLIP) == len(set(table["video_id"]))
    for number, row in enumerate(table):
        num_scenes = SCENES_PER_CLIP[number % len(SCENES_PER_CLIP)]
        assert row["text"].count(".") == num_scenes < stories[row["video"]].count(".") + 1
        shortest, longest = SMALL["seconds_per_scene"]
        assert row["start"] >= 0 and num_scenes * shortest <= row["end"] - row["start"] <= num_scenes * longest
        with av.open(row["video"]) as video:
            assert row["end"] <= video.streams.video[0].frames / SMALL["fps"]


@pytest.mark.parametrize(("name", "lesson"), LESSONS.items())
def test_lessons_ask_about_clips_of_whole_scenes(demo, name, lesson):
    told = {row["video"]: row["text"] for row in load_annotations(demo / "train.jsonl")}
    questions = load_annotations(demo / f"{name}.jsonl", task="question")
    clips = {row["video_id"]: row for row in questions}
    assert len(questions) >= len(clips) >= 6 * len(lesson.scenes)
    shortest, longest = SMALL["seconds_per_scene"]
    lengths = [min(length, SMALL["max_scenes"]) for length in lesson.scenes]
    for row in clips.values():
        seconds = row["end"] - row["start"]
        assert lesson.moments or min(*lengths, SMALL["min_scenes"]) * shortest <= seconds <= max(lengths) * longest
    places = [(row["video"], row["start"], row["end"]) for row in clips.values()]
    assert len(lesson.scenes) > 1 or len(set(places)) == len(places)
    if name == "train_moves_qa":
        assert {row["question_type"] for row in questions} == {"direction", "color"}
        return
    about_color = [row for row in questions if row["question"].lower().startswith("what color is the ")]
    assert all(row["answers"][0] in told[row["video"]] for row in about_color)
    assert about_color or name == "train_scenes_qa"


def shown_scenes(row, scenes, num_frames):
    """The scene that each frame of a question's clip is of, and the share of it that is over."""
    ends = np.cumsum([count_frames(scene, SMALL["fps"]) for scene in scenes])
    first, total = (round(SMALL["fps"] * seconds) for seconds in (row["start"], row["end"] - row["start"]))
    frames = first + sample_frame_indices(total, num_frames, "middle")
    places = np.searchsorted(ends, frames, side="right")
    lengths = np.diff(ends, prepend=0)
    return places, (frames - (ends - lengths)[places]) / (lengths[places] - 1)


@pytest.mark.parametrize("name", ["train_scenes_qa", "train_pairs_qa"])
def test_lessons_of_moments_show_every_scene_they_ask_about(demo, name):
    stories = plan_demo(DemoArguments(str(demo), **SMALL))["train"]
    for row in load_annotations(demo / f"{name}.jsonl", task="question"):
        scenes = stories[row["video_id"].rpartition("-")[0]].scenes
        shown, _ = shown_scenes(row, scenes, LESSONS[name].moments)
        assert len(set(shown)) == len(shown) == max(shown) - min(shown) + 1
        seen = [item for place in shown for item in scenes[place].objects]
        assert any(item.color in (row["question"] + row["answers"][0]) for item in seen)


def test_the_lesson_of_moves_shows_a_scene_early_and_late(demo):
    stories = plan_demo(DemoArguments(str(demo), **SMALL))["train"]
    for row in load_annotations(demo / "train_moves_qa.jsonl", task="question"):
        scenes = stories[row["video_id"].rpartition("-")[0]].scenes
        (place, same_place), (early, late) = shown_scenes(row, scenes, 2)
        assert place == same_place and early < late
        begin, end = IN_PICTURE.get(scenes[place].action, (0.0, 1.0))
        frame = 1 / (SMALL["fps"] * SMALL["seconds_per_scene"][0] - 1)
        assert early >= begin - frame and late <= end


def test_training_videos_have_many_questions_and_none_twice(demo):
    rows = read_lines(demo / "train_qa.jsonl")
    asked = {(row["video_id"], row["question"]) for row in rows}
    assert len(asked) == len(rows) == len({row["question_id"] for row in rows})
    assert len(rows) / 6 > 1.5 * len(read_lines(demo / "test_qa.jsonl")) / SMALL["num_test"]


def test_twins_stand_side_by_side_and_last_as_long(demo):
    rows = read_lines(demo / "test.jsonl")
    lengths = {}
    for row in rows:
        with av.open(str(demo / row["video"])) as container:
            lengths[row["video_id"]] = sum(1 for _ in container.decode(video=0))
    for one, two in zip(rows[::2], rows[1::2], strict=True):
        assert (one["distractor"], two["distractor"]) == (two["video_id"], one["video_id"])
        assert lengths[one["video_id"]] == lengths[two["video_id"]] > 0
        assert one["text"] != two["text"]


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_processes(demo, tmp_path):
    make_demo(DemoArguments(str(tmp_path), **{**SMALL, "num_processes": 2}))
    assert contents(tmp_path) == contents(demo)


def test_another_seed_gives_other_stories(demo, tmp_path):
    make_demo(DemoArguments(str(tmp_path), **SMALL, seed=1))
    assert not {row["text"] for row in read_lines(demo / "train.jsonl")} & {
        row["text"] for row in read_lines(tmp_path / "train.jsonl")
    }


def test_more_videos_leave_the_first_ones_as_they_are(demo, tmp_path):
    make_demo(DemoArguments(str(tmp_path), **{**SMALL, "num_train": 8}))
    assert read_lines(tmp_path / "train.jsonl")[:6] == read_lines(demo / "train.jsonl")


def test_a_second_run_does_nothing_and_says_so(demo, monkeypatch, capsys):
    times = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    options = {name: value for name, value in SMALL.items() if name != "seconds_per_scene"}
    command = ["demo", "--output_dir", str(demo), "--seconds_per_scene", "0.5", "1.0"]
    monkeypatch.setattr(
        "sys.argv", command + [word for name, value in options.items() for word in (f"--{name}", str(value))]
    )
    main()
    assert "already held all 12 videos: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == times


def test_an_interrupted_run_is_finished_by_the_next(tmp_path):
    arguments = DemoArguments(str(tmp_path), **SMALL)
    make_demo(arguments)
    complete = contents(tmp_path)
    for name in ("videos/train-00003.mp4", "videos/test-00000.mp4", "test.jsonl"):
        (tmp_path / name).unlink()
    (tmp_path / "videos/train-00003.unfinished").write_bytes(b"half a video")
    kept = (tmp_path / "videos/train-00000.mp4").stat().st_mtime_ns
    assert make_demo(arguments) == 2
    assert contents(tmp_path) == complete
    assert (tmp_path / "videos/train-00000.mp4").stat().st_mtime_ns == kept


def test_other_arguments_in_the_same_folder_are_an_error(demo):
    with pytest.raises(ValueError, match=r"holds a demo made with fps=4 \(now 8\), seed=0 \(now 5\)"):
        make_demo(DemoArguments(str(demo), **{**SMALL, "fps": 8}, seed=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_test": 3}, "num_test=3 should be even"),
        ({"num_train": 0}, "num_train=0 should be even and at least 2"),
        ({"image_size": 33}, "image_size=33 should be even"),
        ({"fps": 0}, "fps=0 should be at least 1"),
        ({"num_processes": 0}, "num_processes=0 should be at least 1"),
        ({"seconds_per_scene": [2.0]}, "seconds_per_scene=.* should be two numbers"),
    ],
)
def test_impossible_arguments_are_errors(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DemoArguments(str(tmp_path), **{**SMALL, **changes})


def test_each_split_has_its_own_handwritten_digits():
    pictures = {
        split: {picture for kind in digit_kinds(split) for picture in kind.pictures}
        for split in ("train", "validation", "test")
    }
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values())) == 1797
    assert all(kind.pictures for split in pictures for kind in digit_kinds(split))


def test_digits_can_be_left_out(tmp_path):
    make_demo(DemoArguments(str(tmp_path), **SMALL, digits=False))
    told = " ".join(row["text"] for row in read_lines(tmp_path / "train.jsonl"))
    assert "digit" not in told and "number" not in told


def test_a_missing_scikit_learn_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    sprites._handwritten_digits.cache_clear()
    with pytest.raises(ValueError, match="pip install scikit-learn"):
        make_demo(DemoArguments(str(tmp_path / "demo"), **SMALL))


def test_every_cutout_belongs_to_one_split_that_never_changes(tmp_path):
    write_cutouts(tmp_path, 40)

    def splits():
        kinds = cutout_kinds(tmp_path)
        return {picture: split for split in kinds for kind in kinds[split] for picture in kind.pictures}

    before = splits()
    assert len(before) == 40
    assert set(before.values()) == {"train", "validation", "test"}
    write_cutouts(tmp_path, 60)
    assert splits().items() >= before.items()


def test_cutouts_are_called_by_their_captions(tmp_path):
    write_cutouts(tmp_path, 2)
    kinds = [kind for split in cutout_kinds(tmp_path).values() for kind in split]
    assert {kind.name for kind in kinds} == {"grey wolf 0", "owl 1"}


def test_stories_of_cutouts_before_photographs(tmp_path):
    write_cutouts(tmp_path / "stamps", 200)
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (64, 48), (90, 60, 30)).save(tmp_path / "photographs/ground.jpg")
    arguments = DemoArguments(
        str(tmp_path / "demo"),
        **SMALL,
        objects=str(tmp_path / "stamps"),
        backgrounds=str(tmp_path / "photographs"),
    )
    make_demo(arguments)
    rows = read_lines(tmp_path / "demo/test.jsonl")
    assert all("wolf" in row["text"] or "owl" in row["text"] for row in rows)
    types = {row["question_type"] for row in read_lines(tmp_path / "demo/test_qa.jsonl")}
    assert {"what", "order"} <= types <= {"what", "count", "order", "direction"}
    with av.open(str(tmp_path / "demo" / rows[0]["video"])) as container:
        corner = next(container.decode(video=0)).to_ndarray(format="rgb24")[0, 0]
    assert abs(corner.astype(int) - (90, 60, 30)).max() < 40


def test_cutouts_without_captions_and_broken_files_are_counted_and_left_out(tmp_path, caplog):
    write_cutouts(tmp_path, 10)
    (tmp_path / "kind0/0.txt").unlink()
    (tmp_path / "kind1/1.txt").write_text("")
    (tmp_path / "kind0/2.png").write_bytes(b"not a picture")
    with caplog.at_level(logging.WARNING):
        kinds = cutout_kinds(tmp_path)
    assert sum(len(split) for split in kinds.values()) == 7
    assert "2 of 10 PNG files" in caplog.text
    assert "1 images can't be read" in caplog.text


def test_folders_without_pictures_are_errors(tmp_path):
    arguments = DemoArguments(str(tmp_path / "demo"), **SMALL)
    with pytest.raises(ValueError, match="should be 'shapes' or an existing folder"):
        make_demo(replace(arguments, objects=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no PNG file with a caption"):
        make_demo(replace(arguments, objects=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match=r"backgrounds=.*empty.* holds none"):
        make_demo(replace(arguments, backgrounds=str(tmp_path / "empty")))
    assert not (tmp_path / "demo").exists()


def test_too_few_cutouts_in_a_split_are_an_error(tmp_path):
    write_cutouts(tmp_path, 40)
    with pytest.raises(ValueError, match=r"The (validation|test) split can't be made: .* need 10 different objects"):
        make_demo(DemoArguments(str(tmp_path / "demo"), **SMALL, objects=str(tmp_path)))


def test_the_plan_of_a_demo_tells_what_its_videos_show(demo):
    plans = plan_demo(DemoArguments(**json.loads((demo / "demo.json").read_text()), output_dir="elsewhere"))
    for split in ("train", "validation", "test"):
        rows = read_lines(demo / f"{split}.jsonl")
        assert [row["video_id"] for row in rows] == list(plans[split])
        for row, story in zip(rows, plans[split].values(), strict=True):
            assert row["text"].count(".") == len(story.scenes)
            with av.open(str(demo / row["video"])) as video:
                frames = sum(count_frames(scene, SMALL["fps"]) for scene in story.scenes)
                assert video.streams.video[0].frames == frames
