"""A grid of alignments, one choice on held-out rows, and how sure it is."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.alignment import driven, driver as training, export as align_export, run as alignment
from harness.alignment.heldout import ACCURACY, LOSS, summaries
from harness.alignment.plan import AlignPlan, plan_align
from harness.cli import app as cli
from harness.contracts.registry import load_plugins
from harness.core.errors import Requeue, StepError, UserError
from harness.core.specs import AlignSpec, ModelSpec
from harness.steps.files import slug
from harness.study import make
from harness.study.cells import full_grid
from harness.study.plan import StudyPlan, plan_study
from harness.study.search import Search, parse_grid, search, study_of
from harness.study.searched import Cell, choose
from tests.alignment.rows import short, write_pairs

MODEL = ModelSpec(model="anywhere")


def spec(method: str = "dpo", adapter: str = "lora", **options: Any) -> AlignSpec:
    return AlignSpec(method=method, model=MODEL, dataset="d", adapter=adapter, options=options)


# ------------------------------------------------------------------------------------------------------------- grid


@pytest.mark.parametrize(
    ("method", "ranks"), [("dpo", [8, 16, 32]), ("ipo", [8, 16, 32]), ("cdpo", [8, 16, 32]), ("sft", [32, 64, 128])]
)
def test_the_grid_is_the_papers(method: str, ranks: list[int]) -> None:
    """arXiv 2406.04879, appendix B."""
    assert full_grid(spec(method), load_plugins(), {}) == {"adapter.rank": ranks, "adapter.alpha": [16, 32, 64]}


def test_a_key_is_added_replaced_or_fixed() -> None:
    registry = load_plugins()
    added = full_grid(spec(), registry, {"learning_rate": [1e-5, 5e-5]})
    assert list(added) == ["adapter.rank", "adapter.alpha", "learning_rate"]
    assert full_grid(spec(), registry, {"rank": [4]})["adapter.rank"] == [4]
    fixed = spec().model_copy(update={"options": {"adapter": {"rank": 4}}})
    assert list(full_grid(fixed, registry, {})) == ["adapter.alpha"]
    # Full fine-tuning has no rank to vary.
    assert full_grid(spec(adapter="none"), registry, {"beta": [0.1, 0.5]}) == {"beta": [0.1, 0.5]}


def test_values_of_the_command_line() -> None:
    assert parse_grid(["rank=8,16", "learning_rate=1e-5, 5e-5", "schedule=cosine,linear"]) == {
        "rank": [8, 16],
        "learning_rate": [1e-5, 5e-5],
        "schedule": ["cosine", "linear"],
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rank", "'rank' is not KEY=v1,v2,..."),
        ("rank=", "'rank=' is not KEY=v1,v2,..."),
        ("=8", "'=8' is not KEY=v1,v2,..."),
        ("rank=8,,16", "'rank=8,,16' is not KEY=v1,v2,..."),
        ("rank=8,8", "'rank=8,8' gives a key or a value twice"),
    ],
)
def test_odd_values_are_refused(text: str, what: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_grid([text])
    assert caught.value.where == "--search" and caught.value.what == what


def test_mistakes_show_before_anything_runs(tiny: Path, alone: Path) -> None:
    pairs = write_pairs(alone)

    def refused(grid: dict[str, list[Any]], method: str = "dpo", adapter: str = "lora", **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            search(method, str(tiny), pairs, out=alone / "out", grid=grid, adapter=adapter, options=options)
        assert not (alone / "out").exists()
        return str(caught.value)

    text = refused({"learning_rat": [1]})
    assert "--search learning_rat: unknown key 'learning_rat'" in text and "'learning_rate'" in text
    assert "--set fixes the same key" in refused({"beta": [1]}, beta=0.1)
    assert "sft with adapter none has no grid of its own" in refused({}, method="sft", adapter="none")
    assert "--set adapter, rank: Input should be greater than or equal to 1, found 0" in refused({"rank": [8, 0]})
    assert "0 held-out rows: there is nothing to choose by" in refused({}, eval_rows=0)


def searching(given: AlignSpec, grid: dict[str, list[Any]], folder: Path) -> StudyPlan:
    return plan_study(folder / "study.yaml", registry=load_plugins(), text=study_of(given, grid))


def test_cells_have_folders_of_their_own(tiny: Path, alone: Path) -> None:
    pairs = write_pairs(alone)
    given = AlignSpec(method="dpo", model=ModelSpec(model=str(tiny)), dataset=pairs, options={"adapter": {"alpha": 8}})
    grid = {"rank": [2, 4], "targets": [["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]]}
    plan = searching(given, grid, alone)
    cells = [one for one in plan.promises.values() if one.arm.cell]
    plans = [one.align for one in cells if one.align is not None]
    assert [one.adapter_options.rank for one in plans] == [2, 2, 4, 4]
    assert {one.adapter_options.alpha for one in plans} == {8}
    assert len({slug(one.arm.name) for one in cells}) == len({one.id for one in plans}) == 4
    assert given.options == {"adapter": {"alpha": 8}}


def test_a_cell_is_the_same_alignment_as_alone(tiny: Path, alone: Path) -> None:
    """All that an alignment can be told, in a study's YAML and back: the ids are those of `harness align`."""
    from harness.testing import tiny_adapter

    pairs, registry = write_pairs(alone), load_plugins()
    tiny_adapter(alone / "before", tiny)
    given = AlignSpec(
        method="dpo",
        model=ModelSpec(model=str(tiny), dtype="float32"),
        dataset=pairs,
        start=str(alone / "before"),
        template="vicuna",
        samples=20,
        checkpoints=(2, 4),
        seed=3,
        data_seed=5,
        processes=2,
        options={"beta": 0.2, "learning_rate": 1e-05, "adapter": {"alpha": 8, "targets": ["q_proj"]}},
    )
    plan = searching(given, {"rank": [2, 4], "warmup_steps": [0]}, alone)
    for rank in (2, 4):
        options = {**given.options, "warmup_steps": 0, "adapter": {**given.options["adapter"], "rank": rank}}
        alone_id = plan_align(given.model_copy(update={"options": options}), registry).id
        step = plan.promises[f"search-best-rank-{rank}_warmup_steps-0"].step
        assert step is not None and step.id == alone_id
    # Nothing is asked of anybody, and what waits is the arm that is chosen, with its checkpoints.
    assert not plan.evaluations and list(plan.waiting) == ["best", "best-step2", "best-step4"]


# ----------------------------------------------------------------------------------------------------------- choice


def cell(name: str, losses: list[float], right: list[int] | None = None, plan: AlignPlan | None = None) -> Cell:
    """A cell with given values per row; ids are positions."""
    rows = [{"id": str(i), LOSS: loss} for i, loss in enumerate(losses)]
    for row, one in zip(rows, right or [], strict=bool(right)):
        row[ACCURACY] = float(one)
    return Cell({"rank": name}, Path(name), plan, summaries(rows), rows)  # type: ignore[arg-type]


def test_pairs_choose_by_accuracy_then_loss_then_order() -> None:
    better, low, first = cell("a", [9, 9], [1, 1]), cell("b", [0, 0], [1, 0]), cell("c", [8, 8], [1, 1])
    assert choose([low, better, first], seed=0).best is first
    assert choose([low, better], seed=0).best is better
    twin = cell("d", [9, 9], [1, 1])
    assert choose([twin, better], seed=0).best is twin
    assert choose([better, twin], seed=0).best is better


def test_demonstrations_choose_by_loss() -> None:
    found = choose([cell("a", [2, 2, 2]), cell("b", [1, 2, 2])], seed=0)
    assert found.best.name == "rank b" and found.criterion == LOSS


def test_it_says_whether_the_best_can_be_told_from_the_second() -> None:
    """Exact McNemar: 3 discordant pairs of one kind give p = 2/8 = 0.25; 10 give 2/1024."""
    best = cell("best", [1] * 12, [1] * 12)
    near = cell("near", [1] * 12, [1] * 9 + [0] * 3)
    far = cell("far", [1] * 12, [1] * 2 + [0] * 10)
    alike = choose([far, near, best], seed=0)
    assert near.p_adjusted == pytest.approx(0.25) and far.p_adjusted == pytest.approx(2 * 2 / 1024)
    assert "On 12 held-out rows it is NOT distinguishable by preference accuracy from the second, rank near" in (
        alike.verdict
    )
    assert "1 of 2 other cells cannot be told from it" in alike.verdict
    sure = choose([best, far], seed=0)
    assert "it is distinguishable by preference accuracy from the second, rank far" in sure.verdict


def test_failed_cells_are_left_out_and_nothing_left_is_an_error() -> None:
    failed = Cell({"rank": 1}, Path("f"), None, error="the loss is nan")  # type: ignore[arg-type]
    alone = choose([failed, cell("a", [1.0, 2.0])], seed=0)
    assert alone.best.name == "rank a" and alone.verdict.startswith("Nothing to compare with on 2 held-out rows")
    with pytest.raises(StepError, match="no cell has held-out figures: rank 1: the loss is nan"):
        choose([failed], seed=0)


# --------------------------------------------------------------------------------------------------------- in whole


def test_a_search_from_the_command_line_stops_and_goes_on(
    cli: Any, tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(alone)
    settings = [f"--set={key}={value}" for key, value in short().items() if key not in ("adapter", "learning_rate")]
    arguments = ["align", "dpo", "--model", tiny, "--dataset", pairs, *settings, "--set=adapter.targets=[q_proj]"]
    arguments += ["--search", "rank=2", "alpha=4,8", "--search", "learning_rate=1e-3,1e25", "--out", "s"]
    ran, real = list[str](), make.carry_out_align

    def stopping(plan: AlignPlan, *rest: Any, **more: Any) -> Any:
        ran.append(plan.id)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return real(plan, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(make, "carry_out_align", stopping)
        assert cli(*arguments).code == 130
    assert not Path("s/search.json").exists()
    before = {file: file.read_bytes() for file in Path("s").rglob("adapter_model.safetensors")}
    assert len(before) == 1
    done = cli(*arguments)
    (record,) = json.loads(Path("s/search.json").read_text())["searches"].values()
    failed = [one for one in record["cells"] if one["error"]]
    assert [one["values"]["learning_rate"] for one in record["cells"]] == [1e-3, 1e25, 1e-3, 1e25]
    # At such a rate the loss is no number from the second step on; the others are chosen among all the same.
    assert [one["values"]["learning_rate"] for one in failed] == [1e25, 1e25] and done.code == 3
    assert all("the loss is" in one["error"] for one in failed) and "cells cannot be told" in record["verdict"]
    assert all(file.read_bytes() == data for file, data in before.items())
    best = Path("s/best")
    assert best.is_symlink() and best.resolve().parent.name == record["best"]
    assert (best / "adapter_config.json").is_file() and not best.readlink().is_absolute()
    figures = record["cells"][0]["heldout"]["rewards/accuracies"]
    assert figures["n"] > 0 and figures["interval"]["method"] == "wilson"
    table = Path("s/search.md").read_text()
    assert "| rank | alpha | learning_rate | held-out rows | accuracy [95 %] | loss [95 %] | p against best |" in table
    assert table.count("\n| 2 | ") == 4 and table in done.out
    # The chosen cell is the arm: four alignments, and nothing is asked of any.
    kinds = [path.name.partition("-")[0] for path in Path("s/steps").iterdir()]
    assert sorted(kinds) == ["align"] * 4 + ["prepare"]

    # Its folder is a study's, and so is the file in it.
    states = json.loads(cli("study", "status", "s", "--json").out)["steps"]
    assert sorted(one["state"] for one in states) == ["done"] * 3 + ["failed"] * 2
    assert "search-best" in cli("study", "plan", "s/study.yaml", "--out", "s").out
    assert "it says `evaluation: none`" in cli("report", "s").err
    # What failed stays so, until it is to be tried again; then all is chosen among anew.
    monkeypatch.setattr(make, "carry_out_align", stopping)
    ran += ["", ""]
    assert cli(*arguments).code == 3 and len(ran) == 4
    again = cli("study", "run", "s/study.yaml", "--out", "s", "--retry-failed")
    assert again.code == 3 and len(ran) == 6, again.err
    assert table in again.out


def test_a_cell_that_ends_well_after_all_is_chosen_among(
    cli: Any, tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by hand: SFT is chosen by loss, and five steps at 1e-2 lower it further than at 1e-6."""
    pairs, real = write_pairs(alone), make.carry_out_align
    settings = [f"--set={key}={value}" for key, value in short().items() if key not in ("adapter", "learning_rate")]
    arguments = ["align", "sft", "--model", tiny, "--dataset", pairs, *settings]
    arguments += ["--search", "rank=2", "alpha=4", "learning_rate=1e-6,1e-2", "--out", "s"]

    def failing(plan: AlignPlan, *rest: Any, **more: Any) -> Any:
        if plan.recipe.learning_rate == 1e-2:
            raise StepError("step 1", "out of luck")
        return real(plan, *rest, **more)

    def chosen() -> Any:
        (record,) = json.loads(Path("s/search.json").read_text())["searches"].values()
        (best,) = [one for one in record["cells"] if one["folder"] == record["best"]]
        assert Path("s/best").resolve().parent.name == record["best"]
        return best["values"]["learning_rate"]

    with monkeypatch.context() as patch:
        patch.setattr(make, "carry_out_align", failing)
        assert cli(*arguments).code == 3
    assert chosen() == 1e-6
    assert cli(*arguments).code == 3 and chosen() == 1e-6
    ran = cli(*arguments, "--retry-failed")
    assert ran.code == 0, ran.err
    assert chosen() == 1e-2


def test_the_folder_of_an_older_search_is_told(cli: Any, tiny: Path, alone: Path) -> None:
    Path("s/rank-8/step").mkdir(parents=True)
    Path("s/search.json").write_text('{"method": "dpo", "cells": [], "best": "rank-8"}')
    ran = cli("align", "dpo", "--model", tiny, "--dataset", write_pairs(alone), "--search", "--out", "s")
    assert ran.code == 2
    assert "error: --out s: holds a search of an older harness, whose cells are folders of alignments\n" in ran.err
    assert "Give another --out: a search is a study now. The adapters there stay usable, s/best say." in ran.err


@pytest.fixture
def as_the_command_line() -> Iterator[None]:
    """Signals as `harness` meets them outside of training."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, cli._requeue) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def two_cells(tiny: Path, alone: Path) -> Search:
    """A search over two learning rates, each of one step."""
    options = {key: value for key, value in short(steps=1).items() if key != "learning_rate"}
    grid = {"learning_rate": [1e-3, 2e-3], "rank": [2], "alpha": [4]}
    options["adapter"] = {"targets": ["q_proj"]}
    return search("orpo", str(tiny), write_pairs(alone), out=alone / "s", grid=grid, options=options)


@pytest.mark.usefixtures("as_the_command_line")
@pytest.mark.parametrize(
    ("module", "name", "number"),
    [
        (training._Callback, "on_step_end", signal.SIGTERM),
        (driven, "measure", signal.SIGUSR1),
        (align_export, "lineage_of", signal.SIGINT),
        (alignment, "tidy", signal.SIGTERM),
    ],
    ids=["last step", "held-out pass", "export", "after the end is on record"],
)
def test_a_signal_near_the_end_of_a_cell_stops_the_search(
    tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, number: int
) -> None:
    """It cannot stop that cell any more; the other is not begun. The same call goes on with it."""
    real = getattr(module, name)

    def signalled(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else Requeue):
            two_cells(tiny, alone)
    (folder,) = (alone / "s" / "steps").glob("align-*")
    before = (folder / "artifact" / "adapter_model.safetensors").read_bytes()
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    found = two_cells(tiny, alone)
    assert found.best is not None and not found.study.failures
    assert len(list((alone / "s" / "steps").glob("align-*"))) == 2
    assert (folder / "artifact" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("as_the_command_line")
def test_a_signal_in_a_cell_that_fails_stops_the_search(
    tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed cell is no reason to forget who asked to stop."""

    def failing(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise StepError("step 1", "the loss is nan")

    monkeypatch.setattr(driven, "measure", failing)
    with pytest.raises(Requeue):
        two_cells(tiny, alone)
    assert len(list((alone / "s" / "steps").glob("align-*"))) == 1


def test_search_wants_a_folder_of_its_own(cli: Any, tiny: Path, alone: Path) -> None:
    pairs = write_pairs(alone)
    base = ["align", "dpo", "--model", tiny, "--dataset", pairs, "--search"]
    assert "error: --search: where the cells go is not said\n  Add --out FOLDER." in cli(*base).err
    (alone / "s").mkdir()
    (alone / "s" / "notes.txt").write_text("mine")
    err = cli(*base, "--out", alone / "s").err
    assert "holds files that are no run's (notes.txt)" in err and "Give a new folder." in err
