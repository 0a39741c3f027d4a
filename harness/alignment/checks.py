"""What can be checked of an alignment before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from harness.contracts.aligner import Aligner, Stage
from harness.contracts.dataset import RowSchema, TrainingRow, schema_name
from harness.contracts.recipe import Recipe
from harness.core.config import parse_options
from harness.core.errors import UserError, unknown
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.specs import AlignSpec
from harness.data.row_schema import FIELDS, form_of
from harness.models import lineage
from harness.models.chat_templates import ChatTemplate, resolve_template, with_template_of
from harness.models.inspect import inspect_adapter
from harness.models.locate import is_url
from harness.steps.files import slug

TAKEN = (
    *("id", "prompt_ids", "completion_ids", "labels_mask", "chosen_ids", "rejected_ids"),
    *("ref_chosen_logps", "ref_rejected_logps", "ref_completion_logps"),
)
"""Columns of tokenised rows, which no class of rows can have as its own."""


def check_method(aligner: Aligner, recipe: Recipe) -> tuple[Stage, ...]:
    """What an aligner says of itself must be something that can be trained; returns its stages.

    Raises:
        UserError: rows that hold nothing to train on, or stages that are none.
    """
    schema = _trainable(aligner.name, getattr(aligner, "consumes", None))
    name = schema_name(schema)
    stages = aligner.stages(recipe)
    if not isinstance(stages, tuple) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        what = f"`stages` of {aligner.name} returned {stages!r}"
        raise UserError("METHOD", what, "Return a tuple of one or more harness.Stage.")
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names) or any(slug(one) != one for one in names):
        what = f"stages of {aligner.name} are named {', '.join(map(repr, names))}"
        raise UserError("METHOD", what, "Give each a name of its own, of letters, digits and . _ @ + -.")
    for stage in stages:
        rows_of(aligner, stage)
        recipe_of(recipe, stage)
    if len(stages) == 1 and rows_of(aligner, stages[0]) != schema:
        consumed = schema_name(rows_of(aligner, stages[0]))
        what = f"stage {stages[0].name} of {aligner.name} consumes {consumed}, and {aligner.name} {name}"
        raise UserError("METHOD", what, "Let both name the same rows.")
    return stages


def rows_of(aligner: Aligner, stage: Stage) -> RowSchema | type[TrainingRow]:
    """The schema of a stage's rows.

    Raises:
        UserError: it is none that can be trained on.
    """
    if stage.consumes == schema_name(aligner.consumes):
        return aligner.consumes
    return _trainable(f"stage {stage.name} of {aligner.name}", stage.consumes)


def has_reference(aligner: Aligner, stage: Stage) -> bool:
    """Whether the rows of a stage carry log-probabilities under the policy that it begins with.

    Of a method for pairs, those of a stage on pairs: what another trains on before them has none.
    """
    return aligner.needs_reference and form_of(rows_of(aligner, stage)) == form_of(aligner.consumes)


def recipe_of(recipe: Recipe, stage: Stage) -> Recipe:
    """A recipe with a stage's own settings laid over it.

    Raises:
        UserError: it has no such setting, or not with such a value.
    """
    own = {**stage.recipe, **({"steps": stage.steps} if stage.steps is not None else {})}
    if not own:
        return recipe
    return parse_options(type(recipe), {**recipe.model_dump(), **own}, f"METHOD: stage {stage.name}")


def _trainable(who: str, schema: Any) -> RowSchema | type[TrainingRow]:
    """A schema, where rows of it can be trained on."""
    if isinstance(schema, type) and issubclass(schema, TrainingRow):
        for column in schema.columns:
            if column not in schema.model_fields or column in TAKEN:
                what = f"{schema.__name__}.columns of {who} names {column!r}, which is "
                what += "a column of the harness's own" if column in TAKEN else "no field of the class"
                raise UserError("METHOD", what, f"Fields: {', '.join(schema.model_fields)}.")
        return schema
    if not isinstance(schema, str) or schema not in FIELDS or schema == "prompts":
        known = ", ".join(name for name in FIELDS if name != "prompts")
        what = f"{who} consumes {schema!r}, which are no rows to train on"
        raise UserError("METHOD", what, f"Consume {known}, or a subclass of harness.TrainingRow.")
    return cast("RowSchema", schema)


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
    if start.conditioning is not None:  # of a study's own arm: any other has been refused when it was inspected
        what = "was trained with a conditioning, which training from it would lose"
        raise UserError(where, what, "Start from an adapter that has none.")
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
