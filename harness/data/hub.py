"""Data sets of the hub, of one known commit, from wherever they are: hub cache, prepared cache, network.

Offline, ``datasets.load_dataset`` reads only what it has prepared (Arrow files), and takes the newest of that whatever
``revision`` says. So the commit is settled first, by :func:`resolve_revision`, and what was loaded is held against it.

The caches are those of ``HF_HUB_CACHE``, ``HF_DATASETS_CACHE`` and ``HF_HOME``, read from the environment at each call.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harness.core.caches import hub_cache, offline, prepared_cache
from harness.core.errors import UserError, nearest

if TYPE_CHECKING:
    import datasets

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
T = TypeVar("T")


def resolve_revision(path: str, revision: str | None = None, *, repo_type: str = "dataset") -> str | None:
    """The commit that a hub id stands for, from the caches where they know it, else from the hub.

    A cached branch stays what it was when it was fetched, so that a step's id does not change by itself;
    ``hf download`` renews it.

    Args:
        path: hub id (``owner/name``), or a folder.
        revision: branch, tag or commit; the branch ``main`` when absent.
        repo_type: ``dataset`` or ``model``.

    Returns:
        The 40 hexadecimal digits of the commit. None for a folder, and where nothing here knows the answer: no such
        revision in the caches, and the hub is out of reach, or forbidden, or does not have it.
    """
    if Path(path).is_dir():
        return None
    wanted = revision or "main"
    cached = _cached(path, wanted, repo_type)
    if cached is not None or offline():
        return cached
    return wanted if COMMIT.fullmatch(wanted) else _ask_hub(path, wanted, repo_type)


class OtherRevisionError(UserError):
    """The pinned revision of a data set cannot be had, and another one, which nobody has accepted, lies here."""

    def __init__(self, source: str, pinned: str, here: str, option: str) -> None:
        self._parts = source, pinned, here, option
        self.accept = f"{option}={here}"
        fetch = f"`hf download --repo-type dataset {source} --revision {pinned}`"
        super().__init__(
            f"data set {source}",
            f"its pinned revision {pinned} cannot be had here; the caches hold {here}",
            f"Fetch the pinned one where there is a network: {fetch}; or accept what is here, which every name and row "
            f"then says: {self.accept}",
        )

    def of_task(self, name: str) -> OtherRevisionError:
        """The same with the task's name in the option."""
        source, pinned, here, option = self._parts
        return OtherRevisionError(source, pinned, here, option.replace("TASK.", f"{name}."))


def pinned_commit(source: str, pinned: str, asked: str | None, *, option: str | None = None) -> str:
    """The commit that is read of a data set with a pinned revision: the user's own, else the pinned one.

    Args:
        source: hub id.
        pinned: what a loader was written for.
        asked: the user's revision.
        option: what accepts another commit, without ``=COMMIT``; ``--data-revision SOURCE`` when absent.

    Raises:
        OtherRevisionError: the user names none, the pinned one cannot be had, and there is another in the caches.
    """
    if asked is not None:
        return resolve_revision(source, asked) or asked
    commit = resolve_revision(source, pinned)
    if commit is None and (here := resolve_revision(source)) is not None:
        raise OtherRevisionError(source, pinned, here, option or f"--data-revision {source}")
    return commit or pinned


def revision_note(source: str, pinned: str, commit: str) -> tuple[str, ...]:
    """What a reader of numbers must know where another commit than the pinned one is read; nothing otherwise."""
    if commit in (pinned, resolve_revision(source, pinned)):
        return ()
    return (f"data set {source}: read at revision {commit}, not at the pinned {pinned}",)


def read_all(readings: Iterable[Callable[[], T]]) -> list[T]:
    """What each reading gives; where several must accept another revision, one message has all the options."""
    found: list[T] = []
    refused: dict[str, OtherRevisionError] = {}
    for reading in readings:
        try:
            found.append(reading())
        except OtherRevisionError as error:
            refused.setdefault(error.accept, error)
    errors = list(refused.values())
    if len(errors) > 1:
        where = ", ".join(dict.fromkeys(error.where for error in errors))
        what = "; ".join(f"{error.where}: {error.what}" for error in errors)
        fix = "Fetch the pinned ones where there is a network (`hf download --repo-type dataset OWNER/NAME --revision "
        fix += "REVISION`); or accept what is here, which every name and row then says: "
        raise UserError(where, what, fix + " ".join(error.accept for error in errors))
    if errors:
        raise errors[0]
    return found


def parse_revisions(pairs: Iterable[str], option: str = "--data-revision") -> dict[str, str]:
    """``OWNER/NAME=COMMIT`` of the command line: which commit is read of a data set instead of the pinned revision.

    Raises:
        UserError: no such pair, or a data set given two commits.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        source, _, commit = pair.partition("=")
        if not _HUB_ID.fullmatch(source) or not COMMIT.fullmatch(commit):
            raise UserError(option, f"{pair!r} is not OWNER/NAME=COMMIT", "Give the 40 hexadecimal digits of a commit.")
        if found.setdefault(source, commit) != commit:
            raise UserError(option, f"{source} is given two commits", "Give one.")
    return found


def cached_commit(path: str, revision: str | None = None, *, repo_type: str = "dataset") -> str | None:
    """The commit that the caches hold for a revision of a hub id; None where they lack it. Never asks the hub."""
    return _cached(path, revision or "main", repo_type)


def _cached(path: str, wanted: str, repo_type: str) -> str | None:
    repository = hub_cache() / f"{repo_type}s--{path.replace('/', '--')}"
    snapshots = {entry.name for entry in repository.glob("snapshots/*") if entry.is_dir()}
    prepared = _prepared(path) if repo_type == "dataset" else []
    if COMMIT.fullmatch(wanted):
        return wanted if wanted in snapshots or wanted in prepared else None
    with contextlib.suppress(OSError):
        commit = (repository / "refs" / wanted).read_text(encoding="utf-8").strip()
        if commit in snapshots or commit in prepared:
            return commit
    if wanted != "main":
        return None
    if prepared:
        return prepared[0]
    return snapshots.pop() if len(snapshots) == 1 else None


def _prepared(path: str) -> list[str]:
    """Commits in the prepared cache, newest first (the order in which datasets itself would choose)."""
    owner, _, name = path.rpartition("/")
    # datasets writes names in snake case; without underscores and case both spellings are the same.
    squashed = name.replace("_", "").lower()
    found: list[tuple[float, str]] = []
    for folder in prepared_cache().glob(f"{owner}___*" if owner else "*"):
        if folder.name.rpartition("___")[2].replace("_", "").lower() != squashed:
            continue
        for entry in folder.glob("*/*/*"):
            if COMMIT.fullmatch(entry.name) and entry.is_dir():
                found.append((entry.stat().st_mtime, entry.name))
    return list(dict.fromkeys(commit for _, commit in sorted(found, reverse=True)))


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where the hub refuses, or does not answer.

    Of the HTTP library's errors the class that its own is built on: httpx's in one version, httpx2's in the next.
    """
    from huggingface_hub.errors import HfHubHTTPError

    found = next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")
    assert issubclass(found, Exception)
    return OSError, ValueError, found


def _ask_hub(path: str, revision: str, repo_type: str) -> str | None:
    from huggingface_hub import HfApi

    with contextlib.suppress(*hub_errors()):
        sha = HfApi().repo_info(path, repo_type=repo_type, revision=revision).sha
        return str(sha) if sha else None
    return None


def load_hub_dataset(
    path: str,
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
) -> datasets.Dataset:
    """Load one split of a data set at one commit, from the prepared cache, the hub or the hub cache.

    Args:
        path: hub id, or a folder that ``datasets.load_dataset`` understands.
        name: configuration ("subset" on the hub's pages).
        split: which split; may be left out where there is only one.
        revision: branch, tag or commit.
        data_dir: folder inside the repository.

    Raises:
        UserError: it can be had from none of them (says how to fetch it); no such configuration or split.
    """
    where = f"data set {path}" + (f", configuration {name}" if name else "") + (f", {data_dir}" if data_dir else "")
    wanted = {"name": name, "data_dir": data_dir}
    with _quiet():
        if Path(path).is_dir():
            try:
                return _pick(_open(path, wanted, None), split, where)
            except _UnavailableError as problem:
                raise UserError(where, f"cannot be read: {problem}", "Check folder and configuration.") from None
        commit = resolve_revision(path, revision)
        if commit is None:
            raise _not_found(path, revision, where, "")
        problems: list[str] = []
        folder = hub_cache() / f"datasets--{path.replace('/', '--')}" / "snapshots" / commit
        # The prepared copy first, as it needs no second preparation; a snapshot takes any data_dir, prepared or not.
        for source in (path, *([str(folder)] if folder.is_dir() else [])):
            try:
                return _pick(_open(source, wanted, commit if source == path else None), split, where)
            except _UnavailableError as problem:
                problems.append(str(problem))
    raise _not_found(path, revision or commit, where, "; ".join(dict.fromkeys(problems)))


class _UnavailableError(Exception):
    """One source does not have it; another may."""


def _open(source: str, wanted: dict[str, str | None], commit: str | None) -> Any:
    """All splits from one source, checked to be of that commit (None: a folder, which is what it is)."""
    import datasets

    broken = (*hub_errors(), datasets.exceptions.DatasetsError)
    try:
        builder = datasets.load_dataset_builder(source, **wanted, revision=commit, cache_dir=str(prepared_cache()))
        if commit is not None and builder.hash != commit:
            raise _UnavailableError(f"the prepared copy is of commit {builder.hash}")
        builder.download_and_prepare()
        return builder.as_dataset()
    except broken as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise _UnavailableError(line) from None


def _pick(splits: Any, split: str | None, where: str) -> datasets.Dataset:
    names = list(splits)
    if split is None and len(names) == 1:
        return splits[names[0]]
    if split is None:
        raise UserError(f"{where}, split", f"there are several: {', '.join(names)}", "Name one of them.")
    if split not in names:
        close = nearest(split, names)
        fix = f"Did you mean {close[0]!r}? " if close else ""
        raise UserError(f"{where}, split", f"unknown split {split!r}", f"{fix}There are: {', '.join(names)}.")
    return splits[split]


def _not_found(path: str, revision: str | None, where: str, problems: str) -> UserError:
    at = f" at revision {revision}" if revision else ""
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        return UserError(where, "no such folder", "Give a folder that exists, or a hub id (owner/name).")
    reach = "the network is switched off (HF_HUB_OFFLINE)" if offline() else "the hub cannot be reached or lacks it"
    what = f"not in the hub cache {hub_cache()} nor prepared in {prepared_cache()}{at}, and {reach}"
    option = f" --revision {revision}" if revision else ""
    fix = f"Fetch it where there is a network: `hf download --repo-type dataset {path}{option}`"
    fix += ", or set HF_HUB_OFFLINE=0." if offline() else "; check the name and your access token."
    other = _cached(path, "main", "dataset")
    if other not in (None, revision):
        fix += f" Here is revision {other}: ask for that one if it will do."
    return UserError(where, f"{what} ({problems})" if problems else what, fix)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without datasets' own progress bars and its notices about the cache: errors say what matters."""
    import datasets

    level, bars = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
