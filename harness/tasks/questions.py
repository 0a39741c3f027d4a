"""From a task to samples. Knows nothing of training."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.dataset import Dataset, DatasetJob, DatasetRow
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import CorruptionError, StepError, UserError
from harness.core.records import ModelInfo, Request, Sample
from harness.core.specs import DatasetRef, Decoding, PromptKind, TaskSpec
from harness.models import prompts
from harness.models.generation_config import decoding_of_model
from harness.steps.journal import read_rows
from harness.tasks.catalog import Chosen
from harness.tasks.draw import drawn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Questions:
    """A task ready to be answered: its samples, what was dropped, and (lm-eval) the live task objects."""

    samples: list[Sample]
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    runtime: Any = None

    @cached_property
    def digest(self) -> str:
        """Digest of every question in order: prompts, decoding, data, tokenisation and limit."""
        hashed = hashlib.sha256()
        for sample in self.samples:
            hashed.update(f"{sample.id}\n".encode())
            for request in sample.requests:
                hashed.update(f"{request.digest}\n".encode())
        return hashed.hexdigest()

    def rows(self) -> list[dict[str, Any]]:
        """What ``requests/`` keeps: everything that a scorer may see, and what was sent."""
        return [
            {
                "id": sample.id,
                "leaf": sample.leaf,
                "prompt": sample.prompt,
                "target": sample.target,
                "data": dict(sample.data),
                "cut": sample.cut,
                "chance": sample.chance,
                **({"cluster": sample.cluster} if sample.cluster is not None else {}),
                "requests": [_stored(request, sample.prompt) for request in sample.requests],
            }
            for sample in self.samples
        ]


def _stored(request: Request, prompt: str) -> dict[str, Any]:
    """One request; text that its sample has already, and what it has not, is left out."""
    more: dict[str, Any] = {name: getattr(request, name) for name in ("messages", "adapter", "control", "control_at")}
    return {
        "digest": request.digest,
        "kind": request.kind,
        "prompt_ids": list(request.prompt_ids),
        "continuation": request.continuation,
        "continuation_ids": list(request.continuation_ids),
        "decoding": request.decoding.model_dump(mode="json") if request.decoding else None,
        **({"prompt": request.prompt} if request.prompt != prompt else {}),
        **{name: value for name, value in more.items() if value is not None},
    }


def read_samples(path: Path, digest: str) -> list[Sample]:
    """The samples that :meth:`Questions.rows` stored in ``requests/``; it takes no tokenizer and no data set.

    Raises:
        CorruptionError: the file is missing or damaged, of an earlier version, or holds other questions.
    """
    where, fix = f"requests/{path.name}", "run the command of its answers again, which writes it anew"
    try:
        samples = [_sample_of(row) for row in read_rows(path)]
    except CorruptionError:
        raise CorruptionError(f"{where}: is missing or damaged; {fix}") from None
    except (KeyError, TypeError, ValueError) as error:
        what = f"is of another version ({type(error).__name__}: {error})"
        raise CorruptionError(f"{where}: {what}; {fix}") from None
    if Questions(samples).digest != digest:
        raise CorruptionError(f"{where}: holds other questions than those that were answered; {fix}")
    return samples


def _sample_of(row: Mapping[str, Any]) -> Sample:
    requests = tuple(_request_of(request, row["prompt"]) for request in row["requests"])
    kept = {name: row[name] for name in ("id", "prompt", "target", "leaf", "data", "cut", "chance")}
    return Sample(requests=requests, cluster=row.get("cluster"), **kept)


def _request_of(row: Mapping[str, Any], prompt: str) -> Request:
    messages = row.get("messages")
    return Request(
        row["kind"],
        tuple(row["prompt_ids"]),
        tuple(row["continuation_ids"]),
        Decoding.model_validate(row["decoding"]) if row["decoding"] is not None else None,
        row.get("prompt", prompt),
        row["continuation"],
        tuple(messages) if messages is not None else None,
        row.get("adapter"),
        row.get("control"),
        row.get("control_at"),
    )


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


def asked_as(opened: Questions, change: Callable[[Request], Request]) -> Questions:
    """The same questions with every request changed: to the base under an adapter, or under a control."""
    samples = [replace(sample, requests=tuple(map(change, sample.requests))) for sample in opened.samples]
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
    place = chosen.entry.file or f"task {spec.name}"
    for row, leaf in _limited(chosen, plugin.rows(job), f"{place}, leaf", seed):
        sample = _native_sample(spec, row, f"{place}, template, row {row.id}", variant, model, tokenizer)
        cluster = (
            prompts.render(spec.cluster, row.data, f"{place}, cluster, row {row.id}").strip() if spec.cluster else ""
        )
        samples.append(replace(sample, leaf=leaf or None, cluster=cluster or None))
    return Questions(samples, job.dropped, tuple(job.notes))


def _limited(chosen: Chosen, rows: Iterable[DatasetRow], where: str, seed: int) -> Iterator[tuple[DatasetRow, str]]:
    """Rows with their leaf task; as for lm-eval's groups, the limit holds for each leaf task."""
    spec, limit = chosen.spec, chosen.limit
    seen: set[str] = set()
    leaves: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    taken = 0
    draws = limit is not None and spec.subset == "seeded"
    order: list[tuple[DatasetRow, str]] = []
    for row in rows:
        if spec.leaf is None and limit is not None and taken >= limit and not draws:
            return
        if row.id in seen:
            raise StepError(spec.name, f"the data set yields the id {row.id!r} twice")
        seen.add(row.id)
        leaf = prompts.render(spec.leaf, row.data, f"{where}, row {row.id}").strip() if spec.leaf else ""
        counts[leaf] += 1
        if draws:
            leaves.setdefault(leaf, []).append(row.id)
            order.append((row, leaf))
        elif limit is None or counts[leaf] <= limit:
            taken += 1
            yield row, leaf
    if limit is not None and draws:
        kept = {some[n] for leaf, some in leaves.items() for n in drawn(len(some), limit, leaf, seed)}
        yield from ((row, leaf) for row, leaf in order if row.id in kept)


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
