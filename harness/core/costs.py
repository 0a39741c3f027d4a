"""What a step took: time, memory, tokens, money. For people, and for plans of what is like it; never part of an id."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from harness.core.config import Config


class JudgeCosts(Config):
    """What a judge was paid for: replies that came, not those that an earlier call had brought."""

    calls: int = Field(0, ge=0, description="replies that came")
    prompt_tokens: int = Field(0, ge=0)
    reply_tokens: int = Field(0, ge=0)
    usd: float | None = Field(
        0.0, ge=0, allow_inf_nan=False, description="at the prices of the judge's options; None: they state none"
    )

    def __add__(self, other: JudgeCosts) -> JudgeCosts:
        """Two bills together; what one does not know, both do not."""
        return JudgeCosts(
            calls=self.calls + other.calls,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            reply_tokens=self.reply_tokens + other.reply_tokens,
            usd=self.usd + other.usd if self.usd is not None and other.usd is not None else None,
        )


class Costs(Config):
    """What a step took. It is no part of any id: the same step takes more on another machine."""

    seconds: float = Field(
        ge=0, allow_inf_nan=False, description="wall time; of steps that are carried out together, the step's share"
    )
    earlier_seconds: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="of attempts that were cut short or failed: at least so much"
    )
    devices: int = Field(0, ge=0, description="GPUs that it had")
    device: str | None = Field(None, description="their name, as the driver says it")
    gpu_seconds: float = Field(0.0, ge=0, allow_inf_nan=False, description="devices x all seconds; 0 without a GPU")
    rss_bytes: int | None = Field(None, ge=0, description="most memory that its process had (resident)")
    rss_of: Literal["step", "process"] = Field(
        "process", description="whether that is since the step began, or since its process did"
    )
    device_bytes: int | None = Field(
        None, ge=0, description="most that torch reserved on one GPU; None: no GPU, or an engine's own process had it"
    )
    device_allocated_bytes: int | None = Field(None, ge=0, description="most of that which tensors took")
    trained_tokens: int | None = Field(None, ge=0, description="that a training pass read, prompts of pairs twice")
    prompt_tokens: int | None = Field(None, ge=0, description="of all requests of the step")
    completion_tokens: int | None = Field(None, ge=0, description="of all answers of the step")
    reused: int = Field(0, ge=0, description="requests that had been answered before this attempt")
    judge: JudgeCosts | None = None
    disk_bytes: int | None = Field(None, ge=0, description="size of what it left")

    @model_validator(mode="after")
    def _adds_up(self) -> Costs:
        whole = self.devices * (self.seconds + self.earlier_seconds)
        if abs(self.gpu_seconds - whole) > 0.01 + 1e-6 * whole:
            raise ValueError(f"gpu_seconds is {self.gpu_seconds:g}, and devices x seconds {whole:g}")
        return self

    @property
    def all_seconds(self) -> float:
        """Wall time of all attempts (seconds)."""
        return self.seconds + self.earlier_seconds
