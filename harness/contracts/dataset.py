"""The contract of data sets: rows with stable ids from a pinned revision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal

from pydantic import BaseModel, ConfigDict

from harness.contracts.hub_files import HubFiles
from harness.contracts.plugin import C, Plugin

RowSchema = Literal["prompts", "demonstrations", "pairs", "rated"]
"""What rows hold; :mod:`harness.data.row_schema` has an example of each."""


class TrainingRow(BaseModel):
    """Rows of a plugin's own: extend it with fields, and say what of them is trained on.

    An aligner ``consumes`` the class; a data set's ``schema``, or a converter's ``target``, is the class too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | list[dict[str, str]]
    """Text or messages; rows are held out by it."""

    form: ClassVar[Literal["demonstrations", "pairs"]] = "demonstrations"
    """Which of the two forms ``render`` returns, and so which token ids ``TrainingJob.rows`` carry."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Names of fields that the trainer gets in ``TrainingJob.rows`` as they are, beside the token ids."""

    def render(self) -> Mapping[str, Any]:
        """What is trained on: ``prompt`` with ``completion``, or with ``chosen`` and ``rejected``, as ``form`` says.

        The chat template and the tokenizer are applied to that; what does not fit is dropped and counted.
        """
        return {"prompt": self.prompt, **{name: getattr(self, name) for name in ANSWERS[self.form]}}


ANSWERS: dict[str, tuple[str, ...]] = {"demonstrations": ("completion",), "pairs": ("chosen", "rejected")}
"""The texts of each form that follow a prompt."""


def schema_name(schema: RowSchema | type[BaseModel]) -> str:
    """A schema as records and messages have it: of a class its name."""
    return schema if isinstance(schema, str) else schema.__name__


@dataclass(frozen=True)
class DatasetRow:
    """One row with a stable id; ``data`` follows the dataset's declared schema."""

    id: str
    data: Mapping[str, Any]


class Dataset(Plugin[C]):
    """Rows with stable ids from a pinned revision; counts what it drops and why."""

    kind = "dataset"
    schema: ClassVar[RowSchema | type[BaseModel]]
    subsets: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""
    licence: ClassVar[str] = "unknown"
    revision: ClassVar[str | None] = None

    @abstractmethod
    def rows(self, job: DatasetJob[C]) -> Iterator[DatasetRow]:
        """Yield rows in a fixed order. Call ``job.drop(reason)`` for every row left out."""

    def schema_of(self, job: DatasetJob[C]) -> RowSchema | type[BaseModel]:
        """The schema of these rows, for a data set whose files decide it; ``schema`` otherwise."""
        return self.schema

    def heldout_split(self, job: DatasetJob[C]) -> str | None:
        """Name of the official held-out split; None: there is none, and a hash of each prompt decides."""
        return None

    def hub_files(self, job: DatasetJob[C]) -> tuple[HubFiles, ...]:
        """What :meth:`rows` reads from the hub: `harness fetch` brings it, a study that runs offline asks for it."""
        return ()

    def identity(self, job: DatasetJob[C]) -> dict[str, Any]:
        """What pins the rows: enters the id of every step that reads them."""
        return {
            "name": self.name,
            "subset": job.subset,
            "split": job.split,
            "revision": job.revision or self.revision,
            "options": job.options.model_dump(mode="json"),
        }


@dataclass
class DatasetJob(Generic[C]):
    """One request for rows, and the count of what was dropped."""

    subset: str | None
    split: str | None
    revision: str | None
    options: C
    dropped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something about the rows that a reader of the numbers should know; goes into the record."""
        self.notes.append(text)

    def drop(self, reason: str) -> None:
        """Count one row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
