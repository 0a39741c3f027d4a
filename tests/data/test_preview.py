"""`harness data`: the list, and rows as training sees them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from harness.cli.app import app
from harness.contracts.registry import load_plugins
from harness.core.errors import UserError
from harness.data import preview as show
from harness.testing import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("tiny")))


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"jsonl:{path}"


def rows(count: int, **change: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "chosen": "well \x1b[31mred", "rejected": f"no {n}"} | change for n in range(count)
    ]


def printed(shown: show.Shown, *, colour: bool, mask: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=colour, color_system="standard" if colour else None)
    for part in [*show.samples(shown, 2, mask=mask), *show.summary(shown)]:
        console.print(part, highlight=False, soft_wrap=True)
    return out.getvalue()


def test_rows_ids_and_mask(model: str, tmp_path: Path) -> None:
    dataset = lines(tmp_path / "rows.jsonl", *rows(30), *rows(2, chosen=None))
    shown = show.look(dataset, model, registry=load_plugins(), template="vicuna", rows=2)
    text = printed(shown, colour=False, mask=True)
    first = shown.tokenised.rows[0]
    # Every run of tokens with loss stands between « and », as text and as ids.
    assert "ASSISTANT:« well ⟨U+001B⟩[31mred</s>»" in text
    assert f"«{' '.join(map(str, first['chosen_ids']))}»" in text
    assert f"{' '.join(map(str, first['prompt_ids']))} «" in text
    assert "\x1b" not in text
    assert "no chosen" in text
    counts = shown.selection.counts["jsonl:rows.jsonl"]
    assert (counts["rows"], counts["dropped"], counts["usable"]) == (32, 2, 30)
    assert f"template: vicuna {shown.template.digest[:12]}" in text
    assert "«" not in printed(shown, colour=False, mask=False)
    # bold green for loss, dim for none
    coloured = printed(shown, colour=True, mask=True)
    assert "\x1b[1;32m« well" in coloured
    assert "\x1b[2m<s>A chat" in coloured


def test_demonstrations_with_all_answers(model: str, tmp_path: Path) -> None:
    turns = [{"role": role, "content": said} for role, said in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    chats = [{"messages": [*turns, {"role": "assistant", "content": f"d{n}"}]} for n in range(40)]
    dataset = lines(tmp_path / "rows.jsonl", *({**chat, "id": str(n)} for n, chat in enumerate(chats)))
    options = {"loss_on": "all_answers"}
    # One prompt for all: by its hash all rows are held out or none is.
    shown = show.look(dataset, model, registry=load_plugins(), template="mistral", options=options)
    text = printed(shown, colour=False, mask=True)
    assert "[INST] a [/INST]« b</s>»[INST] c [/INST]« d" in text
    assert "No row was left out." in text


def test_odd_requests(model: str, tmp_path: Path) -> None:
    dataset = lines(tmp_path / "rows.jsonl", *rows(30))
    with pytest.raises(UserError, match="--samples: 0 is no positive number"):
        show.look(dataset, model, registry=load_plugins(), rows=0)
    with pytest.raises(UserError, match="its rows are pairs, and nonsense are needed"):
        show.look(dataset, model, registry=load_plugins(), options={"schema": "nonsense"})


def test_the_command_line(model: str, tmp_path: Path) -> None:
    dataset = lines(tmp_path / "rows.jsonl", *rows(30))
    done = CliRunner().invoke(
        app, ["data", "show", dataset, "--model", model, "--template", "vicuna", "--samples", "1"]
    )
    assert done.exit_code == 0, done.output
    assert done.output.count("prompt + chosen") == 1
    listed = CliRunner().invoke(app, ["data", "list", "--json"])
    by_name = {row["name"]: row for row in json.loads(listed.output)}
    assert by_name["hh-rlhf"]["subsets"] == ["harmless", "helpful"]
    assert by_name["beavertails"]["revision"] == "v0"
    assert by_name["trl"]["schema"] == "by its columns"
    assert by_name["summarize"]["schema"] == "pairs"
    plain = CliRunner().invoke(app, ["data", "list"])
    assert "openai/summarize_from_feedback" in plain.output
