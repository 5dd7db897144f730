"""A page to try the models: search a folder of videos by a paragraph, ask about a video, see what merges in it.

    pip install -e ".[app]"
    python app.py --model runs/testa-demo --qa_model runs/testa-demo-videoqa --folder demo_stories/videos

Gradio's own variables say where the page is served, such as GRADIO_SERVER_PORT; nothing of it needs a network.
"""

import argparse
import base64
import copy
import functools
import hashlib
import html
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import logging

from transformers_testa import TestaForRetrieval, TestaForVideoQA, VideoQuestionAnsweringPipeline
from transformers_testa.budgets import least_keep_ratio, plan_merges
from transformers_testa.flops import count_video_gflops
from transformers_testa.gallery import Gallery
from transformers_testa.merging import count_kept, with_merges
from transformers_testa.processing_testa import TestaProcessor
from transformers_testa.retrieval import VideoSearch, find_videos, index_videos, inference
from transformers_testa.visualization import draw_merged_regions


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
import gradio as gr


logging.set_verbosity_error()

VIDEOS_SHOWN = 6
FRAMES_SHOWN = 3
ANSWERS_SHOWN = 3
STEP = 5  # percent of the cost
DISPLAY_SIZE = {"max_height": 240, "max_width": 320}

STYLE = """
.notice .html-container, #results .html-container, #merges .html-container { padding: 0 }
.notice p { margin: 0; padding: .6em .9em; border: 1px solid var(--border-color-primary); border-radius: 8px;
            background: var(--block-background-fill); overflow-wrap: anywhere }
.notice p + p { margin-top: .4em }
.notice > .wrap { background: var(--background-fill-primary); min-height: 4em }
@media (max-width: 40em) { .notice .meta-text, .notice .meta-text-center { display: none } }
p.error { border-color: #d97706; border-left-width: 5px }
.scores, figcaption { opacity: .75 }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28em), 1fr)); gap: 1.4em }
.results h3 { margin: 0; font-size: 1.05em; overflow-wrap: anywhere }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9em, 30%), 1fr)); gap: .5em; margin-top: .5em }
.results .frames { grid-template-columns: repeat(3, minmax(0, 1fr)) }
.frames figure { margin: 0 }
.frames img { width: 100%; border-radius: 6px; display: block }
figcaption { font-size: .85em; text-align: center }
"""


# --- Models, with as much merging as the page asks for -----------------------------------------------------------------


Model = TypeVar("Model", bound=PreTrainedModel)


class AdjustableModel(Generic[Model]):
    """A model that is to be had at any percentage of what it costs without merging; all share their weights.

    Attributes:
        own_percent: Stands for the merging that the model was saved with, the nearest on the slider's scale.
        least_percent: The lowest on that scale.
    """

    def __init__(self, model_class: type[Model], name: str):
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        try:
            # With `output_loading_info` these are two.
            loaded: Any = model_class.from_pretrained(name, output_loading_info=True)
        except OSError as error:
            raise ValueError(
                f"{name} is no folder of a model, and no Hub repository that can be read. {error}"
            ) from error
        self._model: Model = loaded[0]
        report: dict[str, set[str]] = loaded[1]
        if report["missing_keys"]:
            raise ValueError(
                f"{name} is no {model_class.__name__}: it has no weights for {min(report['missing_keys'])} and "
                f"{len(report['missing_keys']) - 1} others. Give a folder or Hub repository of one."
            )
        self._model.eval().to(device)
        self.processor: TestaProcessor = AutoProcessor.from_pretrained(name)
        self._config = self._model.config.video_config
        self._unmerged_gflops = count_video_gflops(with_merges(self._model, 0, 0).config.video_config)
        own_ratio = count_video_gflops(self._config) / self._unmerged_gflops
        self.least_percent = STEP * math.ceil(100 * least_keep_ratio(self._config) / STEP)
        self.own_percent = max(self.least_percent, STEP * round(100 * own_ratio / STEP))
        self.with_percent = functools.cache(self._with_percent)

    def _with_percent(self, percent: int) -> Model:
        return with_merges(self._model, *self._plan(percent))

    def _plan(self, percent: int) -> tuple[list[int], list[int]]:
        """Return the frames and patches that merge in each block."""
        if percent == self.own_percent:
            return self._config.merged_frames, self._config.merged_patches
        return plan_merges(self._config, keep_ratio=percent / 100)

    def describe(self, percent: int) -> str:
        """Say what a percentage costs."""
        config = copy.deepcopy(self._config)
        config.merged_frames_per_layer, config.merged_patches_per_layer = self._plan(percent)
        gflops = count_video_gflops(config)
        shown = f"{gflops:.3g}" if gflops < 100 else f"{gflops:.0f}"
        frames, patches = count_kept(config)
        origin = " This is how the model was trained." if percent == self.own_percent else ""
        return (
            f"**{shown} GFLOPs** a video, {gflops / self._unmerged_gflops:.0%} of what it costs without merging. "
            f"Of {config.num_frames} × {config.num_patches} tokens (frames × patches), {frames} × {patches} are left.{origin}"
        )

    @functools.cached_property
    def costs(self) -> dict[int, str]:
        """What each whole percentage costs, in a sentence."""
        return {percent: self.describe(percent) for percent in range(self.least_percent, 101)}


def check_length(processor: TestaProcessor, model: PreTrainedModel, text: str) -> None:
    """Raise ValueError where a text is too long for a model, which would otherwise leave its end unread."""
    length = len(processor.tokenizer(text, truncation=False, verbose=False).input_ids)
    longest = processor.longest_text(model)
    if length > longest:
        raise ValueError(f"This text is too long: it has {length} tokens, and the model reads {longest}. Shorten it.")


def sampled_frames(processor: TestaProcessor, video: str) -> tuple[np.ndarray, list[float]]:
    """Return the frames that a model sees of a video, uint8 `[T, H, W, 3]` large enough to look at, and their times."""
    outputs = processor.video_processor(
        *(video,), size=DISPLAY_SIZE, do_rescale=False, do_normalize=False, return_metadata=True, return_tensors="np"
    )
    return outputs["pixel_values_videos"][0].transpose(0, 2, 3, 1), outputs["video_metadata"][0].frame_times


# --- What the page does ------------------------------------------------------------------------------------------------


class Page:
    """Answers to what is pressed on the page. What is returned goes to the page's parts; errors are ValueErrors."""

    def __init__(
        self,
        retrieval: AdjustableModel[TestaForRetrieval],
        answering: AdjustableModel[TestaForVideoQA] | None,
        gallery_dir: str,
    ):
        self.retrieval = retrieval
        self.answering = answering
        self.gallery_dir = gallery_dir
        self.searches: dict[tuple[str, int], VideoSearch] = {}  # by folder and percentage

    def index(self, folder: str, percent: int, progress: gr.Progress = gr.Progress(track_tqdm=True)) -> tuple:  # noqa: B008
        """Index a folder; return a sentence, the index for this session, and the videos to choose from."""
        if not folder.strip():
            raise ValueError("Give the path of a folder of videos.")
        folder = str(Path(folder.strip()).expanduser().resolve())
        videos = find_videos(folder)
        model, processor = self.retrieval.with_percent(percent), self.retrieval.processor
        progress(0, desc=f"Embedding {len(videos)} videos")
        name = f"{hashlib.sha256(folder.encode()).hexdigest()[:16]}-{percent}"
        with Gallery(Path(self.gallery_dir, name), model, writable=True) as gallery:
            report = index_videos(model, processor, videos, gallery)
        if len(report.failed) == len(videos):
            raise ValueError(f"No video in {folder} can be read. {next(iter(report.failed.values()))}")
        self.searches[folder, percent] = VideoSearch(model, processor, gallery)
        names = [(os.path.relpath(video, folder), str(video)) for video in videos if str(video) not in report.failed]
        ready = "1 video is" if len(names) == 1 else f"{len(names)} videos are"
        there = f", {report.skipped} of them from before" if report.skipped else ""
        failures = [tell(f"Left out: {why}", "error") for why in report.failed.values()]
        notice = tell(f"{ready} ready to be searched{there}.") + "".join(failures)
        return notice, (folder, percent), gr.Dropdown(names, value=names[0][1])

    def search(self, text: str, index: tuple[str, int] | None, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
        """Return a sentence, the videos found, and the best of them as the one to look into."""
        if not text.strip():
            raise ValueError("Write what happens in the video that you look for.")
        if index is None:
            raise ValueError("There is nothing to search yet: index a folder of videos first.")
        folder, _ = index
        search = self.searches[index]
        check_length(search.processor, search.model, text)
        (found,) = search.search(text, top_k=VIDEOS_SHOWN)
        results = []
        for rank, result in enumerate(progress.tqdm(found, desc="Looking for the best frames"), start=1):
            try:
                frames = self._best_frames(search, text, result.id)
            except ValueError as error:  # the video has gone or changed since it was indexed
                frames = tell(error, "error")
            scores = (
                f"score <b>{result.score:.2f}</b> (similarity {result.similarity:.2f}, match {result.match_logit:.2f})"
            )
            results.append(
                f"<div><h3>{rank}. {html.escape(os.path.relpath(result.id, folder))}</h3>"
                f'<span class="scores">{scores.replace("-", "−")}</span>{frames}</div>'
            )
        notice = tell(f"The best {len(found)} of {len(search.gallery)} videos, re-ranked by the matching head.")
        return notice, f'<div class="results">{"".join(results)}</div>', found[0].id

    def _best_frames(self, search: VideoSearch, text: str, video: str) -> str:
        similarities = search.frame_similarities(text, video)
        frames, times = sampled_frames(search.processor, video)
        # Frames that merged are equally similar: the first of them stands for all.
        first_of = {similarity: frame for frame, similarity in reversed(list(enumerate(similarities.tolist())))}
        best = sorted(first_of[similarity] for similarity in sorted(first_of, reverse=True)[:FRAMES_SHOWN])
        return show_frames(frames[best], [f"{times[frame]:.1f} s" for frame in best])

    def ask(self, video: str | None, question: str, candidates: str, percent: int) -> tuple:
        """Return a sentence, and answers with their probabilities."""
        video = require_video(video)
        if not question.strip():
            raise ValueError("Write a question about the video.")
        assert self.answering is not None  # or the page has no questions
        model, processor = self.answering.with_percent(percent), self.answering.processor
        check_length(processor, model, question)
        pipeline = VideoQuestionAnsweringPipeline(model=model, processor=processor, device=model.device)
        proposed = [candidate.strip() for candidate in candidates.split(",") if candidate.strip()]
        for candidate in proposed:
            check_length(processor, model, candidate)
        options = {"candidates": proposed} if proposed else {"max_new_tokens": 20}
        answers = pipeline(video, question, top_k=ANSWERS_SHOWN, **options)
        notice = tell("How the model shares 1 among these answers." if proposed else "In the model's own words.")
        return notice, {answer["answer"] or "(nothing)": answer["score"] for answer in answers}

    def draw_merges(self, video: str | None, percent: int) -> tuple:
        """Return a sentence and the frames of a video with the regions that became one token each."""
        video = require_video(video)
        model, processor = self.retrieval.with_percent(percent), self.retrieval.processor
        pixels = processor(videos=[video], return_tensors="pt")["pixel_values_videos"]
        with inference(model):
            token_map = model.get_video_features(pixels.to(model.device)).token_map[0].cpu()
        frames, times = sampled_frames(processor, video)
        captions = [f"{time:.1f} s" for time in times]
        tokens = len(token_map[token_map >= 0].unique())
        notice = tell(
            f"{token_map.numel()} patches became {tokens} tokens. Patches of one colour are one token, wherever they are; "
            "frames with a border of one colour share tokens."
        )
        return notice, show_frames(draw_merged_regions(frames, token_map), captions)


def require_video(video: str | None) -> str:
    if not video:
        raise ValueError("There is no video to choose yet: index a folder of videos first.")
    return video


# --- How it looks ------------------------------------------------------------------------------------------------------


def tell(sentence: Any, kind: str = "") -> str:
    """Return HTML of a sentence to the reader."""
    return f'<p class="{kind}" role="{"alert" if kind else "status"}">{html.escape(str(sentence))}</p>'


def show_frames(frames: np.ndarray, captions: Iterable[str]) -> str:
    """Return HTML of frames `[T, H, W, 3]` with captions."""
    figures = []
    for frame, caption in zip(frames, captions, strict=True):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "webp", quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        figures.append(
            f'<figure><img src="data:image/webp;base64,{data}" alt="Frame at {caption}"><figcaption>{caption}</figcaption>'
            "</figure>"
        )
    return f'<div class="frames">{"".join(figures)}</div>'


def tell_errors(action: Callable[..., tuple], num_outputs: int) -> Callable[..., tuple]:
    """Make what a person did wrong a sentence in the first output; the others stay as they are."""

    @functools.wraps(action)
    def act(*args: Any, **kwargs: Any) -> tuple:
        try:
            return action(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            return tell(error, "error"), *[gr.skip()] * (num_outputs - 1)

    return act


def build_page(page: Page, folder: str) -> gr.Blocks:
    """Lay out the page and connect it."""

    def slider(model: AdjustableModel, name: str, purpose: str = "") -> gr.Slider:
        percent = gr.Slider(
            *(model.least_percent, 100, model.own_percent),
            step=STEP,
            label=f"Cost to spend{purpose}, %",
            elem_id=f"{name}-percent",
        )
        cost = gr.Markdown(model.costs[model.own_percent], elem_id=f"{name}-cost")
        # In the page itself: the server refuses what is being typed (the 9 of 90), and the page then forgets what follows.
        look_up = f"(percent, shown) => ({json.dumps(model.costs)})[Math.round(percent)] ?? shown"
        percent.change(None, [percent, cost], cost, js=look_up, show_progress="hidden", api_visibility="private")
        return percent

    def connect(triggers: list[Callable], action: Callable, inputs: list, outputs: list) -> None:
        gr.on(
            triggers,
            tell_errors(action, len(outputs)),
            inputs,
            outputs,
            show_progress_on=outputs[0],
            concurrency_limit=1,
            concurrency_id="model",
            api_visibility="private",
        )

    def notice(name: str, sentence: str) -> gr.HTML:
        return gr.HTML(tell(sentence), elem_id=f"{name}-notice", elem_classes="notice")

    with gr.Blocks(title="TESTA: search long videos", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Search long videos\nIndex a folder, then find the video that a paragraph describes. Inside the model similar "
            "frames and patches merge: the less it may spend, the more merge, and the faster it reads a video."
        )
        index = gr.State()
        with gr.Row():
            with gr.Column():
                folder_box = gr.Textbox(
                    folder, label="Folder of videos", placeholder="/path/to/videos", elem_id="folder"
                )
                index_button = gr.Button("Index the folder", variant="primary", elem_id="index")
            with gr.Column():
                index_percent = slider(page.retrieval, "index", " when indexing")
        index_notice = notice("index", "No folder is indexed yet.")

        with gr.Tab("Search"):
            text = gr.Textbox(
                label="What happens in the video",
                placeholder="First a dog runs along the beach. Then it sleeps.",
                lines=4,
                elem_id="text",
            )
            search_button = gr.Button("Search", variant="primary", elem_id="search")
            search_notice = notice("search", "The videos found appear here, with the frames that fit best.")
            results = gr.HTML(elem_id="results")

        with gr.Tab("Look into a video"):
            video = gr.Dropdown([], label="Video", elem_id="video")
            with gr.Row():
                if page.answering is not None:
                    with gr.Column():
                        question = gr.Textbox(label="Question", placeholder="What comes first?", elem_id="question")
                        candidates = gr.Textbox(
                            label="Answers to choose from (optional)", placeholder="a dog, a cat", elem_id="candidates"
                        )
                        asked_percent = slider(page.answering, "ask", " when answering")
                        ask_button = gr.Button("Ask", variant="primary", elem_id="ask")
                        ask_notice = notice("ask", "Answers appear here, with their probabilities.")
                        answers = gr.Label(label="Answers", elem_id="answers")
                with gr.Column():
                    drawn_percent = slider(page.retrieval, "draw")
                    draw_button = gr.Button("Show what merges", variant="primary", elem_id="draw")
                    draw_notice = notice("draw", "Frames appear here, with what became one token drawn over them.")
                    merges = gr.HTML(elem_id="merges")

        index_outputs = [index_notice, index, video]
        connect([index_button.click, folder_box.submit], page.index, [folder_box, index_percent], index_outputs)
        connect([search_button.click], page.search, [text, index], [search_notice, results, video])
        drawing = [video, drawn_percent], [draw_notice, merges]
        connect([draw_button.click, drawn_percent.release], page.draw_merges, *drawing)
        if page.answering is not None:
            asking = [video, question, candidates, asked_percent], [ask_notice, answers]
            connect([ask_button.click, question.submit], page.ask, *asking)
            video.change(lambda: None, None, answers, show_progress="hidden", api_visibility="private")
        video.change(lambda: None, None, merges, show_progress="hidden", api_visibility="private")
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description="A page to search a folder of videos, ask about them and see merges.")
    variable = os.environ.get  # a Space sets its variables, not its command line
    parser.add_argument("--model", default=variable("TESTA_MODEL", "runs/testa-demo"), help="a TestaForRetrieval")
    parser.add_argument(
        "--qa_model", default=variable("TESTA_QA_MODEL"), help="a TestaForVideoQA; without, no questions"
    )
    parser.add_argument("--folder", default=variable("TESTA_FOLDER", ""), help="folder of videos that is proposed")
    parser.add_argument("--gallery_dir", help="where embedded videos are kept for the next time; forgotten by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            retrieval = AdjustableModel(TestaForRetrieval, options.model)
            answering = AdjustableModel(TestaForVideoQA, options.qa_model) if options.qa_model else None
        except ValueError as error:
            parser.error(str(error))
        page = Page(retrieval, answering, options.gallery_dir or temporary)
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        build_page(page, options.folder).launch(share=False, ssr_mode=False, theme=theme, css=STYLE, footer_links=[])


if __name__ == "__main__":
    main()
