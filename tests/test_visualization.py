import importlib
import sys

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_modeling import example_videos, trained
from test_modeling_common import tiny_video_config

from transformers_testa import TestaVideoModel
from transformers_testa.visualization import (
    best_span,
    contact_sheet,
    draw_heat_map,
    draw_merged_regions,
    merged_similarity,
    plot_grounding,
    plot_merged_similarity,
    region_colors,
    save_animation,
    show_results,
    trace_layers,
)


GRAY = 100


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gray_frames(num_frames: int = 2, size: int = 48) -> np.ndarray:
    return np.full((num_frames, size, size, 3), GRAY, dtype=np.uint8)


def colors_of_patches(pictures: np.ndarray, num_frames: int, side: int) -> list[set[tuple[int, ...]]]:
    """The colours that are seen in each patch, inside of the border."""
    border = (pictures.shape[1] - pictures.shape[1] // (24 * side) * 24 * side) // 2
    inside = pictures[:, border : pictures.shape[1] - border, border : pictures.shape[2] - border]
    size = inside.shape[1] // side
    return [
        {
            tuple(pixel)
            for pixel in inside[frame, row * size : (row + 1) * size, column * size : (column + 1) * size]
            .reshape(-1, 3)
            .tolist()
        }
        for frame in range(num_frames)
        for row in range(side)
        for column in range(side)
    ]


# --- Merged regions --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_patches_share_colours_exactly_where_they_share_a_token(tokens):
    pictures = draw_merged_regions(gray_frames(), torch.tensor(tokens).view(2, 4))
    seen = colors_of_patches(pictures, num_frames=2, side=2)
    for first, first_token in zip(seen, tokens, strict=True):
        for second, second_token in zip(seen, tokens, strict=True):
            others = first & second - {(GRAY,) * 3}
            assert bool(others) == (first_token == second_token and tokens.count(first_token) > 1)


def test_a_patch_by_itself_keeps_its_looks_and_a_dropped_one_is_dark():
    pictures = draw_merged_regions(gray_frames(1), torch.tensor([[0, -1, 1, 2]]))
    kept, dropped, *_ = colors_of_patches(pictures, num_frames=1, side=2)
    assert kept == {(GRAY,) * 3}
    assert dropped == {(GRAY // 5,) * 3}


def test_a_merged_region_is_outlined_where_it_ends_and_not_within():
    frames = gray_frames(1, size=96)
    pictures = draw_merged_regions(frames, torch.tensor([[0, 0, 1, 2]]))[0]
    border = (len(pictures) - 96) // 2
    inside = pictures[border : border + 96, border : border + 96]
    (outline,) = region_colors(1).tolist()
    assert inside[0, 20].tolist() == inside[47, 20].tolist() == inside[20, 0].tolist() == outline
    assert inside[20, 47].tolist() == inside[20, 48].tolist() != outline


def test_frames_that_share_tokens_have_one_border_and_others_none():
    token_map = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 6], [0, 1, 2, 3], [-1, -1, -1, -1], [-1, -1, -1, -1]])
    corners = draw_merged_regions(gray_frames(5), token_map)[:, 0, 0].tolist()
    assert corners[0] == corners[2] != [255, 255, 255]
    assert corners[1] == corners[3] == corners[4] == [255, 255, 255]


def test_small_frames_are_enlarged_and_large_ones_are_not():
    tokens = torch.arange(4).view(1, 4)
    small, large = (draw_merged_regions(gray_frames(1, size), tokens) for size in (6, 200))
    assert small.shape[0] == large.shape[0] == 1
    assert 48 <= small.shape[1] < 80
    assert 200 <= large.shape[1] < 260


def test_neighbouring_region_colours_differ():
    colors = region_colors(200).astype(int)
    assert np.abs(colors[1:] - colors[:-1]).sum(axis=1).min() > 100


@pytest.mark.parametrize(
    ("frames", "token_map", "grid_size", "message"),
    [
        (gray_frames(2), torch.zeros(3, 4, dtype=torch.long), None, "frames has 2 frames; token_map tells of 3"),
        (gray_frames(2), torch.zeros(2, 6, dtype=torch.long), None, "grid_size=.* 6 patches"),
        (gray_frames(2), torch.zeros(2, 6, dtype=torch.long), (2, 2), "grid_size=.* 6 patches"),
        (gray_frames(2), torch.zeros(2, 4), None, "token_map should be integers .*float32"),
        (gray_frames(2), torch.zeros(1, 2, 4, dtype=torch.long), None, "token_map should be .*one video"),
        (gray_frames(2)[0], torch.zeros(2, 4, dtype=torch.long), None, "frames should be uint8"),
        (gray_frames(2) / 255, torch.zeros(2, 4, dtype=torch.long), None, "frames should be uint8 .* float64"),
    ],
)
def test_what_does_not_fit_is_named(frames, token_map, grid_size, message):
    with pytest.raises(ValueError, match=message):
        draw_merged_regions(frames, token_map, grid_size)


def test_a_grid_that_is_no_square_can_be_given():
    assert len(draw_merged_regions(gray_frames(2), torch.zeros(2, 6, dtype=torch.long), (2, 3))) == 2


def test_merged_regions_and_sheets_are_drawn_without_matplotlib(monkeypatch):
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "transformers_testa.visualization")
    visualization = importlib.import_module("transformers_testa.visualization")
    pictures = visualization.draw_merged_regions(gray_frames(1), torch.zeros(1, 4, dtype=torch.long))
    assert visualization.contact_sheet(pictures, ["a"], columns=1)
    with pytest.raises(ImportError, match="matplotlib"):
        visualization.draw_heat_map(gray_frames(1), torch.zeros(1, 4))


# --- Layers ----------------------------------------------------------------------------------------------------------

KINDS_OF_AGGREGATION = [
    {"merged_frames_per_layer": 1, "merged_patches_per_layer": 1},
    {"merged_patches_per_layer": 1, "aggregation_strategy": "prune"},
    {"attention_type": "joint_space_time", "merged_patches_per_layer": 3},
    {"attention_type": "space_only", "merged_patches_per_layer": 1},
]


@pytest.mark.parametrize("fields", KINDS_OF_AGGREGATION)
def test_layers_are_traced_from_patches_to_the_models_own_map(fields):
    model = trained(TestaVideoModel(tiny_video_config(**fields)))
    videos = example_videos()
    with torch.no_grad():
        output = model(videos)
    states, maps = trace_layers(model, videos)
    assert len(states) == len(maps) == model.config.num_hidden_layers + 1
    assert torch.equal(maps[-1], output.token_map)
    class_tokens = 4 if fields.get("attention_type") == "space_only" else 1
    for tokens, token_map in zip(states, maps, strict=True):
        assert token_map.shape == output.token_map.shape
        for one in token_map:  # every token but the class tokens is some patch's
            assert len(one[one >= 0].unique()) == tokens.shape[1] - class_tokens
    # Before the first block, tokens are patches: a patch that changes alone changes its token alone.
    changed = videos.clone()
    changed[0, 2, :, :2, :2] += 1
    (before, *_), _ = trace_layers(model, changed)
    assert (before != states[0]).any(dim=-1).nonzero().tolist() == [[0, maps[0][0, 2, 0].item()]]


@pytest.mark.parametrize("fields", KINDS_OF_AGGREGATION)
def test_similarity_is_that_of_every_pair(fields):
    model = trained(TestaVideoModel(tiny_video_config(**fields)))
    states, maps = trace_layers(model, example_videos())
    for block, found in enumerate(zip(*merged_similarity(states, maps), strict=True)):
        pairs: dict[bool, list[float]] = {True: [], False: []}
        for tokens, before, after in zip(
            states[block], maps[block].flatten(1), maps[block + 1].flatten(1), strict=True
        ):
            next_token = {b: a for b, a in zip(before.tolist(), after.tolist(), strict=True) if a >= 0}
            for one in next_token:
                for other in next_token:
                    if one != other:
                        similarity = torch.cosine_similarity(tokens[one].double(), tokens[other].double(), dim=0)
                        pairs[next_token[one] == next_token[other]].append(similarity.item())
        expected = [np.mean(pairs[kind]) if pairs[kind] else np.nan for kind in (True, False)]
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert plot_merged_similarity(*merged_similarity(states, maps)).axes[0].get_xlabel() == "block"


# --- Grounding -------------------------------------------------------------------------------------------------------


def test_the_hottest_patch_has_the_highest_score():
    scores = torch.full((2, 4), 0.1)
    scores[1, 2] = 0.9
    brightness = draw_heat_map(gray_frames(2), scores).astype(int).sum(axis=-1)
    frame, row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert frame == 1
    assert row >= 24 > column


def test_heat_maps_of_the_same_limits_have_the_same_colours():
    low, high = torch.tensor([[0.0, 0.1, 0.2, 0.3]]), torch.tensor([[0.0, 0.6, 0.8, 1.0]])
    alone = draw_heat_map(gray_frames(1), low)
    together = draw_heat_map(gray_frames(1), low, limits=(0.0, 1.0))
    assert alone.max() > together.max()
    assert np.array_equal(together[:, 0, 0], draw_heat_map(gray_frames(1), high, limits=(0.0, 1.0))[:, 0, 0])


@pytest.mark.parametrize(
    ("scores", "span"),
    [
        ([0.0, 0.9, 1.0, 0.1], (1, 2)),
        ([0.0, 1.0, 0.7, 1.0, 0.0], (1, 3)),
        ([1.0, 0.0, 0.0, 0.9], (0, 0)),
        ([0.3], (0, 0)),
        ([0.0, 0.0, 1.0], (2, 2)),
    ],
)
def test_the_best_span_takes_in_short_gaps_and_no_long_ones(scores, span):
    assert best_span(torch.tensor(scores)) == span


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
def test_the_best_span_holds_the_best_frame_and_no_weak_ends(scores):
    first, last = best_span(torch.tensor(scores, dtype=torch.float64))
    assert 0 <= first <= last < len(scores)
    level = (min(scores) + max(scores)) / 2
    assert min(scores[first], scores[last]) >= level


def test_a_grounding_plot_shades_the_best_span_in_seconds():
    scores = torch.zeros(4, 4)
    scores[2, 1] = 1.0
    figure = plot_grounding(gray_frames(4), scores, "a red star", seconds=[0.0, 2.0, 4.0, 6.0])
    axes = figure.axes[-1]
    span = axes.patches[0].get_window_extent().transformed(axes.transData.inverted())
    assert (round(span.x0, 3), round(span.x1, 3)) == (3.0, 5.0)
    assert figure.get_suptitle() == "a red star"
    assert len(figure.axes) == 9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_heat_map(gray_frames(2), torch.zeros(3, 4)), "frames has 2 frames; scores tells of 3"),
        (lambda: draw_heat_map(gray_frames(2), torch.zeros(1, 2, 4)), "scores should be .*one text"),
        (lambda: best_span(torch.zeros(2, 4)), "frame_scores should be"),
        (lambda: best_span(torch.zeros(0)), "frame_scores should be"),
        (lambda: plot_grounding(gray_frames(2), torch.zeros(2, 4), "", seconds=[1.0]), "seconds has 1 values for 2"),
        (lambda: contact_sheet(gray_frames(2), ["a"], 1), "captions has 1 texts for 2 pictures"),
        (lambda: contact_sheet(gray_frames(1), ["a"], 0), "columns=0"),
        (lambda: show_results([gray_frames(2)], [], ["a"]), "1 videos, 0 frame_scores and 1 captions"),
        (lambda: show_results([gray_frames(2)], [torch.zeros(3)], ["a"]), r"frame_scores\[0\] has shape \(3,\)"),
        (lambda: save_animation("layers.webm", gray_frames(2)), "layers.webm should end in .gif or .mp4"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Sheets and files ------------------------------------------------------------------------------------------------


def test_a_sheet_has_its_pictures_in_rows_with_captions_of_any_length():
    pictures = np.stack([np.full((20, 40, 3), value, dtype=np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(contact_sheet(pictures, ["", "a caption that needs several lines", "b"], columns=2))
    for value in (10, 20, 30):
        assert (sheet == value).all(axis=-1).sum() >= 800
    first, second, third = (np.argwhere((sheet == value).all(axis=-1))[0] for value in (10, 20, 30))
    assert first[0] == second[0] < third[0]
    assert first[1] == third[1] < second[1]


def test_sheets_with_as_many_lines_of_text_have_one_size():
    sheets = [contact_sheet(gray_frames(1), [caption], 1) for caption in ("x", "gpq,", "Áj")]
    assert len({sheet.size for sheet in sheets}) == 1
    assert contact_sheet(gray_frames(1), [""], 1).height < sheets[0].height


def test_results_show_the_best_frames_in_their_order():
    frames = np.stack([np.full((20, 20, 3), value, dtype=np.uint8) for value in (10, 20, 30, 40)])
    scores = torch.tensor([0.9, 0.1, 0.2, 0.8])
    sheet = np.asarray(show_results([frames, frames[:1]], [scores, scores[:1]], ["1.", "2."], num_frames=2))
    counts = {value: int((sheet == value).all(axis=-1).sum()) for value in (10, 20, 30, 40)}
    assert counts[10] >= 800  # in both results
    assert counts[40] >= 400
    assert counts[20] == counts[30] == 0
    assert np.argwhere(sheet == 10)[:, 1].min() < np.argwhere(sheet == 40)[:, 1].min()


@pytest.mark.parametrize("size", [32, 33])
def test_an_animation_holds_every_picture(tmp_path, size):
    pictures = np.stack([np.full((size, size, 3), value, dtype=np.uint8) for value in (10, 120, 240)])
    save_animation(tmp_path / "layers.gif", pictures, fps=2)
    with Image.open(tmp_path / "layers.gif") as gif:
        assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (3, 500, 0)
        assert gif.size == (size, size)
    save_animation(tmp_path / "layers.mp4", pictures, fps=2)
    with av.open(str(tmp_path / "layers.mp4")) as video:
        assert video.streams.video[0].average_rate == 2
        means = [frame.to_ndarray(format="rgb24").mean() for frame in video.decode(video=0)]
    np.testing.assert_allclose(means, [10, 120, 240], atol=6)
