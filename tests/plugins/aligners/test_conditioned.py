"""MEET, control tokens and Chain of Hindsight: what they make of rows, what they refuse, and the contract."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import Aligner, UserError, load_plugins
from harness.testing import check_aligner
from harness_plugins.aligners.conditioned import hindsight, values
from harness_plugins.aligners.conditioned.hindsight import Coh
from harness_plugins.aligners.conditioned.methods import ControlToken, Meet

ROWS = [
    {
        "id": f"r{i}",
        "prompt_ids": [0, 5 + i, 6],
        "completion_ids": [7, 8 + i, 9 + i % 2, 1],
        "labels_mask": [0, 0, 0, 1, 1, 1, 1],
        "ratings": {"preference": float(i % 2)},
    }
    for i in range(4)
]
ONE = {"preference": ("good", "bad")}
TWO = {"helpful": ("good", "bad"), "tone": ("kind", "curt", "rude")}
LORA = {"control": "lora", "control_rank": 2, "control_steps": 4, "control_rate": 0.01}


@pytest.mark.parametrize(
    ("method", "options"),
    [(Meet(), {"tokens": 3}), (Meet(), {**LORA, "freeze_control": True}), (ControlToken(), {})],
    ids=["prompt", "lora", "text"],
)
def test_contract(method: Any, options: dict[str, Any]) -> None:
    check_aligner(method, options=options, rows=ROWS, steps=2)


def test_contract_of_hindsight() -> None:
    check_aligner(Coh(), options={"short": True}, steps=2)


def test_they_are_registered() -> None:
    registry = load_plugins()
    for plugin in (Meet, ControlToken, Coh):
        assert type(registry.find(Aligner, plugin.name, "test")) is plugin


def test_the_code_is_a_strangers_too(tmp_path: Path) -> None:
    """Copied out, without the bundled plugins to import from, and with the public names alone."""
    import harness_plugins.aligners.conditioned as package

    shutil.copytree(Path(package.__path__[0]), tmp_path / "stranger", ignore=shutil.ignore_patterns("__pycache__"))
    for file in (tmp_path / "stranger").glob("*.py"):
        text = file.read_text().replace("harness_plugins.aligners.conditioned", "stranger")
        assert "harness_plugins" not in text
        lines = [
            line.strip() for line in text.splitlines() if line.strip().startswith(("from harness", "import harness"))
        ]
        assert all(line.startswith("from harness import") for line in lines), lines
        file.write_text(text)
    (tmp_path / "run.py").write_text(
        "import sys\n"
        "sys.modules['harness_plugins'] = None\n"  # an import of it is an error
        "from harness.testing import check_aligner\n"
        "from stranger.methods import Meet\n"
        f"check_aligner(Meet(), options={{'tokens': 2}}, rows={ROWS!r}, steps=2)\n"
        "print('passed', Meet.__module__)\n"
    )
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["passed stranger.methods"], done.stderr


# ------------------------------------------------------------------------------------------------ ratings as values


def test_ratings_are_values() -> None:
    """From the threshold on the first; several preferences count on through the keys, labels as they stand."""
    assert values.value_keys(ONE) == ["good", "bad"]
    assert values.value_keys(TWO) == ["helpful=good", "helpful=bad", "tone=kind", "tone=curt", "tone=rude"]
    assert values.default_control(TWO) == "helpful=good,tone=kind"
    rows = [{"id": "a", "ratings": {"preference": rating}} for rating in (1.0, 0.5, 0.49, "bad", True)]
    assert [values.values_of(row, ONE, 0.5) for row in rows] == [[0], [0], [1], [1], [0]]
    row = {"id": "a", "ratings": {"helpful": 0.0, "tone": "rude", "other": None}}
    assert values.values_of(row, TWO, 0.5) == [1, 4]
    assert values.other_values([1, 4], TWO) == [[0, 4], [1, 2], [1, 3]]


@pytest.mark.parametrize(
    ("ratings", "preferences", "what"),
    [
        (None, ONE, "row a: is not rated for 'preference'; it is rated for: nothing\n  Name preferences that all rows"),
        ({"helpful": 1.0, "preference": None}, ONE, "is not rated for 'preference'; it is rated for: helpful\n"),
        ({"preference": "fine"}, ONE, "its 'preference' is 'fine', and trained are: good, bad\n  Name all labels"),
        ({"preference": float("nan")}, ONE, "its 'preference' is nan\n  Mend the ratings"),
        (
            {"helpful": 1.0, "tone": 0.2},
            TWO,
            "its 'tone' is the number 0.2, and there are 3 values: kind, curt, rude\n  Numbers tell two values apart",
        ),
    ],
)
def test_ratings_that_are_none(ratings: Any, preferences: Any, what: str) -> None:
    with pytest.raises(UserError) as caught:
        values.values_of({"id": "a", "ratings": ratings}, preferences, 0.5)
    assert what in str(caught.value)


def test_rows_of_one_value() -> None:
    with pytest.raises(UserError) as caught:
        values.check_spread([[1], [1], [1]], ONE, "meet")
    assert str(caught.value) == (
        "meet: rows: none is 'good' (0 good, 3 bad)\n  Take rows of every value: pairs have both, and "
        "--set threshold=N moves where numbers part."
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"stages": ("model", "control")}, "stages is ['model', 'control']; write [control], [model] or"),
        ({"stages": ()}, "stages is []; write"),
        ({"stages": ("model",), "freeze_control": True}, "freeze_control keeps what the stage control has trained"),
        ({"tokens": 101}, "less than or equal to 100"),
        ({"control_rank": 65}, "less than or equal to 64"),
        ({"preferences": {"preference": ("good",)}}, "needs two or more different values, and has ['good']"),
        ({"threshold": float("nan")}, "finite number"),
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match="validation error") as caught:
        Meet.Config(**options)
    assert what in str(caught.value)


def test_phrases_tell_values_apart() -> None:
    assert ControlToken.Config(phrases={"bad": "Be bad. "}).texts() == {"good": "<good> ", "bad": "Be bad. "}
    for phrases, what in (
        ({"fine": "x"}, "names 'fine', and the values are: good, bad"),
        ({"bad": "<good> "}, "differ"),
    ):
        with pytest.raises(ValueError, match=what):
            ControlToken.Config(phrases=phrases)
    with pytest.raises(ValueError, match="one marker"):
        Coh.Config(good="x", bad="x")


# --------------------------------------------------------------------------------------------- chains of hindsight


def test_the_four_forms() -> None:
    """EOS is 2; the marker of the first answer is put in with the control, so it is not among the ids here."""
    row = {"id": "a", "prompt_ids": [1, 10], "chosen_ids": [20, 21, 2], "rejected_ids": [30, 2]}
    markers, ends = {"good": [40, 41], "bad": [50]}, frozenset({1, 2})
    made = {form: hindsight.sequence(row, form, markers, ends) for form in hindsight.FORMS}
    assert {form: (one["values"], one["completion_ids"], one["labels_mask"]) for form, one in made.items()} == {
        "good": ([0], [20, 21, 2], [0, 0, 1, 1, 1]),
        "bad": ([1], [30, 2], [0, 0, 1, 1]),
        "bad-good": ([1], [30, 40, 41, 20, 21, 2], [0, 0, 1, 0, 0, 1, 1, 1]),
        "good-bad": ([0], [20, 21, 50, 30, 2], [0, 0, 1, 1, 0, 1, 1]),
    }
    assert hindsight.length_of(made["bad-good"], markers) == 2 + 1 + 6


def test_the_form_hangs_on_seed_row_and_epoch_alone() -> None:
    found = [hindsight.form_of_row(0, f"r{i}", 0) for i in range(400)]
    assert found == [hindsight.form_of_row(0, f"r{i}", 0) for i in range(400)]
    # 100 each are expected, with a standard deviation of 8.7.
    assert all(60 < found.count(form) < 140 for form in hindsight.FORMS)
    assert found != [hindsight.form_of_row(0, f"r{i}", 1) for i in range(400)]
    assert found != [hindsight.form_of_row(1, f"r{i}", 0) for i in range(400)]
    assert {hindsight.form_of_row(0, f"r{i}", 0, short=True) for i in range(40)} == {"good", "bad"}
