"""Find the rows of a large matrix that are most like a query: exactly, or with faiss."""

import math
from typing import Any

import torch
from torch import Tensor


# Up to this many queries, reading the matrix takes longer than computing with it: an eighth of a byte a bit matters.
FEW_QUERIES = 4

QUERIES_AT_ONCE = 1024
ROWS_ENCODED_AT_ONCE = 2048

# So many that few of the best share one.
GROUPS_OF_EACH_RESULT = 12

# Rounding to bfloat16 changes a number by up to 2^-8 of it; two roundings, and some for sums in float32.
BFLOAT16_ERRORS = 1.02 * 2**-7


class EmbeddingIndex:
    """Search by inner product among embeddings, which may be mapped from disk.

    A single query is as slow as the memory that it reads. Therefore rows are kept in memory as int8 too, a quarter of
    float32, with how far each is from its row: a few queries are compared with these first, and only rows that can be
    among the best with their true values. What is found is what a full sort finds.

    Args:
        embeddings: `[n, E]`, float32 or bfloat16. They are read when they are searched: don't change them.
        backend: "torch"; "faiss", exact as well; or "faiss-ivf", which looks in the clusters nearest to the query only
            and may miss some (`pip install faiss-cpu`).
        block_size: rows that are compared at a time.
        probes: clusters that "faiss-ivf" looks in; by default an eighth of them.

    Raises:
        ValueError: if the backend is unknown, or the embeddings are no float32 or bfloat16 matrix.
        ImportError: if faiss is asked for and not installed.
    """

    BACKENDS = ("torch", "faiss", "faiss-ivf")

    def __init__(self, embeddings: Tensor, backend: str = "torch", block_size: int = 16384, probes: int | None = None):
        if backend not in self.BACKENDS:
            raise ValueError(f"backend is {backend!r}: {', '.join(map(repr, self.BACKENDS))} are known")
        if embeddings.ndim != 2 or embeddings.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"embeddings are {embeddings.dtype} {list(embeddings.shape)}: float32 or bfloat16 [n, E] are needed"
            )
        self.embeddings = embeddings
        self.backend = backend
        self.block_size = block_size
        self._faiss: Any = _import_faiss(backend) if backend != "torch" else None  # a module without type hints
        self._clusters = self._cluster(probes) if backend == "faiss-ivf" else None
        self._codes: _Codes | None = None

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Find the rows with the highest inner products.

        Args:
            queries: `[Q, E]`.
            top_k: how many to find; k is at most n.

        Returns:
            Inner products float32 `[Q, k]`, highest first, and their rows int64 `[Q, k]`. Where "faiss-ivf" finds fewer,
            the rest is -inf and -1.

        Raises:
            ValueError: if `top_k` is not positive.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}: a positive number is needed")
        k = min(top_k, len(self.embeddings))
        queries = queries.float()
        if self.backend != "torch":
            return self._search_faiss(queries, k)
        if len(queries) <= FEW_QUERIES and queries.device.type == "cpu" and len(self.embeddings) > self.block_size:
            find = self._search_codes
        else:
            find = self._search_blocks
        similarities, rows = zip(*(find(some, k) for some in queries.split(QUERIES_AT_ONCE)), strict=True)
        return torch.cat(similarities), torch.cat(rows)

    def _search_blocks(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        best = queries.new_empty(len(queries), 0)
        best_rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self.embeddings), self.block_size):
            block = self.embeddings[start : start + self.block_size].to(queries)
            similarities = torch.cat([best, queries @ block.T], dim=1)
            rows = torch.arange(start, start + len(block), device=queries.device).expand(len(queries), -1)
            best, places = similarities.topk(min(k, similarities.shape[1]), dim=1)
            best_rows = torch.cat([best_rows, rows], dim=1).gather(1, places)
        return best, best_rows

    def _search_codes(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._codes is None:
            self._codes = _Codes(self.embeddings)
        lower, upper = self._codes.bounds(queries)
        needed = _reached_by(lower, k)
        found = []
        for query, possible in zip(queries, upper >= needed, strict=True):
            rows = possible.nonzero()[:, 0]
            best, places = (self.embeddings.index_select(0, rows).float() @ query).topk(k)
            found.append((best, rows[places]))
        similarities, rows = zip(*found, strict=True)
        return torch.stack(similarities), torch.stack(rows)

    def _cluster(self, probes: int | None) -> Any:
        size, dim = self.embeddings.shape
        clusters = max(1, min(4 * math.isqrt(size), size // 39))  # faiss wants 39 rows or more a cluster
        index = self._faiss.IndexIVFFlat(self._faiss.IndexFlatIP(dim), dim, clusters, self._faiss.METRIC_INNER_PRODUCT)
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(size, generator=generator)[: 64 * clusters]
        index.train(self.embeddings[some].float().numpy())
        for block in self.embeddings.split(self.block_size):
            index.add(block.float().numpy())
        index.nprobe = max(1, clusters // 8) if probes is None else probes
        return index

    def _search_faiss(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self._clusters is not None:
            similarities, rows = self._clusters.search(queries.cpu().numpy(), k)
        else:
            similarities, rows = self._faiss.knn(
                queries.cpu().numpy(),
                self.embeddings.float().numpy(),
                k,
                metric=self._faiss.METRIC_INNER_PRODUCT,
            )
        similarities, rows = torch.from_numpy(similarities), torch.from_numpy(rows)
        return similarities.masked_fill(rows < 0, -torch.inf).to(queries.device), rows.to(queries.device)


class _Codes:
    """Rows `[n, E]` in int8, and how far from the truth the inner product of a row and a query of length 1 can be."""

    def __init__(self, embeddings: Tensor):
        blocks = embeddings.split(ROWS_ENCODED_AT_ONCE)
        parts = zip(*(self._encode(block.float()) for block in blocks), strict=True)
        self.codes, self.scales, self.slack = (torch.cat(part) for part in parts)

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest = rows.abs().amax(dim=1, keepdim=True)
        # A scale that bfloat16 holds exactly, as that is how it is multiplied.
        scales = (largest / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
        codes = (rows / scales.float()).round().clamp(-127, 127).to(torch.int8)
        decoded = codes * scales.float()
        # By Cauchy and Schwarz: of the row's rounding, and of the query's and the product's to bfloat16.
        slack = (rows - decoded).norm(dim=1) + BFLOAT16_ERRORS * decoded.norm(dim=1)
        return codes, scales[:, 0], slack

    def bounds(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What the inner products with queries `[Q, E]` can be at least and at most, `[Q, n]` each."""
        # Of PyTorch's products with int8 this one reads the codes only once and works row by row (weight-only int8).
        products = torch._weight_int8pack_mm(queries.to(torch.bfloat16), self.codes, self.scales).float()
        lengths = queries.norm(dim=1, keepdim=True)
        return products.addcmul(lengths, self.slack, value=-1), products.addcmul(lengths, self.slack)


def _reached_by(values: Tensor, k: int) -> Tensor:
    """Return `[Q, 1]`, what at least k of the values `[Q, n]` reach, a little less than the k-th highest.

    It is the k-th highest of the maxima of many groups, which take less time to find than k values to sort out.
    """
    group = max(1, values.shape[1] // (GROUPS_OF_EACH_RESULT * k))
    grouped = values[:, : values.shape[1] // group * group].unflatten(1, (group, -1))
    return grouped.amax(dim=1).topk(k, dim=1).values[:, -1:]


def _import_faiss(backend: str) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"backend={backend!r} needs faiss: pip install faiss-cpu, or leave backend='torch'"
        ) from error
    return faiss
