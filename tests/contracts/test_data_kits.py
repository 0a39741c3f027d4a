"""The kits of datasets and of task folders: a good one passes, and for each rule a broken one fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from harness import AnswerScorer, Config, Converter, Dataset, DatasetJob, DatasetRow, Metric, UserError
from harness.contracts.registry import Origin, Registered, Registry, load_plugins
from harness.testing import check_converter, check_dataset, check_tasks

SOURCE = (("a", "one"), ("b", ""), ("c", "three"))


class Pairs(Dataset):
    name = "pairs"
    summary = "three rows, one of them without an answer"
    schema = "demonstrations"
    subsets = ("only",)

    class Config(Config):
        path: str = Field("", description="a file")

    def rows(self, job: DatasetJob) -> Iterator[DatasetRow]:
        if job.subset not in (None, "only"):
            raise UserError("subset", f"unknown subset {job.subset!r}", "Known: only.")
        for index, (prompt, completion) in enumerate(SOURCE):
            if completion:
                yield DatasetRow(f"r{index}", {"prompt": prompt, "completion": completion})
            else:
                job.drop("no answer")


class Wanted(BaseModel):
    prompt: str
    completion: int


def broken(**overrides: Any) -> Dataset:
    dataset: Dataset = type("Broken", (Pairs,), overrides)()
    return dataset


def yields(*rows: Any, drop: str | None = None, **overrides: Any) -> Dataset:
    def read(self: Any, job: DatasetJob) -> Iterator[Any]:
        if drop is not None:
            job.drop(drop)
        yield from rows

    return broken(rows=read, **overrides)


def drifting(what: str) -> Dataset:
    """Something changes from one reading to the next."""
    readings = iter(range(99))

    def read(self: Any, job: DatasetJob) -> Iterator[DatasetRow]:
        reading = next(readings)
        job.drop("odd" if what == "dropped" and reading % 2 else "even")
        row_id = f"r{reading}" if what == "ids" else "r"
        yield DatasetRow(row_id, {"prompt": "a", "completion": f"b{reading}" if what == "data" else "b"})

    return broken(rows=read)


GOOD = {"prompt": "a", "completion": "b"}


def test_a_good_dataset_passes() -> None:
    check_dataset(Pairs(), source_rows=3)
    check_dataset(Pairs(), subset="only", limit=1)
    check_dataset(yields(DatasetRow("r", {"prompt": "a", "completion": 3}), schema=Wanted, subsets=()))
    check_dataset(yields(DatasetRow("r", {"anything": "a"}), schema="prompts", subsets=()))


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (broken(schema="triples"), "`schema` is one of prompts, demonstrations, pairs, rated, or a pydantic model."),
        (yields(), "A dataset has rows."),
        (yields({"id": "r"}), "`rows` yields harness.DatasetRow.\n  seen: dict"),
        (yields(DatasetRow("", GOOD)), "A row's id is a string that is not empty."),
        (yields(DatasetRow(7, GOOD)), "A row's id is a string that is not empty.\n  seen: 7"),  # type: ignore[arg-type]
        (yields(DatasetRow("r", {**GOOD, "x": {1}})), "A row's data are plain JSON values."),
        (yields(DatasetRow("r", GOOD), DatasetRow("r", GOOD)), "Ids of rows are unique.\n  seen: more than once: r"),
        (yields(DatasetRow("r", {"prompt": "a"})), "A row of 'demonstrations' holds prompt, completion"),
        (
            yields(DatasetRow("r", {"prompt": "a", "completion": ""})),
            "row r has ['completion', 'prompt'], nothing in ['completion']",
        ),
        (yields(DatasetRow("r", {}), schema="prompts"), "A row of 'prompts' holds something"),
        (yields(DatasetRow("r", GOOD), schema=Wanted), "Rows follow Wanted."),
        (yields(DatasetRow("r", GOOD), drop=" "), "Rows are dropped with a reason."),
        (drifting("ids"), "Ids and their order are the same at every reading."),
        (drifting("data"), "Rows are the same at every reading."),
        (drifting("dropped"), "The same rows are dropped at every reading."),
        (yields(DatasetRow("r", GOOD)), "An unknown subset is a harness.UserError.\n  seen: 1 rows"),
        (broken(identity=lambda self, job: {"job": job}), "`identity` returns plain JSON values."),
    ],
)
def test_a_broken_dataset_fails(dataset: Dataset, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_dataset(dataset)
    assert words in str(caught.value)


def test_a_row_that_vanishes_uncounted_fails() -> None:
    silent = yields(DatasetRow("r0", GOOD), DatasetRow("r2", GOOD), subsets=())
    with pytest.raises(AssertionError, match=r"add up to the source's 3: job.drop\(reason\) counts.\n  seen: 2 kept"):
        check_dataset(silent, source_rows=3)


def test_the_schema_of_these_rows_is_what_counts() -> None:
    """As for a data set whose files decide it: `schema` alone would ask for another one's fields."""
    row = DatasetRow("r", {"prompt": "a", "chosen": "b", "rejected": "c"})
    check_dataset(yields(row, subsets=(), schema_of=lambda self, job: "pairs"))
    with pytest.raises(AssertionError, match="A row of 'pairs' holds prompt, chosen, rejected"):
        check_dataset(yields(DatasetRow("r", GOOD), schema_of=lambda self, job: "pairs"))
    with pytest.raises(AssertionError, match="`schema_of` returns one of prompts, demonstrations, pairs, rated"):
        check_dataset(yields(row, schema_of=lambda self, job: "triples"))


def test_an_unknown_subset_must_be_a_users_error() -> None:
    def read(self: Any, job: DatasetJob) -> Iterator[DatasetRow]:
        yield DatasetRow({None: "r"}[job.subset], GOOD)

    with pytest.raises(AssertionError, match=r"An unknown subset is a harness.UserError.\n  seen: KeyError"):
        check_dataset(broken(rows=read))


# --------------------------------------------------------------------------------------------------------- tasks


class Length(AnswerScorer):
    name = "length"
    summary = "length"

    def metrics(self, config: Any) -> tuple[Metric, ...]:
        return ()

    def score(self, sample: Any, answer: Any, config: Any) -> Any:
        return []


TASK = """
name: mine
summary: a task
source: me
licence: CC0-1.0
template: "{{ prompt }}"
dataset: {name: pairs, options: {path: x}}
scorers: [{name: length}]
"""


@pytest.fixture
def registry() -> Registry:
    origin = Origin("test", "test", "1")
    plugins = (Pairs(), Length())
    return Registry({(p.kind, p.name): Registered(p.kind, p.name, p, origin) for p in plugins})


def test_a_good_folder_passes(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "mine.yaml").write_text(TASK)
    (tmp_path / "suite.yaml").write_text("suite: all\ntasks: [mine, 'mine:raw', 'lm_eval:arc_easy']\n")
    (tmp_path / "theirs.yaml").write_text("task: theirs\ndataset_path: a/b\noutput_type: multiple_choice\n")
    assert check_tasks(tmp_path, registry=registry) == ["mine", "theirs"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: mine", "naem: mine", "Every YAML file of the folder is a task, a suite or an lm-eval task."),
        ("summary: a task", "sumary: a task", "unknown key 'sumary'\n  Did you mean 'summary'?"),
        ("summary: a task", "summary: ' '", "`summary` is one line for `harness tasks`.\n  seen: task mine: empty"),
        ("source: me", "", "`source` is one line for `harness tasks`."),
        ("licence: CC0-1.0", "", "`licence` says how the data may be used.\n  seen: task mine: 'unknown'"),
        ("{{ prompt }}", "{{ prompt", "`template` is a Jinja template.\n  seen: task mine:"),
        ("template:", "target: '{% if %}'\ntemplate:", "`target` is a Jinja template."),
        ("name: pairs", "name: pears", "task mine: unknown dataset 'pears'\n  Did you mean 'pairs'?"),
        ("name: length", "name: lenght", "task mine: unknown scorer 'lenght'\n  Did you mean 'length'?"),
        ("path: x", "paht: x", "task mine, pairs.options, paht: unknown key 'paht'\n  Did you mean 'path'?"),
    ],
)
def test_a_broken_task_fails(tmp_path: Path, registry: Registry, old: str, new: str, words: str) -> None:
    assert old in TASK
    (tmp_path / "mine.yaml").write_text(TASK.replace(old, new))
    with pytest.raises(AssertionError) as caught:
        check_tasks(tmp_path, registry=registry)
    assert words in str(caught.value)


def test_a_suite_of_nothing_fails(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "suite.yaml").write_text("suite: all\ntasks: [mine, yours]\n")
    with pytest.raises(AssertionError, match="A folder of tasks holds at least one task"):
        check_tasks(tmp_path, registry=registry)
    (tmp_path / "mine.yaml").write_text(TASK)
    with pytest.raises(AssertionError, match=r"A suite names tasks that exist.\n  seen: suite all: yours"):
        check_tasks(tmp_path, registry=registry)


# ------------------------------------------------------------------------------------------------------ converters


class Chosen(Converter):
    name = "chosen"
    summary = "the chosen answer"
    source = "pairs"
    target = "demonstrations"

    def convert(self, row: DatasetRow) -> Iterator[DatasetRow]:
        yield DatasetRow(row.id, {"prompt": row.data["prompt"], "completion": row.data["chosen"]})


def test_the_bundled_converters_pass() -> None:
    converters = [one for _, one in load_plugins().of_kind(Converter)]
    assert [one.name for one in converters] == ["pairs-to-demonstrations", "pairs-to-rated"]
    for one in (Chosen(), *converters):
        check_converter(one)


def converting(change: Any) -> dict[str, Any]:
    """A converter whose rows are made by ``change(row, good row)``."""

    def convert(self: Any, row: DatasetRow) -> Any:
        return change(row, next(Chosen.convert(self, row)))

    return {"convert": convert}


CALLS: list[int] = []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"source": "triples"}, "`source` is one of prompts, demonstrations, pairs, rated, or a pydantic model."),
        ({"target": "pairs"}, "`source` and `target` differ.\n  seen: 'pairs'"),
        ({"source": BaseModel}, "The kit has rows of the named schemas only: pass `rows`."),
        (converting(lambda row, good: [row]), "A row of 'demonstrations' holds prompt, completion"),
        (converting(lambda row, good: [good, good]), "Ids of converted rows differ, and each is the row's own"),
        (
            converting(lambda row, good: [DatasetRow("x", good.data)]),
            "that with `/` and a suffix.\n  seen: of row kit/0: x",
        ),
        (converting(lambda row, good: []), "`convert` makes rows of some of its rows.\n  seen: none of 1"),
        (converting(lambda row, good: row.data.update(chosen="") or [good]), "`convert` leaves its row as it is."),
        (
            converting(lambda row, good: CALLS.append(1) or [DatasetRow(f"kit/0/{len(CALLS)}", good.data)]),
            "`convert` makes the same rows at every call.",
        ),
    ],
)
def test_a_broken_converter_fails(overrides: dict[str, Any], words: str) -> None:
    converter: Converter = type("Broken", (Chosen,), overrides)()
    with pytest.raises(AssertionError) as caught:
        check_converter(converter)
    assert words in str(caught.value)
