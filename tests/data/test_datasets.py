import logging
import os
from collections import Counter
from functools import partial
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import BertTokenizer
from video_files import write_video

from transformers_testa.data.annotations import build_table
from transformers_testa.data.datasets import (
    BrokenVideos,
    EpochBatchSampler,
    VideoTextDataset,
    cache_frames,
    collate_texts,
    collate_training_samples,
    collate_videos,
    distinct_videos,
    distractor_rows,
)
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


@pytest.fixture
def processor():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    return TestaProcessor(TestaVideoProcessor(size={"height": 16, "width": 16}, num_frames=4), tokenizer)


@pytest.fixture
def table(tmp_path):
    """Three rows of two videos, whose distractor is the other one."""
    write_video(tmp_path / "a.mp4", 12)
    write_video(tmp_path / "b.mp4", 30)
    rows = [
        {"video": "a.mp4", "video_id": "a", "text": "a dog runs", "distractor": "b"},
        {"video": "b.mp4", "video_id": "b", "text": "a dog", "distractor": "a", "start": 0.2, "end": 0.8},
        {"video": "a.mp4", "video_id": "a", "text": "dog", "distractor": "b"},
    ]
    return build_table(list(enumerate(rows)), tmp_path / "train.jsonl", tmp_path)


def test_an_item_holds_the_frames_of_its_clip(table, processor):
    dataset = VideoTextDataset(table, processor.video_processor)
    item = dataset[1]
    expected = processor.video_processor.decode(table[1]["video"], start=0.2, end=0.8)
    assert torch.equal(item["frames"], expected) and item["text"] == "a dog"
    assert [dataset[number]["pair_id"] for number in range(3)] == [0, 1, 0]


def test_a_seed_chooses_the_frames_of_random_sampling(table, processor):
    processor.video_processor.frame_sampling = "random"
    dataset = VideoTextDataset(table, processor.video_processor)
    draws = [dataset[1, seed]["frames"] for seed in range(8)]
    assert torch.equal(draws[0], dataset[1, 0]["frames"])
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])


def test_training_batches_are_normalised_tokenized_and_know_their_videos(table, processor):
    dataset = VideoTextDataset(table, processor.video_processor)
    batch = collate_training_samples([dataset[0, 5], dataset[1, 6], dataset[2, 7]], processor, max_words=4)
    plain = processor(videos=[table[0]["video"]], text=["a dog runs"], return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values_videos"][:1], plain["pixel_values_videos"])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3], [2, 5, 6, 3], [2, 6, 3, 0]]
    assert batch["attention_mask"].tolist()[2] == [1, 1, 1, 0]
    assert batch["pair_ids"].tolist() == [0, 1, 0] and batch["broken_videos"] == []


def test_a_broken_video_makes_the_batch_smaller_and_is_reported_once(table, processor, tmp_path, caplog):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    collate = partial(collate_training_samples, processor=processor, max_words=8)
    loader = DataLoader(VideoTextDataset(table, processor.video_processor), batch_size=3, collate_fn=collate)
    broken = BrokenVideos()
    with caplog.at_level(logging.WARNING):
        (batch,) = broken.filter(loader)
        list(broken.filter(loader))
    assert batch["pair_ids"].tolist() == [1] and len(batch["input_ids"]) == len(batch["pixel_values_videos"]) == 1
    assert list(broken) == [str(tmp_path / "a.mp4")]
    assert caplog.text.count("is left out") == 1 and "a.mp4" in caplog.text


def test_a_batch_of_broken_videos_only_is_left_out(table, processor, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    dataset = VideoTextDataset(table, processor.video_processor)
    for batch in (collate_training_samples([dataset[0]], processor, 8), collate_videos([dataset[0]], processor)):
        assert list(BrokenVideos().filter([batch])) == []


def test_evaluation_sees_each_video_once_and_every_text(table, processor):
    dataset = VideoTextDataset(distinct_videos(table), processor.video_processor)
    batch = collate_videos([dataset[number] for number in range(len(dataset))], processor)
    assert batch["video_id"] == ["a", "b"] and batch["pixel_values_videos"].shape == (2, 4, 3, 16, 16)
    texts = collate_texts([{**row, "index": number} for number, row in enumerate(table)], processor, 8)
    assert texts["video_id"] == ["a", "b", "a"] and texts["distractor"] == ["b", "a", "b"]
    assert texts["index"] == [0, 1, 2] and len(texts["input_ids"]) == 3


@pytest.mark.parametrize("num_proc", [None, 2])
def test_cached_frames_are_the_decoded_ones(table, processor, tmp_path, num_proc):
    frames = cache_frames(table, processor.video_processor, tmp_path / "cache", num_proc)
    assert len(frames) == 2 and frames.cache_files
    decoded, cached = (VideoTextDataset(table, processor.video_processor, found) for found in (None, frames))
    assert all(torch.equal(decoded[number]["frames"], cached[number]["frames"]) for number in range(3))


def test_the_cache_is_found_again_until_a_video_or_a_setting_changes(table, processor, tmp_path):
    def files():
        cache_frames(table, processor.video_processor, tmp_path / "cache")
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*.arrow")}

    first = files()
    assert len(first) == 1 and files() == first
    processor.video_processor.num_frames = 3
    assert len(files()) == 2
    os.utime(tmp_path / "a.mp4")
    assert len(files()) == 3


def test_the_cache_remembers_broken_videos(table, processor, tmp_path):
    (tmp_path / "b.mp4").write_bytes(b"no video")
    frames = cache_frames(table, processor.video_processor, tmp_path / "cache")
    item = VideoTextDataset(table, processor.video_processor, frames)[1]
    assert "b.mp4" in item["error"] and "frames" not in item


@pytest.mark.parametrize("frame_sampling", ["random", "head_tail", "jitter"])
def test_random_sampling_is_not_cached(table, processor, tmp_path, frame_sampling):
    processor.video_processor.frame_sampling = frame_sampling
    with pytest.raises(ValueError, match=f"frame_sampling='{frame_sampling}'"):
        cache_frames(table, processor.video_processor, tmp_path)


def epoch_of(sampler, epoch=0):
    first = epoch * sampler.batches_per_epoch
    return list(islice(sampler, first, first + sampler.batches_per_epoch))


@st.composite
def hard_negatives(draw):
    """Rows of which some name others, in any way."""
    num_rows = draw(st.integers(2, 40))
    row = st.integers(0, num_rows - 1)
    return [draw(st.lists(row.filter(lambda other, own=own: other != own), max_size=2)) for own in range(num_rows)]


@given(hard_negatives(), st.integers(1, 9), st.integers(0, 100))
def test_an_epoch_is_full_batches_of_different_rows(partners, batch_size, seed):
    batch_size = min(batch_size, len(partners))
    batches = epoch_of(EpochBatchSampler(len(partners), batch_size, seed, partners), epoch=2)
    assert len(batches) == len(partners) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    assert max(Counter(row for batch in batches for row, _ in batch).values()) == 1


@given(st.integers(1, 30), st.integers(0, 5), st.integers(2, 9), st.integers(0, 100))
def test_twins_share_a_batch(num_pairs, num_singles, batch_size, seed):
    num_rows = 2 * num_pairs + num_singles
    batch_size = min(batch_size, num_rows)
    partners = [[row ^ 1] if row < 2 * num_pairs else [] for row in range(num_rows)]
    batches = [
        {row for row, _ in batch} for batch in epoch_of(EpochBatchSampler(num_rows, batch_size, seed, partners))
    ]
    parted = sum(row < 2 * num_pairs and row ^ 1 not in batch for batch in batches for row in batch)
    # An odd place that no single row fills takes half a pair; for even batches that is one pair at the most.
    assert parted <= (len(batches) + 1 if batch_size % 2 else 2)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 40), st.integers(0, 100))
@settings(max_examples=50)
def test_a_sampler_goes_on_where_another_stopped(num_rows, batch_size, done, seed):
    batch_size = min(batch_size, num_rows)
    whole = list(islice(EpochBatchSampler(num_rows, batch_size, seed), done + 10))
    resumed = EpochBatchSampler(num_rows, batch_size, seed)
    resumed.first_batch = done
    assert list(islice(resumed, 10)) == whole[done:]


def test_epochs_and_seeds_differ():
    sampler = EpochBatchSampler(20, 4, seed=1)
    assert epoch_of(sampler, 0) != epoch_of(sampler, 1) != epoch_of(EpochBatchSampler(20, 4, seed=2), 1)


def test_a_row_is_paired_with_any_row_of_the_video_it_names(table):
    assert distractor_rows(table) == [[1], [0, 2], [1]]
    with pytest.raises(ValueError, match="column `distractor`"):
        distractor_rows(table.remove_columns("distractor"))


def test_too_few_rows_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="has 3 rows and a batch 4; lower per_device_train_batch_size"):
        EpochBatchSampler(3, 4)


def test_the_digest_changes_with_the_texts_and_not_with_the_folder(table, processor):
    digest = VideoTextDataset(table, processor.video_processor).digest()
    moved = table.map(lambda row: {"video": "/elsewhere/" + row["video"]})
    retold = table.map(lambda row: {"text": row["text"] + " away"})
    assert VideoTextDataset(moved, processor.video_processor).digest() == digest
    assert VideoTextDataset(retold, processor.video_processor).digest() != digest
