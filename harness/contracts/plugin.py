"""What all kinds of plugins share.

A plugin is an object of a contract class, registered by a hook of :mod:`harness.contracts.hookspecs` and chosen by
name. Each states a nested ``Config`` (frozen, extra fields forbidden, a description with unit per field) and the
contract version it was written for. Heavy imports (torch, transformers, vllm, datasets) go inside methods.
"""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar, Generic

from typing_extensions import TypeVar

from harness.core import config

CONTRACT_VERSION = 2
C = TypeVar("C", bound=config.Config, default=Any)
"""A plugin's own Config: ``class Mine(Merger["Mine.Config"])`` has its ``config`` typed; left out, it is Any."""


class Plugin(ABC, Generic[C]):
    """What all kinds share."""

    kind: ClassVar[str]
    name: ClassVar[str]
    summary: ClassVar[str] = ""
    contract: ClassVar[int] = CONTRACT_VERSION
    numerics: ClassVar[int] = 1
    """Of a bundled plugin: raised when a number that it makes may move; it stands for its code in step ids.

    Of anybody else's plugin the files themselves are digested, so that this need not be thought of."""

    class Config(config.Config):
        """No options."""
