"""What a user of `harness align` gets wrong: exit 2, one message with three parts, nothing left behind."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.testing import tiny_adapter, tiny_model

PAIR = {"prompt": "Say something.", "chosen": "With pleasure.", "rejected": "No."}
SETTINGS = ["--steps", "2", "--set", "batch_size=2", "--set", "eval_rows=0"]
Refuse = Callable[..., str]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """Rows as a file; returns what --dataset takes."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path.name}"


@pytest.fixture
def good(alone: Path) -> str:
    """A data set with which the other arguments work."""
    return write(alone / "good.jsonl", [{**PAIR, "prompt": f"Say {n} things."} for n in range(12)])


@pytest.fixture
def refuse(cli: Any, tiny: Path, good: str) -> Refuse:
    """Run `harness align dpo` with some arguments changed; returns the message, once all else has been checked."""

    def run(*more: str, method: str = "dpo", model: Path | str = tiny, dataset: str = good) -> str:
        ran = cli("align", method, "--model", model, "--dataset", dataset, *SETTINGS, *more, "--out", "out")
        assert ran.code == 2, ran.err
        assert "Traceback" not in ran.err
        assert ran.err.count("error: ") == 1
        assert ran.out == ""
        assert not Path("out").exists()
        message = ran.err[ran.err.index("error: ") :]
        where, _, fix = message.removeprefix("error: ").partition("\n  ")
        # Where and what in the first line, what to do in the second.
        assert ": " in where
        assert fix.strip()
        return message

    return run


def test_nothing_is_wrong_with_the_rest(cli: Any, tiny: Path, good: str) -> None:
    """Or the refusals below would prove nothing."""
    ran = cli("align", "dpo", "--model", tiny, "--dataset", good, *SETTINGS, "--out", "out")
    assert (ran.code, ran.out.strip()) == (0, "out"), ran.err


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"method": "dpoo"}, "METHOD: unknown aligner 'dpoo'\n  Did you mean 'dpo' or 'cdpo'"),
        (
            {"dataset": "hh-rhlf:harmless"},
            "--dataset hh-rhlf:harmless: unknown data set 'hh-rhlf'\n  Did you mean 'hh-rlhf'",
        ),
        ({"dataset": "hh-rlhf:harmles"}, "unknown subset of hh-rlhf 'harmles'\n  Did you mean 'harmless'"),
        ({"dataset": "hh-rlhf"}, "hh-rlhf has several subsets, and none is named\n  Write hh-rlhf:harmless or"),
        ({"dataset": "jsonl:absent.jsonl"}, "absent.jsonl"),
        ({"model": "no/such/folder"}, "--model no/such/folder: no such folder"),
        ({"model": "http://localhost:1/v1"}, "--model http://localhost:1/v1: is an endpoint"),
    ],
    ids=str,
)
def test_names(refuse: Refuse, changed: dict[str, str], says: str) -> None:
    """Unknown ones are met with suggestions."""
    assert says in refuse(**changed)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--adapter", "qlor"], "--adapter: unknown adapter 'qlor'\n  Did you mean 'qlora' or 'lora'"),
        (["--set", "bta=0.2"], "--set, bta: unknown key 'bta'\n  Did you mean 'beta'?"),
        (["--set", "beta=high"], "--set, beta: Input should be a valid number"),
        (["--set", "beta"], "--set: 'beta' is not key=value"),
        (["--set", "adapter.rnk=4"], "--set adapter, rnk: unknown key 'rnk'\n  Did you mean 'rank'?"),
        (
            ["--set", "adapter=lora"],
            "--set: adapter='lora': adapter is a group of keys\n  Write --set adapter.KEY=VALUE.",
        ),
        (
            ["--set", "dataset.hh-rlhf.x=1"],
            "--set dataset.hh-rlhf: unknown data set of this alignment 'hh-rlhf'\n  Known: trl",
        ),
        (
            ["--set", "dataset.trl=1"],
            "--set: dataset.trl=1: trl is a group of keys\n  Write --set dataset.trl.KEY=VALUE.",
        ),
        (["--steps", "0"], "--set, steps: Input should be greater than or equal to 1, found 0"),
        (["--samples", "13"], "13 rows are asked for, and 9 can be trained on"),
        (["--checkpoints", "1,5"], "--checkpoints: 5 is after the last step, 2\n  Give steps from 1 to 2."),
        (["--checkpoints", "0"], "--checkpoints: 0 is no step\n  Give steps from 1 to 2."),
        (["--checkpoints", "ten"], "--checkpoints: 'ten' is no list of steps\n  Write for example 50,100,200."),
        (["--template", "vicunna"], "--template vicunna: unknown chat template 'vicunna'\n  Did you mean 'vicuna'"),
        (["--from", "absent"], "--from absent: no such folder"),
        (
            ["--set", "adapter.targets=[q_proj,c_attn]"],
            "--set adapter.targets: the model has no linear layer "
            "'c_attn'\n  "
            "Its linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
        ),
        (["--set", "adapter.targets=[mlp]"], "--set adapter.targets: the model has no linear layer 'mlp'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(refuse: Refuse, more: list[str], says: str) -> None:
    """The value seen, and what to do; `out` is not there afterwards, so the corrected command finds it free."""
    assert says in refuse(*more)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "a", "chosen": "b"}], "the nearest, pairs, lacks rejected"),
        ([{"question": "a", "answer": "b"}], "its columns (question, answer) are of none of TRL's formats"),
        ([], "there are no rows"),
        (
            [{**PAIR, "rejected": PAIR["chosen"]}] * 3,
            "no row is left to train on: 3 rows, dropped 3 (chosen and rejected are equal: 3)",
        ),
        ([{**PAIR, "chosen": None}] * 3, "no row is left to train on: 3 rows, dropped 3 (no chosen: 3)"),
        (
            [{**PAIR, "prompt": f"{n} " + "long " * 800} for n in range(3)],
            "max_length 512: no row is left once tokenised: prompt longer than the context (512 tokens): ",
        ),
        ([{"prompt": "a", "completion": "b"}] * 3, "its rows are demonstrations, and pairs are needed"),
    ],
    ids=["a column", "all columns", "empty", "equal", "null", "long", "another schema"],
)
def test_data(refuse: Refuse, alone: Path, rows: list[dict[str, Any]], says: str) -> None:
    """Which columns, a row, and the counts."""
    message = refuse(dataset=write(alone / "bad.jsonl", rows))
    assert says in message
    if "columns" in says or "lacks" in says:
        assert f"Its rows look so: {json.dumps(rows[0])}" in message


def test_an_adapter_is_no_model(refuse: Refuse, tiny: Path, alone: Path) -> None:
    """Given as --model."""
    adapter = tiny_adapter(alone / "adapter", tiny)
    message = refuse(model=adapter)
    assert "config.json is not in that folder" in message
    assert "It holds an adapter: give its base as --model" in message


def test_a_base_without_template(refuse: Refuse, alone: Path) -> None:
    """Of no family whose template is known."""
    bare = tiny_model(alone / "bare", chat_template=False)
    message = refuse(model=bare)
    assert "--template (model bare): the tokenizer has no chat template, and none is known for Llama" in message
    assert "--template mistral or --template vicuna" in message


def test_qlora_without_bitsandbytes(refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says how to get it."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    assert "--adapter qlora: bitsandbytes is not installed\n  pip install bitsandbytes" in refuse("--adapter", "qlora")


def test_a_file_in_the_way(cli: Any, tiny: Path, good: str) -> None:
    """Somebody's files are neither mixed with nor deleted."""
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    for more in ([], ["--fresh"]):
        ran = cli("align", "dpo", "--model", tiny, "--dataset", good, *SETTINGS, "--out", "out", *more)
        assert ran.code == 2
        assert "--out out: holds files that are no alignment's (mine.txt)" in ran.err
        assert [path.name for path in Path("out").iterdir()] == ["mine.txt"]


def test_another_alignment_in_the_folder(cli: Any, tiny: Path, good: str) -> None:
    """Says what differs, with both values."""
    arguments = ["align", "dpo", "--model", tiny, "--dataset", good, *SETTINGS, "--out", "out"]
    assert cli(*arguments).code == 0
    before = Path("out/adapter_model.safetensors").read_bytes()
    ran = cli(*arguments, "--seed", "3", "--set", "beta=0.5", "--adapter", "qlora")
    assert ran.code == 2
    assert "--out out: holds another alignment; different: " in ran.err
    for part in (
        "adapter.name was 'lora', is 'qlora'",
        "recipe.beta was 0.1, is 0.5",
        "seed was 0, is 3",
    ):
        assert part in ran.err
    assert "recipe.steps" not in ran.err
    assert "Give another --out, or --fresh to replace it." in ran.err
    assert Path("out/adapter_model.safetensors").read_bytes() == before


def test_a_failed_first_run_leaves_the_folder_usable(cli: Any, tiny: Path, good: str) -> None:
    """Refused while the model was open already; corrected, it runs in the same folder without --fresh."""
    arguments = ["align", "dpo", "--model", tiny, "--dataset", good, *SETTINGS, "--out", "out"]
    assert cli(*arguments, "--set", "adapter.targets=[c_attn]").code == 2
    assert cli(*arguments).code == 0


def test_another_commit_than_the_pinned_one_is_named_by_whoever_wants_it(
    refuse: Refuse, alone: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, with what is not the pinned revision in the cache: refused; accepted, its commit is in every name."""
    from harness.alignment.plan import plan_align
    from harness.contracts.registry import load_plugins
    from harness.core.specs import AlignSpec, ModelSpec

    commit = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("HF_HUB_CACHE", str(alone / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(alone / "prepared"))
    folder = alone / "hub" / "datasets--PKU-Alignment--PKU-SafeRLHF"
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    message = refuse(dataset="beavertails:harmless")
    assert "data set PKU-Alignment/PKU-SafeRLHF: its pinned revision v0 cannot be had here" in message
    option = f"PKU-Alignment/PKU-SafeRLHF={commit}"
    assert message.endswith(f"--data-revision {option}\n")
    source, _, wanted = option.partition("=")
    base = {"method": "dpo", "model": ModelSpec(model=str(tiny)), "dataset": "beavertails:harmless"}
    plan = plan_align(AlignSpec(**base, data_revisions={source: wanted}), load_plugins())
    assert plan.arm.startswith("dpo-beavertails@0123456789ab-harmless-")
    assert plan.dataset == f"beavertails@{commit}:harmless"
    assert plan.stages[0].data["parts"][0]["dataset"]["revision"] == commit
    # What a second process is given is this plan's spec.
    assert plan_align(plan.spec, load_plugins()).id == plan.id


@pytest.mark.parametrize("given", ["a/b", "a/b=main", f"a={'0' * 40}", "=", f"a/b={'0' * 39}"])
def test_odd_data_revisions(refuse: Refuse, given: str) -> None:
    message = refuse("--data-revision", given)
    assert f"error: --data-revision: {given!r} is not OWNER/NAME=COMMIT\n  Give the 40 hex" in message


def test_two_commits_of_one_data_set_are_refused(refuse: Refuse) -> None:
    message = refuse("--data-revision", f"a/b={'0' * 40}", "--data-revision", f"a/b={'1' * 40}")
    assert "error: --data-revision: a/b is given two commits\n  Give one." in message
