"""Which judge is asked, and how: options, what can be checked before anything runs, and what identifies it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

import harness
from harness import (
    ModelInfo,
    ModelSpec,
    UserError,
    generation_identity,
    inspect_model,
    is_url,
    settle_dtype,
    torch_device,
)
from harness_plugins.engines.openai.engine import OpenAIEngine
from harness_plugins.engines.openai.server import (
    Names,
    Server,
    check_address,
    complete_url,
    shown_url,
)
from harness_plugins.engines.vllm.engine import VllmEngine

MILLION = 1_000_000


class JudgeOptions(harness.Config):
    """Who judges, how a reply is drawn, and what it may cost."""

    model: str | None = Field(None, description="the judge: folder, hub id, or URL of an OpenAI-compatible server")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    served_model: str | None = Field(None, description="name that the server knows; its only one when absent")
    answers_as: str | None = Field(
        None, description="name under which it answers, where that is another (a proxy's alias, say)"
    )
    engine: str = Field("auto", description="engine that opens a local judge")
    engine_options: dict[str, Any] = Field(default_factory=dict, description="options of that engine")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="weights of a local judge")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the server's key; empty: it wants none"
    )
    temperature: float = Field(0.0, ge=0.0, description="of the first attempt; 0 is greedy (no unit)")
    retry_temperature: float = Field(0.7, ge=0.0, description="of further attempts (no unit)")
    max_new_tokens: int = Field(1024, ge=1, description="most tokens of a reply (tokens)")
    top_logprobs: int = Field(5, ge=1, le=20, description="most likely first tokens that a server is asked for (count)")
    seed: int = Field(0, ge=0, description="seed of sampled replies")
    retries: int = Field(5, ge=0, description="further attempts after a reply that cannot be read (count)")
    price_input: float = Field(0.0, ge=0.0, description="price of a million prompt tokens (USD)")
    price_output: float = Field(0.0, ge=0.0, description="price of a million reply tokens (USD)")
    max_cost: float | None = Field(
        None, ge=0.0, description="most that this judge may cost in a run folder, interrupted runs included (USD)"
    )
    concurrency: int = Field(16, ge=1, description="requests in flight at most (count)")
    timeout: float = Field(600.0, gt=0, description="longest time that a request may take (seconds)")
    http_retries: int = Field(6, ge=0, description="further attempts after an HTTP failure (count)")
    backoff: float = Field(0.5, ge=0, description="wait before the first of them, then doubled (seconds)")
    max_wait: float = Field(120.0, ge=0, description="longest wait before an attempt, Retry-After or not (seconds)")

    @property
    def remote(self) -> bool:
        """Whether the judge is behind a URL."""
        return self.model is not None and is_url(self.model)

    @property
    def need(self) -> Literal["engine", "endpoint"]:
        """What a scorer needs for this judge: an engine that opens it here, or its server."""
        return "endpoint" if self.remote else "engine"

    @property
    def priced(self) -> bool:
        """Whether it is known what a reply costs: nothing where the judge is opened here."""
        return not self.remote or self.price_input > 0 or self.price_output > 0

    def price(self, prompt_tokens: int, reply_tokens: int) -> float:
        """What so many tokens cost (USD)."""
        return (prompt_tokens * self.price_input + reply_tokens * self.price_output) / MILLION


OF_THE_MODEL = {
    *("model", "revision", "served_model", "answers_as", "engine", "engine_options", "dtype"),
    *("api_key_env", "price_input", "price_output"),
}
"""Options that belong to one judge: another one brings its own, or takes the defaults."""


def with_judge(options: Mapping[str, Any], judge: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options with another judge: how replies are drawn stays, what belongs to the one before does not."""
    if not judge:
        return dict(options)
    other = judge.get("model", options.get("model")) != options.get("model")
    return {**{key: value for key, value in options.items() if not (other and key in OF_THE_MODEL)}, **judge}


def check_judge(options: JudgeOptions, where: str) -> None:
    """Whether there is a judge that can be asked; sends nothing.

    Raises:
        UserError: none is named; no such folder; a key that a server will want is missing; a limit without prices.
    """
    if options.model is None:
        raise UserError(
            f"{where}, model",
            "no judge is named",
            "Give a folder, a hub id or a URL, for example --set TASK.scorer.model=http://localhost:8000/v1.",
        )
    if not options.remote:
        _inspected(options, where)
        return
    check_address(str(options.model), options.api_key_env, f"{where}, model", f"{where}, api_key_env")
    if options.max_cost is not None and options.price_input == options.price_output == 0:
        raise UserError(
            f"{where}, max_cost",
            f"at most {options.max_cost:g} USD, and no prices to count them by",
            "Give price_input and price_output (USD per million tokens) as your provider states them.",
        )
    parts = urlsplit(complete_url(str(options.model)))
    name = options.api_key_env
    if parts.scheme == "https" and name and not os.environ.get(name, "").strip():
        raise UserError(
            f"{where}, api_key_env",
            f"the environment variable {name} holds no key for {shown_url(str(options.model))}",
            "Export it, name another one, or set api_key_env to '' for a server that wants none.",
        )


def settled(options: JudgeOptions, where: str) -> JudgeOptions:
    """With the model's name on its server filled in, which the server is asked for if need be."""
    if not options.remote or options.served_model is not None:
        return options
    from harness_plugins.judges.options import open_server

    server = open_server(options, where)
    try:
        return options.model_copy(update={"served_model": server.settle_model()})
    except UserError as error:
        fix = f"{error.fix} With served_model set, it is asked nothing before it judges."
        raise UserError(error.where, error.what, fix) from None
    finally:
        server.close()


def judge_identity(options: JudgeOptions, where: str) -> dict[str, Any]:
    """What of a judge may move a verdict: a digest of its weights, or address and name; and how replies are drawn.

    Not what it costs, how fast it is asked, nor its key.
    """
    drawn = options.model_dump(
        mode="json",
        include={"temperature", "retry_temperature", "max_new_tokens", "top_logprobs", "seed", "retries"},
    )
    if options.remote:
        options = settled(options, where)
        return {"url": shown_url(str(options.model)), "model": options.served_model, **drawn}
    local = options.model_dump(mode="json", include={"engine", "engine_options"})
    info = _inspected(options, where)
    ends = generation_identity(info, sampling=False)
    return {"model": info.identity(), **ends, **local, "dtype": judge_dtype(options, where), **drawn}


def judge_dtype(options: JudgeOptions, where: str) -> str:
    """The type that a local judge is loaded in; an engine that is not one of ours makes of ``auto`` what it likes."""
    device = None
    if options.engine == "vllm":
        device = VllmEngine().device(VllmEngine.Config())
    elif options.engine in ("auto", "transformers"):
        given = str(options.engine_options.get("device", "auto"))
        device = torch_device() if given == "auto" else given.partition(":")[0]
    return str(settle_dtype(_inspected(options, where), device)[0].spec["dtype"])


def judge_label(options: JudgeOptions) -> str:
    """A short name of the judge, for tables; a server that was not given one is asked."""
    options = settled(options, "judge")
    name = str(options.served_model if options.remote else options.model)
    return name.rstrip("/").rsplit("/", 1)[-1] or "judge"


def slug_of(options: JudgeOptions) -> str:
    """The judge's short name, safe as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", judge_label(options))[:40]


def _inspected(options: JudgeOptions, where: str) -> ModelInfo:
    spec = ModelSpec(model=str(options.model), revision=options.revision, dtype=options.dtype)
    return inspect_model(spec, f"{where}, model")


def open_server(options: JudgeOptions, where: str) -> Server:
    """HTTP to the judge's address, whose messages name the judge's own options."""
    assert options.model is not None
    names = Names(
        title=where,
        model=f"{where}, served_model",
        key="api_key_env of this scorer",
        address=f"the judge's address ({where}, model)",
        alias="answers_as of this scorer",
        others="model and served_model of this scorer",
    )
    http = OpenAIEngine.Config(
        base_url=options.model,
        model=options.served_model,
        api_key_env=options.api_key_env,
        answers_as=options.answers_as,
        endpoint="chat",
        concurrency=options.concurrency,
        retries=options.http_retries,
        backoff=options.backoff,
        max_wait=options.max_wait,
        timeout=options.timeout,
    )
    return Server(complete_url(options.model), http, names)
