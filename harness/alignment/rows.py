"""The rows of one stage as token ids: from the caches of what is known, or read, selected and tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.alignment.plan import AlignPlan, StagePlan
from harness.contracts.aligner import Aligner
from harness.contracts.dataset import Dataset, schema_name
from harness.contracts.registry import Registry
from harness.data.expression import parse_expression
from harness.data.row_schema import form_of
from harness.data.selection import Keep, Selection, select
from harness.data.token_cache import Prepared, TokenCache, pinned
from harness.data.tokenise import Tokeniser
from harness.models.inspect import open_tokenizer
from harness.steps.provenance import code_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_rows(plan: AlignPlan, stage: StagePlan, registry: Registry, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Rows of a stage as token ids, from the cache where it knows them.

    Args:
        plan: of the alignment.
        stage: one of its stages.
        registry: that it was planned with.
        tokenizer: of the plan's model.

    Raises:
        UserError: no row is left, or one is not what its schema says.
    """
    recipe = stage.recipe
    length = min(recipe.max_length, plan.model.max_length)

    def selected(keep: Keep) -> Selection:
        return select(
            plan.spec.dataset,
            schema=stage.schema,
            registry=registry,
            seed=plan.spec.data_seed,
            samples=plan.spec.samples,
            heldout=recipe.eval_rows,
            options=plan.data_options,
            keep=keep,
        )

    def tokeniser() -> Tokeniser:
        loss_on = "last" if form_of(stage.schema) == "pairs" else recipe.loss_on
        return Tokeniser(tokenizer, plan.template, max_length=length, schema=stage.schema, loss_on=loss_on)

    codes = [code_digest(registry.registered(Dataset, name, "--dataset")) for name in _data_sets(plan, registry)]
    cache = TokenCache({"data": stage.data, "code": codes} if pinned(stage.data) else {}, _how(plan, stage, registry))
    return cache.prepare(selected, tokeniser)


def open_tokenizer_of(plan: AlignPlan) -> PreTrainedTokenizerBase:
    """The tokenizer of a plan's model, with the plan's chat template."""
    tokenizer = open_tokenizer(plan.model)
    tokenizer.chat_template = plan.template.source
    return tokenizer


def tokens(plan: AlignPlan, stage: StagePlan) -> dict[str, Any]:
    """All that token ids hang on, besides the rows and the code of a class of rows."""
    return {
        "tokenizer": plan.model.tokenizer_digest,
        "template": plan.template.digest,
        "max_length": min(stage.recipe.max_length, plan.model.max_length),
        "loss_on": stage.recipe.loss_on,
        "schema": schema_name(stage.schema),
    }


def _how(plan: AlignPlan, stage: StagePlan, registry: Registry) -> dict[str, Any]:
    how = tokens(plan, stage)
    if not isinstance(stage.schema, str):
        # Its `render` decides what is tokenised.
        how["code"] = code_digest(registry.registered(Aligner, plan.spec.method, "METHOD"))
    return how


def _data_sets(plan: AlignPlan, registry: Registry) -> list[str]:
    return sorted({part.name for part in parse_expression(plan.spec.dataset, registry)})


def described(plan: AlignPlan, data: Prepared) -> dict[str, Any]:
    """What step.json says of the rows."""
    found = {
        "template": plan.template.name,
        "counts": data.selection.counts,
        "dropped": {**data.selection.dropped, **data.train.rejected},
        "tokens": data.train.stats,
        "notes": [*data.selection.notes, *data.train.notes],
    }
    if data.heldout is not None:
        found["heldout"] = {"rows": len(data.heldout.rows), "dropped": data.heldout.rejected}
    return found


def row_length(row: Mapping[str, Any]) -> int:
    """Tokens of a row: of a pair, of the longer of the two."""
    if "completion_ids" in row:
        return len(row["prompt_ids"]) + len(row["completion_ids"])
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def row_tokens(row: Mapping[str, Any]) -> int:
    """Tokens that a forward pass over a row reads: both answers of a pair come with their prompt."""
    if "completion_ids" in row:
        return len(row["prompt_ids"]) + len(row["completion_ids"])
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
