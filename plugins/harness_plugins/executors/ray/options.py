"""What a user may say of a Ray cluster."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness import Config


class RayOptions(Config):
    """Options of the executor ``ray``."""

    address: str | None = Field(
        None,
        description="cluster that runs already: auto, or HOST:PORT of its head, from one of its nodes; absent: one "
        "of this machine alone, which ends with the run",
    )
    cores: int = Field(1, ge=1, description="processor cores that an order has at least (count)")
    accelerator_type: str | None = Field(
        None, description="kind of GPU, as Ray names it (H100), that orders with GPUs must have; any when absent"
    )
    retries: int = Field(3, ge=0, description="how often an order is given again whose node was lost (count)")
    grace: float = Field(60.0, ge=0, description="time that a stopped order has to save (seconds)")
    environment: tuple[str, ...] = Field(
        (), description="further variables to hand on, such as a judge's key; Ray keeps none of them"
    )
    logs: Literal["none", "all"] = Field(
        "none", description="all: show what Ray and libraries print on any node, beside what steps say"
    )
