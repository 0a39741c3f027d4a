"""What `harness plugins new KIND NAME` writes: an installable package, a small working plugin, a passing test."""

from __future__ import annotations

import re
from pathlib import Path

from harness.contracts.hookspecs import REGISTRATION
from harness.core.errors import UserError, unknown
from harness.core.version import __version__

TEMPLATES = Path(__file__).parent / "skeletons"
KINDS = tuple(sorted(["loss", "observer", *(kind if kind != "tasks" else "task" for kind in REGISTRATION.values())]))
"""The kinds of plugins; ``loss`` is the short form of an aligner, and ``observer`` one that is told of steps."""
_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def write_package(kind: str, name: str, folder: Path | str) -> list[Path]:
    """Write the package ``harness-NAME`` into ``folder``.

    Args:
        kind: one of :data:`KINDS`.
        name: what the plugin will be chosen by; lower case, words joined by ``-`` or ``_``.
        folder: the package's own folder; must not exist, or be empty.

    Returns:
        The files written, in order of name.

    Raises:
        UserError: an unknown kind, a name that cannot be a package's, a folder that holds something.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if kind not in KINDS:
        raise unknown("harness plugins new", "kind", kind, KINDS, "harness plugins new --help")
    if not _NAME.fullmatch(name):
        raise UserError(
            "harness plugins new",
            f"{name!r} cannot be the name of a package",
            "Use lower-case letters and digits, words joined by - or _, such as `brevity` or `refusal-rate`.",
        )
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"harness plugins new, {target}", "exists and is not an empty folder", "Give another folder.")
    words = re.split(r"[-_]", name)
    values = {
        "kind": kind,
        "name": name,
        "package": "harness_" + "_".join(words),
        "distribution": "harness-" + "-".join(words),
        "cls": "".join(word.capitalize() for word in words),
        "requires": __version__,
    }
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    written = []
    for source, relative in _files(kind, name, str(values["package"])):
        path = target / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(jinja.get_template(source).render(values), encoding="utf-8")
        written.append(path)
    return sorted(written)


def _files(kind: str, name: str, package: str) -> list[tuple[str, str]]:
    """The templates of a package, and where each goes."""
    files = [
        ("package/pyproject.toml.jinja", "pyproject.toml"),
        ("package/README.md.jinja", "README.md"),
        (f"kinds/{kind}.py.jinja", f"{package}/__init__.py"),
        (f"kinds/test_{kind}.py.jinja", f"tests/test_{package.removeprefix('harness_')}.py"),
    ]
    if kind == "task":
        files += [
            ("kinds/task.yaml.jinja", f"{package}/tasks/{name}.yaml"),
            ("kinds/task.jsonl.jinja", f"{package}/tasks/{name}.jsonl"),
        ]
    return files
