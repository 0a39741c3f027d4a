"""What an alignment leaves: an adapter in peft's format (or a model), its template, its lineage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.alignment.plan import AlignPlan
from harness.alignment.policy import described_quantization
from harness.models import lineage
from harness.steps.checksums import record_files
from harness.steps.files import write_bytes, write_json, writing
from harness.steps.folder import StepFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Target:
    """Where an alignment is written to."""

    plan: AlignPlan
    tokenizer: PreTrainedTokenizerBase
    work: StepFolder
    out: Path


def export(model: Any, target: Target) -> None:
    """Write the adapter (and the kept checkpoints) into the output folder."""
    from harness.alignment.driven import TRAINABLE, restore

    for step in target.plan.spec.checkpoints:
        folder = target.work.path / "checkpoints" / f"checkpoint-{step}"
        if (folder / TRAINABLE).is_file():
            final = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
            restore(model, folder / TRAINABLE)
            kept = target.out / f"step-{step}"
            write_adapter(model, target, kept)
            record_files(kept, kept.iterdir())
            for name, parameter in model.named_parameters():
                if name in final:
                    parameter.data.copy_(final[name])
    write_adapter(model, target, target.out)


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
        config.update(lineage.base_for_peft(plan.model, target.out))
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
            model.save_pretrained(str(out))
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
