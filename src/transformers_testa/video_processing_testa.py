"""Videos in, normalised frames out: choose frames, decode, resize, rescale and normalise."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension, PILImageResampling, infer_channel_dimension_format
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, is_valid_video, make_batched_metadata

from .video_decoding_testa import (
    DECODING_MEMORY_LIMIT_BYTES,
    DECODING_TIME_LIMIT_SECONDS,
    INTERPOLATION,
    FrameSelection,
    Timeline,
    VideoReader,
    VideoSource,
)


# A file, its frames as an array, or a list of frames.
Video = VideoSource | np.ndarray | torch.Tensor | Sequence[Image.Image | np.ndarray | torch.Tensor]


class TestaVideoProcessorKwargs(VideosKwargs, total=False):
    """Keyword arguments of [`TestaVideoProcessor`] beyond those of every video processor.

    Attributes:
        frame_sampling (`str`):
            How `num_frames` frames are chosen, see [`sample_frame_indices`]. With `fps` the frame on screen every
            `1 / fps` seconds is taken instead.
        start (`float` or `list[float]`):
            Where the clip to sample from begins, in seconds; a list holds one value per video.
        end (`float` or `list[float]`):
            Where it ends, in seconds.
        seed (`int` or `list[int]`):
            Makes the random modes of `frame_sampling` repeatable.
        strict (`bool`):
            Refuse videos with fewer than `num_frames` frames instead of repeating some.
        decoding_threads (`int`):
            Threads that decode, shared by the videos of a call. If not given, as many as there are cores for this
            process; one in a worker of a `DataLoader`.
        decoding_time_limit (`float`):
            Seconds that reading one file may take, a download included; it is given up afterwards, with an error.
        decoding_memory_limit (`int`):
            Bytes that reading one file may take. A file that needs more, for its large pictures or its many frames, is
            refused; of a download, as soon as it is longer.
    """

    frame_sampling: str | None
    start: int | float | list[int | float | None] | None
    end: int | float | list[int | float | None] | None
    seed: int | list[int | None] | None
    strict: bool | None
    decoding_threads: int | None
    decoding_time_limit: int | float | None
    decoding_memory_limit: int | float | None


class TestaVideoProcessor(BaseVideoProcessor):
    """Turns videos into `pixel_values_videos`, float32 `[B, T, C, H, W]`.

    A video is a path, an http(s) URL, the bytes of a file, an array or tensor `[T, H, W, C]` or `[T, C, H, W]`, or a
    list of frames. From files only what the chosen frames need is decoded, several files in parallel, and one file in
    several places. All settings can be given at construction, saved, and overridden per call; `num_frames` and `fps`
    exclude each other. `do_sample_frames=False` takes every frame of a video.

    A file can't make this process open any other file or address, or take more time and memory than
    `decoding_time_limit` and `decoding_memory_limit` grant it.

    Frames of files are scaled by FFmpeg while they are converted to RGB, with a filter of the name that `resample` has;
    arrays are scaled by torchvision, with antialiasing. The two differ by one or two of 255 levels on average.
    """

    resample = PILImageResampling.BICUBIC
    image_mean = [0.48145466, 0.4578275, 0.40821073]
    image_std = [0.26862954, 0.26130258, 0.27577711]
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 32
    frame_sampling = "uniform"
    strict = False
    decoding_time_limit = DECODING_TIME_LIMIT_SECONDS
    decoding_memory_limit = DECODING_MEMORY_LIMIT_BYTES
    start: int | float | list[int | float | None] | None
    end: int | float | list[int | float | None] | None
    decoding_threads: int | None
    valid_kwargs = TestaVideoProcessorKwargs  # type: ignore[assignment]  # the base class declares those of images

    def __init__(self, **kwargs: Unpack[TestaVideoProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # which takes those of `valid_kwargs`

    def preprocess(self, videos: Video | Sequence[Video], **kwargs: Unpack[TestaVideoProcessorKwargs]) -> BatchFeature:
        """Return `pixel_values_videos` and, with `return_metadata=True`, one `video_metadata` per video.

        Raises:
            ValueError: for an unknown or contradictory argument, or an array of the wrong rank or channel count.
            VideoDecodingError: for a file that cannot be decoded as asked.
        """
        if unknown := sorted(kwargs.keys() - self.valid_kwargs.__annotations__.keys()):
            raise ValueError(f"{', '.join(unknown)}: no such argument of {type(self).__name__}.")
        videos = _flatten_videos(videos)
        selections = self._selections(len(videos), kwargs)
        threads = kwargs.pop("decoding_threads", None) or self.decoding_threads or available_threads()
        threads_per_video = max(1, threads // len(videos))
        metadata: list[VideoMetadata | None] = [None] * len(videos)
        if (given := kwargs.pop("video_metadata", None)) is not None:
            metadata = [*make_batched_metadata(videos, given)]  # type: ignore[arg-type]  # it counts the videos
        input_data_format = kwargs.pop("input_data_format", None)

        def load(number: int) -> tuple[torch.Tensor, VideoMetadata]:
            video = videos[number]
            if isinstance(video, VideoSource):
                return self._read(video, selections[number], threads_per_video, kwargs)
            frames = _channels_first(video, f"video {number}", input_data_format)
            return _select_frames(frames, f"video {number}", metadata[number], selections[number])

        with ThreadPoolExecutor(threads) as pool:
            frames, metadata_of_frames = zip(*pool.map(load, range(len(videos))), strict=True)
        return super().preprocess(
            list(frames),
            **{
                **kwargs,
                "do_sample_frames": False,
                "video_metadata": list(metadata_of_frames),
                "input_data_format": ChannelDimension.FIRST,
            },
        )

    def decode(self, video: Video, **kwargs: Unpack[TestaVideoProcessorKwargs]) -> torch.Tensor:
        """Return the chosen frames of one video as uint8 `[T, C, H, W]`: all but rescaling and normalising.

        What it returns can be stored, and finished later with `do_sample_frames=False, do_resize=False`.

        Raises:
            ValueError, VideoDecodingError: as for [`~TestaVideoProcessor.preprocess`].
        """
        outputs = self(video, **{**kwargs, "do_rescale": False, "do_normalize": False, "return_tensors": None})
        (frames,) = outputs["pixel_values_videos"]
        return frames.contiguous()

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: int | float | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Return the indices `[T]` that would be sampled from a video with this metadata.

        Raises:
            ValueError: where `fps`, `start` or `end` is asked for and the metadata has no `fps`.
        """
        (selection,) = self._selections(1, {**kwargs, "num_frames": num_frames, "fps": fps, "do_sample_frames": True})
        return selection.indices(_timeline(metadata.total_num_frames, metadata.fps, "the video", selection))

    def choose_frames(self, timeline: Timeline, **kwargs: Any) -> np.ndarray:
        """Return the indices `[T]` that would be sampled from a video whose frames are shown at these times.

        Raises:
            ValueError, VideoDecodingError: as for [`~TestaVideoProcessor.preprocess`].
        """
        (selection,) = self._selections(1, kwargs)
        return selection.indices(timeline)

    def _selections(self, num_videos: int, kwargs: Mapping[str, Any]) -> list[FrameSelection]:
        def setting(name: str) -> Any:
            return getattr(self, name) if kwargs.get(name) is None else kwargs[name]

        def per_video(name: str) -> list:
            value = setting(name)
            if not isinstance(value, (list, tuple)):
                return [value] * num_videos
            if len(value) != num_videos:
                raise ValueError(f"{name} lists {len(value)} values for {num_videos} videos. Give one per video.")
            return list(value)

        num_frames, fps = kwargs.get("num_frames"), kwargs.get("fps")
        if num_frames is not None and fps is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other. Give one of them.")
        if num_frames is None:
            fps = setting("fps")
        if fps is not None and kwargs.get("frame_sampling") not in (None, "uniform"):
            raise ValueError(
                f"frame_sampling={kwargs['frame_sampling']!r} chooses among num_frames frames; fps={fps} leaves no choice."
            )
        if not setting("do_sample_frames"):
            num_frames = fps = None
        elif fps is None:
            num_frames = setting("num_frames")
        common = {
            "num_frames": num_frames,
            "fps": fps,
            "frame_sampling": setting("frame_sampling"),
            "strict": setting("strict"),
        }
        return [
            FrameSelection(**common, start=start, end=end, seed=seed)
            for start, end, seed in zip(per_video("start"), per_video("end"), per_video("seed"), strict=True)
        ]

    def _read(
        self, source: VideoSource, selection: FrameSelection, threads: int, kwargs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, VideoMetadata]:
        do_resize, resample, size, default_to_square = (
            kwargs.get(name, getattr(self, name)) for name in ("do_resize", "resample", "size", "default_to_square")
        )
        limits = {}
        for name in ("time_limit", "memory_limit"):
            argument = f"decoding_{name}"
            limits[name] = getattr(self, argument) if kwargs.get(argument) is None else kwargs[argument]
            if limits[name] <= 0:
                raise ValueError(f"{argument}={limits[name]} must be positive.")
        if do_resize and resample not in INTERPOLATION:
            raise ValueError(f"resample={resample!r} is not available for video files. Use BICUBIC or BILINEAR.")

        def target_size(height: int, width: int) -> tuple[int, int]:
            if not do_resize:
                return height, width
            # A tensor without memory asks the library's own rule for the size that the frames will have.
            picture = torch.empty(1, 3, height, width, device="meta")
            height, width = self.resize(picture, size, resample).shape[-2:]
            return height, width

        size = self._standardize_kwargs(size=size, default_to_square=default_to_square)["size"]
        interpolation = INTERPOLATION[resample] if do_resize else "BICUBIC"
        reader = VideoReader(source, target_size, interpolation, threads, **limits)
        frames, metadata = reader.read(selection)
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), metadata


def available_threads() -> int:
    """Return how many threads may decode in this process: its share of the cores, or one in a `DataLoader`'s worker."""
    if torch.utils.data.get_worker_info() is not None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _flatten_videos(videos: Video | Sequence[Video]) -> list[VideoSource | np.ndarray | torch.Tensor]:
    """Return a flat list of files and arrays `[T, ...]` from one video, or nested lists of videos."""
    if isinstance(videos, VideoSource):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        if videos.ndim not in (4, 5):
            raise ValueError(
                f"A video of shape {tuple(videos.shape)} has {videos.ndim} dimensions. Give frames [T, H, W, C] or "
                "[T, C, H, W], or a batch of them."
            )
        return [videos] if videos.ndim == 4 else list(videos)
    if isinstance(videos, (list, tuple)) and videos:
        if is_valid_video(videos):
            return [np.stack([np.asarray(frame) for frame in videos])]
        return [video for item in videos for video in _flatten_videos(item)]
    raise ValueError(
        f"{videos!r} is no video. Give paths, URLs, bytes, arrays of frames, or a non-empty list of these."
    )


def _channels_first(
    video: np.ndarray | torch.Tensor, name: str, input_data_format: str | ChannelDimension | None
) -> torch.Tensor:
    video = torch.as_tensor(video)
    channels = (1, 3, 4)
    if video.shape[1] not in channels and video.shape[-1] not in channels:
        raise ValueError(
            f"{name} has shape {tuple(video.shape)}. Give frames [T, H, W, C] or [T, C, H, W] with C = 1, 3 or 4 channels."
        )
    # Of an array it reads the shape alone.
    layout = input_data_format or infer_channel_dimension_format(video, num_channels=channels)  # type: ignore[arg-type]
    return video.permute(0, 3, 1, 2).contiguous() if layout == ChannelDimension.LAST else video


def _select_frames(
    video: torch.Tensor, name: str, metadata: VideoMetadata | None, selection: FrameSelection
) -> tuple[torch.Tensor, VideoMetadata]:
    total_frames, _, height, width = video.shape
    metadata = metadata or VideoMetadata(total_num_frames=total_frames, height=height, width=width)
    indices = selection.indices(_timeline(total_frames, metadata.fps, name, selection))
    return video[torch.from_numpy(indices)], replace(metadata, frames_indices=indices.tolist())


def _timeline(total_frames: int, fps: float | None, name: str, selection: FrameSelection) -> Timeline:
    for argument in ("fps", "start", "end"):
        if fps is None and getattr(selection, argument) is not None:
            raise ValueError(
                f"{argument}={getattr(selection, argument)} needs the frame rate of {name}. Give it as "
                f'video_metadata=[{{"total_num_frames": {total_frames}, "fps": ...}}].'
            )
    fps = fps or 1.0
    return Timeline(name, np.arange(total_frames) / fps, total_frames / fps)
