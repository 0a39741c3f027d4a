"""A user's defaults, from `harness.yaml` in the working folder or the user's configuration folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from harness.core.config import Config, Located, load_yaml, parse
from harness.core.errors import UserError


class UserDefaults(Config):
    """What may stand in the file; options of the command line are laid over it."""

    engine: str = Field("auto", description="engine, unless --engine says otherwise")
    plugins: tuple[str, ...] = Field((), description="loose plugin files to load; relative to this file")
    task_folders: tuple[str, ...] = Field((), description="folders of task YAML; relative to this file")
    data_revisions: dict[str, str] = Field(default_factory=dict, description="as --data-revision: OWNER/NAME: COMMIT")
    options: dict[str, Any] = Field(default_factory=dict, description="as --set: engine, and per task limit and scorer")


_HERE = Path("harness.yaml")
_CODE = {"plugins": "--plugin", "task_folders": "--tasks"}
"""Keys that bring code or files of others, and the option that does the same."""


def own_file() -> Path:
    """The user's own settings file, there or not: ``HARNESS_CONFIG``, or the user's configuration folder."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("HARNESS_CONFIG") or home / "harness" / "config.yaml")


def load_user_defaults() -> UserDefaults:
    """Read the settings; the defaults where there is no file.

    ``HARNESS_CONFIG`` alone counts where it is set; otherwise ``harness.yaml`` of the working folder, else the user's
    own file. Plugins and task folders are those of the user's own file: whoever unpacks an archive and works in it
    must not run its code by that.

    Raises:
        UserError: unreadable file, unknown key, wrong kind of value; code or a server in the working folder's file.
    """
    own, given = own_file(), bool(os.environ.get("HARNESS_CONFIG"))
    mine = _rooted(parse(UserDefaults, load_yaml(own)), own.parent) if given or own.is_file() else UserDefaults()
    if given or not _HERE.is_file():
        return mine
    located = load_yaml(_HERE)
    here = parse(UserDefaults, located)
    _refuse_code(located, own)
    _refuse_servers(located, own)
    return here.model_copy(update={key: getattr(mine, key) for key in _CODE})


def _refuse_code(located: Located, own: Path) -> None:
    for key, option in _CODE.items():
        if located.data.get(key):
            fix = f"Pass {option} {located.data[key][0]} if you trust it, or write it into {own}."
            raise UserError(located.where((key,)), "a working folder's file brings no code and no tasks", fix)


def _refuse_servers(located: Located, own: Path) -> None:
    """A key of the user's, and with an executor all that is evaluated, would be sent to wherever the folder says."""
    for path, value in _leaves(located.data.get("options") or {}, ("options",)):
        address = isinstance(value, str) and value.lower().startswith(("http://", "https://"))
        if path[-1].endswith("_env") or address or path[1] == "executor":
            fix = f"Pass --set {'.'.join(path[1:])}=... if you mean it, or write it into {own}."
            raise UserError(located.where(path), "a working folder's file names no server, no key and no executor", fix)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, path)
    else:
        yield path, value


def _rooted(settings: UserDefaults, folder: Path) -> UserDefaults:
    """The paths of a file from its folder: from the working folder, any archive could bring a file of that name."""
    rooted = {key: tuple(str(folder / Path(one).expanduser()) for one in getattr(settings, key)) for key in _CODE}
    return settings.model_copy(update=rooted)
