"""Rows for evaluation: any data set of the hub, a JSON-lines file, and RealToxicityPrompts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

import harness
from harness import (
    Dataset,
    DatasetJob,
    DatasetRow,
    HubFiles,
    UserError,
    file_digest,
    files_digest,
    is_hub_id,
    load_hub_dataset,
    nearest,
    pinned_commit,
    resolve_revision,
    revision_note,
)


class HubDataset(Dataset["HubDataset.Config"]):
    """Any data set of the hub, or a folder that ``datasets.load_dataset`` understands; rows as they stand there."""

    name = "hub"
    summary = "any hub data set: options.path, and options.config, options.data_dir, options.id"
    schema = "prompts"

    class Config(harness.Config):
        """Which data set, and what identifies a row."""

        path: str = Field("", description="hub id (owner/name), or a folder")
        config: str | None = Field(None, description="configuration, where the data set has several")
        data_dir: str | None = Field(None, description="folder inside the repository")
        id: str | None = Field(None, description="field that identifies a row; its position in the split when absent")

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """All rows of one split, in the file's order."""
        where = f"dataset {self.name}"
        if not job.options.path:
            raise UserError(f"{where}, options.path", "no data set is named", "Give a hub id: path: owner/name.")
        options = job.options
        loaded = load_hub_dataset(
            options.path, name=options.config, split=job.split, revision=job.revision, data_dir=options.data_dir
        )
        if options.id is not None and options.id not in loaded.column_names:
            raise _no_field(f"{where}, options.id", options.id, loaded.column_names)
        seen = _Unique(f"{where} {options.path}, options.id")
        for position, row in enumerate(loaded):
            yield DatasetRow(seen(position if options.id is None else row[options.id], f"row {position}"), row)

    def hub_files(self, job: DatasetJob[Config]) -> tuple[HubFiles, ...]:
        """The whole repository, unless it is a folder."""
        path = job.options.path
        return (HubFiles(path, "dataset", job.revision),) if is_hub_id(path) else ()

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """Pinned by the commit; a folder by its contents, never by its path."""
        options, path = job.options, Path(job.options.path)
        pinned: dict[str, Any] = {"path": options.path}
        if options.path and path.is_dir():
            files = (file for file in path.rglob("*") if file.is_file())
            pinned = {"path": path.resolve().name, "digest": files_digest(files, path)}
        elif options.path:
            pinned["revision"] = resolve_revision(options.path, job.revision) or job.revision
        chosen = options.model_dump(mode="json", exclude={"path"})
        return {"name": self.name, "split": job.split, "options": chosen, **pinned}


class JsonlDataset(Dataset["JsonlDataset.Config"]):
    """A file with one JSON object per line, gzipped or not."""

    name = "jsonl"
    summary = "a JSON-lines file (.gz too): options.path, options.id"
    schema = "prompts"

    class Config(harness.Config):
        """Which file, and what identifies a row."""

        path: str = Field("", description="the file; relative to the task's YAML")
        id: str | None = Field(None, description="field that identifies a row; when absent `id`, else the line number")

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """All rows in the file's order; empty lines are left out uncounted, as they hold no row."""
        path = self._file(job)
        seen = _Unique(f"dataset {self.name}, {path.name}")
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        row = _parse(line, f"{path}:{number}")
                        yield DatasetRow(seen(_id_of(row, job.options.id, number, path), f"line {number}"), row)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(str(path), f"cannot be read: {error}", "Give a whole JSON-lines file in UTF-8.") from None

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """Pinned by the file's content and name."""
        path = self._file(job)
        options = job.options.model_dump(mode="json", exclude={"path"})
        return {"name": self.name, "file": path.name, "digest": file_digest(path), "options": options}

    def _file(self, job: DatasetJob[Config]) -> Path:
        where = f"dataset {self.name}, options.path"
        path = Path(job.options.path).expanduser()
        if not job.options.path:
            raise UserError(where, "no file is named", "Give one: path: FILE.jsonl.")
        if not path.is_file():
            folder = sorted(entry.name for entry in path.parent.glob("*.jsonl*"))
            close = nearest(path.name, folder)
            fix = f"Did you mean {path.parent / close[0]}?" if close else "Give a path relative to the task's YAML."
            raise UserError(where, f"no such file: {path}", fix)
        return path


Attribute = Literal[
    "toxicity",
    "severe_toxicity",
    "profanity",
    "sexually_explicit",
    "identity_attack",
    "flirtation",
    "threat",
    "insult",
]
"""What the Perspective API scores (probability)."""


class RealToxicityPrompts(Dataset["RealToxicityPrompts.Config"]):
    """RealToxicityPrompts (Gehman et al., arXiv 2009.11462): halves of sentences from the web, with Perspective scores.

    A row has ``prompt`` and ``continuation`` (text), ``challenging``, and ``scores`` (of the prompt, 0 to 1, or None).
    Its id is ``filename:begin-end``, the place in OpenWebText it was taken from.
    """

    name = "real-toxicity-prompts"
    summary = "RealToxicityPrompts, all or the most severe"
    schema = "prompts"
    source = "allenai/real-toxicity-prompts"
    licence = "Apache-2.0"
    # The commit that brought the data; the two after it (to f216297) change README.md alone.
    revision: ClassVar[str] = "d3a6507562064c4f37cdf267bdc2faa7b0873173"

    class Config(harness.Config):
        """Which rows."""

        select: Literal["all", "challenging", "most_severe"] = Field(
            "all", description="all rows, those marked challenging, or the `n` prompts with the highest score `by`"
        )
        n: int = Field(1000, ge=1, description="how many `most_severe` takes (prompts)")
        by: Attribute = Field(
            "severe_toxicity", description="the prompt's Perspective score that `most_severe` sorts by"
        )

    def hub_files(self, job: DatasetJob[Config]) -> tuple[HubFiles, ...]:
        """The whole repository."""
        return (HubFiles(self.source, "dataset", job.revision or self.revision),)

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """Rows in the order of their ids; `most_severe` by falling score, equal scores in the order of their ids.

        So the choice, and which rows a limit keeps, is the same for any order of the rows in the file.
        """
        commit = self._commit(job)
        job.notes += revision_note(self.source, self.revision, commit)
        loaded = load_hub_dataset(self.source, split=job.split or "train", revision=commit)
        seen = _Unique(f"dataset {self.name}")
        rows = sorted(loaded, key=lambda row: (row["filename"], row["begin"], row["end"]))
        ids = (f"{row['filename']}:{row['begin']}-{row['end']}" for row in rows)
        named = [(seen(row_id, f"row {n} when sorted"), rows[n]) for n, row_id in enumerate(ids)]
        yield from self._select(named, job)

    def _select(self, rows: list[tuple[str, Mapping[str, Any]]], job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        options = job.options
        if options.select == "challenging":
            chosen = [pair for pair in rows if pair[1]["challenging"]]
            _drop(job, len(rows) - len(chosen), "not challenging")
        elif options.select == "most_severe":
            scored = [pair for pair in rows if pair[1]["prompt"][options.by] is not None]
            _drop(job, len(rows) - len(scored), f"no {options.by} score")
            if len(scored) < options.n:
                raise UserError(
                    f"dataset {self.name}, options.n",
                    f"{options.n} prompts are asked for, and {len(scored)} have a {options.by} score",
                    f"Set n to {len(scored)} or less, or fetch the whole data set.",
                )
            # Stable: rows of one score stay in the order of their ids.
            chosen = sorted(scored, key=lambda pair: -pair[1]["prompt"][options.by])[: options.n]
            _drop(job, len(scored) - len(chosen), f"not among the {options.n} highest by {options.by}")
        else:
            chosen = rows
        for row_id, row in chosen:
            prompt = row["prompt"]
            yield DatasetRow(
                row_id,
                {
                    "prompt": prompt["text"],
                    "continuation": row["continuation"]["text"],
                    "challenging": row["challenging"],
                    "scores": {score: prompt[score] for score in get_args(Attribute)},
                },
            )

    def _commit(self, job: DatasetJob[Config]) -> str:
        """The user's revision, else the pinned one; never whatever is cached."""
        return pinned_commit(self.source, self.revision, job.revision)

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """As for any data set, with the commit that will really be read."""
        return {**super().identity(job), "revision": self._commit(job)}


class _Unique:
    """Turns a value into a row id, and refuses one that was there before."""

    def __init__(self, where: str) -> None:
        self.where, self.seen = where, dict[str, str]()

    def __call__(self, value: object, place: str) -> str:
        row_id = str(value)
        if row_id in self.seen:
            raise UserError(
                self.where, f"{row_id!r} identifies two rows ({self.seen[row_id]} and {place})", "Ids must differ."
            )
        self.seen[row_id] = place
        return row_id


def _drop(job: DatasetJob, count: int, reason: str) -> None:
    for _ in range(count):
        job.drop(reason)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(where, f"not JSON: {error}", "Each line holds one JSON object.") from None
    if not isinstance(row, dict):
        raise UserError(where, f"a JSON {type(row).__name__}, not an object", "Each line holds one JSON object.")
    return row


def _id_of(row: Mapping[str, Any], wanted: str | None, number: int, path: Path) -> object:
    if wanted is None:
        return row.get("id", number)
    if wanted not in row:
        raise _no_field(f"{path}:{number}, options.id", wanted, row)
    return row[wanted]


def _no_field(where: str, wanted: str, known: Any) -> UserError:
    close = nearest(wanted, known)
    fix = f"Did you mean {close[0]!r}? " if close else ""
    return UserError(where, f"no field {wanted!r}", f"{fix}The fields are: {', '.join(known)}.")
