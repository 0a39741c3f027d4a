"""Finding and loading lm-eval's tasks: by name without indexing all of them, with data from either cache."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from harness.core.errors import UserError, nearest
from harness.core.plain_yaml import check_size
from harness.data.hub import COMMIT, resolve_revision
from harness.models.rendering import sandbox
from harness.tasks.catalog import Chosen

if TYPE_CHECKING:
    from lm_eval.api.task import Task


_NAMING = re.compile(
    r"^[\"']?(?:(?:task|group|tag)[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[\]{}-][^\s\"'#]*)[\"']?[ \t]*(?:#.*)?$"
    r"|(?:group|tag)[\"']?[ \t]*:[ \t]*((?:\n[ \t]*-[ \t]*[^\s:]+[ \t]*$)+))",
    re.MULTILINE,
)
"""`task: NAME`, or `tag:` with a block of `- NAME` (below `task:` such a block lists members)."""
_BLOCK_ITEM = re.compile(r"-[ \t]*[\"']?([^\s\"']+?)[\"']?[ \t]*$", re.MULTILINE)


def tasks_folder() -> Path:
    """lm-eval's own folder of task YAML, found without importing it."""
    from importlib.util import find_spec

    spec = find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-eval", "not installed", 'pip install "lm-eval[api]>=0.4.13"')
    return Path(spec.origin).parent / "tasks"


def _include_folder(chosen: Chosen) -> Path:
    """The smallest folder that holds the task: indexing all of lm-eval's takes seconds, one folder milliseconds."""
    ref = chosen.spec.lm_eval
    assert ref is not None
    if ref.include is not None:
        beside = (chosen.entry.folder or Path()) / ref.include
        return beside if beside.is_dir() else tasks_folder() / ref.include
    root = tasks_folder()
    folders = _folders_by_name(root)
    if ref.task in folders:
        # The tasks of a tag may lie in several folders: all of them belong to it.
        return Path(os.path.commonpath(folders[ref.task]))
    # A name that is written in a way that only lm-eval itself can read (a group within a group): the whole index.
    whole = re.compile(rf"(?<![\w.-]){re.escape(ref.task)}(?![\w.-])")
    if any(whole.search(text) for _, text in _yaml_texts(root)):
        return root
    close = nearest(ref.task, folders)
    raise UserError(
        f"--task lm_eval:{ref.task}",
        "lm-eval has no task, group or tag of that name",
        f"Did you mean {' or '.join(close)}?" if close else "List them with `lm_eval ls tasks`.",
    )


@lru_cache(maxsize=1)
def _folders_by_name(root: Path) -> dict[str, list[str]]:
    """Every name that a task, group or tag is given in a YAML file under ``root`` -> the folders it is given in.

    A text search: parsing 14,000 files takes many seconds, this a quarter of one, once in a process.
    """
    found: dict[str, list[str]] = {}
    for folder, text in _yaml_texts(root):
        for single, block in _NAMING.findall(text):
            for name in [single] if single else _BLOCK_ITEM.findall(block):
                found.setdefault(name, []).append(folder)
    return found


def _yaml_texts(root: Path) -> Iterator[tuple[str, str]]:
    """Folder and text of every YAML file; lm-eval's included parts often end in ``_yaml``."""
    for folder, below, files in os.walk(root):
        below.sort()
        for file in sorted(files):
            if file.endswith("yaml"):
                yield folder, Path(folder, file).read_text(encoding="utf-8", errors="replace")


def load(chosen: Chosen) -> dict[str, Task]:
    """The leaf tasks, by name, with their data."""
    ref = chosen.spec.lm_eval
    assert ref is not None
    folder = _include_folder(chosen)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    where = f"--task {chosen.spec.name}"
    revisions = {ref.data: ref.revision} if ref.data and ref.revision else {}
    with quiet() as said, _either_cache(revisions), _guarded(chosen, folder):
        try:
            manager = TaskManager(include_defaults=False, include_path=str(folder))
            loaded = manager.load([_spec(ref.task, manager, folder)])
        except (KeyError, ImportError) as error:
            # A group whose members lie in other folders: the whole index knows them.
            manager = TaskManager(include_path=str(folder))
            if ref.task not in manager.all_tasks:
                raise UserError(where, f"lm-eval cannot load {ref.task!r}: {error}", "Check its YAML.") from error
            loaded = manager.load([ref.task])
        except UserError:
            raise
        except Exception as error:
            last = said.getvalue().strip().splitlines()[-1:]
            raise UserError(
                where,
                f"lm-eval cannot load {ref.task!r}: {type(error).__name__}: {error}",
                " ".join(last) or "Check it.",
            ) from error
    return dict(loaded["tasks"])


def _spec(task: str, manager: Any, folder: Path) -> str | dict[str, Any]:
    """The task's name; with absolute ``data_files`` where its YAML names files that lie beside it."""
    entry = manager.task_index.get(task)
    if entry is None or entry.yaml_path is None:
        return task
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(entry.yaml_path, resolve_func=True) or {}
    kwargs = config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    if not files:
        return task
    # lm-eval takes a dictionary as the whole configuration, so all of it is handed on.
    return {
        **config,
        "task": task,
        "dataset_kwargs": {**kwargs, "data_files": _resolved(files, entry.yaml_path.parent)},
    }


def _resolved(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {key: _resolved(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_resolved(value, folder) for value in files]
    return str(folder / files) if (folder / str(files)).is_file() else files


@contextlib.contextmanager
def _guarded(chosen: Chosen, folder: Path) -> Iterator[None]:
    """Keep a stranger's YAML from running code while its task is loaded: ``!function``, and scripts of metrics.

    lm-eval asks nobody and offers no seam; included files may lie anywhere, so that its loader itself is watched.
    """
    own = tasks_folder().resolve()
    if chosen.entry.trusted or folder.resolve().is_relative_to(own):
        yield
        return
    from lm_eval.api import task as tasks
    from lm_eval.tasks import _yaml_loader as loading

    make_loader, get_metric = loading._make_loader, tasks.get_metric

    def refuse(what: str) -> NoReturn:
        fix = "Read that code first; then pass --trust-task-code (in Python: trust_task_code=True)."
        raise UserError(f"--task {chosen.spec.name}", what, fix)

    def watched(base_dir: Path, *, resolve_funcs: bool) -> Any:
        loader: Any = make_loader(base_dir, resolve_funcs=resolve_funcs)

        class Watched(loader):  # type: ignore[misc]  # lm-eval makes its loaders in a function
            def get_single_node(self) -> Any:
                node = super().get_single_node()
                if node is not None:
                    check_size(node)
                return node

        if resolve_funcs and not base_dir.resolve().is_relative_to(own):
            place = f"a YAML file in {base_dir} asks to run code"
            Watched.add_constructor("!function", lambda _, node: refuse(f"{place} (!function {node.value})"))
        return Watched

    def known(name: Any, hf_evaluate_metric: bool = False) -> Any:
        from lm_eval.api.registry import metric_registry

        if hf_evaluate_metric or name not in metric_registry:
            refuse(f"metric {name!r} is none of lm-eval's own: `evaluate` would run a script of that name")
        return get_metric(name)

    loading._make_loader, tasks.get_metric = watched, known
    try:
        yield
    finally:
        loading._make_loader, tasks.get_metric = make_loader, get_metric


@contextlib.contextmanager
def _either_cache(revisions: Mapping[str, str]) -> Iterator[None]:
    """Let lm-eval's ``load_dataset`` calls find data that is only in the hub cache, at the commit that is in the id.

    Offline, datasets reads only what it has prepared before, never a downloaded snapshot, and of that the newest
    whatever the revision; lm-eval offers no seam for another loader, so the function is replaced for as long as its
    tasks are being built.

    Args:
        revisions: hub id -> the user's revision.
    """
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    original = datasets.load_dataset
    level = datasets.utils.logging.get_verbosity()
    # Which cache offline data comes from is in the step id, not on the terminal.
    datasets.utils.logging.set_verbosity_error()

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        if Path(path).exists() or path in ("json", "csv", "parquet", "text"):
            return original(path, *args, **kwargs)
        wanted = revisions.get(path, kwargs.pop("revision", None))
        commit = resolve_revision(path, wanted) or wanted
        try:
            found = original(path, *args, revision=commit, **kwargs)
            if (read := _commit_of(found)) not in (None, commit):
                raise ValueError(f"the prepared copy is of commit {read}, not {commit}")
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            try:
                snapshot = snapshot_download(path, repo_type="dataset", revision=commit, local_files_only=True)
            except (LocalEntryNotFoundError, OSError, ValueError):
                option = f" --revision {commit}" if commit else ""
                raise UserError(
                    f"data set {path}",
                    f"cannot be loaded: {str(error).splitlines()[0]}",
                    f"Fetch it where there is a network: `hf download --repo-type dataset {path}{option}`; offline it "
                    "is read from HF_HUB_CACHE or HF_DATASETS_CACHE.",
                ) from error
            return original(snapshot, *args, **kwargs)
        return found

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original
        datasets.utils.logging.set_verbosity(level)


def _commit_of(loaded: Any) -> str | None:
    """Commit under which the prepared files of a data set, or of the first of its splits, lie."""
    first = next(iter(loaded.values()), None) if isinstance(loaded, dict) else loaded
    files = getattr(first, "cache_files", None) or []
    folder = Path(files[0]["filename"]).parent.name if files else ""
    return folder if COMMIT.fullmatch(folder) else None


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep lm-eval's progress bars and notices off the terminal; they are in the message if loading fails."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        yield said


@contextlib.contextmanager
def compiled_once() -> Iterator[None]:
    """Let lm-eval compile each Jinja template once, not anew for every document and field.

    Compiling took most of the time of preparing a task. A compiled template is what its source says and keeps no state
    between renderings, so the prompts are the same.
    """
    from lm_eval.utils import env

    # A YAML file may come from anybody, and outside a sandbox a template can call whatever Python has.
    safe = sandbox(env.undefined)
    safe.filters.update(env.filters)
    env.from_string = lru_cache(maxsize=1024)(safe.from_string)
    try:
        yield
    finally:
        vars(env).pop("from_string", None)
