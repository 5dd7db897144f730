"""A gallery of embedded videos on disk: it grows shard by shard, survives a kill at any moment, and is read in parts."""

import bisect
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


# Parts of a config that change when a model is saved or moved, and not what it computes.
BOOKKEEPING = frozenset(["_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"])


class Gallery:
    """Videos as a model sees them, in a folder that grows: what a search compares and what re-ranking reads.

    The folder holds `embeddings.bin` (float32 `[n, E]`), safetensors shards with `hidden_states [videos, N, D]`, and
    `gallery.jsonl`: one line on the model and the shapes, then one line a shard. A shard counts once its line is
    complete, so a process killed at any moment leaves a whole gallery. Reading maps the files into memory: only what
    is asked for is read.

    Args:
        folder: where the gallery is, or is to be.
        model: the model whose videos these are; a gallery of another model is refused.
        writable: whether videos are to be added. A gallery has one writer at a time; leave the `with` block or call
            `close` to let the next one in. Readers see the videos that were there when they opened it.
        dtype: how `hidden_states` are stored, bfloat16 or float32; by default as the gallery has them, bfloat16 in a
            new one.

    Raises:
        ValueError: if the folder holds no gallery and `writable` is False, the gallery is of another model, format or
            dtype, or one of its files is missing or cut short.
        RuntimeError: if another writer has the gallery open.
    """

    FORMAT = 1
    DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

    def __init__(
        self, folder: str | Path, model: PreTrainedModel, writable: bool = False, dtype: torch.dtype | None = None
    ):
        if dtype not in (None, *self.DTYPES.values()):
            raise ValueError(f"dtype is {dtype}: a gallery stores torch.bfloat16 or torch.float32")
        self.folder = Path(folder)
        self.writable = writable
        self._index_path = self.folder / "gallery.jsonl"
        self._embeddings_path = self.folder / "embeddings.bin"
        if not writable and not self._index_path.exists():
            raise ValueError(f"{self.folder} holds no gallery: open it with writable=True and add videos to it")
        self._header = {"format": self.FORMAT, "model": model_fingerprint(model)}
        self._dtype = dtype
        self._rows: dict[str, int] = {}
        self._shards: list[dict] = []
        self._starts: list[int] = []
        self._index_bytes = 0
        with contextlib.ExitStack() as stack:
            if writable:
                self._lock = self._acquire_lock()
                stack.callback(self._lock.release)
            if self._index_path.exists():
                self._load()
            stack.pop_all()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, video_id: str) -> bool:
        return video_id in self._rows

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let another writer in. Reading stays possible."""
        if self.writable:
            self.writable = False
            self._lock.release()

    @property
    def ids(self) -> list[str]:
        """Ids of the videos in the order of their rows."""
        return list(self._rows)

    def row(self, video_id: str) -> int:
        """Row of a video in `embeddings()`. Raises KeyError for a video that isn't there."""
        return self._rows[video_id]

    def embeddings(self) -> Tensor:
        """All embeddings, float32 `[n, E]`, mapped from disk. Raises ValueError where the gallery is empty."""
        if not self._rows:
            raise ValueError(f"the gallery {self.folder} holds no video yet: add some with index_videos")
        dim = self._header["embedding_dim"]
        path, size = str(self._embeddings_path), len(self) * dim
        return torch.from_file(path, shared=False, size=size, dtype=torch.float32).view(-1, dim)

    def hidden_states(self, rows: Iterable[int]) -> Tensor:
        """Token features of these rows only, `[rows, N, D]` in the gallery's dtype.

        Raises:
            ValueError: if the shard of a row can't be read.
        """
        read = []
        for row in map(int, rows):
            number = bisect.bisect_right(self._starts, row) - 1
            path = self.folder / self._shards[number]["file"]
            local = row - self._starts[number]
            try:
                with safe_open(path, framework="pt") as shard:
                    read.append(shard.get_slice("hidden_states")[local : local + 1])
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged ({error}): {self._mend(number)}") from error
        return torch.cat(read)

    def add(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> None:
        """Append videos as one shard, wholly or not at all.

        Args:
            ids: `[videos]`, none of them in the gallery.
            embeddings: `[videos, E]`.
            hidden_states: `[videos, N, D]`; N and D are the same throughout a gallery.

        Raises:
            ValueError: if the gallery isn't writable, an id is there already, or a tensor has another shape than the
                gallery's or values that are not finite.
        """
        embeddings = embeddings.detach().to("cpu", torch.float32)
        hidden_states = hidden_states.detach().to("cpu", self._dtype or torch.bfloat16)
        header = self._header | {
            "embedding_dim": embeddings.shape[-1],
            "tokens_per_video": hidden_states.shape[-2],
            "hidden_size": hidden_states.shape[-1],
            "dtype": str(hidden_states.dtype).removeprefix("torch."),
        }
        self._check_addition(ids, embeddings, hidden_states, header)
        if not self._index_path.exists():
            line = (json.dumps(header) + "\n").encode()
            _write_whole(self._index_path, line)
            self._index_bytes = len(line)
        self._header, self._dtype = header, hidden_states.dtype

        shard = save({"hidden_states": hidden_states.contiguous()})
        rows = embeddings.contiguous().numpy().tobytes()
        entry = {
            "file": f"shard-{len(self._shards):05d}.safetensors",
            "bytes": len(shard),
            "sha256": hashlib.sha256(shard).hexdigest(),
            "embeddings_sha256": hashlib.sha256(rows).hexdigest(),
            "ids": ids,
        }
        line = (json.dumps(entry) + "\n").encode()
        _write_whole(self.folder / entry["file"], shard)
        _write_at(self._embeddings_path, len(self) * embeddings.shape[1] * 4, rows)
        _write_at(self._index_path, self._index_bytes, line)
        self._index_bytes += len(line)
        self._append(entry)

    def verify(self) -> None:
        """Read everything and compare it with its checksums. Raises ValueError naming the first damaged file."""
        embeddings = self.embeddings()
        for number, (start, entry) in enumerate(zip(self._starts, self._shards, strict=True)):
            path = self.folder / entry["file"]
            if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                raise ValueError(f"{path} is damaged (its checksum has changed): {self._mend(number)}")
            rows = embeddings[start : start + len(entry["ids"])].numpy().tobytes()
            if hashlib.sha256(rows).hexdigest() != entry["embeddings_sha256"]:
                raise ValueError(f"{self._embeddings_path} is damaged at row {start}: {self._mend(number)}")

    def _acquire_lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "gallery.lock", timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"{self.folder} is being written by another process: wait for it, or close it"
            ) from None
        return lock

    def _load(self) -> None:
        lines = self._index_path.read_bytes().split(b"\n")
        # What follows the last line feed is an entry that was cut off while it was written; the next one replaces it.
        complete = lines[:-1]
        self._index_bytes = sum(len(line) + 1 for line in complete)
        try:
            header, *entries = map(json.loads, complete)
        except ValueError as error:
            raise ValueError(f"{self._index_path} is damaged: {error}") from error
        if header["format"] != self.FORMAT:
            raise ValueError(f"{self.folder} has format {header['format']}, this version reads {self.FORMAT}")
        if header["model"] != self._header["model"]:
            raise ValueError(
                f"{self.folder} was embedded with another model (fingerprint {header['model'][:12]}, this one has "
                f"{self._header['model'][:12]}): open it with that model, or embed the videos into a new folder"
            )
        stored = self.DTYPES[header["dtype"]]
        if self._dtype not in (None, stored):
            raise ValueError(f"dtype is {self._dtype}, but {self.folder} stores {stored}: leave it out")
        self._header, self._dtype = header, stored
        for entry in entries:
            self._append(entry)
            path = self.folder / entry["file"]
            if not path.exists() or path.stat().st_size != entry["bytes"]:
                raise ValueError(f"{path} is missing or cut short: {self._mend(len(self._shards) - 1)}")
        needed = len(self) * header["embedding_dim"] * 4
        if needed and (not self._embeddings_path.exists() or self._embeddings_path.stat().st_size < needed):
            raise ValueError(f"{self._embeddings_path} is missing or cut short: {self._mend(0)}")

    def _append(self, entry: dict) -> None:
        start = len(self)
        self._starts.append(start)
        self._shards.append(entry)
        self._rows.update({video_id: start + place for place, video_id in enumerate(entry["ids"])})

    def _mend(self, shard: int) -> str:
        ids = self._shards[shard]["ids"]
        return (
            f"restore it from a copy, or embed the gallery anew ({ids[0]!r} is the first of {len(ids)} videos in it)"
        )

    def _check_addition(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor, header: dict) -> None:
        if not self.writable:
            raise ValueError(f"{self.folder} is open for reading: open it with writable=True to add videos")
        if not ids or len(ids) != len(embeddings) or len(ids) != len(hidden_states):
            raise ValueError(
                f"{len(ids)} ids, {len(embeddings)} embeddings, {len(hidden_states)} hidden_states: one each"
            )
        if (embeddings.ndim, hidden_states.ndim) != (2, 3):
            raise ValueError(
                f"embeddings must be [videos, E] and hidden_states [videos, N, D], got {list(embeddings.shape)} and "
                f"{list(hidden_states.shape)}"
            )
        seen = set()
        for video_id in ids:
            if not isinstance(video_id, str):
                raise ValueError(f"id {video_id!r} is a {type(video_id).__name__}: ids are strings")
            if video_id in self or video_id in seen:
                raise ValueError(f"id {video_id!r} is in the gallery {self.folder} already")
            seen.add(video_id)
        for name in ("embedding_dim", "tokens_per_video", "hidden_size"):
            if header[name] != self._header.get(name, header[name]):
                raise ValueError(
                    f"{name} is {header[name]} for {ids[0]!r} and {self._header[name]} in {self.folder}: were the videos "
                    "prepared in another way (num_frames, size) than the gallery's?"
                )
        for video_id, embedding, tokens in zip(ids, embeddings, hidden_states, strict=True):
            if not (embedding.isfinite().all() and tokens.isfinite().all()):
                raise ValueError(f"the features of {video_id!r} are not finite: is the model's dtype too narrow?")


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over a model's config and weights, as hexadecimal digits."""
    config = json.dumps(model.config.to_dict(), default=str)
    essential = json.loads(config, object_hook=lambda d: {k: d[k] for k in d.keys() - BOOKKEEPING})
    digest = hashlib.sha256(json.dumps(essential, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        if is_traceable_wrapper_subclass(weight):  # of a quantized model, whose config tells how it is quantized
            weight = weight.dequantize()
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    if os.name == "posix":  # only there a folder can be flushed, which makes the new name last
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    path.touch()
    with path.open("r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
