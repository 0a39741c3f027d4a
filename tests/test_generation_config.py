"""What a model's generation_config.json says, in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.generation_config import TOP_K, decoding_of_model
from harness.records import ModelInfo
from harness.specs import Decoding

GIVEN = Decoding(max_new_tokens=500, temperature=0.3, top_p=0.4, stop=("x",))


def read(folder: Path, own: Any, decoding: Decoding = GIVEN) -> tuple[Decoding, str]:
    if own is not None:
        (folder / "generation_config.json").write_text(own if isinstance(own, str) else json.dumps(own))
    notes: list[str] = []
    model = ModelInfo(ref="m", path=str(folder), name="m", weights_digest="w", tokenizer_digest="t")
    return decoding_of_model(decoding, model, 7, notes.append), "; ".join(notes)


@pytest.mark.parametrize("own", [None, {}, {"temperature": 0.9, "top_p": 0.6}, {"do_sample": False, "top_k": 5}])
def test_transformers_samples_only_where_it_is_told_to(tmp_path: Path, own: Any) -> None:
    found, note = read(tmp_path, own)
    assert found == Decoding(max_new_tokens=500, temperature=0.0, top_p=1.0, stop=("x",))
    assert note == "decoding as the model's generation_config.json says: greedy"


def test_sampling_and_what_is_not_applied(tmp_path: Path) -> None:
    found, note = read(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    assert found == Decoding(max_new_tokens=500, temperature=0.6, top_p=0.9, stop=("x",), seed=7)
    assert note.endswith("temperature 0.6, top_p 0.9 (not applied: top_k 50, repetition_penalty 1.1)")


def test_nothing_is_left_out_where_nothing_else_is_set(tmp_path: Path) -> None:
    found, note = read(tmp_path, {"do_sample": True, "top_k": 0}, GIVEN.model_copy(update={"seed": 3}))
    assert (found.temperature, found.top_p, found.seed) == (1.0, 1.0, 3)
    assert note.endswith("temperature 1, top_p 1")


def test_the_default_of_transformers() -> None:
    """Its ``generate`` fills what no file says; the value has a place of its own in its code."""
    from transformers import GenerationConfig

    defaults = GenerationConfig._get_default_generation_params()
    assert (defaults["top_k"], defaults["do_sample"]) == (TOP_K, False)
    assert (defaults["temperature"], defaults["top_p"]) == (1.0, 1.0)


@pytest.mark.parametrize(("own", "what"), [("{", "cannot be read: "), ("[]", "a JSON list, not an object")])
def test_a_file_that_is_none(tmp_path: Path, own: str, what: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, own)
    assert refused.value.where == str(tmp_path / "generation_config.json")
    assert refused.value.what.startswith(what) and "delete it" in refused.value.fix


def test_an_endpoint_has_none() -> None:
    model = ModelInfo(ref="http://h/v1", path="", name="m", weights_digest="w", tokenizer_digest="t")
    with pytest.raises(UserError, match="http://h/v1 is an endpoint, and those do not hand out"):
        decoding_of_model(GIVEN, model, 0, print)
