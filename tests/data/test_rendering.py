import random
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from transformers_testa.data.rendering import locate_objects, render_scene, write_video
from transformers_testa.data.sprites import COLORS, digit_kinds, draw_sprite, shape_kinds
from transformers_testa.data.stories import DIRECTIONS, PATTERNS, Background, Scene, StoryObject, World, plan_story


SIZE, FPS = 96, 8


def shape(name="square", color="red", size="large", texture="plain"):
    return StoryObject(name, f"{name}s", "shape", name, color, texture, size)


def scene(action, *objects, **changes):
    plain = Background("plain", "gray", seed=0)
    return Scene(action, objects or (shape(),), plain, seconds=3.0, lane=0.5, **changes)


def is_color(frame, color):
    """bool [H, W]"""
    return np.abs(frame.astype(int) - COLORS[color]).max(axis=-1) < 40


def centre(frame, color="red"):
    return np.argwhere(is_color(frame, color)).mean(axis=0)[::-1]


def test_the_same_scene_gives_the_same_frames():
    story = plan_story(World(kinds=shape_kinds() + digit_kinds("test")), random.Random(0))
    for planned in story.scenes:
        assert np.array_equal(render_scene(planned, SIZE, FPS), render_scene(planned, SIZE, FPS))


def test_a_scene_has_the_frames_of_its_length():
    frames = render_scene(scene("enter", direction="left"), SIZE, FPS)
    assert frames.shape == (24, SIZE, SIZE, 3)
    assert frames.dtype == np.uint8


@pytest.mark.parametrize("action", ["enter", "leave", "move", "grow", "gather"])
def test_an_object_is_located_where_its_colour_is_seen(action):
    changes = {"direction": "left"} if action in ("enter", "leave", "move") else {}
    planned = scene(action, count=3 if action == "gather" else 1, **changes)
    places = locate_objects(planned, SIZE, FPS)
    inside = ndimage.binary_erosion(places == 0, np.ones((1, 7, 7)))  # outlines have another colour
    for frame, place, within in zip(render_scene(planned, SIZE, FPS), places, inside, strict=True):
        assert is_color(frame, "red")[within].all()
        assert not is_color(frame, "red")[place < 0].any()
    assert inside.any()


def test_objects_that_meet_are_located_apart():
    planned = scene("meet", shape(color="red"), shape(color="blue"))
    for frame, place in zip(render_scene(planned, SIZE, FPS), locate_objects(planned, SIZE, FPS), strict=True):
        assert (place[is_color(frame, "red")] == 0).all()
        assert (place[is_color(frame, "blue")] == 1).all()


def test_an_object_that_turns_stays_the_same_object():
    places = locate_objects(scene("turn", new_color="blue"), SIZE, FPS)
    assert set(np.unique(places)) == {-1, 0}
    assert (places[0] == places[-1]).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_moving_object_goes_in_its_direction(direction):
    step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[direction]
    frames = render_scene(scene("move", direction=direction), SIZE, FPS)
    way = centre(frames[-1]) - centre(frames[0])
    assert np.sign(way.round()).tolist() == list(step)
    assert np.abs(way).max() > SIZE / 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_object_enters_an_empty_picture_and_leaves_it_empty(direction):
    enter = render_scene(scene("enter", direction=direction), SIZE, FPS)
    leave = render_scene(scene("leave", direction=direction), SIZE, FPS)
    seen = [is_color(frame, "red").any() for frame in (enter[0], enter[-1], leave[0], leave[-1])]
    assert seen == [False, True, True, False]


def test_objects_that_meet_come_close():
    frames = render_scene(scene("meet", shape(color="red"), shape(color="blue")), SIZE, FPS)
    distance = [np.abs(centre(frame, "red") - centre(frame, "blue")).max() for frame in frames]
    assert distance[-1] < 0.45 * SIZE < 0.6 * SIZE < distance[0]
    assert is_color(frames[-1], "red").sum() == pytest.approx(is_color(frames[-1], "blue").sum(), rel=0.05)


def test_growing_and_shrinking_change_the_size():
    grow, shrink = (render_scene(scene(action), SIZE, FPS) for action in ("grow", "shrink"))
    area = [is_color(frame, "red").sum() for frame in (grow[0], grow[-1], shrink[0], shrink[-1])]
    assert area[1] > 4 * area[0]
    assert area[2] > 4 * area[3]


def test_an_object_turns_into_its_new_color():
    frames = render_scene(scene("turn", new_color="blue"), SIZE, FPS)
    assert is_color(frames[0], "red").any() and not is_color(frames[0], "blue").any()
    assert is_color(frames[-1], "blue").any() and not is_color(frames[-1], "red").any()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_group_shows_its_number_of_objects_in_every_frame(count):
    for frame in render_scene(scene("gather", count=count), SIZE, FPS):
        assert ndimage.label(is_color(frame, "red"))[1] == count


def test_objects_are_large_enough_for_small_frames():
    for size, share in (("small", 0.3), ("large", 0.5)):
        frame = render_scene(scene("enter", shape(size=size), direction="right"), SIZE, FPS)[-1]
        rows = np.flatnonzero(is_color(frame, "red").any(axis=1))
        assert share * SIZE <= rows[-1] - rows[0] + 1 <= 0.7 * SIZE


def test_shapes_and_colors_and_textures_all_differ():
    kinds = shape_kinds()
    looks = [
        shape(kind.name, color, texture=texture)
        for kind in kinds
        for color in kind.colors
        for texture in ("plain", "striped", "dotted")
    ]
    pictures = {draw_sprite(look, 48).tobytes() for look in looks}
    assert len(pictures) == len(looks) == 8 * 8 * 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_background_follows_from_its_seed_and_leaves_strong_colors_to_objects(pattern):
    def corner(seed):
        background = Background(pattern, "olive", seed)
        return render_scene(replace(scene("grow"), background=background), SIZE, FPS)[0]

    assert np.array_equal(corner(1), corner(1))
    assert pattern == "plain" or not np.array_equal(corner(1), corner(2))
    strips = corner(1)[: SIZE // 4].astype(int)
    assert (strips.max(axis=-1) - strips.min(axis=-1)).max() < 90


def test_a_photograph_is_cropped_to_the_frame(tmp_path):
    path = tmp_path / "photograph.jpg"
    Image.new("RGB", (300, 200), (10, 120, 60)).save(path, quality=95)
    background = Background("plain", "gray", 0, photograph=str(path))
    frames = render_scene(replace(scene("enter", direction="up"), background=background), SIZE, FPS)
    assert np.abs(frames[0].astype(int) - (10, 120, 60)).max() < 6


def test_a_video_file_decodes_to_the_frames_that_were_written(tmp_path):
    frames = render_scene(scene("move", direction="right"), SIZE, FPS)
    path = tmp_path / "video.mp4"
    write_video(path, frames, SIZE, FPS)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", FPS)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert float(stream.duration * stream.time_base) == pytest.approx(len(frames) / FPS)
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 6
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


def test_a_failed_video_leaves_no_file_of_its_name(tmp_path):
    def frames():
        yield np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_video(tmp_path / "video.mp4", frames(), SIZE, FPS)
    assert not (tmp_path / "video.mp4").exists()
