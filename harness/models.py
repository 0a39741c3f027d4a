"""What a model or adapter folder holds, found out without loading it; and its tokenizer.

Nothing here imports torch. transformers is imported by :func:`open_tokenizer` alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, nearest
from harness.provenance import digest_of_bytes, files_digest
from harness.records import AdapterInfo, ModelInfo
from harness.specs import ModelSpec
from harness.store import stays_inside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 2048
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
]
_MODEL_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py"]
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def is_url(ref: str) -> bool:
    """Whether the reference is an endpoint rather than a folder or a hub id."""
    return ref.startswith(("http://", "https://"))


def inspect_model(spec: ModelSpec, where: str = "--model") -> ModelInfo:
    """Find the model's folder and read what identifies it.

    Raises:
        UserError: no such folder or hub model, not a model folder, pickled weights or remote code without leave.
    """
    if is_url(spec.model):
        return _endpoint(spec)
    path, revision = _locate(spec.model, spec.revision, where, "config.json")
    config = _read_config(path / "config.json", where)
    _refuse_remote_code(config, spec, where)
    weights, pickled = _weights(path, spec, where)
    tokenizer_files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    template = read_chat_template(path)
    text_config = config.get("text_config") or config
    length = next((text_config[key] for key in _LENGTH_KEYS if isinstance(text_config.get(key), int)), None)
    return ModelInfo(
        ref=spec.model,
        path=str(path),
        name=_short_name(spec.model, revision, path),
        revision=revision,
        config=config,
        architecture=(config.get("architectures") or ["unknown"])[0],
        max_length=length or DEFAULT_MAX_LENGTH,
        vocab_size=text_config.get("vocab_size"),
        weights_digest=files_digest(weights, path),
        tokenizer_digest=files_digest(tokenizer_files, path),
        template_digest=digest_of_bytes(template.encode()) if template is not None else None,
        chat_template=template,
        size_bytes=sum(file.stat().st_size for file in weights),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        pickled=pickled,
        remote_code="auto_map" in config,
        spec=spec.model_dump(mode="json", include={"dtype", "allow_pickle", "trust_remote_code"}),
    )


def _endpoint(spec: ModelSpec) -> ModelInfo:
    """An endpoint's weights cannot be digested: what identifies it is its address and the model's name there."""
    unknown = "not verifiable: the model is behind an endpoint"
    return ModelInfo(
        ref=spec.model,
        path="",
        name=re.sub(r"^https?://", "", spec.model).rstrip("/"),
        weights_digest=digest_of_bytes(f"endpoint {spec.model} {spec.revision}".encode()),
        tokenizer_digest=digest_of_bytes(unknown.encode()),
        architecture="endpoint",
        spec=spec.model_dump(mode="json", include={"dtype", "allow_pickle", "trust_remote_code"}),
    )


def with_tokenizer(model: ModelInfo, ref: str, where: str) -> ModelInfo:
    """A remote model with the tokenizer (and chat template) of a folder or hub id."""
    path, _ = _locate(ref, None, where, "tokenizer_config.json")
    files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    template = read_chat_template(path)
    return model.model_copy(
        update={
            "path": str(path),
            "tokenizer_digest": files_digest(files, path),
            "chat_template": template,
            "template_digest": digest_of_bytes(template.encode()) if template is not None else None,
        }
    )


def _short_name(ref: str, revision: str | None, path: Path) -> str:
    """The folder's or hub id's last part; a snapshot folder's name would be a commit."""
    return ref.rstrip("/").rsplit("/", 1)[-1] if revision is not None else path.resolve().name


def _locate(ref: str, revision: str | None, where: str, wanted: str) -> tuple[Path, str | None]:
    """Folder of a local path or hub id, and the commit for a hub id."""
    path = Path(ref).expanduser()
    if path.is_file():
        raise UserError(f"{where} {ref}", "is a file", f"Give the folder that holds it: {path.resolve().parent}.")
    if path.exists():
        if not (path / wanted).is_file():
            found = sorted(p.name for p in path.iterdir())[:8]
            other = "config.json" if wanted == "adapter_config.json" else "adapter_config.json"
            hint = ""
            if (path / other).is_file():
                hint = " It holds " + ("a model: give it as --model." if other == "config.json" else "an adapter: ")
                hint += "" if other == "config.json" else "give its base as --model and this folder as --adapter."
            raise UserError(
                f"{where} {ref}",
                f"{wanted} is not in that folder (it holds: {', '.join(found) or 'nothing'})",
                f"Give a folder in the format of transformers or peft.{hint}",
            )
        return path, None
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref) or ref.startswith((".", "/")):
        raise _missing(ref, path, where)
    return _snapshot(ref, revision, where, path)


def _missing(ref: str, path: Path, where: str) -> UserError:
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return UserError(f"{where} {ref}", "no such folder", f"The path exists as far as {parent.resolve()}.")
    folders = sorted(p.name for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))
    close = nearest(path.name, folders)
    if close:
        fix = f"Did you mean {' or '.join(str(parent / c) for c in close)}?"
    else:
        fix = f"Folders in {parent}: {', '.join(folders[:8]) or 'none'}."
    return UserError(f"{where} {ref}", "no such folder", fix)


def _snapshot(ref: str, revision: str | None, where: str, path: Path) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(ref, revision=revision, allow_patterns=_MODEL_PATTERNS))
    except RepositoryNotFoundError:
        raise UserError(
            f"{where} {ref}", "neither a folder here nor a model on the hub", "Check the name (and your access token)."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        if "/" not in ref:
            raise _missing(ref, path, where) from None
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "the hub cannot be reached"
        at = f" at revision {revision}" if revision else ""
        folder_hint = _missing(ref, path, where).fix
        raise UserError(
            f"{where} {ref}",
            f"no such folder, and not in the hub cache{at} ({offline}; {type(error).__name__})",
            f"{folder_hint} Or fetch it where there is a network: `hf download {ref}`.",
        ) from None
    return folder, folder.name


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where} {path}", f"not readable JSON: {error}", "Restore the file.") from None
    if not isinstance(config, dict):
        raise UserError(f"{where} {path}", "not a JSON object", "Restore the file.")
    return config


def _refuse_remote_code(config: dict[str, Any], spec: ModelSpec, where: str) -> None:
    if "auto_map" in config and not spec.trust_remote_code:
        names = ", ".join(sorted(str(value) for value in config["auto_map"].values()))
        raise UserError(
            f"{where} {spec.model}",
            f"config.json asks to run code that comes with the model ({names})",
            "Read that code first; then pass --trust-remote-code.",
        )


def _weights(path: Path, spec: ModelSpec, where: str) -> tuple[list[Path], bool]:
    """The weight files that would be loaded, and whether they are pickled."""
    index = path / "model.safetensors.index.json"
    safe = sorted(path.glob("model*.safetensors"))
    if index.is_file():
        shards = _read_config(index, where).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(f"{where} {index}", "has no `weight_map` that names the shards", "Fetch it again.")
        names = sorted(set(shards.values()))
        outside = [name for name in names if not stays_inside(name)]
        if outside:
            what = f"names a shard outside its folder: {outside[0]}"
            raise UserError(f"{where} {index}", what, "Take the model from where it was published; this is no index.")
        absent = [name for name in names if not (path / name).is_file()]
        if absent:
            raise UserError(
                f"{where} {index}", f"names shards that are not there: {', '.join(absent[:4])}", "Fetch them again."
            )
        safe = [path / name for name in names]
    for file in safe:
        _check_safetensors(file, where)
    if safe:
        return safe, False
    pickled = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if not pickled:
        raise UserError(
            f"{where} {spec.model}", "no weights (*.safetensors) in that folder", "Give a folder that holds a model."
        )
    if not spec.allow_pickle:
        raise UserError(
            f"{where} {spec.model}",
            f"only pickled weights ({pickled[0].name}), and unpickling can run any code",
            "Convert them to safetensors, or pass --allow-pickle if you trust where they come from.",
        )
    return pickled, True


def weight_files(model: ModelInfo) -> list[Path]:
    """The files that a checkpoint's weights lie in."""
    spec = ModelSpec(model=model.ref, allow_pickle=bool(model.spec.get("allow_pickle")))
    return _weights(Path(model.path), spec, "--model")[0]


def _check_safetensors(file: Path, where: str) -> None:
    """Cheap check of header and length, so that a torn download fails here and not inside an engine."""
    size = file.stat().st_size
    problem = ""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if length > size - 8:
            problem = "its header is cut off"
        else:
            try:
                header = json.loads(stream.read(length))
                end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
                if end != size - 8 - length:
                    problem = f"it should hold {end + 8 + length} bytes and holds {size}"
            except (ValueError, KeyError, TypeError):
                problem = "its header is not JSON"
    if problem:
        raise UserError(f"{where} {file}", f"not a whole safetensors file: {problem}", "Fetch or save it again.")


def read_chat_template(path: Path) -> str | None:
    """The chat template of a tokenizer folder: chat_template.jinja, else the one in tokenizer_config.json."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    with contextlib.suppress(OSError, ValueError):
        template = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        if isinstance(template, str):
            return template
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            return named.get("default")
    return None


def open_tokenizer(model: ModelInfo, where: str = "--model") -> PreTrainedTokenizerBase:
    """The model's tokenizer, from its folder.

    Raises:
        UserError: the folder holds none that transformers can read.
    """
    from transformers import AutoTokenizer

    fix = "Put the base's tokenizer files (tokenizer.json, tokenizer_config.json) into that folder."
    if not any((Path(model.path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{where} {model.ref}", "there is no tokenizer in that folder", fix)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.path, trust_remote_code=model.spec.get("trust_remote_code", False)
        )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where} {model.ref}",
            f"its tokenizer cannot be opened: {line}",
            fix,
        ) from None
    # A base without a template speaks with the one that its adapter was trained with.
    if tokenizer.chat_template is None and model.chat_template is not None:
        tokenizer.chat_template = model.chat_template
    return tokenizer


def is_adapter(ref: str, revision: str | None, where: str) -> bool:
    """Whether a folder or hub id holds an adapter rather than a checkpoint.

    Raises:
        UserError: no such folder or hub model.
    """
    path = Path(ref).expanduser()
    folder = path if path.is_dir() else _locate(ref, revision, where, "adapter_config.json")[0]
    return (folder / "adapter_config.json").is_file()


def inspect_adapter(
    ref: str, model: ModelInfo, *, revision: str | None = None, allow_template_mismatch: bool = False
) -> AdapterInfo:
    """Read what identifies a peft adapter and check that it fits the model.

    Raises:
        UserError: no such adapter, not an adapter folder, another base, another chat template.
    """
    where = "--adapter"
    path, revision = _locate(ref, revision, where, "adapter_config.json")
    config = _read_config(path / "adapter_config.json", where)
    weights = sorted(path.glob("adapter_model*.safetensors"))
    if not weights:
        what, fix = "no adapter_model.safetensors in that folder", "Give a whole peft adapter."
        if (path / "adapter_model.bin").is_file():
            what = "only pickled weights (adapter_model.bin), and unpickling can run any code"
            fix = "Convert them to adapter_model.safetensors where you trust where they come from."
        raise UserError(f"{where} {ref}", what, fix)
    _check_base(ref, path, config, model)
    _check_shapes(ref, weights[0], model)
    _check_template(ref, path, model, allow_template_mismatch)
    conditioning = path / "conditioning.json"
    ranks = [int(config.get("r") or 0), *(int(r) for r in (config.get("rank_pattern") or {}).values())]
    extra = [conditioning] if conditioning.is_file() else []
    return AdapterInfo(
        ref=ref,
        path=str(path),
        name=_short_name(ref, revision, path),
        digest=files_digest([*weights, path / "adapter_config.json", *extra], path),
        rank=max(ranks),
        config=config,
        conditioning=_read_config(conditioning, where) if extra else None,
    )


def with_template_of(model: ModelInfo, adapter: AdapterInfo) -> ModelInfo:
    """The model with the chat template that its adapter was trained with, where it has none of its own."""
    template = read_chat_template(Path(adapter.path)) if model.chat_template is None else None
    if template is None:
        return model
    return model.model_copy(update={"chat_template": template, "template_digest": digest_of_bytes(template.encode())})


def _check_base(ref: str, path: Path, config: dict[str, Any], model: ModelInfo) -> None:
    """The lineage the harness wrote decides; else peft's base_model_name_or_path, as far as it says anything."""
    lineage = path / "lineage.json"
    if lineage.is_file():
        digest = _read_config(lineage, "--adapter").get("base", {}).get("weights")
        if digest is not None and digest != model.weights_digest:
            raise UserError(
                f"--adapter {ref}",
                f"was trained on a base with weights {digest[:12]}, and {model.ref} has {model.weights_digest[:12]}",
                "Give the base it was trained on as --model.",
            )
        return
    named = str(config.get("base_model_name_or_path") or "").rstrip("/")
    if not named:
        return
    same = {named.rsplit("/", 1)[-1].lower()} & {model.name.lower(), Path(model.path).resolve().name.lower()}
    if not same and Path(named).is_dir():
        with contextlib.suppress(UserError):
            same = (
                {model.name} if inspect_model(ModelSpec(model=named)).weights_digest == model.weights_digest else same
            )
    if not same:
        raise UserError(
            f"--adapter {ref}",
            f"its base is {named!r}, not {model.ref!r}",
            "Give its own base as --model; if they are the same weights, mend base_model_name_or_path in "
            "adapter_config.json.",
        )


def _check_shapes(ref: str, weights: Path, model: ModelInfo) -> None:
    """LoRA factors of attention projections must fit the base's width."""
    _check_safetensors(weights, "--adapter")
    with weights.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    width = (model.config.get("text_config") or model.config).get("hidden_size")
    for name, tensor in header.items():
        if width and name.endswith("q_proj.lora_A.weight") and tensor["shape"][1] != width:
            raise UserError(
                f"--adapter {ref}",
                f"{name} has shape {tensor['shape']}, but {model.ref} has hidden size {width}",
                "Give the base it was trained on as --model.",
            )


def _check_template(ref: str, path: Path, model: ModelInfo, allowed: bool) -> None:
    """The parity gate: evaluation must send the template that training used."""
    template = read_chat_template(path)
    if template is None or allowed or model.chat_template is None:
        return
    digest = digest_of_bytes(template.encode())
    if digest != model.template_digest:
        raise UserError(
            f"--adapter {ref}",
            f"was trained with chat template {digest[:12]}, and {model.ref} has "
            f"{model.template_digest[:12] if model.template_digest else 'none'}",
            "Give the base with that template, or pass --allow-template-mismatch.",
        )
