"""What the steps of a study take by the size of what they load and read, where none like them has been recorded.

Figures err towards more: rows are as long as they may be, answers too. Each says what it assumes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.alignment.plan import AlignPlan, needs_reference
from harness.contracts.adapter import Adapter
from harness.core.config import Config
from harness.core.records import ModelInfo
from harness.core.specs import TaskSpec
from harness.data.row_schema import form_of
from harness.evaluation.plan import ArmPlan, EvalPlan, ScoresPlan, TaskPlan
from harness.steps.step import Step
from harness.study.card import GIB, UTILISATION, Card
from harness.study.plan import Promise, StudyPlan
from harness.study.sizes import BYTES, GRADIENT_AND_STATES, ModelSize, measure

PROMPT_TOKENS = 512
"""Of a prompt whose length is not known before its task is opened: our assumption."""
TERA = 1e12


@dataclass(frozen=True)
class Estimate:
    """What one step takes; None: not known."""

    source: str = "nothing"
    """records, size, or nothing."""
    seconds: float | None = None
    gpu_seconds: float | None = None
    device_bytes: int | None = None
    rss_bytes: int | None = None
    disk_bytes: int | None = None
    usd: float | None = 0.0
    calls: int | None = 0
    """Of a judge: one for each answer, retries not counted."""
    device: str | None = None
    assumed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peak:
    """Memory of one step on its GPU (bytes)."""

    certain: int
    """That it cannot do without: weights, and gradients of what is trained. AdamW's moments are not among them, as
    the optimiser on a GPU is paged and may lie in the host's memory (arXiv 2305.14314, section 3)."""
    likely: int
    """With moments and activations."""
    formula: str


@dataclass
class Sized:
    """The steps of a plan, and what decides their size."""

    plan: StudyPlan
    card: Card | None
    bases: dict[str, str] = field(default_factory=dict)
    """Key of a step -> name of its base."""
    uses: Counter[str] = field(default_factory=Counter)
    """Key of a step -> how many arms need it."""
    limits: dict[str, int | None] = field(default_factory=dict)
    """Key of a scores step -> limit of the answers."""
    made: dict[str, Promise] = field(default_factory=dict)
    answered: dict[str, tuple[EvalPlan, ArmPlan, TaskPlan]] = field(default_factory=dict)
    scored: dict[str, tuple[ScoresPlan, TaskPlan]] = field(default_factory=dict)
    _sizes: dict[str, ModelSize | None] = field(default_factory=dict)
    _engines: dict[int, int] = field(default_factory=dict)
    _peaks: dict[Any, Peak | None] = field(default_factory=dict)

    def size(self, model: ModelInfo) -> ModelSize | None:
        """Of a model; read once."""
        if model.path not in self._sizes:
            self._sizes[model.path] = measure(model)
        return self._sizes[model.path]

    # ---------------------------------------------------------------------------------------------------- one step

    def estimate(self, step: Step) -> Estimate:
        """What a step takes by its size."""
        if (promise := self.made.get(step.id)) is not None:
            if promise.align is not None:
                return self._align(promise.align)
            return Estimate(disk_bytes=self.checkpoint_bytes(promise), assumed=("time of merges: no record",))
        if step.id in self.answered:
            return self._answers(*self.answered[step.id])
        if step.id in self.scored:
            return self._scores(*self.scored[step.id])
        return Estimate(assumed=(f"{step.kind}: no record",))

    def _seconds(self, operations: Mapping[str, float]) -> float | None:
        if self.card is None or self.card.tflops is None:
            return None
        return sum(many / (self.card.tflops * TERA * UTILISATION[what]) for what, many in operations.items())

    def _align(self, plan: AlignPlan) -> Estimate:
        size = self.size(plan.model)
        if size is None:
            return Estimate()
        trained = self._trained(plan, size)
        operations = 0.0
        assumed = []
        for stage in plan.stages:
            recipe = stage.recipe
            rows = recipe.steps * recipe.batch_size
            answers = 2 if form_of(stage.schema) == "pairs" else 1
            tokens = rows * answers * recipe.max_length
            adapter = trained if plan.spec.adapter != "none" else None
            per_token = size.training(recipe.max_length, adapter, recomputed=recipe.gradient_checkpointing)
            reference = size.forward(recipe.max_length) if needs_reference(plan, stage) else 0.0
            operations += tokens * (per_token + reference)
            assumed.append(f"at most: every row has max_length={recipe.max_length} tokens")
        seconds = self._seconds({"training": operations})
        peak = self._peak_align(plan)
        copies = 1 + len(plan.spec.checkpoints)
        written = size.weight_bytes(plan.spec.model.dtype) if plan.spec.adapter == "none" else 4 * trained
        return Estimate(
            source="size" if seconds is not None else "nothing",
            seconds=seconds,
            gpu_seconds=seconds * plan.spec.processes if seconds is not None else None,
            device_bytes=peak.likely if peak is not None else None,
            disk_bytes=copies * written,
            assumed=tuple(dict.fromkeys(assumed)) if seconds is not None else (),
        )

    def _trained(self, plan: AlignPlan, size: ModelSize) -> int:
        """Weights that are trained; of an adapter that does not say its shape at least none."""
        if plan.spec.adapter == "none":
            return size.parameters
        options = plan.adapter_options
        return size.adapter(getattr(options, "targets", ()), getattr(options, "rank", 0))

    def _answers(self, evaluation: EvalPlan, arm: ArmPlan, task: TaskPlan) -> Estimate:
        size = self.size(arm.model)
        if size is None:
            return Estimate(assumed=("an endpoint's own time",))
        samples, said = samples_of(task.chosen.spec, task.chosen.limit)
        peak = self._peak_answers(evaluation, arm)
        device = peak.likely if peak is not None else None
        if samples is None:
            return Estimate(device_bytes=device, assumed=(f"{task.name}: its size is not stated",))
        new = task.chosen.spec.decoding.max_new_tokens
        if task.chosen.spec.needs == ("loglikelihood",):
            # Multiple choice: each choice is read after the same prompt.
            new = 0
        if task.chosen.spec.lm_eval is not None and new:
            new = task.chosen.spec.lm_eval.max_new_tokens or new
        context = min(PROMPT_TOKENS + new, arm.model.max_length)
        each = size.forward(context)
        seconds = self._seconds({"reading": samples * PROMPT_TOKENS * each, "writing": samples * new * each})
        return Estimate(
            source="size" if seconds is not None else "nothing",
            seconds=seconds,
            gpu_seconds=seconds * self._devices(evaluation) if seconds is not None else None,
            device_bytes=device,
            assumed=(f"prompts of {PROMPT_TOKENS} tokens; answers as long as they may be", *said)
            if seconds is not None
            else (),
        )

    def _scores(self, scores: ScoresPlan, task: TaskPlan) -> Estimate:
        judge = _judge_of(scores.scorer.config)
        if judge is None:
            return Estimate(assumed=(f"scorer {scores.ref.name}: no record",))
        samples, said = samples_of(task.chosen.spec, task.chosen.limit)
        if not judge.priced or samples is None:
            why = "no prices are stated (price_input, price_output)" if not judge.priced else "its size is not stated"
            return Estimate(usd=None, calls=samples, assumed=(f"judge of {task.name}: {why}",))
        prompt = PROMPT_TOKENS + 2 * task.chosen.spec.decoding.max_new_tokens
        usd = judge.price(samples * prompt, samples * judge.max_new_tokens)
        capped = f"; at most max_cost={judge.max_cost:g} USD over the whole run" if judge.max_cost is not None else ""
        told = f"judge of {task.name}: one question of {prompt} tokens a sample, replies as long as they may be{capped}"
        return Estimate(usd=usd, calls=samples, assumed=(told, *said))

    def checkpoint_bytes(self, promise: Promise) -> int:
        """Size of the file that a merge leaves (bytes)."""
        size, merge = self.size(promise.model), promise.arm.merge
        if size is None or merge is None:
            return 0
        if merge.form == "adapter":
            return 4 * size.adapter([name for name, _, _ in size.modules], 1) * (merge.rank or 0)
        stored = promise.model.dtype or "bfloat16"
        dtype = merge.dtype if merge.dtype != "auto" else stored
        return size.parameters * BYTES.get(dtype, 2)

    # ------------------------------------------------------------------------------------------------------- memory

    def _dtype(self, base: str, here: str, there: str) -> str:
        """The type of a base's weights: as planned here; where ``auto`` is asked and a card named, as that has it."""
        spec = self.plan.read.spec.bases.get(base)
        return there if self.card is not None and spec is not None and spec.dtype == "auto" else here

    def _devices(self, evaluation: EvalPlan) -> int:
        """GPUs of an engine; where a card is named at least one, although there may be none here."""
        if id(evaluation) not in self._engines:
            self._engines[id(evaluation)] = evaluation.engine.devices(evaluation.engine_options)
        devices = self._engines[id(evaluation)]
        return max(1, devices) if self.card is not None and not evaluation.engine.remote else devices

    def peak(self, step: Step) -> Peak | None:
        """Memory that a step takes on one GPU; None: none, or not known."""
        promise = self.made.get(step.id)
        if promise is not None:
            return self._peak_align(promise.align) if promise.align is not None else None
        return self._peak_answers(*self.answered[step.id][:2]) if step.id in self.answered else None

    def _peak_align(self, plan: AlignPlan) -> Peak | None:
        recipe = plan.stages[-1].recipe
        options = plan.adapter_options
        key = plan.model.path, plan.spec.adapter, str(options), recipe.micro_batch_size, recipe.max_length
        if key not in self._peaks:
            self._peaks[key] = self._peak_of_align(plan)
        return self._peaks[key]

    def _peak_of_align(self, plan: AlignPlan) -> Peak | None:
        size = self.size(plan.model)
        if size is None:
            return None
        recipe, dtype = plan.stages[-1].recipe, self._dtype(plan.model.name, plan.spec.model.dtype, "bfloat16")
        # What an adapter quantises to is known once transformers is imported; no known way takes less than NF4.
        nf4, whole = type(plan.adapter).quantization is not Adapter.quantization, plan.spec.adapter == "none"
        weights, trained = size.weight_bytes(dtype, nf4=nf4), self._trained(plan, size)
        own = trained * (BYTES[dtype] if whole else 4)
        # The weights of an adapter come on top; of a whole model they are the weights.
        certain = weights + own + (0 if whole else own)
        rows = recipe.micro_batch_size * (2 if form_of(plan.stages[-1].schema) == "pairs" else 1)
        kept = size.activations(rows, recipe.max_length, recomputed=recipe.gradient_checkpointing)
        least = f"{weights / GIB:.1f} GB of weights ({'nf4 and ' if nf4 else ''}{dtype})"
        return Peak(
            certain,
            certain + trained * (GRADIENT_AND_STATES - 4) + kept,
            f"{least} + {(certain - weights) / GIB:.1f} GB of what is trained and its gradients",
        )

    def _peak_answers(self, evaluation: EvalPlan, arm: ArmPlan) -> Peak | None:
        devices = self._devices(evaluation)
        key = "answers", arm.model.path, str(evaluation.spec.model.dtype), devices
        if key not in self._peaks:
            stored = arm.model.dtype or "bfloat16"
            size, dtype = self.size(arm.model), self._dtype(evaluation.model.name, evaluation.spec.model.dtype, stored)
            if size is None or dtype not in BYTES:
                return None
            # `eval_base: nf4` has the base in 4 bits.
            nf4 = getattr(evaluation.engine_options, "eval_base", None) == "nf4"
            weights = size.weight_bytes(dtype, nf4=nf4) // max(1, devices)
            keys = size.key_values * size.layers * BYTES[dtype] * arm.model.max_length
            said = f"{weights / GIB:.1f} GB of weights ({'nf4 and ' if nf4 else ''}{dtype})"
            self._peaks[key] = Peak(weights, weights + keys, said)
        return self._peaks[key]

    def warnings(self, done: Collection[str]) -> list[str]:
        """Steps that may not fit into the card's memory, each kind on each base once."""
        found: dict[tuple[str, str, str], str] = {}
        for step, peak in self._tight(done):
            assert self.card is not None
            if peak.certain <= self.card.memory < peak.likely:
                said = f"{step.kind} on {self.bases[step.id]} may take {peak.likely / GIB:.1f} GB ({peak.formula}, "
                said += f"moments and activations), and {self.card.name} has {self.card.memory / GIB:g} GB"
                found.setdefault((step.kind, self.bases[step.id], peak.formula), said)
        return list(found.values())

    def cannot_fit(self, done: Collection[str]) -> list[str]:
        """Steps that certainly do not fit into the card's memory, each kind on each base once."""
        found: dict[tuple[str, str, str], str] = {}
        for step, peak in self._tight(done):
            assert self.card is not None
            if peak.certain > self.card.memory:
                said = f"{step.kind} {step.arm} on {self.bases[step.id]} needs {peak.formula}"
                found.setdefault((step.kind, self.bases[step.id], peak.formula), said)
        return list(found.values())

    def _tight(self, done: Collection[str]) -> list[tuple[Step, Peak]]:
        if self.card is None:
            return []
        steps = [step for step in self.plan.graph.steps.values() if step.id not in done]
        return [(step, peak) for step in steps if (peak := self.peak(step)) is not None]


def sized(plan: StudyPlan, card: Card | None = None) -> Sized:
    """Everything of a plan that decides what its steps take."""
    found = Sized(plan, card)
    for promise in plan.promises.values():
        if promise.step is not None:
            # An arm under a value is nothing that is made.
            found.uses[promise.step.id] += int(promise.arm.control is None)
            found.bases[promise.step.id] = promise.arm.base
            # Of a kept checkpoint the alignment is that of its arm, which comes first.
            found.made.setdefault(promise.step.id, promise)
    for evaluation in plan.evaluations:
        for arm in evaluation.arms:
            for task in arm.tasks:
                found.uses[task.answers.id] += 1
                found.bases[task.answers.id] = evaluation.model.name
                found.answered[task.answers.id] = evaluation, arm, task
                for scores in task.scores:
                    found.uses[scores.id] += 1
                    found.bases[scores.id] = evaluation.model.name
                    found.scored[scores.id] = scores, task
                    found.limits[scores.id] = task.chosen.limit
    for step in plan.graph.steps.values():
        # Of further kinds (what arms prepare together): the base that they name themselves.
        found.bases.setdefault(step.id, str(step.factors.get("base") or ""))
        found.uses[step.id] = max(1, found.uses[step.id])
    return found


def samples_of(spec: TaskSpec, limit: int | None) -> tuple[int | None, tuple[str, ...]]:
    """How many samples a task has under a limit, as far as its file says; and what is assumed."""
    if spec.size is None or limit is None:
        return spec.size, ()
    if spec.leaves is not None or (spec.leaf is None and spec.lm_eval is None):
        return min(spec.size, limit * (spec.leaves or 1)), ()
    return spec.size, (f"at most: all {spec.size} samples of {spec.name}, as its leaf tasks are not counted before",)


def _judge_of(config: Any) -> Any:
    """The options of a judge within a scorer's; None: it asks none."""
    if hasattr(config, "price_input") and hasattr(config, "priced"):
        return config
    groups = [getattr(config, name) for name in type(config).model_fields]
    asked = getattr(config, "judges", None)
    names = type(config).model_fields
    chosen = [
        group
        for name, group in zip(names, groups, strict=True)
        if isinstance(group, Config) and (asked is None or name in asked)
    ]
    return next((found for group in chosen if (found := _judge_of(group)) is not None), None)
