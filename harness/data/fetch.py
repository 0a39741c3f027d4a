"""Files of the hub: how large they are, which of them lie here, and how the others come. Through huggingface_hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from harness.contracts.hub_files import HubFiles
from harness.core.caches import hub_cache, offline
from harness.core.errors import UserError
from harness.data.hub import hub_errors


@dataclass(frozen=True)
class Listed:
    """What the hub says of some files."""

    files: HubFiles
    commit: str
    count: int
    size: int
    """Of all (bytes)."""
    missing: int
    """Of those that are not in the cache (bytes)."""
    missing_count: int


def refuse_offline() -> None:
    """Stop where the network is switched off.

    Raises:
        UserError: naming the variable.
    """
    if offline():
        names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
        seen = ", ".join(f"{name}={os.environ[name]}" for name in names if os.environ.get(name))
        raise UserError(
            "harness fetch",
            f"the network is switched off ({seen})",
            "Unset that where there is a network; elsewhere copy both caches from a machine that has one.",
        )


def look(files: HubFiles) -> Listed:
    """Ask the hub for sizes; downloads nothing.

    Raises:
        UserError: no such repository or revision, a licence that is not accepted, no network, no such files.
    """
    from huggingface_hub import snapshot_download

    with _told(files), _without_bars():
        found = snapshot_download(
            files.repo,
            repo_type=files.kind,
            revision=files.revision,
            allow_patterns=list(files.patterns) if files.patterns is not None else None,
            cache_dir=hub_cache(),
            dry_run=True,
        )
    if not found:
        what = f"holds none of {', '.join(files.patterns or ('its files',))}"
        raise UserError(_where(files), what, "Check name and revision.")
    missing = [one for one in found if one.will_download]
    size, left = (sum(one.file_size or 0 for one in some) for some in (found, missing))
    return Listed(files, found[0].commit_hash, len(found), size, left, len(missing))


def download(listed: Listed) -> None:
    """Bring what is missing into the hub cache, at the commit that was looked at; with huggingface_hub's own bars.

    Raises:
        UserError: as :func:`look`.
    """
    from huggingface_hub import snapshot_download

    files = listed.files
    with _told(files):
        snapshot_download(
            files.repo,
            repo_type=files.kind,
            # By its name, so that the cache knows what a branch stands for.
            revision=files.revision,
            allow_patterns=list(files.patterns) if files.patterns is not None else None,
            cache_dir=hub_cache(),
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils

    bars: Any = utils
    if bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _where(files: HubFiles) -> str:
    kind = "data set" if files.kind == "dataset" else files.kind
    return f"{kind} {files.repo}" + (f" at {files.revision}" if files.revision else "")


@contextmanager
def _told(files: HubFiles) -> Iterator[None]:
    """What the hub refuses, in a message of ours."""
    try:
        yield
    except hub_errors() as error:
        raise _message(files, error) from None


def _message(files: HubFiles, error: Exception) -> UserError:
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = _where(files)
    page = f"{constants.ENDPOINT}/{'datasets/' if files.kind == 'dataset' else ''}{files.repo}"
    # What was in the way of a listing is told as its cause.
    cause = error.__cause__ if isinstance(error, DryRunError) and error.__cause__ is not None else error
    if isinstance(cause, GatedRepoError):
        fix = f"Accept its licence at {page} and log in (`hf auth login`), or give a copy by path."
        return UserError(where, "is gated: the hub gives it to those who have accepted its licence", fix)
    if isinstance(cause, RepositoryNotFoundError):
        fix = f"Check the name at {page}; a private one needs `hf auth login`."
        return UserError(where, "is not on the hub, or not for you", fix)
    if isinstance(cause, RevisionNotFoundError):
        return UserError(where, "the hub has no such revision", f"See the commits at {page}/commits/main.")
    line = " ".join(str(cause).split())[:200] or type(cause).__name__
    what = f"cannot be fetched from {constants.ENDPOINT}: {line}"
    return UserError(where, what, "Check the network (HF_ENDPOINT, HTTPS_PROXY); the same command goes on.")
