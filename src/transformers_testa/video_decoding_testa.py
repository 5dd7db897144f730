"""Frames of a video file: which ones, where they are in the file, and how to decode only those with PyAV."""

import http.client
import io
import itertools
import os
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeGuard

import av
import numpy as np
from av.buffer import Buffer
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from transformers.image_utils import PILImageResampling
from transformers.utils import logging
from transformers.video_utils import VideoMetadata


logger = logging.get_logger(__name__)

RANDOM_FRAME_SAMPLING = ("random", "head_tail", "jitter")
FRAME_SAMPLING = ("uniform", "legacy_uniform", "middle", *RANDOM_FRAME_SAMPLING)

# Formats that hold their frames themselves: a playlist or an image pattern could name any other file.
SELF_CONTAINED_FORMATS = (
    "3g2,3gp,asf,avi,dv,flv,gif,h261,h263,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp4,mpeg,mpegts,mpegvideo,mxf,nut,"
    "obu,ogg,rm,webm,wtv"
)
DOWNLOAD_TIMEOUT_SECONDS = 60
DOWNLOAD_CHUNK_BYTES = 2**20
TIME_TOLERANCE_SECONDS = 1e-6

DECODING_TIME_LIMIT_SECONDS = 600.0
DECODING_MEMORY_LIMIT_BYTES = 4 * 2**30
# What a decoder holds at most: 16 reference pictures, the one that it works on, the one that it gives.
PICTURES_OF_A_DECODER, PICTURES_OF_AN_INTRA_DECODER = 18, 2
USUAL_BYTES_PER_PIXEL, LARGEST_BYTES_PER_PIXEL = 4, 8
# What Python keeps of a packet or frame while the frames are counted.
BYTES_PER_COUNTED_FRAME = 400
# The frames themselves, while they are put together to one array.
COPIES_OF_THE_RESULT = 3
MAX_SAMPLED_FRAMES = 10**6
MAX_INT = 2**31 - 1

# More threads than this hardly speed up one video, and each has a decoder with pictures of its own.
MAX_THREADS_PER_VIDEO = 16

INTERPOLATION = {
    PILImageResampling.NEAREST: "POINT",
    PILImageResampling.BOX: "AREA",
    PILImageResampling.BILINEAR: "BILINEAR",
    PILImageResampling.BICUBIC: "BICUBIC",
    PILImageResampling.LANCZOS: "LANCZOS",
}

VideoSource = str | Path | bytes


class VideoDecodingError(ValueError):
    """A video that cannot be decoded as asked. The message names the video and says why."""


# Which frames


def sample_frame_indices(
    total_frames: int, num_frames: int, frame_sampling: str = "uniform", seed: int | None = None
) -> np.ndarray:
    """Choose `num_frames` of `total_frames` frames, in ascending order.

    Args:
        total_frames: number n of frames to choose from, at least 1. With fewer than `num_frames`, frames repeat.
        num_frames: number T of frames to choose, at least 1.
        frame_sampling: one of
            - "uniform": `floor(i * n / T)`;
            - "legacy_uniform": `i * floor(n / T)`, which the released weights were trained with: it never reaches the
              end of a video unless T divides n, and stays at frame 0 where n < T;
            - "middle": the centre of each of T equal segments;
            - "random": T draws without replacement;
            - "head_tail": as many draws from the first half of the frames as from the second (one more for odd T);
            - "jitter": one draw within each of T equal segments.
        seed: makes the last three repeatable; None draws anew at every call.

    Returns:
        int64 array `[T]` of indices in `[0, total_frames)`.

    Raises:
        ValueError: for an unknown `frame_sampling` or counts below 1.
    """
    if total_frames < 1 or num_frames < 1:
        raise ValueError(f"total_frames={total_frames} and num_frames={num_frames} must both be at least 1.")
    steps = np.arange(num_frames)
    segment_starts = steps * total_frames // num_frames
    if frame_sampling == "uniform":
        return segment_starts
    if frame_sampling == "legacy_uniform":
        return steps * (total_frames // num_frames)
    if frame_sampling == "middle":
        return (2 * steps + 1) * total_frames // (2 * num_frames)

    generator = np.random.default_rng(seed)
    if frame_sampling == "jitter":
        segment_ends = (steps + 1) * total_frames // num_frames
        return generator.integers(segment_starts, np.maximum(segment_ends, segment_starts + 1))
    if frame_sampling == "random":
        return _draw(generator, 0, total_frames, num_frames)
    if frame_sampling == "head_tail":
        half = total_frames // 2
        head = _draw(generator, 0, max(half, 1), num_frames - num_frames // 2)
        return np.concatenate([head, _draw(generator, half, total_frames, num_frames // 2)])
    raise ValueError(f"frame_sampling={frame_sampling!r} is unknown. Use one of {', '.join(FRAME_SAMPLING)}.")


def _draw(generator: np.random.Generator, first: int, stop: int, count: int) -> np.ndarray:
    return np.sort(first + generator.choice(stop - first, count, replace=count > stop - first))


@dataclass(frozen=True)
class Timeline:
    """When the frames of one video are shown: `times [N]` and `duration` in seconds from its first frame."""

    name: str
    times: np.ndarray
    duration: float


@dataclass(frozen=True)
class FrameSelection:
    """Which frames of one video are wanted: `num_frames` of them, or `fps` a second, or all where both are None.

    `start` and `end` (seconds) restrict the choice to a clip, from the frame on screen at `start`.
    """

    num_frames: int | None = None
    fps: float | None = None
    frame_sampling: str = "uniform"
    start: float | None = None
    end: float | None = None
    seed: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.frame_sampling not in FRAME_SAMPLING:
            raise ValueError(
                f"frame_sampling={self.frame_sampling!r} is unknown. Use one of {', '.join(FRAME_SAMPLING)}."
            )
        for name in ("num_frames", "fps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        if self.start is not None and self.start < 0:
            raise ValueError(f"start={self.start} must be at least 0 seconds.")
        if self.end is not None and self.end <= (self.start or 0):
            raise ValueError(f"end={self.end} must be later than start={self.start or 0} seconds.")

    def indices(self, timeline: Timeline) -> np.ndarray:
        """Return the indices `[T]` of the wanted frames.

        Raises:
            VideoDecodingError: where the clip starts after the video ends, or `strict` and it holds too few frames.
        """
        start = self.start or 0.0
        end = timeline.duration if self.end is None else min(self.end, timeline.duration)
        if start >= timeline.duration:
            raise VideoDecodingError(
                f"{timeline.name} lasts {timeline.duration:.2f} seconds, so no clip can start at start={start}."
            )
        first = int(_frames_shown_at(timeline, start))
        stop = max(first + 1, int(np.searchsorted(timeline.times, end - TIME_TOLERANCE_SECONDS)))
        if self.fps is not None:
            count = max(1, int((end - start) * self.fps + TIME_TOLERANCE_SECONDS))
            if count > MAX_SAMPLED_FRAMES:
                raise VideoDecodingError(
                    f"{timeline.name} lasts {timeline.duration:.2f} seconds, of which fps={self.fps} would take {count} "
                    f"frames, more than {MAX_SAMPLED_FRAMES}. Set an end, or num_frames instead."
                )
            return _frames_shown_at(timeline, start + np.arange(count) / self.fps)
        if self.num_frames is None:
            return np.arange(first, stop)
        if self.strict and stop - first < self.num_frames:
            raise VideoDecodingError(
                f"{timeline.name} has {stop - first} frames to sample from, fewer than num_frames={self.num_frames}. "
                "Ask for fewer frames, or pass strict=False to repeat some."
            )
        return first + sample_frame_indices(stop - first, self.num_frames, self.frame_sampling, self.seed)


def _frames_shown_at(timeline: Timeline, seconds: float | np.ndarray) -> np.ndarray:
    return np.searchsorted(timeline.times, seconds + TIME_TOLERANCE_SECONDS, side="right") - 1


# Where they are in a file


@dataclass(frozen=True)
class Run:
    """What one decoder reads in one go: where to seek, the size of the key packet that it starts from, the timestamps
    of all frames from there to the last one that is wanted, and of those that are."""

    seek_to: int
    key_size: int
    pts: list[int]
    wanted: set[int]


@dataclass(frozen=True)
class PacketIndex:
    """For each frame in the order shown: its timestamp, the key packet decoding has to start from, where to seek.

    `is_reordered`: some frame is shown before another that precedes it in the file.
    """

    pts: np.ndarray
    key_pts: np.ndarray
    key_size: np.ndarray
    seek_to: np.ndarray
    is_reordered: bool

    @classmethod
    def from_packets(cls, packets: Iterable[av.Packet]) -> "PacketIndex | None":
        """Index packets in decoding order; None where their timestamps do not tell the order of the frames."""
        rows = [(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard, packet.size) for packet in packets]
        if not rows or any(row[0] is None for row in rows):
            return None
        pts = np.array([row[0] for row in rows], dtype=np.int64)
        # Matroska leaves the first decoding timestamps out; seeking goes by the presentation timestamp there.
        seek_to = np.array(
            [at if row[1] is None else min(at, row[1]) for at, row in zip(pts.tolist(), rows, strict=True)],
            dtype=np.int64,
        )
        decoding_times = [row[1] for row in rows if row[1] is not None]
        is_key, is_discarded = np.array([row[2:4] for row in rows], dtype=bool).T
        size = np.array([row[4] for row in rows])
        if not is_key[0] or len(np.unique(pts)) < len(pts) or (np.diff(decoding_times) <= 0).any():
            return None

        # A frame shown before the key frame it follows in the file (open GOP) may refer to the GOP before that key.
        keys = np.flatnonzero(is_key)
        key_number = np.cumsum(is_key) - 1
        while (leading := (pts < pts[keys[key_number]]) & (key_number > 0)).any():
            key_number[leading] -= 1
        key = keys[key_number]
        shown = np.flatnonzero(~is_discarded)
        shown = shown[np.argsort(pts[shown])]
        if (pts < pts[key]).any() or not len(shown):
            return None
        is_reordered = bool((np.diff(pts) < 0).any())
        return cls(pts[shown], pts[key[shown]], size[key[shown]], seek_to[key[shown]], is_reordered)

    def runs(self, wanted: np.ndarray, threads: int) -> list[Run]:
        """Cut the `wanted` frames (ascending) where it pays to seek, and where several threads can share the work.

        It pays where a key frame lies between two wanted frames and others before it, which are then left out. At
        other key frames a decoder reads on, until it has a thread's share of the frames.
        """
        keys = np.searchsorted(self.pts, self.key_pts[wanted])
        previous = np.concatenate([[-1], wanted[:-1]])
        leaves_out = keys > previous + 1
        decoded = np.cumsum(wanted - np.maximum(keys - 1, previous))
        share = decoded[-1] / threads
        starts: list[int] = []
        decoded_before = 0
        for position in np.flatnonzero(np.diff(keys, prepend=-1)).tolist():
            if not starts or leaves_out[position] or decoded[position] - decoded_before > share:
                starts.append(position)
                decoded_before = decoded[position - 1] if position else 0
        return [
            Run(
                seek_to=int(self.seek_to[run[0]]),
                key_size=int(self.key_size[run[0]]),
                pts=self.pts[key : run[-1] + 1].tolist(),
                wanted=set(self.pts[run].tolist()),
            )
            for key, run in zip(keys[starts], np.split(wanted, starts[1:]), strict=True)
        ]


class _UnexpectedFrameError(Exception):
    """Decoding gave another frame than the packet index announced."""


def _decode(stream: av.VideoStream, packets: Iterable[av.Packet], name: str) -> Iterator[av.VideoFrame]:
    for packet in itertools.chain(packets, [None]):
        try:
            yield from stream.decode(packet)
        except av.InvalidDataError:
            logger.warning_once(f"{name} has damaged packets, which are skipped.")


def _frames_of_run(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: Iterable[av.Packet],
    run: Run,
    is_reordered: bool,
) -> Iterator[av.VideoFrame]:
    """Yield the wanted frames of a run, decoding as little of the `packets` as they need."""
    # Some files hold frames in another order than they are shown and number them as if they did not (H.264 in AVI).
    # This is found out when they are decoded, if nothing is left out.
    may_leave_out = is_reordered or not stream.codec_context.has_b_frames
    # H.264 marks frames that no other refers to, which the decoder can drop. HEVC does so within a sub-layer only.
    may_drop = may_leave_out and stream.codec_context.name == "h264"
    # In MP4 files FFmpeg looks for the time when a frame is shown: that of decoding leads to the key frame before.
    container.seek(run.pts[0] if "mp4" in container.format.name else run.seek_to, stream=stream)
    # MPEG program streams may renumber packets after a seek: a timestamp alone does not tell the key packet.
    key = (run.pts[0], run.key_size)
    packets = itertools.dropwhile(lambda packet: (packet.pts, packet.size) != key, packets)
    certain = set()

    def needed_packets() -> Iterator[av.Packet | None]:
        missing = set(run.wanted)
        for packet in packets:
            is_certain = not may_drop or packet.is_keyframe or packet.pts in run.wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_certain else "NONREF"
            if is_certain:
                certain.add(packet.pts)
            yield packet
            missing.discard(packet.pts)
            if may_leave_out and not missing:
                break
        yield None

    expected = iter(run.pts)
    for frame in itertools.chain.from_iterable(map(stream.decode, needed_packets())):
        # What comes before the key frame may refer to frames before the seek.
        if frame.pts is not None and frame.pts < run.pts[0]:
            continue
        if frame.pts != next((pts for pts in expected if pts == frame.pts or pts in certain), None):
            raise _UnexpectedFrameError
        if frame.pts in run.wanted:
            yield frame
        if frame.pts == run.pts[-1]:
            return
    raise _UnexpectedFrameError


def _frames_by_counting(frames: Iterable[av.VideoFrame], wanted: np.ndarray) -> Iterator[av.VideoFrame]:
    remaining = iter(wanted)
    number = next(remaining, None)
    for position, frame in enumerate(frames):
        if position == number:
            yield frame
            number = next(remaining, None)
            if number is None:
                return


# From a file to pixels


@dataclass
class DecodedVideoMetadata(VideoMetadata):
    """Metadata of a decoded file; `timestamps` are those of its frames, also where the frame rate varies."""

    frame_times: list[float] = field(default_factory=list)

    @property
    def timestamps(self) -> list[float]:
        return self.frame_times


@dataclass(frozen=True)
class VideoReader:
    """Decodes the selected frames of one file and scales them while converting to RGB.

    Args:
        source: path, http(s) URL, or the bytes of a file. No other file or address is opened, whatever the file says.
        target_size: function of (height, width) of an upright frame to the (height, width) wanted.
        interpolation: PyAV's name of the scaling filter.
        threads: how many may decode at a time. Where the wanted frames lie between several key frames, each thread
            decodes from a key frame of its own; otherwise the codec's own threads are used.
        time_limit: seconds after which reading is given up; the packet that is being decoded then is finished.
        memory_limit: bytes that reading may take. What a file would take is estimated from the size of its pictures and
            the number of its frames, and refused before it is taken.
    """

    source: VideoSource
    target_size: Callable[[int, int], tuple[int, int]]
    interpolation: str = "BICUBIC"
    threads: int = 1
    time_limit: float = DECODING_TIME_LIMIT_SECONDS
    memory_limit: float = DECODING_MEMORY_LIMIT_BYTES

    @property
    def name(self) -> str:
        return f"the video of {len(self.source)} bytes" if isinstance(self.source, bytes) else str(self.source)

    def read(self, selection: FrameSelection) -> tuple[np.ndarray, VideoMetadata]:
        """Return uint8 frames `[T, H, W, 3]` and their metadata.

        Raises:
            VideoDecodingError: where the file cannot be read as a video, does not hold what was selected, or takes more
                time or memory than it may.
        """
        deadline = time.monotonic() + self.time_limit
        try:
            data = self._download(self.source, deadline) if _is_url(self.source) else self.source
            try:
                return self._read_indexed(data, selection, deadline)
            except (_UnexpectedFrameError, av.InvalidDataError):
                logger.info(f"{self.name}: frames and packets disagree; decoding from the start.")
            return self._read_sequentially(data, selection, deadline)
        except (av.FFmpegError, OSError, http.client.HTTPException) as error:
            # FFmpeg does not say why it was interrupted.
            self._check_time(deadline)
            raise VideoDecodingError(f"{self.name} cannot be read as a video: {error}") from error

    def _check_time(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise VideoDecodingError(
                f"{self.name} could not be read within {self.time_limit} seconds. Raise decoding_time_limit if it is "
                "only long."
            )

    def _check_memory(self, needed: float, what: str) -> None:
        if needed > self.memory_limit:
            raise VideoDecodingError(
                f"{self.name} has {what}, for which {needed / 2**20:.0f} MiB of memory are needed; the limit is "
                f"{self.memory_limit / 2**20:.0f} MiB. Raise decoding_memory_limit if this is no mistake of the file."
            )

    def _download(self, address: str, deadline: float) -> bytes:
        try:
            request = urllib.request.Request(address)
        except ValueError as error:
            raise VideoDecodingError(f"{self.name} is no address: {error}") from error
        opener = urllib.request.build_opener(_WebRedirects)
        data = bytearray()
        with opener.open(request, timeout=min(DOWNLOAD_TIMEOUT_SECONDS, self.time_limit)) as response:
            while chunk := response.read1(DOWNLOAD_CHUNK_BYTES):
                data += chunk
                self._check_time(deadline)
                self._check_memory(2 * len(data), f"{len(data)} bytes or more")
        return bytes(data)

    def _open(self, data: VideoSource, deadline: float) -> av.container.InputContainer:
        file: _TimedBytes | str
        if isinstance(data, bytes):
            file = _TimedBytes(data, deadline)
        else:
            file = f"file:{os.fspath(data)}"
            # Whoever opens a pipe or a device may wait forever.
            if not stat.S_ISREG(os.stat(data).st_mode):
                raise VideoDecodingError(f"{self.name} is no file: a folder, a pipe or a device is not opened.")
        largest_picture = self.memory_limit / USUAL_BYTES_PER_PIXEL
        return av.open(
            file,
            mode="r",
            # For the decoders with which FFmpeg looks into the streams, each at one picture.
            options={"max_pixels": str(int(min(largest_picture, MAX_INT)))},
            container_options={"protocol_whitelist": "file", "format_whitelist": SELF_CONTAINED_FORMATS},
            metadata_errors="replace",
            timeout=max(0.0, deadline - time.monotonic()),
        )

    def _video_stream(self, container: av.container.InputContainer, threads: int, decoders: int = 1) -> av.VideoStream:
        """Return the video stream, its decoder set to `threads`, and to its share of the memory for `decoders`."""
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise VideoDecodingError(f"{self.name} has no video stream.")
        codec = streams[0].codec_context
        if codec is None:
            raise VideoDecodingError(f"{self.name} is encoded with a codec that PyAV cannot decode.")
        needed = _bytes_per_pixel(codec, threads)
        self._check_memory(codec.width * codec.height * needed, f"frames of {codec.width}×{codec.height} pixels")
        streams[0].thread_type = "AUTO"
        codec.thread_count = threads
        # The stream itself may say another size than the header.
        codec.options = {"max_pixels": str(int(min(self.memory_limit / (decoders * needed), MAX_INT)))}
        return streams[0]

    def _packets(
        self, container: av.container.InputContainer, stream: av.VideoStream, deadline: float
    ) -> Iterator[av.Packet]:
        packets = container.demux(stream)
        for number in itertools.count():
            try:
                packet = next(packets)
            # After the last packet PyAV looks for the streams that appeared while it read, and fails to find them.
            except (StopIteration, IndexError):
                return
            self._check_time(deadline)
            self._check_memory(number * BYTES_PER_COUNTED_FRAME, f"{number} frames or more")
            # An empty packet would end the decoding: PyAV takes it for the flush after the last one.
            if packet.size:
                yield packet

    def _read_indexed(
        self, data: VideoSource, selection: FrameSelection, deadline: float
    ) -> tuple[np.ndarray, VideoMetadata]:
        threads = min(self.threads, MAX_THREADS_PER_VIDEO)
        with self._open(data, deadline) as container:
            stream = self._video_stream(container, 1)
            index = PacketIndex.from_packets(self._packets(container, stream, deadline))
            self._check_complete(container, stream)
            if index is None:
                raise _UnexpectedFrameError
            timeline = self._timeline(list(index.pts), stream)
            codec = stream.codec_context
            affordable = self.memory_limit // max(1, codec.width * codec.height * _bytes_per_pixel(codec, 1))
        indices = selection.indices(timeline)
        wanted = np.unique(indices)
        runs = index.runs(wanted, threads)
        decoders = int(min(threads, len(runs), affordable))
        pixels: list[list[np.ndarray]] = [[] for _ in runs]
        # Whoever is free takes the next run, as they differ in length.
        waiting = iter(enumerate(runs))

        def decode() -> None:
            with self._open(data, deadline) as container:
                stream = self._video_stream(container, threads // decoders, decoders)
                for number, run in waiting:
                    packets = self._packets(container, stream, deadline)
                    frames = _frames_of_run(container, stream, packets, run, index.is_reordered)
                    pixels[number] = list(self._to_rgb(frames, len(indices)))

        with ThreadPoolExecutor(decoders) as pool:
            for decoder in [pool.submit(decode) for _ in range(decoders)]:
                decoder.result()
        return self._finish(list(itertools.chain.from_iterable(pixels)), wanted, indices, timeline)

    def _read_sequentially(
        self, data: VideoSource, selection: FrameSelection, deadline: float
    ) -> tuple[np.ndarray, VideoMetadata]:
        """Decode twice from the start, to count the frames and to fetch the wanted ones.

        For files whose packets do not tell their frames: timestamps missing (raw streams), repeated or out of order,
        hidden or damaged packets.
        """
        with self._open(data, deadline) as container:
            stream = self._video_stream(container, self.threads)
            packets = self._packets(container, stream, deadline)
            pts = [frame.pts for frame in _decode(stream, packets, self.name)]
            if not pts:
                # FFmpeg forgets the size of pictures that are larger than it may decode.
                too_large = "" if stream.codec_context.width else " with this decoding_memory_limit"
                raise VideoDecodingError(f"{self.name} holds no frame that can be decoded{too_large}.")
            timeline = self._timeline(pts, stream)
        indices = selection.indices(timeline)
        wanted = np.unique(indices)
        with self._open(data, deadline) as container:
            stream = self._video_stream(container, self.threads)
            frames = _decode(stream, self._packets(container, stream, deadline), self.name)
            pixels = list(self._to_rgb(_frames_by_counting(frames, wanted), len(indices)))
        return self._finish(pixels, wanted, indices, timeline)

    def _check_complete(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        missing = sum(entry.pos + entry.size > container.size for entry in stream.index_entries)
        if missing:
            raise VideoDecodingError(
                f"{self.name} is cut short: its index lists {len(stream.index_entries)} frames, and {missing} of them "
                "lie beyond the end of the file. Copy or download it again."
            )

    def _timeline(self, pts: list[int | None], stream: av.VideoStream) -> Timeline:
        rate = float(stream.average_rate or 25)
        if None in pts or stream.time_base is None:
            times = np.arange(len(pts)) / rate
        else:
            ticks = np.sort(np.array(pts, dtype=np.int64))
            times = (ticks - ticks[0]) * float(stream.time_base)
        last_frame_lasts = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / rate
        return Timeline(self.name, times, float(times[-1] + last_frame_lasts))

    def _finish(
        self, frames: list[np.ndarray], wanted: np.ndarray, indices: np.ndarray, timeline: Timeline
    ) -> tuple[np.ndarray, VideoMetadata]:
        pixels = np.stack(frames)
        metadata = DecodedVideoMetadata(
            total_num_frames=len(timeline.times),
            fps=len(timeline.times) / timeline.duration,
            height=pixels.shape[1],
            width=pixels.shape[2],
            duration=timeline.duration,
            video_backend="pyav",
            frames_indices=indices.tolist(),
            frame_times=timeline.times[indices].tolist(),
        )
        return pixels[np.searchsorted(wanted, indices)], metadata

    def _to_rgb(self, frames: Iterator[av.VideoFrame], num_frames: int) -> Iterator[np.ndarray]:
        """Yield upright pictures `[H, W, 3]`; `num_frames` is how many the whole result will have."""
        reformatter = VideoReformatter()
        size = None
        for frame in frames:
            sideways, flip_vertically, flip_horizontally = _orientation(frame)
            if size is None:
                upright = (frame.width, frame.height) if sideways else (frame.height, frame.width)
                size = self.target_size(*upright)
                needed = COPIES_OF_THE_RESULT * num_frames * 3 * size[0] * size[1]
                self._check_memory(needed, f"{num_frames} frames that are wanted at {size[0]}×{size[1]} pixels")
            height, width = reversed(size) if sideways else size
            scaled = reformatter.reformat(
                frame, width, height, format="rgb24", interpolation=self.interpolation, threads=1
            )
            pixels = scaled.to_ndarray()
            pixels = pixels.swapaxes(0, 1) if sideways else pixels
            yield pixels[:: -1 if flip_vertically else 1, :: -1 if flip_horizontally else 1]


class _TimedBytes(io.BytesIO):
    """The bytes of a file, which can't be read after a deadline (of `time.monotonic`)."""

    def __init__(self, data: bytes, deadline: float):
        super().__init__(data)
        self.deadline = deadline

    def read(self, size: int | None = -1) -> bytes:
        if time.monotonic() > self.deadline:
            raise TimeoutError("the time is over")
        return super().read(size)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to http and https only, not to ftp as urllib does."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not _is_url(newurl):
            raise urllib.error.URLError(f"it is redirected to {newurl}, which is neither http nor https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _bytes_per_pixel(codec: av.VideoCodecContext, threads: int) -> float:
    """Return the bytes that a decoder takes for each pixel of a picture, with all the pictures that it holds."""
    is_intra = codec.codec.intra_only
    pictures = threads + (PICTURES_OF_AN_INTRA_DECODER if is_intra else PICTURES_OF_A_DECODER)
    return pictures * (codec.format.padded_bits_per_pixel / 8 if codec.format else LARGEST_BYTES_PER_PIXEL)


def _is_url(source: VideoSource) -> TypeGuard[str]:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Return how the display matrix turns a frame: transposed first, then flipped vertically, horizontally."""
    side_data: Buffer | None = frame.side_data.get("DISPLAYMATRIX")  # type: ignore[assignment]  # its hints lack this one
    if side_data is None:
        return False, False, False
    (a, b), (c, d) = np.frombuffer(bytes(side_data), dtype=np.int32).reshape(3, 3)[:2, :2]
    sideways = abs(b) > abs(a)
    return (True, b < 0, c < 0) if sideways else (False, d < 0, a < 0)
