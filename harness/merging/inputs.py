"""What the user names as models of a merge, found and checked: base, inputs, templates, tied weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core.conditioning import refuse_control
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.adapters.kinds import open_adapter
from harness.merging.controls import Carried, Controlled, carried_by, under_control
from harness.merging.sources import MergeModel, head_of, is_tied, open_checkpoint
from harness.models.chat_templates import read_chat_template
from harness.models.inspect import inspect_adapter, inspect_model, is_adapter
from harness.models.tensors import TensorFolder

_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
"""Computed from the configuration; old checkpoints stored them, nothing reads them."""
INPUTS = "--inputs"


@dataclass
class OpenModels:
    """The models of one merge."""

    info: ModelInfo
    """Where config, tokenizer and the order of tensors come from: the base, or else the first checkpoint."""
    base: MergeModel | None
    inputs: list[MergeModel]
    template: str | None
    names: list[list[str]]
    """Per input: the tensors that it has."""
    base_names: list[str] | None
    config_changes: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    carried: Carried | None = None
    """What prompts of the result need: the control that stood beside all inputs."""

    @property
    def digests(self) -> dict[str, str]:
        """Input by number -> digest of its weights, as a record says what a merge was made from."""
        return {f"input {number}": model.digest for number, model in enumerate(self.inputs, 1)}


class _Opener:
    """Opens each checkpoint once, however many adapters lie on it."""

    def __init__(self, trust: ModelSpec | None, option: str) -> None:
        self._option = option
        self._trust = trust.model_dump(include={"allow_pickle", "trust_remote_code"}) if trust is not None else {}
        self._mismatch = trust.allow_template_mismatch if trust is not None else False
        self._folders: dict[str, TensorFolder] = {}

    def checkpoint(self, ref: str, revision: str | None, where: str) -> tuple[ModelInfo, TensorFolder]:
        info = inspect_model(ModelSpec(model=ref, revision=revision, **self._trust), where)
        if not info.path:
            raise UserError(f"{where} {ref}", "is an endpoint: its weights cannot be read", "Give a folder or hub id.")
        key = f"{info.path} {info.weights_digest}"
        if key not in self._folders:
            self._folders[key] = open_checkpoint(info, f"{where} {info.name}")
        return info, self._folders[key]

    def adapter(self, given: MergeInput | ModelSpec, on: ModelInfo, where: str) -> AdapterInfo:
        ref = given.ref if isinstance(given, MergeInput) else str(given.adapter)
        revision = given.revision if isinstance(given, MergeInput) else None
        try:
            # Of an adapter under the base nobody says a control.
            conditioned = isinstance(given, MergeInput)
            return inspect_adapter(
                ref, on, revision=revision, allow_template_mismatch=self._mismatch, conditioned=conditioned
            )
        except UserError as error:
            place = error.where.replace("--adapter", where, 1)
            raise UserError(place, error.what, error.fix.replace("as --model", "as --base")) from None

    def base(self, spec: ModelSpec) -> tuple[ModelInfo, MergeModel]:
        info, folder = self.checkpoint(spec.model, spec.revision, "--base")
        model = _checkpoint_model(info, folder, f"--base {info.name}")
        if spec.adapter is not None:
            found = self.adapter(spec, info, "--base")
            model = _adapter_model(found, model, f"--base {info.name}+{found.name}")
        return info, model

    def input(self, given: MergeInput, number: int, base: tuple[ModelInfo, MergeModel] | None) -> MergeModel:
        where = f"{self._option} [{number}]" if self._option == INPUTS else self._option
        if not is_adapter(given.ref, given.revision, self._option):
            asked = [given.control] if given.control is not None else []
            refuse_control(asked, None, f"{given.ref} is a checkpoint", f"{where}, control")
            info, folder = self.checkpoint(given.ref, given.revision, self._option)
            return _checkpoint_model(info, folder, f"{where} {info.name}")
        if given.base is not None:
            info, folder = self.checkpoint(given.base, None, self._option)
            under = _checkpoint_model(info, folder, f"{where} {info.name}")
        elif base is not None:
            info, under = base
            if under.adapter is not None:
                under = _checkpoint_model(info, under.checkpoint, under.label)
        else:
            raise UserError(f"{where} {given.ref}", "is an adapter, and no base is given", "Add --base BASE.")
        found = self.adapter(given, info, where)
        return _adapter_model(found, under, f"{where} {found.name}", under_control(found, given.control, where))


def _checkpoint_model(info: ModelInfo, folder: TensorFolder, label: str) -> MergeModel:
    return MergeModel(
        label, info.name, info.weights_digest, folder, info, template=info.chat_template, revision=info.revision
    )


def _adapter_model(
    found: AdapterInfo, under: MergeModel, label: str, controlled: Controlled | None = None
) -> MergeModel:
    return MergeModel(
        label,
        found.name,
        found.digest,
        under.checkpoint,
        under.info,
        adapter=open_adapter(found if controlled is None else controlled.summed, under.checkpoint, label),
        template=read_chat_template(Path(found.path)) or under.template,
        controlled=controlled,
    )


def open_models(spec: MergeSpec, option: str = INPUTS) -> OpenModels:
    """Find and check every model that a merge names; ``option`` is what messages call the inputs.

    Raises:
        UserError: a model that is not there, is not trusted, or does not fit the others.
    """
    opener = _Opener(spec.base, option)
    base = opener.base(spec.base) if spec.base is not None else None
    inputs = [opener.input(given, n + 1, base) for n, given in enumerate(spec.inputs)]
    first = base[1] if base is not None else inputs[0]
    for model in inputs:
        _check_architecture(model, first)
    template = _template(first, inputs, spec)
    opened = opened_from(base[1] if base is not None else None, inputs, template)
    if spec.config is None:
        _check_names(opened, first)
    if {model.info.tokenizer_digest for model in inputs} - {first.info.tokenizer_digest}:
        opened.notes.append(f"tokenizer files differ between the models: those of {first.info.name} are written")
    return opened


def opened_from(base: MergeModel | None, inputs: list[MergeModel], template: str | None) -> OpenModels:
    """The opened models with the lists of their tensors."""
    opened = OpenModels((base or inputs[0]).info, base, inputs, template, [], None)
    opened.carried = carried_by([(model.label, model.controlled) for model in inputs])
    opened.notes += [model.controlled.note for model in inputs if model.controlled is not None]
    _name_tensors(opened)
    return opened


def _check_architecture(model: MergeModel, first: MergeModel) -> None:
    if model.info.architecture != first.info.architecture:
        raise UserError(
            model.label,
            f"is a {model.info.architecture}, and {first.label} is a {first.info.architecture}",
            "Merge models of one architecture.",
        )


def _template(first: MergeModel, inputs: Sequence[MergeModel], spec: MergeSpec) -> str | None:
    """The base's chat template, or the one that all inputs brought."""
    allowed = spec.base.allow_template_mismatch if spec.base is not None else False
    models = [first, *inputs]
    found = next((model for model in models if model.template is not None), None)
    if found is None:
        return None
    for model in models:
        if model.template not in (None, found.template) and not allowed:
            raise UserError(
                model.label,
                f"has another chat template than {found.label}",
                "Merge models of one template, or pass --allow-template-mismatch: the first one's is written.",
            )
    return found.template


def _name_tensors(opened: OpenModels) -> None:
    """List what each model has; a tied head is left out, or put into every list where a model has one of its own."""
    models = [*opened.inputs, *([opened.base] if opened.base is not None else [])]
    first = opened.base or opened.inputs[0]
    head = head_of(first.checkpoint.names)
    tied = is_tied(opened.info, first.checkpoint.names)
    names = [[n for n in model.checkpoint.names if not _BUFFERS.search(n)] for model in models]
    if tied:
        untied = [m for m in models if _own_head(m, head)]
        for listed in names:
            if head in listed:
                listed.remove(head)
            if untied:
                listed.append(head)
        if untied:
            opened.config_changes["tie_word_embeddings"] = False
            opened.notes.append(
                f"{head} is untied from the embeddings: {', '.join(m.name for m in untied)} changes it alone"
            )
    opened.names = names[: len(opened.inputs)]
    opened.base_names = names[-1] if opened.base is not None else None


def _own_head(model: MergeModel, head: str) -> bool:
    """Whether a model of a tied family has output embeddings that are not its input embeddings."""
    if model.adapter is not None and model.adapter.touches(head):
        return True
    return not is_tied(model.info, model.checkpoint.names)


def _check_names(opened: OpenModels, first: MergeModel) -> None:
    """Hold every model to the same tensors, of the same shapes.

    Raises:
        UserError: naming the tensor and, where they differ, both shapes.
    """
    wanted = opened.base_names if opened.base_names is not None else opened.names[0]
    for model, names in zip(opened.inputs, opened.names, strict=True):
        missing, more = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
        if missing:
            rest = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UserError(
                f"{model.label}, {missing[0]}", f"is missing{rest}; {first.label} has it", "Merge whole models."
            )
        if more:
            rest = f" (and {len(more) - 1} more)" if len(more) > 1 else ""
            raise UserError(
                f"{model.label}, {more[0]}", f"is not in {first.label}{rest}", "Merge models of one architecture."
            )
        for name in wanted:
            same_shape(model, name, first, name)


def same_shape(model: MergeModel, name: str, other: MergeModel, its: str) -> None:
    """Hold two tensors that are merged to one shape.

    Raises:
        UserError: with the names and both shapes.
    """
    shape, expected = model.entry(name).shape, other.entry(its).shape
    if shape != expected:
        raise UserError(
            f"{model.label}, {name}",
            f"has shape {list(shape)}, and {'that' if its == name else its} of {other.label} has {list(expected)}",
            "Merge models of one architecture and one vocabulary.",
        )


def lineage_entry(model: MergeModel) -> Mapping[str, Any]:
    """A model of a merge as the record names it: contents, never a path."""
    entry: dict[str, Any] = {"name": model.name, "kind": model.kind, "digest": model.digest}
    if model.revision is not None:
        entry["revision"] = model.revision
    if model.adapter is not None:
        entry["base"] = model.info.weights_digest
    if model.controlled is not None:
        entry["control"] = model.controlled.control
    return entry
