"""lm-eval's tasks on our engines: their code builds the prompts and computes the metrics, one open engine answers.

The requests are collected by a ``TemplateLM``, so prompts, BOS and context handling are lm-eval's own; the answers go
back into lm-eval's instances, through its filters and its ``process_results``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.core.records import SHARE_RESOLUTION, Answer, Metric, ModelInfo, Sample
from harness.core.specs import PromptKind
from harness.tasks.catalog import Chosen
from harness.tasks.draw import drawn
from harness.tasks.lm_eval.collect import collector
from harness.tasks.lm_eval.load import compiled_once, load, quiet

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

LM_EVAL_SEEDS = (0, 1234, 1234)
"""lm-eval's own defaults for random, numpy and few-shot choice; ``--seed N`` is added to each."""
_OPTION = re.compile(r"\([A-Z]\)")
LETTER = re.compile(r"[A-Z]")
"""A target that is the bare letter of an option."""
_LISTED = re.compile(r"^([A-Z])\. ", re.MULTILINE)


@dataclass
class Item:
    """One document of a leaf task: its instances and where their outputs lie among the sample's requests."""

    leaf: str
    task: Task
    doc_id: int
    doc: Any
    instances: list[Instance]
    spans: list[list[range]] = field(default_factory=list)
    """per instance, per repeat: positions in ``Sample.requests`` (several for a rolling log-likelihood)"""


@dataclass(frozen=True)
class LmEvalVerdict:
    """lm-eval's verdict on one document."""

    metrics: dict[str, dict[str, Any]]
    """filter name -> metric name -> per-document value"""
    extracted: dict[str, str]
    """filter name -> what it extracted from a generated text ("" for log-likelihoods)"""


@dataclass
class LmEvalRuntime:
    """An open task or group of lm-eval: samples to answer, and lm-eval's own scoring."""

    samples: list[Sample]
    items: list[Item]

    @compiled_once()
    def process(self, answers: Sequence[Answer]) -> list[LmEvalVerdict]:
        """Run lm-eval's filters and metrics.

        Args:
            answers: one per sample, in order; none of them an error.
        """
        answered = {id(item): answer for item, answer in zip(self.items, answers, strict=True)}
        results: dict[int, LmEvalVerdict] = {}
        for _, items in _by_task(self.items):
            task = items[0].task
            instances = [instance for item in items for instance in item.instances]
            for item in items:
                _give(item, answered[id(item)])
            # The task's own list, narrowed to what was answered: filters run over exactly these.
            task._instances = instances
            task.apply_filters()
            for item in items:
                ordered = sorted(item.instances, key=lambda instance: instance.idx)
                filters = list(ordered[0].filtered_resps)
                results[id(item)] = LmEvalVerdict(
                    {
                        name: dict(task.process_results(item.doc, [one.filtered_resps[name] for one in ordered]))
                        for name in filters
                    },
                    {name: _text_of(ordered[0].filtered_resps[name]) for name in filters},
                )
        return [results[id(item)] for item in self.items]

    def narrowed(self, keep: Sequence[bool]) -> LmEvalRuntime:
        """The same task with only some of its samples."""
        pairs = [(s, i) for s, i, kept in zip(self.samples, self.items, keep, strict=True) if kept]
        return LmEvalRuntime([s for s, _ in pairs], [i for _, i in pairs])

    def metrics(self) -> dict[str, tuple[bool | None, Callable[[list[Any]], float]]]:
        """Per metric name: direction, and lm-eval's aggregation over documents."""
        found: dict[str, tuple[bool | None, Callable[[list[Any]], float]]] = {}
        for item in self.items:
            directions, aggregations = item.task.higher_is_better(), item.task.aggregation()
            for name, aggregate in aggregations.items():
                found.setdefault(name, (directions.get(name), aggregate))
        return found


def _text_of(response: Any) -> str:
    if isinstance(response, list | tuple):
        response = response[0] if response else ""
    return response if isinstance(response, str) else ""


def _by_task(items: Sequence[Item]) -> Iterator[tuple[str, list[Item]]]:
    grouped: dict[str, list[Item]] = {}
    for item in items:
        grouped.setdefault(item.leaf, []).append(item)
    yield from grouped.items()


def _give(item: Item, answer: Answer) -> None:
    """Put the stored outputs into lm-eval's instances, as its own models return them."""
    for instance, repeats in zip(item.instances, item.spans, strict=True):
        instance.resps = []
        instance.filtered_resps = {}
        for span in repeats:
            outputs = [answer.outputs[position] for position in span]
            if instance.request_type == "loglikelihood":
                instance.resps.append((outputs[0].logprob, bool(outputs[0].is_greedy)))
            elif instance.request_type == "loglikelihood_rolling":
                instance.resps.append(sum(output.logprob or 0.0 for output in outputs))
            else:
                instance.resps.append(outputs[0].text)


@compiled_once()
def open_task(
    chosen: Chosen, variant: PromptKind, model: ModelInfo, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> LmEvalRuntime:
    """Load an lm-eval task or group and build every sample's requests.

    Without a tokenizer they are conversations, for an endpoint that takes them as they are.

    Raises:
        UserError: unknown task, data that cannot be loaded, a chat variant without a template.
    """
    import numpy as np

    ref = chosen.spec.lm_eval
    assert ref is not None
    random.seed(LM_EVAL_SEEDS[0] + seed)
    np.random.seed(LM_EVAL_SEEDS[1] + seed)
    tasks = load(chosen)
    asked = collector(model, tokenizer, ref.max_new_tokens)
    samples: list[Sample] = []
    items: list[Item] = []
    for name, task in sorted(tasks.items()):
        _set_shots(task, ref.num_fewshot)
        task.set_fewshot_seed(seed=LM_EVAL_SEEDS[2] + seed)
        places = None
        if chosen.limit is not None and chosen.spec.subset == "seeded":
            places = drawn(len(task.eval_docs), chosen.limit, name, seed)
        with quiet():
            task.build_all_requests(
                limit=chosen.limit if places is None else None,
                samples=places,
                system_instruction=chosen.spec.system,
                apply_chat_template=variant == "chat",
                fewshot_as_multiturn=variant == "chat",
                chat_template=asked.apply_chat_template if variant == "chat" else None,
                tokenizer_name=asked.tokenizer_name if variant == "chat" else "",
            )
        leaf = name if len(tasks) > 1 else None
        guess = _guessing(task) if ref.flexible else None
        for item in _items(name, task, places):
            asked.collect(item)
            items.append(item)
            samples.append(_sample(item, leaf, asked, guess))
    return LmEvalRuntime(samples, items)


def _items(name: str, task: Task, places: Sequence[int] | None) -> Iterator[Item]:
    """Documents with their instances; lm-eval numbers those of a draw from 0 on, and here each keeps its own number."""
    grouped: dict[int, Item] = {}
    for instance in task.instances:
        item = grouped.get(instance.doc_id)
        if item is None:
            own = instance.doc_id if places is None else places[instance.doc_id]
            item = grouped[instance.doc_id] = Item(name, task, own, instance.doc, [])
        item.instances.append(instance)
    yield from grouped.values()


def _guessing(task: Task) -> Callable[[str, str], float]:
    """Expected exact match of guessing among the answers that a question of BBH or MMLU allows.

    Lettered options ("(A)" after "Options:", "A. " in front of lines): one over their number in the question. At most
    three different answers in the whole file (yes/no, True/False, valid/invalid): one over that number. Open answers
    (a number, a sorted list): 0.
    """
    targets = {str(task.doc_to_target(doc)).strip() for doc in task.eval_docs}
    lettered = all(_OPTION.fullmatch(target) for target in targets)
    bare = all(LETTER.fullmatch(target) for target in targets)

    def chance(prompt: str, target: str) -> float:
        if bare and (listed := set(_LISTED.findall(prompt))):
            return 1 / len(listed)
        if lettered and (options := set(_OPTION.findall(prompt.rsplit("Options:", 1)[-1]))):
            return 1 / len(options)
        return 1 / len(targets) if len(targets) <= 3 else 0.0

    return chance


def _sample(item: Item, leaf: str | None, collector: Any, guess: Callable[[str, str], float] | None = None) -> Sample:
    requests, cut = collector.take()
    first = item.instances[0]
    target = item.task.doc_to_target(item.doc)
    choices = getattr(item.task, "doc_to_choice", None) if first.request_type == "loglikelihood" else None
    names = list(choices(item.doc)) if choices is not None and item.task.config.doc_to_choice is not None else []
    if names and isinstance(target, int) and 0 <= target < len(names):
        target = names[target]
    chance = 1 / len(names) if names else None
    if guess is not None and not names:
        chance = guess(str(first.args[0]), str(target))
    return Sample(
        id=f"{item.leaf}:{item.doc_id}",
        requests=tuple(requests),
        prompt=str(first.args[0]),
        target=str(target),
        leaf=leaf,
        data={"choices": names} if names else {},
        cut=cut,
        chance=chance,
    )


def _set_shots(task: Task, shots: int | None) -> None:
    """As lm-eval's ``simple_evaluate``: a task that fixes 0 shots keeps them, an undeclared number is 0."""
    own = task.get_config("num_fewshot")
    if shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif shots is None and own is None:
        task.set_config(key="num_fewshot", value=0)


def lm_eval_metric(name: str, direction: bool | None, corpus: bool) -> Metric:
    """An lm-eval metric in our terms."""
    bounded = name.startswith(("acc", "exact_match", "f1", "likelihood"))
    return Metric(
        name=name,
        higher_is_better=direction,
        unit="proportion" if bounded else "score",
        low=0.0 if bounded else None,
        high=1.0 if bounded else None,
        resolution=SHARE_RESOLUTION if bounded else None,
        aggregate="corpus" if corpus else "mean",
    )
