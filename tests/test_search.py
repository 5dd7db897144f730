import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transformers_testa.search import FEW_QUERIES, EmbeddingIndex


torch.set_num_threads(1)


def full_sort(queries, embeddings, k):
    return (queries @ embeddings.float().T).sort(dim=1, descending=True).values[:, :k]


@given(
    *(st.integers(1, 90), st.integers(1, 12), st.integers(1, 100), st.integers(1, 25), st.integers(0, 999)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.floats(1e-4, 1e4),
)
def test_a_search_finds_what_a_full_sort_finds(size, num_queries, top_k, block_size, seed, dtype, scale):
    """Of one query or many, in one block or several, with rows of any length, some of them equal and some zero."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_queries, 16, generator=generator)
    embeddings = scale * torch.randn(size, 16, generator=generator) * torch.rand(size, 1, generator=generator)
    embeddings[size // 2 :: 7] = 0
    embeddings[size // 3 :: 5] = embeddings[0].clone()
    embeddings = embeddings.to(dtype)
    similarities, rows = EmbeddingIndex(embeddings, block_size=block_size).search(queries, top_k)
    k = min(top_k, size)
    assert similarities.shape == rows.shape == (num_queries, k)
    torch.testing.assert_close(similarities, full_sort(queries, embeddings, k), atol=1e-5 * scale, rtol=1e-5)
    of_rows = (queries @ embeddings.float().T).gather(1, rows)
    torch.testing.assert_close(of_rows, similarities, atol=1e-5 * scale, rtol=1e-5)
    assert all(len(set(row)) == k for row in rows.tolist())


def test_few_queries_compare_few_rows_in_full():
    embeddings = torch.nn.functional.normalize(torch.randn(20_000, 64), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(FEW_QUERIES, 64), dim=1)
    index = EmbeddingIndex(embeddings, block_size=4096)
    index.search(queries, 10)
    lower, upper = index._codes.bounds(queries)
    products = queries @ embeddings.T
    assert (lower <= products).all() and (products <= upper).all()
    possible = upper >= lower.topk(10, dim=1).values[:, -1:]
    assert possible.sum(dim=1).max() < 200


def test_embeddings_may_be_mapped_from_disk(tmp_path):
    embeddings = torch.randn(300, 16)
    (tmp_path / "rows.bin").write_bytes(embeddings.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "rows.bin"), shared=False, size=300 * 16).view(300, 16)
    for num_queries in (1, 40):
        queries = torch.randn(num_queries, 16)
        found = EmbeddingIndex(mapped, block_size=64).search(queries, 20)
        assert found[1].equal((queries @ embeddings.T).topk(20, dim=1).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faiss_finds_what_torch_finds(dtype):
    queries, embeddings = torch.randn(7, 16), torch.randn(300, 16).to(dtype)
    similarities, rows = EmbeddingIndex(embeddings).search(queries, 20)
    found = EmbeddingIndex(embeddings, backend="faiss").search(queries, 20)
    torch.testing.assert_close(found[0], similarities)
    assert found[1].equal(rows)


def test_clusters_find_most_of_what_lies_in_clusters_and_all_where_all_are_probed():
    centres = torch.nn.functional.normalize(torch.randn(50, 32), dim=1)
    embeddings = torch.nn.functional.normalize(centres.repeat(80, 1) + 0.05 * torch.randn(4000, 32), dim=1)
    queries = torch.nn.functional.normalize(centres[:9] + 0.05 * torch.randn(9, 32), dim=1)
    similarities, rows = EmbeddingIndex(embeddings).search(queries, 10)
    found = EmbeddingIndex(embeddings, backend="faiss-ivf").search(queries, 10)[1]
    hits = sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), rows.tolist(), strict=True))
    assert hits >= 0.9 * rows.numel()
    everywhere = EmbeddingIndex(embeddings, backend="faiss-ivf", probes=4000).search(queries, 10)
    torch.testing.assert_close(everywhere[0], similarities)


def test_clusters_that_hold_too_few_rows_say_so():
    index = EmbeddingIndex(torch.randn(400, 8), backend="faiss-ivf", probes=1)
    similarities, rows = index.search(torch.randn(2, 8), 400)
    assert (rows == -1).any() and similarities[rows == -1].isneginf().all()


def test_wrong_searches_are_told_in_a_sentence(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'annoy'"):
        EmbeddingIndex(torch.ones(3, 2), backend="annoy")
    with pytest.raises(ValueError, match=r"embeddings are torch.float64 \[3, 2\]"):
        EmbeddingIndex(torch.ones(3, 2).double())
    with pytest.raises(ValueError, match="top_k is 0"):
        EmbeddingIndex(torch.ones(3, 2)).search(torch.ones(1, 2), 0)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        EmbeddingIndex(torch.ones(3, 2), backend="faiss")
