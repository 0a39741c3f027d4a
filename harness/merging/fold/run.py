"""Fold an adapter into its base: one checkpoint, streamed, into the base as stored or as QLoRA training saw it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from harness.contracts.registry import Registry
from harness.core.config import Config, parse_options
from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.core.records import AdapterInfo, ModelInfo, digest_of
from harness.core.specs import MergeInput, MergeSpec, ModelSpec
from harness.merging.adapters.kinds import open_adapter
from harness.merging.adapters.tensors import in_base
from harness.merging.inputs import OpenModels, lineage_entry, open_models
from harness.merging.publish import FOLD, FOLDED, Made, publish
from harness.merging.sources import MergeModel, open_checkpoint
from harness.merging.threads import Clock, TensorWork, carry_out, default_workers
from harness.merging.write import SHARD_SIZE, Shards, TensorShape, check_disk, target_dtype, write_small_files
from harness.models.card import head
from harness.models.chat_templates import read_chat_template
from harness.models.files import LineageFile, read_checked
from harness.models.lineage import LINEAGE
from harness.models.tensors import FLOATS, TORCH_NAMES, not_finite
from harness.steps.alone import Alone
from harness.steps.files import read_json, slug, write_bytes, write_json
from harness.steps.provenance import provenance_record
from harness.steps.runner import Runner
from harness.steps.step import make_step

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "nf4-roundtrip"]


class FoldSpec(Config):
    """One fold: what `harness fold` takes."""

    adapter: str = Field(description="folder or hub id of the adapter")
    base: ModelSpec
    precision: Precision = Field(
        "bf16", description="bf16: the base as it is stored; nf4-roundtrip: the base as QLoRA training saw it"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the written weights; auto: the base's"
    )
    control: str | None = Field(None, description="value of the adapter's conditioning; the default when absent")
    probe: Path | None = Field(None, description="JSON lines with `text` (or `prompt`); bundled sentences when absent")
    probe_prompts: int | None = Field(
        None, description="how many texts to compare on; 0: no comparison; all when absent"
    )


@dataclass(frozen=True)
class Folded:
    """What one fold left behind."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)
    """What ``fold.json`` holds."""


def fold_into(
    model: ModelInfo, adapter: AdapterInfo, out: Path, *, dtype: str = "auto", runner: Runner | None = None
) -> Path:
    """Write base + adapter as one checkpoint; for an engine that cannot serve the adapter beside its base.

    Nothing but the folder is written, and it appears when it is whole. LoRA (rsLoRA and DoRA), VeRA and IA3,
    with whole modules, trained biases and token rows beside them; each tensor is formed in fp32 and rounded once.

    Args:
        model: as ``inspect_model`` finds it.
        adapter: as ``inspect_adapter`` finds it.
        out: a new folder, or one that holds this very fold.
        dtype: float32, bfloat16, float16, or auto: the base's.
        runner: announces and records the step; says nothing by default.

    Returns:
        ``out``.

    Raises:
        UserError: the adapter cannot be written as changed weights (named), the folder is taken, the disk is full.
    """
    fold = _Fold(_open(model, adapter), "bf16", dtype)
    fold.run(Path(out), runner or Runner(None, Reporter()), fresh=False)
    return Path(out)


def fold(
    adapter: str,
    base: str | ModelSpec,
    *,
    out: str | Path,
    fresh: bool = False,
    registry: Registry | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Folded:
    """Fold one adapter into its base: what `harness fold` does.

    Args:
        adapter: folder or hub id.
        base: folder or hub id, or a ``ModelSpec``.
        out: folder of the model; returns at once if it holds this very fold.
        fresh: replace another merge that the folder holds.
        registry: from ``load_plugins``, for its observers; nobody is told by default.
        reporter: says what is going on; silent by default.
        **settings: further fields of ``FoldSpec``: precision, dtype, control, probe, probe_prompts.

    Raises:
        UserError: a mistake of the user's, before anything was written.
    """
    from harness.merging.fold.probe import compare, probe_ids, probe_texts

    given = base if isinstance(base, ModelSpec) else ModelSpec(model=str(base))
    spec = parse_options(FoldSpec, {"adapter": str(adapter), "base": given, **settings}, "harness fold")
    reporter = reporter or Reporter()
    texts = probe_texts(spec.probe, spec.probe_prompts)
    one = MergeSpec(method="fold", base=given, inputs=(MergeInput(ref=spec.adapter, weight=1.0, control=spec.control),))
    opened = open_models(one, option="ADAPTER")
    if opened.inputs[0].adapter is None:
        raise UserError(f"ADAPTER {adapter}", "is a checkpoint, not an adapter", "Give the folder of a peft adapter.")
    ids = probe_ids(opened, texts) if texts else []
    folding = _Fold(opened, spec.precision, spec.dtype, digest_of(list(texts)) if texts else None)

    def probed(folder: Path) -> dict[str, Any]:
        return compare(opened, folder, spec.precision, ids, reporter) if ids else {}

    return Folded(Path(out), folding.run(Path(out), Runner(registry, reporter), fresh=fresh, probe=probed))


def _open(model: ModelInfo, adapter: AdapterInfo) -> OpenModels:
    """As ``open_models``, for what has been inspected already."""
    from harness.merging.inputs import opened_from

    folder = open_checkpoint(model, f"--model {model.name}")
    base = MergeModel(f"--model {model.name}", model.name, model.weights_digest, folder, model, revision=model.revision)
    base.template = model.chat_template
    label = f"--adapter {adapter.name}"
    top = MergeModel(label, adapter.name, adapter.digest, folder, model, open_adapter(adapter, folder, label))
    top.template = model.chat_template or read_chat_template(Path(adapter.path))
    return opened_from(base, [top], top.template)


class _Fold:
    """One pass over a base."""

    def __init__(self, opened: OpenModels, precision: Precision, dtype: str, probe: str | None = None) -> None:
        assert opened.base is not None
        assert opened.inputs[0].adapter is not None
        self.opened, self.precision, self.dtype = opened, precision, dtype
        self.base, self.model = opened.base, opened.inputs[0]
        self.adapter = opened.inputs[0].adapter
        self.names = opened.names[0]
        self.quantised: dict[str, bool] = {}
        info = opened.info
        identity = {
            "base": info.identity(),
            "adapter": self.model.digest,
            "precision": precision,
            "dtype": dtype,
            "template": opened.template,
            "probe": probe,
            **({"control": self.model.controlled.control} if self.model.controlled is not None else {}),
        }
        self.step = make_step(
            "fold",
            identity,
            arm=f"fold-{slug(self.model.name)}",
            factors={"base": info.name, "inputs": [self.model.name], "precision": precision},
            made_from={"base": info.weights_digest, **opened.digests},
        )
        self.clock = Clock()

    def run(
        self,
        out: Path,
        runner: Runner,
        *,
        fresh: bool,
        probe: Callable[[Path], Mapping[str, Any]] = lambda folder: {},
    ) -> dict[str, Any]:
        """Write the folder, unless it holds this fold; returns its record."""
        alone = Alone(self.step, out, FOLDED)
        if alone.done_before(runner.reporter, fresh=fresh) is None:
            publish(self.step, alone.folder, runner, lambda folder: self._write(out, folder, runner.reporter, probe))
        return dict(read_json(out / FOLD))

    def _write(self, out: Path, folder: Path, reporter: Reporter, probe: Callable[[Path], Mapping[str, Any]]) -> Made:
        begun = time.perf_counter()
        plans = [self._plan(name) for name in self.names]
        check_disk(out.absolute().parent, sum(plan.size for plan in plans), f"--out {out}")
        if self.precision == "nf4-roundtrip":
            self.quantised = self._quantised_tensors()
        shards = Shards(folder, plans, SHARD_SIZE)
        try:
            advance = reporter.start(f"fold {self.model.name}", len(plans))
            carry_out([self._job(plan) for plan in plans], shards, default_workers(), self.clock, advance)
            files = shards.finish()
        finally:
            shards.close()
        write_small_files(
            folder,
            self.opened.info,
            changes=self.opened.config_changes,
            dtype=self.dtype,
            template=self.opened.template,
        )
        if self.opened.carried is not None:
            self.opened.carried.write(folder)
        found = self._record(files, time.perf_counter() - begun, dict(probe(folder)))
        write_json(folder / FOLD, found)
        write_json(folder / LINEAGE, self._lineage())
        write_bytes(folder / "README.md", fold_card(found).encode())
        return Made(found["counts"], found["seconds"], tuple(found["notes"]))

    def _quantised_tensors(self) -> dict[str, bool]:
        """Tensors of the base that training held in 4 bits -> whether they are stored as (in, out)."""
        from harness.merging.fold.nf4 import quantised_modules, require_bitsandbytes

        require_bitsandbytes("--precision")
        found = {}
        for module, transposed in quantised_modules(self.opened.info).items():
            if (tensor := in_base(f"{module}.weight", self.base.checkpoint)) is not None:
                found[tensor] = transposed
        return found

    def _plan(self, name: str) -> TensorShape:
        entry = self.base.entry(name)
        dtype = target_dtype(entry.dtype, self.dtype) if entry.dtype in FLOATS else entry.dtype
        return TensorShape(name, dtype, entry.shape)

    def _job(self, plan: TensorShape) -> TensorWork:
        changed = self.model.touches(plan.name) or plan.name in self.quantised
        needs = plan.size if not changed else 16 * self.base.entry(plan.name).elements
        return TensorWork(plan, needs, lambda: self._make(plan))

    def _make(self, plan: TensorShape) -> torch.Tensor:
        import torch

        name, dtype = plan.name, getattr(torch, TORCH_NAMES[plan.dtype])
        with self.clock.on("read"):
            stored = self.base.stored(name)
        self.clock.count(self.base.entry(name).size)
        with self.clock.on("merge"):
            if name in self.quantised:
                from harness.merging.fold.nf4 import roundtrip

                seen = stored if self.dtype == "auto" else stored.to(getattr(torch, self.dtype))
                stored = roundtrip(seen, transposed=self.quantised[name])
            if not self.model.touches(name):
                return stored.to(dtype)
            made = self.adapter.apply(name, stored.to(torch.float32, copy=True)).to(dtype)
        if problem := not_finite(made):
            raise UserError(
                f"{self.model.label}, {name}",
                f"base and adapter together give {problem} in {dtype}",
                "Take another --dtype, or look at that adapter.",
            )
        return made

    def _record(self, files: Mapping[str, int], seconds: float, probe: Mapping[str, Any]) -> dict[str, Any]:
        trained = _quantisation_of(self.model)
        notes = list(self.opened.notes)
        if trained is not None and self.precision == "bf16":
            notes.append(
                "the adapter was trained on a 4-bit base: folded into the base's own precision, its weights are not "
                "those that training saw (peft issues 2105 and 2321); --precision nf4-roundtrip folds into those"
            )
        if trained is None and self.precision == "nf4-roundtrip":
            notes.append("nothing says that the adapter was trained on a 4-bit base")
        return {
            "id": self.step.id,
            "kind": "fold",
            "method": "fold",
            "identity": self.step.identity,
            "precision": self.precision,
            "folded_into": "the base as it is stored"
            if self.precision == "bf16"
            else "the base through NF4 with double quantisation and back, linear layers but the output embeddings",
            "quantised_tensors": len(self.quantised),
            "dtype": self.dtype,
            "base": lineage_entry(self.base),
            "adapter": lineage_entry(self.model),
            "trained_on": trained,
            "counts": {
                "tensors": len(self.names),
                "changed": sum(self.model.touches(name) for name in self.names),
            },
            "bytes": {"read": self.clock.read, "written": sum(files.values())},
            "files": dict(files),
            "seconds": {"wall": round(seconds, 3)},
            "thread_seconds": {name: round(value, 3) for name, value in self.clock.seconds.items()},
            "probe": dict(probe),
            "notes": notes,
            "provenance": provenance_record({}),
        }

    def _lineage(self) -> dict[str, Any]:
        info = self.opened.info
        return {
            "base": {"name": info.name, "revision": info.revision, "weights": info.weights_digest},
            "adapters": [{"name": self.model.name, "digest": self.model.digest}],
            "step": self.step.id,
            "method": "fold",
            "precision": self.precision,
        }


def _quantisation_of(model: MergeModel) -> Any:
    """What the adapter's lineage says of the base's quantisation in training."""
    assert model.adapter is not None
    info = model.adapter.info if model.controlled is None else model.controlled.adapter
    file = Path(info.path) / LINEAGE
    return read_checked(file, LineageFile).get("quantization") if file.is_file() else None


def fold_card(found: Mapping[str, Any]) -> str:
    """README.md of a folded model."""
    base, adapter = found["base"], found["adapter"]
    lines = [
        *head("transformers", (), base),
        f"# {adapter['name']}, folded",
        "",
        f"Base `{base['name']}` (weights {base['digest'][:12]}) and adapter `{adapter['name']}` "
        f"({adapter['digest'][:12]}) as one checkpoint, folded into {found['folded_into']}.",
        "",
        *(f"* note: {note}" for note in found["notes"]),
        *(probe_line(one) for one in found["probe"].get("comparisons", [])),
        "",
        "Not measured here: helpfulness and harmlessness. Run `harness eval --model THIS`.",
        "",
    ]
    return "\n".join(lines)


def probe_line(one: Mapping[str, Any]) -> str:
    """One comparison in words."""
    low, high = one["ci95"] or (float("nan"), float("nan"))
    return (
        f"* KL({one['of']} || {one['against']}) = {one['mean']:.3g} nats/token, 95 % interval {low:.3g} to {high:.3g} "
        f"({one['texts']} texts, {one['tokens']} tokens)"
    )
