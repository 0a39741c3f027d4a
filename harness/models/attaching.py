"""Adapters attached to a model in memory, and whether all of each file arrived; peft itself warns at most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.core.records import AdapterInfo
from harness.models.adapter_keys import misfit

if TYPE_CHECKING:
    from peft import PeftModel


def attach_adapter(model: Any, adapter: AdapterInfo, name: str, where: str) -> PeftModel:
    """Lay an adapter on a model, beside those that lie on it already.

    Args:
        model: the base, or the PeftModel with earlier adapters.
        adapter: as ``inspect_adapter`` finds it.
        name: what the PeftModel calls it; no dots.
        where: option and adapter, for messages.

    Returns:
        The PeftModel, its adapters frozen, in evaluation mode.

    Raises:
        UserError: the file lacks tensors that the attached adapter has, or holds others.
    """
    from peft import PeftModel

    more = {"torch_device": str(model.device)}
    if not isinstance(model, PeftModel):
        model = PeftModel.from_pretrained(model, adapter.path, adapter_name=name, is_trainable=False, **more)
    # Once more for the first, whose result peft keeps to itself.
    result: Any = model.load_adapter(adapter.path, adapter_name=name, **more)
    missing, surplus = sorted(result.missing_keys), sorted(result.unexpected_keys)
    if missing or surplus:
        raise misfit(where, missing, surplus, "Give a whole adapter of this base, as peft's save_pretrained wrote it.")
    return model.eval()
