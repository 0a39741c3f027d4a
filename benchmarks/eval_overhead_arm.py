"""One measured process of eval_overhead.py: runs an arm, and writes down what it spent where.

python eval_overhead_arm.py ARM MARKS_FILE ARGUMENTS...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def _noted(marks: dict[str, float], path: Path) -> Iterator[None]:
    """Write what was measured, however the process's main function ends."""
    try:
        yield
    finally:
        path.write_text(json.dumps(marks), encoding="utf-8")


def _timed(function: Callable[..., Any], name: str, marks: dict[str, float]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begun, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            marks[name] = marks.get(name, 0.0) + time.perf_counter() - begun
            marks[f"{name}_cpu"] = marks.get(f"{name}_cpu", 0.0) + time.process_time() - cpu

    return wrapper


def _imported(marks: dict[str, float]) -> None:
    marks["imports"] = time.time() - float(os.environ["BENCHMARK_STARTED"])


def child_harness(marks: dict[str, float], arguments: list[str]) -> None:
    """`harness eval`; the wall times of load and compute are what its own step records say."""
    import datasets  # noqa: F401
    import lm_eval.tasks  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from harness.cli.app import main
    from harness.evaluation import ask as generate
    from harness_plugins.engines.transformers.engine import TransformersEngine
    from harness_plugins.engines.transformers.session import TransformersSession

    _imported(marks)
    for name in ("batches", "run"):
        setattr(TransformersSession, name, _timed(getattr(TransformersSession, name), "engine", marks))
    TransformersEngine.open = _timed(TransformersEngine.open, "load", marks)  # type: ignore[method-assign]
    generate.answer = _timed(generate.answer, "answer", marks)
    sys.argv = ["harness", *arguments]
    try:
        main()
    finally:
        # The model is opened when the first answer is wanted.
        marks["compute_cpu"] = marks["answer_cpu"] - marks["load_cpu"]


def child_lm_eval(marks: dict[str, float], arguments: list[str]) -> None:
    """lm-eval's command line, its hf model's constructor and its three questions timed."""
    import datasets  # noqa: F401
    import lm_eval.evaluator
    import lm_eval.tasks  # noqa: F401
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.models.huggingface import HFLM

    _imported(marks)
    HFLM.__init__ = _timed(HFLM.__init__, "load", marks)
    for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(HFLM, name, _timed(getattr(HFLM, name), "compute", marks))
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


def child_raw(marks: dict[str, float], arguments: list[str]) -> None:
    """The requests that a run folder holds, task by task, through the transformers engine."""
    run, model, dtype, device = arguments
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from harness import Request
    from harness.core.specs import Decoding, ModelSpec
    from harness.models.inspect import inspect_model
    from harness.steps.journal import read_rows
    from harness_plugins.engines.transformers.engine import TransformersEngine

    _imported(marks)
    engine = TransformersEngine()
    begun = time.perf_counter()
    info = inspect_model(ModelSpec.model_validate({"model": model, "dtype": dtype}))
    session = engine.open(info, [], engine.Config.model_validate({"device": device}))
    marks["load"] = time.perf_counter() - begun
    lists = []
    for file in sorted(Path(run, "requests").glob("*.gz")):
        asked = [request for row in read_rows(file) for request in row["requests"]]
        lists.append(
            [
                Request(
                    one["kind"],
                    tuple(one["prompt_ids"]),
                    tuple(one["continuation_ids"]),
                    decoding=Decoding.model_validate(one["decoding"]) if one["decoding"] else None,
                )
                for one in asked
            ]
        )

    def compute() -> None:
        for requests in lists:
            for batch in session.batches(requests):
                session.run([requests[index] for index in batch])

    _timed(compute, "compute", marks)()
    session.close()


CHILDREN = {"harness": child_harness, "lm_eval": child_lm_eval, "raw": child_raw}


if __name__ == "__main__":
    found: dict[str, float] = {}
    with _noted(found, Path(sys.argv[2])):
        CHILDREN[sys.argv[1]](found, sys.argv[3:])
