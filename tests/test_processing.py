import unittest

import pytest
import torch
from transformers import AutoProcessor, BertTokenizer
from transformers_common_tests import load
from video_files import write_video

from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_decoding_testa import VideoDecodingError
from transformers_testa.video_processing_testa import TestaVideoProcessor


load()
from transformers_common_tests_src.test_processing_common import ProcessorTesterMixin  # noqa: E402


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "##ning", "lower", "new", "##er", "older"]


def tokenizer(**kwargs):
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=20, **kwargs)


@pytest.fixture
def processor():
    return TestaProcessor(TestaVideoProcessor(size={"height": 16, "width": 16}, num_frames=4), tokenizer())


@pytest.fixture
def videos(tmp_path):
    return [write_video(tmp_path / f"{number}.mp4", 10 + number) for number in range(2)]


def test_videos_and_text_become_model_inputs(processor, videos):
    inputs = processor(videos=videos, text=["a dog runs", "a"], padding=True, return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names) == {"pixel_values_videos", "input_ids", "attention_mask"}
    assert (inputs.pixel_values_videos.shape, inputs.pixel_values_videos.dtype) == ((2, 4, 3, 16, 16), torch.float32)
    assert inputs.input_ids.tolist() == [[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]]
    assert inputs.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


def test_each_part_works_alone(processor, videos):
    assert set(processor(videos=videos[0], return_tensors="pt")) == {"pixel_values_videos"}
    assert set(processor(text="a dog", return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_long_text_is_truncated_to_what_the_model_takes(processor):
    assert len(processor(text="dog " * 100).input_ids) == 20
    assert len(processor(text="dog " * 100, max_length=8).input_ids) == 8
    assert len(processor(text="dog " * 100, truncation=False).input_ids) == 102


def test_tokens_are_decoded_to_text(processor):
    inputs = processor(text=["a dog runs", "a newer dog"], padding=True)
    assert processor.batch_decode(inputs.input_ids, skip_special_tokens=True) == ["a dog runs", "a newer dog"]
    assert processor.decode(inputs.input_ids[0], skip_special_tokens=True) == "a dog runs"


def test_video_arguments_reach_the_video_processor(processor, videos):
    inputs = processor(
        videos=videos, text=["a", "a"], num_frames=2, start=[0.0, 0.2], return_metadata=True, return_tensors="pt"
    )
    assert [metadata.frames_indices for metadata in inputs["video_metadata"]] == [[0, 5], [5, 8]]


def test_an_unknown_argument_is_named(processor, videos):
    with pytest.raises(ValueError, match="num_frame: no such argument of TestaProcessor"):
        processor(videos=videos, num_frame=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_frame'"):
        processor(videos=videos, videos_kwargs={"num_frame": 2})


def test_a_broken_video_in_a_batch_is_named(processor, videos):
    videos[1].write_text("not a video")
    with pytest.raises(VideoDecodingError, match=r"1\.mp4"):
        processor(videos=videos, text=["a", "a"])


def test_a_saved_processor_gives_the_same_inputs(tmp_path, processor, videos):
    processor.save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, TestaProcessor)
    expected = processor(videos=videos, text=["a dog", "a"], padding=True, return_tensors="pt")
    actual = loaded(videos=videos, text=["a dog", "a"], padding=True, return_tensors="pt")
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


class CommonProcessingTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TestaProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tokenizer()

    @classmethod
    def _setup_video_processor(cls):
        return TestaVideoProcessor(size={"height": 16, "width": 16})
