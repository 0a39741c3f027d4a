"""What stands for values while a model trains: texts, virtual tokens, or low-rank updates. Heavy: imports torch.

A control is a module beside the model. It says which token ids stand in the prompt, and what they are replaced by.
peft trains one adapter for a whole batch (its ``adapter_names`` are refused in training mode), so low-rank updates of
several values in one micro-batch are hooks here: each row goes through the factors of its own values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness import AdapterControl, StepError, UserError, control_tokens


class Control(nn.Module):
    """What the values of a row do to it; ``places`` are those of its values among the keys."""

    keys: tuple[str, ...]

    def ids(self, places: Sequence[int]) -> list[int]:
        """Token ids in the prompt; those of virtual tokens mean nothing."""
        return []

    def vectors(self, places_BP: Tensor) -> Tensor | None:
        """(B, tokens, hidden size) in the stead of those ids; None: they are words."""
        return None

    def choose(self, places_BP: Tensor) -> None:
        """Take the rows of the next forward pass as having these values."""

    def exported(self) -> dict[str, Any]:
        """Name of a value -> what ``write_conditioning`` takes for it."""
        raise NotImplementedError


class TextControl(Control):
    """A text for each value."""

    def __init__(self, texts: Mapping[str, str], tokenizer: Any) -> None:
        super().__init__()
        self.keys, self.texts, self.tokenizer = tuple(texts), dict(texts), tokenizer
        self._known: dict[tuple[int, ...], list[int]] = {}

    def ids(self, places: Sequence[int]) -> list[int]:
        """Of the texts put together, as evaluation tokenises them."""
        chosen = tuple(places)
        if chosen not in self._known:
            text = "".join(self.texts[self.keys[place]] for place in chosen)
            self._known[chosen] = control_tokens(self.tokenizer, text)
        return self._known[chosen]

    def exported(self) -> dict[str, Any]:
        """The texts."""
        return dict(self.texts)


class SoftControl(Control):
    """Virtual tokens for each value, which all begin as the same words of the vocabulary, drawn at random."""

    def __init__(self, keys: Sequence[str], tokens: int, embeddings: Any) -> None:
        super().__init__()
        self.keys, self.tokens = tuple(keys), tokens
        words_VD = embeddings.weight.detach()
        drawn_K = torch.randint(words_VD.shape[0], (tokens,)).to(words_VD.device)
        start_KD = words_VD[drawn_K].float()
        self.weight = nn.Parameter(start_KD.repeat(len(keys), 1, 1))

    def ids(self, places: Sequence[int]) -> list[int]:
        """One for each virtual token."""
        return [0] * (self.tokens * len(places))

    def vectors(self, places_BP: Tensor) -> Tensor:
        """Those of a row's values one after the other."""
        return self.weight[places_BP].flatten(1, 2)

    def exported(self) -> dict[str, Any]:
        """The vectors of each value."""
        return dict(zip(self.keys, self.weight.detach().float().cpu(), strict=True))


class LoraControl(Control):
    """A low-rank update of linear layers for each value; B begins at zero, and A alike for all values."""

    _chosen: Tensor | None = None

    def __init__(self, keys: Sequence[str], rank: int, alpha: int, targets: Sequence[str], model: Any) -> None:
        super().__init__()
        self.keys, self.rank, self.alpha, self.targets = tuple(keys), rank, alpha, tuple(targets)
        layers = linear_layers(model, targets)
        self.paths = tuple(layers)
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        for number, layer in enumerate(layers.values()):
            start_RI = torch.empty(rank, layer.in_features)
            nn.init.kaiming_uniform_(start_RI, a=math.sqrt(5))
            self.A.append(nn.Parameter(start_RI.repeat(len(keys), 1, 1).to(model.device)))
            self.B.append(nn.Parameter(torch.zeros(len(keys), layer.out_features, rank, device=model.device)))
            layer.register_forward_hook(self._hook(number))

    def choose(self, places_BP: Tensor) -> None:
        """For the next forward pass, and for what gradient checkpointing computes again of it."""
        self._chosen = places_BP

    def _hook(self, number: int) -> Any:
        def add(layer: Any, inputs: tuple[Tensor, ...], out_BTO: Tensor) -> Tensor:
            places_BP, x_BTI = self._chosen, inputs[0]
            if places_BP is None:
                return out_BTO
            if x_BTI.ndim != 3 or len(x_BTI) != len(places_BP):
                what = f"{self.paths[number]} sees {list(x_BTI.shape)} for {len(places_BP)} rows: rows are not apart"
                raise StepError("control: lora", what, "Choose other layers with --set control_targets.")
            for places_B in places_BP.unbind(1):
                a_BRI = self.A[number][places_B].to(x_BTI.dtype)
                b_BOR = self.B[number][places_B].to(x_BTI.dtype)
                low_BTR = torch.bmm(x_BTI, a_BRI.transpose(1, 2))
                update_BTO = torch.bmm(low_BTR, b_BOR.transpose(1, 2)) * (self.alpha / self.rank)
                out_BTO = out_BTO + update_BTO.to(out_BTO.dtype)
            return out_BTO

        return add

    def exported(self) -> dict[str, Any]:
        """Adapters in peft's format."""
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "target_modules": sorted(self.targets),
        }
        found = {}
        for place, key in enumerate(self.keys):
            tensors = {}
            for path, a_VRI, b_VOR in zip(self.paths, self.A, self.B, strict=True):
                tensors[f"base_model.model.{path}.lora_A.weight"] = a_VRI[place].detach().float().cpu().clone()
                tensors[f"base_model.model.{path}.lora_B.weight"] = b_VOR[place].detach().float().cpu().clone()
            found[key] = AdapterControl(config, tensors)
        return found


def linear_layers(model: Any, targets: Sequence[str]) -> dict[str, Any]:
    """Path in the bare model -> layer, those that an adapter wraps included, of the layers so named.

    Raises:
        UserError: a name that no linear layer has; lists those there are.
    """
    found, names = {}, set()
    for path, module in model.named_modules():
        if not isinstance(getattr(module, "base_layer", module), nn.Linear) or path.endswith(".base_layer"):
            continue
        if ".lora_" in path:
            continue
        name = path.rpartition(".")[2]
        names.add(name)
        if name in targets:
            found[path.removeprefix("base_model.model.")] = module
    if missing := [target for target in targets if target not in names]:
        what = f"the model has no linear layer {', '.join(map(repr, missing))}"
        raise UserError("--set control_targets", what, f"Its linear layers: {', '.join(sorted(names))}.")
    return found
