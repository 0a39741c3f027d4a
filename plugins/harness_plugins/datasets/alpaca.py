"""AlpacaEval's 805 instructions (Dubois et al. 2023, arXiv 2305.14387) with the outputs that answers are compared with.

A row has ``instruction``, ``dataset`` (where the instruction comes from), ``reference`` (the output to compare with, or
None where the reference has none) and ``reference_generator``. Its id is the beginning of the instruction's digest.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

import harness
from harness import (
    Dataset,
    DatasetJob,
    DatasetRow,
    HubFiles,
    UserError,
    digest_of,
    file_digest,
    hub_cache,
    hub_errors,
    nearest,
    offline,
    pinned_commit,
    revision_note,
)

FILES = {"text_davinci_003": "alpaca_eval.json", "gpt4_1106_preview": "alpaca_eval_gpt4_baseline.json"}
"""Which file of the data set has whose outputs; all hold the same instructions in the same order."""

PROMPTS = FILES["text_davinci_003"]
UPSTREAM = "https://github.com/tatsu-lab/alpaca_eval, results/MODEL/model_outputs.json"


class AlpacaEval(Dataset["AlpacaEval.Config"]):
    """The 805 instructions, or a file of one's own, with one of the two usual references, or a file of outputs."""

    name = "alpaca-eval"
    summary = "AlpacaEval's instructions with the outputs of a reference: options.reference, options.path"
    schema = "prompts"
    source = "tatsu-lab/alpaca_eval"
    licence = "CC-BY-NC-4.0"
    revision: ClassVar[str] = "f27ebb15a502fcfb52d189503972d8c6434958d9"

    class Config(harness.Config):
        """What is asked, and whose outputs answers are compared with."""

        reference: Literal["text_davinci_003", "gpt4_1106_preview", "file"] = Field(
            "gpt4_1106_preview",
            description="whose outputs: AlpacaEval 1's, AlpacaEval 2's, or those of the file `path`",
        )
        path: str = Field("", description="for `file`: a model_outputs.json (list of instruction, output, generator)")
        prompts: str = Field("", description="instead of the 805: a JSON list of objects with `instruction`")

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """The instructions in the file's order. One without a reference output is kept: it will be unscored."""
        prompts = self._prompts(job)
        where, outputs = self._outputs(job)
        self._compare(job, where, Counter(row["instruction"] for row in prompts), outputs)
        asked: dict[str, int] = {}
        for row in prompts:
            instruction = row["instruction"]
            # An instruction that stands there several times meets the outputs for it one after another.
            turn = asked[instruction] = asked.get(instruction, -1) + 1
            found = outputs.get(instruction, [])
            chosen: Mapping[str, Any] = found[turn] if turn < len(found) else {}
            yield DatasetRow(
                digest_of(instruction)[:16] + (f"#{turn + 1}" if turn else ""),
                {
                    "instruction": instruction,
                    "dataset": row.get("dataset"),
                    "reference": chosen.get("output"),
                    "reference_generator": chosen.get("generator"),
                },
            )

    def hub_files(self, job: DatasetJob[Config]) -> tuple[HubFiles, ...]:
        """The instructions and one reference's outputs, unless they are files of the user's own."""
        own = [] if job.options.prompts else [PROMPTS]
        own += [] if job.options.reference == "file" else [FILES[job.options.reference]]
        return (HubFiles(self.source, "dataset", job.revision or self.revision, tuple(own)),) if own else ()

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """The commit that is read, and files by their content, never by their path."""
        files = {name: self._own_file(job, name) for name in ("prompts", "path") if getattr(job.options, name)}
        return {
            "name": self.name,
            "revision": self._commit(job),
            "reference": job.options.reference,
            "files": {name: file_digest(path) for name, path in files.items()},
        }

    # ------------------------------------------------------------------------------------------------------- reading

    def _prompts(self, job: DatasetJob[Config]) -> list[dict[str, Any]]:
        path = self._own_file(job, "prompts") if job.options.prompts else self._hub_file(job, PROMPTS)
        return _read(path, ("instruction",))

    def _outputs(self, job: DatasetJob[Config]) -> tuple[Path, dict[str, list[Mapping[str, Any]]]]:
        """Outputs by instruction, in the file's order; rows that are there twice in the same words count once."""
        reference = job.options.reference
        path = self._own_file(job, "path") if reference == "file" else self._hub_file(job, FILES[reference])
        outputs: dict[str, list[Mapping[str, Any]]] = {}
        for row in _read(path, ("instruction", "output")):
            outputs.setdefault(row["instruction"], []).append(row)
        return path, outputs

    def _compare(
        self, job: DatasetJob[Config], path: Path, asked: Counter[str], outputs: dict[str, list[Mapping[str, Any]]]
    ) -> None:
        """Hold a file of outputs against the instructions: what is missing, doubled or of several models."""
        missing = sum(count for instruction, count in asked.items() if instruction not in outputs)
        if missing == asked.total():
            what = f"has outputs for none of the {missing} instructions"
            raise UserError(str(path), what, f"Give a model_outputs.json of AlpacaEval ({UPSTREAM}).")
        for instruction, rows in outputs.items():
            texts = list({row["output"] for row in rows})
            if len(texts) == 1:
                # The same output serves every repetition.
                outputs[instruction] = rows[:1] * max(1, asked[instruction])
            elif instruction in asked and len(rows) != asked[instruction]:
                start = " ".join(instruction.split())[:40]
                what = f"{len(texts)} different outputs for the instruction that begins {start!r}"
                raise UserError(str(path), what, "Keep one of them: which one is meant cannot be told.")
        if missing:
            job.note(
                f"{path.name}: no reference output for {missing} of {asked.total()} instructions; they are unscored"
            )
        if extra := len(set(outputs) - set(asked)):
            job.note(f"{path.name}: {extra} outputs are for other instructions and are left out")
        generators = {str(row["generator"]) for rows in outputs.values() for row in rows if row.get("generator")}
        if len(generators) > 1:
            what = f"holds the outputs of several models: {', '.join(sorted(generators)[:6])}"
            raise UserError(str(path), what, "Give the outputs of one.")

    def _own_file(self, job: DatasetJob[Config], option: str) -> Path:
        where = f"dataset {self.name}, options.{option}"
        given = str(getattr(job.options, option))
        if not given:
            fix = f"Set TASK.dataset.options.path=FILE; published outputs: {UPSTREAM}."
            raise UserError(where, "no file of reference outputs is named", fix)
        path = Path(given).expanduser()
        if not path.is_file():
            close = nearest(path.name, [entry.name for entry in path.parent.glob("*.json")])
            fix = f"Did you mean {path.parent / close[0]}?" if close else "Give the path of a JSON file."
            raise UserError(where, f"no such file: {given}", fix)
        return path

    def _commit(self, job: DatasetJob[Config]) -> str:
        """The user's revision, else the pinned one; never whatever is cached."""
        return pinned_commit(self.source, self.revision, job.revision)

    def _hub_file(self, job: DatasetJob[Config], name: str) -> Path:
        commit = self._commit(job)
        if name == PROMPTS:
            job.notes += revision_note(self.source, self.revision, commit)
        cached = hub_cache() / f"datasets--{self.source.replace('/', '--')}" / "snapshots" / commit / name
        return cached if cached.is_file() else self._fetch(commit, name)

    def _fetch(self, commit: str, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        reach = "the network is switched off (HF_HUB_OFFLINE)"
        if not offline():
            try:
                return Path(
                    hf_hub_download(self.source, name, repo_type="dataset", revision=commit, cache_dir=hub_cache())
                )
            except hub_errors() as error:
                reach = f"the hub cannot be reached or lacks it ({type(error).__name__})"
        raise UserError(
            f"dataset {self.name}",
            f"{name} of {self.source} is not in the hub cache {hub_cache()}, and {reach}",
            f"Fetch it where there is a network: `hf download --repo-type dataset {self.source} {name} "
            f"--revision {commit}`.",
        )


def _read(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """A JSON list of objects in which ``keys`` are texts."""
    fix = "Give a JSON list of objects, as AlpacaEval's model_outputs.json is one."
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"cannot be read as JSON: {error}", fix) from None
    if not isinstance(rows, list) or not rows:
        found = "an empty list" if isinstance(rows, list) else f"a JSON {type(rows).__name__}"
        raise UserError(str(path), f"holds {found}", fix)
    for position, row in enumerate(rows, start=1):
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                raise UserError(f"{path}, row {position}", f"has no text under {key!r}", fix)
    return rows
