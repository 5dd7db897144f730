"""Pipelines of Transformers: the texts of a video, the videos of a text, and answers to questions about a video.

    from transformers import pipeline

    search = pipeline("video-text-retrieval", model="runs/testa-demo")
    search("a.mp4", candidate_texts=["A dog jumps.", "Two cats sleep."])
    search("A dog jumps.", candidate_videos=["a.mp4", "b.mp4"], rerank=True)

    ask = pipeline("video-question-answering", model="runs/testa-demo-videoqa")
    ask(video="a.mp4", question="What jumps?", candidates=["a dog", "a cat"])

A list of inputs gives a list of results; a generator or a data set gives an iterator that reads on as it is asked.
Folders of videos that are searched more than once belong into a gallery, see [`retrieval.VideoSearch`].
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from transformers import Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling_testa import TestaForRetrieval, TestaForVideoQA
from .processing_testa import TestaProcessor
from .video_processing_testa import Video


class _VideoTextPipeline(Pipeline):
    """What the pipelines share: a [`TestaProcessor`], which the base class knows only in parts."""

    _load_processor = True  # type: ignore[assignment]  # the base class declares them None
    _load_tokenizer = _load_image_processor = _load_video_processor = _load_feature_extractor = False  # type: ignore[assignment]
    model: PreTrainedModel
    processor: TestaProcessor
    _model_class: type[PreTrainedModel]
    _needed_method: str

    def __init__(self, model: PreTrainedModel, processor: TestaProcessor, **kwargs: Any):
        if not hasattr(model, self._needed_method):  # a model that peft wraps has the methods of the one inside
            raise ValueError(
                f"{type(self).__name__} needs a {self._model_class.__name__}; the model is a {type(model).__name__}."
            )
        model.eval()
        super().__init__(model=model, processor=processor, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model and the processor, from which [`~transformers.pipeline`] makes the same pipeline again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _tokenize(self, texts: Sequence[str], role: str) -> dict[str, Tensor]:
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{role} {text!r} is no text.")
        longest = self.processor.longest_text(self.model)
        tokens = self.processor(
            text=list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def _read_video(self, video: Video) -> list[Tensor]:
        """Return the frames `[1, T, C, H, W]`, in a list: the library would pad the tensors of a batch to one length."""
        frames = self.processor(videos=video, return_tensors="pt")["pixel_values_videos"]
        if len(frames) != 1:
            raise ValueError(f"{len(frames)} videos were given as one. Give a list with an entry for each.")
        return [frames]


def _batch_videos(videos: list[Tensor] | list[list[Tensor]]) -> Tensor:
    videos = [frames for item in videos for frames in (item if isinstance(item, list) else [item])]
    if len(shapes := {tuple(frames.shape[1:]) for frames in videos}) > 1:
        raise ValueError(
            f"Videos of the shapes {sorted(shapes)} can't share a batch. Use batch_size=1, or settings of the processor "
            "that give all videos one shape."
        )
    return torch.cat(videos)


class _Candidates(NamedTuple):
    """What queries are compared with: embeddings `[N, E]`, and what the matching head reads of each candidate."""

    embeddings: Tensor
    tokens: Mapping[str, Tensor] = {}  # of texts, [N, L]
    hidden_states: Sequence[Tensor] = ()  # of videos, [S, D]


class VideoTextRetrievalPipeline(_VideoTextPipeline):
    """Ranks texts by how well they describe a video, or videos by how well a text describes them.

    Made by `pipeline("video-text-retrieval", model=...)`; a model that isn't given by its folder needs its
    `processor=...`, too.
    """

    model: TestaForRetrieval
    _model_class = TestaForRetrieval
    _needed_method = "match"

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict] | list[list[dict]]:
        """Rank candidates for each input.

        Args:
            inputs: Videos (paths, URLs, bytes, arrays) with `candidate_texts`, or texts with `candidate_videos`: one,
                a list, a generator or a data set.
            candidate_texts: Texts to compare videos with.
            candidate_videos: Videos to compare texts with. They are encoded once a call.
            rerank: Whether the matching head reads each video with each text, which is slower and more accurate.
            top_k: How many candidates to return; all by default.
            batch_size: Inputs to encode at a time.

        Returns:
            For each input the candidates, best first: `score`, between 0 and 1, and `text` or `video`, as it was given.
            The scores of all candidates of an input sum to 1: they tell candidates apart, not whether any one fits.

        Raises:
            ValueError: Where there is no candidate, both kinds are given, or an input is neither video nor text.
            VideoDecodingError: Where a video can't be read.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        candidate_texts: list[str] | None = None,
        candidate_videos: list[Video] | None = None,
        rerank: bool | None = None,
        top_k: int | None = None,
    ) -> tuple[dict, dict, dict]:
        preprocess: dict[str, Any] = {}
        forward: dict[str, Any] = {}
        postprocess: dict[str, Any] = {}
        if candidate_texts is not None and candidate_videos is not None:
            raise ValueError("Both candidate_texts and candidate_videos are given. Give one of them.")
        for kind, candidates in (("text", candidate_texts), ("video", candidate_videos)):
            if candidates is not None:
                _check_list(f"candidate_{kind}s", candidates)
                preprocess["kind"] = kind
                postprocess |= {"kind": kind, "candidates": candidates}
        with self.device_placement(), torch.no_grad():
            if candidate_texts is not None:
                forward["candidates"] = self._encode_texts(candidate_texts)
            if candidate_videos is not None:
                forward["candidates"] = self._encode_videos(candidate_videos)
        if rerank is not None:
            forward["rerank"] = rerank
        if top_k is not None:
            postprocess["top_k"] = _check_positive(top_k)
        return preprocess, forward, postprocess

    def _encode_texts(self, texts: list[str]) -> _Candidates:
        tokens = self.ensure_tensor_on_device(**self._tokenize(texts, "Candidate"))
        return _Candidates(self.model.get_text_features(**tokens).pooler_output, tokens=tokens)

    def _encode_videos(self, videos: list[Video]) -> _Candidates:
        outputs = []
        for video in videos:
            (frames,) = self._read_video(video)
            outputs.append(self.model.get_video_features(frames.to(self.device)))
        return _Candidates(
            torch.cat([output.pooler_output for output in outputs]),
            hidden_states=[output.last_hidden_state[0] for output in outputs],
        )

    def preprocess(self, query: Any, kind: Literal["text", "video"] | None = None) -> dict[str, Any]:
        if kind is None:
            raise ValueError("There is nothing to compare with. Give candidate_texts, or candidate_videos.")
        return self._tokenize([query], "The input") if kind == "video" else {"videos": self._read_video(query)}

    def _forward(self, query: dict[str, Any], candidates: _Candidates, rerank: bool = False) -> dict[str, Tensor]:
        if "videos" in query:
            output = self.model.get_video_features(_batch_videos(query["videos"]))
            hidden_states, tokens = output.last_hidden_state, candidates.tokens
        else:
            output = self.model.get_text_features(**query)
            hidden_states, tokens = candidates.hidden_states, query
        similarities = output.pooler_output.float() @ candidates.embeddings.float().T  # [queries, candidates]
        if not rerank:
            return {"logits": similarities / self.model.bounded_temperature}
        states, read_video = (
            self.model.read_before_matching(**tokens),
            self.model.testa.text_model.cache_cross_attention,
        )
        match_logits = torch.stack(
            [
                self.model.match_states(states, tokens["attention_mask"], read_video(video[None]))[:, 1]
                for video in hidden_states
            ]
        )  # [videos, texts]
        return {"logits": similarities + (match_logits if "videos" in query else match_logits.T)}

    def postprocess(
        self,
        outputs: dict[str, Tensor],
        kind: Literal["text", "video"],
        candidates: list[str] | list[Video],
        top_k: int | None = None,
    ) -> list[dict[str, Any]]:
        best = _best(outputs["logits"][0], top_k)
        return [{"score": score, kind: candidates[number]} for score, number in best]


class VideoQuestionAnsweringPipeline(_VideoTextPipeline):
    """Answers questions about videos, with one of the answers that are proposed or in its own words.

    Made by `pipeline("video-question-answering", model=...)`; a model that isn't given by its folder needs its
    `processor=...`, too.
    """

    model: TestaForVideoQA
    _model_class = TestaForVideoQA
    _needed_method = "score_answers"

    @overload
    def __call__(self, video: Video, question: str, **kwargs: Any) -> list[dict]: ...

    @overload
    def __call__(self, video: Any, question: None = None, **kwargs: Any) -> list[dict] | list[list[dict]]: ...

    def __call__(self, video: Any, question: str | None = None, **kwargs: Any) -> list[dict] | list[list[dict]]:
        """Answer each question.

        Args:
            video: A video (path, URL, bytes, array). Without `question`: one dict of `video` and `question`, or a list,
                a generator or a data set of such dicts.
            question: What to ask about the video.
            candidates: Answers to choose from; without them the model finds its own words.
            top_k: How many answers to return.
            batch_size: Questions to answer at a time.
            kwargs: Without candidates those of [`~transformers.GenerationMixin.generate`]: `max_new_tokens`, ...

        Returns:
            For each question `answer` and `score`, best first. Of candidates the scores are how the model shares 1
            among all of them; of its own words the probability of saying just these.

        Raises:
            ValueError: Where the video, the question or an answer isn't one.
            VideoDecodingError: Where a video can't be read.
        """
        return super().__call__(video if question is None else {"video": video, "question": question}, **kwargs)

    def _sanitize_parameters(
        self, candidates: list[str] | None = None, top_k: int | None = None, **generate_kwargs: Any
    ) -> tuple[dict, dict, dict]:
        forward = generate_kwargs
        postprocess: dict[str, Any] = {}
        if top_k is not None:
            forward["top_k"] = postprocess["top_k"] = _check_positive(top_k)
        if candidates is not None:
            _check_list("candidates", candidates)
            tokens = self.ensure_tensor_on_device(**self._tokenize(candidates, "Candidate"))
            forward["candidates"] = {f"answer_{name}": tensor for name, tensor in tokens.items()}
            postprocess["candidates"] = candidates
        return {}, forward, postprocess

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, dict) or not {"video", "question"} <= inputs.keys():
            raise ValueError(f"{inputs!r} is no dict of video and question. Give both.")
        return {
            "videos": self._read_video(inputs["video"]),
            **self._tokenize([inputs["question"]], "The question"),
        }

    def _forward(
        self,
        inputs: dict[str, Any],
        candidates: dict[str, Tensor] | None = None,
        top_k: int = 1,
        **generate_kwargs: Any,
    ) -> dict[str, Tensor]:
        questions = {
            "pixel_values_videos": _batch_videos(inputs["videos"]),
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
        }
        if candidates is not None:
            return {"logits": self.model.score_answers(**questions, **candidates)}
        if top_k > 1:  # beams in the order of their probability, however long they are
            generate_kwargs = {"num_beams": top_k, "length_penalty": 0.0, **generate_kwargs}
        output: Any = self.model.generate(  # no tensor, but what tells the scores as well
            **questions,
            num_return_sequences=top_k,
            return_dict_in_generate=True,
            output_scores=True,
            **generate_kwargs,
        )
        return {
            "ids": output.sequences.unflatten(0, (-1, top_k)),
            "scores": self._probabilities(output).unflatten(0, (-1, top_k)),
        }

    def _probabilities(self, output: Any) -> Tensor:
        """Return the probability of each sequence that was generated."""
        log_probabilities = self.model.text_decoder.compute_transition_scores(  # type: ignore[misc]  # it has `generate`
            output.sequences, output.scores, output.get("beam_indices"), normalize_logits=True
        )
        words = output.sequences[:, -log_probabilities.shape[1] :]
        ends = torch.isin(words, words.new_tensor(self.model.config.text_config.eos_token_id))
        is_padding = ends.cumsum(dim=1) - ends.long() > 0
        return log_probabilities.masked_fill(is_padding, 0).sum(dim=1).exp()

    def postprocess(
        self, outputs: dict[str, Tensor], candidates: list[str] | None = None, top_k: int = 1
    ) -> list[dict[str, Any]]:
        if candidates is not None:
            best = _best(outputs["logits"][0], top_k)
            return [{"score": score, "answer": candidates[number]} for score, number in best]
        answers = self.processor.tokenizer.batch_decode(
            outputs["ids"][0][:, 1:], skip_special_tokens=True
        )  # without [DEC]
        scores = outputs["scores"][0].tolist()
        return [{"score": score, "answer": answer} for score, answer in zip(scores, answers, strict=True)]


def _check_list(name: str, candidates: Any) -> None:
    if not isinstance(candidates, (list, tuple)) or not candidates:
        raise ValueError(f"{name} is {candidates!r}; a list of at least one is needed.")


def _check_positive(top_k: int) -> int:
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least 1 is needed.")
    return top_k


def _best(logits: Tensor, top_k: int | None) -> list[tuple[float, int]]:
    """Return the probabilities of the `top_k` best candidates and their numbers, best first."""
    probabilities, numbers = logits.float().softmax(dim=-1).sort(descending=True, stable=True)
    return list(zip(probabilities.tolist(), numbers.tolist(), strict=True))[:top_k]


for _task, _pipeline in (
    ("video-text-retrieval", VideoTextRetrievalPipeline),
    ("video-question-answering", VideoQuestionAnsweringPipeline),
):
    PIPELINE_REGISTRY.register_pipeline(_task, _pipeline, pt_model=_pipeline._model_class, type="multimodal")
