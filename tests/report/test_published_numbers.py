"""The numbers of arXiv 2406.04879 that are shipped: those that it prints, and an arm of the study `paper` for each."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

from harness.core.config import load_yaml, parse
from harness.report.board.model import Board, BoardRow, Column
from harness.report.board.published import Published, match_published, shipped


def test_what_is_shipped_is_what_the_tables_hold() -> None:
    """Table 2 has 2 originals and 4 mixtures of 3 numbers; 3 has 5 merges of 2 bases; 4 and 5 have 32 and 16 arms."""
    found = parse(Published, load_yaml(shipped()["paper"]))
    counts = Counter(dict.fromkeys(("Table 2", "Table 3", "Table 4", "Table 5"), 0))
    for one in found.numbers:
        counts[one.table] += len(one.values)
    assert counts == {"Table 2": 6 * 3, "Table 3": 10 * 3, "Table 4": 32 * 4, "Table 5": 16 * 4}
    # Each win rate of 805 answers is k of at most 805, as the task's notes say of 51 of the paper's 58.
    rates = {one.values["alpaca_eval_paper"] for one in found.numbers if "alpaca_eval_paper" in one.values}
    whole = [rate for rate in rates if any(abs(round(rate * n / 100) * 100 / n - rate) < 6e-4 for n in range(801, 806))]
    assert len(whole) >= 0.85 * len(rates)
    assert any("exchanged" in note for note in found.notes) and any("56,168" in note for note in found.notes)


def test_a_merge_is_known_by_its_inputs() -> None:
    """Not by its name or its factors, which merges of SFT arms and of DPO arms share."""
    rows = [BoardRow(key="b", name="mistral", kind="base", base_name="mistral", factors={"method": "base"})]
    for method, data in itertools.product(("sft", "dpo"), ("bt-harmless", "bt-helpful")):
        factors = {"method": method, "data": data, "adapter": "qlora", "base": "mistral"}
        rows.append(
            BoardRow(key=method + data, name=f"{method}-{data}", kind="align", base_name="mistral", factors=factors)
        )
    merge = {"method": "slerp", "inputs": "bt-harmless+bt-helpful", "base": "mistral"}
    for method in ("sft", "dpo"):
        parents = (f"{method}-bt-helpful", f"{method}-bt-harmless")
        told = {"kind": "merge", "base_name": "mistral", "factors": merge, "parents": parents}
        rows.append(BoardRow(key=f"merge-{method}", name=f"merge-{method}", **told))
    rows.append(BoardRow(key="lost", name="lost", **{**told, "parents": ("dpo-bt-helpful", "not-here")}))
    # One that was trained on fewer rows is another arm.
    few = {**rows[1].factors, "samples": 1600}
    rows.append(BoardRow(key="few", name="few", kind="align", base_name="mistral", factors=few))
    common = {"variant": "raw", "scorer": "x", "primary": True}
    columns = (
        Column(
            key="r",
            label="r",
            task="real_toxicity",
            metric="toxicity_reward",
            unit="logit",
            higher_is_better=True,
            **common,
        ),
        Column(
            key="a",
            label="a",
            task="alpaca_eval_paper@j",
            metric="win",
            unit="proportion",
            higher_is_better=True,
            **common,
        ),
        Column(key="m", label="m", task="mmlu@0", metric="acc", unit="proportion", higher_is_better=True, **common),
    )
    matched = match_published(Path("paper"), Board(harness="0", title="t", rows=tuple(rows), columns=columns))
    found = {(one.row.name, one.column.key): (round(one.value, 6), one.table) for one in matched.found}
    assert found["merge-sft", "r"] == (-9.115, "Table 3")
    assert found["merge-dpo", "r"] == (1.604, "Table 3")
    # 7.721 per cent, as a share.
    assert found["merge-dpo", "a"] == (0.07721, "Table 3")
    assert found["mistral", "m"] == (0.590, "Table 2")
    assert found["sft-bt-harmless", "m"] == (0.583, "Table 4")
    assert not {"lost", "few"} & {name for name, _ in found}
    # 2 of the original; 3 of each of 4 arms; 2 of each merge, as Table 3 has BBH of this base, and no MMLU.
    assert len(found) == 2 + 3 * 4 + 2 * 2 and matched.without == 240 - len(found)


def test_the_page_s_example_is_a_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "publishing.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "numbers:" in block]
    (tmp_path / "theirs.yaml").write_text(example, encoding="utf-8")
    found = parse(Published, load_yaml(tmp_path / "theirs.yaml"))
    assert "invented" in found.source and [len(one.values) for one in found.numbers] == [1, 2, 1]
