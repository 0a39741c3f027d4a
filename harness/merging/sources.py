"""The models of a merge: checkpoints and adapters, as tensors and differences that are formed when they are asked for.

A LoRA layer changes a weight W by s B A (Hu et al. 2021, arXiv 2106.09685, section 4.1). DoRA makes of it
m (W + s B A) / ||W + s B A||, norms over each output's inputs (Liu et al. 2024, arXiv 2402.09353, equation 5). What
an adapter saved whole (``modules_to_save``, trained biases) takes the place of the base's tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contracts.merger import Factors
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.models.inspect import weight_files
from harness.models.lineage import scale_of
from harness.models.tensors import FLOATS, Entry, TensorFolder, not_finite

if TYPE_CHECKING:
    import torch

_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
_HEADS = ("lm_head.weight", "embed_out.weight")
_UNSUPPORTED = (
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Other ways of initialising (pissa, olora, corda, loftq) change the base besides."""
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "rows",
}


def is_embedding(name: str) -> bool:
    """Whether a tensor holds the input embeddings."""
    return _EMBEDDINGS.search(name) is not None


def open_checkpoint(model: ModelInfo, label: str) -> TensorFolder:
    """A checkpoint's tensors; a head that is tied to the embeddings can be read under its own name.

    Raises:
        UserError: the weights are quantised.
    """
    if (quantised := model.config.get("quantization_config")) is not None:
        raise UserError(
            label,
            f"its weights are quantised ({quantised.get('quant_method', 'unknown method')})",
            "Give the checkpoint in its own precision: differences of quantised weights mean nothing.",
        )
    folder = TensorFolder(weight_files(model), label)
    head, embedding = head_of(folder.names), next((n for n in folder.names if is_embedding(n)), None)
    if is_tied(model, folder.names) and embedding is not None:
        folder.aliases[head] = embedding
    return folder


def head_of(names: Sequence[str]) -> str:
    """The name of the output embeddings (also where they are tied and not stored)."""
    stored = next((n for n in names for head in _HEADS if n == head or n.endswith(f".{head}")), None)
    return stored or ("embed_out.weight" if any("embed_in" in n for n in names) else "lm_head.weight")


def is_tied(model: ModelInfo, names: Sequence[str]) -> bool:
    """Whether output and input embeddings are one tensor; where config.json is silent, what is stored decides."""
    text = model.config.get("text_config") or {}
    stated = text.get("tie_word_embeddings", model.config.get("tie_word_embeddings"))
    return bool(stated) if stated is not None else head_of(names) not in names


@dataclass
class Change:
    """What an adapter does to one tensor of its base."""

    entries: dict[str, str] = field(default_factory=dict)
    """Part (A, B, bias, magnitude, rows, whole) -> name in the adapter's file."""
    module: str = ""
    embedding: bool = False


class AdapterTensors:
    """What a peft adapter does to each tensor of its base.

    Raises:
        UserError: a kind of adapter that cannot be written as changed weights, or a module that the base has not.
    """

    def __init__(self, info: AdapterInfo, base: TensorFolder, label: str) -> None:
        self.info, self.label, self.config = info, label, info.config
        refuse_unsupported(info.config, label)
        self.files = TensorFolder(sorted(Path(info.path).glob("adapter_model*.safetensors")), label)
        self.changes: dict[str, Change] = {}
        for name in self.files.names:
            self._take(name, base)
        for tensor, change in self.changes.items():
            self._check(tensor, change, base)

    def _take(self, name: str, base: TensorFolder) -> None:
        plain = name.removeprefix("base_model.model.")
        module, part = plain, "whole"
        for suffix, meaning in _PARTS.items():
            if plain.endswith(f".{suffix}"):
                module, part = plain[: -len(suffix) - 1], meaning
        if part == "whole":
            target = plain.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        else:
            target = f"{module}.bias" if part == "bias" else f"{module}.weight"
        found = in_base(target, base)
        if found is None:
            raise UserError(
                f"{self.label}, {name}",
                f"the base has no tensor {target}",
                "Give the base that the adapter was trained on.",
            )
        change = self.changes.setdefault(found, Change(module=module))
        change.entries[part] = name
        change.embedding |= "lora_embedding" in name

    def _check(self, tensor: str, change: Change, base: TensorFolder) -> None:
        """Both factors there, and all shapes those of the base."""
        wanted = base.entry(tensor).shape
        parts = {part: self.files.entry(name).shape for part, name in change.entries.items()}
        where = f"{self.label}, {next(iter(change.entries.values()))}"
        if ("A" in parts) != ("B" in parts):
            raise UserError(where, "one of the two factors is missing", "Save the adapter again.")
        made = parts.get("whole", wanted)
        if "A" in parts and tuple(made) == tuple(wanted):
            if len(parts["A"]) != 2 or len(parts["B"]) != 2 or len(wanted) != 2:
                kind = f"factors of shapes {list(parts['A'])} and {list(parts['B'])}"
                raise UserError(where, f"{kind} for a tensor of shape {list(wanted)}", "Only linear layers work.")
            made = (parts["B"][0], parts["A"][1])
            if change.embedding or self.config.get("fan_in_fan_out"):
                made = (made[1], made[0])
            if parts["A"][0] != parts["B"][1]:
                made = (0, 0)
        if "rows" in parts and parts["rows"][1:] != wanted[1:]:
            made = parts["rows"]
        if tuple(made) != tuple(wanted):
            shapes = " and ".join(str(list(shape)) for shape in parts.values())
            raise UserError(
                where,
                f"has shape {shapes}, and {tensor} of the base has {list(wanted)}",
                "Give the base that the adapter was trained on.",
            )

    def touches(self, name: str) -> bool:
        """Whether the adapter changes this tensor of the base."""
        return name in self.changes

    def factors(self, name: str) -> Factors | None:
        """The change as s B A with B: (out, rank), A: (rank, in), in fp32; None where it is none of that form."""
        change = self.changes.get(name)
        if change is None or set(change.entries) != {"A", "B"}:
            return None
        a, b = self._part(change, "A"), self._part(change, "B")
        scale = scale_of(self.config, change.module)
        if change.embedding or self.config.get("fan_in_fan_out"):
            # The stored weight is (in, out): its change is s A^T B^T.
            a, b = b.t().contiguous(), a.t().contiguous()
        return Factors(a, b, scale)

    def size(self, name: str) -> int:
        """Bytes that its change to a tensor takes in the file."""
        return sum(self.files.entry(one).size for one in self.changes[name].entries.values())

    def _part(self, change: Change, part: str) -> torch.Tensor:
        import torch

        name = change.entries[part]
        tensor = self.files.read(name)
        if problem := not_finite(tensor):
            raise UserError(f"{self.label}, {name}", f"holds {problem}", "Train or save that adapter again.")
        # Always a copy: products must not depend on where in a file a tensor happens to lie.
        return tensor.to(torch.float32, copy=True)

    def apply(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The adapted tensor.

        Args:
            name: tensor of the base.
            base: its values, float32.

        Returns:
            A new tensor, float32.
        """
        change = self.changes[name]
        parts = set(change.entries)
        if "whole" in parts:
            # Beside factors it is the weight that they are added to: peft saves embeddings so.
            base = self._part(change, "whole").to(base.device)
            parts.remove("whole")
        if not parts:
            return base
        if parts == {"rows"}:
            adapted = base.clone()
            adapted[self._rows(name, change)] = self._part(change, "rows").to(base.device)
            return adapted
        if parts == {"bias"}:
            return base + scale_of(self.config, change.module) * self._part(change, "bias").to(base.device)
        delta = self._product(change, base)
        if "magnitude" in parts:
            adapted = base + delta
            lengthwise = 0 if self.config.get("fan_in_fan_out") else 1
            norm = adapted.norm(dim=lengthwise)
            factor = self._part(change, "magnitude").flatten().to(base.device) / norm
            return adapted * factor.unsqueeze(lengthwise)
        return delta.add_(base)

    def delta(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The adapted tensor less the base's; for plain LoRA the product itself, free of the base's rounding."""
        change = self.changes[name]
        if set(change.entries) == {"A", "B"}:
            return self._product(change, base)
        return self.apply(name, base).sub_(base)

    def _product(self, change: Change, base: torch.Tensor) -> torch.Tensor:
        a, b = self._part(change, "A").to(base.device), self._part(change, "B").to(base.device)
        product = (b @ a).mul_(scale_of(self.config, change.module))
        if change.embedding or self.config.get("fan_in_fan_out"):
            product = product.t().contiguous()
        return product

    def _rows(self, name: str, change: Change) -> list[int]:
        given: Any = self.config.get("trainable_token_indices") or []
        if isinstance(given, Mapping):
            last = change.module.rsplit(".", 1)[-1]
            given = given.get(change.module, given.get(last, []))
        expected = self.files.entry(change.entries["rows"]).shape[0]
        if len(given) != expected:
            raise UserError(
                f"{self.label}, trainable_token_indices",
                f"names {len(given)} rows of {name}, and {expected} are stored",
                "Save the adapter again.",
            )
        return [int(row) for row in given]


def refuse_unsupported(config: Mapping[str, Any], label: str) -> None:
    """What does not come down to changed weights.

    Raises:
        UserError: naming every such setting.
    """
    reasons = []
    if config.get("peft_type") != "LORA":
        reasons.append(f"peft_type {config.get('peft_type')}")
    reasons += [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        reasons.append(f"init_lora_weights {config['init_lora_weights']} (which changes the base too)")
    if reasons:
        raise UserError(
            label,
            f"cannot be written as changed weights: {', '.join(reasons)}",
            "LoRA, rsLoRA and DoRA adapters can, with whole modules and biases saved beside them.",
        )


def in_base(target: str, base: TensorFolder) -> str | None:
    """The base's name of a tensor; checkpoints differ in whether the inner model's prefix is stored."""
    if target in base:
        return target
    ends = [name for name in base.names if name.endswith(f".{target}") or target.endswith(f".{name}")]
    return ends[0] if len(ends) == 1 else None


@dataclass
class MergeModel:
    """One model of a merge: a checkpoint, or an adapter on one."""

    label: str
    """For messages: `input 2 (name)`."""
    name: str
    digest: str
    checkpoint: TensorFolder
    info: ModelInfo
    """The checkpoint's; under an adapter, its base's."""
    adapter: AdapterTensors | None = None
    template: str | None = None
    revision: str | None = None

    @property
    def kind(self) -> str:
        """``adapter`` or ``checkpoint``."""
        return "checkpoint" if self.adapter is None else "adapter"

    def entry(self, name: str) -> Entry:
        """Type and shape of a tensor."""
        return self.checkpoint.entry(name)

    def touches(self, name: str) -> bool:
        """Whether an adapter changes it; True for every tensor of a checkpoint."""
        return self.adapter is None or self.adapter.touches(name)

    def stored(self, name: str) -> torch.Tensor:
        """The checkpoint's tensor in its stored type, found finite.

        Raises:
            UserError: NaN or infinity, with the names of model and tensor.
        """
        tensor = self.checkpoint.read(name)
        if problem := not_finite(tensor):
            raise UserError(
                f"{self.checkpoint.label}, {name}", f"holds {problem}", "Fetch, train or save that model again."
            )
        return tensor

    def weight(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The tensor as this model has it: float32, new."""
        import torch

        if self.entry(name).dtype not in FLOATS:
            raise UserError(
                f"{self.label}, {name}",
                f"is stored as {self.entry(name).dtype}, which has no differences",
                f"Save the model again in one of: {', '.join(FLOATS)}.",
            )
        base = self.stored(name).to(device=device, dtype=torch.float32, copy=True)
        return self.adapter.apply(name, base) if self.adapter is not None and self.adapter.touches(name) else base
