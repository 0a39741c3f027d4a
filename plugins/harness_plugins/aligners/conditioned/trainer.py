"""Trains on answers, each row under its own values, and measures held-out rows under the others too. Heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainingArguments

from harness import TrainerCall, TrainingJob, UserError, control_place
from harness_plugins.aligners.conditioned.controls import Control
from harness_plugins.aligners.conditioned.values import ConditionedRecipe, check_spread, other_values, values_of

IGNORED = -100
Alternatives = Callable[[Sequence[int]], list[list[int]]]
"""The other values that a row is measured under."""
WORD = -1
"""Slot of a token that is no virtual token."""


class ConditionedCollator:
    """Rows as a batch under given values, with the control where evaluation will put it.

    Args:
        control: what stands for values.
        position: of the conditioning.
        bos: the tokenizer's BOS token.
        alternatives: of a row's values; none in training.
    """

    def __init__(
        self, control: Control, position: Any, bos: int | None, alternatives: Alternatives | None = None
    ) -> None:
        self.control, self.position, self.bos, self.alternatives = control, position, bos, alternatives

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch under the rows' own values; ``others``: the same rows under each of the alternatives."""
        made = self.batch(rows, [row["values"] for row in rows])
        if self.alternatives is None:
            return made
        others = zip(*(self.alternatives(row["values"]) for row in rows), strict=True)
        return {**made, "others": [self.batch(rows, other) for other in others]}

    def batch(self, rows: Sequence[Mapping[str, Any]], values: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``ids``, ``labels`` and ``slots``, (B, S), and ``values``, (B, preferences)."""
        made = [self.sequence(row, one) for row, one in zip(rows, values, strict=True)]
        columns = {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(one[place]) for one in made], batch_first=True, padding_value=padding
            )
            for place, (name, padding) in enumerate((("ids", 0), ("labels", IGNORED), ("slots", WORD)))
        }
        return {**columns, "values": torch.tensor([list(one) for one in values])}

    def sequence(self, row: Mapping[str, Any], values: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Token ids, labels, and slots of virtual tokens of one row."""
        place = control_place(row["prompt_ids"], self.position, self.bos)
        inserted = self.control.ids(values)
        ids = [*row["prompt_ids"], *row["completion_ids"]]
        labels = [i if shown else IGNORED for i, shown in zip(ids, row["labels_mask"], strict=True)]
        count, words = len(inserted), [WORD] * len(ids)
        return (
            [*ids[:place], *inserted, *ids[place:]],
            [*labels[:place], *[IGNORED] * count, *labels[place:]],
            [*words[:place], *range(count), *words[place:]],
        )


class ConditionedTrainer(Trainer):
    """The mean over the tokens of an optimiser step that carry loss, as in SFT, each row under its values."""

    def __init__(self, *, measured: ConditionedCollator, prepared: Prepared, **arguments: Any) -> None:
        super().__init__(**arguments)
        # The mean is over the whole optimiser step, whatever model this is.
        self.model_accepts_loss_kwargs = True
        self._measured, self._prepared = measured, prepared
        self._policy: Any = arguments["model"]

    def losses(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """(B, S - 1) negative log-likelihood of each next token in nats; 0 where there is no loss."""
        control: Control = self._policy.control
        vectors_BND = control.vectors(inputs["values"])
        control.choose(inputs["values"])
        if vectors_BND is None:
            logits_BSV = model(input_ids=inputs["ids"], use_cache=False).logits
        else:
            words_BSD = self._policy.get_input_embeddings()(inputs["ids"])
            slots_BS1 = inputs["slots"][..., None]
            picked_BSD = vectors_BND.gather(1, slots_BS1.clamp(min=0).expand_as(words_BSD)).to(words_BSD.dtype)
            logits_BSV = model(
                inputs_embeds=torch.where(slots_BS1 > WORD, picked_BSD, words_BSD), use_cache=False
            ).logits
        logits_BVS = logits_BSV[:, :-1].float().transpose(1, 2)
        return torch.nn.functional.cross_entropy(logits_BVS, inputs["labels"][:, 1:], reduction="none")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the tokens of the optimiser step that carry loss, in nats."""
        losses_BS = self.losses(model, inputs)
        if num_items_in_batch is None:
            return losses_BS.sum() / (inputs["labels"][:, 1:] != IGNORED).sum()
        # Gradients of several processes are averaged, and the count is that of all of them.
        return losses_BS.sum() / num_items_in_batch * self.accelerator.num_processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With what is to be known of the rows."""
        super().log({**logs, **self._prepared.facts}, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Held-out rows come with the same rows under their other values."""
        trained, self.data_collator = self.data_collator, self._measured
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = trained

    def row_values(self, model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Of each held-out row, (B,): mean negative log-likelihood under its own values, and what others add to it.

        ``gain`` is log p(own) - log p(other) in nats per token, a mean over the other values of its preference.
        """
        tokens_B = (inputs["labels"][:, 1:] != IGNORED).sum(1)
        own_B = self.losses(model, inputs).sum(1) / tokens_B.clamp(min=1)
        found: dict[str, Tensor] = {"loss": own_B, "tokens": tokens_B}
        gains: dict[str, list[Tensor]] = {}
        for names, other in zip(self._prepared.figures, inputs["others"], strict=True):
            for name in names:
                gains.setdefault(name, []).append(self.losses(model, other).sum(1) / tokens_B.clamp(min=1) - own_B)
        return found | {name: torch.stack(some).mean(0) for name, some in gains.items()}


@dataclass(frozen=True)
class Prepared:
    """Rows of a stage as conditioned ones, and how held-out rows are measured."""

    rows: list[dict[str, Any]]
    """With ``id``, ``prompt_ids``, ``completion_ids``, ``labels_mask`` and ``values``."""
    heldout: list[dict[str, Any]] | None
    position: Any
    alternatives: Alternatives
    figures: Sequence[Sequence[str]]
    """For each alternative, the figures that it enters."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """What every line of the log says beside its own."""


def trainer_call(job: TrainingJob[Any], method: str) -> TrainerCall:
    """The trainer of one stage on rated rows, not yet built.

    Raises:
        UserError: rows without ratings, or of one value; a control that leaves a row no room in the context.
    """
    config: ConditionedRecipe = job.config
    rows = _with_values(job.rows, config)
    check_spread([row["values"] for row in rows], config.preferences, method)
    held = _with_values(job.heldout, config) if job.heldout is not None else None
    names = {name: f"gain/{name}" if len(config.preferences) > 1 else "gain" for name in config.preferences}
    figures = [[names[name]] for name, values in config.preferences.items() for _ in values[1:]]

    def alternatives(values: Sequence[int]) -> list[list[int]]:
        return other_values(values, config.preferences)

    return build(job, Prepared(rows, held, config.position, alternatives, figures))


def build(job: TrainingJob[Any], prepared: Prepared) -> TrainerCall:
    """The trainer of conditioned rows, not yet built.

    Raises:
        UserError: a control leaves a row no room in the context.
    """
    model: Any = job.model
    common = (model.control, prepared.position, job.tokenizer.bos_token_id)
    held = prepared.heldout
    measured = ConditionedCollator(*common, prepared.alternatives)
    check_room(measured, model, [*prepared.rows, *(held or [])])
    arguments = job.arguments(TrainingArguments, remove_unused_columns=False, label_names=["labels"])
    return TrainerCall(
        ConditionedTrainer,
        {
            "model": model,
            "args": arguments,
            "train_dataset": Dataset.from_list(prepared.rows),
            "eval_dataset": Dataset.from_list(held) if held is not None else None,
            "data_collator": ConditionedCollator(*common),
            "measured": measured,
            "prepared": prepared,
        },
    )


def _with_values(rows: Any, config: ConditionedRecipe) -> list[dict[str, Any]]:
    kept = ("id", "prompt_ids", "completion_ids", "labels_mask")
    found = []
    for row in rows:
        values = values_of(row, config.preferences, config.threshold)
        found.append({**{name: row[name] for name in kept}, "values": values})
    return found


def check_room(collator: ConditionedCollator, model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that the model's context does not hold together with their control.

    Raises:
        UserError: names both lengths, and the most that rows may have.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    alternatives = collator.alternatives or (lambda values: [])
    for row in rows:
        control = max(len(collator.control.ids(values)) for values in [row["values"], *alternatives(row["values"])])
        length = len(row["prompt_ids"]) + len(row["completion_ids"])
        if length + control > context:
            what = f"has {length} tokens, its control {control}, and the model's context is {context}"
            if context - control < 8:
                raise UserError(f"row {row['id']}", what, "Take fewer virtual tokens: --set tokens=N.")
            raise UserError(f"row {row['id']}", what, f"Leave room for it: --set max_length={context - control}.")


def hold_still(model: Any, *, control: bool, rest: bool) -> None:
    """Say which weights a stage trains: those of the control, and all others that are trained at all.

    Args:
        model: with its ``control``.
        control: whether the control's weights are trained.
        rest: whether the adapter's (or all of the model's) are.
    """
    for name, parameter in model.named_parameters():
        if name.startswith("control."):
            parameter.requires_grad_(control)
        elif not rest:
            parameter.requires_grad_(False)
