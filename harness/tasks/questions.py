"""From a task to samples. Knows nothing of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import StepError, UserError
from harness.core.records import ModelInfo, Request, Sample
from harness.core.specs import DatasetRef, PromptKind, TaskSpec
from harness.models import prompts
from harness.models.generation_config import decoding_of_model
from harness.tasks.catalog import Chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Questions:
    """A task ready to be answered: its samples, what was dropped, and (lm-eval) the live task objects."""

    samples: list[Sample]
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    runtime: Any = None

    @property
    def digest(self) -> str:
        """Digest of every question in order: prompts, decoding, data, tokenisation and limit."""
        hashed = hashlib.sha256()
        for sample in self.samples:
            hashed.update(f"{sample.id}\n".encode())
            for request in sample.requests:
                hashed.update(f"{request.digest}\n".encode())
        return hashed.hexdigest()

    def rows(self) -> list[dict[str, Any]]:
        """What ``requests/`` keeps: texts, targets and token ids."""
        return [
            {
                "id": sample.id,
                "leaf": sample.leaf,
                "prompt": sample.prompt,
                "target": sample.target,
                "data": dict(sample.data),
                "cut": sample.cut,
                "requests": [
                    {
                        "digest": request.digest,
                        "kind": request.kind,
                        "prompt_ids": list(request.prompt_ids),
                        "continuation": request.continuation,
                        "continuation_ids": list(request.continuation_ids),
                        "decoding": request.decoding.model_dump(mode="json") if request.decoding else None,
                    }
                    for request in sample.requests
                ],
            }
            for sample in self.samples
        ]


def resolve_variant(chosen: Chosen, model: ModelInfo, *, chat_only: bool = False) -> PromptKind:
    """Which prompt variant runs: the forced one, the task's, or (auto) chat where the model has a template.

    Args:
        chosen: the task.
        model: with or without a chat template.
        chat_only: the engine takes conversations alone.

    Raises:
        UserError: a chat prompt for a model without a chat template, or a raw one for an engine that takes none.
    """
    wanted = chosen.variant or chosen.spec.prompt
    has_template = model.chat_template is not None or chat_only
    if wanted == "raw" and chat_only:
        raise UserError(
            f"--task {chosen.spec.name}",
            "asks for a raw prompt, and a chat endpoint takes conversations alone",
            f"Use {chosen.entry.spec.name}:chat, or the endpoint's completions API.",
        )
    if wanted == "auto":
        return "chat" if has_template else "raw"
    if wanted == "chat" and not has_template:
        raise UserError(
            f"--task {chosen.spec.name}",
            f"asks for a chat prompt, and {model.ref} has no chat template",
            f"Use {chosen.entry.spec.name}:raw, or add a chat_template.jinja to the model's folder.",
        )
    return wanted


def dataset_of(spec: TaskSpec, registry: Registry, chosen: Chosen) -> tuple[Dataset, DatasetJob]:
    """The dataset plugin of a task and its job, options checked; relative paths are the YAML file's."""
    ref: DatasetRef | None = spec.dataset
    assert ref is not None
    where = f"task {spec.name}, dataset"
    plugin = registry.find(Dataset, ref.name, where)
    options = dict(ref.options)
    path, folder = options.get("path"), chosen.entry.folder
    if isinstance(path, str) and folder is not None and (folder / path).exists():
        options["path"] = str(folder / path)
    if ref.subset is not None and plugin.subsets and ref.subset not in plugin.subsets:
        raise UserError(where, f"{ref.name} has no subset {ref.subset!r}", f"Subsets: {', '.join(plugin.subsets)}.")
    return plugin, DatasetJob(ref.subset, ref.split, ref.revision, parse_options(plugin.Config, options, where))


def open_task(
    chosen: Chosen,
    variant: PromptKind,
    model: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None,
    registry: Registry,
    *,
    seed: int,
) -> Questions:
    """Read the data, write the prompts, tokenise them once."""
    if chosen.spec.lm_eval is not None:
        from harness.tasks.lm_eval import task as lmeval

        # A conversation is sent as it is: an endpoint that takes one needs no tokenizer here.
        if tokenizer is None and variant != "chat":
            raise UserError(
                f"--task {chosen.spec.name}",
                "lm-eval's tasks need the model's tokenizer, and an endpoint does not hand it out",
                "Give it with --set engine.tokenizer=PATH_OR_HUB_ID.",
            )
        runtime = lmeval.open_task(chosen, variant, model, tokenizer, seed)
        opened = Questions(runtime.samples, runtime=runtime)
    else:
        opened = _open_native(chosen, variant, model, tokenizer, registry, seed)
    if not opened.samples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in opened.dropped.items()) or "the data set is empty"
        raise UserError(f"--task {chosen.spec.name}", f"no samples are left ({reasons})", "Check its data and filters.")
    return opened


def steered(opened: Questions, adapter: str | None, control: str | None) -> Questions:
    """The same questions to the base under an adapter, or under a value of its conditioning."""
    if adapter is None and control is None:
        return opened
    samples = [
        replace(sample, requests=tuple(replace(r, adapter=adapter, control=control) for r in sample.requests))
        for sample in opened.samples
    ]
    return replace(opened, samples=samples)


def _open_native(
    chosen: Chosen,
    variant: PromptKind,
    model: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None,
    registry: Registry,
    seed: int,
) -> Questions:
    spec = chosen.spec
    plugin, job = dataset_of(spec, registry, chosen)
    if spec.decoding_of == "model":
        spec = spec.model_copy(update={"decoding": decoding_of_model(spec.decoding, model, seed, job.note)})
    if spec.decoding.max_new_tokens >= model.max_length:
        # AlpacaEval's 2,048 tokens on a Llama 1, say: half of the context is the prompt's.
        most, asked = model.max_length // 2, spec.decoding.max_new_tokens
        job.note(f"the model's context is {model.max_length} tokens: at most {most} new ones instead of {asked}")
        decoding = spec.decoding.model_copy(update={"max_new_tokens": most})
        spec = spec.model_copy(update={"decoding": decoding})
    samples: list[Sample] = []
    seen: set[str] = set()
    counts: Counter[str | None] = Counter()
    for row in plugin.rows(job):
        if spec.leaf is None and chosen.limit is not None and len(samples) >= chosen.limit:
            break
        if row.id in seen:
            raise StepError(spec.name, f"the data set yields the id {row.id!r} twice")
        seen.add(row.id)
        place = chosen.entry.file or f"task {spec.name}"
        leaf = prompts.render(spec.leaf, row.data, f"{place}, leaf, row {row.id}").strip() if spec.leaf else ""
        counts[leaf] += 1
        # As for lm-eval's groups: the limit holds for each leaf task.
        if chosen.limit is not None and counts[leaf] > chosen.limit:
            continue
        sample = _native_sample(spec, row, f"{place}, template, row {row.id}", variant, model, tokenizer)
        samples.append(replace(sample, leaf=leaf or None))
    return Questions(samples, job.dropped, tuple(job.notes))


def _native_sample(
    spec: TaskSpec,
    row: DatasetRow,
    where: str,
    variant: PromptKind,
    model: ModelInfo,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Sample:
    turn = prompts.render(spec.template, row.data, where)
    target = prompts.render(spec.target, row.data, where) if spec.target is not None else None
    messages = None
    ids: list[int] = []
    sent = turn
    if variant == "chat":
        system = [{"role": "system", "content": spec.system}] if spec.system else []
        messages = (*system, {"role": "user", "content": turn})
    if tokenizer is not None:
        if messages is not None:
            ids, sent = prompts.encode_chat(tokenizer, messages, generation_prompt=spec.generation_prompt)
        else:
            ids = prompts.encode(tokenizer, turn)
        prompts.check_bos(ids, tokenizer, where)
    elif messages is not None and not spec.generation_prompt:
        raise UserError(
            f"--task {spec.name}",
            "sends a user turn without the assistant's header, and an endpoint applies the chat template itself",
            "Give the model's tokenizer with --set engine.tokenizer=PATH_OR_HUB_ID, and its completions API.",
        )
    room = model.max_length - spec.decoding.max_new_tokens
    request = Request(
        "generate",
        tuple(ids[-room:]),
        decoding=spec.decoding,
        prompt=sent,
        messages=messages if variant == "chat" else None,
    )
    return Sample(row.id, (request,), turn, target, data=dict(row.data), cut=len(ids) > room)
