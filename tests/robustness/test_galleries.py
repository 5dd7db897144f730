"""What a gallery survives: kills, a second writer, a full disk, damaged files, a hundred thousand videos."""

import contextlib
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from filelock import FileLock
from retrieval_world import tiny_config, tiny_processor
from video_files import write_video

from transformers_testa import TestaForRetrieval
from transformers_testa.gallery import LOCK, Gallery
from transformers_testa.retrieval import index_videos, index_videos_together, repair_gallery
from transformers_testa.search import EmbeddingIndex


torch.set_num_threads(1)

VIDEOS = 24


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TestaForRetrieval(tiny_config()).eval()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(VIDEOS):
        write_video(folder / f"{number:02}.mp4", 6 + number)
    return folder


@pytest.fixture(scope="module")
def whole(model, videos, tmp_path_factory):
    """The gallery that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with Gallery(folder, model, writable=True) as gallery:
        index_videos(model, tiny_processor(), videos, gallery, batch_size=2)
    return Gallery(folder, model)


def start(function, *arguments):
    """Run a function in a process that leads a group of its own, so that it is killed with those that it starts."""

    def lead():
        os.setsid()
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=lead)
    process.start()
    return process


def kill(process):
    with contextlib.suppress(ProcessLookupError):  # it was ready
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def assert_same(gallery, expected):
    gallery.verify()
    assert sorted(gallery.ids) == sorted(expected.ids)
    rows = [gallery.row(video_id) for video_id in expected.ids]
    torch.testing.assert_close(gallery.embeddings()[rows], expected.embeddings())
    torch.testing.assert_close(gallery.hidden_states(rows), expected.hidden_states(range(len(expected))))


# Kills


def fill(model, videos, folder):
    with Gallery(folder, model, writable=True) as gallery:
        index_videos(model, tiny_processor(), videos, gallery, batch_size=2)


def test_a_gallery_killed_20_times_at_random_ends_as_one_that_was_not(tmp_path, model, videos, whole):
    moments, sizes = random.Random(0), [0]
    for _ in range(20):
        process = start(fill, model, videos, tmp_path)
        time.sleep(moments.uniform(0, 0.3))
        kill(process)
        if (tmp_path / "gallery.jsonl").exists():
            survived = Gallery(tmp_path, model)
            if len(survived):
                survived.verify()
            sizes.append(len(survived))
    assert sizes == sorted(sizes)
    fill(model, videos, tmp_path)
    finished = Gallery(tmp_path, model)
    assert finished.ids == whole.ids
    assert_same(finished, whole)


def fill_together(model, videos, folder):
    torch.set_num_threads(1)
    index_videos_together(model, tiny_processor(), videos, folder, Accelerator(cpu=True), batch_size=2)


def wait_until_unlocked(folder):
    """Only the launcher can be joined: the kernel may still be closing the files of what it started."""
    for lock in folder.rglob(LOCK):
        with FileLock(lock, timeout=60):
            pass


def launch_two(model, videos, folder):
    debug_launcher(fill_together, args=(model, videos, folder), num_processes=2)


def test_what_two_killed_processes_embedded_is_taken_over(tmp_path, model, videos, whole):
    process = start(launch_two, model, videos, tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("part-*/shard-*.safetensors"))) < 4 and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    kill(process)
    wait_until_unlocked(tmp_path)
    with Gallery(tmp_path, model, writable=True) as survived:
        assert 2 <= len(survived) < VIDEOS
        survived.verify()
        report = index_videos(model, tiny_processor(), videos, survived, batch_size=2)
    assert report.skipped >= 2 and report.added + report.skipped == VIDEOS
    assert_same(Gallery(tmp_path, model), whole)


# A second writer


def hold(model, folder, ready):
    with Gallery(folder, model, writable=True):
        ready.set()
        time.sleep(600)


def test_a_second_process_that_writes_is_refused_until_the_first_is_gone(tmp_path, model, videos):
    ready = multiprocessing.get_context("fork").Event()
    process = start(hold, model, tmp_path, ready)
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="is being written by another process"):
        fill(model, videos, tmp_path)
    kill(process)
    fill(model, videos, tmp_path)
    assert len(Gallery(tmp_path, model)) == VIDEOS


# A full disk


def fill_with_limit(model, videos, folder, limit, message):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        fill(model, videos, folder)
    except OSError as error:
        os.write(message, str(error).encode())


@pytest.mark.parametrize("file", ["shard-00000.safetensors", "embeddings-0.bin", "gallery.jsonl"])
def test_a_write_that_fails_leaves_the_gallery_as_it_was_and_says_so(tmp_path, model, videos, whole, file):
    """The system lets no file grow beyond a limit, which one of the three kinds of files meets first."""
    size = (whole.folder / file).stat().st_size
    if file == "shard-00000.safetensors":
        limit = size - 1
    else:
        # Small shards, so that the others reach the limit first: they grow with every batch.
        limit = max(size // 2, (whole.folder / "shard-00000.safetensors").stat().st_size + 1)
    told, message = os.pipe()
    process = start(fill_with_limit, model, videos, tmp_path, limit, message)
    process.join()
    os.close(message)
    sentence = os.read(told, 9999).decode()
    os.close(told)
    assert process.exitcode == 0
    with Gallery(tmp_path, model, writable=True) as survived:
        assert f"{tmp_path} can't grow (File too large): its {len(survived)} videos are safe; make room" in sentence
        assert len(survived) < VIDEOS
        if len(survived):
            survived.verify()
        assert len(list(tmp_path.glob("shard-*"))) == len(survived) / 2 and not list(tmp_path.glob("*.tmp"))
    fill(model, videos, tmp_path)
    assert_same(Gallery(tmp_path, model), whole)


# Damage


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bit_is_found_named_and_mended(tmp_path, model, videos, whole, seed):
    fill(model, videos, tmp_path)
    chance = random.Random(seed)
    for _ in range(10):
        path = chance.choice(sorted(path for path in tmp_path.iterdir() if path.suffix in (".bin", ".safetensors")))
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        with Gallery(tmp_path, model, writable=True) as gallery:
            (damage,) = gallery.find_damage()
            assert path.name in damage.reason and len(damage.ids) == 2
            report = repair_gallery(model, tiny_processor(), gallery)
            assert report.damages == [damage] and report.repaired == 2
    assert_same(Gallery(tmp_path, model), whole)


def test_a_bit_flipped_in_the_index_is_found_and_named(tmp_path, model, videos):
    fill(model, videos, tmp_path)
    path, chance = tmp_path / "gallery.jsonl", random.Random(0)
    content = path.read_bytes()
    # But for the last byte: without it the last line is one that was cut off while it was written.
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content) - 1)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"(gallery\.jsonl is damaged|has format)"):
            Gallery(tmp_path, model)


# Many videos


def anonymous_memory() -> int:
    """Bytes that this process holds beside files that are mapped."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def fill_and_empty(model, folder, count, told):
    """Add videos, remove every second, search; tell how the memory grew."""
    batch = 500
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.zeros(batch, 64, 16)
    query = torch.randn(1, 256, generator=generator)
    before, most, seconds = anonymous_memory(), 0, {}
    with Gallery(folder, model, writable=True) as gallery:
        began = time.perf_counter()
        for first in range(0, count, batch):
            embeddings = torch.nn.functional.normalize(torch.randn(batch, 256, generator=generator), dim=1)
            # What is removed is most like the query.
            embeddings[1::2] = torch.nn.functional.normalize(query + 0.1 * embeddings[1::2], dim=1)
            gallery.add([f"video {number}" for number in range(first, first + batch)], embeddings, hidden_states)
            most = max(most, anonymous_memory())
        seconds["added"], began = time.perf_counter() - began, time.perf_counter()
        gallery.remove([f"video {number}" for number in range(1, count, 2)])
        most = max(most, anonymous_memory())
        seconds["removed"] = time.perf_counter() - began
    reopened = Gallery(folder, model)
    assert reopened.ids == [f"video {number}" for number in range(0, count, 2)]
    reopened.verify()
    similarities, rows = EmbeddingIndex(reopened.embeddings()).search(query, 128)
    expected = (query @ reopened.embeddings().T).topk(128)
    torch.testing.assert_close(similarities, expected.values)
    assert rows.equal(expected.indices)
    most = max(most, anonymous_memory())
    told.put((most - before, seconds))


@pytest.mark.parametrize("count", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_videos_are_added_removed_and_searched_with_flat_memory(tmp_path, model, count):
    told = multiprocessing.get_context("fork").SimpleQueue()
    process = start(fill_and_empty, model, tmp_path, count, told)
    process.join()
    assert process.exitcode == 0
    grown, seconds = told.get()
    print(f"{count} videos: {grown / 2**20:.0f} MiB more, {seconds}")
    # Names and searched codes stay in memory, some hundred bytes a video; the gallery itself takes 3 KB a video on disk.
    assert grown < 16 * 2**20 + 400 * count
