import logging
import math
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from retrieval_world import tiny_config, tiny_processor
from torch.utils.data import DataLoader
from video_files import write_video

from transformers_testa import TestaForRetrieval, TestaVideoModel
from transformers_testa.gallery import Gallery
from transformers_testa.merging import count_tokens, with_merges
from transformers_testa.metrics import RetrievalMetric, retrieval_metrics
from transformers_testa.retrieval import (
    VideoSearch,
    evaluate_retrieval,
    find_videos,
    index_videos,
    index_videos_together,
    match_scores,
    match_texts,
    plan_matching,
    repair_gallery,
    rerank,
)


torch.set_num_threads(1)

TEXTS = [
    "first red, then green, finally blue",
    "white",
    "blue then white then blue then red",
    "finally green",
    "first first first",
]


def tiny_model():
    """A model whose random weights are large enough to tell videos and texts apart."""
    torch.manual_seed(0)
    model = TestaForRetrieval(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "more").mkdir()
    for number, name in enumerate(["a.mp4", "b.mkv", "c.mp4", "more/d.MP4", "more/e.webm"]):
        codec = "libvpx" if name.endswith("webm") else "libx264"
        write_video(folder / name, 8 + 9 * number, height=32 + 16 * (number % 2), width=48, codec=codec)
    (folder / "notes.txt").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def gallery(model, processor, folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gallery")
    with Gallery(path, model, writable=True, dtype=torch.float32) as gallery:
        index_videos(model, processor, folder, gallery, batch_size=2)
    return Gallery(path, model)


def one_by_one(model, processor, videos, texts):
    """Similarities and match logits `[texts, videos]`, each pair computed by itself, without padding."""
    similarities, logits = torch.zeros(len(texts), len(videos)), torch.zeros(len(texts), len(videos))
    with torch.no_grad():
        for column, video in enumerate(videos):
            output = model.get_video_features(**processor(videos=video, return_tensors="pt"))
            for row, text in enumerate(texts):
                tokens = processor(text=[text], return_tensors="pt")
                similarities[row, column] = (
                    output.pooler_output * model.get_text_features(**tokens).pooler_output
                ).sum()
                logits[row, column] = model.match(output.last_hidden_state, **tokens)[0, 1]
    return similarities, logits


# Filling a gallery


def test_a_folder_becomes_a_gallery_of_the_videos_in_it(model, processor, folder, gallery):
    assert gallery.ids == [str(path) for path in find_videos(folder)]
    assert [path.name for path in find_videos(folder)] == ["a.mp4", "b.mkv", "c.mp4", "d.MP4", "e.webm"]
    for row, path in enumerate(gallery.ids):
        with torch.no_grad():
            output = model.get_video_features(**processor(videos=path, return_tensors="pt"))
        assert torch.allclose(gallery.embeddings()[row], output.pooler_output[0], atol=1e-5)
        assert torch.allclose(gallery.hidden_states([row]), output.last_hidden_state, atol=1e-4)


def test_indexing_resumes_where_it_stopped(tmp_path, model, processor, folder, gallery):
    paths = find_videos(folder)
    with Gallery(tmp_path, model, writable=True) as resumed:
        first = index_videos(model, processor, paths[:3], resumed, batch_size=2)
        again = index_videos(model, processor, folder, resumed, batch_size=2)
        nothing = index_videos(model, processor, folder, resumed, batch_size=2)
    assert (first.added, first.skipped) == (3, 0)
    assert (again.added, again.skipped) == (2, 3)
    assert (nothing.added, nothing.skipped) == (0, 5)
    assert resumed.ids == gallery.ids
    assert torch.allclose(resumed.embeddings(), gallery.embeddings(), atol=1e-5)


def test_videos_may_be_anything_with_a_name(tmp_path, model, processor):
    videos = {"noise": torch.randint(0, 255, (9, 3, 40, 50), dtype=torch.uint8), "black": torch.zeros(7, 3, 32, 32)}
    with Gallery(tmp_path, model, writable=True) as gallery:
        assert index_videos(model, processor, videos, gallery).added == 2
    assert gallery.ids == ["noise", "black"]


def test_a_broken_video_is_reported_and_counted_and_the_others_stay(tmp_path, model, processor, folder, caplog):
    broken, cut, missing = tmp_path / "broken.mp4", tmp_path / "cut.mp4", tmp_path / "missing.mp4"
    broken.write_bytes(b"this is no video")
    cut.write_bytes((folder / "c.mp4").read_bytes()[:600])
    paths = [broken, folder / "a.mp4", cut, missing, folder / "c.mp4"]
    with caplog.at_level(logging.WARNING), Gallery(tmp_path / "gallery", model, writable=True) as gallery:
        report = index_videos(model, processor, paths, gallery, batch_size=2)
    assert gallery.ids == [str(folder / "a.mp4"), str(folder / "c.mp4")]
    assert report.added == 2
    assert list(report.failed) == [str(broken), str(cut), str(missing)]
    for path in (broken, cut, missing):
        assert str(path) in report.failed[str(path)]
        assert str(path) in caplog.text


def test_an_empty_folder_is_an_error(tmp_path, model, processor):
    (tmp_path / "empty").mkdir()
    with Gallery(tmp_path / "gallery", model, writable=True) as gallery:
        with pytest.raises(ValueError, match=r"empty holds no video: files of \.3gp"):
            index_videos(model, processor, tmp_path / "empty", gallery)
        with pytest.raises(ValueError, match="nowhere is no folder"):
            index_videos(model, processor, tmp_path / "nowhere", gallery)


def test_videos_of_another_length_are_refused_and_the_gallery_stays(tmp_path, model, processor, folder):
    other = tiny_processor()
    other.video_processor.num_frames = 4
    with Gallery(tmp_path, model, writable=True) as gallery:
        index_videos(model, processor, [folder / "a.mp4"], gallery)
        with pytest.raises(ValueError, match=r"tokens_per_video is .*num_frames"):
            index_videos(model, other, [folder / "c.mp4"], gallery)
    assert len(Gallery(tmp_path, model)) == 1


def test_a_processor_that_gives_videos_different_shapes_is_refused(tmp_path, model, processor):
    def frames_as_they_are(videos, return_tensors):
        return {"pixel_values_videos": [torch.zeros(6, 3, *videos[0].shape[-2:])]}

    videos = {"small": torch.zeros(6, 3, 32, 32), "large": torch.zeros(6, 3, 64, 64)}
    with (
        Gallery(tmp_path, model, writable=True) as gallery,
        pytest.raises(ValueError, match=r"large became \[6, 3, 64, 64\] and small \[6, 3, 32, 32\]"),
    ):
        index_videos(model, frames_as_they_are, videos, gallery)


def test_decoding_stays_a_few_batches_ahead(tmp_path, model, processor):
    started, most_ahead = [], 0
    with Gallery(tmp_path, model, writable=True) as gallery:

        def count(videos, return_tensors):
            nonlocal most_ahead
            started.append(threading.get_ident())
            most_ahead = max(most_ahead, len(started) - len(gallery))
            return processor(videos=videos, return_tensors=return_tensors)

        videos = {str(number): torch.zeros(6, 3, 32, 32) for number in range(40)}
        index_videos(model, count, videos, gallery, batch_size=2, decode_threads=3)
    assert threading.get_ident() not in started
    assert most_ahead <= 2 * 2 + 2 + 1


def test_the_models_mode_is_restored(tmp_path, processor, folder):
    model = tiny_model().train()
    model.testa.text_model.eval()
    modes = [module.training for module in model.modules()]
    with Gallery(tmp_path, model, writable=True) as gallery:
        index_videos(model, processor, folder, gallery)
    VideoSearch(model, processor, gallery).search(TEXTS)
    assert [module.training for module in model.modules()] == modes


def index_in_one_of_several_processes(folder, gallery_folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    report = index_videos_together(
        tiny_model(), tiny_processor(), folder, gallery_folder, accelerator, torch.float32, 2
    )
    torch.save((report.added, report.skipped, report.failed), gallery_folder / f"{accelerator.process_index}.pt")


def test_two_processes_fill_one_gallery_and_go_on_where_it_was_left(tmp_path, model, processor, folder, gallery):
    videos = Path(shutil.copytree(folder, tmp_path / "videos"))
    (videos / "z.mp4").write_bytes(b"this is no video")
    with Gallery(tmp_path / "gallery", model, writable=True, dtype=torch.float32) as begun:
        index_videos(model, processor, [videos / "b.mkv"], begun)
    debug_launcher(index_in_one_of_several_processes, args=(videos, tmp_path / "gallery"), num_processes=2)
    for process in range(2):
        added, skipped, failed = torch.load(tmp_path / "gallery" / f"{process}.pt")
        assert (added, skipped, list(failed)) == (4, 1, [str(videos / "z.mp4")])
    filled = Gallery(tmp_path / "gallery", model)
    filled.verify()
    assert sorted(filled.ids) == [str(videos / Path(path).relative_to(folder)) for path in sorted(gallery.ids)]
    for path in gallery.ids:
        row = filled.row(str(videos / Path(path).relative_to(folder)))
        torch.testing.assert_close(filled.embeddings()[row], gallery.embeddings()[gallery.row(path)])
        torch.testing.assert_close(filled.hidden_states([row]), gallery.hidden_states([gallery.row(path)]))


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # or processes that are started later take it for theirs
    GradientState._reset_state()


def test_the_size_on_disk_is_told_before_anything_is_embedded(tmp_path, model, processor, folder, accelerator, caplog):
    with caplog.at_level(logging.WARNING):
        index_videos_together(model, processor, folder, tmp_path, accelerator, torch.int8)
    told = re.search(r"5 videos will take ([\d.]+) kB in .*tokens each, stored in int8\); .* are free", caplog.text)
    sizes = [path.stat().st_size for path in tmp_path.iterdir() if path.name != "gallery.jsonl"]
    # Each shard has a header of its own.
    assert sum(sizes) - 1000 < 1000 * float(told[1]) < sum(sizes)


@pytest.mark.parametrize("changes", [{"attention_type": "space_only", "merged_frames_per_layer": 0}, {}])
def test_the_number_of_tokens_is_counted_as_the_encoder_gives_them(changes):
    config = tiny_config(**changes).video_config
    for num_frames in (6, 9):
        states = TestaVideoModel(config)(torch.zeros(1, num_frames, 3, 32, 32)).last_hidden_state
        assert count_tokens(config, num_frames) == states.shape[1]


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["shard-00001.safetensors", "embeddings-0.bin"])
def test_damaged_files_are_made_anew_from_their_videos(tmp_path, model, processor, folder, gallery, name, harm):
    kept = Path(shutil.copytree(gallery.folder, tmp_path / "gallery"))
    content = bytearray((kept / name).read_bytes())
    content[-5] ^= 64
    (kept / name).write_bytes(content if harm == "flipped" else content[:50])
    if harm == "missing":
        (kept / name).unlink()
    with Gallery(kept, model, writable=True, damaged=True) as damaged:
        report = repair_gallery(model, processor, damaged)
        assert not report.failed and all(name in damage.reason for damage in report.damages)
        assert report.repaired == sum(len(damage.ids) for damage in report.damages) > 0
        assert not repair_gallery(model, processor, damaged).damages
    repaired = Gallery(kept, model)
    assert repaired.ids == gallery.ids
    torch.testing.assert_close(repaired.embeddings(), gallery.embeddings())
    torch.testing.assert_close(repaired.hidden_states(range(5)), gallery.hidden_states(range(5)))


def test_a_damaged_video_that_is_gone_is_removed_and_reported(tmp_path, model, processor, folder):
    videos = Path(shutil.copytree(folder, tmp_path / "videos"))
    with Gallery(tmp_path / "gallery", model, writable=True) as gallery:
        index_videos(model, processor, videos, gallery, batch_size=2)
        ids = gallery.ids
        for shard in (tmp_path / "gallery").glob("shard-*"):
            shard.write_bytes(bytes(shard.stat().st_size))
        for gone in (0, 4):
            Path(ids[gone]).unlink()
        with pytest.raises(ValueError, match=r"videos lacks .*, which is damaged"):
            repair_gallery(model, processor, gallery, videos={ids[0]: ids[0]})
        report = repair_gallery(model, processor, gallery)
    assert list(report.failed) == [ids[4], ids[0]] and report.repaired == 3 and len(report.damages) == 3
    repaired = Gallery(tmp_path / "gallery", model)
    assert repaired.ids == ids[1:4]
    repaired.verify()


def test_a_search_follows_the_gallery_as_it_changes(tmp_path, model, processor, folder):
    with Gallery(tmp_path, model, writable=True) as gallery:
        index_videos(model, processor, find_videos(folder)[:2], gallery)
        finder = VideoSearch(model, processor, gallery)
        assert len(finder.search("red")[0]) == 2
        index_videos(model, processor, folder, gallery)
        assert len(finder.search("red")[0]) == 5
        best = finder.search("red", top_k=1)[0][0].id
        gallery.remove([best])
        index_videos(model, processor, {"new": torch.zeros(6, 3, 32, 32)}, gallery)
        assert {result.id for result in finder.search("red")[0]} == set(gallery.ids)


# Searching


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_match_scores_are_those_of_each_pair_by_itself(processor, gallery, attention, batch_size):
    model = tiny_model()
    model.set_attn_implementation(attention)
    _, expected = one_by_one(model, processor, gallery.ids, TEXTS)
    tokens = processor(text=TEXTS, padding=True, return_tensors="pt")
    pairs = torch.cartesian_prod(torch.arange(len(TEXTS)), torch.arange(len(gallery)))
    for num_pairs in (0, 1, 17, 25):
        texts, videos = pairs[torch.randperm(len(pairs))[:num_pairs]].T
        found = match_scores(model, gallery, tokens["input_ids"], tokens["attention_mask"], texts, videos, batch_size)
        torch.testing.assert_close(found, expected[texts, videos], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [2, 64])
def test_matching_computes_what_pairs_share_once(tmp_path, model, batch_size):
    """Counted in rows of tokens that go through a layer: keys of the videos, and queries of the first self-attention."""
    embeddings, hidden_states = torch.randn(4, 16), torch.randn(4, 5, 32)
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(list("abcd"), embeddings, hidden_states)
    input_ids = torch.tensor([[2, 10, 3, 0, 0, 0], [2, 10, 11, 3, 0, 0], [2, 7, 7, 8, 3, 0]])
    rows = {"video": 0, "text": 0}

    def count(kind):
        def hook(module, inputs, output):
            rows[kind] += output.shape[:2].numel()

        return hook

    layers = model.testa.text_model.layers
    handles = [
        layers[1].cross_attention.key.register_forward_hook(count("video")),
        layers[0].self_attention.query.register_forward_hook(count("text")),
    ]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    match_scores(model, gallery, input_ids, (input_ids > 0).long(), pairs[:, 0], pairs[:, 1], batch_size)
    for handle in handles:
        handle.remove()
    assert rows["video"] == 4 * 5
    assert rows["text"] == (3 * 5 if batch_size == 64 else 2 * 4 + 5)


@given(st.data(), st.integers(1, 9), st.integers(1, 6))
def test_every_pair_is_in_one_batch_of_its_video(data, texts_at_once, videos_at_once):
    pair = st.tuples(st.integers(0, 6), st.integers(0, 6))
    pairs = torch.tensor(data.draw(st.lists(pair, min_size=1, max_size=40, unique=True)))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 20), min_size=7, max_size=7)))
    groups = plan_matching(pairs[:, 0], pairs[:, 1], lengths, texts_at_once, videos_at_once)
    planned = torch.cat([batch.flatten() for _, batches in groups for batch in batches])
    assert planned.sort().values.equal(torch.arange(len(pairs)))
    videos = [video for group, _ in groups for video in group]
    assert sorted(videos) == pairs[:, 1].unique().tolist()
    for group, batches in groups:
        assert len(group) <= videos_at_once
        for batch in batches:
            assert batch.numel() <= texts_at_once
            assert (pairs[batch, 1] == torch.tensor(group)[:, None]).all()


def test_padding_that_a_batch_does_not_need_changes_nothing(model, gallery):
    input_ids = torch.tensor([[2, 10, 3, 0, 0, 0], [2, 10, 11, 3, 0, 0]])
    tokens = input_ids, (input_ids > 0).long()
    shorter = [tensor[:, :4] for tensor in tokens]
    hidden_states = gallery.hidden_states([1])
    assert match_texts(model, hidden_states, *tokens).equal(match_texts(model, hidden_states, *shorter))


def test_reranking_sorts_by_similarity_plus_match_logit():
    similarities, rows = torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([[4, 2, 7]])
    ranking = rerank(similarities, rows, torch.tensor([[-1.0, 3.0, 0.5]]))
    assert ranking.rows.tolist() == [[2, 7, 4]]
    assert ranking.scores[0].tolist() == pytest.approx([3.8, 0.6, -0.1])
    assert ranking.match_logits.tolist() == [[3.0, 0.5, -1.0]]


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_videos_found_by_text_are_ranked_as_pair_by_pair(model, processor, gallery, top_k):
    similarities, logits = one_by_one(model, processor, gallery.ids, TEXTS)
    found = VideoSearch(model, processor, gallery).search(TEXTS, top_k=top_k)
    order = (similarities + logits).argsort(dim=1, descending=True)[:, :top_k]
    for row, results in enumerate(found):
        assert [result.id for result in results] == [gallery.ids[column] for column in order[row]]
        for result in results:
            column = gallery.row(result.id)
            assert result.similarity == pytest.approx(similarities[row, column].item(), abs=1e-4)
            assert result.match_logit == pytest.approx(logits[row, column].item(), abs=1e-4)
            assert result.score == pytest.approx(result.similarity + result.match_logit, abs=1e-4)


def test_only_the_most_similar_videos_are_reranked(model, processor, gallery):
    similarities, logits = one_by_one(model, processor, gallery.ids, TEXTS)
    found = VideoSearch(model, processor, gallery).search(TEXTS, top_k=2, rerank_k=2)
    for row, results in enumerate(found):
        candidates = similarities[row].topk(2).indices
        order = candidates[(similarities + logits)[row, candidates].argsort(descending=True)]
        assert [result.id for result in results] == [gallery.ids[column] for column in order]


def test_without_reranking_the_similarity_decides(model, processor, gallery):
    similarities, _ = one_by_one(model, processor, gallery.ids, TEXTS[:1])
    (results,) = VideoSearch(model, processor, gallery).search(TEXTS[0], top_k=3, rerank_k=0)
    assert [result.id for result in results] == [gallery.ids[i] for i in similarities[0].topk(3).indices]
    assert all(result.match_logit is None and result.score == result.similarity for result in results)


def test_texts_are_found_by_a_video_in_the_gallery_or_not(model, processor, gallery, folder, tmp_path):
    similarities, logits = one_by_one(model, processor, [folder / "c.mp4"], TEXTS)
    order = (similarities + logits)[:, 0].argsort(descending=True).tolist()
    elsewhere = shutil.copy(folder / "c.mp4", tmp_path / "copy.mp4")
    for video in (folder / "c.mp4", elsewhere):
        results = VideoSearch(model, processor, gallery).search_texts(video, TEXTS)
        assert [result.id for result in results] == [TEXTS[row] for row in order]
        assert [result.score for result in results] == pytest.approx(
            [(similarities + logits)[row, 0].item() for row in order], abs=1e-4
        )


def test_frames_are_as_similar_to_a_text_as_grounding_finds_them(model, processor, folder, gallery):
    finder = VideoSearch(model, processor, gallery)
    similarities = finder.frame_similarities(TEXTS[0], folder / "c.mp4")
    grounded = model.ground(**processor(videos=[folder / "c.mp4"], text=TEXTS[:1], return_tensors="pt"))
    torch.testing.assert_close(similarities, grounded.frame_scores[0])
    assert similarities.shape == (6,) and len(similarities.unique()) > 1


def test_frames_that_merge_are_equally_similar_and_dropped_ones_are_last(processor, folder, gallery):
    video = folder / "c.mp4"
    finder = VideoSearch(with_merges(tiny_model(), [2, 0], 0), processor, gallery)
    assert len(finder.frame_similarities(TEXTS[0], video).unique()) == 4
    pruning = TestaForRetrieval(tiny_config(aggregation_strategy="prune", merged_frames_per_layer=[2, 0]))
    similarities = VideoSearch(pruning.eval(), processor, gallery).frame_similarities(TEXTS[0], video)
    assert (similarities == -1).sum() == 2 and (similarities > -1).sum() == 4


def test_a_gallery_in_bfloat16_ranks_nearly_as_one_in_float32(tmp_path, model, processor, folder, gallery):
    with Gallery(tmp_path, model, writable=True) as rounded:
        index_videos(model, processor, folder, rounded)
    expected = {r.id: r.match_logit for r in VideoSearch(model, processor, gallery).search(TEXTS[0])[0]}
    for result in VideoSearch(model, processor, rounded).search(TEXTS[0])[0]:
        assert result.match_logit == pytest.approx(expected[result.id], abs=0.05)


def test_a_text_of_two_thousand_words_is_cut_off_and_said_so_once(model, gallery, caplog):
    long = "red green " * 1000
    processor = tiny_processor()
    processor.tokenizer.model_max_length = 22
    finder = VideoSearch(model, processor, gallery)
    with caplog.at_level(logging.WARNING):
        found = finder.search(long, rerank_k=0, top_k=2)
        assert finder.search(long, rerank_k=0, top_k=2) == found
    assert found == finder.search("red green " * 10, rerank_k=0, top_k=2)
    assert caplog.text.count("longer than 22 tokens") == 1


def test_wrong_searches_are_told_in_a_sentence(tmp_path, model, processor, gallery):
    finder = VideoSearch(model, processor, gallery)
    with pytest.raises(ValueError, match="text 1 is empty"):
        finder.search(["red", "  "])
    with pytest.raises(ValueError, match="there is no text"):
        finder.search([])
    with pytest.raises(ValueError, match="rerank_k is 5 and top_k is 10"):
        finder.search("red", rerank_k=5)
    with pytest.raises(ValueError, match="top_k is 0"):
        finder.search("red", top_k=0)
    with pytest.raises(ValueError, match=r"missing\.mp4"):
        finder.search_texts("missing.mp4", ["red"])
    with Gallery(tmp_path, model, writable=True) as empty, pytest.raises(ValueError, match="holds no video yet"):
        VideoSearch(model, processor, empty).search("red")


# Evaluation


class RowSet(torch.utils.data.Dataset):
    rows: list[dict]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class VideoSet(RowSet):
    def __init__(self, size):
        generator = torch.Generator().manual_seed(1)
        self.rows = [
            {"pixel_values_videos": torch.randn(6, 3, 32, 32, generator=generator), "video_id": f"video {number}"}
            for number in range(size)
        ]

    @staticmethod
    def collate(rows):
        pixels = torch.stack([row["pixel_values_videos"] for row in rows])
        return {"pixel_values_videos": pixels, "video_id": [row["video_id"] for row in rows]}


class TextSet(RowSet):
    """Texts of 4 to 9 tokens; text i belongs to video i modulo the number of videos."""

    def __init__(self, size, videos):
        generator = torch.Generator().manual_seed(2)
        self.rows = [
            {
                "input_ids": torch.cat(
                    [torch.tensor([2]), torch.randint(7, 14, (2 + i % 6,), generator=generator), torch.tensor([3])]
                ),
                "video_id": f"video {i % videos}",
                "distractor": f"video {(i + 1) % videos}" if i % 3 else None,
                "index": 100 + i,
            }
            for i in range(size)
        ]

    @staticmethod
    def collate(rows):
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(batch["input_ids"], batch_first=True)
        return batch | {"attention_mask": (batch["input_ids"] > 0).long()}


def batches(videos=5, texts=11):
    video_set, text_set = VideoSet(videos), TextSet(texts, videos)
    return (
        DataLoader(video_set, batch_size=2, collate_fn=video_set.collate),
        DataLoader(text_set, batch_size=3, collate_fn=text_set.collate),
    )


def full_scores(model):
    """Similarities and match logits `[texts, videos]` of all pairs of `batches()`, one by one."""
    videos, texts = VideoSet(5).rows, TextSet(11, 5).rows
    similarities, logits = torch.zeros(11, 5), torch.zeros(11, 5)
    with torch.no_grad():
        for column, video in enumerate(videos):
            output = model.get_video_features(pixel_values_videos=video["pixel_values_videos"][None])
            for row, text in enumerate(texts):
                features = model.get_text_features(input_ids=text["input_ids"][None]).pooler_output
                similarities[row, column] = (output.pooler_output * features).sum()
                logits[row, column] = model.match(output.last_hidden_state, text["input_ids"][None])[0, 1]
    return similarities, logits, torch.arange(11) % 5


def test_evaluation_without_reranking_gives_the_metrics_of_the_similarities(model):
    metrics, details = evaluate_retrieval(model, *batches(), rerank_k=0)
    similarities, _, video_of_text = full_scores(model)
    distractors = [(i + 1) % 5 if i % 3 else -1 for i in range(11)]
    expected = RetrievalMetric().compute(predictions=similarities, references=video_of_text, distractors=distractors)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert set(metrics) == set(expected) | {"seconds_per_video", "texts_without_video"}
    assert torch.allclose(details.similarities, similarities, atol=1e-5)
    assert details.video_ids == [f"video {number}" for number in range(5)]
    assert details.text_indices == list(range(100, 111))
    assert details.video_of_text.equal(video_of_text)


def test_evaluation_reranks_every_pair_where_k_covers_the_gallery(model):
    metrics, details = evaluate_retrieval(model, *batches(), rerank_k=128)
    similarities, logits, video_of_text = full_scores(model)
    expected = retrieval_metrics(similarities + logits, video_of_text)
    assert {name: metrics[f"reranked_{name}"] for name in expected} == pytest.approx(expected)
    assert torch.allclose(details.text_to_video_scores.float(), similarities + logits, atol=1e-4)
    assert torch.allclose(details.video_to_text_scores.float(), (similarities + logits).T, atol=1e-4)
    own, other = (
        (similarities + logits)[range(11), video_of_text],
        (similarities + logits)[range(11), (video_of_text + 1) % 5],
    )
    has_distractor = torch.arange(11) % 3 > 0
    accuracy = 100 * (own > other)[has_distractor].double().mean().item()
    assert metrics["reranked_distractor_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_candidates_beyond_k_stay_in_order_below_the_reranked(model, k):
    _, details = evaluate_retrieval(model, *batches(), rerank_k=k)
    similarities, logits, _ = full_scores(model)
    for scores, plain, sums in (
        (details.text_to_video_scores, similarities, similarities + logits),
        (details.video_to_text_scores, similarities.T, (similarities + logits).T),
    ):
        for row in range(len(plain)):
            by_similarity = plain[row].argsort(descending=True)
            first = by_similarity[:k][sums[row, by_similarity[:k]].argsort(descending=True)]
            assert scores[row].argsort(descending=True).tolist() == [*first.tolist(), *by_similarity[k:].tolist()]


def test_evaluation_takes_batches_with_copies_and_without_index(model):
    expected, _ = evaluate_retrieval(model, *batches())
    videos, texts = map(list, batches())
    plain_texts = [{name: batch[name] for name in batch if name != "index"} for batch in texts]
    copies, _ = evaluate_retrieval(model, [*videos, videos[0]], [*texts, texts[1]])
    plain, _ = evaluate_retrieval(model, videos, plain_texts)
    for found in (copies, plain):
        found["seconds_per_video"] = expected["seconds_per_video"]
        assert found == pytest.approx(expected)


def test_a_gallery_folder_is_kept_and_not_embedded_again(tmp_path, model):
    first, _ = evaluate_retrieval(model, *batches(), gallery_folder=tmp_path)
    kept = Gallery(tmp_path / "process-0", model)
    assert kept.hidden_states([0]).dtype == torch.float32
    again, _ = evaluate_retrieval(model, *batches(), gallery_folder=tmp_path)
    assert len(Gallery(tmp_path / "process-0", model)) == len(kept) == 5
    again["seconds_per_video"] = first["seconds_per_video"]
    assert again == first


def test_texts_of_a_video_that_is_not_there_are_left_out_and_counted(model, caplog):
    videos, texts = map(list, batches())
    with caplog.at_level(logging.WARNING):
        metrics, details = evaluate_retrieval(model, videos[:2], texts)
    assert metrics["texts_without_video"] == 2
    assert "video 4" in caplog.text
    assert details.text_indices == [100 + i for i in range(11) if i % 5 != 4]
    with pytest.raises(ValueError, match="none of the 11 texts belongs to one of the 1 videos"):
        evaluate_retrieval(model, [{**videos[0], "video_id": ["x", "x"]}], texts)
    with pytest.raises(ValueError, match="no video"):
        evaluate_retrieval(model, [], texts)


def test_one_index_for_two_texts_is_an_error(model):
    videos, texts = map(list, batches())
    texts[1]["index"] = texts[0]["index"]
    with pytest.raises(ValueError, match="index 100 belongs to two texts"):
        evaluate_retrieval(model, videos, texts)


def test_autocast_is_left_to_the_caller(tmp_path, model):
    with torch.autocast("cpu", torch.bfloat16):
        metrics, _ = evaluate_retrieval(model, *batches(), gallery_folder=tmp_path)
    assert Gallery(tmp_path / "process-0", model).hidden_states([0]).dtype == torch.bfloat16
    assert all(math.isfinite(value) for value in metrics.values())


def evaluate_in_one_of_several_processes(folder):
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare_model(tiny_model())
    video_batches, text_batches = accelerator.prepare(*batches())
    metrics, details = evaluate_retrieval(
        model, video_batches, text_batches, rerank_k=2, gallery_folder=folder, accelerator=accelerator
    )
    torch.save((metrics, details.text_to_video_scores), folder / f"{accelerator.process_index}.pt")


def test_two_processes_give_the_metrics_of_one(tmp_path, model):
    expected, details = evaluate_retrieval(model, *batches(), rerank_k=2)
    debug_launcher(evaluate_in_one_of_several_processes, args=(tmp_path,), num_processes=2)
    for process in range(2):
        metrics, scores = torch.load(tmp_path / f"{process}.pt")
        metrics["seconds_per_video"] = expected["seconds_per_video"]
        assert metrics == pytest.approx(expected)
        assert torch.allclose(scores, details.text_to_video_scores, atol=1e-5)
        assert 2 <= len(Gallery(tmp_path / f"process-{process}", model)) <= 3
