"""What the harness writes and passes around: requests, answers, scores, steps, rows.

The classes of the hot path (one per sample) are plain dataclasses; what lands in JSON files is pydantic.
"""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from harness.core.config import Config
from harness.core.specs import Decoding

SCHEMA_VERSION = 1
LOGPROB_ROUNDING = 0.01
"""How far above 0 a log-probability may come by rounding (nats): bf16 and servers that print few digits."""

RequestKind = Literal["generate", "loglikelihood"]
Finish = Literal["stop", "length"]
Message = Mapping[str, str]


def canonical(value: Any) -> bytes:
    """The one JSON form of a value that digests are taken of (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # JSON from elsewhere may hold lone surrogates, which strict UTF-8 refuses; json.loads reads them back.
    return text.encode(errors="surrogatepass")


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON form."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True, slots=True)
class Request:
    """One question to the model under test.

    ``prompt_ids`` is what an engine sends; ``prompt`` and ``messages`` are the same question as text, for endpoints
    that take no token ids. A log-likelihood request asks for log p(continuation_ids | prompt_ids).
    """

    kind: RequestKind
    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...] = ()
    decoding: Decoding | None = None
    prompt: str = ""
    continuation: str = ""
    messages: tuple[Message, ...] | None = None
    adapter: str | None = None
    control: str | None = None

    @property
    def digest(self) -> str:
        """Identity of the question: everything that can change the answer, nothing else."""
        hashed = hashlib.sha256()
        for ids in (self.prompt_ids, self.continuation_ids):
            hashed.update(len(ids).to_bytes(4, "little"))
            hashed.update(array("i", ids).tobytes())
        decoding = self.decoding.model_dump(mode="json") if self.decoding is not None else None
        text = None if self.prompt_ids else (self.prompt, self.continuation, self.messages and list(self.messages))
        hashed.update(canonical([self.kind, decoding, text, self.adapter, self.control]))
        return hashed.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Output:
    """What the model returned for one request.

    ``logprob`` is the sum over the continuation in nats; ``is_greedy`` says whether greedy decoding would have
    produced the continuation. ``batch_dependent`` marks an answer whose last bits may depend on what ran beside it.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish: Finish | None = None
    logprob: float | None = None
    is_greedy: bool | None = None
    batch_dependent: bool = False
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        data: dict[str, Any] = {}
        if self.text:
            data["text"] = self.text
        if self.token_ids:
            data["token_ids"] = list(self.token_ids)
        for name in ("finish", "logprob", "is_greedy", "error"):
            value = getattr(self, name)
            if value is not None:
                data[name] = value
        if self.batch_dependent:
            data["batch_dependent"] = True
        return data

    def checked(self) -> Output:
        """The output; an error instead of a log-probability that is not finite, or positive beyond rounding."""
        if self.logprob is None or -math.inf < self.logprob <= LOGPROB_ROUNDING:
            return self
        text = f"the engine gave {self.logprob} as a log-probability"
        return Output(error=text, batch_dependent=self.batch_dependent)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Output:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "token_ids": tuple(data.get("token_ids", ()))})


@dataclass(frozen=True, slots=True)
class Sample:
    """One item of a task: what is asked, and what scorers may know about it.

    ``leaf`` is the leaf task it belongs to (an MMLU subject, say); ``cut`` says that the prompt was shortened to fit
    the model's context; ``chance`` is the expected share of right answers of guessing, where the question allows one;
    samples of one ``cluster`` are not independent of each other.
    """

    id: str
    requests: tuple[Request, ...]
    prompt: str = ""
    target: str | None = None
    leaf: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    cut: bool = False
    chance: float | None = None
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's outputs for one sample, in the order of ``Sample.requests``."""

    sample_id: str
    outputs: tuple[Output, ...]

    @property
    def text(self) -> str:
        """The generated text (of the first output)."""
        return self.outputs[0].text

    @property
    def error(self) -> str | None:
        """Why there is no answer, if there is none."""
        return next((output.error for output in self.outputs if output.error is not None), None)

    @property
    def hit_limit(self) -> bool:
        """Whether an output ended because the token budget was spent."""
        return any(output.finish == "length" for output in self.outputs)


@dataclass(frozen=True, slots=True)
class Score:
    """One scorer's numbers for one sample: metric -> value, or None with a reason. Never imputed."""

    values: Mapping[str, float | None]
    reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def absent(cls, metrics: tuple[Metric, ...], reason: str) -> Score:
        """A score that says why there is none."""
        return cls({metric.name: None for metric in metrics}, reason)


_RANGES = {"proportion": (0.0, 1.0), "percent": (0.0, 100.0)}
_ROUNDING = 1e-9
SHARE_RESOLUTION = 0.005
"""Of a share: half a point. Tables print no less, and another wording of the prompts moves it by more."""
LOGIT_RESOLUTION = 0.05
"""Of a classifier's logit: a probability moves by a quarter of it at most, so by hardly more than one point."""


class Metric(Config):
    """What a number means."""

    name: str
    higher_is_better: bool | None = Field(description="direction; None where neither is better")
    unit: str = Field(description="'proportion' (0 to 1), 'percent' (0 to 100), 'nats', 'logit', ...")
    low: float | None = Field(None, description="least possible value")
    high: float | None = Field(None, description="greatest possible value")
    chance: float | None = Field(None, description="expected value of guessing")
    primary: bool = Field(True, description="whether the leaderboard shows it")
    aggregate: Literal["mean", "corpus"] = Field(
        "mean",
        description="corpus: the scorer's own `aggregate` over all samples, bootstrapped; a sample's value is then what"
        " that is made of, not a number to be averaged",
    )
    threshold: float = Field(0.05, description="share of unscored samples above which the mean is withheld")
    resolution: float | None = Field(
        None, gt=0, description="smallest difference worth naming (in the unit); None: any that is significant"
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest value: as declared, else what the unit implies, else infinite."""
        low, high = _RANGES.get(self.unit, (-math.inf, math.inf))
        return low if self.low is None else self.low, high if self.high is None else self.high

    def problem(self, value: Any, *, whole: bool = False) -> str | None:
        """Why this cannot be a sample's value; None where it can. Rounding may lead a hair over a bound.

        ``whole``: the value is the aggregate of a corpus metric, to which alone the bounds of such a metric apply.
        """
        if not isinstance(value, int | float) or not math.isfinite(value):
            return f"{value!r} is no finite number"
        low, high = self.bounds
        if low - _ROUNDING <= value <= high + _ROUNDING or (self.aggregate == "corpus" and not whole):
            return None
        return f"{value!r} is outside [{low:g}, {high:g}] ({self.unit})"


class ModelInfo(Config):
    """A model folder as far as it can be known without loading it."""

    ref: str = Field(description="what the user gave")
    path: str = Field(description="folder on this machine (never written into a run)")
    name: str = Field(description="short name for tables and folders")
    revision: str | None = Field(None, description="commit, for a model of the hub")
    config: dict[str, Any] = Field(default_factory=dict, description="config.json")
    architecture: str = "unknown"
    max_length: int = Field(2048, description="context length (tokens)")
    vocab_size: int | None = None
    weights_digest: str = Field(description="SHA-256 over names and contents of the weight files")
    tokenizer_digest: str = Field(description="SHA-256 over the tokenizer's files")
    template_digest: str | None = Field(None, description="SHA-256 of the chat template; None: it has none")
    chat_template: str | None = None
    size_bytes: int = Field(0, description="weight files (bytes)")
    dtype: str | None = Field(None, description="stored type of the weights")
    pickled: bool = Field(False, description="weights are pickled, not safetensors")
    remote_code: bool = Field(False, description="config.json names code that comes with the model")
    spec: dict[str, Any] = Field(default_factory=dict, description="dtype and trust settings asked for")

    def identity(self) -> dict[str, Any]:
        """What enters a step id: contents, never a path."""
        return {
            "weights": self.weights_digest,
            "config": digest_of(self.config),
            "tokenizer": self.tokenizer_digest,
            "template": self.template_digest,
            "max_length": self.max_length,
        }


class AdapterInfo(Config):
    """A peft adapter folder as far as it can be known without loading it."""

    ref: str
    path: str
    name: str
    digest: str = Field(description="SHA-256 over configuration and weights")
    rank: int = Field(description="largest LoRA rank in it")
    config: dict[str, Any] = Field(default_factory=dict, description="adapter_config.json")
    chat_template: str | None = Field(None, description="that it was trained with")
    conditioning: dict[str, Any] | None = Field(None, description="conditioning.json: values, default, per-value data")


Status = Literal["done", "failed"]
ArtifactKind = Literal["adapter", "model", "answers", "scores", "weights", "rows"]
"""What a step leaves: an adapter, a model, answers, scores; weights for the next stage; rows that are prepared."""


class StepInfo(Config):
    """A step as observers are told of it."""

    id: str = Field(description="digest of all that can move its numbers")
    kind: str = Field(description="align, merge, fold, answers, scores, or another that a package brings")
    arm: str = Field(description="short name of what is aligned, merged or evaluated")
    factors: dict[str, Any] = Field(default_factory=dict, description="method, data, seed: what sets its arm apart")
    folder: str = Field("", description="folder of its record on this machine; never written into a file")


class StepRecord(Config):
    """``status.json``: exists exactly when the step has ended."""

    schema_version: int = SCHEMA_VERSION
    id: str
    kind: str
    status: Status
    arm: str = ""
    attempt: int = Field(1, description="how often it had been begun when it ended")
    error: str | None = None
    artifact: ArtifactKind | None = Field(None, description="what it left, as steps that build on it see it")
    digest: str | None = Field(None, description="SHA-256 of the artifact's contents")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of further files of the artifact")
    rank: int | None = Field(None, description="largest LoRA rank of an adapter")
    template: str | None = Field(None, description="SHA-256 of the chat template of an adapter or a model")
    made_from: dict[str, str] = Field(default_factory=dict, description="what it was made from: part -> digest")
    counts: dict[str, int] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict, description="import, load, compute (seconds)")
    notes: tuple[str, ...] = ()
    checksum: str | None = Field(None, exclude=True, description="of the file; `read_json` checks it and takes it away")


class Row(Config):
    """One number of a report, with what it takes to believe it."""

    model: str
    adapter: str | None = None
    task: str
    variant: str = Field("raw", description="prompt variant: raw or chat")
    dtype: str | None = Field(None, description="type that the model's weights were in; None: not ours to say")
    template: str | None = Field(None, description="SHA-256 of the chat template; None: raw, or an endpoint's own")
    leaf: str | None = Field(None, description="leaf task; None for the whole task")
    scorer: str
    metric: str
    unit: str
    n: int = Field(description="scored samples")
    n_unscored: int = Field(0, description="samples without a score; never counted as 0")
    n_truncated: int = Field(0, description="samples whose prompt was cut or whose answer spent its token budget")
    mean: float | None = None
    stderr: float | None = Field(None, description="sample standard deviation (n - 1) over sqrt(n)")
    ci95: tuple[float, float] | None = Field(None, description="95 % interval; Wilson for 0/1 metrics, else Student t")
    higher_is_better: bool | None = None
    chance: float | None = None
    primary: bool = True
    withheld: str | None = Field(None, description="why the mean is not shown")
    step: str = Field("", description="id of the scores step")
    notes: tuple[str, ...] = ()
