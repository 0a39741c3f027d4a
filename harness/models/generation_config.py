"""Where a model ends its answers and how it would draw them by itself: its generation_config.json, in our words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import Decoding

FILE = "generation_config.json"
TOP_K = 50
"""What transformers takes for sampling where the file says nothing (GenerationConfig)."""
NEUTRAL: dict[str, Any] = {"repetition_penalty": 1.0, "min_p": None, "typical_p": 1.0, "num_beams": 1}
"""Further keys that would change the answers, with the value at which they do not."""
_FIX = "Mend it, or delete it: then config.json names the end tokens, and decoding is greedy."


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
    file = Path(model.path) / FILE
    own = _read(file)
    drawn = _drawn(own, file)
    if drawn is None:
        note(f"decoding as the model's {FILE} says: greedy")
        return decoding.model_copy(update={"temperature": 0.0, "top_p": 1.0})
    temperature, top_p = drawn
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


def end_tokens(model: ModelInfo) -> list[int]:
    """The tokens that end an answer beside the tokenizer's own: those of generation_config.json, else of config.json.

    As transformers has it, a file that names none leaves none, whatever config.json says.

    Raises:
        UserError: the file is torn, or what it names are no token ids.
    """
    file = Path(model.path) / FILE
    return _ids(_read(file), file) if model.path and file.is_file() else _of_config(model)


def generation_identity(model: ModelInfo, *, sampling: bool) -> dict[str, Any]:
    """What of the file may move an answer: enters the id of answers, unless it only repeats what the id has anyway.

    Args:
        model: with a folder, or behind an endpoint, whose settings are its own affair.
        sampling: whether answers are drawn as the file says (``decoding_of: model``), and not only ended.

    Raises:
        UserError: as :func:`end_tokens`.
    """
    if not model.path:
        return {}
    file = Path(model.path) / FILE
    ends, drawn = end_tokens(model), _drawn(_read(file), file) if sampling else None
    return {
        **({"end_tokens": ends} if ends != _of_config(model) else {}),
        **({"drawn_as": drawn} if drawn is not None else {}),
    }


def _of_config(model: ModelInfo) -> list[int]:
    return _ids(model.config, Path(model.path) / "config.json")


def _ids(settings: dict[str, Any], file: Path) -> list[int]:
    """Of ``eos_token_id``, which is a token id or a list of them."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(one) is int and one >= 0 for one in ids):
        raise UserError(str(file), f"eos_token_id: {value!r} is no token id", "Give one such as 2, or a list of them.")
    return sorted(set(ids))


def _drawn(own: dict[str, Any], file: Path) -> tuple[float, float] | None:
    """Temperature and nucleus; None: greedy. transformers samples only where it is told to, whatever stands there."""
    if own.get("do_sample") is not True:
        return None
    return _number(own, "temperature", file, math.inf), _number(own, "top_p", file, 1.0)


def _number(own: dict[str, Any], key: str, file: Path, most: float) -> float:
    """A setting above 0; 1 where the file says nothing, or 0, as transformers has it."""
    value = own.get(key) or 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most or math.isinf(value):
        limit = f"above 0 and at most {most:g}" if most < math.inf else "above 0"
        raise UserError(str(file), f"{key}: {value!r} is no number {limit}", "Mend it, or delete it.")
    return float(value)


def _read(file: Path) -> dict[str, Any]:
    """The file's settings; none where there is no file, as transformers has it."""
    if not file.is_file():
        return {}
    try:
        own = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(file), f"cannot be read: {error}", _FIX) from None
    if not isinstance(own, dict):
        raise UserError(str(file), f"a JSON {type(own).__name__}, not an object", _FIX)
    return own
