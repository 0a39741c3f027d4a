"""A user's defaults, from `harness.yaml` in the working folder or the user's configuration folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.config import Config, load_yaml, parse


class Settings(Config):
    """What may stand in the file; options of the command line are laid over it."""

    engine: str = Field("auto", description="engine, unless --engine says otherwise")
    plugins: tuple[str, ...] = Field((), description="loose plugin files to load")
    task_folders: tuple[str, ...] = Field((), description="folders of task YAML")
    data_revisions: dict[str, str] = Field(default_factory=dict, description="as --data-revision: OWNER/NAME: COMMIT")
    options: dict[str, Any] = Field(default_factory=dict, description="as --set: engine, and per task limit and scorer")


def find_settings() -> Path | None:
    """The settings file in force: ``HARNESS_CONFIG``, ``./harness.yaml``, then the user's configuration folder."""
    if given := os.environ.get("HARNESS_CONFIG"):
        return Path(given)
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return next((path for path in (Path("harness.yaml"), home / "harness" / "config.yaml") if path.is_file()), None)


def load_settings() -> Settings:
    """Read the settings; the defaults where there is no file.

    Raises:
        UserError: unreadable file, unknown key, wrong kind of value.
    """
    path = find_settings()
    return parse(Settings, load_yaml(path)) if path is not None else Settings()
