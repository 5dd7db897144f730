"""Video files that are broken or hostile: seeded mutations of clips, and files that name other files or addresses."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np


SHORT_GOP = {"g": "12", "bf": "2"}
# Container and codec of the clips that are mutated.
CLIPS = {
    "h264.mp4": {"codec": "libx264", "options": SHORT_GOP, "container_options": {"movflags": "faststart"}},
    "hevc.mkv": {"codec": "libx265", "options": {"x265-params": "keyint=12:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": SHORT_GOP},
    "mpeg2.mpg": {"codec": "mpeg2video", "options": SHORT_GOP},
    "h264.ts": {"codec": "libx264", "options": SHORT_GOP},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
# What else FFmpeg reads, with the codecs that PyAV can write.
RARE_CLIPS = {
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "11", "svtav1-params": "lp=1"}},
    "fragmented.mp4": {"codec": "libx264", "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "h263.3gp": {"codec": "h263"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "png.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "svq1.mov": {"codec": "svq1", "pix_fmt": "yuv410p"},
    "dnxhr.mov": {"codec": "dnxhd", "pix_fmt": "yuv422p", "options": {"profile": "dnxhr_sq"}},
    "jpeg2000.mov": {"codec": "jpeg2000"},
    "ffv1.mkv": {"codec": "ffv1"},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "vp8.ivf": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "cinepak.avi": {"codec": "cinepak", "pix_fmt": "rgb24"},
    "huffyuv.avi": {"codec": "huffyuv", "pix_fmt": "yuv422p"},
    "raw.avi": {"codec": "rawvideo", "pix_fmt": "rgb24"},
    "flv1.flv": {"codec": "flv"},
    "wmv2.asf": {"codec": "wmv2"},
    "rv20.rm": {"codec": "rv20"},
    "mpeg1.mpg": {"codec": "mpeg1video"},
    "mpeg2.mxf": {"codec": "mpeg2video"},
    "mpeg4.nut": {"codec": "mpeg4"},
    "raw.h264": {"codec": "libx264"},
    "raw.hevc": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
}
SUFFIXES = (*(Path(name).suffix for name in CLIPS), ".gif", ".h264", ".ogg", ".m3u8", ".txt", ".JPG", "")

# Where a header says sizes, counts, times and places, by the bytes before them.
NUMBERS_AFTER = {
    ".mp4": (
        *(b"mvhd", b"tkhd", b"mdhd", b"stsd", b"avc1", b"avcC", b"stts", b"ctts", b"stsc", b"stsz", b"stco"),
        *(b"stss", b"elst", b"moov", b"trak", b"stbl"),
    ),
    ".mkv": (
        b"\xb0",
        b"\xba",
        b"\x44\x89",
        b"\x2a\xd7\xb1",
        b"\x23\xe3\x83",
        b"\x15\x49\xa9\x66",
        b"\x1f\x43\xb6\x75",
    ),
    ".avi": (b"avih", b"strh", b"strf", b"idx1", b"movi", b"00dc", b"LIST"),
    ".mpg": (b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"\x00\x00\x01\xe0", b"\x00\x00\x01\xbb"),
    ".ts": (b"\x47\x40\x00", b"\x47\x50\x00", b"\x47\x41\x00", b"\x00\x00\x00\x01\x67"),
}
NUMBERS_AFTER[".mov"] = (*NUMBERS_AFTER[".mp4"], b"jpeg", b"\xff\xc0")
NUMBERS_AFTER[".3gp"] = NUMBERS_AFTER[".mp4"]
NUMBERS_AFTER[".webm"] = NUMBERS_AFTER[".mkv"]
# Of other containers, anywhere behind the zeros that headers are full of.
HEADER_ZEROS = (bytes(2), bytes(3), b"\0\0\0\1")
ABSURD_NUMBERS = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


@dataclass(frozen=True)
class HostileFile:
    """The name of a file tells what was done to which clip; `suffix` is its own, not always the clip's."""

    name: str
    data: bytes


def write_clips(folder: Path, clips: dict[str, dict], pictures: list[np.ndarray]) -> list[Path]:
    """Write pictures (uint8 `[H, W, 3]` each) in each way of `clips`; return the files."""
    for name, settings in clips.items():
        with av.open(str(folder / name), "w", options=settings.get("container_options", {})) as container:
            stream = container.add_stream(settings["codec"], rate=25, options=settings.get("options", {}))
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = settings.get("pix_fmt", "yuv420p")
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return [folder / name for name in clips]


def real_pictures(file: Path, count: int = 40, height: int = 288, width: int = 352) -> list[np.ndarray]:
    """Return the first pictures of a video file, as `write_clips` takes them."""
    with av.open(str(file)) as container:
        frames = (frame.reformat(width, height, "rgb24").to_ndarray() for frame in container.decode(video=0))
        return [picture for picture, _ in zip(frames, range(count), strict=False)]


def mutations(clips: list[Path], count: int, seed: int = 0) -> Iterator[HostileFile]:
    """Yield `count` mutations of clips: of each clip and each kind as many as of the others."""
    contents = {clip: clip.read_bytes() for clip in clips}
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        clip = clips[number % len(clips)]
        mutate = MUTATIONS[number // len(clips) % len(MUTATIONS)]
        suffix = clip.suffix
        if mutate is wrong_ending:
            suffix = str(generator.choice([other for other in SUFFIXES if other != suffix]))
            data = contents[clip]
        elif mutate is spliced:
            data = spliced(contents[clip], contents[clips[generator.integers(len(clips))]], generator)
        else:
            data = mutate(contents[clip], clip.suffix, generator)
        yield HostileFile(f"{number:05}-{clip.stem}-{clip.suffix[1:]}-{mutate.__name__}{suffix}", data)


def flipped_bits(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Flip 1 to 1,000 bits anywhere."""
    return _flip(data, 0, len(data), int(10 ** generator.uniform(0, 3)), generator)


def flipped_header_bits(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Flip up to 30 bits near the start or the end, where containers keep what they say about their contents."""
    size = min(2000, len(data))
    start = generator.choice([0, len(data) - size])
    return _flip(data, start, start + size, int(10 ** generator.uniform(0, 1.5)), generator)


def _flip(data: bytes, start: int, stop: int, count: int, generator: np.random.Generator) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    positions = generator.integers(start, stop, count)
    changed[positions] ^= (1 << generator.integers(0, 8, count)).astype(np.uint8)
    return changed.tobytes()


def truncated(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Keep only the start, from nothing to all but a byte."""
    return data[: generator.integers(len(data))]


def swapped_parts(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Exchange two neighbouring atoms of MP4 or MOV, or two ranges of other files."""
    cuts = sorted(generator.integers(0, len(data), 3).tolist())
    if suffix in (".mp4", ".mov"):
        atoms = list(_atoms(data, 0, len(data)))
        siblings = [
            (first, second) for first in atoms for second in atoms if first[1] == second[0] and first[2] == second[2]
        ]
        (start, middle, _), (_, stop, _) = siblings[generator.integers(len(siblings))]
        cuts = [start, middle, stop]
    start, middle, stop = cuts
    return data[:start] + data[middle:stop] + data[start:middle] + data[stop:]


def _atoms(data: bytes, start: int, stop: int, depth: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and depth of each atom, those within others too."""
    while start + 8 <= stop:
        size = struct.unpack_from(">I", data, start)[0]
        if size < 8 or start + size > stop:
            return
        yield start, start + size, depth
        if data[start + 4 : start + 8] in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"dinf"):
            yield from _atoms(data, start + 8, start + size, depth + 1)
        start += size


def absurd_numbers(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Put absurd values where the header says sizes, counts, times and places."""
    changed = bytearray(data)
    for _ in range(generator.integers(1, 4)):
        tags = NUMBERS_AFTER.get(suffix, HEADER_ZEROS)
        tag = tags[generator.integers(len(tags))]
        places = list(_places(data, tag))
        if not places:
            continue
        width = int(generator.choice([1, 2, 4, 8]))
        place = places[generator.integers(len(places))] + len(tag) + int(generator.integers(0, 80 // width)) * width
        number = ABSURD_NUMBERS[generator.integers(len(ABSURD_NUMBERS))] % 256**width
        order = "little" if suffix == ".avi" else "big"
        if place + width <= len(changed):
            changed[place : place + width] = number.to_bytes(width, order)
    return bytes(changed)


def _places(data: bytes, tag: bytes, most: int = 50) -> Iterator[int]:
    place = data.find(tag)
    while place >= 0 and (most := most - 1):
        yield place
        place = data.find(tag, place + 1)


def blanked(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Overwrite a range with zeros, ones or noise."""
    start, stop = sorted(generator.integers(0, len(data), 2).tolist())
    filling = [bytes(stop - start), b"\xff" * (stop - start), generator.bytes(stop - start)]
    return data[:start] + filling[generator.integers(3)] + data[stop:]


def repeated(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Insert a copy of a range somewhere else, or leave the range out."""
    start, stop, place = sorted(generator.integers(0, len(data), 3).tolist())
    part = data[start:stop]
    return data[:start] + data[stop:] if generator.integers(2) else data[:place] + part + data[place:]


def spliced(data: bytes, other: bytes, generator: np.random.Generator) -> bytes:
    """Continue one file with the end of another, in another container."""
    return data[: generator.integers(len(data))] + other[generator.integers(len(other)) :]


def wrong_ending(data: bytes, suffix: str, generator: np.random.Generator) -> bytes:
    """Leave the bytes as they are: `mutations` changes the name."""
    return data


MUTATIONS = (
    *(flipped_bits, flipped_header_bits, truncated, swapped_parts, absurd_numbers, absurd_numbers, blanked),
    *(repeated, spliced, wrong_ending),
)


def files_that_name_others(secret: Path, address: str) -> Iterator[HostileFile]:
    """Yield playlists and the like, under innocent names, that would open the file `secret` or ask at `address`."""
    for kind, target in (("file", secret), ("network", f"{address}/video.ts"), ("network_file", f"{address}/x.mp4")):
        texts = {
            "m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
            "m3u8_key": f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:2,\na.ts\n',
            "m3u8_concat": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nconcat:{target}|{target}\n#EXT-X-ENDLIST\n",
            "ffconcat": f"ffconcat version 1.0\nfile '{target}'\n",
            "ffmetadata": f";FFMETADATA1\ntitle={target}\n",
            "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{target}\nm=video 5004 RTP/AVP 96\n"
            "a=rtpmap:96 H264/90000\n",
            "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
            'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT2S"><Period>'
            '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="96" height="64">'
            f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
            "smil": f'<smil><body><video src="{target}"/></body></smil>',
            "asx": f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
            "pls": f"[playlist]\nFile1={target}\nNumberOfEntries=1\n",
            "quicktime_link": f'<?xml version="1.0"?><?quicktime type="application/x-quicktime-media-link"?><embed src="{target}"/>',
            "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{target}" width="9" height="9"/></svg>',
            "filter_graph": f"movie={target}",
            "rtsp_text": f"RTSPtext\n{target}\n",
            "postscript": f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({target}) (r) file\n",
        }
        for name, text in texts.items():
            for suffix in (".mp4", ".avi", f".{name}"):
                yield HostileFile(f"{name}-{kind}{suffix}", text.encode())
        yield HostileFile(f"data_reference-{kind}.mov", _movie_with_data_reference(str(target)))


def _atom(kind: bytes, *contents: bytes) -> bytes:
    body = b"".join(contents)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _movie_with_data_reference(target: str) -> bytes:
    """Return a QuickTime movie whose only track says that its frames are in another file."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    path = target.encode()
    alias = (
        bytes(150)
        + struct.pack(">hH", 2, len(path))
        + path
        + struct.pack(">hH", 18, len(path))
        + path
        + b"\xff\xff\0\0"
    )
    references = _atom(
        b"dref", struct.pack(">II", 0, 2), _atom(b"url ", bytes(4), path + b"\0"), _atom(b"alis", bytes(4), alias)
    )
    entry = struct.pack(">6xH", 1) + bytes(16) + struct.pack(">HH", 96, 64) + bytes(50)
    tables = _atom(
        b"stbl",
        _atom(b"stsd", struct.pack(">II", 0, 1), _atom(b"jpeg", entry)),
        _atom(b"stts", struct.pack(">IIII", 0, 1, 10, 40)),
        _atom(b"stsc", struct.pack(">IIIII", 0, 1, 1, 10, 1)),
        _atom(b"stsz", struct.pack(">III", 0, 100, 10)),
        _atom(b"stco", struct.pack(">III", 0, 1, 40)),
    )
    media = _atom(
        b"mdia",
        _atom(b"mdhd", struct.pack(">IIIIII", 0, 0, 0, 1000, 400, 0)),
        _atom(b"hdlr", struct.pack(">II4s12xx", 0, 0, b"vide")),
        _atom(b"minf", _atom(b"vmhd", bytes(12)), _atom(b"dinf", references), tables),
    )
    header = (
        struct.pack(">IIIII", 7, 0, 0, 1, 0)
        + struct.pack(">I", 400)
        + bytes(16)
        + matrix
        + struct.pack(">II", 96 << 16, 64 << 16)
    )
    movie = (
        struct.pack(">IIIII", 0, 0, 0, 1000, 400)
        + struct.pack(">IH10x", 0x10000, 0x100)
        + matrix
        + bytes(24)
        + struct.pack(">I", 2)
    )
    return _atom(b"ftyp", b"qt  \0\0\0\0qt  ") + _atom(
        b"moov", _atom(b"mvhd", movie), _atom(b"trak", _atom(b"tkhd", header), media)
    )
