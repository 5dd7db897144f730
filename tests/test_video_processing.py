import functools
import http.server
import itertools
import json
import threading
import unittest

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoVideoProcessor
from transformers.image_utils import PILImageResampling
from transformers_common_tests import load
from video_files import frame_number, numbered_frame, plain_decode, write_audio, write_video

from transformers_testa.video_decoding_testa import (
    FRAME_SAMPLING,
    PacketIndex,
    VideoDecodingError,
    VideoReader,
    sample_frame_indices,
)
from transformers_testa.video_processing_testa import TestaVideoProcessor, available_threads


load()
from transformers_common_tests_src.test_video_processing_common import (  # noqa: E402
    VideoProcessingTestMixin,
    prepare_video_inputs,
)


SIZE = 48
NUM_FRAMES = 60
RANDOM_SAMPLING = ("random", "head_tail", "jitter")
SHORT_GOP = {"g": "12", "bf": "3"}
UNEVEN_TIMES = np.cumsum(np.random.default_rng(0).integers(10, 200, NUM_FRAMES)) / 1000

CLIPS = {
    "h264_b_frames_long_gop.mp4": {"codec_options": {"g": "250", "bf": "3"}},
    "h264_open_gop.mp4": {"codec_options": {**SHORT_GOP, "x264-params": "open-gop=1"}},
    "h264_two_frame_gop.mp4": {"codec_options": {"g": "2"}},
    "h264_intra_refresh.mp4": {"codec_options": {"g": "30", "x264-params": "intra-refresh=1"}},
    "hevc_open_gop.mp4": {
        "codec": "libx265",
        "codec_options": {"x265-params": "keyint=12:open-gop=1:log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "codec_options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "codec_options": {"g": "12", "bf": "2"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "codec_options": {"g": "12", "bf": "2"}},
    "no_frame_count.mkv": {"codec_options": SHORT_GOP},
    "fragmented.mp4": {"codec_options": SHORT_GOP, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "variable_frame_rate.mp4": {"codec_options": SHORT_GOP, "frame_times": UNEVEN_TIMES},
    "variable_frame_rate.mkv": {"codec_options": SHORT_GOP, "frame_times": UNEVEN_TIMES},
    "odd_size.mp4": {"codec_options": SHORT_GOP, "height": 65, "width": 97, "pix_fmt": "yuv444p"},
    "starts_late.ts": {"codec_options": SHORT_GOP, "frame_times": 5 + np.arange(NUM_FRAMES) / 25},
    "starts_late.mp4": {"codec_options": SHORT_GOP, "frame_times": 5 + np.arange(NUM_FRAMES) / 25},
    "h264_open_gop.ts": {"codec_options": {**SHORT_GOP, "x264-params": "open-gop=1"}},
    "h264_b_frames.avi": {"codec_options": SHORT_GOP},
    "only_key_frames.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "without_timestamps.h264": {"codec_options": SHORT_GOP},
}
NOT_DECODED_BY_SEEKING = ("h264_intra_refresh.mp4", "h264_b_frames.avi", "mpeg2.mpg", "without_timestamps.h264")
DECODED_BY_SEEKING = [name for name in CLIPS if name not in NOT_DECODED_BY_SEEKING]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a function from a name in CLIPS to the path of that clip and its plainly decoded frames."""
    folder = tmp_path_factory.mktemp("clips")

    @functools.cache
    def make(name):
        path = write_video(folder / name, NUM_FRAMES, **CLIPS[name])
        return path, plain_decode(path, SIZE, SIZE)

    return make


@pytest.fixture(scope="module")
def video(clip):
    return clip("h264_open_gop.mp4")[0]


@pytest.fixture(scope="module")
def processor():
    return TestaVideoProcessor(size={"height": SIZE, "width": SIZE}, num_frames=8)


def numbers(frames):
    return [frame_number(frame) for frame in frames.permute(0, 2, 3, 1).numpy()]


def indices(processor, video, **kwargs):
    (metadata,) = processor(video, return_metadata=True, **kwargs)["video_metadata"]
    return metadata.frames_indices


# Decoding


@pytest.mark.parametrize("name", CLIPS)
@settings(max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_frames=st.integers(1, NUM_FRAMES + 5), seed=st.integers(0, 1000), threads=st.integers(1, 5))
def test_frame_n_is_the_nth_frame_of_a_plain_decode(clip, processor, name, num_frames, seed, threads):
    path, expected = clip(name)
    assert len(expected) == NUM_FRAMES
    sampling = {"num_frames": num_frames, "frame_sampling": "random", "seed": seed}
    frames = processor.decode(path, decoding_threads=threads, **sampling).permute(0, 2, 3, 1).numpy()
    chosen = indices(processor, path, **sampling)
    assert len(chosen) == num_frames
    for frame, number in zip(frames, chosen, strict=True):
        np.testing.assert_array_equal(frame, expected[number])


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_of_a_file_is_found(clip, processor, name):
    path, _ = clip(name)
    assert numbers(processor.decode(path, do_sample_frames=False)) == list(range(NUM_FRAMES))


@pytest.mark.parametrize("name", DECODED_BY_SEEKING)
def test_one_frame_is_found_without_decoding_the_whole_file(clip, processor, name, monkeypatch):
    path, _ = clip(name)
    monkeypatch.delattr(VideoReader, "_read_sequentially")
    assert numbers(processor.decode(path, num_frames=1, start=processor_time(path, processor, 50))) == [50]


def processor_time(path, processor, number):
    (metadata,) = processor(path, do_sample_frames=False, return_metadata=True)["video_metadata"]
    return metadata.timestamps[number]


@st.composite
def key_frames_and_wanted(draw):
    keys = sorted({0, *draw(st.sets(st.integers(1, NUM_FRAMES - 1)))})
    wanted = sorted(draw(st.sets(st.integers(0, NUM_FRAMES - 1), min_size=1)))
    return np.array(keys), np.array(wanted)


def packet_index(keys):
    key_of_frame = keys[np.searchsorted(keys, np.arange(NUM_FRAMES), side="right") - 1]
    return PacketIndex(np.arange(NUM_FRAMES), key_of_frame, np.ones(NUM_FRAMES), key_of_frame, is_reordered=True)


@given(key_frames_and_wanted(), st.integers(1, 8))
def test_no_frame_is_decoded_twice_or_without_need(keys_and_wanted, threads):
    keys, wanted = keys_and_wanted
    runs = packet_index(keys).runs(wanted, threads)
    assert [frame for run in runs for frame in run.pts if frame in run.wanted] == wanted.tolist()
    decoded = [frame for run in runs for frame in run.pts]
    assert len(decoded) == len(set(decoded))
    for frame in decoded:
        next_wanted = wanted[np.searchsorted(wanted, frame)]
        assert not ((keys > frame) & (keys <= next_wanted)).any()


@pytest.mark.parametrize(
    ("wanted", "threads", "expected"),
    [
        ([7, 8, 9], 1, [[5, 6, 7, 8, 9]]),
        ([4, 5], 1, [[0, 1, 2, 3, 4, 5]]),
        ([3, 6], 1, [[0, 1, 2, 3], [5, 6]]),
        (list(range(20)), 1, [list(range(20))]),
        (list(range(20)), 2, [list(range(10)), list(range(10, 20))]),
        (list(range(20)), 4, [list(range(start, start + 5)) for start in (0, 5, 10, 15)]),
    ],
)
def test_a_decoder_seeks_to_leave_frames_out_or_to_share_the_work(wanted, threads, expected):
    runs = packet_index(np.arange(0, NUM_FRAMES, 5)).runs(np.array(wanted), threads)
    assert [run.pts for run in runs] == expected


class ThreadsOfWorker(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        return available_threads()


def test_a_worker_of_a_data_loader_decodes_in_one_thread():
    assert next(iter(torch.utils.data.DataLoader(ThreadsOfWorker(), num_workers=1))).item() == 1


@pytest.mark.parametrize("resample", [PILImageResampling.BICUBIC, PILImageResampling.BILINEAR])
def test_files_and_arrays_are_scaled_alike_but_for_a_few_levels(tmp_path, resample):
    """By FFmpeg and by torchvision, here from 4 to 1: pictures with hard edges in full colours, the worst case."""
    path = write_video(tmp_path / "large.mp4", 4, height=256, width=256, codec_options={"crf": "10"})
    processor = TestaVideoProcessor(size={"height": 64, "width": 64}, resample=resample, num_frames=4)
    of_file = processor.decode(path).float()
    of_array = processor.decode(processor.decode(path, do_resize=False)).float()
    difference = (of_file - of_array).abs()
    assert difference.mean() < 3 and difference.quantile(0.9) < 10


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_in_the_metadata_is_applied_before_scaling(tmp_path, processor, rotation):
    path = write_video(tmp_path / "phone.mp4", 5, height=48, width=96, rotation=rotation)
    frames = processor.decode(path, do_sample_frames=False, do_resize=False).permute(0, 2, 3, 1).numpy()
    expected = [np.rot90(frame, rotation // 90) for frame in plain_decode(path)]
    np.testing.assert_array_equal(frames, expected)
    assert processor.decode(path, size={"shortest_edge": 24}).shape[-2:] == ((24, 48) if rotation == 180 else (48, 24))


def test_bytes_and_text_paths_give_the_same_frames_as_a_path(video, processor):
    expected = processor.decode(video)
    assert torch.equal(processor.decode(str(video)), expected)
    assert torch.equal(processor.decode(video.read_bytes()), expected)


@pytest.fixture
def web_folder(tmp_path):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_url_gives_the_same_frames_as_the_file(web_folder, video, processor):
    folder, url = web_folder
    (folder / "video.mp4").write_bytes(video.read_bytes())
    assert torch.equal(processor.decode(f"{url}/video.mp4"), processor.decode(video))
    with pytest.raises(VideoDecodingError, match=r"missing\.mp4.*404"):
        processor.decode(f"{url}/missing.mp4")


def test_a_batch_equals_its_videos_one_by_one(clip, processor):
    paths = [clip(name)[0] for name in ("h264_open_gop.mp4", "vp9.webm", "mpeg4.avi", "variable_frame_rate.mkv")]
    batch = processor(paths, return_tensors="pt")["pixel_values_videos"]
    assert batch.shape == (4, 8, 3, SIZE, SIZE)
    for path, row in zip(paths, batch, strict=True):
        assert torch.equal(processor(path, return_tensors="pt")["pixel_values_videos"][0], row)


def test_files_arrays_and_tensors_may_share_a_batch(video, processor):
    frames = processor.decode(video, do_sample_frames=False)
    array = frames.permute(0, 2, 3, 1).numpy()
    rows = processor([video, frames, array, list(array)], return_tensors="pt")["pixel_values_videos"]
    assert all(torch.equal(row, rows[0]) for row in rows)


def test_decoded_frames_can_be_stored_and_finished_later(video, processor):
    frames = processor.decode(video)
    assert (frames.dtype, frames.shape, frames.is_contiguous()) == (torch.uint8, (8, 3, SIZE, SIZE), True)
    finished = processor([frames], do_sample_frames=False, do_resize=False, return_tensors="pt")
    assert torch.equal(finished["pixel_values_videos"], processor(video, return_tensors="pt")["pixel_values_videos"])


def test_pixels_are_rescaled_and_normalised_with_the_statistics_of_clip(processor):
    white = np.full((8, SIZE, SIZE, 3), 255, np.uint8)
    pixels = processor(white, return_tensors="pt")["pixel_values_videos"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(pixels[0, 0, :, 0, 0], (1 - mean) / std)


def test_the_aspect_ratio_can_be_kept_and_the_centre_cropped(video, processor):
    kept = processor.decode(video, size={"shortest_edge": 32})
    assert kept.shape[-2:] == (32, 48)
    cropped = processor.decode(video, size={"shortest_edge": 32}, do_center_crop=True, crop_size=32)
    assert torch.equal(cropped, kept[..., 8:40])


# Which frames


@given(st.integers(1, 500), st.integers(1, 64), st.sampled_from(FRAME_SAMPLING), st.integers(0, 9))
def test_sampled_indices_are_sorted_valid_and_repeatable(total_frames, num_frames, frame_sampling, seed):
    chosen = sample_frame_indices(total_frames, num_frames, frame_sampling, seed)
    assert chosen.shape == (num_frames,)
    assert (np.diff(chosen) >= 0).all() and chosen[0] >= 0 and chosen[-1] < total_frames
    np.testing.assert_array_equal(chosen, sample_frame_indices(total_frames, num_frames, frame_sampling, seed))


@given(st.integers(1, 5000), st.integers(1, 128))
def test_legacy_uniform_is_what_numpy_made_of_a_truncated_step(total_frames, num_frames):
    expected = np.arange(0, total_frames, total_frames / num_frames, dtype=int)[:num_frames]
    np.testing.assert_array_equal(sample_frame_indices(total_frames, num_frames, "legacy_uniform"), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "total_frames=0 and num_frames=4 must both be at least 1"),
        ((4, 0), "total_frames=4 and num_frames=0 must both be at least 1"),
        ((4, 4, "uniformly"), "frame_sampling='uniformly' is unknown. Use one of uniform, "),
    ],
)
def test_what_no_frames_can_be_sampled_by_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(*arguments)


def test_sampling_modes_on_known_cases():
    assert sample_frame_indices(10, 4, "uniform").tolist() == [0, 2, 5, 7]
    assert sample_frame_indices(10, 4, "middle").tolist() == [1, 3, 6, 8]
    assert sample_frame_indices(2, 4, "uniform").tolist() == [0, 0, 1, 1]
    assert sample_frame_indices(180, 96, "legacy_uniform").tolist() == list(range(96))
    assert sample_frame_indices(5, 8, "legacy_uniform").tolist() == [0] * 8


@given(st.integers(32, 500), st.integers(0, 99))
def test_random_modes_keep_their_structure(total_frames, seed):
    draw = functools.partial(sample_frame_indices, total_frames, 16, seed=seed)
    assert len(set(draw("random"))) == 16
    assert (draw("head_tail") < total_frames // 2).sum() == 8
    segments = np.arange(17) * total_frames // 16
    assert all(
        low <= index < high for index, (low, high) in zip(draw("jitter"), itertools.pairwise(segments), strict=True)
    )


@pytest.mark.parametrize("frame_sampling", RANDOM_SAMPLING)
def test_a_seed_fixes_the_frames_of_each_video(video, processor, frame_sampling):
    draw = functools.partial(indices, processor, frame_sampling=frame_sampling)
    assert draw(video, seed=1) == draw(video, seed=1) != draw(video, seed=2)
    rows = processor([video] * 3, frame_sampling=frame_sampling, seed=[1, 2, 1])["pixel_values_videos"]
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_a_clip_starts_with_the_frame_on_screen_and_ends_before_its_end(video, processor):
    assert indices(processor, video, start=0.41, end=0.60, do_sample_frames=False) == [10, 11, 12, 13, 14]
    assert indices(processor, video, start=1.0, end=1.4, num_frames=5) == [25, 27, 29, 31, 33]
    (first, second) = processor([video, video], start=[0, 1.0], end=[1.0, None], return_metadata=True)[
        "video_metadata"
    ]
    assert first.frames_indices[-1] < 25 == second.frames_indices[0]


def test_clip_seconds_count_from_the_first_frame(clip, processor):
    path, _ = clip("starts_late.ts")
    assert indices(processor, path, start=0.4, num_frames=1) == [10]


def test_fps_takes_the_frame_on_screen_at_each_tick(clip, processor):
    path, _ = clip("variable_frame_rate.mp4")
    (metadata,) = processor(path, fps=4, return_metadata=True)["video_metadata"]
    times = UNEVEN_TIMES - UNEVEN_TIMES[0]
    ticks = np.arange(int(metadata.duration * 4)) / 4
    assert metadata.frames_indices == [int(np.flatnonzero(times <= tick + 1e-6)[-1]) for tick in ticks]
    np.testing.assert_allclose(metadata.timestamps, times[metadata.frames_indices], atol=1e-6)


def test_metadata_describes_the_file(video, processor):
    (metadata,) = processor(video, return_metadata=True)["video_metadata"]
    assert (metadata.total_num_frames, metadata.duration, metadata.fps) == (60, pytest.approx(2.4), pytest.approx(25))
    np.testing.assert_allclose(metadata.timestamps, np.array(metadata.frames_indices) / 25)


def test_clips_of_arrays_need_their_frame_rate(processor):
    frames = np.stack([numbered_frame(number) for number in range(20)])
    metadata = [{"total_num_frames": 20, "fps": 10}]
    assert indices(processor, frames, start=1.0, num_frames=2, video_metadata=metadata) == [10, 15]
    with pytest.raises(ValueError, match=r"start=1.0 needs the frame rate of video 0"):
        processor(frames, start=1.0)


def test_settings_are_saved_and_can_be_overridden(tmp_path, video):
    TestaVideoProcessor(num_frames=4, frame_sampling="middle", size={"height": 16, "width": 16}).save_pretrained(
        tmp_path
    )
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert (saved["num_frames"], saved["frame_sampling"]) == (4, "middle")
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert loaded(video, return_tensors="pt")["pixel_values_videos"].shape == (1, 4, 3, 16, 16)
    assert indices(loaded, video) == [7, 22, 37, 52]
    assert indices(loaded, video, num_frames=2, frame_sampling="uniform") == [0, 30]


# Errors


def test_a_video_with_too_few_frames_repeats_them_unless_strict(tmp_path, processor):
    path = write_video(tmp_path / "one.mp4", 1)
    assert indices(processor, path) == [0] * 8
    with pytest.raises(VideoDecodingError, match=r"one\.mp4 has 1 frames.*num_frames=8"):
        processor(path, strict=True)


def test_a_file_that_is_no_video_is_named(tmp_path, processor):
    (tmp_path / "text.mp4").write_text("This is a letter, not a video.\n" * 100)
    (tmp_path / "empty.mp4").touch()
    write_audio(tmp_path / "audio.mp4")
    for name in ("text.mp4", "empty.mp4", "audio.mp4", "missing.mp4", "."):
        with pytest.raises(VideoDecodingError) as caught:
            processor(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(VideoDecodingError, match="the video of 12 bytes"):
        processor(b"not a video!")


@pytest.mark.parametrize("flags", [{}, {"movflags": "faststart"}], ids=["index_lost", "index_kept"])
def test_a_truncated_mp4_is_named(tmp_path, processor, flags):
    path = write_video(tmp_path / "cut.mp4", 60, codec_options=SHORT_GOP, container_options=flags)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoDecodingError, match=r"cut\.mp4"):
        processor(path)


def test_a_file_with_fewer_frames_than_promised_is_sampled_from_what_it_holds(tmp_path, processor):
    path = write_video(tmp_path / "promises.avi", 30, codec="mpeg4", codec_options={"g": "12"})
    data = bytearray(path.read_bytes())
    stream_header = data.index(b"strh") + 8
    data[stream_header + 32 : stream_header + 36] = (444).to_bytes(4, "little")
    path.write_bytes(data)
    assert numbers(processor.decode(path, num_frames=4, frame_sampling="middle")) == [3, 11, 18, 26]


def test_damaged_packets_do_not_hide_the_frames_after_them(tmp_path, processor):
    path = write_video(tmp_path / "damaged.avi", 30, codec="png", pix_fmt="rgb24")
    data = bytearray(path.read_bytes())
    pictures = [start for start in range(len(data)) if data.startswith(b"\x89PNG", start)]
    data[pictures[10] + 16 : pictures[10] + 24] = bytes(8)  # width and height
    path.write_bytes(data)
    assert numbers(processor.decode(path, do_sample_frames=False)) == [*range(10), *range(11, 30)]


def test_playlists_do_not_open_other_files(tmp_path, video, processor):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {video}\n")
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{video}\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(VideoDecodingError, match=name):
            processor(tmp_path / name)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_frame": 4}, "num_frame: no such argument"),
        ({"frame_sampling": "uniformly"}, "frame_sampling='uniformly' is unknown.*head_tail"),
        ({"num_frames": 4, "fps": 2}, "num_frames=4 and fps=2 exclude each other"),
        ({"fps": 2, "frame_sampling": "random"}, "frame_sampling='random'.*fps=2"),
        ({"num_frames": 0}, "num_frames=0 must be positive"),
        ({"start": -1}, "start=-1 must be at least 0"),
        ({"start": 2, "end": 1}, "end=1 must be later than start=2"),
        ({"start": [0, 1]}, "start lists 2 values for 1 videos"),
        ({"start": 100}, "lasts 2.40 seconds, so no clip can start at start=100"),
        ({"resample": PILImageResampling.HAMMING}, "resample=.* is not available for video files. Use BICUBIC"),
        ({"decoding_time_limit": 0}, "decoding_time_limit=0 must be positive"),
        ({"decoding_memory_limit": -1}, "decoding_memory_limit=-1 must be positive"),
    ],
)
def test_a_wrong_argument_is_named(video, processor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(video, **kwargs)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8), (4, 8, 8, 2), (4, 5, 8, 8), (1, 1, 4, 3, 8, 8)])
def test_arrays_of_the_wrong_rank_or_channel_count_are_refused(processor, shape):
    with pytest.raises(ValueError, match=r"shape \(.*Give frames \[T, H, W, C\]"):
        processor(np.zeros(shape, np.uint8))


def test_nothing_is_no_video(processor):
    for nothing in ([], None, [[]]):
        with pytest.raises(ValueError, match="is no video"):
            processor(nothing)


# The library's own tests


class VideoProcessorTester:
    batch_size, num_frames, num_channels = 3, 4, 3

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return prepare_video_inputs(
            self.batch_size, self.num_frames, self.num_channels, 30, 80, equal_resolution, return_tensors
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, 18, 18


class CommonVideoProcessingTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = TestaVideoProcessor
    video_processor_dict = {
        "size": {"shortest_edge": 20},
        "default_to_square": False,
        "do_center_crop": True,
        "crop_size": {"height": 18, "width": 18},
        "do_sample_frames": False,
        # The library refuses to sample more frames than there are; here that is the strict mode.
        "strict": True,
    }

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessorTester()

    # The library tests two ways of validating arguments that neither its base class nor ours uses.
    test_video_processor_preprocess_arguments = None
    # It skips itself where sizes are SizeDict, as in every video processor of this version.
    test_override_instance_attributes_does_not_affect_other_instances = None
