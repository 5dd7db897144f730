"""Search videos by text and texts by video: fill a gallery, search it, re-rank what was found, evaluate.

The embeddings of a gallery give the candidates, by cosine similarity; the matching head then reads each candidate
together with the query, and its logit is added to the similarity.
"""

import contextlib
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.utils import logging

from transformers_testa.baselines import Baseline
from transformers_testa.gallery import Damage, Gallery, bytes_per_video
from transformers_testa.merging import count_tokens
from transformers_testa.metrics import distractor_accuracy, dual_softmax_metrics, retrieval_metrics
from transformers_testa.modeling_testa import TestaForRetrieval
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.search import EmbeddingIndex
from transformers_testa.video_processing_testa import Video


logger = logging.get_logger(__name__)

RetrievalModel = TestaForRetrieval | Baseline

VIDEO_SUFFIXES = (
    *(".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogg", ".ogv", ".rm", ".ts", ".webm", ".wmv"),
)


# Filling it


@dataclass(frozen=True)
class IndexReport:
    """What [`index_videos`] did: videos added, videos that were there, and why each of the others failed."""

    added: int
    skipped: int
    failed: dict[str, str]


def find_videos(folder: str | Path) -> list[Path]:
    """Video files in a folder and its subfolders, sorted. Raises ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the path of a folder of videos")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not videos:
        raise ValueError(f"{folder} holds no video: files of {', '.join(VIDEO_SUFFIXES)} are looked for")
    return videos


def index_videos(
    model: TestaForRetrieval,
    processor: TestaProcessor,
    videos: str | Path | Iterable[str | Path] | Mapping[str, Video],
    gallery: Gallery,
    batch_size: int = 8,
    decode_threads: int = 4,
) -> IndexReport:
    """Add videos to a gallery, decoding the next ones while the model encodes. Run it again to resume.

    Args:
        model: a `TestaForRetrieval`.
        processor: its `TestaProcessor`.
        videos: a folder, paths (which become the ids), or a dict of id to anything the processor takes.
        gallery: open for writing. Videos that it has already are skipped.
        batch_size: videos encoded, and written, at a time.
        decode_threads: videos decoded at a time.

    Returns:
        An [`IndexReport`]. A video that can't be read is in its `failed`, and in the log.

    Raises:
        ValueError: if a folder holds no videos, or the gallery can't take what the model gives.
    """
    videos = _by_id(videos)
    waiting = {video_id: video for video_id, video in videos.items() if video_id not in gallery}
    failed, batch = {}, {}
    size_before = len(gallery)
    decoded = _decode_ahead(processor, waiting, decode_threads, ahead=2 * batch_size)
    with inference(model):
        for video_id, pixels in tqdm(decoded, total=len(waiting), desc="Embedding videos", unit="video"):
            try:
                batch[video_id] = pixels.result()
            except ValueError as error:
                failed[video_id] = str(error)
                logger.warning(f"{video_id} is left out: {error}")
            if len(batch) == batch_size:
                _add_videos(model, gallery, list(batch), _stack(batch))
                batch = {}
        if batch:
            _add_videos(model, gallery, list(batch), _stack(batch))
    return IndexReport(len(gallery) - size_before, len(videos) - len(waiting), failed)


def index_videos_together(
    model: TestaForRetrieval,
    processor: TestaProcessor,
    videos: str | Path | Iterable[str | Path] | Mapping[str, Video],
    folder: str | Path,
    accelerator: Accelerator,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> IndexReport:
    """Add videos to a gallery, split over the processes of a run. Run it again, with as many or others, to resume.

    Each process fills a part of the gallery by itself, so that none waits for another; at last the parts become one.

    Args:
        model: a `TestaForRetrieval`, the same on all processes.
        processor: its `TestaProcessor`.
        videos: as in [`index_videos`].
        folder: where the gallery is, or is to be.
        accelerator: of the run.
        dtype: as in [`Gallery`].
        batch_size: videos that a process encodes, and writes, at a time.

    Returns:
        An [`IndexReport`] on all processes' videos, the same everywhere.

    Raises:
        ValueError: as [`index_videos`] and [`Gallery`].
        RuntimeError: if another writer has the gallery open.
    """
    videos = _by_id(videos)
    with contextlib.ExitStack() as stack:
        gallery: Gallery | None = None
        plan: list[Any] = [None]
        if accelerator.is_main_process:
            gallery = stack.enter_context(Gallery(folder, model, writable=True, dtype=dtype))
            waiting = [video_id for video_id in videos if video_id not in gallery]
            if waiting:
                logger.warning(describe_size(model, processor, gallery, len(waiting)))
            plan = [(waiting, gallery.next_part(), gallery.dtype)]
        (waiting, first_part, dtype), *_ = broadcast_object_list(plan)
        own = {
            video_id: videos[video_id] for video_id in waiting[accelerator.process_index :: accelerator.num_processes]
        }
        if gallery is not None and accelerator.num_processes == 1:
            return replace(index_videos(model, processor, own, gallery, batch_size), skipped=len(videos) - len(own))
        with Gallery(Path(folder, f"part-{first_part + accelerator.process_index}"), model, True, dtype) as part:
            report = index_videos(model, processor, own, part, batch_size)
        reports = gather_object([report])  # which also waits for all
        if gallery is not None:
            gallery.take_in_parts()
        accelerator.wait_for_everyone()
    failed = {video_id: why for report in reports for video_id, why in report.failed.items()}
    return IndexReport(sum(report.added for report in reports), len(videos) - len(waiting), failed)


def describe_size(model: TestaForRetrieval, processor: TestaProcessor, gallery: Gallery, num_videos: int) -> str:
    """Tell in a sentence what some more videos take on disk, and what is free there."""
    num_tokens = count_tokens(model.config.video_config, processor.video_processor.num_frames)
    each = bytes_per_video(
        num_tokens, model.config.video_config.hidden_size, model.config.projection_dim, gallery.dtype
    )
    free = shutil.disk_usage(gallery.folder).free
    return (
        f"{num_videos} videos will take {_size(num_videos * each)} in {gallery.folder} ({num_tokens} tokens each, "
        f"stored in {str(gallery.dtype).removeprefix('torch.')}); {_size(free)} are free."
    )


def _size(num_bytes: int) -> str:
    unit = min(4, max(0, (len(str(num_bytes)) - 1) // 3))
    return f"{num_bytes / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


@dataclass(frozen=True)
class RepairReport:
    """What [`repair_gallery`] did: what was damaged, videos embedded anew, and why others failed and were removed."""

    damages: list[Damage]
    repaired: int
    failed: dict[str, str]


def repair_gallery(
    model: TestaForRetrieval,
    processor: TestaProcessor,
    gallery: Gallery,
    videos: Mapping[str, Video] | None = None,
    decode_threads: int = 4,
) -> RepairReport:
    """Find the damaged files of a gallery, and make them anew from their videos. What is whole is not touched.

    Args:
        model: a `TestaForRetrieval`, the one that filled the gallery.
        processor: its `TestaProcessor`.
        gallery: open for writing, with `damaged=True` where files are missing or cut short.
        videos: where the videos are, by id; by default an id is the path.
        decode_threads: videos decoded at a time.

    Raises:
        ValueError: if the gallery isn't writable, `videos` lacks a damaged one, or a video has another shape than
            before.
    """
    damages, failed, repaired = list(gallery.find_damage()), {}, 0
    if videos is not None and (lacking := [name for damage in damages for name in damage.ids if name not in videos]):
        raise ValueError(f"videos lacks {lacking[0]!r}, which is damaged: tell where the video is")
    # Repairing one may leave nothing of its shard, so the numbers of earlier ones stay if the last comes first.
    for damage in reversed(damages):
        logger.warning(f"{damage.reason}: its {len(damage.ids)} videos are embedded again.")
        paths = {video_id: video_id if videos is None else videos[video_id] for video_id in damage.ids}
        batch = {}
        for video_id, pixels in _decode_ahead(processor, paths, decode_threads, len(paths)):
            try:
                batch[video_id] = pixels.result()
            except ValueError as error:
                failed[video_id] = str(error)
                logger.warning(f"{video_id} is removed, as it can't be read any more: {error}")
        if batch:
            with inference(model):
                output = model.get_video_features(pixel_values_videos=_stack(batch).to(model.device))
            gallery.replace(damage.shard, list(batch), output.pooler_output, output.last_hidden_state)
        else:
            gallery.remove(damage.ids)
        repaired += len(batch)
    return RepairReport(damages, repaired, failed)


def _by_id(videos: str | Path | Iterable[str | Path] | Mapping[str, Video]) -> Mapping[str, Video]:
    if isinstance(videos, (str, Path)):
        videos = find_videos(videos)
    return videos if isinstance(videos, Mapping) else {str(path): path for path in videos}


def _decode_ahead(
    processor: TestaProcessor, videos: Mapping[str, Video], threads: int, ahead: int
) -> Iterator[tuple[str, Future[Tensor]]]:
    def decode(video: Video) -> Tensor:
        return processor(videos=[video], return_tensors="pt")["pixel_values_videos"][0]

    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[str, Future[Tensor]]] = deque()
        try:
            for video_id, video in videos.items():
                pending.append((video_id, pool.submit(decode, video)))
                if len(pending) > ahead:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
        finally:
            pool.shutdown(cancel_futures=True)


def _stack(videos: dict[str, Tensor]) -> Tensor:
    first_id, first = next(iter(videos.items()))
    for video_id, video in videos.items():
        if video.shape != first.shape:
            raise ValueError(
                f"{video_id} became {list(video.shape)} and {first_id} {list(first.shape)}: a gallery needs a processor "
                "that gives all videos one shape"
            )
    return torch.stack(list(videos.values()))


def _add_videos(model: RetrievalModel, gallery: Gallery, ids: list[str], pixel_values_videos: Tensor) -> None:
    output = model.get_video_features(pixel_values_videos=pixel_values_videos.to(model.device))
    gallery.add(ids, output["pooler_output"], output["last_hidden_state"])


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, without gradients; afterwards each module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


# Searching and re-ranking


def embed_texts(model: RetrievalModel, input_ids: Tensor, attention_mask: Tensor, batch_size: int = 64) -> Tensor:
    """Embeddings of texts `[texts, L]`, float32 `[texts, E]`, on the CPU."""
    with inference(model):
        embeddings = [
            model.get_text_features(input_ids=ids, attention_mask=mask)["pooler_output"].float().cpu()
            for ids, mask in _text_batches(input_ids, attention_mask, batch_size, model.device)
        ]
    return torch.cat(embeddings)


def _text_batches(
    input_ids: Tensor, attention_mask: Tensor, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
        length = int(mask.any(dim=0).nonzero().max()) + 1
        yield ids[:, :length].to(device), mask[:, :length].to(device)


# Videos whose keys and values are in memory at a time have no more tokens than these in all, or are alone: 600 MB in
# float32 for the base model.
TOKENS_AT_ONCE = 8192
# Texts compared with a video at a time, where each pair is read together.
TEXTS_AT_ONCE = 4096


class ReadTexts:
    """Texts read as far as they don't depend on a video, once, however many videos they are matched with.

    Padding is not stored: a token of the base model takes 3 KB in float32.

    Args:
        model: a `TestaForRetrieval`.
        input_ids: `[texts, L]`.
        attention_mask: `[texts, L]`.
        batch_size: texts read at a time.
    """

    def __init__(self, model: RetrievalModel, input_ids: Tensor, attention_mask: Tensor, batch_size: int = 64):
        self.attention_mask = attention_mask.cpu()
        places = torch.arange(1, input_ids.shape[1] + 1)
        self.lengths = (self.attention_mask.bool() * places).amax(dim=1)
        self.starts = self.lengths.cumsum(0) - self.lengths
        states = []
        with inference(model):
            for (ids, mask), lengths in zip(
                _text_batches(input_ids, attention_mask, batch_size, model.device),
                self.lengths.split(batch_size),
                strict=True,
            ):
                of_batch = model.read_before_matching(ids, mask).cpu()
                states.append(of_batch[torch.arange(ids.shape[1]) < lengths[:, None]])
        self.states = torch.cat(states)  # [tokens of all texts, D]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """States `[N, L, D]` and attention masks `[N, L]` of texts `[N]`, as long as the longest of them."""
        length = int(self.lengths[rows].max())
        places = torch.arange(length).clamp(max=self.lengths[rows][:, None] - 1)
        return self.states[self.starts[rows][:, None] + places], self.attention_mask[rows, :length]


def plan_matching(
    text_rows: Tensor, video_rows: Tensor, text_lengths: Tensor, texts_at_once: int, videos_at_once: int
) -> list[tuple[list[int], list[Tensor]]]:
    """Group pairs by video, so that a video is read once, and videos that have as many texts, so that few wait alone.

    Args:
        text_rows: `[pairs]`.
        video_rows: `[pairs]`.
        text_lengths: `[texts]`; a video meets short texts first, so that batches have little padding.
        texts_at_once: pairs a batch.
        videos_at_once: videos a group.

    Returns:
        Groups of videos `[V]`, each with its batches of pairs `[V, n]`, which number the pairs given.
    """
    by_length = text_lengths[text_rows].argsort(stable=True)
    by_video = by_length[video_rows[by_length].argsort(stable=True)]
    videos, counts = video_rows[by_video].unique_consecutive(return_counts=True)
    pairs_of_video = by_video.split(counts.tolist())
    groups = []
    for count in counts.unique().tolist():
        alike = (counts == count).nonzero()[:, 0]
        for group in alike.split(min(videos_at_once, max(texts_at_once // count, 1))):
            pairs = torch.stack([pairs_of_video[place] for place in group])
            groups.append((videos[group].tolist(), list(pairs.split(max(texts_at_once // len(group), 1), dim=1))))
    return groups


def match_texts(
    model: RetrievalModel, hidden_states: Tensor, input_ids: Tensor, attention_mask: Tensor, batch_size: int = 64
) -> Tensor:
    """Match many texts with one video, whose cross-attention keys and values are computed once.

    Args:
        model: a `TestaForRetrieval`.
        hidden_states: `[1, N, D]`, the video's.
        input_ids: `[texts, L]`.
        attention_mask: `[texts, L]`; what all texts of a batch have as padding on the right is trimmed.
        batch_size: texts a batch.

    Returns:
        Logits of being matched, float32 `[texts]`, on the CPU.
    """
    texts = ReadTexts(model, input_ids, attention_mask, batch_size)
    return _match_group(model, hidden_states, texts, torch.arange(len(input_ids))[None].split(batch_size, dim=1))[0]


def match_scores(
    model: RetrievalModel,
    gallery: Gallery,
    input_ids: Tensor,
    attention_mask: Tensor,
    text_rows: Tensor,
    video_rows: Tensor,
    batch_size: int = 64,
) -> Tensor:
    """Match pairs of a text and a video of the gallery, with what pairs share computed once.

    A video is read from disk once, and its cross-attention keys and values serve all of its texts; a text is read once
    up to where it first attends to a video.

    Args:
        model: a `TestaForRetrieval`.
        gallery: where the videos are.
        input_ids: `[texts, L]`.
        attention_mask: `[texts, L]`.
        text_rows: `[pairs]`, the row in `input_ids` of each pair's text.
        video_rows: `[pairs]`, the row in the gallery of each pair's video.
        batch_size: pairs a batch.

    Returns:
        Logits of being matched, float32 `[pairs]`, on the CPU.
    """
    logits = torch.empty(len(text_rows))
    if not len(text_rows):
        return logits
    texts = ReadTexts(model, input_ids, attention_mask, batch_size)
    videos_at_once = max(TOKENS_AT_ONCE // gallery.hidden_states(video_rows[:1]).shape[1], 1)
    for videos, batches in plan_matching(text_rows, video_rows, texts.lengths, batch_size, videos_at_once):
        hidden_states = gallery.hidden_states(videos)
        found = _match_group(model, hidden_states, texts, [text_rows[pairs] for pairs in batches])
        logits[torch.cat(batches, dim=1)] = found
    return logits


def _match_group(model: RetrievalModel, hidden_states: Tensor, texts: ReadTexts, batches: Iterable[Tensor]) -> Tensor:
    """Logits `[V, texts]` of videos `[V, N, D]` and batches of texts `[V, n]`, by their rows in `texts`."""
    with inference(model):
        cache = model.read_videos_before_matching(hidden_states.to(model.device, model.dtype))
        logits = []
        for rows in batches:
            states, mask = (tensor.to(model.device) for tensor in texts.batch(rows.flatten()))
            logits.append(model.match_states(states, mask, cache)[:, 1].float().cpu().view_as(rows))
    return torch.cat(logits, dim=1)


class Ranking(NamedTuple):
    """Candidates of each query, best first, all `[Q, k]`. Without re-ranking there are no match logits."""

    scores: Tensor
    rows: Tensor
    similarities: Tensor
    match_logits: Tensor | None = None


def rerank(similarities: Tensor, rows: Tensor, match_logits: Tensor) -> Ranking:
    """Sort the candidates of each query, all `[Q, k]`, by the sum of similarity and match logit."""
    scores, order = (similarities + match_logits).sort(dim=1, descending=True, stable=True)
    return Ranking(scores, *(tensor.gather(1, order) for tensor in (rows, similarities, match_logits)))


# Search for people


@dataclass(frozen=True)
class SearchResult:
    """A video (`id` as in the gallery) or a text (`id` is the text) that was found. Without re-ranking `match_logit` is None."""

    id: str
    score: float
    similarity: float
    match_logit: float | None


class VideoSearch:
    """Finds the videos of a gallery that a text describes, and the texts that describe a video.

    Args:
        model: a `TestaForRetrieval`, on any device.
        processor: its `TestaProcessor`.
        gallery: the [`Gallery`] that the model filled.
        batch_size: texts read at a time.
        backend: of [`EmbeddingIndex`].

    Raises:
        ValueError: if the backend is unknown.
        ImportError: if faiss is asked for and not installed.
    """

    def __init__(
        self,
        model: TestaForRetrieval,
        processor: TestaProcessor,
        gallery: Gallery,
        batch_size: int = 64,
        backend: str = "torch",
    ):
        self.model = model
        self.processor = processor
        self.gallery = gallery
        self.batch_size = batch_size
        self.backend = backend
        self._index: EmbeddingIndex | None = None
        self._indexed_revision = -1

    @property
    def index(self) -> EmbeddingIndex:
        """The index of the gallery as it is now. Raises ValueError where the gallery is empty."""
        if self._index is None or self._indexed_revision != self.gallery.revision:
            self._index = EmbeddingIndex(self.gallery.embeddings(), self.backend)
            self._indexed_revision = self.gallery.revision
        return self._index

    def search(self, text: str | list[str], top_k: int = 10, rerank_k: int = 128) -> list[list[SearchResult]]:
        """Find the `top_k` videos for each text, best first.

        Args:
            text: one or several; what is longer than the model reads is cut off, which a warning tells once.
            top_k: how many to return; at most the gallery's size.
            rerank_k: how many of the most similar videos the matching head reads; 0 ranks by similarity.

        Raises:
            ValueError: if a text is empty, the gallery is empty, or `rerank_k` is smaller than `top_k`.
        """
        input_ids, attention_mask = self._tokenize([text] if isinstance(text, str) else text)
        index = self.index
        _check_counts(top_k, rerank_k)
        queries = embed_texts(self.model, input_ids, attention_mask, self.batch_size)
        similarities, rows = index.search(queries, max(top_k, rerank_k))
        ranking = Ranking(similarities, rows, similarities)
        if rerank_k:
            texts = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
            logits = match_scores(
                self.model, self.gallery, input_ids, attention_mask, texts, rows.flatten(), self.batch_size
            )
            ranking = rerank(similarities, rows, logits.view_as(rows))
        return _results(self.gallery.ids, ranking, top_k)

    def search_texts(self, video: Video, texts: list[str], top_k: int = 10, rerank_k: int = 128) -> list[SearchResult]:
        """Find the `top_k` texts for a video: an id of the gallery, or anything the processor takes.

        Raises:
            ValueError: if a text is empty, the video can't be read, or `rerank_k` is smaller than `top_k`.
        """
        input_ids, attention_mask = self._tokenize(texts)
        _check_counts(top_k, rerank_k)
        embedding, hidden_states = self._video_features(video)
        text_embeddings = embed_texts(self.model, input_ids, attention_mask, self.batch_size)
        similarities, rows = EmbeddingIndex(text_embeddings).search(embedding, max(top_k, rerank_k))
        ranking = Ranking(similarities, rows, similarities)
        if rerank_k:
            candidates = input_ids[rows[0]], attention_mask[rows[0]]
            logits = match_texts(self.model, hidden_states, *candidates, self.batch_size)
            ranking = rerank(similarities, rows, logits[None])
        (results,) = _results(texts, ranking, top_k)
        return results

    def frame_similarities(self, text: str, video: Video) -> Tensor:
        """How similar each frame of a video is to a text, float32 `[T]`, as [`TestaForRetrieval.ground`] has it.

        A frame has the similarity of its best patch. Frames that were merged as a whole are equal, and one that was
        dropped as a whole has -1.

        Args:
            text: one.
            video: anything the processor takes.

        Raises:
            ValueError: if the text is empty, or the video can't be read.
        """
        tokens = [tensor.to(self.model.device) for tensor in self._tokenize([text])]
        pixels = self.processor(videos=[video], return_tensors="pt")["pixel_values_videos"].to(self.model.device)
        with inference(self.model):
            return self.model.ground(pixels, *tokens)["frame_scores"][0].float().cpu()

    def _video_features(self, video: Video) -> tuple[Tensor, Tensor]:
        if isinstance(video, (str, Path)) and str(video) in self.gallery:
            row = self.gallery.row(str(video))
            return self.gallery.embeddings()[row : row + 1], self.gallery.hidden_states([row])
        pixels = self.processor(videos=[video], return_tensors="pt")["pixel_values_videos"]
        with inference(self.model):
            output = self.model.get_video_features(pixel_values_videos=pixels.to(self.model.device))
        return output.pooler_output.float().cpu(), output.last_hidden_state

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        if not texts:
            raise ValueError("there is no text to search with")
        for row, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {row} is empty: describe what to search for")
        limit = self.processor.longest_text(self.model)
        if any(len(ids) > limit for ids in self.processor.tokenizer(texts, truncation=False, verbose=False).input_ids):
            logger.warning_once(f"A text is longer than {limit} tokens: what comes after them is not searched for.")
        tokens = self.processor(text=texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"]


def _check_counts(top_k: int, rerank_k: int) -> None:
    if top_k < 1 or rerank_k < 0:
        raise ValueError(f"top_k is {top_k} and rerank_k is {rerank_k}: at least 1 and at least 0 are needed")
    if rerank_k and rerank_k < top_k:
        raise ValueError(
            f"rerank_k is {rerank_k} and top_k is {top_k}: re-rank at least as many as are returned, or 0"
        )


def _results(ids: list[str], ranking: Ranking, top_k: int) -> list[list[SearchResult]]:
    scores, rows, similarities = (tensor[:, :top_k].tolist() for tensor in ranking[:3])
    logits = [[None] * len(query) for query in rows]
    if ranking.match_logits is not None:
        logits = ranking.match_logits[:, :top_k].tolist()
    return [
        [SearchResult(ids[row], *values) for row, *values in zip(*query, strict=True)]
        for query in zip(rows, scores, similarities, logits, strict=True)
    ]


# Evaluation


@dataclass(frozen=True)
class RetrievalDetails:
    """The scores behind the metrics of [`evaluate_retrieval`], for error analysis.

    Attributes:
        video_ids: ids of the columns, sorted.
        text_indices: `index` of the rows, ascending.
        video_of_text: `[texts]`, the column of each text's video.
        similarities: float32 `[texts, videos]`.
        text_to_video_scores: float64 `[texts, videos]` after re-ranking; None without it.
        video_to_text_scores: float64 `[videos, texts]` after re-ranking; None without it.
    """

    video_ids: list[str]
    text_indices: list[int]
    video_of_text: Tensor
    similarities: Tensor
    text_to_video_scores: Tensor | None = None
    video_to_text_scores: Tensor | None = None


def evaluate_retrieval(
    model: RetrievalModel,
    video_batches: Iterable[Mapping[str, Any]],
    text_batches: Iterable[Mapping[str, Any]],
    rerank_k: int = 128,
    batch_size: int = 64,
    gallery_folder: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> tuple[dict[str, float], RetrievalDetails]:
    """Evaluate text-to-video and video-to-text retrieval, by similarity alone and re-ranked.

    With several processes each embeds its own batches and matches the videos it embedded; all return the same.

    Args:
        model: a `TestaForRetrieval`, or a [`Baseline`]. One with a method `compare` gives the similarities itself; where
            `rerank_k` is 0 it needs no matching head.
        video_batches: dicts with `pixel_values_videos [B, T, C, H, W]` and `video_id`, B strings.
        text_batches: dicts with `input_ids [B, L]`, `attention_mask [B, L]`, `video_id`, and where there are any
            `distractor`, the id of each text's distractor video or None, and `index`, the text's number in the data
            set, by which the copies that a distributed sampler adds are told.
        rerank_k: candidates of each query that the matching head reads; 0 leaves re-ranking out.
        batch_size: texts matched with a video at a time.
        gallery_folder: where the videos' token features go; a temporary folder by default. Videos that an earlier
            evaluation of the same model left there are not embedded again.
        accelerator: of a run with several processes.

    Returns:
        Metrics and the scores behind them. The metrics are those of `RetrievalMetric`; the same under `reranked_…`
        (but for the dual softmax); `seconds_per_video`; `texts_without_video`, left out since their video was.

    Raises:
        ValueError: if no text has its video, a feature is not finite, or several processes get texts without `index`.
    """
    process = 0 if accelerator is None else accelerator.process_index
    model = model if accelerator is None else accelerator.unwrap_model(model)
    with contextlib.ExitStack() as stack:
        folder = Path(gallery_folder or stack.enter_context(tempfile.TemporaryDirectory()))
        gallery = Gallery(folder / f"process-{process}", model, writable=True, dtype=_feature_dtype(model))
        stack.enter_context(gallery)

        start = time.perf_counter()
        video_ids, embeddings, rows = _embed_video_batches(model, video_batches, gallery, accelerator)
        seconds = max(_gather([time.perf_counter() - start], accelerator))
        found = _embed_text_batches(model, text_batches, accelerator)
        columns = {video_id: column for column, video_id in enumerate(video_ids)}
        texts = _texts_with_video(found, columns)

        video_of_text = torch.tensor([columns[text.video_id] for text in texts])
        distractors = torch.tensor([columns.get(text.distractor or "", -1) for text in texts])
        similarities = _compare(model, gallery, texts, embeddings, rows, accelerator)
        if accelerator is not None:
            # All processes must select the same candidates, however their processors round.
            similarities = broadcast(similarities.to(accelerator.device)).cpu()
        details = RetrievalDetails(video_ids, [text.index for text in texts], video_of_text, similarities)
        metrics = {"seconds_per_video": seconds / len(video_ids), "texts_without_video": len(found) - len(texts)}
        metrics |= retrieval_metrics(similarities, video_of_text) | dual_softmax_metrics(similarities, video_of_text)
        if (distractors >= 0).any():
            metrics["distractor_accuracy"] = distractor_accuracy(similarities, video_of_text, distractors)
        if not rerank_k:
            return metrics, details

        by_text, by_video = _top_k_mask(similarities, rerank_k), _top_k_mask(similarities.T, rerank_k)
        logits = _match_selected(model, gallery, texts, rows, by_text | by_video.T, batch_size, accelerator)
    forward = _rescore(similarities, logits, by_text)
    backward = _rescore(similarities.T, logits.T, by_video)
    reranked = retrieval_metrics(forward, video_of_text, backward)
    if "distractor_accuracy" in metrics:
        reranked["distractor_accuracy"] = distractor_accuracy(forward, video_of_text, distractors)
    metrics |= {f"reranked_{name}": value for name, value in reranked.items()}
    return metrics, replace(details, text_to_video_scores=forward, video_to_text_scores=backward)


def _feature_dtype(model: RetrievalModel) -> torch.dtype:
    """The dtype that stores what the model computes with nothing lost that it would use."""
    device = model.device.type
    computing = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    return torch.bfloat16 if computing == torch.bfloat16 else torch.float32


def _gather(rows: list, accelerator: Accelerator | None) -> list:
    return rows if accelerator is None else gather_object(rows)


def _embed_video_batches(
    model: RetrievalModel, batches: Iterable[Mapping[str, Any]], gallery: Gallery, accelerator: Accelerator | None
) -> tuple[list[str], Tensor, Tensor]:
    """Return the ids of all processes' videos, sorted, their embeddings, and their rows in this gallery or -1."""
    own_ids: dict[str, None] = {}
    with inference(model):
        for batch in batches:
            own_ids |= dict.fromkeys(batch["video_id"])
            new = {video_id: place for place, video_id in enumerate(batch["video_id"]) if video_id not in gallery}
            if new:
                _add_videos(model, gallery, list(new), batch["pixel_values_videos"][list(new.values())])
    process = 0 if accelerator is None else accelerator.process_index
    own = [(video_id, process, gallery.row(video_id)) for video_id in own_ids]
    own_embeddings = [gallery.embeddings()[row].clone() for _, _, row in own]
    holders: dict[str, tuple[str, int, int, Tensor]] = {}
    for holder, embedding in zip(_gather(own, accelerator), _gather(own_embeddings, accelerator), strict=True):
        holders.setdefault(holder[0], (*holder, embedding))
    if not holders:
        raise ValueError("video_batches gave no video: there is nothing to evaluate")
    ids, processes, rows, embeddings = zip(*(holders[video_id] for video_id in sorted(holders)), strict=True)
    is_own = torch.tensor(processes) == process
    return list(ids), torch.stack(embeddings), torch.tensor(rows).where(is_own, -1)


@dataclass(frozen=True)
class _Text:
    index: int
    video_id: str
    distractor: str | None
    input_ids: Tensor
    embedding: Tensor


def _embed_text_batches(
    model: RetrievalModel, batches: Iterable[Mapping[str, Any]], accelerator: Accelerator | None
) -> list[_Text]:
    """Return the texts of all processes, by index."""
    own: list[_Text] = []
    for batch in batches:
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"].bool()
        if "index" not in batch and accelerator is not None and accelerator.num_processes > 1:
            raise ValueError("text_batches lacks index: with several processes it tells texts from their copies")
        texts = zip(
            map(int, batch.get("index", range(len(own), len(own) + len(input_ids)))),
            batch["video_id"],
            batch.get("distractor", [None] * len(input_ids)),
            [ids[mask].cpu() for ids, mask in zip(input_ids, attention_mask, strict=True)],
            embed_texts(model, input_ids, attention_mask).unbind(),
            strict=True,
        )
        own += [_Text(*text[:-1], embedding=text[-1].clone()) for text in texts]
    unique: dict[int, _Text] = {}
    for text in _gather(own, accelerator):
        known = unique.setdefault(text.index, text)
        if known.video_id != text.video_id or not known.input_ids.equal(text.input_ids):
            raise ValueError(f"index {text.index} belongs to two texts, of {known.video_id!r} and {text.video_id!r}")
    return [unique[index] for index in sorted(unique)]


def _texts_with_video(texts: list[_Text], columns: dict[str, int]) -> list[_Text]:
    kept = [text for text in texts if text.video_id in columns]
    if not kept:
        raise ValueError(
            f"none of the {len(texts)} texts belongs to one of the {len(columns)} videos: compare their ids"
        )
    if len(kept) < len(texts):
        lost = sorted({text.video_id for text in texts} - columns.keys())
        logger.warning(f"{len(texts) - len(kept)} texts are left out, their videos aren't there: {', '.join(lost)}")
    lost = sorted({text.distractor for text in kept if text.distractor is not None} - columns.keys())
    if lost:
        logger.warning(f"Distractors that aren't there are left out: {', '.join(lost)}")
    return kept


def _compare(
    model: RetrievalModel,
    gallery: Gallery,
    texts: list[_Text],
    embeddings: Tensor,
    rows: Tensor,
    accelerator: Accelerator | None,
) -> Tensor:
    """Similarities `[texts, videos]`: cosines, or what the model's `compare` makes of each text and each video.

    With that each process compares the videos it holds.
    """
    text_embeddings = torch.stack([text.embedding for text in texts])
    if isinstance(model, TestaForRetrieval) or not hasattr(model, "compare"):
        with torch.autocast("cpu", enabled=False):  # the caller's autocast is for the model; rounded scores would tie
            return text_embeddings @ embeddings.T
    own_columns = (rows >= 0).nonzero()[:, 0]
    own = torch.empty(len(texts), len(own_columns))
    text_embeddings = text_embeddings.to(model.device, model.dtype)
    with inference(model):
        for place, column in enumerate(own_columns.tolist()):
            states = gallery.hidden_states([int(rows[column])]).to(model.device, model.dtype)
            video = embeddings[column : column + 1].to(model.device, model.dtype)
            compared = [model.compare(some, video, states) for some in text_embeddings.split(TEXTS_AT_ONCE)]
            own[:, place] = torch.cat(compared)[:, 0].float().cpu()
    similarities = torch.full((len(texts), len(embeddings)), torch.nan)
    for columns, values in _gather([(own_columns, own)], accelerator):
        similarities[:, columns] = values
    return similarities


def _top_k_mask(similarities: Tensor, k: int) -> Tensor:
    best = similarities.topk(min(k, similarities.shape[1]), dim=1).indices
    return torch.zeros_like(similarities, dtype=torch.bool).scatter(1, best, True)


def _match_selected(
    model: RetrievalModel,
    gallery: Gallery,
    texts: list[_Text],
    rows: Tensor,
    selected: Tensor,
    batch_size: int,
    accelerator: Accelerator | None,
) -> Tensor:
    """Match logits `[texts, videos]` of the selected pairs, NaN elsewhere; each process matches the videos it holds."""
    input_ids = pad_sequence([text.input_ids for text in texts], batch_first=True)
    lengths = torch.tensor([len(text.input_ids) for text in texts])
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    pairs = (selected & (rows >= 0)).nonzero()
    text_rows, columns = pairs.T
    own = match_scores(model, gallery, input_ids, attention_mask, text_rows, rows[columns], batch_size)
    logits = torch.full(selected.shape, torch.nan)
    for matched, values in _gather([(pairs, own)], accelerator):
        logits[tuple(matched.T)] = values
    return logits


def _rescore(similarities: Tensor, logits: Tensor, selected: Tensor) -> Tensor:
    """Similarity plus logit where selected; the rest keeps its order below that. float64 `[queries, candidates]`."""
    scores = similarities.double() + logits
    lowest = scores.masked_fill(~selected, torch.inf).amin(dim=1, keepdim=True)
    # Similarities lie between -1 and 1.
    return scores.where(selected, similarities.double() - 2 + lowest)
