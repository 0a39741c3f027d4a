"""What a user gets wrong in a study's file: exit 2, one message in three parts with a line of it, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.alignment.processes import write_preferences

STUDY = """\
study: small
bases:
  tiny: {model: MODEL}
data: {pairs: "jsonl:pairs.jsonl"}
grid:
- method: [sft, dpo]
  data: pairs
  base: tiny
  adapter: lora
  seed: [0, 1]
merges:
- method: linear
  inputs: [{method: sft}, {method: dpo}]
evaluation:
  tasks: sums
  task_folders: tasks
  engine: transformers
"""
LINE = {text.strip(): number for number, text in enumerate(STUDY.splitlines(), 1)}
ARM = "arms:\n- {name: more, base: tiny, method: dpo, data: pairs"
MERGES = "merges:\n- method: linear\n  inputs: [{method: sft}, {method: dpo}]\n"
Refuse = Callable[..., str]


@pytest.fixture
def refuse(cli: Any, tiny: Path, sums: Path) -> Refuse:
    """`harness study plan` with one text of the file in place of another, which must be refused: the message."""

    def run(old: str, new: str, *arguments: str) -> str:
        write_preferences(Path("pairs.jsonl"))
        assert old in STUDY
        Path("study.yaml").write_text(STUDY.replace(old, new, 1).replace("MODEL", str(tiny)), encoding="utf-8")
        ran = cli("study", "plan", "study.yaml", *arguments)
        assert ran.code == 2, ran.err
        assert "Traceback" not in ran.err
        assert ran.err.count("error: ") == 1
        assert ran.out == ""
        assert not Path("runs").exists()
        message: str = ran.err[ran.err.index("error: ") :]
        assert message.partition("\n  ")[2].strip()
        return message

    return run


def test_nothing_is_wrong_with_the_rest(cli: Any, tiny: Path, sums: Path) -> None:
    """Or the refusals below would prove nothing."""
    write_preferences(Path("pairs.jsonl"))
    Path("study.yaml").write_text(STUDY.replace("MODEL", str(tiny)), encoding="utf-8")
    ran = cli("study", "plan", "study.yaml")
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("base: tiny", "base: tniy", ("study.yaml:8, grid.0.base: unknown base 'tniy'", "'tiny'")),
        ("[sft, dpo]\n", "[sft, dpoo]\n", ("study.yaml:6, grid.0.method: unknown aligner 'dpoo'", "'dpo'")),
        ("adapter: lora", "adapter: loar", ("study.yaml:9, grid.0.adapter: unknown adapter 'loar'", "'lora'")),
        ("data: pairs", "data: pears", ("study.yaml:7, grid.0.data", "unknown data set 'pears'", "'pairs'")),
        ("data: pairs", "data: hh-rlhf:harmles", ("study.yaml:7, grid.0.data", "'harmles'", "'harmless'")),
        ("method: linear", "method: linaer", ("study.yaml:12, merges.0.method: unknown merger 'linaer'", "'linear'")),
        ("tasks: sums", "tasks: sum", ("study.yaml:15, evaluation.tasks (sum): unknown task 'sum'", "'sums'")),
        ("tasks: sums", "suite: quik", ("study.yaml:15, evaluation.suite (quik): unknown suite 'quik'", "'quick'")),
        ("{method: sft}", "{methd: sft}", ("study.yaml:13, merges.0.inputs.0: unknown factor 'methd'", "'method'")),
        ("{method: sft}", "{method: ipo}", ("study.yaml:13, merges.0.inputs.0: no arm has", "'ipo'", "study plan")),
        ("{method: sft}", "'sfd*'", ("study.yaml:13, merges.0.inputs.0: unknown arm 'sfd*'", "sft-pairs-lora-tiny-s0")),
        (
            "[{method: sft}, {method: dpo}]",
            "[{method: sft}, {data: pairs}]",
            ("study.yaml:13, merges.0.inputs.1: stands for 2 arms of one merge (", "Say more factors"),
        ),
        (
            "- method: linear",
            "- method: linear\n  weights: [0.5]",
            ("study.yaml:12, merges.0: 1 weights for 2 inputs", "Give"),
        ),
        ("- method: linear", "- method: linear\n  base: tin", ("study.yaml:13, merges.0.base: unknown base 'tin'",)),
        (
            "merges:",
            "- {method: sft, data: pairs}\nmerges:",
            ("study.yaml:11, grid.1: a second arm of the name 'sft-pairs-lora-tiny-s0'", "first: study.yaml:6, grid.0"),
        ),
        (
            "merges:",
            f"{ARM}, from: nobody}}\nmerges:",
            ("study.yaml:12, arms.0.from: unknown arm 'nobody'", "study plan"),
        ),
        (
            "merges:",
            f"{ARM}, from: more}}\nmerges:",
            ("study.yaml:12, arms.0.from: waits for itself: its `from` leads back to it", "Take one `from` away"),
        ),
        (
            "merges:",
            "arms:\n- {name: given, base: tiny, adapter: ./gone}\nmerges:",
            ("study.yaml:12, arms.0.adapter", "no such folder", "./gone"),
        ),
        (
            "merges:",
            "arms:\n- {name: half, base: tiny, method: sft}\nmerges:",
            ("study.yaml:12, arms.0: an arm that is trained needs `method` and `data`",),
        ),
        (
            "seed: [0, 1]",
            "seed: [0, 1]\n  checkpoints: [2, 900]",
            ("study.yaml:11, grid.0.checkpoints: 900 is after the last step, 700", "Give steps from 1 to 700"),
        ),
        (
            "seed: [0, 1]",
            "seed: [0, 1]\n  set:\n    learning_rat: 1",
            ("study.yaml:12, grid.0.set.learning_rat: unknown key 'learning_rat'", "Did you mean 'learning_rate'?"),
        ),
        (
            "seed: [0, 1]",
            "seed: [0, 1]\n  set:\n    adapter.rnk: 8",
            ("study.yaml:12, grid.0.set.adapter.rnk: unknown key 'rnk'", "'rank'"),
        ),
        (
            "seed: [0, 1]",
            "seed: [0, 1]\n  set:\n    adapter: {rank: -1}",
            ("study.yaml:12, grid.0.set.adapter.rank", "greater than or equal to 1, found -1"),
        ),
        (
            "- method: linear",
            "- method: linear\n  set: {desity: 1}",
            ("study.yaml:13, merges.0.set.desity: unknown key 'desity'",),
        ),
        (
            "tasks: sums\n",
            "tasks: sums\n  set: {sums: {scorer: {ignore_cas: true}}}\n",
            ("study.yaml:16, evaluation.set.sums.scorer.ignore_cas: unknown key 'ignore_cas'", "'ignore_case'"),
        ),
        ("engine: transformers", "engine: transformer", ("study.yaml:17, evaluation.engine", "'transformers'")),
        ("tiny: {model: MODEL}", "tiny: {model: ./gone}", ("study.yaml:3, bases.tiny.model", "no such folder")),
        ("tiny: {model", "tiny: {modl", ("study.yaml:3, bases.tiny", "model")),
        ("merges:", "merge:", ("study.yaml:11, merge: unknown key 'merge'", "Did you mean 'merges'?")),
        (
            "data: pairs",
            "data: pairs\n  data: pairs",
            ("study.yaml:8, grid.0.data: key 'data' is given twice", "line 7"),
        ),
        ("seed: [0, 1]", "seed: [0, yes]", ("study.yaml:10, grid.0.seed.1", "valid integer, found True")),
        ("study: small", "study: a b", ("study.yaml:1, study", "'a b'")),
        (
            MERGES,
            f"{ARM},\n   search: {{learning_rat: [1e-5]}}}}\n",
            ("study.yaml:13, arms.0.search.learning_rat: unknown key 'learning_rat'", "'learning_rate'"),
        ),
        (
            MERGES,
            f"{ARM}, search: {{learning_rate: 1e-5, seed: [1]}}}}\n",
            ("study.yaml:12, arms.0.search.seed: [1] is no seed", "Give one whole number"),
        ),
        (
            MERGES,
            f"{ARM}, set: {{eval_rows: 0}}, search: {{}}}}\n",
            ("study.yaml:12, arms.0.set.eval_rows: 0 held-out rows: there is nothing to choose by",),
        ),
        (
            "merges:",
            "arms:\n- {name: given, base: tiny, adapter: ./a, search: {}}\nmerges:",
            ("study.yaml:12, arms.0: an arm made elsewhere has no recipe to search",),
        ),
        (
            "evaluation:\n  tasks: sums\n  task_folders: tasks\n  engine: transformers\n",
            "evaluation:\n",
            ("study.yaml:14, evaluation: is empty; `none` asks nothing of any arm",),
        ),
        (
            "evaluation:\n  tasks: sums\n  task_folders: tasks\n  engine: transformers\n",
            "evaluation: nothing\n",
            ("study.yaml:14, evaluation", "found 'nothing'"),
        ),
    ],
)
def test_what_a_study_can_have_wrong(refuse: Refuse, old: str, new: str, says: tuple[str, ...]) -> None:
    message = refuse(old, new)
    for text in says:
        assert text in message, message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "tiny"], ("--model: 'tiny' is not BASE=PATH", "--model llama=")),
        (["--model", "lama=x"], ("--model lama: no base of that name", "tiny")),
        (["--set", "gird=1"], ("gird: unknown key 'gird'", "'grid'")),
        (["--why", "zzz"], ("--why zzz: 0 steps have such a key", "harness study steps")),
    ],
)
def test_what_its_command_can_have_wrong(refuse: Refuse, arguments: list[str], says: tuple[str, ...]) -> None:
    message = refuse("study: small", "study: small", *arguments)
    for text in says:
        assert text in message, message


def test_an_empty_file_and_none(cli: Any) -> None:
    Path("study.yaml").write_text("", encoding="utf-8")
    ran = cli("study", "plan", "study.yaml")
    assert (ran.code, "study.yaml: expected a mapping, found NoneType" in ran.err) == (2, True), ran.err
    assert "Allowed keys: study, summary, bases" in ran.err
    ran = cli("study", "plan", "papre")
    assert (ran.code, "papre: unknown study 'papre'" in ran.err, "'paper'" in ran.err) == (2, True, True), ran.err


def test_arms_of_two_bases_do_not_meet(refuse: Refuse, tiny: Path) -> None:
    two = f"  tiny: {{model: MODEL}}\n  other: {{model: {tiny}}}"
    more = STUDY.replace("  tiny: {model: MODEL}", two).replace("base: tiny", "base: [tiny, other]")
    whole = more.replace("merges:", "arms:\n- {name: further, base: other, method: dpo, data: pairs, from: F}\nmerges:")
    message = refuse(STUDY, whole.replace("F}", "sft-pairs-lora-tiny-s0}"))
    assert "study.yaml:13, arms.0.from: further is of base other, and sft-pairs-lora-tiny-s0 of tiny" in message
    assert "Go on from an arm of the same base" in message


def test_a_base_without_a_chat_template_is_told_of_the_files_key(refuse: Refuse, tmp_path: Path) -> None:
    from harness.testing import tiny_model

    bare = tiny_model(tmp_path / "bare", chat_template=False)
    message = refuse("MODEL", str(bare))
    assert "study.yaml:3, bases.tiny.template" in message
    assert "the tokenizer has no chat template" in message
    assert "`template: vicuna` of the base" in message
    assert "--template" not in message


def test_a_base_with_another_template_than_the_studys(refuse: Refuse) -> None:
    message = refuse("{model: MODEL}", "{model: MODEL, template: vicuna}")
    assert "study.yaml:6, grid.0 (sft-pairs-lora-tiny-s0): was trained with chat template" in message
    assert "`allow_template_mismatch: true` of the base" in message
