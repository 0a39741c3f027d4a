"""What a model's generation_config.json says, in our words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UserError
from harness.core.records import ModelInfo
from harness.core.specs import Decoding
from harness.models.generation_config import TOP_K, decoding_of_model, end_tokens, generation_identity

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


@pytest.mark.parametrize(
    ("own", "what"),
    [
        ({"temperature": "hot"}, "temperature: 'hot' is no number above 0"),
        ({"temperature": -1}, "temperature: -1 is no number above 0"),
        ({"top_p": 1.5}, "top_p: 1.5 is no number above 0 and at most 1"),
        ('{"do_sample": true, "top_p": NaN}', "top_p: nan is no number above 0 and at most 1"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, own: Any, what: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, own if isinstance(own, str) else {"do_sample": True, **own})
    assert (refused.value.where, refused.value.what) == (str(tmp_path / "generation_config.json"), what)


# ------------------------------------------------------------------------------------------------- where answers end


def ending(folder: Path, own: Any, config: Any = 2) -> ModelInfo:
    if own is not None:
        (folder / "generation_config.json").write_text(own if isinstance(own, str) else json.dumps(own))
    written = {"eos_token_id": config} if config is not None else {}
    return ModelInfo(ref="m", path=str(folder), name="m", weights_digest="w", tokenizer_digest="t", config=written)


@pytest.mark.parametrize(
    ("own", "ends", "entered"),
    [
        (None, [2], {}),
        ({"eos_token_id": 2}, [2], {}),
        ({"eos_token_id": [2]}, [2], {}),
        ({"eos_token_id": [7, 2]}, [2, 7], {"end_tokens": [2, 7]}),
        ({"eos_token_id": 7}, [7], {"end_tokens": [7]}),
        # As transformers reads it.
        ({}, [], {"end_tokens": []}),
        ({"eos_token_id": None}, [], {"end_tokens": []}),
    ],
)
def test_end_tokens_enter_an_id_where_config_json_does_not_say_them(
    tmp_path: Path, own: Any, ends: list[int], entered: dict[str, Any]
) -> None:
    model = ending(tmp_path, own)
    assert end_tokens(model) == ends
    assert generation_identity(model, sampling=False) == entered


def test_how_answers_are_drawn_enters_where_the_file_decides_it(tmp_path: Path) -> None:
    model = ending(tmp_path, {"eos_token_id": 2, "do_sample": True, "temperature": 0.6})
    assert generation_identity(model, sampling=True) == {"drawn_as": (0.6, 1.0)}
    assert generation_identity(model, sampling=False) == {}
    assert generation_identity(ending(tmp_path, {"eos_token_id": 2, "temperature": 0.6}), sampling=True) == {}


def test_an_endpoint_ends_where_it_likes() -> None:
    model = ModelInfo(ref="http://h/v1", path="", name="m", weights_digest="w", tokenizer_digest="t")
    assert generation_identity(model, sampling=True) == {}


@pytest.mark.parametrize("value", ["</s>", [2, "x"], True, -1, 2.0, {"a": 1}])
def test_end_tokens_that_are_none(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UserError) as refused:
        end_tokens(ending(tmp_path, {"eos_token_id": value}))
    assert refused.value.what == f"eos_token_id: {value!r} is no token id"
    assert refused.value.where == str(tmp_path / "generation_config.json")


def test_transformers_reads_the_same(tiny: Path, tmp_path: Path) -> None:
    """The file's ids alone, where there is a file; else those of config.json."""
    import shutil

    from transformers import AutoModelForCausalLM

    from harness.core.specs import ModelSpec
    from harness.models.inspect import inspect_model

    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    for own in ({"eos_token_id": [1, 5]}, {"do_sample": False}, None):
        if own is None:
            (folder / "generation_config.json").unlink()
        else:
            (folder / "generation_config.json").write_text(json.dumps(own))
        theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        theirs = theirs if isinstance(theirs, list) else [theirs]
        assert end_tokens(inspect_model(ModelSpec(model=str(folder)))) == [one for one in theirs if one is not None]
