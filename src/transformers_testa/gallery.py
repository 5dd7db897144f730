"""A gallery of embedded videos on disk: it grows shard by shard, survives a kill at any moment, and is read in parts."""

import bisect
import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel


if TYPE_CHECKING:
    from transformers_testa.baselines import Baseline


# Parts of a config that change when a model is saved or moved, and not what it computes.
BOOKKEEPING = frozenset(["_name_or_path", "architectures", "auto_map", "dtype", "transformers_version"])

INDEX, LOCK = "gallery.jsonl", "gallery.lock"

# Of a gallery that nothing was removed from: which of its embedding files counts, and the first free shard number.
BEGINNING = {"generation": 0, "first_shard": 0}

# What is the same for all videos of a gallery.
SHAPES = ("embedding_dim", "tokens_per_video", "hidden_size")

NO_SPACE = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG])


@dataclass(frozen=True)
class Damage:
    """A file of a gallery that isn't what was written: its shard, the videos that are lost, and what is wrong."""

    shard: int
    ids: list[str]
    reason: str


class Gallery:
    """Videos as a model sees them, in a folder that grows: what a search compares and what re-ranking reads.

    The folder holds one file of embeddings (float32 `[n, E]`), safetensors shards with `hidden_states [videos, N, D]`,
    and `gallery.jsonl`: one line on the model and the shapes, then one line a shard, each with its checksum. A shard
    counts once its line is complete, so a process killed at any moment leaves a whole gallery. Reading maps the files
    into memory: only what is asked for is read.

    Several processes fill a gallery together by filling one part each, galleries in `part-0`, `part-1`, ... of its
    folder; [`take_in_parts`] makes their shards its own, as does opening it for writing after they were killed.

    Args:
        folder: where the gallery is, or is to be.
        model: the model whose videos these are; a gallery of another model is refused.
        writable: whether videos are to be added, removed or repaired. A gallery has one writer at a time; leave the
            `with` block or call `close` to let the next one in. Readers see the videos that were there when they
            opened it.
        dtype: how `hidden_states` are stored: float32, bfloat16, or int8 with a float32 scale for each token; by
            default as the gallery has them, bfloat16 in a new one.
        damaged: whether to open a gallery whose files are missing or cut short, to repair it.

    Raises:
        ValueError: if the folder holds no gallery and `writable` is False, the gallery is of another model, format or
            dtype, or one of its files is missing or cut short.
        RuntimeError: if another writer has the gallery open.
    """

    FORMAT = 2
    DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

    def __init__(
        self,
        folder: str | Path,
        model: "PreTrainedModel | Baseline",
        writable: bool = False,
        dtype: torch.dtype | None = None,
        damaged: bool = False,
    ):
        if dtype not in (None, *self.DTYPES.values()):
            raise ValueError(f"dtype is {dtype}: a gallery stores torch.float32, torch.bfloat16 or torch.int8")
        self.folder = Path(folder)
        self.writable = writable
        self._model = model
        self.revision = 0
        self._index_path = self.folder / INDEX
        if not writable and not self._index_path.exists():
            raise ValueError(f"{self.folder} holds no gallery: open it with writable=True and add videos to it")
        self._header: dict[str, Any] = {"format": self.FORMAT, "model": model_fingerprint(model), **BEGINNING}
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
                if not damaged:
                    self._check_sizes()
            if writable:
                numbers = [_number(path) + 1 for path in self.folder.glob("shard-*.safetensors")]
                self._next_shard = max([self._header["first_shard"], *numbers])
                self.take_in_parts()
            stack.pop_all()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, video_id: str) -> bool:
        return video_id in self._rows

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, *exception: object) -> None:
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

    @property
    def dtype(self) -> torch.dtype:
        """How token features are stored: float32, bfloat16 or int8."""
        return self._dtype or torch.bfloat16

    def row(self, video_id: str) -> int:
        """Row of a video in `embeddings()`. Raises KeyError for a video that isn't there."""
        return self._rows[video_id]

    def embeddings(self) -> Tensor:
        """All embeddings, float32 `[n, E]`, mapped from disk.

        Raises:
            ValueError: if the gallery is empty, or videos were removed since it was opened.
        """
        if not self._rows:
            raise ValueError(f"the gallery {self.folder} holds no video yet: add some with index_videos")
        if not self._embeddings_path.exists():
            raise ValueError(f"{self._embeddings_path} is gone, as videos were removed: open {self.folder} again")
        dim = self._header["embedding_dim"]
        path, size = str(self._embeddings_path), len(self) * dim
        return torch.from_file(path, shared=False, size=size, dtype=torch.float32).view(-1, dim)

    def hidden_states(self, rows: Iterable[int]) -> Tensor:
        """Token features of these rows only, `[rows, N, D]`, in bfloat16 or float32 (which int8 becomes here).

        Raises:
            ValueError: if the shard of a row can't be read.
        """
        return _restored(self._read(rows))

    def _read(self, rows: Iterable[int]) -> dict[str, Tensor]:
        read: dict[str, list[Tensor]] = {}
        for number, of_shard in itertools.groupby(
            map(int, rows), lambda row: bisect.bisect_right(self._starts, row) - 1
        ):
            path = self.folder / self._shards[number]["file"]
            places = [row - self._starts[number] for row in of_shard]
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118
                        stored = shard.get_slice(name)
                        read.setdefault(name, []).extend(stored[place : place + 1] for place in places)
            except (SafetensorError, OSError) as error:
                ids = self._shards[number]["ids"]
                raise ValueError(
                    f"{path} is damaged, or was removed since this gallery was opened ({error}): {_mend(ids)}"
                ) from error
        return {name: torch.cat(tensors) for name, tensors in read.items()}

    def add(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> None:
        """Append videos as one shard, wholly or not at all.

        Args:
            ids: `[videos]`, none of them in the gallery.
            embeddings: `[videos, E]`.
            hidden_states: `[videos, N, D]`; N and D are the same throughout a gallery.

        Raises:
            ValueError: if the gallery isn't writable, an id is there already, or a tensor has another shape than the
                gallery's or values that are not finite.
            OSError: if the disk is full. What was added before stays.
        """
        embeddings, hidden_states = embeddings.detach().to("cpu", torch.float32), hidden_states.detach().cpu()
        self._check_addition(ids, embeddings, hidden_states)
        with self._told_if_full():
            dtype = {"dtype": str(self.dtype).removeprefix("torch.")}
            self._write_header(self._header | _shapes(embeddings, hidden_states) | dtype)
            self._append_shard(self._write_shard(ids, embeddings, hidden_states), embeddings)

    def remove(self, ids: Iterable[str]) -> None:
        """Remove videos and what is stored of them; all at once is fastest. The rows of those that follow move up.

        Killed at any moment, it has removed all of them or none.

        Raises:
            ValueError: if the gallery isn't writable, an id isn't there, or what would stay of a shard is damaged.
            OSError: if the disk is full. Then all videos stay.
        """
        self._check_writable()
        leaving = set(ids)
        if unknown := sorted(leaving - self._rows.keys()):
            raise ValueError(f"id {unknown[0]!r} is not in the gallery {self.folder}")

        def staying() -> Iterator[tuple[dict, bytes]]:
            with self._reading_embeddings() as rows_of:
                for number, shard in enumerate(self._shards):
                    places = [place for place, video_id in enumerate(shard["ids"]) if video_id not in leaving]
                    if len(places) == len(shard["ids"]):
                        yield shard, rows_of(number)
                    elif places:
                        yield self._shrunk(number, places, rows_of(number))

        if leaving:
            self._rewrite(staying())

    def replace(self, shard: int, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> None:
        """Write a damaged shard anew.

        Args:
            shard: its number, as [`find_damage`] tells it.
            ids: `[videos]`, those of the shard's videos that could be embedded again; the others are removed.
            embeddings: `[videos, E]`.
            hidden_states: `[videos, N, D]`.

        Raises:
            ValueError: if the gallery isn't writable, or the features don't fit it.
            OSError: if the disk is full. Then the damaged shard stays.
        """
        embeddings, hidden_states = embeddings.detach().to("cpu", torch.float32), hidden_states.detach().cpu()
        self._check_features(ids, embeddings, hidden_states)

        def mended() -> Iterator[tuple[dict, bytes]]:
            with self._reading_embeddings() as rows_of:
                for number, entry in enumerate(self._shards):
                    if number != shard:
                        yield entry, rows_of(number)
                    else:
                        yield self._write_shard(ids, embeddings, hidden_states), _bytes(embeddings)

        self._rewrite(mended())

    def find_damage(self) -> Iterator[Damage]:
        """Read everything and compare it with its checksums."""
        with self._reading_embeddings() as rows_of:
            for number, shard in enumerate(self._shards):
                reasons = []
                path = self.folder / shard["file"]
                if not path.exists():
                    reasons.append(f"{path} is missing")
                elif _checksum(path) != shard["sha256"]:
                    reasons.append(f"{path} is damaged (its checksum has changed)")
                if hashlib.sha256(rows_of(number)).hexdigest() != shard["embeddings_sha256"]:
                    reasons.append(f"{self._embeddings_path} is damaged at row {self._starts[number]}")
                if reasons:
                    yield Damage(number, list(shard["ids"]), " and ".join(reasons))

    def verify(self) -> None:
        """Read everything and compare it with its checksums. Raises ValueError naming all damaged files."""
        if damages := list(self.find_damage()):
            raise ValueError("; ".join(f"{damage.reason}: {_mend(damage.ids)}" for damage in damages))

    def take_in_parts(self) -> None:
        """Make the shards of the parts that several processes filled this gallery's own; nothing is copied.

        Raises:
            ValueError: if the gallery isn't writable, or a part is of another model or dtype.
            RuntimeError: if a part is still being written.
        """
        self._check_writable()
        for path in sorted(self.folder.glob(f"part-*/{INDEX}"), key=_number):
            with Gallery(path.parent, self._model, writable=True, dtype=self._dtype) as part, self._told_if_full():
                self._check_shapes({name: part._header[name] for name in SHAPES}, path.parent.name)
                self._write_header(self._header | part._header | {name: self._header[name] for name in BEGINNING})
                for start, shard in zip(part._starts, part._shards, strict=True):
                    if not any(video_id in self for video_id in shard["ids"]):
                        rows = part.embeddings()[start : start + len(shard["ids"])]
                        self._append_shard(shard | {"file": f"{path.parent.name}/{shard['file']}"}, rows)
                path.unlink()
        self._delete_leftovers()

    def next_part(self) -> int:
        """Return the number of the first part that this gallery doesn't have yet."""
        return max((_number(folder) + 1 for folder in self.folder.glob("part-*")), default=0)

    # Files

    @property
    def _embeddings_path(self) -> Path:
        return self.folder / _embeddings_file(self._header)

    def _acquire_lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"{self.folder} is being written by another process: wait for it, or close it"
            ) from None
        return lock

    def _load(self) -> None:
        # What follows the last line feed is an entry that was cut off while it was written; the next one replaces it.
        lines = self._index_path.read_bytes().split(b"\n")[:-1]
        self._index_bytes = sum(len(line) + 1 for line in lines)
        try:
            if not lines:
                raise _DamagedLineError("no line is whole")
            if json.loads(lines[0]).get("format") == 1:
                raise ValueError(
                    f"{self.folder} has format 1, which an earlier version wrote, and this one reads {self.FORMAT}: index "
                    "the videos again, into a new folder"
                )
            header, *entries = map(_read_line, lines)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, _DamagedLineError) as error:
            raise ValueError(
                f"{self._index_path} is damaged ({error}): restore it from a copy, or index the videos again, into a "
                "new folder"
            ) from error
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

    def _check_sizes(self) -> None:
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                raise ValueError(f"{path} is missing or cut short: {_mend(shard['ids'])}")
        needed = len(self) * self._header.get("embedding_dim", 0) * 4
        if needed and (not self._embeddings_path.exists() or self._embeddings_path.stat().st_size < needed):
            raise ValueError(f"{self._embeddings_path} is missing or cut short: {_mend(self.ids)}")

    def _append(self, entry: dict) -> None:
        start = len(self)
        self._starts.append(start)
        self._shards.append(entry)
        self._rows.update({video_id: start + place for place, video_id in enumerate(entry["ids"])})
        self.revision += 1

    def _write_header(self, header: dict) -> None:
        if not self._index_path.exists():
            line = _line(header)
            with _written_whole(self._index_path) as file:
                file.write(line)
            self._index_bytes = len(line)
        self._header, self._dtype = header, self.DTYPES[header["dtype"]]

    def _write_shard(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> dict:
        return self._write_tensors(ids, embeddings, _stored(hidden_states, self.dtype))

    def _write_tensors(self, ids: list[str], embeddings: Tensor, tensors: dict[str, Tensor]) -> dict:
        """Write a shard's file and return its entry, which makes it count."""
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        name = f"shard-{self._next_shard:05d}.safetensors"
        self._next_shard += 1
        with _written_whole(self.folder / name) as file:
            file.write(content)
        return {
            "file": name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "embeddings_sha256": hashlib.sha256(_bytes(embeddings)).hexdigest(),
            "ids": list(ids),
        }

    def _append_shard(self, entry: dict, embeddings: Tensor) -> None:
        line = _line(entry)
        _write_at(self._embeddings_path, len(self) * embeddings.shape[1] * 4, _bytes(embeddings))
        _write_at(self._index_path, self._index_bytes, line)
        self._index_bytes += len(line)
        self._append(entry)

    @contextlib.contextmanager
    def _reading_embeddings(self) -> Iterator[Callable[[int], bytes]]:
        """Give a function that reads the embeddings of a shard; what is missing of the file reads as nothing."""
        size = self._header.get("embedding_dim", 0) * 4
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(self._embeddings_path.open("rb")) if self._embeddings_path.exists() else None

            def rows_of(number: int) -> bytes:
                if file is None:
                    return b""
                file.seek(self._starts[number] * size)
                return file.read(len(self._shards[number]["ids"]) * size)

            yield rows_of

    def _shrunk(self, number: int, places: list[int], rows: bytes) -> tuple[dict, bytes]:
        """Write those videos of a shard that stay into a new one, as they are stored."""
        shard, path = self._shards[number], self.folder / self._shards[number]["file"]
        # Without this, damage would get a checksum of its own.
        if (_checksum(path), hashlib.sha256(rows).hexdigest()) != (shard["sha256"], shard["embeddings_sha256"]):
            raise ValueError(f"{path} is damaged: {_mend(shard['ids'])}, then remove videos")
        kept = torch.frombuffer(bytearray(rows), dtype=torch.float32).view(len(shard["ids"]), -1)[places]
        tensors = self._read(self._starts[number] + place for place in places)
        return self._write_tensors([shard["ids"][place] for place in places], kept, tensors), _bytes(kept)

    def _rewrite(self, shards: Iterator[tuple[dict, bytes]]) -> None:
        """Let the gallery be of these shards and their embeddings, from one moment to the next."""
        size = self._header["embedding_dim"] * 4
        with self._told_if_full():
            header = self._header | {"generation": self._header["generation"] + 1}
            entries, start = [], 0
            with _written_whole(self.folder / _embeddings_file(header)) as file:
                for entry, rows in shards:
                    file.seek(start)
                    file.write(rows)
                    entries.append(entry)
                    start += len(entry["ids"]) * size
                file.truncate(start)
            header["first_shard"] = self._next_shard
            lines = [_line(header), *map(_line, entries)]
            with _written_whole(self._index_path) as file:
                file.writelines(lines)
        self._header, self._rows, self._shards, self._starts = header, {}, [], []
        self._index_bytes = sum(map(len, lines))
        self.revision += 1
        for entry in entries:
            self._append(entry)
        self._delete_leftovers()

    def _delete_leftovers(self) -> None:
        """Delete what is not, or no longer, in the gallery: of a writer that was killed, or of removed videos."""
        wanted = {self.folder / shard["file"] for shard in self._shards} | {self._embeddings_path}
        names = ("shard-*.safetensors", "embeddings-*.bin", f"{INDEX}.tmp")
        # A part that has an index is not taken in yet.
        parts = [part for part in self.folder.glob("part-*") if not (part / INDEX).exists()]
        patterns = [name + end for name in names for end in ("", ".tmp")]
        for path in {
            path for place in (self.folder, *parts) for name in patterns for path in place.glob(name)
        } - wanted:
            path.unlink()

    @contextlib.contextmanager
    def _told_if_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            self._delete_leftovers()
            raise OSError(
                error.errno,
                f"{self.folder} can't grow ({error.strerror}): its {len(self)} videos are safe; make room, and run the "
                "same again",
            ) from error

    # Checks

    def _check_writable(self) -> None:
        if not self.writable:
            raise ValueError(f"{self.folder} is open for reading: open it with writable=True to change it")

    def _check_addition(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> None:
        seen = set()
        for video_id in ids:
            if not isinstance(video_id, str):
                raise ValueError(f"id {video_id!r} is a {type(video_id).__name__}: ids are strings")
            if video_id in self or video_id in seen:
                raise ValueError(f"id {video_id!r} is in the gallery {self.folder} already")
            seen.add(video_id)
        self._check_features(ids, embeddings, hidden_states)

    def _check_features(self, ids: list[str], embeddings: Tensor, hidden_states: Tensor) -> None:
        self._check_writable()
        if not ids or len(ids) != len(embeddings) or len(ids) != len(hidden_states):
            raise ValueError(
                f"{len(ids)} ids, {len(embeddings)} embeddings, {len(hidden_states)} hidden_states: one each"
            )
        if (embeddings.ndim, hidden_states.ndim) != (2, 3):
            raise ValueError(
                f"embeddings must be [videos, E] and hidden_states [videos, N, D], got {list(embeddings.shape)} and "
                f"{list(hidden_states.shape)}"
            )
        self._check_shapes(_shapes(embeddings, hidden_states), repr(ids[0]))
        for video_id, embedding, tokens in zip(ids, embeddings, hidden_states, strict=True):
            if not (embedding.isfinite().all() and tokens.isfinite().all()):
                raise ValueError(f"the features of {video_id!r} are not finite: is the model's dtype too narrow?")

    def _check_shapes(self, shapes: dict[str, int], what: str) -> None:
        for name, size in shapes.items():
            if size != self._header.get(name, size):
                raise ValueError(
                    f"{name} is {size} for {what} and {self._header[name]} in {self.folder}: were the videos prepared in "
                    "another way (num_frames, size) than the gallery's?"
                )


def model_fingerprint(model: "PreTrainedModel | Baseline") -> str:
    """SHA-256 over a model's config and weights, as hexadecimal digits."""
    config = json.dumps(model.config.to_dict(), default=str)
    essential = json.loads(config, object_hook=lambda d: {k: d[k] for k in d.keys() - BOOKKEEPING})
    digest = hashlib.sha256(json.dumps(essential, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        if is_traceable_wrapper_subclass(weight):  # of a quantized model, whose config tells how it is quantized
            weight = weight.dequantize()  # type: ignore[attr-defined]  # as all of torchao's have
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def bytes_per_video(num_tokens: int, hidden_size: int, embedding_dim: int, dtype: torch.dtype) -> int:
    """Return what a video takes on disk, but for the few hundred bytes of its id and checksums."""
    scale = 4 if dtype == torch.int8 else 0
    return num_tokens * (hidden_size * dtype.itemsize + scale) + embedding_dim * 4


def _stored(hidden_states: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Token features `[videos, N, D]` as a shard has them; int8 with the scale `[videos, N, 1]` of each token."""
    if dtype != torch.int8:
        return {"hidden_states": hidden_states.to(dtype)}
    largest = hidden_states.float().abs().amax(dim=-1, keepdim=True)
    scales = largest.where(largest > 0, 127) / 127
    return {"hidden_states": (hidden_states.float() / scales).round().to(torch.int8), "scales": scales}


def _restored(tensors: dict[str, Tensor]) -> Tensor:
    if "scales" not in tensors:
        return tensors["hidden_states"]
    return tensors["hidden_states"] * tensors["scales"]


def _shapes(embeddings: Tensor, hidden_states: Tensor) -> dict[str, int]:
    return dict(zip(SHAPES, (embeddings.shape[-1], *hidden_states.shape[-2:]), strict=True))


def _bytes(embeddings: Tensor) -> bytes:
    return embeddings.contiguous().numpy().tobytes()


def _mend(ids: list[str]) -> str:
    return (
        f"repair the gallery (run_retrieval.py --repair), or restore the file from a copy ({ids[0]!r} is the first of "
        f"{len(ids)} videos in it)"
    )


def _embeddings_file(header: dict) -> str:
    return f"embeddings-{header['generation']}.bin"


def _number(path: Path) -> int:
    """The number in the name of a shard, or of a part or a file in it."""
    name = path.name if path.name != INDEX else path.parent.name
    return int(re.findall(r"-(\d+)", name)[0])


class _DamagedLineError(Exception):
    pass


def _line(entry: dict) -> bytes:
    checksum = zlib.crc32(json.dumps(entry).encode())
    return (json.dumps({**entry, "crc32": checksum}) + "\n").encode()


def _read_line(line: bytes) -> dict:
    entry = json.loads(line)
    checksum = entry.pop("crc32", None)
    if checksum != zlib.crc32(json.dumps(entry).encode()):
        raise _DamagedLineError("the checksum of a line has changed")
    return entry


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that is there as a whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        yield file
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
