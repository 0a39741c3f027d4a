"""A limit that takes a seeded draw: the same samples for every arm, each the very question that the whole set has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness import evaluate
from harness.report.read import open_run
from harness.tasks.draw import drawn

THEIRS = """\
task: t_draw
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: [good, bad]
doc_to_target: label
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
"""
OURS = """\
name: ours
dataset: {name: jsonl, options: {path: rows.jsonl, id: key}}
template: "{{ question }}"
leaf: "{{ kind }}"
target: good
decoding: {max_new_tokens: 2}
scorers: [{name: exact_match}]
"""


def test_a_draw_by_its_properties() -> None:
    """40 of 200: in order, no place twice; others of another seed or leaf task; a larger draw keeps them."""
    found = drawn(200, 40, "leaf", 0)
    assert found == sorted(set(found)) and len(found) == 40
    assert set(found) < set(drawn(200, 41, "leaf", 0))
    assert found != drawn(200, 40, "leaf", 1) and found != drawn(200, 40, "other", 0)
    assert drawn(3, 40, "leaf", 0) == [0, 1, 2]
    # Every place is drawn about equally often: of 2,000 draws of 5 of 20, 500 each; four standard errors are 78.
    counts = [0] * 20
    for seed in range(2000):
        for place in drawn(20, 5, "leaf", seed):
            counts[place] += 1
    assert all(abs(count - 500) < 78 for count in counts)


def test_the_same_questions_as_in_the_whole(alone: Path, tiny: Path) -> None:
    rows = [{"key": f"k{n}", "question": f"q {n}", "kind": "ab"[n % 2], "label": n % 2} for n in range(12)]
    folder = alone / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "theirs.yaml").write_text(THEIRS, encoding="utf-8")
    (folder / "ours.yaml").write_text(OURS, encoding="utf-8")

    def run(out: str, **more: Any) -> dict[str, dict[str, Any]]:
        options = {name: {"subset": "seeded"} for name in ("t_draw", "ours")}
        given = {"task_folders": [str(folder)], "engine": "transformers", "options": options, **more}
        evaluate(str(tiny), tasks=["t_draw", "ours"], out=alone / out, **given)
        return {
            task.name: {
                key: (row["values"], task.scores[0].asked([key])[key].prompt)
                for key, row in task.scores[0].samples.items()
            }
            for task in open_run(alone / out).tasks
        }

    whole, part, other = run("whole"), run("part", limit=3), run("other", limit=3, seed=1)
    assert list(part["t_draw"]) == [f"t_draw:{place}" for place in drawn(12, 3, "t_draw", 0)]
    notes = [task.scores[0].rows[0].notes for name in ("part", "whole") for task in open_run(alone / name).tasks]
    said = "of a seeded subset: at most 3 samples of each leaf task, drawn by seed 0"
    assert [said in one for one in notes] == [True, True, False, False]
    leaves = {leaf: [row["key"] for row in rows if row["kind"] == leaf] for leaf in "ab"}
    wanted = {leaves[leaf][place] for leaf in "ab" for place in drawn(6, 3, leaf, 0)}
    assert list(part["ours"]) == [row["key"] for row in rows if row["key"] in wanted]
    for name, samples in part.items():
        assert samples == {key: whole[name][key] for key in samples}
        assert samples.keys() != other[name].keys()
    # All is all, drawn or not: the same steps.
    ids = [task.answers.id for task in open_run(alone / "whole").tasks if task.answers is not None]
    plain = run("plain", options={})
    assert [task.answers.id for task in open_run(alone / "plain").tasks if task.answers is not None] == ids
    assert plain == whole
