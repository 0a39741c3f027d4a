"""Where a model or adapter lies: a folder, or a hub id in the cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.contracts.hub_files import MODEL_PATTERNS
from harness.core.errors import UserError, nearest
from harness.models.files import (
    check_folder,
)
from harness.steps.checksums import refuse_damaged


def is_url(ref: str) -> bool:
    """Whether the reference is an endpoint rather than a folder or a hub id."""
    return ref.startswith(("http://", "https://"))


def short_name(ref: str, revision: str | None, path: Path) -> str:
    """The folder's or hub id's last part; a snapshot folder's name would be a commit."""
    return ref.rstrip("/").rsplit("/", 1)[-1] if revision is not None else path.resolve().name


def locate(ref: str, revision: str | None, where: str, wanted: str) -> tuple[Path, str | None]:
    """Folder of a local path or hub id, and the commit for a hub id."""
    path = Path(ref).expanduser()
    if path.is_file():
        raise UserError(f"{where} {ref}", "is a file", f"Give the folder that holds it: {path.resolve().parent}.")
    if path.exists():
        check_folder(path, where)
        refuse_damaged(path, f"{where} {ref}")
        if not (path / wanted).is_file():
            found = sorted(p.name for p in path.iterdir())[:8]
            other = "config.json" if wanted == "adapter_config.json" else "adapter_config.json"
            hint = ""
            if (path / other).is_file():
                hint = " It holds " + ("a model: give it as --model." if other == "config.json" else "an adapter: ")
                hint += "" if other == "config.json" else "give its base as --model and this folder as --adapter."
            raise UserError(
                f"{where} {ref}",
                f"{wanted} is not in that folder (it holds: {', '.join(found) or 'nothing'})",
                f"Give a folder in the format of transformers or peft.{hint}",
            )
        return path, None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref) or ref.startswith((".", "/")):
        raise _missing(ref, path, where)
    folder, commit = _snapshot(ref, revision, where, path)
    refuse_damaged(folder, f"{where} {ref}")
    return folder, commit


def _missing(ref: str, path: Path, where: str) -> UserError:
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return UserError(f"{where} {ref}", "no such folder", f"The path exists as far as {parent.resolve()}.")
    folders = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    close = nearest(path.name, folders)
    if close:
        fix = f"Did you mean {' or '.join(str(parent / c) for c in close)}?"
    else:
        fix = f"Folders in {parent}: {', '.join(folders[:8]) or 'none'}."
    return UserError(f"{where} {ref}", "no such folder", fix)


def _snapshot(ref: str, revision: str | None, where: str, path: Path) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(ref, revision=revision, allow_patterns=list(MODEL_PATTERNS)))
    except RepositoryNotFoundError:
        raise UserError(
            f"{where} {ref}", "neither a folder here nor a model on the hub", "Check the name (and your access token)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if "/" not in ref:
            raise _missing(ref, path, where) from None
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "the hub cannot be reached"
        at = f" at revision {revision}" if revision else ""
        folder_hint = _missing(ref, path, where).fix
        raise UserError(
            f"{where} {ref}",
            f"no such folder, and not in the hub cache{at} ({offline}; {type(error).__name__})",
            f"{folder_hint} Or fetch it where there is a network: `hf download {ref}`.",
        ) from None
    return folder, folder.name
