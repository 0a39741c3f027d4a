"""Scores by a sequence-classification checkpoint: toxicity, or whatever else one was trained to tell.

The input is the tokenizer's pair (prompt, response), cut to ``max_length`` tokens from the longer of the two; the score
is the raw logit, computed in float32. An empty response is scored like any other: as the pair with an empty second
text, since saying nothing is an answer. (transformers, given two bare texts instead of lists, drops an empty second one
and so scores the prompt as if the model had said it.) A sample whose answer failed has no score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

import harness
from harness import (
    LOGIT_RESOLUTION,
    Answer,
    HubFiles,
    Metric,
    ModelInfo,
    ModelSpec,
    Sample,
    Score,
    ScoreJob,
    Scorer,
    ScorerContext,
    ScorerSession,
    UserError,
    hub_cache,
    hub_errors,
    inspect_model,
    is_hub_id,
    nearest,
    offline,
    resolve_revision,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.py"]


class ClassifierOptions(harness.Config):
    """Which checkpoint, and how it is asked."""

    model: str | None = Field(None, description="folder or hub id of a sequence-classification checkpoint")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    label: str | int | None = Field(None, description="which logit, by name or index; needed where there are several")
    max_length: int = Field(512, ge=8, description="longest pair (tokens)")
    batch_tokens: int = Field(8192, ge=1, description="most tokens of a batch, padding included (tokens)")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    allow_pickle: bool = Field(False, description="load pickled weights (they can run code)")
    trust_remote_code: bool = Field(False, description="run code that comes with the checkpoint")


class ClassifierScorer(Scorer[Any]):
    """The raw logit of any sequence-classification checkpoint."""

    name = "classifier"
    summary = "raw logit of a sequence-classification checkpoint for (prompt, response)"
    default_model: ClassVar[str | None] = None
    default_revision: ClassVar[str | None] = None

    class Config(ClassifierOptions):
        """Which checkpoint, and what its logit is called in reports."""

        metric: str = Field("logit", description="name of the metric")
        higher_is_better: bool | None = Field(None, description="direction of the logit; unknown when absent")

    def needs(self, config: Any) -> Literal["classifier"]:
        """A checkpoint's weights."""
        return "classifier"

    def metrics(self, config: Any) -> tuple[Metric, ...]:
        """One unbounded number."""
        direction = config.higher_is_better
        return (Metric(name=config.metric, higher_is_better=direction, unit="logit", resolution=LOGIT_RESOLUTION),)

    def values(self, logit: float, config: Any) -> dict[str, float | None]:
        """The metrics of one sample, from its logit."""
        return {config.metric: logit}

    def value_of(self, logits_BL: torch.Tensor, label: int, config: Any) -> torch.Tensor:
        """What is taken of a batch's logits (float32, batch x labels): the label's own."""
        return logits_BL[:, label]

    def open(self, config: Any, context: ScorerContext) -> ScorerSession:
        """Load the checkpoint."""
        return ClassifierSession(self, config)

    def identity(self, config: Config) -> dict[str, Any]:
        """The checkpoint by its contents (folder) or commit (hub), and what may move a number; never a path."""
        found = self._find(config, fetch=False)
        pinned: dict[str, Any]
        if isinstance(found, Path):
            info = self._inspect(config, found)
            pinned = {"model": info.identity()}
        else:
            pinned = {"model": config.model or self.default_model, "revision": found}
        left_out = {"model", "revision", "device", "allow_pickle", "trust_remote_code"}
        return {"name": self.name, "options": config.model_dump(mode="json", exclude=left_out), **pinned}

    def hub_files(self, config: Config) -> tuple[HubFiles, ...]:
        """The checkpoint, unless it is a folder."""
        ref = config.model or self.default_model
        if ref is None or not is_hub_id(ref):
            return ()
        patterns = (*_PATTERNS, *(("*.bin",) if config.allow_pickle else ()))
        return (HubFiles(ref, "model", self._revision(config), patterns),)

    def check(self, config: Config) -> None:
        """Whether there is a checkpoint, and one that can be used as it is asked to.

        Raises:
            UserError: none given; none at that path; not in the cache while the network is switched off; not a
                classifier; several logits and no label; pickled weights or code without leave.
        """
        found = self._find(config, fetch=False)
        if isinstance(found, Path):
            self._check_folder(config, found)
        elif (folder := self._cached(config, found)) is not None:
            self._check_folder(config, folder)

    # ------------------------------------------------------------------------------------------ finding the checkpoint

    def _find(self, config: Config, *, fetch: bool) -> Path | str:
        """The checkpoint's folder; or, for a hub id when it need not be fetched now, its commit."""
        where = f"scorer {self.name}, model"
        ref = config.model or self.default_model
        if ref is None:
            raise UserError(where, "no checkpoint is named", "Give one: --set TASK.scorer.model=PATH_OR_HUB_ID.")
        path = Path(ref).expanduser()
        if path.is_dir():
            return path
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", ref) or ref.startswith("."):
            beside = [str(entry) for entry in path.parent.glob("*") if entry.is_dir()]
            close = nearest(str(path), beside)
            hint = f"Did you mean {close[0]}? " if close else ""
            fix = f"{hint}Give a folder or a hub id: --set TASK.scorer.model=PATH."
            raise UserError(where, f"no such folder: {ref}", fix)
        commit = resolve_revision(ref, self._revision(config), repo_type="model")
        if commit is None:
            raise self._missing(config)
        if not fetch:
            return commit
        return self._fetch(config, ref, commit)

    def _revision(self, config: Config) -> str | None:
        if config.revision is None and config.model in (None, self.default_model):
            return self.default_revision
        return config.revision

    def _cached(self, config: Config, commit: str) -> Path | None:
        ref = str(config.model or self.default_model)
        folder = hub_cache() / f"models--{ref.replace('/', '--')}" / "snapshots" / commit
        return folder if (folder / "config.json").is_file() else None

    def _fetch(self, config: Config, ref: str, commit: str) -> Path:
        from huggingface_hub import snapshot_download

        patterns = [*_PATTERNS, *(["*.bin"] if config.allow_pickle else [])]
        try:
            # Names are chosen: training states that lie beside the weights can be larger than them.
            folder = snapshot_download(
                ref, revision=commit, allow_patterns=patterns, cache_dir=hub_cache(), local_files_only=offline()
            )
        except hub_errors() as error:
            raise self._missing(config, type(error).__name__) from None
        return Path(folder)

    def _missing(self, config: Config, problem: str = "") -> UserError:
        ref, revision = config.model or self.default_model, self._revision(config)
        reach = "the network is switched off (HF_HUB_OFFLINE)" if offline() else "the hub cannot be reached or lacks it"
        at, option = (f" at revision {revision}", f" --revision {revision}") if revision else ("", "")
        return UserError(
            f"scorer {self.name}, model",
            f"{ref} is not in the hub cache {hub_cache()}{at}, and {reach}" + (f" ({problem})" if problem else ""),
            "Give a checkpoint by path: --set TASK.scorer.model=PATH; "
            f"or fetch this one where there is a network: `hf download {ref}{option}`.",
        )

    def _inspect(self, config: Config, folder: Path) -> ModelInfo:
        """What the folder holds; the refusals are said in terms of this scorer's options, hence all is allowed here."""
        spec = ModelSpec(model=str(folder), allow_pickle=True, trust_remote_code=True)
        return inspect_model(spec, f"scorer {self.name}, model")

    def _check_folder(self, config: Config, folder: Path) -> ModelInfo:
        info = self._inspect(config, folder)
        where = f"scorer {self.name}, model {config.model or self.default_model}"
        if info.pickled and not config.allow_pickle:
            raise UserError(
                where,
                "only pickled weights, and unpickling can run any code",
                "Convert them to safetensors, or set TASK.scorer.allow_pickle=true if you trust where they come from.",
            )
        if info.remote_code and not config.trust_remote_code:
            raise UserError(
                where,
                "config.json asks to run code that comes with the checkpoint",
                "Read that code first; then set TASK.scorer.trust_remote_code=true.",
            )
        if not info.remote_code and "ForSequenceClassification" not in info.architecture:
            raise UserError(
                where,
                f"{info.architecture} is no sequence classifier",
                "Give a ...ForSequenceClassification checkpoint.",
            )
        self._label(config, info)
        return info

    def _label(self, config: Config, info: ModelInfo) -> int:
        """Index of the logit that is asked for."""
        given = info.config.get("id2label")
        names = [str(given[key]) for key in sorted(given, key=int)] if given else []
        # transformers' own default where a config says nothing is two labels.
        names = names or [f"LABEL_{index}" for index in range(int(info.config.get("num_labels", 2)))]
        if config.label is None and len(names) == 1:
            return 0
        known = ", ".join(f"{index}: {name}" for index, name in enumerate(names))
        where = f"scorer {self.name}, label"
        if config.label is None:
            raise UserError(where, f"the checkpoint has {len(names)} logits ({known})", "Set TASK.scorer.label to one.")
        if config.label in names:
            return names.index(config.label)
        if isinstance(config.label, int) and 0 <= config.label < len(names):
            return config.label
        raise UserError(where, f"no label {config.label!r}", f"The checkpoint has: {known}.")

    def load(self, config: Any) -> Opened:
        """The checkpoint in float32 on its device, its tokenizer, and the index of the logit that is asked for."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        folder = self._find(config, fetch=True)
        assert isinstance(folder, Path)
        info = self._check_folder(config, folder)
        trust = {"trust_remote_code": config.trust_remote_code}
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=None if config.allow_pickle else True,
                output_loading_info=True,
                **trust,
            )
        finally:
            if bars:
                logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if missing := sorted(loading["missing_keys"]):
            # transformers would draw them at random, and every score would be noise.
            raise UserError(
                f"scorer {self.name}, model {config.model or self.default_model}",
                f"its weights lack {', '.join(missing[:4])}",
                "Give a checkpoint that was trained as a classifier.",
            )
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return Opened(
            model.eval().to(device), AutoTokenizer.from_pretrained(folder, **trust), self._label(config, info)
        )


@dataclass(frozen=True)
class Opened:
    """A loaded checkpoint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: int
    """Index of the logit that is asked for."""


class ClassifierSession(ScorerSession):
    """A loaded checkpoint that gives every answer its logit."""

    def __init__(self, scorer: ClassifierScorer, config: Any) -> None:
        self._scorer, self._config = scorer, config
        self._opened: Opened | None = scorer.load(config)

    def score(self, samples: Sequence[Sample], answers: Sequence[Answer], job: ScoreJob) -> list[Score]:
        """One forward pass per batch of pairs of like length; the order of the samples does not matter."""
        metrics = self._scorer.metrics(self._config)
        scores = [Score.absent(metrics, answer.error or "not scored") for answer in answers]
        asked = [index for index, answer in enumerate(answers) if answer.error is None]
        job.progress(len(answers) - len(asked))
        pairs = [(samples[index].prompt, answers[index].text) for index in asked]
        for batch, logits in self.logits(pairs):
            for position, logit in zip(batch, logits, strict=True):
                if math.isfinite(logit):
                    values = self._scorer.values(logit, self._config)
                    scores[asked[position]] = Score(values, detail={"logit": logit})
                else:
                    scores[asked[position]] = Score.absent(metrics, f"the classifier returned {logit}")
            job.progress(len(batch))
        return scores

    def close(self) -> None:
        """Let go of the checkpoint, and of the GPU memory it took."""
        if self._opened is not None:
            import gc

            import torch

            self._opened = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[float]]]:
        """Batches of positions in ``pairs`` and their logits."""
        if not pairs:
            return
        import torch

        assert self._opened is not None, "the session is closed"
        model, tokenizer = self._opened.model, self._opened.tokenizer
        limit = min(self._config.max_length, tokenizer.model_max_length)
        first, second = zip(*pairs, strict=True)
        encoded = tokenizer(list(first), list(second), truncation=True, max_length=limit, return_token_type_ids=False)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        most = self._config.batch_tokens if tokenizer.pad_token_id is not None else 0
        for batch in plan_batches(lengths, most):
            chosen = {key: [encoded[key][index] for index in batch] for key in ("input_ids", "attention_mask")}
            if len(batch) == 1:
                tensors = {key: torch.tensor(rows) for key, rows in chosen.items()}
            else:
                tensors = dict(tokenizer.pad(chosen, return_tensors="pt"))
            with torch.inference_mode():
                logits_BL = model(**{key: rows.to(model.device) for key, rows in tensors.items()}).logits
            values = self._scorer.value_of(logits_BL.float(), self._opened.label, self._config)
            yield batch, values.cpu().tolist()


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of ``lengths``, longest first, in batches of at most ``batch_tokens`` padded tokens or of one row.

    A function of the lengths alone: equal lengths stay in their order.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first row of a batch is its longest.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
