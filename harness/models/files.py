"""Strict readers of what lies in a model or adapter folder: whatever is malformed ends as one UserError. No torch."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from harness.core.errors import UserError

MOST_BYTES = 256 * 2**20
"""No file of settings is larger; a header of safetensors may have 100 MB."""
DEEPEST = 64
"""Levels of nesting; what writes JSON again is recursive."""
MOST_LAYERS = 10_000
"""No model has as many; transformers would build each before it looked at the weights."""
AGAIN = "Fetch or save it again."

Count = Annotated[int, Field(ge=0, le=2**48)]
Names = str | list[str] | None


class _Schema(BaseModel):
    """What is read of a file; further keys are for others to read."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class Sizes(_Schema):
    """The sizes that config.json gives for a model, or for one of the models that it is made of."""

    vocab_size: Count | None = None
    hidden_size: Count | None = None
    num_attention_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count | None = None
    n_positions: Count | None = None
    n_ctx: Count | None = None
    max_seq_len: Count | None = None
    num_hidden_layers: int | None = Field(None, ge=0, le=MOST_LAYERS)
    n_layer: int | None = Field(None, ge=0, le=MOST_LAYERS)
    n_layers: int | None = Field(None, ge=0, le=MOST_LAYERS)
    num_layers: int | None = Field(None, ge=0, le=MOST_LAYERS)
    tie_word_embeddings: bool | None = None
    dtype: str | None = None
    torch_dtype: str | None = None


class ModelFile(Sizes):
    """config.json."""

    architectures: list[str] | None = None
    auto_map: dict[str, Any] = Field(default_factory=dict)
    model_type: str | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    is_encoder_decoder: bool | None = None


class IndexFile(_Schema):
    """model.safetensors.index.json."""

    weight_map: dict[str, Annotated[str, Field(min_length=1, max_length=255)]] = Field(default_factory=dict)


class NamedTemplate(_Schema):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerFile(_Schema):
    """tokenizer_config.json."""

    chat_template: str | list[NamedTemplate] | None = None


class LineageBase(_Schema):
    """The base that an adapter was trained on."""

    weights: str | None = None


class Ancestor(_Schema):
    """An adapter that another was continued from."""

    name: str
    digest: str


class LineageFile(_Schema):
    """lineage.json, which the harness writes."""

    base: LineageBase = Field(default_factory=LineageBase)
    adapters: list[Ancestor] = Field(default_factory=list)


class AdapterFile(_Schema):
    """adapter_config.json of any kind of peft adapter."""

    peft_type: str
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: list[str] | None = None


class VeraFile(AdapterFile):
    """adapter_config.json of a VeRA."""

    r: int = Field(256, ge=1, le=2**20)
    projection_prng_key: int = Field(0, ge=-(2**63), lt=2**64)
    save_projection: bool = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names = None
    bias: Literal["none", "all", "vera_only"] = "none"
    fan_in_fan_out: bool = False


class Ia3File(AdapterFile):
    """adapter_config.json of an IA3."""

    feedforward_modules: Names = None
    fan_in_fan_out: bool = False


class LoraFile(AdapterFile):
    """adapter_config.json of a LoRA."""

    peft_type: Literal["LORA"] = "LORA"
    r: int = Field(8, ge=1, le=2**20)
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=2**20)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Names = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_rslora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None

    @field_validator("lora_alpha", "lora_dropout")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("a finite number")
        return value


def check_folder(folder: Path, where: str) -> None:
    """Refuse a folder with a pipe, socket, device or endless link directly in it: libraries read what we do not.

    Raises:
        UserError: naming the first.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{where} {folder}", f"cannot be read: {error.strerror}", "Give a readable folder.") from None
    for entry in entries:
        try:
            mode = entry.stat().st_mode
        except FileNotFoundError:
            continue  # a link to nothing: whoever needs the file says so
        except OSError as error:
            raise UserError(f"{where} {entry}", f"cannot be read: {error.strerror}", "Remove it.") from None
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise UserError(f"{where} {entry}", "is a pipe, socket or device, no regular file", "Remove it.")


def open_file(file: Path, where: str) -> BinaryIO:
    """Open a regular file for reading; anything else is refused, and nothing blocks.

    Raises:
        UserError: it cannot be opened, or is no regular file.
    """
    place = f"{where} {file}".strip()
    try:
        # A pipe without a writer would block here.
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(place, f"cannot be read: {why}", AGAIN) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(place, "is no regular file", AGAIN)
    return os.fdopen(handle, "rb")


def read_text(file: Path, where: str = "") -> str:
    """A UTF-8 file of settings.

    Raises:
        UserError: it cannot be read, is too large, or is not UTF-8.
    """
    with open_file(file, where) as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise UserError(f"{where} {file}".strip(), f"has more than {MOST_BYTES} bytes", AGAIN)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} {file}".strip(), f"is not UTF-8 (byte {error.start})", AGAIN) from None


def read_object(file: Path, where: str = "") -> dict[str, Any]:
    """A JSON object whose numbers are finite and whose nesting is shallow.

    An infinity is read as transformers writes it, ``{"__float__": "Infinity"}``.

    Raises:
        UserError: naming the file, and the key where one is at fault.
    """
    place = f"{where} {file}".strip()
    text = read_text(file, where)
    try:
        value = json.loads(text, parse_constant=lambda name: {"__float__": name} if name != "NaN" else math.nan)
    except RecursionError:
        raise UserError(place, f"is nested deeper than {DEEPEST} levels", AGAIN) from None
    except ValueError as error:
        raise UserError(place, f"not readable JSON: {error}", "Restore the file.") from None
    if not isinstance(value, dict):
        raise UserError(place, "not a JSON object", "Restore the file.")
    for key, flaw in _flaws(value):
        raise UserError(f"{place}, key {key}", flaw, "Restore the file.")
    return value


def read_checked(file: Path, schema: type[_Schema], where: str = "") -> dict[str, Any]:
    """A JSON object, as it stands, that fits a schema.

    Raises:
        UserError: naming the file and the key.
    """
    value = read_object(file, where)
    check(value, schema, f"{where} {file}".strip())
    return value


def read_config(file: Path, where: str = "") -> dict[str, Any]:
    """config.json, with the configurations that it nests.

    Raises:
        UserError: naming the file and the key.
    """
    config = read_checked(file, ModelFile, where)
    for key, nested in config.items():
        if key.endswith("_config") and isinstance(nested, dict):
            check(nested, Sizes, f"{where} {file}".strip(), key)
    return config


_ADAPTERS: dict[str, type[AdapterFile]] = {"LORA": LoraFile, "VERA": VeraFile, "IA3": Ia3File}


def read_adapter_config(file: Path, where: str = "") -> dict[str, Any]:
    """adapter_config.json.

    Raises:
        UserError: naming the file and the key.
    """
    config = read_checked(file, AdapterFile, where)
    if (schema := _ADAPTERS.get(config["peft_type"])) is not None:
        check(config, schema, f"{where} {file}".strip())
    return config


def check(value: dict[str, Any], schema: type[_Schema], place: str, prefix: str = "") -> None:
    """Hold an object against a schema.

    Raises:
        UserError: naming the key, what it is and what it should be.
    """
    try:
        schema.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        path, seen = _followed(value, problems[0]["loc"])
        # One key of a union has one problem for each kind that it could have been.
        said = [str(p["msg"]) for p in problems if _followed(value, p["loc"])[0] == path]
        kinds = (one.removeprefix("Input should be ").removeprefix("Value error, ") for one in said)
        should = " or ".join(dict.fromkeys(kinds))
        if problems[0]["type"] == "missing":
            path, found = [str(part) for part in problems[0]["loc"]], "nothing"
        else:
            found = repr(seen)[:60]
        key = ".".join([prefix, *path] if prefix else path)
        raise UserError(f"{place}, key {key}", f"should be {should}, found {found}", "Restore the file.") from None


def _followed(value: Any, loc: tuple[int | str, ...]) -> tuple[list[str], Any]:
    """The part of an error's address that is in the data, and what is there; pydantic puts names of types between."""
    path: list[str] = []
    for part in loc:
        inside = isinstance(value, dict) and part in value
        if inside or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
            path.append(str(part))
    return path, value


def _flaws(value: Any) -> Iterator[tuple[str, str]]:
    """Values that are JSON in Python's eyes alone: the keys that lead there, and what is wrong."""
    waiting: list[tuple[Any, tuple[str, ...]]] = [(value, ())]
    while waiting:
        here, path = waiting.pop()
        key = ".".join(path)[:100]
        if len(path) > DEEPEST:
            yield key, f"is nested deeper than {DEEPEST} levels"
            return
        if isinstance(here, float) and not math.isfinite(here):
            yield key, f"{here} is no finite number"
        if isinstance(here, str) and not _encodable(here):
            yield key, f"{here[:60]!a} is no Unicode text"
        if isinstance(here, dict):
            for name in here:
                if not _encodable(name):
                    yield f"{name[:60]!a}", "is no Unicode text"
            waiting += [(inner, (*path, name)) for name, inner in here.items()]
        elif isinstance(here, list):
            waiting += [(inner, (*path, str(number))) for number, inner in enumerate(here)]


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True
