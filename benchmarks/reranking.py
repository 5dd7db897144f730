"""How many pairs of a text and a video are matched in a second: ours, against one by one through BlipTextModel.

    python benchmarks/reranking.py --output reranking.json

128 candidates are re-ranked for each of 64 texts of 64 tokens. How many texts select the same video depends on how many
videos there are: 16 where they are 512, 64 where all texts have the same 128 candidates. What is timed is a share of
this work: all pairs of some videos, read from a gallery on disk with `match_scores`, and some pairs one by one through
the text encoder of the same size of transformers (whose attention is eager: it has no other). The time of the processors
is told too, as it depends less on what else the machine does; and how many times fewer multiply-adds ours takes, which
is what can be gained where arithmetic is all that counts.
"""

import statistics
import tempfile
from collections.abc import Sequence

import torch
from measuring import (
    alternate_with_processors,
    benchmark_parser,
    describe_machine,
    median_ratio,
    print_table,
    save_json,
)
from transformers import BlipTextConfig, BlipTextModel

from transformers_testa import TestaConfig, TestaForRetrieval
from transformers_testa.gallery import Gallery
from transformers_testa.retrieval import match_scores


TEXTS, CANDIDATES = 64, 128
PEER_PAIRS = 4  # a run
LEAST, AIM = {1041: 3, 4801: 8}, {1041: 5, 4801: 14}
VOCABULARY = 30524


def create_models(num_layers: int, device: str, dtype: torch.dtype) -> tuple[TestaForRetrieval, BlipTextModel]:
    """Return our retrieval model and BLIP's text encoder, both of the base size, with random weights."""
    config = TestaConfig(video_config={"num_hidden_layers": 1}, text_config={"num_hidden_layers": num_layers})
    text = config.text_config
    peer_config = BlipTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=text.hidden_size,
        encoder_hidden_size=text.encoder_hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=text.num_attention_heads,
        is_decoder=True,  # which for BLIP means that there is cross-attention
    )
    models = TestaForRetrieval(config), BlipTextModel(peer_config, add_pooling_layer=False)
    return tuple(model.eval().to(device, dtype) for model in models)


def measure(
    models: tuple[TestaForRetrieval, BlipTextModel],
    num_tokens: int,
    texts_per_video: int,
    text_tokens: int,
    videos_a_run: int,
    repeats: int,
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Return the seconds, and those of the processors, that a pair takes in each run, and how many pairs a run has."""
    model, peer = models
    width = model.config.video_config.hidden_size
    input_ids = torch.randint(1000, 30000, (texts_per_video, text_tokens))
    attention_mask = torch.ones_like(input_ids)
    hidden_states = torch.randn(videos_a_run, num_tokens, width, dtype=model.dtype)
    pairs = torch.cartesian_prod(torch.arange(texts_per_video), torch.arange(videos_a_run))
    video, ids, mask = (tensor[:1].to(model.device) for tensor in (hidden_states, input_ids, attention_mask))

    def peer_pairs():
        with torch.inference_mode():
            for _ in range(PEER_PAIRS):
                peer(ids, mask, encoder_hidden_states=video, is_decoder=False, use_cache=False)

    counts = {"one by one": PEER_PAIRS, "ours": len(pairs)}

    with tempfile.TemporaryDirectory() as folder:
        with Gallery(folder, model, writable=True, dtype=model.dtype) as gallery:
            embeddings = torch.zeros(videos_a_run, model.config.projection_dim)
            gallery.add([str(number) for number in range(videos_a_run)], embeddings, hidden_states)
        seconds, processor_seconds = (
            {name: [run / counts[name] for run in runs] for name, runs in measured.items()}
            for measured in alternate_with_processors(
                {
                    "one by one": peer_pairs,
                    "ours": lambda: match_scores(model, gallery, input_ids, attention_mask, *pairs.T),
                },
                repeats,
            )
        )
    return seconds, processor_seconds, counts


def saved_arithmetic(num_layers: int, num_tokens: int, texts_per_video: int, text_tokens: int) -> float:
    """Return how many times fewer multiply-adds a pair takes in ours, for the base size."""
    width = 768
    projection = text_tokens * width**2
    to_itself = 4 * projection + 2 * text_tokens**2 * width
    to_video = 2 * projection + 2 * text_tokens * num_tokens * width
    keys_values, mlp = 2 * num_tokens * width**2, 8 * projection
    one_by_one = num_layers * (to_itself + to_video + keys_values + mlp)
    last = 2 * projection + (to_itself - 2 * projection + to_video + mlp) / text_tokens  # one token, and all keys
    shared = num_layers * keys_values / texts_per_video + to_itself / CANDIDATES
    middle = (num_layers - 2) * to_itself + (num_layers - 1) * (to_video + mlp)
    return one_by_one / (middle + last + shared)


def main(arguments: Sequence[str] | None = None):
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--video_tokens", type=int, nargs="+", default=list(LEAST))
    parser.add_argument("--text_tokens", type=int, default=64)
    parser.add_argument("--texts_per_video", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--layers", type=int, default=12, help="Of both text encoders.")
    parser.add_argument("--videos_a_run", type=int, default=1, help="Videos whose pairs are matched in a run.")
    args = parser.parse_args(arguments)

    machine = describe_machine(args.device)
    print(f"{machine}, {args.dtype}")
    torch.manual_seed(0)
    models = create_models(args.layers, args.device, getattr(torch, args.dtype))
    rows = []
    for num_tokens in args.video_tokens:
        for texts_per_video in args.texts_per_video:
            seconds, processor_seconds, counts = measure(
                models, num_tokens, texts_per_video, args.text_tokens, args.videos_a_run, args.repeats
            )
            medians = {name: statistics.median(runs) for name, runs in seconds.items()}
            rows.append(
                {
                    "video tokens": num_tokens,
                    "texts a video": texts_per_video,
                    "pairs/s one by one": 1 / medians["one by one"],
                    "pairs/s ours": 1 / medians["ours"],
                    "ours is faster by": median_ratio(seconds, "one by one", "ours"),
                    "by processor time": median_ratio(processor_seconds, "one by one", "ours"),
                    "fewer multiply-adds by": saved_arithmetic(
                        args.layers, num_tokens, texts_per_video, args.text_tokens
                    ),
                    "at least": LEAST.get(num_tokens),
                    "aim": AIM.get(num_tokens),
                    "fastest and slowest run, ours": " ".join(f"{1 / f(seconds['ours']):.3g}" for f in (min, max)),
                    "measured": " ".join(f"{args.repeats * count}/{TEXTS * CANDIDATES}" for count in counts.values()),
                }
            )
    print_table(rows)
    save_json(args.output, f"{machine}, {args.dtype}", rows)


if __name__ == "__main__":
    main()
