import itertools
import logging
import os
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizer
from video_files import numbered_frame, write_video

from transformers_testa.data.annotations import build_table
from transformers_testa.data.augmentation import VideoAugmentation
from transformers_testa.data.datasets import (
    BrokenVideos,
    VideoQuestionsDataset,
    VideoTextDataset,
    cache_frames,
    cache_videos,
    check_answers,
    collate_choice_samples,
    collate_choices,
    collate_question_samples,
    collate_questions,
    collate_texts,
    collate_training_samples,
    collate_videos,
    distinct_videos,
)
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.video_processing_testa import TestaVideoProcessor


@pytest.fixture
def processor():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs", "?", "what"]
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


@pytest.fixture
def questions(table):
    """Three questions about two videos, with one, two and one answers."""
    columns = {
        "question_id": ["q0", "q1", "q2"],
        "question": ["what runs?", "what", "what is what"],
        "answers": [["a dog"], ["dog", "a dog runs"], ["what"]],
        "answer_weights": [[0.2], [0.4, 0.6], [1.0]],
    }
    return Dataset.from_dict({"video": table["video"], "video_id": table["video_id"], **columns})


@pytest.fixture
def choices(questions):
    return (
        questions.select_columns(["video", "video_id", "question_id", "question"])
        .add_column("choices", [["a dog", "runs"], ["dog", "what"], ["a", "dog"]])
        .add_column("label", [0, 1, 1])
    )


def test_an_item_holds_the_frames_of_its_clip(table, processor):
    dataset = VideoTextDataset(table, processor.video_processor)
    item = dataset[1]
    expected = processor.video_processor.decode(table[1]["video"], start=0.2, end=0.8)
    assert torch.equal(item["frames"], expected) and item["text"] == "a dog"
    assert [dataset[number]["pair_id"] for number in range(3)] == [0, 1, 0]
    assert [dataset[number]["index"] for number in range(3)] == [0, 1, 2]


def test_a_seed_chooses_the_frames_of_random_sampling(table, processor):
    processor.video_processor.frame_sampling = "random"
    dataset = VideoTextDataset(table, processor.video_processor)
    draws = [dataset[1, seed]["frames"] for seed in range(8)]
    assert torch.equal(draws[0], dataset[1, 0]["frames"])
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])


def test_augmentation_changes_frames_by_the_seed_cached_or_not(table, processor, tmp_path):
    augmentation = VideoAugmentation(12)
    expected = augmentation(processor.video_processor.decode(table[0]["video"]), 5)
    for cache in (None, cache_frames, cache_videos):
        frames = cache and cache(table, processor.video_processor, tmp_path / "cache")
        dataset = VideoTextDataset(table, processor.video_processor, frames, augmentation)
        assert torch.equal(dataset[0, 5]["frames"], expected)
        with pytest.raises(ValueError, match="Row 0 is asked for without a seed"):
            dataset[0]


def rows_of_images(*files):
    rows = [{"video": file, "video_id": file, "text": "a dog"} for file in files]
    return Dataset.from_list([{**row, "video": str(row["video"]), "video_id": str(row["video_id"])} for row in rows])


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".bmp"])
def test_an_image_is_a_video_that_stands_still(processor, tmp_path, suffix):
    picture = numbered_frame(5, 32, 48)
    Image.fromarray(picture).save(tmp_path / f"picture{suffix}")
    item = VideoTextDataset(rows_of_images(tmp_path / f"picture{suffix}"), processor.video_processor)[0]
    expected = processor.video_processor.decode(picture[None])
    assert item["frames"].shape == expected.shape == (4, 3, 16, 16) and item["frames"].dtype == torch.uint8
    assert (item["frames"] == item["frames"][0]).all()
    # JPEG and WebP are lossy.
    assert (item["frames"].float() - expected.float()).abs().mean() < 12


def test_an_image_is_upright_and_in_rgb(processor, tmp_path):
    picture = np.zeros((32, 32), dtype=np.uint8)
    picture[:16] = 200
    lies = Image.Exif()
    lies[0x0112] = 6  # The top of the stored picture is the right side of the upright one.
    Image.fromarray(picture).save(tmp_path / "grey.png", exif=lies)
    frames = VideoTextDataset(rows_of_images(tmp_path / "grey.png"), processor.video_processor)[0]["frames"]
    assert (frames[..., 0] == 0).all() and (frames[..., -1] == 200).all()


def test_a_broken_image_is_reported_like_a_broken_video(processor, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(numbered_frame(1)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    table = rows_of_images(tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "whole.png", tmp_path / "gone.bmp")
    dataset, broken = VideoTextDataset(table, processor.video_processor), BrokenVideos()
    (batch,) = broken.filter([collate_training_samples([dataset[row] for row in range(4)], processor, 8)])
    assert batch["pair_ids"].tolist() == [2]
    assert list(broken) == [table[row]["video"] for row in (0, 1, 3)]
    assert all(f"{video} cannot be read as an image" in reason for video, reason in broken.items())


@pytest.mark.parametrize("cache", [cache_frames, cache_videos])
def test_images_are_cached_beside_videos(table, processor, tmp_path, cache):
    Image.fromarray(numbered_frame(5, 32, 48)).save(tmp_path / "picture.png")
    (tmp_path / "text.jpg").write_text("no picture")
    files = [table[0]["video"], tmp_path / "picture.png", tmp_path / "text.jpg"]
    table = rows_of_images(*files)
    frames = cache(table, processor.video_processor, tmp_path / "cache")
    decoded, cached = (VideoTextDataset(table, processor.video_processor, found) for found in (None, frames))
    assert all(torch.equal(decoded[row]["frames"], cached[row]["frames"]) for row in (0, 1))
    assert "text.jpg" in cached[2]["error"]


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


def test_videos_bring_several_of_their_own_questions(questions, processor):
    """Questions 0 and 2 are about one video, question 1 about another."""
    dataset = VideoQuestionsDataset(questions, processor.video_processor, questions_per_video=3)
    of_video = [set(questions.select(rows)["question_id"]) for rows in dataset.rows_of_video]
    assert len(dataset) == len(set(questions["video_id"])) == 2
    for number in range(2):
        drawn = [row["question_id"] for row in dataset[number, 5]["questions"]]
        assert len(drawn) == 3 and set(drawn) == of_video[number]
        assert drawn == [row["question_id"] for row in dataset[number, 5]["questions"]]
    batch = collate_question_samples([dataset[0, 5], dataset[1, 6]], processor, max_question_tokens=4)
    assert (
        len(batch["pixel_values_videos"]) == 2 and len(batch["input_ids"]) == len(batch["answers_per_question"]) == 6
    )


@pytest.mark.parametrize("cache", [None, cache_frames, cache_videos])
@pytest.mark.parametrize("dataset_class", [VideoTextDataset, VideoQuestionsDataset])
def test_a_batch_is_read_at_once_and_holds_what_single_items_do(questions, processor, tmp_path, cache, dataset_class):
    (tmp_path / "b.mp4").write_bytes(b"no video")
    frames = cache and cache(questions, processor.video_processor, tmp_path / "cache")
    dataset = dataset_class(questions, processor.video_processor, frames)
    keys = [(1, 3), (0, 4), (1, 5), 0] if dataset_class is VideoTextDataset else [(1, 3), (0, 4), (1, 5), (0, 6)]
    batch = dataset.__getitems__(keys)
    assert ["error" in item for item in batch] == [True, False, True, False]
    for item, alone in zip(batch, [dataset[key] for key in keys], strict=True):
        found, expected = item.pop("frames", None), alone.pop("frames", None)
        assert item == alone and (found is None or torch.equal(found, expected))


def test_evaluation_sees_a_video_once_for_several_questions_and_every_question(questions, processor):
    """Video a has questions 0 and 2, video b question 1."""
    for number, expected in ((1, [[0], [2], [1]]), (2, [[0, 2], [1, 1]]), (3, [[0, 2, 0], [1, 1, 1]])):
        settings = {"questions_per_video": number, "all_questions": True}
        dataset = VideoQuestionsDataset(questions, processor.video_processor, **settings)
        batch = collate_questions([dataset[place] for place in range(len(dataset))], processor, 4)
        assert len(batch["pixel_values_videos"]) == len(dataset) == len(expected)
        assert batch["index"] == [*itertools.chain(*expected)]
        assert batch["question_id"] == [f"q{row}" for row in batch["index"]]
        alone = VideoTextDataset(questions, processor.video_processor)
        assert torch.equal(
            batch["input_ids"], collate_questions([alone[row] for row in batch["index"]], processor, 4)["input_ids"]
        )


def test_a_question_batch_holds_all_answers_of_its_questions_in_order(questions, processor):
    dataset = VideoTextDataset(questions, processor.video_processor)
    batch = collate_question_samples([dataset[0, 5], dataset[1, 6], dataset[2, 7]], processor, max_question_tokens=4)
    plain = processor(videos=[questions[0]["video"]], return_tensors="pt")["pixel_values_videos"]
    torch.testing.assert_close(batch.pop("pixel_values_videos")[:1], plain)
    assert batch.pop("input_ids").tolist() == [[2, 9, 7, 3], [2, 9, 3, 0], [2, 9, 1, 3]]
    assert batch.pop("attention_mask").tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    answers = [[2, 5, 6, 3, 0], [2, 6, 3, 0, 0], [2, 5, 6, 7, 3], [2, 9, 3, 0, 0]]
    assert batch.pop("answer_input_ids").tolist() == answers
    assert batch.pop("answer_attention_mask").sum(1).tolist() == [4, 3, 5, 3]
    assert batch["answer_weights"].dtype == torch.float32 and batch["answers_per_question"].dtype == torch.int64
    torch.testing.assert_close(batch.pop("answer_weights"), torch.tensor([0.2, 0.4, 0.6, 1.0]))
    assert batch.pop("answers_per_question").tolist() == [1, 2, 1]
    assert batch == {"broken_videos": []}


def test_a_choice_batch_holds_a_text_for_each_choice(choices, processor):
    dataset = VideoTextDataset(choices, processor.video_processor)
    batch = collate_choice_samples([dataset[0, 5], dataset[1, 6]], processor, max_question_tokens=8)
    assert batch.pop("pixel_values_videos").shape == (2, 4, 3, 16, 16)
    # One question has its question mark, the other doesn't.
    assert batch.pop("input_ids").tolist() == [
        [[2, 9, 7, 8, 5, 6, 3], [2, 9, 7, 8, 7, 3, 0]],
        [[2, 9, 8, 6, 3, 0, 0], [2, 9, 8, 9, 3, 0, 0]],
    ]
    assert batch.pop("attention_mask").sum(-1).tolist() == [[7, 6], [5, 5]]
    assert batch["labels"].dtype == torch.int64 and batch.pop("labels").tolist() == [0, 1]
    assert batch == {"broken_videos": []}


@pytest.mark.parametrize(
    ("task", "training", "evaluation"),
    [
        ("questions", collate_question_samples, collate_questions),
        ("choices", collate_choice_samples, collate_choices),
    ],
)
def test_evaluation_reads_what_training_reads_and_knows_the_rows(request, processor, task, training, evaluation):
    dataset = VideoTextDataset(request.getfixturevalue(task), processor.video_processor)
    samples = [dataset[2], dataset[1]]
    batch, trained = evaluation(samples, processor, 8), training(samples, processor, 8)
    for name in ("pixel_values_videos", "input_ids", "attention_mask"):
        assert torch.equal(batch.pop(name), trained[name])
    assert batch == {"question_id": ["q2", "q1"], "index": [2, 1], "broken_videos": []}


@pytest.mark.parametrize("collate", [collate_question_samples, collate_questions])
def test_questions_about_a_broken_video_are_left_out(questions, processor, tmp_path, collate):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    dataset = VideoTextDataset(questions, processor.video_processor)
    batch = collate([dataset[row] for row in range(3)], processor, 8)
    assert len(batch["input_ids"]) == 1 and len(batch["broken_videos"]) == 2
    assert batch.get("question_id", ["q1"]) == ["q1"] and len(batch.get("answer_weights", "ab")) == 2
    assert list(collate([dataset[0]], processor, 8)) == ["broken_videos"]


def test_an_answer_that_is_too_long_is_found_before_a_run(questions, processor):
    check_answers(questions, processor.tokenizer, max_answer_tokens=5)
    with pytest.raises(ValueError, match="'q1': the answer 'a dog runs' has 5 tokens, and max_answer_tokens is 4"):
        check_answers(questions, processor.tokenizer, max_answer_tokens=4)


@pytest.mark.parametrize("cache", [cache_frames, cache_videos])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_cached_frames_are_the_decoded_ones(table, processor, tmp_path, num_proc, cache):
    frames = cache(table, processor.video_processor, tmp_path / "cache", num_proc)
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


@pytest.mark.parametrize("cache", [cache_frames, cache_videos])
def test_the_cache_remembers_broken_videos(table, processor, tmp_path, cache):
    (tmp_path / "b.mp4").write_bytes(b"no video")
    frames = cache(table, processor.video_processor, tmp_path / "cache")
    item = VideoTextDataset(table, processor.video_processor, frames)[1]
    assert "b.mp4" in item["error"] and "frames" not in item


@pytest.mark.parametrize("frame_sampling", ["uniform", "middle", "random", "jitter"])
@pytest.mark.parametrize("num_frames", [3, 9])
def test_a_cache_of_whole_videos_gives_the_frames_of_any_clip_and_sampling(
    processor, tmp_path, frame_sampling, num_frames
):
    write_video(tmp_path / "even.mp4", 24, rate=8)
    write_video(tmp_path / "uneven.mp4", 24, frame_times=[number / 8 + (number > 9) * 0.7 for number in range(24)])
    clips = [(0.0, 1.0), (0.5, 0.625), (1.1, 2.9), (None, None)]
    table = Dataset.from_list(
        [
            {"video": str(tmp_path / name), "video_id": f"{name}{start}", "start": start, "end": end}
            for name in ("uneven.mp4", "even.mp4")
            for start, end in clips
        ]
    )
    videos = processor.video_processor
    videos.start, videos.end = 0.25, 2.0  # for the rows that name none
    files = cache_videos(table, videos, tmp_path / "cache")
    videos.frame_sampling, videos.num_frames = frame_sampling, num_frames
    assert cache_videos(table.select([4, 1]), videos, tmp_path / "cache").cache_files == files.cache_files
    decoded, cached = (VideoTextDataset(table, videos, found) for found in (None, files))
    for key in itertools.product(range(len(table)), (0, 1)):
        assert torch.equal(decoded[key]["frames"], cached[key]["frames"])


def test_a_clip_beyond_a_cached_video_is_reported(table, processor, tmp_path):
    row = {"video": table[0]["video"], "video_id": "late", "start": 99.0, "end": 100.0}
    table = Dataset.from_list([row])
    frames = cache_videos(table, processor.video_processor, tmp_path / "cache")
    assert "start=99.0" in VideoTextDataset(table, processor.video_processor, frames)[0]["error"]


@pytest.mark.parametrize("frame_sampling", ["random", "head_tail", "jitter"])
def test_random_sampling_is_not_cached(table, processor, tmp_path, frame_sampling):
    processor.video_processor.frame_sampling = frame_sampling
    with pytest.raises(ValueError, match=f"frame_sampling='{frame_sampling}'"):
        cache_frames(table, processor.video_processor, tmp_path)


def test_the_digest_changes_with_the_texts_and_not_with_the_folder(table, processor):
    digest = VideoTextDataset(table, processor.video_processor).digest()
    moved = table.map(lambda row: {"video": "/elsewhere/" + row["video"]})
    retold = table.map(lambda row: {"text": row["text"] + " away"})
    assert VideoTextDataset(moved, processor.video_processor).digest() == digest
    assert VideoTextDataset(retold, processor.video_processor).digest() != digest


def test_the_digest_changes_with_the_answers(questions, choices, processor):
    def digest(table):
        return VideoTextDataset(table, processor.video_processor).digest()

    shorter = questions.map(lambda row: {"answers": row["answers"][:1]})
    swapped = choices.map(lambda row: {"choices": row["choices"][::-1]})
    assert len({digest(table) for table in (questions, shorter, choices, swapped)}) == 4
