"""Finding lm-eval's tasks by name without its index, and compiling its templates once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.tasks.catalog import Catalog, Chosen
from harness.tasks.lm_eval.load import _folders_by_name, _include_folder, compiled_once, load, tasks_folder

pytest.importorskip("lm_eval")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    files = {
        "one/a.yaml": 'task: "a"  # a comment\ntag: shared\n',
        "one/_base_yaml": "tag:\n- inherited\n- 'quoted'\nnum_fewshot: 2\n",
        "two/b.yaml": "tag: shared\n'task': b\n",
        "two/deep/group.yaml": "group: all\ntask:\n- a\n- b\n",
        "two/notes.md": "task: no_yaml\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_names_and_the_folders_that_give_them(tree: Path) -> None:
    one, two, deep = (str(tree / name) for name in ("one", "two", "two/deep"))
    assert _folders_by_name(tree) == {
        "a": [one],
        "shared": [one, two],
        "inherited": [one],
        "quoted": [one],
        "b": [two],
        # Its members a and b are no definitions.
        "all": [deep],
    }


def chosen(name: str) -> Chosen:
    entry, variant = Catalog().task(f"lm_eval:{name}", "--task")
    return Chosen(entry, entry.spec, variant, None)


def test_a_task_is_in_its_own_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.lm_eval.load.tasks_folder", lambda: tree)
    assert _include_folder(chosen("b")) == tree / "two"


def test_a_tag_over_several_folders_takes_all_of_them(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.lm_eval.load.tasks_folder", lambda: tree)
    assert _include_folder(chosen("shared")) == tree


def test_a_name_that_only_lm_eval_can_read_takes_the_whole_index(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "two/deep/nested.yaml").write_text("group: outer\ntask:\n  - group: inner_group\n    task: [a, b]\n")
    monkeypatch.setattr("harness.tasks.lm_eval.load.tasks_folder", lambda: tree)
    assert _include_folder(chosen("inner_group")) == tree


def test_an_unknown_name_suggests_near_ones(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.tasks.lm_eval.load.tasks_folder", lambda: tree)
    with pytest.raises(UserError, match=r"no task, group or tag of that name\n  Did you mean shared\?"):
        _include_folder(chosen("sharde"))


def test_lm_evals_own_folder_knows_mmlu_and_the_tag_of_superglue() -> None:
    assert _include_folder(chosen("mmlu")) == tasks_folder() / "mmlu" / "default"
    assert _include_folder(chosen("super-glue-lm-eval-v1")) == tasks_folder() / "super_glue"


def test_templates_are_compiled_once_and_render_the_same() -> None:
    from lm_eval.utils import apply_template, env

    template, doc = "{{ question.strip() }} {{ choices[1] }}", {"question": " Why? ", "choices": ["no", "yes"]}
    plain = apply_template(template, doc)
    with compiled_once():
        assert env.from_string(template) is env.from_string(template)
        assert apply_template(template, doc) == plain == "Why? yes"
        # Nothing of one document stays for the next.
        assert apply_template(template, {"question": "How?", "choices": ["a", "b"]}) == "How? b"
    assert env.from_string(template) is not env.from_string(template)


def test_data_of_another_commit_than_the_one_in_the_id_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, datasets takes the newest that it has prepared, whatever the revision asked for."""
    import datasets

    from harness.tasks.lm_eval.load import _either_cache

    commit, newest = "a" * 40, "b" * 40
    asked: list[tuple[str, str | None]] = []

    def load(path: str, revision: str | None = None) -> Any:
        asked.append((path, revision))
        return {"test": SimpleNamespace(cache_files=[{"filename": f"/x/0.0.0/{newest}/rows-test.arrow"}])}

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    with _either_cache({"some/rows": newest}):
        assert list(datasets.load_dataset("some/rows")) == ["test"]
    with _either_cache({"some/rows": commit}), pytest.raises(UserError) as error:
        datasets.load_dataset("some/rows")
    assert f"the prepared copy is of commit {newest}, not {commit}" in error.value.what
    assert f"`hf download --repo-type dataset some/rows --revision {commit}`" in error.value.fix
    snapshot = tmp_path / "datasets--some--rows" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    with _either_cache({"some/rows": commit}):
        datasets.load_dataset("some/rows")
    assert asked == [("some/rows", newest), ("some/rows", commit), ("some/rows", commit), (str(snapshot), None)]


THEIRS = """\
task: theirs
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
"""
CODE = "import pathlib\npathlib.Path('executed').touch()\ndef run(*found):\n    return 'x'\n"
ASK = "Read that code first; then pass --trust-task-code (in Python: trust_task_code=True)."


def loaded(folder: Path, name: str = "theirs", *, trusted: bool = False) -> list[str]:
    """Names of the tasks that a folder of a stranger brings, loaded."""
    catalog = Catalog(trust_task_code=trusted)
    catalog.add_folder(folder, "a stranger")
    entry = catalog.tasks[name]
    return sorted(load(Chosen(entry, entry.spec, None, None)))


@pytest.fixture
def theirs(alone: Path) -> Path:
    """A stranger's folder with data, code, and a second folder that may be included from."""
    folder = alone / "theirs"
    (alone / "elsewhere").mkdir()
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"q": "Q", "a": "A"}\n', encoding="utf-8")
    for place in (folder, alone / "elsewhere"):
        (place / "evil.py").write_text(CODE, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ("doc_to_target: !function evil.run\n", "theirs asks to run code (!function evil.run)"),
        ("process_docs: !function os.system\n", "theirs asks to run code (!function os.system)"),
        ("class: !function evil.run\n", "theirs asks to run code (!function evil.run)"),
        ("include: ../elsewhere/base.yaml\n", "elsewhere asks to run code (!function evil.run)"),
        (
            "metric_list: [{metric: ./evil}]\n",
            "metric './evil' is none of lm-eval's own: `evaluate` would run a script",
        ),
        ("metric_list: [{metric: exact_match, hf_evaluate: true}]\n", "metric 'exact_match' is none of lm-eval's own"),
    ],
)
def test_a_strangers_yaml_runs_no_code_unasked(theirs: Path, more: str, what: str) -> None:
    (theirs / "t.yaml").write_text(THEIRS + more, encoding="utf-8")
    (theirs / "group.yaml").write_text("group: all\ntask: [theirs]\n", encoding="utf-8")
    (theirs.parent / "elsewhere" / "base.yaml").write_text("doc_to_target: !function evil.run\n", encoding="utf-8")
    for name in ("theirs", "all"):
        with pytest.raises(UserError) as caught:
            loaded(theirs, name)
        assert caught.value.where == f"--task {name}"
        assert what in caught.value.what
        assert caught.value.fix == ASK
    assert not Path("executed").exists()


def test_it_runs_where_the_user_says_so(theirs: Path) -> None:
    (theirs / "t.yaml").write_text(f"{THEIRS}doc_to_choice: !function evil.run\n", encoding="utf-8")
    assert loaded(theirs, trusted=True) == ["theirs"]
    assert Path("executed").exists()


def test_plain_yaml_and_lm_evals_own_code_need_no_leave(theirs: Path) -> None:
    (theirs / "t.yaml").write_text(f"{THEIRS}metric_list: [{{metric: exact_match}}]\n", encoding="utf-8")
    assert loaded(theirs) == ["theirs"]
    # hellaswag's own process_docs, by an include, over a row that it can read.
    row = '{"q": "Q", "a": "A", "ctx_a": "x", "ctx_b": "y", "activity_label": "z", "endings": ["e"], "label": "0"}\n'
    (theirs / "rows.jsonl").write_text(row, encoding="utf-8")
    text = THEIRS.replace("test: rows", "train: rows.jsonl, validation: rows.jsonl, test: rows")
    (theirs / "t.yaml").write_text(
        f"{text}include: {tasks_folder() / 'hellaswag' / 'hellaswag.yaml'}\n", encoding="utf-8"
    )
    assert loaded(theirs) == ["theirs"]


def test_a_template_of_lm_evals_reaches_nothing_of_python() -> None:
    import jinja2
    from lm_eval import utils

    with compiled_once(), pytest.raises(jinja2.TemplateError):
        utils.apply_template("{{ cycler.__init__.__globals__.os.system('touch executed') }}", {})
    assert not Path("executed").exists()
