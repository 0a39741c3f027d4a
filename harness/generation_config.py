"""How a model would draw its answers by itself: what its generation_config.json says, in our words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.records import ModelInfo
from harness.specs import Decoding

FILE = "generation_config.json"
TOP_K = 50
"""What transformers takes for sampling where the file says nothing (GenerationConfig)."""
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "min_p": None, "typical_p": 1.0, "num_beams": 1}
"""Further keys that would change the answers, with the value at which they do not."""


def decoding_of_model(decoding: Decoding, model: ModelInfo, seed: int, note: Callable[[str], None]) -> Decoding:
    """Temperature and nucleus of the model's own, as transformers' ``generate`` takes them; the rest stays.

    Args:
        decoding: whose lengths, stops and seed hold.
        model: with a folder.
        seed: of sampling, where ``decoding`` has none.
        note: told what was found, and what of it is not applied.

    Raises:
        UserError: the model is behind an endpoint, or its file is not JSON.
    """
    if not model.path:
        raise UserError(
            "decoding_of: model",
            f"{model.ref} is an endpoint, and those do not hand out {FILE}",
            "Take the task with its own decoding, or evaluate the model's folder.",
        )
    own = _read(Path(model.path) / FILE)
    # transformers samples only where it is told to, whatever temperature stands there.
    if own.get("do_sample") is not True:
        note(f"decoding as the model's {FILE} says: greedy")
        return decoding.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    temperature, top_p = float(own.get("temperature") or 1.0), float(own.get("top_p") or 1.0)
    left_out = {"top_k": own.get("top_k", TOP_K)} if own.get("top_k", TOP_K) else {}
    left_out |= {key: own[key] for key, neutral in NEUTRAL.items() if own.get(key, neutral) not in (neutral, None)}
    listed = ", ".join(f"{key} {value}" for key, value in left_out.items())
    not_applied = f" (not applied: {listed})" if listed else ""
    note(f"decoding as the model's {FILE} says: temperature {temperature:g}, top_p {top_p:g}{not_applied}")
    return decoding.model_copy(
        update={
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed if decoding.seed is None else decoding.seed,
        }
    )


def _read(file: Path) -> dict[str, Any]:
    """The file's settings; none where there is no file, as transformers has it."""
    if not file.is_file():
        return {}
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(file), f"cannot be read: {error}", "Mend it, or delete it: greedy then.") from None
    if not isinstance(own, dict):
        raise UserError(str(file), f"a JSON {type(own).__name__}, not an object", "Mend it, or delete it: greedy then.")
    return own
