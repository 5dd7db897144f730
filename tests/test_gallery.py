import contextlib
import json
import os
import stat
import subprocess
import sys
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from retrieval_world import tiny_config

from transformers_testa import TestaForRetrieval
from transformers_testa.gallery import Gallery, bytes_per_video, model_fingerprint


torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TestaForRetrieval(tiny_config())


def features(count, seed=0):
    """Embeddings `[count, 4]` and hidden states `[count, 3, 5]` that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator), torch.randint(-9, 9, (count, 3, 5), generator=generator).float()


def test_a_gallery_gives_back_what_was_added_in_order(tmp_path, model):
    embeddings, hidden_states = features(5)
    with Gallery(tmp_path / "gallery", model, writable=True) as gallery:
        gallery.add(["a", "b"], embeddings[:2], hidden_states[:2])
        gallery.add(["c", "d", "e"], embeddings[2:], hidden_states[2:])
    gallery = Gallery(tmp_path / "gallery", model)
    assert gallery.ids == ["a", "b", "c", "d", "e"]
    assert len(gallery) == 5
    assert "d" in gallery and "x" not in gallery and gallery.row("d") == 3
    assert gallery.embeddings().equal(embeddings)
    assert gallery.hidden_states([4, 0, 2]).float().equal(hidden_states[[4, 0, 2]])
    gallery.verify()


def test_int8_rounds_each_token_by_its_largest_value(tmp_path, model):
    embeddings, hidden_states = torch.randn(3, 4), torch.randn(3, 7, 64) * torch.rand(3, 7, 1) * 100
    hidden_states[1, 2] = 0
    with Gallery(tmp_path, model, writable=True, dtype=torch.int8) as gallery:
        gallery.add(["a", "b", "c"], embeddings, hidden_states)
    read = Gallery(tmp_path, model)
    assert read.dtype == torch.int8
    found = read.hidden_states([2, 0, 1])
    assert found.dtype == torch.float32
    step = hidden_states.abs().amax(dim=-1, keepdim=True) / 127
    assert ((found - hidden_states[[2, 0, 1]]).abs() <= step[[2, 0, 1]] / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_size_of_a_video_is_known_before(tmp_path, model, dtype):
    with Gallery(tmp_path, model, writable=True, dtype=dtype) as gallery:
        gallery.add([str(n) for n in range(20)], torch.randn(20, 256), torch.randn(20, 50, 64))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size == pytest.approx(20 * bytes_per_video(50, 64, 256, dtype), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_stored_in_the_dtype_asked_for(tmp_path, model, dtype):
    embeddings = torch.randn(2, 4)
    hidden_states = torch.randn(2, 3, 5)
    with Gallery(tmp_path, model, writable=True, dtype=dtype) as gallery:
        gallery.add(["a", "b"], embeddings, hidden_states)
    assert Gallery(tmp_path, model).hidden_states([0, 1]).equal(hidden_states.to(dtype))
    assert Gallery(tmp_path, model).embeddings().equal(embeddings)


def test_a_gallery_grows_where_it_was_left(tmp_path, model):
    embeddings, hidden_states = features(4)
    for row, video_id in enumerate("abcd"):
        with Gallery(tmp_path, model, writable=True) as gallery:
            gallery.add([video_id], embeddings[row : row + 1], hidden_states[row : row + 1])
    assert gallery.ids == list("abcd")
    assert gallery.embeddings().equal(embeddings)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("flushes", range(10))
def test_a_kill_at_any_moment_leaves_a_whole_gallery(tmp_path, model, monkeypatch, flushes):
    embeddings, hidden_states = features(3)

    def add(*places):
        with Gallery(tmp_path, model, writable=True) as gallery:
            for place in places:
                gallery.add([str(place)], embeddings[place : place + 1], hidden_states[place : place + 1])

    left = iter(range(flushes))

    def lose_a_byte_and_die_at_last(file):
        if next(left, None) is None:
            status = os.fstat(file)
            if stat.S_ISREG(status.st_mode):
                os.ftruncate(file, status.st_size - 1)
            raise Killed

    monkeypatch.setattr(os, "fsync", lose_a_byte_and_die_at_last)
    with pytest.raises(Killed):
        add(0, 1)
    monkeypatch.undo()

    with Gallery(tmp_path, model, writable=True) as survived:
        assert survived.ids == ["0", "1"][: len(survived)]
    add(*range(len(survived), 3))
    grown = Gallery(tmp_path, model)
    grown.verify()
    assert grown.embeddings().equal(embeddings)
    assert grown.hidden_states(range(3)).float().equal(hidden_states)


def test_a_line_cut_off_while_it_was_written_is_as_if_it_never_was(tmp_path, model):
    embeddings, hidden_states = features(2)
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], embeddings[:1], hidden_states[:1])
        whole = (tmp_path / "gallery.jsonl").read_bytes()
        gallery.add(["b"], embeddings[1:], hidden_states[1:])
    longer = (tmp_path / "gallery.jsonl").read_bytes()
    for length in range(len(whole), len(longer)):
        (tmp_path / "gallery.jsonl").write_bytes(longer[:length])
        assert Gallery(tmp_path, model).ids == ["a"]
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["c"], embeddings[1:], hidden_states[1:])
    assert Gallery(tmp_path, model).ids == ["a", "c"]


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path, model):
    first = Gallery(tmp_path, model, writable=True)
    first.add(["a"], *features(1))
    with pytest.raises(RuntimeError, match="is being written by another process"):
        Gallery(tmp_path, model, writable=True)
    assert Gallery(tmp_path, model).ids == ["a"]
    first.close()
    with Gallery(tmp_path, model, writable=True) as second:
        second.add(["b"], *features(1))


def test_a_reader_keeps_what_it_opened_while_the_gallery_grows(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
        reader = Gallery(tmp_path, model)
        before = reader.embeddings()
        gallery.add(["b"], *features(1, seed=1))
        assert reader.ids == ["a"]
        assert before.equal(features(1)[0])
        assert reader.embeddings().equal(features(1)[0])


def test_a_gallery_of_another_model_is_refused_untouched(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = TestaForRetrieval(tiny_config())
    for writable in (False, True):
        with pytest.raises(ValueError, match="embedded with another model"):
            Gallery(tmp_path, other, writable=writable)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
    Gallery(tmp_path, model, writable=True).close()


def test_the_fingerprint_follows_weights_and_config_and_survives_saving(tmp_path, model):
    model.save_pretrained(tmp_path)
    fingerprint = model_fingerprint(TestaForRetrieval.from_pretrained(tmp_path))
    assert fingerprint == model_fingerprint(model)
    assert fingerprint != model_fingerprint(TestaForRetrieval.from_pretrained(tmp_path, video_pooling="cls"))
    other = TestaForRetrieval.from_pretrained(tmp_path)
    with torch.no_grad():
        other.matching_head.bias[1] += 1
    assert fingerprint != model_fingerprint(other)


@pytest.mark.parametrize(
    ("ids", "embeddings", "hidden_states", "sentence"),
    [
        (["b", "a"], torch.zeros(2, 4), torch.zeros(2, 3, 5), "'a' is in the gallery .* already"),
        (["b", "b"], torch.zeros(2, 4), torch.zeros(2, 3, 5), "'b' is in the gallery .* already"),
        ([3], torch.zeros(1, 4), torch.zeros(1, 3, 5), "id 3 is a int"),
        (["b"], torch.zeros(2, 4), torch.zeros(1, 3, 5), "1 ids, 2 embeddings, 1 hidden_states"),
        ([], torch.zeros(0, 4), torch.zeros(0, 3, 5), "0 ids"),
        (["b"], torch.zeros(1, 8), torch.zeros(1, 3, 5), "embedding_dim is 8 for 'b' and 4"),
        (["b"], torch.zeros(1, 4), torch.zeros(1, 7, 5), "tokens_per_video is 7 for 'b' and 3 .*num_frames"),
        (["b"], torch.zeros(1, 4), torch.zeros(1, 3, 9), "hidden_size is 9"),
        (["b"], torch.zeros(1, 4), torch.zeros(1, 15), "got \\[1, 4\\] and \\[1, 15\\]"),
        (["b"], torch.full((1, 4), torch.nan), torch.zeros(1, 3, 5), "features of 'b' are not finite"),
        (["b"], torch.zeros(1, 4), torch.full((1, 3, 5), torch.inf), "features of 'b' are not finite"),
    ],
)
def test_a_gallery_refuses_what_does_not_fit_and_stays_as_it_was(
    tmp_path, model, ids, embeddings, hidden_states, sentence
):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
        content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ValueError, match=sentence):
            gallery.add(ids, embeddings, hidden_states)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content
        gallery.add(["c"], *features(1))
    assert Gallery(tmp_path, model).ids == ["a", "c"]


def test_a_gallery_opened_for_reading_takes_nothing(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
    with pytest.raises(ValueError, match="open it with writable=True"):
        Gallery(tmp_path, model).add(["b"], *features(1))


def test_a_folder_without_a_gallery_is_told(tmp_path, model):
    with pytest.raises(ValueError, match="holds no gallery"):
        Gallery(tmp_path / "nowhere", model)
    assert not (tmp_path / "nowhere").exists()
    with Gallery(tmp_path / "new", model, writable=True) as gallery, pytest.raises(ValueError, match="no video yet"):
        gallery.embeddings()


def test_a_dtype_that_is_not_the_gallerys_is_refused(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
    with pytest.raises(ValueError, match=r"stores torch.bfloat16"):
        Gallery(tmp_path, model, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"torch.float16"):
        Gallery(tmp_path, model, dtype=torch.float16)


def test_removed_videos_leave_the_disk_and_the_others_stay(tmp_path, model):
    embeddings, hidden_states = features(6)
    with Gallery(tmp_path, model, writable=True, dtype=torch.int8) as gallery:
        for start in (0, 2, 4):
            ids = list("abcdef"[start : start + 2])
            gallery.add(ids, embeddings[start : start + 2], hidden_states[start : start + 2])
        before = gallery.hidden_states(range(6))
        gallery.remove(["b", "e", "f"])
        staying = [0, 2, 3]
        for reader in (gallery, Gallery(tmp_path, model)):
            assert reader.ids == ["a", "c", "d"]
            assert reader.embeddings().equal(embeddings[staying])
            assert reader.hidden_states(range(3)).equal(before[staying])
            reader.verify()
        assert len(list(tmp_path.glob("shard-*"))) == 2
        gallery.add(["b"], embeddings[1:2], hidden_states[1:2])
        gallery.remove(["a", "b", "c", "d"])
        assert len(gallery) == 0 and not list(tmp_path.glob("shard-*"))
        gallery.add(["x"], embeddings[:1], hidden_states[:1])
    assert Gallery(tmp_path, model).embeddings().equal(embeddings[:1])


def test_only_what_is_there_and_whole_is_removed(two_shards, model):
    with Gallery(two_shards, model, writable=True) as gallery:
        with pytest.raises(ValueError, match="id 'x' is not in the gallery"):
            gallery.remove(["a", "x"])
        path = two_shards / "shard-00001.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: repair the gallery"):
            gallery.remove(["a", "c"])  # what stays of the damaged shard would get a new checksum
        assert len(gallery) == 4
        gallery.remove(["c", "d"])
    assert Gallery(two_shards, model).ids == ["a", "b"]
    with pytest.raises(ValueError, match="open it with writable=True"):
        Gallery(two_shards, model).remove(["a"])


def test_a_reader_of_a_removed_shard_is_told(two_shards, model):
    reader = Gallery(two_shards, model)
    embeddings = reader.embeddings()
    with Gallery(two_shards, model, writable=True) as gallery:
        gallery.remove(["c"])
        gallery.add(["e"], *features(1))
    assert embeddings.equal(torch.cat([features(2)[0], features(2, seed=1)[0]]))
    assert reader.hidden_states([0]).float().equal(features(2)[1][:1])
    with pytest.raises(ValueError, match="removed since this gallery was opened"):
        reader.hidden_states([3])
    with pytest.raises(ValueError, match=r"embeddings-0.bin is gone, as videos were removed: open .* again"):
        reader.embeddings()


@pytest.mark.parametrize("flushes", range(8))
def test_a_kill_while_removing_removes_all_or_nothing(two_shards, model, monkeypatch, flushes):
    left = iter(range(flushes))

    def die_at_last(file):
        if next(left, None) is None:
            raise Killed

    with Gallery(two_shards, model, writable=True) as gallery:
        monkeypatch.setattr(os, "fsync", die_at_last)
        with contextlib.suppress(Killed):
            gallery.remove(["a", "d"])
        monkeypatch.undo()
    with Gallery(two_shards, model, writable=True) as survived:
        assert survived.ids in (list("abcd"), ["b", "c"])
        survived.verify()
        places = [place for place, video_id in enumerate("abcd") if video_id in survived]
        hidden_states = torch.cat([features(2)[1], features(2, seed=1)[1]])
        assert survived.hidden_states(range(len(survived))).float().equal(hidden_states[places])
        assert len(list(two_shards.glob("shard-*"))) == 2 and len(list(two_shards.glob("embeddings-*"))) == 1


def test_parts_become_one_gallery_where_each_shard_stays(tmp_path, model):
    embeddings, hidden_states = features(5)

    def fill(folder, *places):
        with Gallery(folder, model, writable=True) as gallery:
            for place in places:
                gallery.add([str(place)], embeddings[place : place + 1], hidden_states[place : place + 1])

    fill(tmp_path, 0)
    fill(tmp_path / "part-0", 1, 2)
    fill(tmp_path / "part-1", 3)
    (tmp_path / "part-1" / "shard-00007.safetensors").write_bytes(b"of a writer that was killed")
    with Gallery(tmp_path, model, writable=True) as gallery:
        assert gallery.ids == list("0123") and gallery.next_part() == 2
        fill(tmp_path / "part-2", 4)
        gallery.take_in_parts()
    whole = Gallery(tmp_path, model)
    assert whole.embeddings().equal(embeddings) and whole.hidden_states(range(5)).float().equal(hidden_states)
    whole.verify()
    with Gallery(tmp_path, model, writable=True) as gallery:
        assert gallery.ids == list("01234")
        gallery.remove(["2", "3"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("shard-*")}
    assert left == {"shard-00000.safetensors"} | {f"part-{part}/shard-00000.safetensors" for part in (0, 2)}


def test_what_is_in_a_part_stays_whatever_the_whole_does_before_it_takes_it_in(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a", "b"], *features(2))
        with Gallery(tmp_path / "part-0", model, writable=True) as part:
            part.add(["c"], *features(1, seed=1))
            gallery.remove(["a"])
            part.add(["d"], *features(1, seed=2))
        gallery.take_in_parts()
        assert gallery.ids == ["b", "c", "d"]
        gallery.verify()


def test_a_part_that_does_not_fit_or_is_still_written_is_refused(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a"], *features(1))
        with Gallery(tmp_path / "part-0", model, writable=True) as part:
            part.add(["b"], torch.randn(1, 4), torch.randn(1, 8, 5))
            with pytest.raises(RuntimeError, match="part-0 is being written by another process"):
                gallery.take_in_parts()
        with pytest.raises(ValueError, match="tokens_per_video is 8 for part-0 and 3"):
            gallery.take_in_parts()


def test_a_gallery_of_the_first_format_is_refused_with_what_to_do(tmp_path, model):
    header = {"format": 1, "model": model_fingerprint(model), "embedding_dim": 4, "dtype": "bfloat16"}
    (tmp_path / "gallery.jsonl").write_text(json.dumps(header) + "\n")
    with pytest.raises(ValueError, match=r"has format 1, .*: index the videos again, into a new folder"):
        Gallery(tmp_path, model)


def test_a_gallery_of_a_later_format_is_refused(two_shards, model):
    path = two_shards / "gallery.jsonl"
    header, *shards = path.read_text().splitlines(keepends=True)
    header = {name: value for name, value in json.loads(header).items() if name != "crc32"} | {"format": 3}
    header["crc32"] = zlib.crc32(json.dumps(header).encode())
    path.write_text("".join([json.dumps(header) + "\n", *shards]))
    with pytest.raises(ValueError, match="has format 3, this version reads 2"):
        Gallery(two_shards, model)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "reopen"]), st.sets(st.sampled_from("abcdefgh"))), max_size=9)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
def test_a_gallery_holds_what_was_added_and_not_removed(tmp_path_factory, model, steps):
    path, expected = tmp_path_factory.mktemp("gallery"), {}
    gallery = Gallery(path, model, writable=True)
    for step, (action, chosen) in enumerate(steps):
        if action == "add" and (new := sorted(chosen - expected.keys())):
            embeddings, hidden_states = features(len(new), seed=step)
            gallery.add(new, embeddings, hidden_states)
            expected |= dict(zip(new, zip(embeddings, hidden_states, strict=True), strict=True))
        elif action == "remove":
            gallery.remove(chosen & expected.keys())
            expected = {video_id: kept for video_id, kept in expected.items() if video_id not in chosen}
        elif action == "reopen":
            gallery.close()
            gallery = Gallery(path, model, writable=True)
        assert gallery.ids == list(expected)
        if expected:
            embeddings, hidden_states = map(torch.stack, zip(*expected.values(), strict=True))
            assert gallery.embeddings().equal(embeddings)
            assert gallery.hidden_states(range(len(gallery))).float().equal(hidden_states)
    gallery.verify()
    gallery.close()


@pytest.fixture
def two_shards(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a", "b"], *features(2))
        gallery.add(["c", "d"], *features(2, seed=1))
    return tmp_path


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "embeddings-0.bin"])
def test_a_file_cut_short_or_missing_is_named_on_opening(two_shards, model, name):
    path = two_shards / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is missing or cut short"):
        Gallery(two_shards, model)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing or cut short"):
        Gallery(two_shards, model)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "embeddings-0.bin"])
def test_a_flipped_bit_is_found_by_verify(two_shards, model, name):
    path = two_shards / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    gallery = Gallery(two_shards, model)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*'c' is the first of 2 videos"):
        gallery.verify()
    (damage,) = gallery.find_damage()
    assert damage.shard == 1 and damage.ids == ["c", "d"] and name in damage.reason


def test_a_shard_that_cannot_be_read_is_named(two_shards, model):
    path = two_shards / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    gallery = Gallery(two_shards, model)
    assert gallery.hidden_states([1]).float().equal(features(2)[1][1:])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged"):
        gallery.hidden_states([2])


@pytest.mark.parametrize(("old", "new"), [(b'"ids"', b"ids"), (b'"c"', b'"C"'), (b'{"format"', b'["format"')])
def test_a_damaged_index_is_named(two_shards, model, old, new):
    path = two_shards / "gallery.jsonl"
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"gallery.jsonl is damaged"):
        Gallery(two_shards, model)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "embeddings-0.bin"])
@pytest.mark.parametrize("harm", ["cut", "missing", "flipped"])
def test_a_damaged_shard_is_replaced_and_the_others_stay(two_shards, model, name, harm):
    path = two_shards / name
    content = path.read_bytes()
    path.write_bytes({"cut": content[:7], "missing": b"", "flipped": bytes([content[0] ^ 1]) + content[1:]}[harm])
    if harm == "missing":
        path.unlink()
    with Gallery(two_shards, model, writable=True, damaged=True) as gallery:
        damages = list(gallery.find_damage())
        assert damages[0].ids == ["a", "b"] and len(damages) == 1 + (name == "embeddings-0.bin" and harm != "flipped")
        gallery.replace(0, ["b"], *features(1, seed=5))
        if len(damages) > 1:
            gallery.replace(1, ["c", "d"], *features(2, seed=1))
        assert not list(gallery.find_damage())
    mended = Gallery(two_shards, model)
    assert mended.ids == ["b", "c", "d"]
    for place, of_rows in ((0, mended.embeddings()), (1, mended.hidden_states(range(3)).float())):
        assert of_rows.equal(torch.cat([features(1, seed=5)[place], features(2, seed=1)[place]]))


MEASURE_MEMORY = """
import resource, sys, torch
from retrieval_world import tiny_config
from transformers_testa import TestaForRetrieval
from transformers_testa.gallery import Gallery

torch.manual_seed(0)
model = TestaForRetrieval(tiny_config())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Gallery(sys.argv[1], model, writable=True) as gallery:
    for start in range(0, 80, 8):
        ids = [str(start + place) for place in range(8)]
        gallery.add(ids, torch.randn(8, 4), torch.ones(8, 512, 1024))
    assert gallery.embeddings().shape == (80, 4)
    for row in range(80):
        assert gallery.hidden_states([row]).untyped_storage().nbytes() == 2 * 512 * 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_batch_not_by_the_gallery(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, tmp_path / "gallery"],
        cwd=os.path.dirname(__file__),
        capture_output=True,
        text=True,
        check=True,
    )
    # A batch is 16 MB in float32 and 8 MB as it is stored; the gallery is 80 MB.
    assert sum(path.stat().st_size for path in (tmp_path / "gallery").iterdir()) > 80 * 2**20
    assert int(process.stdout) * 1024 < 64 * 2**20
