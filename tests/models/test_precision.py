"""What dtype ``auto`` is: settled while planning, the same in ids, rows, pedigrees, judges, training and servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import harness
from harness.alignment import plan as align_plan
from harness.contracts.engine import Engine
from harness.contracts.registry import load_plugins
from harness.core.records import ModelInfo
from harness.core.specs import AlignSpec, EvalSpec, ModelSpec
from harness.evaluation.plan import plan_eval
from harness.models import precision
from harness.models.inspect import inspect_model
from harness.models.precision import settle_dtype
from harness.tasks.catalog import load_catalog

GIB = 1024**3


@pytest.fixture
def half(alone: Path, tiny: Path) -> Path:
    """The tiny model, of which its configuration says that it is in bf16."""
    folder = alone / "half"
    shutil.copytree(tiny, folder)
    return says(folder, dtype="bfloat16")


def says(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return folder


def model(stored: str | None = "bfloat16", asked: str = "auto", gib: float = 1.0, **config: Any) -> ModelInfo:
    return ModelInfo(
        ref="m",
        path="",
        name="m",
        weights_digest="w",
        tokenizer_digest="t",
        dtype=stored,
        size_bytes=int(gib * GIB),
        config=config,
        spec={"dtype": asked},
    )


@pytest.mark.parametrize(
    ("given", "device", "meant"),
    [
        (model("bfloat16"), "cpu", "float32"),
        (model("float16"), "cpu", "float32"),
        (model("float32"), "cpu", "float32"),
        (model(None), "cpu", "float32"),
        (model("bfloat16"), "cuda", "bfloat16"),
        (model("float32"), "cuda", "float32"),
        (model("float8_e4m3fn"), "cuda", "auto"),
        (model("bfloat16", "float16"), "cpu", "float16"),
        (model("float32", "bfloat16"), "cuda", "bfloat16"),
        (model("bfloat16"), None, "auto"),
        (model("bfloat16", quantization_config={"quant_method": "gptq"}), "cpu", "auto"),
    ],
)
def test_what_auto_means(given: ModelInfo, device: str | None, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "memory_bytes", lambda: (16 * GIB, 0))
    settled, note = settle_dtype(given, device)
    assert (settled.spec["dtype"], note) == (meant, None)


@pytest.mark.parametrize(("stored", "taken"), [("bfloat16", "bfloat16"), ("float16", "float16")])
def test_what_does_not_fit_in_fp32_is_taken_as_stored_and_said(
    stored: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 GiB in two bytes a weight are 28 in four: more than four fifths of 32, less than those of 36."""
    monkeypatch.setattr(precision, "memory_bytes", lambda: (32 * GIB, 30 * GIB))
    settled, note = settle_dtype(model(stored, gib=14), "cpu")
    assert settled.spec["dtype"] == taken
    assert note == (
        f"m is loaded in {taken}: float32 does not fit this machine (28.0 GiB of weights, 32.0 GiB of memory)"
    )
    monkeypatch.setattr(precision, "memory_bytes", lambda: (36 * GIB, 0))
    assert settle_dtype(model(stored, gib=14), "cpu")[0].spec["dtype"] == "float32"
    # A system that does not say how much memory it has.
    monkeypatch.setattr(precision, "memory_bytes", lambda: (0, 0))
    assert settle_dtype(model(stored, gib=14), "cpu")[0].spec["dtype"] == "float32"


def test_a_config_that_names_no_type_leaves_it_to_the_weights(half: Path) -> None:
    silent = inspect_model(ModelSpec(model=str(says(half, dtype=None))))
    assert silent.dtype is None
    assert settle_dtype(silent, "cuda")[0].spec["dtype"] == "float32"


# ------------------------------------------------------------------------------------------------------- evaluation


def planned(folder: Path, tasks: Path, dtype: str, engine: str = "transformers", **options: Any) -> Any:
    registry = load_plugins()
    spec = EvalSpec(
        model=ModelSpec(model=str(folder), dtype=dtype),  # type: ignore[arg-type]
        tasks=("sums",),
        engine=engine,
        task_folders=(str(tasks),),
        options={"engine": options},
    )
    return plan_eval(spec, registry, load_catalog(registry, spec.task_folders))


def test_auto_on_a_cpu_is_the_evaluation_in_fp32(half: Path, sums: Path) -> None:
    ids = {dtype: planned(half, sums, dtype, device="cpu").tasks[0].answers_id for dtype in ("auto", "float32")}
    assert ids["auto"] == ids["float32"]
    assert planned(half, sums, "bfloat16", device="cpu").tasks[0].answers_id != ids["auto"]
    plan = planned(half, sums, "auto", device="cpu").to_json()
    assert plan["spec"]["model"]["dtype"] == plan["model"]["spec"]["dtype"] == "float32"
    assert plan["model"]["dtype"] == "bfloat16"  # what is stored


def test_auto_on_cuda_is_what_is_stored(half: Path, sums: Path) -> None:
    auto, same = (planned(half, sums, dtype, device="cuda") for dtype in ("auto", "bfloat16"))
    assert auto.tasks[0].answers.identity["dtype"] == "bfloat16"
    assert auto.tasks[0].answers_id == same.tasks[0].answers_id


def test_rows_and_pedigree_say_it(half: Path, sums: Path) -> None:
    made = harness.evaluate(
        str(half), tasks=["sums"], task_folders=[sums], engine="transformers", limit=2, out=half.parent / "out"
    )
    assert {row.dtype for row in made.rows} == {"float32"}
    (answers,) = (half.parent / "out" / "steps").glob("answers-*")
    assert json.loads((answers / "step.json").read_text(encoding="utf-8"))["identity"]["dtype"] == "float32"
    facts = json.loads((answers / "provenance.json").read_text(encoding="utf-8"))
    assert facts["engine"]["dtype"] == "float32"


def test_the_note_stands_beside_the_numbers(half: Path, sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "memory_bytes", lambda: (1000, 0))
    made = harness.evaluate(
        str(half), tasks=["sums"], task_folders=[sums], engine="transformers", limit=2, out=half.parent / "out"
    )
    (row,) = made.rows
    assert row.dtype == "bfloat16"
    assert any(note.startswith("half is loaded in bfloat16: float32 does not fit") for note in row.notes)


def test_an_endpoint_has_none(cli: Any, slow_eval: list[str]) -> None:
    assert cli(*slow_eval, "--out", "out").code == 0
    (scores,) = Path("out/steps").glob("scores-*/artifact/scores.json")
    assert [row["dtype"] for row in json.loads(scores.read_text(encoding="utf-8"))["rows"]] == [None]


def test_every_engine_of_ours_names_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness_plugins.engines.vllm import engine as engine_vllm

    found = dict(load_plugins().of_kind(Engine))
    transformers, vllm, openai = (found[name] for name in ("transformers", "vllm", "openai"))
    assert transformers.device(transformers.Config(device="cuda:1")) == "cuda"
    for cpu, kind in ((True, "cpu"), (False, "cuda")):
        monkeypatch.setattr(engine_vllm, "is_cpu_build", lambda cpu=cpu: cpu)
        assert vllm.device(vllm.Config()) == kind
    assert openai.device(openai.Config()) is None


# ------------------------------------------------------------------------------------------ judges, training, servers


def test_a_judge_on_a_cpu_is_in_fp32(half: Path, cache: Path) -> None:
    from harness_plugins.judges.backends import Local
    from harness_plugins.judges.options import JudgeOptions, judge_identity

    def identity(**given: Any) -> dict[str, Any]:
        return judge_identity(JudgeOptions(model=str(half), **given), "test")

    on_cpu = {"engine": "transformers", "engine_options": {"device": "cpu"}}
    assert identity(**on_cpu) == identity(**on_cpu, dtype="float32")
    assert identity(**on_cpu)["dtype"] == "float32"
    assert identity(engine="transformers", engine_options={"device": "cuda:0"})["dtype"] == "bfloat16"
    assert identity(engine="somebody-elses")["dtype"] == "auto"
    opened: list[Any] = []

    class Open:
        model = inspect_model(ModelSpec(model=str(half)))
        session = harness.Session

    def open_engine(*arguments: Any, **more: Any) -> Any:
        opened.append(more["dtype"])
        return Open

    Local(JudgeOptions(model=str(half), **on_cpu), "test", open_engine, ("generate",))
    assert opened == ["float32"]


def test_a_scorer_that_opens_an_engine_itself_gets_fp32_too(half: Path) -> None:
    from harness.evaluation.engines import open_engine

    opened = open_engine(load_plugins(), str(half), "transformers", {"device": "cpu"})
    assert opened.session.facts["dtype"] == "float32"
    opened.close()


def test_training_is_planned_in_the_type_that_it_runs_in(tiny: Path, alone: Path, monkeypatch: Any) -> None:
    (alone / "rows.jsonl").write_text('{"id": "a", "prompt": "p", "completion": "c"}\n', encoding="utf-8")
    registry = load_plugins()

    def plan(dtype: str, device: str) -> Any:
        monkeypatch.setattr(align_plan, "torch_device", lambda: device)
        spec = AlignSpec(
            method="sft",
            model=ModelSpec(model=str(tiny), dtype=dtype),  # type: ignore[arg-type]
            dataset=f"jsonl:{alone / 'rows.jsonl'}",
        )
        return align_plan.plan_align(spec, registry)

    assert plan("auto", "cpu").id == plan("float32", "cpu").id
    assert plan("auto", "cuda").id == plan("bfloat16", "cuda").id != plan("auto", "cpu").id
    assert plan("auto", "cpu").spec.model.dtype == plan("auto", "cpu").step.identity["dtype"] == "float32"
