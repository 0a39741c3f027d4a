"""Chain of Hindsight: answers of both kinds follow one another, each behind a marker that says what it is."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness import Aligner, ArtifactFiles, TrainerCall, TrainingJob, write_conditioning
from harness_plugins.aligners.conditioned.methods import ADAPTER
from harness_plugins.aligners.conditioned.values import AnswerRecipe

VALUES = ("good", "bad")
Form = Literal["good", "bad", "bad-good", "good-bad"]
FORMS: tuple[Form, ...] = ("good", "bad", "bad-good", "good-bad")
SHORT: tuple[Form, ...] = ("good", "bad")


class Coh(Aligner["Coh.Config"]):
    """Of each pair one sequence per epoch: an answer alone, or one after the other."""

    name = "coh"
    summary = "Chain of Hindsight: marked answers, alone and one after the other (arXiv 2302.02676)"
    consumes = "pairs"

    class Config(AnswerRecipe):
        """The markers stand where the answer begins; the paper's masking of past tokens is left out."""

        good: str = Field(" A good answer:", min_length=1, description="marker before the chosen answer")
        bad: str = Field(" A bad answer:", min_length=1, description="marker before the rejected answer")
        short: bool = Field(False, description="one answer per sequence alone, never one after the other")

        adapter_defaults: ClassVar[dict[str, Any]] = ADAPTER

        @model_validator(mode="after")
        def _told_apart(self) -> Coh.Config:
            if self.good == self.bad:
                raise ValueError(f"good and bad have one marker, {self.good!r}: nothing would tell them apart")
            return self

    def controls(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Good and bad."""
        return {"answer": VALUES}

    def attach(self, model: Any, tokenizer: Any, config: Config) -> None:
        """Add the markers."""
        from harness_plugins.aligners.conditioned.controls import TextControl

        model.control = TextControl({"good": config.good, "bad": config.bad}, tokenizer)

    def trainer(self, job: TrainingJob[Config]) -> TrainerCall:
        """The trainer of conditioned rows, on sequences made of pairs; held-out rows are the chosen answers."""
        from harness_plugins.aligners.conditioned.trainer import Prepared, build

        tokenizer, config = job.tokenizer, job.config
        control: Any = job.model.control
        markers = {value: control.ids([place]) for place, value in enumerate(VALUES)}
        ends = frozenset(tokenizer.all_special_ids)
        rows, epochs = [], Counter[str]()
        unfit = 0
        for row in job.rows:
            form = form_of_row(job.seed, row["id"], epochs[row["id"]], short=config.short)
            epochs[row["id"]] += 1
            made = sequence(row, form, markers, ends)
            if len(form.split("-")) == 2 and length_of(made, markers) > config.max_length:
                # Cut, it would end within the answer that it is made for.
                made, unfit = sequence(row, form.split("-")[1], markers, ends), unfit + 1
            rows.append(made)
        held = [sequence(row, "good", markers, ends) for row in job.heldout] if job.heldout is not None else None
        facts = {"chains_too_long": unfit / len(rows)}
        prepared = Prepared(rows, held, "before_answer", lambda values: [[1 - values[0]]], [["gain"]], facts)
        return build(job, prepared)

    def export(self, job: TrainingJob[Config], model: Any, files: ArtifactFiles) -> None:
        """The markers; the default is the good one."""
        write_conditioning(files, model.control.exported(), default="good", position="before_answer")


def form_of_row(seed: int, row_id: str, epoch: int, *, short: bool = False) -> Form:
    """The form of a pair in one epoch, by hash: the same whatever else is trained on."""
    forms = SHORT if short else FORMS
    digest = hashlib.sha256(f"{seed}/{row_id}/{epoch}".encode()).digest()
    return forms[int.from_bytes(digest[:8], "big") % len(forms)]


def sequence(
    row: Mapping[str, Any], form: str, markers: Mapping[str, Sequence[int]], ends: frozenset[int]
) -> dict[str, Any]:
    """A pair as one conditioned row; the marker of its first answer is put in with the control.

    Args:
        row: with ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.
        form: ``good``, ``bad``, or one after the other, as ``bad-good``.
        markers: token ids by value.
        ends: special tokens: the one that ends a first answer is left out, for it does not end there.
    """
    answers = {"good": list(row["chosen_ids"]), "bad": list(row["rejected_ids"])}
    first, _, second = form.partition("-")
    ids = answers[first]
    mask = [0] * len(row["prompt_ids"]) + [1] * len(ids)
    if second:
        if ids and ids[-1] in ends:
            ids, mask = ids[:-1], mask[:-1]
        mask = [*mask, *[0] * len(markers[second]), *[1] * len(answers[second])]
        ids = [*ids, *markers[second], *answers[second]]
    return {
        "id": row["id"],
        "prompt_ids": list(row["prompt_ids"]),
        "completion_ids": ids,
        "labels_mask": mask,
        "values": [VALUES.index(first)],
    }


def length_of(made: Mapping[str, Any], markers: Mapping[str, Sequence[int]]) -> int:
    """Tokens of a conditioned row with its control."""
    marker = markers[VALUES[made["values"][0]]]
    return len(made["prompt_ids"]) + len(marker) + len(made["completion_ids"])
