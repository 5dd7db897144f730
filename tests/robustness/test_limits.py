"""The smallest and the largest that a user may give: it works, or the error says what would."""

import av
import numpy as np
import pytest
import torch
from retrieval_world import tiny_config, tiny_processor
from video_files import write_video

from transformers_testa import TestaForRetrieval


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = tiny_config()
    config.text_config.max_position_embeddings = 512
    return TestaForRetrieval(config).eval()


@pytest.fixture(scope="module")
def processor():
    processor = tiny_processor()
    processor.tokenizer.model_max_length = 512
    return processor


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 20)


def embed(model, processor, videos, texts=("first red",), **settings):
    """Return the inputs that the processor makes, and the embeddings, once they are finite and of length 1."""
    inputs = processor(videos=videos, text=list(texts), padding=True, return_tensors="pt", **settings)
    with torch.no_grad():
        output = model(**inputs)
    for embeddings, number in ((output.video_embeds, len(videos)), (output.text_embeds, len(texts))):
        torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(number))
    return inputs, output


# --- Videos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 2, 20, 1024])
def test_a_video_of_any_number_of_frames_is_seen_in_any_number(model, processor, tmp_path, video, num_frames):
    for file in (video, write_video(tmp_path / "one.mp4", 1)):
        inputs, _ = embed(model, processor, [file], num_frames=num_frames)
        assert inputs["pixel_values_videos"].shape == (1, num_frames, 3, 32, 32)


def test_an_array_of_1024_frames_is_seen_whole(model, processor):
    frames = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8)
    inputs, _ = embed(model, processor, [frames], do_sample_frames=False)
    assert inputs["pixel_values_videos"].shape[1] == 1024


def test_frames_of_one_pixel_are_enlarged(model, processor, tmp_path):
    file = write_video(tmp_path / "pixel.avi", 3, codec="png", pix_fmt="rgb24", height=1, width=1)
    for video in (file, np.full((3, 1, 1, 3), 200, np.uint8)):
        inputs, _ = embed(model, processor, [video])
        frames = inputs["pixel_values_videos"]
        assert torch.equal(frames, frames[..., :1, :1].expand_as(frames))


def test_frames_of_8k_are_decoded_within_the_usual_limits(model, processor, tmp_path):
    with av.open(str(tmp_path / "8k.mov"), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 7680, 4320, "yuvj420p"
        frame = av.VideoFrame(7680, 4320, "yuvj420p")
        for plane, value in zip(frame.planes, (200, 128, 128), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert processor.video_processor.decode(tmp_path / "8k.mov").float().mean() == pytest.approx(200, abs=2)
    embed(model, processor, [tmp_path / "8k.mov"])


# --- Texts -------------------------------------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "spaces": " \n\t",
    "zero": "\0",
    "emoji": "👩‍👩‍👧‍👦 🐕🎬",
    "hebrew": "כלב אדום רץ",
    "arabic": "كلب أحمر يجري",
    "marks": "e\u0301\u202e\u200b\ufeff" * 20,
    "one_word": "x" * 10_000,
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_has_an_embedding_alone_and_beside_others(model, processor, video, name):
    _, alone = embed(model, processor, [video], [TEXTS[name]])
    _, beside = embed(model, processor, [video], ["first red then blue finally green", TEXTS[name]])
    torch.testing.assert_close(beside.text_embeds[1:], alone.text_embeds, atol=1e-5, rtol=0)


def test_a_text_of_512_tokens_is_read_whole_and_a_longer_one_is_cut_there(model, processor, video):
    inputs, whole = embed(model, processor, [video], ["first " * 509 + "red"])
    assert inputs["input_ids"].shape == (1, 512)
    inputs, longer = embed(model, processor, [video], ["first " * 509 + "red" + " blue" * 1000])
    assert inputs["input_ids"].shape == (1, 512)
    assert torch.equal(longer.text_embeds, whole.text_embeds)


def test_lone_surrogates_are_refused(processor):
    with pytest.raises((UnicodeEncodeError, TypeError)):
        processor(text=["\ud800"], return_tensors="pt")


# --- Batches -----------------------------------------------------------------------------------------------------------


def test_nothing_is_no_batch(processor):
    with pytest.raises(ValueError, match="Give paths, URLs, bytes"):
        processor(videos=[], text=[], return_tensors="pt")


def test_a_batch_of_one_has_a_loss_for_all_models_that_compare(processor, video):
    torch.manual_seed(0)
    model = TestaForRetrieval(tiny_config())
    inputs = processor(videos=[video], text=["first red"], return_tensors="pt")
    loss = model(**inputs, return_loss=True).loss
    assert loss.isfinite()
