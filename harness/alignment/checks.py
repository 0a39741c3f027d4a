"""What can be checked of an alignment before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.errors import UserError, unknown
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import AlignSpec
from harness.models import lineage
from harness.models.chat_templates import ChatTemplate, resolve_template, with_template_of
from harness.models.inspect import inspect_adapter
from harness.models.locate import is_url


def take_group(options: dict[str, Any], name: str) -> dict[str, Any]:
    """Take a group of options out of the recipe's.

    Raises:
        UserError: it is a value, not a group.
    """
    group = options.pop(name, {})
    if not isinstance(group, dict):
        raise UserError("--set", f"{name}={group!r}: {name} is a group of keys", f"Write --set {name}.KEY=VALUE.")
    return group


def check_data_options(given: Mapping[str, Any], names: Sequence[str]) -> None:
    """Options are for data sets that are used: others would be passed over in silence.

    Raises:
        UserError: they are not.
    """
    for name, options in given.items():
        if name not in names:
            raise unknown(f"--set dataset.{name}", "data set of this alignment", name, names, "harness data list")
        if not isinstance(options, dict):
            what = f"dataset.{name}={options!r}: {name} is a group of keys"
            raise UserError("--set", what, f"Write --set dataset.{name}.KEY=VALUE.")


def check_checkpoints(steps: Sequence[int], last: int) -> None:
    """Kept checkpoints are steps of the run.

    Raises:
        UserError: one is not.
    """
    wrong = [step for step in steps if not 1 <= step <= last]
    if wrong:
        what = f"{wrong[0]} is after the last step, {last}" if wrong[0] > last else f"{wrong[0]} is no step"
        raise UserError("--checkpoints", what, f"Give steps from 1 to {last}.")


def check_is_folder(spec: AlignSpec) -> None:
    """A model behind an endpoint cannot be trained.

    Raises:
        UserError: the base is one.
    """
    if is_url(spec.model.model):
        raise UserError(f"--model {spec.model.model}", "is an endpoint", "Give the folder or hub id of a base.")


def find_start(
    spec: AlignSpec, model: ModelInfo, adapter_options: Any, made: Mapping[str, AdapterInfo]
) -> AdapterInfo | None:
    """The adapter to continue from, one of ``made`` or of a folder or the hub.

    Raises:
        UserError: it is none, is of another base, or cannot be continued exactly.
    """
    if spec.start is None:
        return None
    where = f"--from {spec.start}"
    try:
        start = made.get(spec.start) or inspect_adapter(spec.start, model, allow_template_mismatch=True)
    except UserError as error:
        raise UserError(error.where.replace("--adapter", "--from", 1), error.what, error.fix) from None
    lineage.refuse_unless_plain(start.config, where)
    if spec.adapter == "none" or getattr(adapter_options, "dora", False):
        how = "--adapter none" if spec.adapter == "none" else "--set adapter.dora=true"
        raise UserError(
            where,
            f"cannot be continued with {how}: the two would not add up to one LoRA adapter",
            "Use lora or qlora, without dora.",
        )
    return start


def template_of(asked: str | None, model: ModelInfo, start: AdapterInfo | None) -> ChatTemplate:
    """The user's template; else that of the adapter to continue from; else the model's.

    Raises:
        UserError: there is none.
    """
    if start is not None and asked is None:
        bare = model.model_copy(update={"chat_template": None, "template_digest": None})
        taught = with_template_of(bare, start)
        # What goes on from an adapter speaks as that adapter was taught to.
        model = taught if taught.chat_template is not None else model
    return resolve_template(model, asked)


def check_processes(processes: int, batch_size: int) -> None:
    """Refuse a number of processes that cannot share an optimiser step evenly.

    Raises:
        UserError: it does not divide the batch.
    """
    if batch_size % processes:
        fits = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise UserError(
            f"--processes {processes}", f"cannot share batch_size {batch_size} evenly", f"Numbers that can: {fits}."
        )
