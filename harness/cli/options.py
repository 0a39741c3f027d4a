"""Options that several commands share, and what they come to: written once, so that they are called and read alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.core.errors import UserError

if TYPE_CHECKING:
    from harness.contracts.registry import Registry
    from harness.core.specs import ModelSpec
    from harness.core.user_defaults import UserDefaults

PluginFiles = Annotated[list[str] | None, typer.Option("--plugin", help="Loose plugin file to load (repeatable).")]
Folders = Annotated[list[str] | None, typer.Option("--tasks", help="Folder of task YAML files (repeatable).")]
DataRevisions = Annotated[
    list[str] | None,
    typer.Option(
        "--data-revision",
        metavar="OWNER/NAME=COMMIT",
        help="Read a hub data set at this commit, not at the pinned one (repeatable).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Revision = Annotated[str | None, typer.Option(help="Hub revision of the model.")]
RunDtype = Annotated[str, typer.Option(help="auto (fp32 on a CPU, else as stored), float32, bfloat16, float16.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Load pickled weights (can run code).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
AllowTemplateMismatch = Annotated[
    bool, typer.Option("--allow-template-mismatch", help="Go on when adapter and model differ in template.")
]


def options_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--set`` as nested options."""
    from harness.core.config import set_path

    options: dict[str, Any] = {}
    for pair in pairs or ():
        set_path(options, pair)
    return options


def models_of(pairs: Sequence[str] | None) -> dict[str, str]:
    """The bases of a study that ``--model BASE=PATH`` names.

    Raises:
        UserError: no such pair.
    """
    found = {}
    for pair in pairs or ():
        name, equals, path = pair.partition("=")
        if not equals or not name or not path:
            raise UserError("--model", f"{pair!r} is not BASE=PATH", "Write for example --model llama=./llama-7b.")
        found[name] = path
    return found


def with_defaults(plugins: Sequence[str] | None) -> tuple[UserDefaults, Registry]:
    """The user's defaults, and the installed plugins with the loose ones of the defaults and of ``--plugin``."""
    from harness.contracts.registry import load_plugins
    from harness.core.user_defaults import load_user_defaults

    defaults = load_user_defaults()
    return defaults, load_plugins([*defaults.plugins, *(plugins or ())])


def revisions_of(pairs: Sequence[str] | None, defaults: UserDefaults) -> dict[str, str]:
    """The commits of data sets: those of the defaults, and over them those of ``--data-revision``."""
    from harness.data.hub import parse_revisions

    return {**defaults.data_revisions, **parse_revisions(pairs or ())}


def model_of(command: str, **fields: Any) -> ModelSpec:
    """The model that a command's options name, checked; ``command`` is what messages call it."""
    from harness.core.config import parse_options
    from harness.core.specs import ModelSpec

    return parse_options(ModelSpec, fields, command)
