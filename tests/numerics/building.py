"""A method's trainer as the driver builds it."""

from __future__ import annotations

from typing import Any

from harness.alignment.driven import build


def built(method: Any, job: Any) -> Any:
    """The trainer of a method for a job."""
    return build(method.trainer(job), job)
