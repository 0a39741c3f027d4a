"""Anybody's rows in TRL's formats, from a JSON-lines file or the hub: the columns say which format it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

import harness
from harness import Dataset, DatasetJob, DatasetRow, HubFiles, RowSchema, UserError, is_hub_id, load_hub_dataset
from harness_plugins.datasets.files import HubDataset, JsonlDataset
from harness_plugins.datasets.preferences import (
    Messages,
    Unusable,
    check_prompt,
    make_pair,
    pair_of_transcripts,
    sketch,
)
from harness_plugins.datasets.rated import check_labels, cut_points, labelled

FORMATS: tuple[tuple[frozenset[str], RowSchema], ...] = (
    (frozenset(("chosen", "rejected")), "pairs"),
    (frozenset(("prompt", "completion", "label")), "rated"),
    (frozenset(("prompt", "completion", "rating")), "rated"),
    (frozenset(("prompt", "completion", "ratings")), "rated"),
    (frozenset(("prompt", "completion")), "demonstrations"),
    (frozenset(("messages",)), "demonstrations"),
)
"""Columns that a format has at least, in the order in which they are looked for."""
_HELDOUT = ("test", "validation")


class TrlFormats(Dataset["TrlFormats.Config"]):
    """Rows in TRL's preference, unpaired preference, prompt-completion or conversational formats.

    Text is a string or a list of messages. A preference row without ``prompt`` holds whole conversations; as strings
    they must be transcripts (``\\n\\nHuman:``, ``\\n\\nAssistant:``), since from other text nobody can tell where the
    prompt ends: a common prefix is not the prompt where two answers begin alike.
    """

    name = "trl"
    summary = "a file (jsonl:PATH) or hub id (OWNER/NAME) in one of TRL's formats"
    schema = "pairs"

    class Config(harness.Config):
        """Where the rows are."""

        path: str = Field("", description="a .jsonl file (.gz too), a hub id, or a folder of data files")
        config: str | None = Field(None, description="configuration of the hub data set, where it has several")
        split: str | None = Field(None, description="training split of the hub data set; `train` when absent")
        heldout: str | None = Field(None, description="held-out split; `test` or `validation` where there is one")
        labels: dict[str, tuple[str, ...]] = Field(
            default_factory=dict,
            description="preference -> labels that its scores become, the lowest first: cut at equal quantiles of the "
            "training split (rated rows)",
        )

        @field_validator("labels")
        @classmethod
        def _tell_apart(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            check_labels(value)
            return value

    def hub_files(self, job: DatasetJob[Config]) -> tuple[HubFiles, ...]:
        """The whole repository, unless it is a file or a folder."""
        path = job.options.path
        return (HubFiles(path, "dataset", job.revision),) if is_hub_id(path) else ()

    def schema_of(self, job: DatasetJob[Config]) -> RowSchema:
        """By the columns.

        Raises:
            UserError: they are of no format that is known; shows a row.
        """
        row = next(self._source(job), None)
        where = f"--dataset {job.options.path}"
        if row is None:
            raise UserError(where, "there are no rows", "Give a file or data set that has some.")
        return _format(row.data, where)[1]

    def heldout_split(self, job: DatasetJob[Config]) -> str | None:
        """The one the user names; else `test` or `validation` of the hub; a file has none."""
        options = job.options
        if options.heldout is not None or self._is_file(job):
            return None if self._is_file(job) else str(options.heldout)
        for split in _HELDOUT:
            try:
                load_hub_dataset(options.path, name=options.config, split=split, revision=job.revision)
            except UserError as error:
                if error.where.endswith(", split"):
                    continue
                raise
            return split
        return None

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """Rows in the file's order, in the schema that the first row's columns declare."""
        source = self._source(job)
        first = next(source, None)
        where = f"--dataset {job.options.path}"
        if first is None:
            return
        columns, schema = _format(first.data, where)
        labels, cuts = job.options.labels, self._cuts(job, columns, schema, where)
        for row in chain([first], source):
            missing = sorted(name for name in columns if row.data.get(name) is None)
            try:
                if missing:
                    raise Unusable(f"no {' or '.join(missing)}")
                found = _READERS[schema](row.data, f"{where}, row {row.id}")
                if cuts:
                    found["ratings"] = labelled(found["ratings"], cuts, labels, f"{where}, row {row.id}")
                yield DatasetRow(row.id, found)
            except Unusable as reason:
                job.drop(str(reason))

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """Pinned by the commit, or by the file's content."""
        reader, inner = self._reader(job)
        labels = {"labels": {name: list(one) for name, one in job.options.labels.items()}}
        pinned = {**reader.identity(inner), "name": self.name, "split": job.split}
        return {**pinned, **labels} if job.options.labels else pinned

    def _cuts(
        self, job: DatasetJob[Config], columns: frozenset[str], schema: RowSchema, where: str
    ) -> dict[str, list[float]]:
        """Where scores are cut into labels, by the training split whatever split is read; none: they stay scores."""
        labels = job.options.labels
        if not labels:
            return {}
        if schema != "rated":
            what = f"labels are for ratings, and its rows are {schema}"
            raise UserError(f"{where}, labels", what, "Leave labels out, or choose rated rows.")

        def ratings() -> Iterator[Mapping[str, Any]]:
            for row in self._source(replace(job, split="train")):
                if any(row.data.get(name) is None for name in columns):
                    continue
                with contextlib.suppress(Unusable):
                    yield _rated(row.data, f"{where}, row {row.id}")["ratings"]

        return cut_points(ratings(), labels, f"{where}, labels")

    def _source(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        reader, inner = self._reader(job)
        return reader.rows(inner)

    def _reader(self, job: DatasetJob[Config]) -> tuple[Dataset, DatasetJob]:
        """The plain reader of files or of the hub."""
        options = job.options
        if not options.path:
            raise UserError(f"dataset {self.name}", "no data are named", "Write jsonl:PATH or OWNER/NAME.")
        if self._is_file(job):
            return JsonlDataset(), DatasetJob(None, None, None, JsonlDataset.Config(path=options.path))
        split = job.split if job.split not in (None, "train") else options.split or "train"
        of_hub = HubDataset.Config(path=options.path, config=options.config)
        return HubDataset(), DatasetJob(None, split, job.revision, of_hub)

    def _is_file(self, job: DatasetJob[Config]) -> bool:
        path = Path(job.options.path).expanduser()
        return path.is_file() or job.options.path.endswith((".jsonl", ".jsonl.gz"))


def _format(row: Mapping[str, Any], where: str) -> tuple[frozenset[str], RowSchema]:
    for columns, schema in FORMATS:
        if columns <= row.keys():
            return columns, schema
    known = "; ".join(f"{', '.join(sorted(columns))} ({schema})" for columns, schema in FORMATS)
    nearest = min(FORMATS, key=lambda entry: len(entry[0] - row.keys()))
    missing = ", ".join(sorted(nearest[0] - row.keys()))
    raise UserError(
        where,
        f"its columns ({', '.join(row)}) are of none of TRL's formats: the nearest, {nearest[1]}, lacks {missing}",
        f"Formats by columns: {known}. Its rows look so: {sketch([row])}",
    )


def _pair(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is not None:
            return make_pair(_messages(prompt), chosen.strip(), rejected.strip())
        if "\n\nAssistant:" not in chosen:
            raise UserError(
                where,
                "`chosen` and `rejected` are plain text without a `prompt`: where the prompt ends cannot be known",
                "Add a column `prompt`, or give conversations as lists of messages.",
            )
        return pair_of_transcripts(chosen, rejected)
    before, good = _ending(_messages(chosen))
    other, bad = _ending(_messages(rejected))
    if before != other:
        raise Unusable("the prompts of chosen and rejected differ")
    # Some data sets give the prompt and then repeat it within the conversations.
    return make_pair(before or _messages(prompt or []), good, bad)


def _demonstration(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if "completion" not in row:
        prompt, completion = _ending(_messages(row["messages"]))
    elif isinstance(row["completion"], str):
        prompt, completion = _messages(row["prompt"]), row["completion"].strip()
    else:
        before, completion = _ending(_messages(row["completion"]))
        prompt = [*_messages(row["prompt"]), *before]
    check_prompt(prompt)
    if not completion:
        raise Unusable("empty answer")
    return {"prompt": prompt, "completion": completion}


def _rated(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """With a number for a preference without a name, unless the file has ``ratings`` by preference."""
    if row.get("ratings") is not None:
        return {**_demonstration(row, where), "ratings": row["ratings"]}
    rating = row["rating"] if row.get("rating") is not None else row["label"]
    if not isinstance(rating, bool | int | float):
        raise UserError(where, f"the rating {rating!r} is no number", "Give true, false or a number.")
    return {**_demonstration(row, where), "ratings": {"preference": float(rating)}}


_READERS = {"pairs": _pair, "demonstrations": _demonstration, "rated": _rated}


def _messages(value: Any) -> Messages:
    """Text or messages as messages with plain text, edges stripped."""
    if isinstance(value, str):
        return [{"role": "user", "content": value.strip()}]
    if not isinstance(value, Sequence):
        raise Unusable("neither text nor a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise Unusable("a message without a role")
        if not isinstance(message.get("content"), str):
            raise Unusable("a message that is not plain text")
        messages.append({"role": message["role"], "content": message["content"].strip()})
    return messages


def _ending(messages: Messages) -> tuple[Messages, str]:
    """What comes before the last turn, and the last turn, which is the assistant's."""
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with the assistant")
    return messages[:-1], messages[-1]["content"]
