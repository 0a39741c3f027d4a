"""Tasks and suites by name, by path and by prefix; options laid over them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.core.errors import UserError
from harness.tasks.catalog import Catalog, code_of

TASK = """\
name: {name}
dataset: {{name: jsonl, options: {{path: rows.jsonl, id: key}}}}
decoding: {{max_new_tokens: 8, stop: ["x"]}}
scorers:
- {{name: exact_match, options: {{strip: false}}}}
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    folder = tmp_path / "tasks"
    (folder / "deeper").mkdir(parents=True)
    for place, name in ((folder, "one"), (folder / "deeper", "two")):
        (place / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    suite = "suite: both\ntasks: [one, two]\nlimit: 50\nlimits: {two: 7}\n"
    (folder / "both.yml").write_text(suite, encoding="utf-8")
    # lm-eval's: a task, a group, and a file that others include.
    theirs = "task: theirs\ninclude: _base.yaml\ndoc_to_text: !function utils.text\noutput_type: generate_until\n"
    (folder / "theirs.yaml").write_text(theirs, encoding="utf-8")
    (folder / "group.yaml").write_text("group: ours\ntask: [theirs]\n", encoding="utf-8")
    (folder / "common.yaml").write_text("output_type: multiple_choice\n", encoding="utf-8")
    (folder / "_base.yaml").write_text("dataset_path: json\n", encoding="utf-8")
    found = Catalog()
    found.add_folder(folder, "me")
    return found


def test_what_a_folder_brings(catalog: Catalog) -> None:
    assert sorted(catalog.tasks) == ["one", "ours", "theirs", "two"]
    assert sorted(catalog.suites) == ["both"]
    entry = catalog.tasks["theirs"]
    assert entry.spec.lm_eval is not None
    assert (entry.spec.lm_eval.task, entry.spec.needs, entry.owner) == ("theirs", ("generate",), "me")
    assert catalog.tasks["ours"].spec.needs == ()  # known once its members are


def test_names(catalog: Catalog, tmp_path: Path) -> None:
    assert catalog.task("one", "--task")[1] is None
    assert catalog.task("one:chat", "--task")[1] == "chat"
    entry, variant = catalog.task(f"{tmp_path}/tasks/deeper/two.yaml:raw", "--task")
    assert (entry.spec.name, variant) == ("two", "raw")
    entry, _ = catalog.task("lm_eval:arc_easy", "--task")
    assert (entry.spec.name, entry.file) == ("lm_eval:arc_easy", None)
    with pytest.raises(UserError, match="unknown task 'tow'\n  Did you mean 'two'"):
        catalog.task("tow", "--task")
    with pytest.raises(UserError, match=r"is no task\n  A task has `name:`; an lm-eval task has `task:`\."):
        catalog.task(f"{tmp_path}/tasks/both.yml", "--task")


def test_limits_from_nearest_to_farthest(catalog: Catalog) -> None:
    def limits(**given: object) -> list[int | None]:
        settings = {"tasks": [], "suite": "both", "limit": None, "options": {}} | given
        return [one.limit for one in catalog.choose(**settings)]  # type: ignore[arg-type]

    assert limits() == [50, 7]
    assert limits(limit=3) == [3, 3]
    assert limits(limit=3, options={"two": {"limit": 9}}) == [3, 9]
    assert limits(suite=None, tasks=["one"]) == [None]


def test_options_are_laid_over_key_by_key(catalog: Catalog) -> None:
    options = {
        "one": {
            "decoding": {"max_new_tokens": 3},
            "dataset": {"options": {"path": "other.jsonl"}},
            "scorer": {"ignore_case": True},
        }
    }
    (chosen,) = catalog.choose(["one"], None, None, options)
    spec = chosen.spec
    assert (spec.decoding.max_new_tokens, spec.decoding.stop) == (3, ("x",))
    assert spec.dataset is not None
    assert spec.dataset.options == {"path": "other.jsonl", "id": "key"}
    assert spec.scorers[0].options == {"strip": False, "ignore_case": True}
    assert catalog.tasks["one"].spec.decoding.max_new_tokens == 8


def test_a_suite_has_options_and_the_users_go_before(catalog: Catalog, tmp_path: Path) -> None:
    def choose(suite: str, **options: object) -> list[int]:
        file = tmp_path / "tasks" / "both.yml"
        file.write_text(f"suite: both\ntasks: [one, two]\noptions: {suite}\n", encoding="utf-8")
        found = Catalog()
        found.add_folder(tmp_path / "tasks", "me")
        return [one.spec.decoding.max_new_tokens for one in found.choose([], "both", None, options)]

    assert choose("{two: {decoding: {max_new_tokens: 5}}}") == [8, 5]
    assert choose("{two: {decoding: {max_new_tokens: 5}}}", two={"decoding": {"max_new_tokens": 6}}) == [8, 6]
    with pytest.raises(UserError, match="suite both, options: 'tow' is no task of the suite\n  Its tasks: one, two"):
        choose("{tow: {limit: 5}}")


def test_scorers_by_name_where_there_are_several(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(TASK.format(name="t") + "- name: includes\n", encoding="utf-8")
    catalog = Catalog()
    catalog.add_folder(tmp_path, "me")
    options = {"t": {"scorer": {"includes": {"ignore_case": True}}}}
    (chosen,) = catalog.choose(["t"], None, None, options)
    assert [ref.options for ref in chosen.spec.scorers] == [{"strip": False}, {"ignore_case": True}]
    with pytest.raises(
        UserError, match=r"the task has several scorers\n  Write t\.scorer\.NAME\.KEY with NAME one of exact"
    ):
        catalog.choose(["t"], None, None, {"t": {"scorer": {"ignore_case": True}}})
    with pytest.raises(UserError, match=r"--set t\.scorer\.includes: 3 is a value, not a group of options"):
        catalog.choose(["t"], None, None, {"t": {"scorer": {"includes": 3}}})


def test_every_file_beside_an_lm_eval_task_is_its_code(catalog: Catalog) -> None:
    entry = catalog.tasks["theirs"]
    assert entry.folder is not None
    first = code_of(entry)
    (entry.folder / "utils.py").write_text("def text(doc): return doc['q']\n", encoding="utf-8")
    second = code_of(entry)
    (entry.folder / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    assert len({first, second, code_of(entry)}) == 3
    assert code_of(catalog.tasks["one"]) is None


def test_somebodys_whole_disk_is_no_folder_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.catalog.MOST_FILES", 2)
    for number in range(3):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(UserError, match="holds more than 2 files\n  Give a folder that holds task YAML files alone"):
        Catalog().add_folder(tmp_path, "me")
