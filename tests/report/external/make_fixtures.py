"""Makes what lies under fixtures/: logs written by lm-eval and inspect themselves, on rows made up here.

    HARNESS_SHARED=FOLDER python tests/report/external/make_fixtures.py lm-eval     # needs its tiny models
    python tests/report/external/make_fixtures.py inspect                           # needs harness-align[inspect]

Each part replaces its folder. Afterwards only what names the machine is taken out of the files (`pretty_env_info`, and
of inspect the working folder); every number, hash and text is as the program wrote it.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
COLOURS = {"grass": "green", "snow": "white", "coal": "black", "a ripe tomato": "red", "the clear sky": "blue"}
ANIMALS = {"dog": "barks", "cat": "meows", "cow": "moos", "duck": "quacks", "lion": "roars"}


def rows(pairs: dict[str, str], question: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions with four options each, in an order of their own."""
    drawn = random.Random(seed)
    made = []
    for index in range(count):
        key = drawn.choice(sorted(pairs))
        others = drawn.sample(sorted(set(pairs.values()) - {pairs[key]}), 3)
        options = drawn.sample([pairs[key], *others], 4)
        made.append(
            {"question": f"{index + 1}. {question.format(key)}", "options": options, "right": options.index(pairs[key])}
        )
    return made


CHOICE_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GENERATE_YAML = """\
task: toy_words
dataset_path: json
dataset_kwargs: {data_files: {test: toy_words.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}} (one of {{options | join(', ')}})\\nAnswer:"
doc_to_target: "{{options[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: '^\\s*(\\w+)'}, {function: take_first}]
  - name: flexible
    filter: [{function: regex, regex_pattern: '(green|white|black|red|blue)'}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
metadata: {version: 2.0}
"""
GROUP_YAML = """\
group: toys
task: [toy_colours, toy_animals]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
  - {metric: acc_norm, weight_by_size: false}
metadata: {version: 1.0}
"""


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """An empty folder to work in, so that what the programs write of paths is relative."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def make_lm_eval() -> None:
    """Two models, two groups of questions and a generated answer, with and without samples."""
    models = Path(os.environ["HARNESS_SHARED"]) / "models"
    shutil.rmtree(FIXTURES / "lm_eval", ignore_errors=True)
    with working_folder() as here:
        os.environ["HF_DATASETS_CACHE"] = str(here / "cache")
        import lm_eval
        from lm_eval.loggers import EvaluationTracker
        from lm_eval.tasks import TaskManager

        for name in ("tiny-base", "tiny-instruct"):
            (here / name).symlink_to(models / name)
        data = {
            "toy_colours": rows(COLOURS, "What colour is {}?", 24, 1),
            "toy_animals": rows(ANIMALS, "What does a {} do?", 12, 2),
            "toy_words": rows(COLOURS, "What colour is {}?", 20, 3),
        }
        for task, made in data.items():
            Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
            Path(f"{task}.yaml").write_text(GENERATE_YAML if task == "toy_words" else CHOICE_YAML.format(name=task))
        Path("toys.yaml").write_text(GROUP_YAML)
        manager = TaskManager(include_path=".", include_defaults=False)
        runs: dict[str, dict[str, Any]] = {
            "base": {"model": "tiny-base", "tasks": ["toys", "toy_words"]},
            "instruct": {"model": "tiny-instruct", "tasks": ["toys", "toy_words"]},
            "instruct_limit": {"model": "tiny-instruct", "tasks": ["toys"], "limit": 10},
            "instruct_fewshot": {"model": "tiny-instruct", "tasks": ["toys"], "num_fewshot": 2},
            "instruct_means": {"model": "tiny-instruct", "tasks": ["toy_words"], "log_samples": False},
        }
        for out, asked in runs.items():
            tracker = EvaluationTracker(output_path=out)
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args=f"pretrained={asked.pop('model')},dtype=float32",
                task_manager=manager,
                evaluation_tracker=tracker,
                bootstrap_iters=100,
                device="cpu",
                batch_size=8,
                **{"log_samples": True, **asked},
            )
            samples = found.pop("samples", None)
            tracker.save_results_aggregated(results=found, samples=samples)
            for task in samples or ():
                tracker.save_results_samples(task_name=task, samples=samples[task])
            for file in sorted(Path(out).rglob("*.json*")):
                target = FIXTURES / "lm_eval" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                text = file.read_text()
                if file.name.startswith("results_"):
                    results = json.loads(text)
                    results["pretty_env_info"] = "taken out"
                    text = json.dumps(results, indent=2, ensure_ascii=False)
                target.write_text(text.replace(str(here.resolve()), "."))


def make_inspect() -> None:
    """Two models on one task in three epochs, with errors and answers without a score; and a log that broke off."""
    shutil.rmtree(FIXTURES / "inspect", ignore_errors=True)
    with working_folder() as here:
        from inspect_ai import Epochs, Task, eval as evaluate
        from inspect_ai.dataset import Sample
        from inspect_ai.model import ModelOutput, ModelUsage, get_model
        from inspect_ai.scorer import Score, Target, accuracy, mean, scorer, stderr
        from inspect_ai.solver import TaskState, generate, system_message

        @scorer(metrics=[accuracy(), stderr()])
        def grade() -> Any:
            async def score(state: TaskState, target: Target) -> Score:
                text = state.output.completion
                if "unreadable" in text:
                    return Score.unscored(reason="grader_failed", explanation="no grade in the reply")
                letter = "C" if target.text in text else "P" if "perhaps" in text else "N" if not text else "I"
                return Score(value=letter, answer=text)

            return score

        @scorer(metrics={"length": [mean()], "polite": [accuracy(), stderr()]})
        def style() -> Any:
            async def score(state: TaskState, target: Target) -> Score:
                text = state.output.completion
                return Score(value={"length": len(text), "polite": "please" in text})

            return score

        made = rows(COLOURS, "What colour is {}?", 16, 4)
        dataset = [
            Sample(id=f"q{n}", input=row["question"], target=row["options"][row["right"]]) for n, row in enumerate(made)
        ]

        targets = {sample.input: sample.target for sample in dataset}

        def output(text: str) -> Any:
            # Without a count of its own the provider counts tokens with a vocabulary from the network.
            made = ModelOutput.from_content("mockllm/model", text)
            made.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
            return made

        def answers(seed: int, right: float) -> Any:
            """Answers by chance: right at this rate, sometimes half right; the sixth of all cannot be graded."""
            drawn = random.Random(seed)
            given: list[str] = []

            def answer(messages: list[Any], *_: Any) -> Any:
                kind = drawn.random()
                target = targets[messages[-1].content]
                text = f"{target}, please" if kind < right else "perhaps" if kind < right + 0.1 else "purple"
                given.append("unreadable" if len(given) == 5 else text)
                return output(given[-1])

            return answer

        def task(name: str, epochs: Epochs, *steps: Any) -> Task:
            return Task(
                name=name, dataset=dataset, solver=[*steps, generate()], scorer=[grade(), style()], epochs=epochs
            )

        def run(folder: str, task: Task, outputs: Any, model: str, **options: Any) -> None:
            evaluate(
                task,
                model=get_model(f"mockllm/{model}", custom_outputs=outputs),
                log_dir=folder,
                max_samples=1,
                max_connections=1,
                display="none",
                **options,
            )

        once, thrice = Epochs(1), Epochs(3, "mean")
        for model, seed, right in (("small", 1, 0.4), ("large", 2, 0.7)):
            run(f"{model}", task("colours", thrice), answers(seed, right), model, log_format="json")
            run(f"{model}_once", task("colours", once), answers(seed, right), model, log_format="eval")

        def failing(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("the endpoint went away")
            return output("green, please")

        calls: list[int] = []
        run("errors", task("colours", once), failing, "large", fail_on_error=False, log_format="json")
        calls.clear()
        with contextlib.suppress(Exception):
            run("broken_off", task("colours", once), failing, "large", log_format="json")
        run("system", task("colours", once, system_message("Be brief.")), answers(2, 0.7), "large", log_format="json")
        run("max_reducer", task("colours", Epochs(3, "max")), answers(2, 0.7), "large", log_format="json")
        run("no_samples", task("colours", once), answers(2, 0.7), "large", log_format="json", log_samples=False)
        for file in sorted(here.rglob("*.json")) + sorted(here.rglob("*.eval")):
            target = FIXTURES / "inspect" / f"{file.parent.name}{file.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".eval":
                shutil.copy(file, target)
                continue
            log = json.loads(file.read_text())
            for sample in log.get("samples") or ():
                # What no reader looks at, and is most of the file.
                sample.update(events=[], attachments={}, store={}, error_retries=[])
                if sample.get("error"):
                    sample["error"].update(traceback="taken out", traceback_ansi="taken out")
            if log.get("error"):
                log["error"].update(traceback="taken out", traceback_ansi="taken out")
            target.write_text(json.dumps(log, indent=1).replace(str(here.resolve()), "."))


if __name__ == "__main__":
    makers = {"lm-eval": make_lm_eval, "inspect": make_inspect}
    for part in sys.argv[1:] or makers:
        makers[part]()
