"""Questions that a model should not answer: DangerousQA, HarmfulQA and CategoricalHarmfulQA, all of Red-Instruct.

A row has `question`, `category` and `subcategory` (empty where the data gives none), and `prompt`: the question in one
of Red-Instruct's templates (standard, cot, cou: chain of utterance, arXiv 2308.09662), read from its `red_prompts`
folder, with `<question>` replaced by the stripped question and all else as it stands there.

The questions come from the hub cache or the hub at a pinned commit, or from a folder (`path`): a clone of
github.com/declare-lab/red-instruct, or one that holds the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
    files_digest,
    hub_cache,
    hub_errors,
    load_hub_dataset,
    offline,
    pinned_commit,
    revision_note,
    unknown,
)

UPSTREAM = "https://github.com/declare-lab/red-instruct"
TEMPLATES = "declare-lab/DangerousQA"
TEMPLATES_REVISION = "e85d2bebfc2649e9f6fd46898e36d3330862acca"
PLACE = "<question>"
QUESTION, CATEGORY, SUBCATEGORY = (
    ("question", "Question", "prompt"),
    ("category", "Category", "topic"),
    ("subcategory", "Subcategory", "subtopic"),
)
"""Names of the same three things in the data sets and in Red-Instruct's own files."""


class RedQuestions(Dataset["RedQuestions.Config"]):
    """What the three have in common."""

    schema = "prompts"
    licence = "Apache-2.0"
    revision: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]
    """Subset -> names that its file may have in a folder."""

    class Config(harness.Config):
        """Where the files are, and how a question is put."""

        path: str | None = Field(None, description="folder with the files, a clone of red-instruct say; else the hub's")
        template: Literal["standard", "cot", "cou", "suffix"] = Field(
            "standard", description="file of `red_prompts` that the question is put into"
        )
        templates_revision: str | None = Field(
            None, description="commit of the templates, where they do not lie beside the questions; pinned when absent"
        )

    def rows(self, job: DatasetJob[Config]) -> Iterator[DatasetRow]:
        """All questions in the file's order; the id is subset and position. What is no question is dropped."""
        subset = self._subset(job)
        template = self._template(job)
        if self.source != TEMPLATES and job.options.path is None and (commit := self._templates_commit(job)):
            job.notes += revision_note(TEMPLATES, TEMPLATES_REVISION, commit)
        for position, (question, category, subcategory) in enumerate(self._questions(job, subset)):
            if not question:
                job.drop("without a question")
                continue
            data = {"question": question, "category": category, "subcategory": subcategory}
            yield DatasetRow(f"{subset}-{position:04}", {**data, "prompt": template.replace(PLACE, question)})

    def identity(self, job: DatasetJob[Config]) -> dict[str, Any]:
        """The commits of questions and template; for a folder the contents of both files."""
        chosen = {"name": self.name, "subset": self._subset(job), "template": job.options.template}
        if job.options.path is None:
            return {**chosen, "revision": self._commit(job), "templates": self._templates_commit(job)}
        file, folder = self._file(job, self._subset(job)), self._folder(job)
        used = [file] if (prompt := self._prompt_file(job)) is None else [file, prompt]
        return {**chosen, "digest": files_digest(used, folder)}

    def _subset(self, job: DatasetJob[Config]) -> str:
        subset = job.subset or next(iter(self.files))
        if subset not in self.files:
            raise unknown(f"dataset {self.name}, subset", "subset", subset, self.files, "harness data list")
        return subset

    def hub_files(self, job: DatasetJob[Config]) -> tuple[HubFiles, ...]:
        """Questions and, where they are put into one, the template, unless both lie in a folder."""
        if job.options.path is not None:
            return ()
        own = HubFiles(self.source, "dataset", job.revision or self.revision)
        if self.source == TEMPLATES or job.options.template == "standard":
            return (own,)
        revision = job.options.templates_revision or TEMPLATES_REVISION
        return own, HubFiles(TEMPLATES, "dataset", revision, ("red_prompts/*",))

    # -------------------------------------------------------------------------------------------------- the questions

    def _questions(self, job: DatasetJob[Config], subset: str) -> Iterator[tuple[str, str, str]]:
        if job.options.path is not None:
            yield from _read(self._file(job, subset))
            return
        commit = self._commit(job)
        job.notes += revision_note(self.source, self.revision, commit)
        try:
            loaded = load_hub_dataset(self.source, revision=commit, **self._part(subset))
        except UserError as error:
            raise UserError(error.where, error.what, f"{error.fix} {self._elsewhere()}") from None
        for row in loaded:
            yield _parts(dict(row))

    def _part(self, subset: str) -> dict[str, str]:
        """Configuration and split of a subset on the hub."""
        raise NotImplementedError

    def _commit(self, job: DatasetJob[Config]) -> str:
        """The user's revision, else the pinned one; never whatever is cached."""
        return pinned_commit(self.source, self.revision, job.revision)

    def _folder(self, job: DatasetJob[Config]) -> Path:
        assert job.options.path is not None
        folder = Path(job.options.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"dataset {self.name}, options.path", f"no such folder: {folder}", self._elsewhere())
        return folder

    def _file(self, job: DatasetJob[Config], subset: str) -> Path:
        folder = self._folder(job)
        names = [f"{inner}{name}" for inner in ("", "harmful_questions/") for name in self.files[subset]]
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is None:
            what = f"{folder} holds none of {', '.join(names)}"
            raise UserError(f"dataset {self.name}, options.path", what, self._elsewhere())
        return found

    def _elsewhere(self) -> str:
        return f"Upstream: `git clone {UPSTREAM}`, then --set TASK.dataset.options.path=red-instruct."

    # --------------------------------------------------------------------------------------------------- the template

    def _template(self, job: DatasetJob[Config]) -> str:
        """The template's text. `standard` is the question alone, so it needs no file where there is none."""
        file = self._prompt_file(job)
        if file is None:
            return PLACE
        text = file.read_text(encoding="utf-8")
        if PLACE not in text:
            raise UserError(str(file), f"holds no {PLACE}, which the question would replace", "Give a whole template.")
        return text

    def _prompt_file(self, job: DatasetJob[Config]) -> Path | None:
        name = job.options.template
        folder = self._folder(job) if job.options.path is not None else self._hub_folder(job)
        file = folder / "red_prompts" / f"{name}.txt" if folder is not None else None
        if file is not None and file.is_file():
            return file
        if name == "standard":
            return None
        raise UserError(
            f"dataset {self.name}, options.template",
            f"{file} is not there"
            if file is not None
            else f"red_prompts/{name}.txt of {TEMPLATES} is not in the cache",
            self._elsewhere(),
        )

    def _templates_commit(self, job: DatasetJob[Config]) -> str | None:
        """Commit of the templates: they lie beside DangerousQA's questions. None: standard needs none."""
        if job.options.template == "standard" and self.source != TEMPLATES:
            return None
        if self.source == TEMPLATES:
            return self._commit(job)
        option = "--set TASK.dataset.options.templates_revision"
        return pinned_commit(TEMPLATES, TEMPLATES_REVISION, job.options.templates_revision, option=option)

    def _hub_folder(self, job: DatasetJob[Config]) -> Path | None:
        commit = self._templates_commit(job)
        if commit is None:
            return None
        folder = hub_cache() / f"datasets--{TEMPLATES.replace('/', '--')}" / "snapshots" / commit
        if folder.is_dir() or offline():
            return folder if folder.is_dir() else None
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    TEMPLATES,
                    repo_type="dataset",
                    revision=commit,
                    cache_dir=hub_cache(),
                    allow_patterns="red_prompts/*",
                )
            )
        except hub_errors():
            return None


class DangerousQA(RedQuestions):
    """200 questions that GPT-3 was asked to ask (Shaikh et al. 2023, arXiv 2212.08061), and the 500 of AdversarialQA.

    Red-Instruct keeps both in its repository; on the hub no data set of this name is known.
    """

    name = "dangerous-qa"
    summary = "DangerousQA (200 questions) and AdversarialQA (500), in Red-Instruct's templates"
    source = TEMPLATES
    revision = TEMPLATES_REVISION
    subsets = ("dangerousqa", "adversarialqa")
    files: ClassVar[dict[str, tuple[str, ...]]] = {name: (f"{name}.json",) for name in subsets}

    def _part(self, subset: str) -> dict[str, str]:
        return {"name": subset, "split": "test"}


class HarmfulQA(RedQuestions):
    """1,960 questions over 10 topics and 98 subtopics (arXiv 2308.09662); the category is the topic."""

    name = "harmful-qa"
    summary = "HarmfulQA, 1,960 questions over 10 topics, in Red-Instruct's templates"
    source = "declare-lab/HarmfulQA"
    revision = "b5b3fb64830536028407685b3281dbeb32bc75b2"
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "harmfulqa": ("harmfulqa.json", "harmfulq.json", "data_for_hub.json")
    }

    def _part(self, subset: str) -> dict[str, str]:
        return {"split": "train"}


class CategoricalHarmfulQA(RedQuestions):
    """550 questions over 11 categories and 55 subcategories, in three languages (arXiv 2402.11746)."""

    name = "categorical-harmful-qa"
    summary = "CategoricalHarmfulQA, 550 questions over 11 categories in en, zh or vi"
    source = "declare-lab/CategoricalHarmfulQA"
    revision = "ddf6dbc05ca16080b92afe8a8cf7ee33bcca0321"
    subsets = ("en", "zh", "vi")
    files: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": ("catqa_english.json",),
        "zh": ("catqa_chinese.json",),
        "vi": ("catqa_vietnamese.json",),
    }

    def _part(self, subset: str) -> dict[str, str]:
        return {"split": subset}


# -------------------------------------------------------------------------------------------------------------- files


def _read(file: Path) -> Iterator[tuple[str, str, str]]:
    """Question, category, subcategory: of a JSON list, of JSON lines, or of topics that hold subtopics."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), f"cannot be read: {error}", "Give it in UTF-8.") from None
    try:
        value = json.loads(text)
    except ValueError:
        value = [_line(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if isinstance(value, dict) and any(key in value for key in QUESTION):
        value = [value]
    if isinstance(value, dict):
        # Red-Instruct's own HarmfulQA: topic -> subtopic -> questions.
        value = [
            {"question": question, "category": topic, "subcategory": subtopic}
            for topic, inner in value.items()
            for subtopic, questions in (inner.items() if isinstance(inner, dict) else [])
            for question in questions
        ]
    if not isinstance(value, list) or not all(isinstance(entry, str | dict) for entry in value):
        raise UserError(str(file), "holds no list of questions", "Give the file as Red-Instruct has it.")
    for entry in value:
        yield (entry.strip(), "", "") if isinstance(entry, str) else _parts(entry)


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", "Give a JSON list, or one JSON object in each line.") from None


def _parts(row: dict[str, Any]) -> tuple[str, str, str]:
    question, category, subcategory = (
        next((str(row[key]).strip() for key in keys if row.get(key) is not None), "")
        for keys in (QUESTION, CATEGORY, SUBCATEGORY)
    )
    return question, category, subcategory
