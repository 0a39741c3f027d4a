"""The kinds of adapters that come down to changed weights, and the words in which all others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.errors import UserError
from harness.core.records import AdapterInfo
from harness.merging.adapters.ia3 import Ia3Tensors
from harness.merging.adapters.lora import LoraTensors
from harness.merging.adapters.tensors import AdapterTensors
from harness.merging.adapters.vera import VeraTensors
from harness.models.tensors import TensorFolder

KINDS: dict[str, type[AdapterTensors]] = {"LORA": LoraTensors, "VERA": VeraTensors, "IA3": Ia3Tensors}
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


def open_adapter(info: AdapterInfo, base: TensorFolder, label: str) -> AdapterTensors:
    """Open an adapter's files as changes of its base's tensors: what eval (folding), merge and fold all begin with.

    Raises:
        UserError: a kind of adapter that cannot be written as changed weights, or one that does not fit the base.
    """
    refuse_unsupported(info.config, label)
    return KINDS[info.config["peft_type"]](info, base, label)


def refuse_unsupported(config: Mapping[str, Any], label: str) -> None:
    """Refuse what does not come down to changed weights.

    Raises:
        UserError: naming every such setting.
    """
    reasons = []
    if config.get("peft_type") not in KINDS:
        reasons.append(f"peft_type {config.get('peft_type')}")
    reasons += [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        reasons.append(f"init_lora_weights {config['init_lora_weights']} (which changes the base too)")
    if reasons:
        raise UserError(
            label,
            f"cannot be written as changed weights: {', '.join(reasons)}",
            "LoRA (rsLoRA, DoRA), VeRA and IA3 adapters can, with whole modules and biases saved beside them.",
        )
