"""What an alignment leaves: an adapter in peft's format (or a model), its template, its lineage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.alignment.folder import ALIGNMENT, EXPORTED, exported
from harness.alignment.plan import AlignPlan
from harness.alignment.policy import described_quantization
from harness.contracts.aligner import TrainingJob
from harness.core.errors import StepError
from harness.models import lineage
from harness.steps.checksums import record_files
from harness.steps.files import stays_inside, write_bytes, write_json, writing
from harness.steps.folder import StepFolder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Target:
    """Where an alignment is written to."""

    plan: AlignPlan
    tokenizer: PreTrainedTokenizerBase
    work: StepFolder
    own: frozenset[str] = frozenset()
    """Weights of modules of the method's own, which are no part of the model."""


@dataclass(frozen=True)
class FilesBeside:
    """What a method's ``export`` writes with: a :class:`harness.ArtifactFiles` of one folder."""

    folder: Path
    method: str
    announce: Callable[[str], None] = lambda name: None
    """Told of each name before the file is there."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file as it is.

        Raises:
            StepError: the name leads out of the folder, or is hidden, or one that the harness itself writes.
        """
        write_bytes(self._admitted(name), data)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object as JSON, with a schema version and a checksum; errors as for :meth:`write`."""
        write_json(self._admitted(name), dict(value))

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors; errors as for :meth:`write`."""
        from safetensors.torch import save

        data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        write_bytes(self._admitted(name), data)

    def _admitted(self, name: str) -> Path:
        parts, what = name.split("/"), None
        if not stays_inside(name) or "\\" in name or any(part.startswith(".") or not part for part in parts):
            what = "leads out of the folder, or is hidden"
        elif re.fullmatch(ALIGNMENT.own, parts[0]):
            what = "is a name of the harness's own"
        if what is not None:
            fix = "Write into the folder, under a name that nothing else has."
            raise StepError(f"`export` of {self.method}", f"{name!r} {what}", fix)
        self.announce(name)
        return self.folder / name


def export(model: Any, job: TrainingJob, target: Target) -> None:
    """Write the adapter and the kept checkpoints, with what the method leaves beside them, into the output folder."""
    from harness.alignment.driven import TRAINABLE, restore

    for step in target.plan.spec.checkpoints:
        folder = target.work.path / "checkpoints" / f"checkpoint-{step}"
        if (folder / TRAINABLE).is_file():
            final = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            restore(model, folder / TRAINABLE)
            kept = target.work.artifact / f"step-{step}"
            write_adapter(model, target, kept)
            target.plan.aligner.export(job, model, FilesBeside(kept, target.plan.spec.method))
            record_files(kept, kept.rglob("*"))
            for name, parameter in model.named_parameters():
                if name in final:
                    parameter.data.copy_(final[name])
    write_adapter(model, target, target.work.artifact)
    known = exported(target.work)

    def announce(name: str) -> None:
        if name not in known:
            known.append(name)
            write_json(target.work.path / EXPORTED, {"files": known})

    target.plan.aligner.export(job, model, FilesBeside(target.work.artifact, target.plan.spec.method, announce))


def write_adapter(model: Any, target: Target, out: Path) -> None:
    """One adapter in peft's format (or a whole model), its template and its lineage."""
    plan = target.plan
    out.mkdir(parents=True, exist_ok=True)
    fresh = target.work.path / "export"
    if hasattr(model, "peft_config"):
        with writing(fresh):
            model.save_pretrained(str(fresh), selected_adapters=["default"])
        made = fresh / "default" if (fresh / "default").is_dir() else fresh
        config = json.loads((made / lineage.CONFIG).read_text())
        config.update(lineage.base_for_peft(plan.model, target.work.artifact))
        config["target_modules"] = sorted(config["target_modules"] or [])
        write_bytes(made / lineage.CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        if plan.start is not None:
            lineage.concatenate(Path(plan.start.path), made, out)
        else:
            for name in (lineage.CONFIG, lineage.WEIGHTS):
                write_bytes(out / name, (made / name).read_bytes())
    else:
        # Switched off for training; whoever generates with the exported model needs it.
        model.config.use_cache = True
        with writing(out):
            kept = {name: one for name, one in model.state_dict().items() if name not in target.own}
            model.save_pretrained(str(out), **({"state_dict": kept} if target.own else {}))
            target.tokenizer.save_pretrained(str(out))
        model.config.use_cache = False
    write_bytes(out / "chat_template.jinja", plan.template.source.encode())
    write_json(out / lineage.LINEAGE, lineage_of(plan))


def lineage_of(plan: AlignPlan) -> dict[str, Any]:
    """Ordered: the base, the adapters trained before, and what made this one."""
    return {
        "base": {"name": plan.model.name, "revision": plan.model.revision, "weights": plan.model.weights_digest},
        "adapters": lineage.ancestry(plan.start),
        "step": plan.id,
        "method": plan.spec.method,
        "dataset": plan.dataset,
        "template": plan.template.digest,
        "quantization": described_quantization(plan.adapter.quantization(plan.adapter_options)),
    }
