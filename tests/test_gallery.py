import os
import stat
import subprocess
import sys

import pytest
import torch
from retrieval_world import tiny_config

from transformers_testa import TestaForRetrieval
from transformers_testa.gallery import Gallery, model_fingerprint


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


@pytest.fixture
def two_shards(tmp_path, model):
    with Gallery(tmp_path, model, writable=True) as gallery:
        gallery.add(["a", "b"], *features(2))
        gallery.add(["c", "d"], *features(2, seed=1))
    return tmp_path


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "embeddings.bin"])
def test_a_file_cut_short_or_missing_is_named_on_opening(two_shards, model, name):
    path = two_shards / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{name} is missing or cut short"):
        Gallery(two_shards, model)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing or cut short"):
        Gallery(two_shards, model)


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "embeddings.bin"])
def test_a_flipped_bit_is_found_by_verify(two_shards, model, name):
    path = two_shards / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    gallery = Gallery(two_shards, model)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*'c' is the first of 2 videos"):
        gallery.verify()


def test_a_shard_that_cannot_be_read_is_named(two_shards, model):
    path = two_shards / "shard-00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    gallery = Gallery(two_shards, model)
    assert gallery.hidden_states([1]).float().equal(features(2)[1][1:])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged"):
        gallery.hidden_states([2])


def test_a_damaged_index_is_named(two_shards, model):
    path = two_shards / "gallery.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"ids"', b"ids", 1))
    with pytest.raises(ValueError, match=r"gallery.jsonl is damaged"):
        Gallery(two_shards, model)


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
