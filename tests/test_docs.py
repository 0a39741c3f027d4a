"""What the README and the pages under docs/ say works: their commands exist with those options, their examples run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from harness.cli.app import app
from harness.contracts.registry import load_plugins

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


def blocks(language: str, text: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Page and every `harness ...` command line of it, continuation lines joined, comments and brackets dropped."""
    found = []
    for page, text in TEXTS.items():
        for block in [*blocks("console", text), *re.findall(r"`(harness [a-z][^`]+)`", text)]:
            for line in re.sub(r"\\?\n +", " ", block).splitlines():
                plain = re.split(r"\s#", line.removeprefix("$ "))[0].replace("...", "").strip()
                if plain.startswith("harness "):
                    found.append((page, re.sub(r"[\[\]]", " ", plain)))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_every_command_and_option_exists(page: str, line: str) -> None:
    words = shlex.split(line.split("&&")[0])[1:]
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert not words or not hasattr(command, "commands") or command.invoke_without_command, f"{line}: no such command"
    known = {option for parameter in command.params for option in parameter.opts}
    used = {word.split("=")[0] for word in words if word.startswith("--")}
    assert used <= known, f"{line}: {sorted(used - known)}"


def test_it_shows_commands() -> None:
    found = [page for page, _ in commands()]
    assert {page for page in TEXTS if found.count(page) >= 2} >= {
        "README.md",
        *(
            f"docs/{name}.md"
            for name in ("evaluating", "aligning", "merging", "judges", "serving", "studies", "plugins")
        ),
    }


@pytest.mark.parametrize("page", TEXTS)
def test_its_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_the_readme_is_short_and_names_every_page() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150
    assert [page for page in TEXTS if page.startswith("docs/") and page.split("/")[1] not in TEXTS["README.md"]] == [
        "docs/seams.md"
    ]


def example(needle: str) -> str:
    """The Python or YAML example that holds ``needle``."""
    text = "\n".join(TEXTS.values())
    return next(block for block in [*blocks("python", text), *blocks("yaml", text)] if needle in block)


def test_the_scorer_and_the_task_of_the_pages_run(tmp_path: Path, tiny: Path) -> None:
    import harness

    (tmp_path / "politeness.py").write_text(example("class Politeness"))
    task = example("name: capitals").replace("scorers: [", "scorers: [{name: politeness}, ")
    (tmp_path / "capitals.yaml").write_text(task)
    rows = [{"country": "France", "capital": "Paris"}, {"country": "Japan", "capital": "Tokyo"}]
    (tmp_path / "capitals.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    evaluation = harness.evaluate(
        str(tiny),
        tasks=[str(tmp_path / "capitals.yaml")],
        engine="transformers",
        out=tmp_path / "run",
        registry=load_plugins([tmp_path / "politeness.py"]),
    )
    assert {(row.scorer, row.metric, row.n) for row in evaluation.rows} == {
        ("politeness", "polite", 2),
        ("includes", "includes", 2),
    }
    assert list(evaluation.to_pandas()["task"]) == ["capitals", "capitals"]


def test_the_method_of_the_pages_loads_and_is_its_formula(tmp_path: Path) -> None:
    import torch

    from harness import Aligner, PairLogps

    (tmp_path / "simpo.py").write_text(example("class SimPO"))
    method = load_plugins([tmp_path / "simpo.py"]).find(Aligner, "simpo", "test")
    tokens = torch.tensor([2.0])
    pair = PairLogps(torch.tensor([-2.0]), torch.tensor([-6.0]), tokens, tokens)
    # margin = -1 - (-3) = 2; beta 0.1: -log sigmoid(0.2 - 0.5) = log(1 + e^0.3)
    assert float(method.loss(pair, None, method.Config())) == pytest.approx(0.854355, abs=1e-6)  # type: ignore[attr-defined]


def test_the_rows_of_the_pages_render() -> None:
    made: dict[str, type] = {}
    exec(example("class Weighed"), made)
    row = made["Weighed"](prompt="q", answer="a", weight=0.5)
    assert row.render() == {"prompt": "q", "completion": "a"}
    assert row.columns == ("weight",) and "weight" in made["Weighed"].model_fields  # type: ignore[attr-defined]
