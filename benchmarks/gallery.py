"""How long a search of a large gallery takes, and what its videos take on disk.

    python benchmarks/gallery.py --output gallery.json

Search: the 128 best of 100,000 embeddings of 256 numbers for one query, against a full sort by numpy. The embeddings are
random directions, which have no clusters: nothing is harder for the approximate index. Storage: token features of one
batch of videos, written and read with each dtype.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measuring import (
    alternate,
    alternate_with_processors,
    benchmark_parser,
    describe_machine,
    median_ratio,
    print_table,
    save_json,
)
from torch import Tensor

from transformers_testa import TestaConfig, TestaForRetrieval
from transformers_testa.gallery import Gallery, bytes_per_video
from transformers_testa.search import EmbeddingIndex


LEAST, AIM, LIMIT_MS = 5, 20, 15
NUMPY = "numpy, full argsort"
OURS = "EmbeddingIndex, float32"


def search(num_videos: int, dim: int, top_k: int, num_queries: int, repeats: int, folder: Path) -> list[dict]:
    """Time one search and compare what is found with a full sort."""
    embeddings = F.normalize(torch.randn(num_videos, dim), dim=1)
    queries = F.normalize(torch.randn(num_queries, dim), dim=1)
    indices = {
        OURS: EmbeddingIndex(mapped(embeddings, folder / "float32.bin")),
        "EmbeddingIndex, bfloat16": EmbeddingIndex(mapped(embeddings.to(torch.bfloat16), folder / "bfloat16.bin")),
        "EmbeddingIndex, faiss": EmbeddingIndex(embeddings, backend="faiss"),
        "EmbeddingIndex, faiss-ivf": EmbeddingIndex(embeddings, backend="faiss-ivf"),
    }
    matrix, query_matrix = embeddings.numpy(), queries.numpy()

    def sort_all() -> np.ndarray:
        return np.argsort(-(query_matrix @ matrix.T), axis=1)[:, :top_k]

    def find(index: EmbeddingIndex):
        return lambda: index.search(queries, top_k)

    seconds, processor_seconds = alternate_with_processors(
        {NUMPY: sort_all} | {name: find(index) for name, index in indices.items()}, repeats
    )
    best = sort_all().tolist()
    rows = []
    for name, runs in seconds.items():
        found = best if name == NUMPY else indices[name].search(queries, top_k)[1].tolist()
        hits = sum(len(set(a) & set(b)) for a, b in zip(best, found, strict=True))
        rows.append(
            {
                "search": name,
                "queries": num_queries,
                "ms": 1000 * statistics.median(runs),
                "fastest, ms": 1000 * min(runs),
                "faster than numpy by": median_ratio(seconds, NUMPY, name),
                "by processor time": median_ratio(processor_seconds, NUMPY, name),
                "by the fastest runs": min(seconds[NUMPY]) / min(runs),
                "found of the best": f"{hits / (num_queries * min(top_k, num_videos)):.1%}",
                "at least": LEAST if name == OURS and num_queries == 1 else None,
                "aim": f"{AIM}, under {LIMIT_MS} ms" if name == OURS and num_queries == 1 else None,
            }
        )
    return rows


def mapped(tensor: Tensor, path: Path) -> Tensor:
    """Write a tensor to a file and return it mapped from there."""
    path.write_bytes(tensor.view(torch.uint8).numpy().tobytes())
    return torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype).view_as(tensor)


def storage(num_tokens: int, num_videos: int, batch_size: int, repeats: int, folder: Path) -> list[dict]:
    """Time writing and reading token features with each dtype, and tell what they take and lose."""
    model = TestaForRetrieval(TestaConfig(video_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": 1}))
    width, dim = model.config.video_config.hidden_size, model.config.projection_dim
    hidden_states, embeddings = torch.randn(batch_size, num_tokens, width), torch.randn(batch_size, dim)
    rows = []
    for name, dtype in Gallery.DTYPES.items():
        with Gallery(folder / name, model, writable=True, dtype=dtype) as gallery:

            def write(gallery=gallery):
                start = len(gallery)
                gallery.add([str(start + number) for number in range(batch_size)], embeddings, hidden_states)

            def read(gallery=gallery):
                return gallery.hidden_states(range(batch_size))

            seconds = alternate({"write": write, "read": read}, repeats)
            each = bytes_per_video(num_tokens, width, dim, dtype)
            error = (read().float() - hidden_states).norm() / hidden_states.norm()
            rows.append(
                {
                    "stored in": name,
                    "tokens": num_tokens,
                    "MB a video": each / 1e6,
                    f"GB for {num_videos:,} videos": num_videos * each / 1e9,
                    "ms to write a video": 1000 * statistics.median(seconds["write"]) / batch_size,
                    "ms to read a video": 1000 * statistics.median(seconds["read"]) / batch_size,
                    "relative error": "0" if not error else f"2^{math.log2(error):.1f}",
                }
            )
    return rows


def main(arguments: Sequence[str] | None = None):
    parser = benchmark_parser(__doc__, rows=("search", "storage"))
    parser.add_argument("--videos", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=256, help="Of an embedding.")
    parser.add_argument("--top_k", type=int, default=128)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64], help="How many queries a search has.")
    parser.add_argument("--tokens", type=int, default=1041, help="Of a video.")
    parser.add_argument("--batch_size", type=int, default=8, help="Videos a shard.")
    args = parser.parse_args(arguments)

    machine = describe_machine()
    print(machine)
    torch.manual_seed(0)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        if "search" in args.rows:
            results["search"] = [
                row
                for num_queries in args.queries
                for row in search(args.videos, args.dim, args.top_k, num_queries, args.repeats, Path(folder))
            ]
            print_table(results["search"])
            print()
        if "storage" in args.rows:
            results["storage"] = storage(args.tokens, args.videos, args.batch_size, args.repeats, Path(folder))
            print_table(results["storage"])
    save_json(args.output, machine, results)


if __name__ == "__main__":
    main()
