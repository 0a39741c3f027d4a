"""Annotations, win rates and length control: by hand, against the alpaca-eval package, and against published values."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness import UserError
from harness.judges import alpaca
from harness.report.external.annotations import JudgedPair, read_annotations

SHARED = os.environ.get("HARNESS_SHARED")
shared = pytest.mark.skipif(SHARED is None, reason="HARNESS_SHARED is not set")
DATA = Path(SHARED or ".") / "data" / "alpaca_eval"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(value: Any, name: str = "annotations.json") -> Path:
        path = tmp_path / name
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return file


def row(preference: Any, number: int = 0, **more: Any) -> dict[str, Any]:
    made = {"instruction": f"Ask {number}", "output_1": "one", "output_2": "two!"}
    return {**made, "generator_1": "base", "generator_2": "new", "annotator": "j", "preference": preference, **more}


def rates(path: Path, **options: Any) -> dict[str, Any]:
    return alpaca.win_rates(read_annotations(path, **options))


# ------------------------------------------------------------------------------------------------------------ by hand


def test_a_bare_list_of_preferences(write: Write) -> None:
    # Wins 0, 1, 0.5, 0.25: mean 0.4375; squared deviations sum to 0.546875; sqrt(0.546875 / 3 / 4) = 0.213478.
    found = rates(write([1, 2, 1.5, 1.25]))
    assert found["win_rate"] == 43.75
    assert found["standard_error"] == pytest.approx(21.3478, abs=5e-5)
    # 1.25 counts as the reference's win: (0 + 1 + 0.5 + 0) / 4.
    assert found["discrete_win_rate"] == 37.5
    assert (found["n_wins"], found["n_draws"], found["n_wins_base"], found["n_total"]) == (1, 1, 2, 4)


def test_old_draws_nulls_and_what_is_no_preference(write: Write) -> None:
    values = [2, 0, None, float("nan"), "m", True, 3, -1]
    rows = [row(value, i) for i, value in enumerate(values)]
    rows.append({key: value for key, value in row(1, 9).items() if key != "preference"})
    rows.append(row(None, 10, reason="the judge hung up"))
    read = read_annotations(write(rows))
    found = alpaca.win_rates(read)
    # One win and one draw.
    assert (found["win_rate"], found["n_total"], found["n_unscored"]) == (75.0, 2, 8)
    assert dict(read.unscored) == {
        "no verdict (null)": 2,
        "the preference is a string, not a number": 1,
        "the preference is a boolean, not a number": 1,
        "the preference is outside 1 to 2": 2,
        "the row has no preference": 1,
        "the judge hung up": 1,
    }
    assert any("1 preferences of 0 are read as draws" in note for note in read.notes)


def test_one_pair_has_no_standard_error_and_none_has_nothing(write: Write) -> None:
    assert rates(write([row(2)]))["standard_error"] is None
    found = rates(write([row(None), row(None, 1)]))
    assert found["win_rate"] is None and found["n_total"] == 0 and found["n_unscored"] == 2
    json.dumps(found, allow_nan=False)


def test_lengths_are_the_models(write: Write) -> None:
    # 4 and 9 characters: the package's leaderboard cuts the mean to a whole number.
    assert rates(write([row(1), row(2, 1, output_2="nine char")]))["avg_length"] == 6


def test_the_other_generator_turns_the_preference(write: Write) -> None:
    path = write([row(1.2), row(2, 1), row(1.5, 2)])
    assert rates(path)["win_rate"] == pytest.approx(100 * (0.2 + 1 + 0.5) / 3)
    assert rates(path, model="base")["win_rate"] == pytest.approx(100 * (0.8 + 0 + 0.5) / 3)
    assert rates(path, reference="new")["win_rate"] == rates(path, model="base")["win_rate"]
    assert rates(path, model="new", reference="base") == rates(path)
    assert rates(path, model="base")["avg_length"] == 3


def test_both_orders_of_one_comparison(write: Write) -> None:
    turned = row(1, 1, generator_1="new", generator_2="base")
    path = write([row(2), turned])
    assert rates(path, model="new")["win_rate"] == 100.0
    with pytest.raises(UserError, match=r"several comparisons: new against base; base against new\n  Choose one"):
        read_annotations(path)


def test_repeated_instructions_count_each(write: Write) -> None:
    read = read_annotations(write([row(1), row(2), row(2)]))
    assert alpaca.win_rates(read)["n_total"] == 3
    assert read.notes == ("2 rows repeat an instruction; each counts, as in the alpaca-eval package",)


def test_other_forms_of_the_file(write: Write, tmp_path: Path) -> None:
    rows = [row(1), row(2, 1), row(1.5, 2)]
    expected = rates(write(rows))
    lines = "".join(json.dumps(one) + "\n\n" for one in rows)
    assert rates(write(lines, "a.jsonl")) == expected
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert rates(tmp_path / "b.jsonl.gz") == expected
    assert rates(write("\ufeff" + json.dumps(rows))) == expected


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("[1, 2", {}, r"annotations.json: not JSON: .*\n  Give an annotations file as AlpacaEval writes it."),
        ("[" * 100_000, {}, "not JSON"),
        ({"a": 1}, {}, "holds a JSON object, not a list"),
        ([], {}, "holds no rows"),
        ([row(1), "text"], {}, "annotations.json, row 2: a JSON string, not an object"),
        ([{"instruction": "a", "output": "b"}], {}, r"no row has a `preference` \(keys: instruction, output\)"),
        ([row(7), row("x", 1)], {}, r"no preference can be read \(1 x the preference is outside 1 to 2; 1 x the pref"),
        ([row(1), row(2, 1, annotator="k")], {}, r"several judges: j, k\n  Choose one with --annotator."),
        ([row(1)], {"annotator": "i"}, "--annotator: unknown judge 'i'"),
        ([row(1)], {"model": "newer"}, r"--model: unknown generator 'newer'\n  Did you mean 'new'\?"),
        ([row(1), row(1, 1, generator_2="x")], {}, "several comparisons: new against base; x against base"),
        ([row(1), row(1, 1, generator_1="x", generator_2="y")], {"model": "y", "reference": "base"}, "never compared"),
    ],
)
def test_what_is_no_such_file(write: Write, value: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_annotations(write(value), **options)


def test_no_file_and_no_text(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file\n  Did you mean .*annotations.json\?"):
        read_annotations(write([row(1)]).with_name("annotation.json"))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_annotations(tmp_path / "bytes.json")
    (tmp_path / "torn.json").write_bytes(gzip.compress(b"[1, 2]")[:-6])
    with pytest.raises(UserError, match="cannot be read"):
        read_annotations(tmp_path / "torn.json")


# ------------------------------------------------------------------------------------------------------ length control

WEIGHTS = f",{alpaca.LENGTH},{alpaca.DIFFICULTY},{alpaca.MODEL}\n"


def test_the_model_against_itself_is_a_half(write: Write) -> None:
    itself = read_annotations(write([row(1.5, i, generator_1="new") for i in range(3)]))
    control = alpaca.length_control(itself)
    assert (control.winrate, control.standard_error, control.glm) == (50.0, 0.0, "same model")
    weights = alpaca.read_weights(write(WEIGHTS + "new,-1.0,0.7,-2.0\n", "w.csv"))
    table = alpaca.read_alpaca_difficulties(write("index,instruction_difficulty\n0,-1.5\n1,4.0\n", "d.csv"))
    assert alpaca.published("new", "new", weights, table).winrate == 50.0


def test_published_weights_by_hand(write: Write) -> None:
    # Model term 1 - 0, difficulty term (2 - 1) x 0 and x 3: (sigmoid(1) + sigmoid(4)) / 2; the length term is left out.
    weights = alpaca.read_weights(write(WEIGHTS + "base,-9,1,0\nnew,5,2,1\n", "w.csv"))
    table = alpaca.read_alpaca_difficulties(write("index,instruction_difficulty\n0,0\n1,3\n", "d.csv"))
    shares = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-4))]
    control = alpaca.published("new", "base", weights, table)
    assert control.winrate == pytest.approx(50 * sum(shares))
    # Half the difference, for two values.
    assert control.standard_error == pytest.approx(50 * (shares[1] - shares[0]))
    assert "none for nwe (nearest: new)" in (alpaca.published("nwe", "base", weights, table).withheld or "")


def made_pairs(n: int, seed: int = 0) -> tuple[list[JudgedPair], dict[str, float]]:
    """Pairs whose preference follows difficulty and length, with noise."""
    generator = random.Random(seed)
    pairs, table = [], {}
    for i in range(n):
        difficulty = generator.gauss(0, 1.5)
        one, two = generator.randrange(50, 400), generator.randrange(50, 700)
        logit = -0.8 + 0.6 * difficulty + (two - one) / 200 + generator.gauss(0, 0.5)
        table[f"Ask {i}"] = round(difficulty, 6)
        pairs.append(JudgedPair(f"Ask {i}", "x" * one, "y" * two, 1 + 1 / (1 + math.exp(-logit))))
    return pairs, table


def tables(write: Write, table: dict[str, float]) -> alpaca.Difficulties:
    rows = "".join(f"{i},{value},{text}\n" for i, (text, value) in enumerate(table.items()))
    return alpaca.read_alpaca_difficulties(write("index,instruction_difficulty,instruction\n" + rows, "d.csv"))


@pytest.mark.parametrize("name", ["length_controlled_noreg", "length_controlled_v1"])
def test_a_fit_is_the_packages_own(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pairs, table = made_pairs(450)
    gamed_rows = []
    # As in the published file one model comes after the other: the package reads difficulties by position.
    for kind, shift in (("concise", -1.5), ("verbose", 1.5)):
        for index, difficulty in enumerate(table.values()):
            preference = 1 / (1 + math.exp(-(0.3 * difficulty + shift)))
            gamed_rows.append((kind, preference, index, shift, difficulty, False))
    head = "model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    gamed = write(head + "".join(",".join(map(str, one)) + "\n" for one in gamed_rows), "df_gamed.csv")
    difficulties = tables(write, table)
    control = alpaca.fit_length_control(pairs, difficulties, gamed if name.endswith("v1") else None)

    with alpaca.quiet_alpaca_eval():
        from alpaca_eval.metrics import glm_winrate

        monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed))
        rows = [
            {
                "output_1": one.output_1,
                "output_2": one.output_2,
                "generator_1": "base",
                "generator_2": "new",
                "preference": one.preference,
            }
            for one in pairs
        ]
        theirs = glm_winrate.get_length_controlled_winrate(rows, glm_name=name, save_weights_dir=None)
    assert control.glm == name
    assert control.winrate == pytest.approx(theirs["length_controlled_winrate"], abs=1e-9)
    assert control.standard_error == pytest.approx(theirs["lc_standard_error"], abs=1e-9)


def test_a_fit_needs_enough_pairs(write: Write) -> None:
    pairs, table = made_pairs(alpaca.LEAST_ITEMS)
    difficulties = tables(write, table)
    assert alpaca.fit_length_control(pairs, difficulties).withheld is None
    short = [*pairs[:-1], JudgedPair("Ask 399", "a", "b", None, "hung up")]
    assert alpaca.fit_length_control(short, difficulties).withheld == (
        "399 scored pairs have outputs and a published difficulty, and a fit needs 400"
    )
    stranger = [*pairs[:-1], JudgedPair("not of AlpacaEval", "a", "b", 1.5)]
    assert "399 scored pairs" in (alpaca.fit_length_control(stranger, difficulties).withheld or "")


def test_a_fit_gives_nothing_to_what_is_unscored(write: Write) -> None:
    pairs, table = made_pairs(420)
    pairs[3] = JudgedPair(pairs[3].instruction, pairs[3].output_1, pairs[3].output_2, None, "hung up")
    control = alpaca.fit_length_control(pairs, tables(write, table))
    assert control.predictions[3] is None and sum(one is None for one in control.predictions) == 1


def test_a_fit_needs_wins_and_losses(write: Write) -> None:
    pairs, table = made_pairs(400)
    difficulties = tables(write, table)

    def control(wins: int) -> alpaca.LengthControl:
        preferences = [2.0] * wins + [1.0] * (400 - wins)
        drawn = random.Random(1).sample(preferences, 400)
        changed = zip(pairs, drawn, strict=True)
        shuffled = [JudgedPair(p.instruction, p.output_1, p.output_2, one) for p, one in changed]
        return alpaca.fit_length_control(shuffled, difficulties)

    assert control(9).withheld == "9.0 wins in 400 pairs, and a fit needs 10 wins and as many losses"
    assert control(391).withheld == "391.0 wins in 400 pairs, and a fit needs 10 wins and as many losses"
    assert control(0).withheld is not None
    assert control(10).withheld is None and control(390).withheld is None


def test_a_fit_to_draws_is_a_half(write: Write) -> None:
    pairs, table = made_pairs(400)
    draws = [JudgedPair(one.instruction, one.output_1, one.output_2, 1.5) for one in pairs]
    assert alpaca.fit_length_control(draws, tables(write, table)).winrate == pytest.approx(50, abs=1e-6)


def test_equal_lengths_throughout(write: Write) -> None:
    pairs, table = made_pairs(400)
    even = [JudgedPair(one.instruction, "same", "size", one.preference) for one in pairs]
    control = alpaca.fit_length_control(even, tables(write, table))
    raw = 100 * sum((one.preference or 0) - 1 for one in even) / 400
    # There is nothing to control for: the fit goes through the mean, but for its little regularisation.
    assert control.winrate == pytest.approx(raw, abs=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'instruction_difficulty' \\(columns: none\\)"),
        ("index,difficulty\n0,1\n", "no column 'instruction_difficulty' \\(columns: index, difficulty\\)"),
        ("index,instruction_difficulty\n", "holds no rows"),
        ("index,instruction_difficulty\n0,nan\n", "row 1, instruction_difficulty: no finite number"),
        ("index,instruction_difficulty\n0,1\n1\n", "row 2, instruction_difficulty: no finite number"),
        ("index,instruction_difficulty,instruction\n0,1,a\n1,2,a\n", "missing or stand there twice"),
    ],
)
def test_tables_that_are_none(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        alpaca.read_alpaca_difficulties(write(text, "d.csv"))


def test_difficulties_without_texts_go_by_position(write: Write) -> None:
    table = alpaca.read_alpaca_difficulties(write("index,instruction_difficulty\n0,1\n1,2\n", "d.csv"))
    two = [JudgedPair("a", "x", "y", 1.0), JudgedPair("b", "x", "y", 1.0)]
    assert table.of(two) == [1.0, 2.0]
    # Another number of rows: which is which cannot be told.
    assert table.of(two[:1]) == [None]


def test_the_package_changes_nothing_of_ours(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)
    before = dict(os.environ)
    rates(write([row(1), row(2, 1)]))
    assert logging.getLogger().level == logging.WARNING and dict(os.environ) == before


# -------------------------------------------------------------------------------------------------------- published

JUDGED = {
    "alpaca-7b": "weighted_alpaca_eval_gpt4_turbo",
    "vicuna-7b-v1.5": "weighted_alpaca_eval_gpt4_turbo",
    "text_davinci_001": "alpaca_eval_gpt4",
}


def leaderboard(judge: str) -> dict[str, dict[str, str]]:
    with (DATA / f"leaderboard_{judge}.csv").open(encoding="utf-8", newline="") as stream:
        return {one[""]: one for one in csv.DictReader(stream)}


@shared
def test_every_published_annotation_is_looked_at() -> None:
    assert {path.parent.name for path in DATA.glob("*/*.annotations.json")} == set(JUDGED)


@shared
@pytest.mark.parametrize("model", list(JUDGED))
def test_win_rates_are_those_of_the_leaderboard(model: str) -> None:
    found = rates(DATA / model / f"{JUDGED[model]}.annotations.json")
    published = leaderboard(JUDGED[model])[model]
    for name in ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total"):
        assert found[name] == pytest.approx(float(published[name]), abs=5e-7), name
    assert found["avg_length"] == int(published["avg_length"])


@shared
def test_length_controlled_win_rates_are_those_of_the_leaderboard() -> None:
    weights = alpaca.read_weights(DATA / "length_controlled_v1_weights.csv")
    table = alpaca.read_alpaca_difficulties(DATA / "instruction_difficulty.csv")
    off, without = {}, []
    for model, published in leaderboard("weighted_alpaca_eval_gpt4_turbo").items():
        control = alpaca.published(model, alpaca.PUBLISHED_REFERENCE, weights, table)
        if control.winrate is None:
            without.append(model)
            continue
        distance = abs(control.winrate - float(published["length_controlled_winrate"]))
        if distance > 0.02:
            off[model] = round(distance, 2)
        if published["lc_standard_error"]:
            assert control.standard_error == pytest.approx(float(published["lc_standard_error"]), abs=5e-4), model
    assert off == {"dbrx-instruct": 0.19, "NullModel": 0.13} == alpaca.OFF
    # No weights were published for these; of 223 models that leaves 199.
    assert len(without) == 24 and not set(without) & set(weights)


@shared
@pytest.mark.parametrize(("model", "published"), [("alpaca-7b", 5.875487), ("vicuna-7b-v1.5", 7.616893)])
def test_weights_are_held_against_the_annotations(write: Write, model: str, published: float) -> None:
    path = DATA / model / f"{JUDGED[model]}.annotations.json"
    files = {
        "weights": DATA / "length_controlled_v1_weights.csv",
        "difficulty": DATA / "instruction_difficulty.csv",
    }
    assert alpaca.length_control(read_annotations(path), **files).winrate == pytest.approx(published, abs=1e-6)
    rows = json.loads(path.read_text(encoding="utf-8"))
    for one in rows:
        one["preference"] = 3 - one["preference"]
    control = alpaca.length_control(read_annotations(write(rows)), **files)
    assert control.winrate is None and "they belong to other outputs or another judge" in (control.withheld or "")
    for one in rows:
        one["annotator"] = "me"
    control = alpaca.length_control(read_annotations(write(rows)), **files)
    assert (control.withheld or "").startswith(
        "the published weights describe verdicts of weighted_alpaca_eval_gpt4_turbo, and these are me's"
    )
