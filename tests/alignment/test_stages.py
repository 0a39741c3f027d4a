"""Stages of one method: a chain of steps, each with its own record, resumed within and between; and what it exports."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from harness.core.errors import StepError, UserError
from harness.models.artifact import adapter_digest
from harness.steps.provenance import file_digest
from harness.testing import check_aligner
from tests.alignment.processes import Zygote, as_set, log_of
from tests.alignment.steered import Steered
from tests.alignment.test_resume import AT_STEP

STEERED = Path(__file__).parent / "steered.py"
CHAIN = Path(__file__).parent / "sft_then_dpo.py"
WEIGHTS = "adapter_model.safetensors"
BESIDE = ("conditioning.json", "conditioning.safetensors")
KEPT = (WEIGHTS, *BESIDE, f"step-3/{WEIGHTS}", *(f"step-3/{name}" for name in BESIDE))
CONTROL = Path("step") / "stages" / "control"
SETTINGS = as_set(checkpoint_every=2, adapter__dropout=0.2)
AT_FILE = """
import os, pathlib, signal
real = pathlib.Path.replace
def replace(self, target):
    {before}
    made = real(self, target)
    {after}
    return made
pathlib.Path.replace = replace
"""
AT_FSYNC = """
import os, signal
real, calls = os.fsync, []
def fsync(descriptor):
    calls.append(1)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor)
os.fsync = fsync
"""


def at_file(end: str, *, after: bool) -> str:
    """A patch that ends the process before a file of this name is there, or just after."""
    kill = f"str(target).endswith({end!r}) and os.kill(os.getpid(), signal.SIGKILL)"
    return AT_FILE.format(before="pass" if after else kill, after=kill if after else "pass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the module's processes write into."""
    return tmp_path_factory.mktemp("stages")


@pytest.fixture
def steered(command: list[str]) -> list[str]:
    """Four steps of control alone, six of the model, a checkpoint every two, step 3 kept."""
    return [*command, "steered", "--plugin", str(STEERED), "--checkpoints", "3", *SETTINGS]


def run(zygote: Zygote, folder: Path, arguments: list[str], out: str, patch: str = "") -> tuple[int, str]:
    return zygote.run([*arguments, "--out", out], cwd=folder, patch=patch)


@pytest.fixture
def whole(zygote: Zygote, folder: Path, steered: list[str]) -> dict[str, bytes]:
    """What an uninterrupted run leaves."""
    if not (folder / "whole" / WEIGHTS).exists():
        code, said = run(zygote, folder, steered, "whole")
        assert code == 0, said
    return {name: (folder / "whole" / name).read_bytes() for name in KEPT}


def names_of(file: Path) -> list[str]:
    with safe_open(file, "np") as opened:
        return list(opened.keys())


def test_each_stage_has_a_record_of_its_own(whole: dict[str, bytes], folder: Path) -> None:
    """4 virtual tokens for 2 values of width 64 are 512 numbers, and all that the first stage trains."""
    out = folder / "whole"
    stage, last = (json.loads((out / where / "step.json").read_text()) for where in (CONTROL, Path("step")))
    assert (stage["kind"], last["kind"], last["stages"]) == ("align", "align", ["control", "model"])
    recipes = [one["identity"]["recipe"] for one in (stage, last)]
    assert [(one["steps"], one["learning_rate"]) for one in recipes] == [(4, 0.03), (6, 1e-3)]
    assert (stage["identity"]["earlier"], last["identity"]["earlier"]) == (None, stage["id"])
    assert (stage["factors"]["stage"], "stage" in last["factors"]) == ("control", False)
    ended = [json.loads((out / where / "status.json").read_text()) for where in (CONTROL, Path("step"))]
    trained = out / CONTROL / "trained.safetensors"
    assert (ended[0]["artifact"], ended[0]["digest"]) == ("weights", file_digest(trained))
    assert ended[1]["files"] == {"stages/control/trained.safetensors": file_digest(trained)}
    assert (ended[1]["artifact"], ended[1]["digest"]) == ("adapter", adapter_digest(out))
    engines = [json.loads((out / where / "provenance.json").read_text())["engine"] for where in (CONTROL, Path("step"))]
    assert engines[0]["trainable_parameters"] == 2 * 4 * 64 != engines[1]["trainable_parameters"]
    steps = [[line["step"] for line in log_of(out, "train") if "loss" in line], _stage_steps(out)]
    assert steps == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]
    assert names_of(trained) == ["control.weight"]
    assert not list(out.rglob("checkpoint-*"))
    recorded = json.loads((out / "checksums.json").read_text())["files"]
    assert {*KEPT, str(CONTROL / "status.json"), str(CONTROL / "trained.safetensors")} <= recorded.keys()


def _stage_steps(out: Path) -> list[int]:
    lines = map(json.loads, (out / CONTROL / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "train" and "loss" in line]


def test_what_a_method_exports(whole: dict[str, bytes], folder: Path, tmp_path: Path) -> None:
    """Trained in the first stage and frozen in the second, so the same beside every adapter; part of the digest."""
    from safetensors.torch import load_file

    control = load_file(folder / "whole" / CONTROL / "trained.safetensors")["control.weight"]
    for where in ("", "step-3/"):
        left = load_file(folder / "whole" / f"{where}conditioning.safetensors")
        assert left["good"].equal(control[:4])
        assert left["bad"].equal(control[4:])
    shutil.copytree(folder / "whole", tmp_path / "copy")
    before = adapter_digest(tmp_path / "copy")
    file = tmp_path / "copy" / "conditioning.json"
    file.write_text(file.read_text().replace('"good"', '"bad"', 1))
    assert adapter_digest(tmp_path / "copy") != before
    assert not any("control" in name for name in names_of(folder / "whole" / WEIGHTS))


IN_CONTROL = AT_STEP.format(step=3, name="SIGKILL")
IN_MODEL = AT_STEP.format(step=5, name="SIGKILL")


@pytest.mark.parametrize(
    ("patch", "control", "model"),
    [
        (AT_STEP.format(step=1, name="SIGKILL"), [], []),
        (IN_CONTROL, ["checkpoint-2"], []),
        (at_file("trained.safetensors", after=False), ["checkpoint-4"], []),
        (at_file("control/status.json", after=False), ["checkpoint-4"], []),
        (at_file("control/status.json", after=True), [], []),
        (IN_MODEL, [], ["checkpoint-4"]),
        (at_file("step/export.json", after=True), [], ["checkpoint-6"]),
        (at_file("/conditioning.json", after=True), [], ["checkpoint-6"]),
        (at_file("step/status.json", after=False), [], ["checkpoint-6"]),
    ],
    ids=[
        "before a checkpoint of the first stage",
        "in the first stage",
        "before the first stage has left anything",
        "before the first stage has ended",
        "between the stages",
        "in the second stage",
        "before the method exports",
        "while the method exports",
        "before the end is on record",
    ],
)
def test_killed(
    zygote: Zygote,
    folder: Path,
    steered: list[str],
    whole: dict[str, bytes],
    patch: str,
    control: list[str],
    model: list[str],
    request: Any,
) -> None:
    """SIGKILL, then the same command: the same bytes, and no stage trained twice."""
    out = request.node.callspec.id.replace(" ", "-")
    assert run(zygote, folder, steered, out, patch)[0] == -signal.SIGKILL
    code, said = run(zygote, folder, steered, out)
    assert code == 0, said
    assert {name: (folder / out / name).read_bytes() for name in KEPT} == whole
    lines = list(map(json.loads, (folder / out / CONTROL / "log.jsonl").read_text().splitlines()))
    assert [line["checkpoint"] for line in lines if line["event"] == "resumed"] == control
    assert [line["checkpoint"] for line in log_of(folder / out, "resumed")] == model
    assert ("stage control has been done" in said) == (not control and patch != AT_STEP.format(step=1, name="SIGKILL"))
    assert not list((folder / out).rglob("checkpoint-*"))
    assert "holds this alignment already" in run(zygote, folder, steered, out)[1]


@pytest.mark.slow
def test_killed_at_every_durable_write(
    zygote: Zygote, folder: Path, steered: list[str], whole: dict[str, bytes]
) -> None:
    """Each attempt gets further than the one before it, until one comes to its end; by every write, if asked for."""
    for number in range(1, 400, 1 if os.environ.get("HARNESS_EVERY_WRITE") else 6):
        code, said = run(zygote, folder, steered, "every", AT_FSYNC.format(number=number))
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
    assert {name: (folder / "every" / name).read_bytes() for name in KEPT} == whole


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 75)])
def test_signals_stop_between_stages_too(
    zygote: Zygote, folder: Path, steered: list[str], whole: dict[str, bytes], name: str, code: int
) -> None:
    """In its last step it is too late to stop a stage: it ends, and the next is not begun."""
    assert run(zygote, folder, steered, name, AT_STEP.format(step=3, name=name))[0] == code
    assert (folder / name / CONTROL / "status.json").exists()
    assert not (folder / name / "step" / "checkpoints").exists()
    assert run(zygote, folder, steered, name)[0] == 0
    assert (folder / name / WEIGHTS).read_bytes() == whole[WEIGHTS]


def test_a_damaged_stage_is_trained_again(
    zygote: Zygote, folder: Path, steered: list[str], whole: dict[str, bytes]
) -> None:
    """To equal bytes, so what came of it stays; to other bytes, and checkpoints that came of them go."""
    assert run(zygote, folder, steered, "damaged", IN_MODEL)[0] == -signal.SIGKILL
    (folder / "damaged" / CONTROL / "trained.safetensors").write_bytes(b"torn")
    code, said = run(zygote, folder, steered, "damaged")
    assert code == 0, said
    assert {name: (folder / "damaged" / name).read_bytes() for name in KEPT} == whole
    assert log_of(folder / "damaged", "resumed")[0]["checkpoint"] == "checkpoint-4"
    assert run(zygote, folder, steered, "other", IN_MODEL)[0] == -signal.SIGKILL
    began = folder / "other" / "step" / "checkpoints" / "began-with.json"
    began.write_text(json.dumps({"weights": "of another attempt"}))
    assert run(zygote, folder, steered, "other")[0] == 0
    assert not log_of(folder / "other", "resumed")
    assert (folder / "other" / WEIGHTS).read_bytes() == whole[WEIGHTS]


def test_the_same_adapter_goes_on(align: Callable[..., Any], alone: Path) -> None:
    """The reference of the second stage is what the first has left: the first loss is -log sigmoid(0)."""
    made = align("sft-then-dpo", "out", plugins=[CHAIN], lora={"rank": 2, "dropout": 0.0})
    assert made.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    first = made.folder / "step" / "stages" / "sft"
    assert names_of(first / "trained.safetensors") == sorted(names_of(first / "trained.safetensors"))
    assert all("lora_" in name for name in names_of(first / "trained.safetensors"))
    data = [stage.step.identity["data"]["schema"] for stage in made.plan.stages]
    assert data == ["demonstrations", "pairs"]
    assert json.loads((first / "result.json").read_text())["heldout"].keys() == {"eval_loss", "eval_loss_per_token"}
    assert "eval_rewards/margins" in made.heldout
    alone_dpo = align("dpo", "dpo", lora={"rank": 2, "dropout": 0.0})
    assert (made.folder / WEIGHTS).read_bytes() != (alone_dpo.folder / WEIGHTS).read_bytes()


def test_whole_models_are_saved_without_the_methods_modules(align: Callable[..., Any], alone: Path) -> None:
    made = align("steered", "out", plugins=[STEERED], adapter="none", steps=1, control_steps=1)
    names = names_of(made.folder / "model.safetensors")
    assert "model.norm.weight" in names
    assert not any("control" in name for name in names)
    assert (made.folder / "conditioning.json").is_file()


ROWS = [
    {
        "id": f"r{i}",
        "prompt_ids": [0, 5 + i, 6],
        "completion_ids": [7, 8 + i, 1],
        "labels_mask": [0, 0, 0, 1, 1, 1],
        "ratings": {"preference": float(i % 2)},
    }
    for i in range(4)
]


def test_the_kit_tries_stages_as_a_chain() -> None:
    check_aligner(Steered(), rows=ROWS)


class Forgetful(Steered):
    name = "forgetful"

    def attach(self, model: Any, tokenizer: Any, config: Any) -> None:
        """As the first stage alone would need it."""
        if config.learning_rate == config.control_rate:
            super().attach(model, tokenizer, config)


class Intruder(Steered):
    name = "intruder"
    file = "../elsewhere.json"

    def export(self, job: Any, model: Any, files: Any) -> None:
        """Writes where it must not."""
        files.write_json(self.file, {})


def test_the_kit_finds_modules_that_are_not_there_again() -> None:
    with pytest.raises(AssertionError) as caught:
        check_aligner(Forgetful(), rows=ROWS)
    assert str(caught.value) == (
        "`attach` adds the same modules before every stage.\n  seen: stage model: an earlier stage has trained "
        "control.weight [8, 64], and the model has none of that name"
    )


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("../elsewhere.json", "leads out of the folder, or is hidden"),
        ("/tmp/elsewhere.json", "leads out of the folder, or is hidden"),
        (".hidden", "leads out of the folder, or is hidden"),
        ("a//b", "leads out of the folder, or is hidden"),
        ("adapter_config.json", "is a name of the harness's own"),
        ("step/status.json", "is a name of the harness's own"),
    ],
)
def test_a_method_writes_into_the_adapters_folder_alone(tmp_path: Path, file: str, what: str) -> None:
    from harness.alignment.export import FilesBeside

    with pytest.raises(StepError) as caught:
        Intruder.export(type("One", (Intruder,), {"file": file})(), None, None, FilesBeside(tmp_path, "intruder"))
    assert str(caught.value) == (
        f"`export` of intruder: {file!r} {what}\n  Write into the folder, under a name that nothing else has."
    )
    assert not list(tmp_path.iterdir())


def test_settings_that_a_stage_cannot_have(align: Callable[..., Any], alone: Path) -> None:
    plugin = alone / "wrong" / "wrong.py"
    plugin.parent.mkdir()
    plugin.write_text(STEERED.read_text().replace('own = {"learning_rate"', 'own = {"learnig_rate"'))
    with pytest.raises(UserError) as caught:
        align("steered", "out", plugins=[plugin])
    print(caught.value)
    assert "learnig_rate" in str(caught.value)
    assert not Path("out").exists()
