"""What a model or adapter folder holds, found out without loading it; and its tokenizer.

Nothing here imports torch. transformers is imported by :func:`open_tokenizer` alone.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.conditioning import Conditioning
from harness.core.errors import UserError
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.secrecy import refuse_credentials
from harness.core.specs import ModelSpec
from harness.models.adapter_keys import Base, check_keys, module_of
from harness.models.artifact import CONDITIONING, adapter_digest, conditioning_files, largest_rank
from harness.models.chat_templates import read_chat_template
from harness.models.conditioning import read_conditioning
from harness.models.files import (
    IndexFile,
    LineageFile,
    read_adapter_config,
    read_checked,
    read_config,
)
from harness.models.locate import is_url, locate, short_name
from harness.models.tensors import Entry, read_header
from harness.steps.files import stays_inside
from harness.steps.provenance import digest_of_bytes, files_digest

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
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def inspect_model(spec: ModelSpec, where: str = "--model", *, conditioned: bool = False) -> ModelInfo:
    """Find the model's folder and read what identifies it.

    Args:
        spec: which one.
        where: what messages call it.
        conditioned: the caller applies the conditioning that the model was trained with; else such a one is refused.

    Raises:
        UserError: no such folder or hub model, not a model folder, pickled weights or remote code without leave.
    """
    if is_url(spec.model):
        refuse_credentials(spec.model, where, "OPENAI_API_KEY")
        return _endpoint(spec)
    path, revision = locate(spec.model, spec.revision, where, "config.json")
    config = read_config(path / "config.json", where)
    _refuse_remote_code(config, spec, where)
    weights, pickled = _weights(path, spec, where)
    tokenizer_files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    template = read_chat_template(path)
    text_config = config.get("text_config") or config
    length = next((text_config[key] for key in _LENGTH_KEYS if isinstance(text_config.get(key), int)), None)
    info = ModelInfo(
        ref=spec.model,
        path=str(path),
        name=short_name(spec.model, revision, path),
        revision=revision,
        config=config,
        architecture=(config.get("architectures") or ["unknown"])[0],
        max_length=length or DEFAULT_MAX_LENGTH,
        vocab_size=text_config.get("vocab_size"),
        weights_digest=files_digest([*weights, *conditioning_files(path)], path),
        tokenizer_digest=files_digest(tokenizer_files, path),
        template_digest=digest_of_bytes(template.encode()) if template is not None else None,
        chat_template=template,
        size_bytes=sum(file.stat().st_size for file in weights),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        pickled=pickled,
        remote_code=bool(config.get("auto_map")),
        spec=spec.model_dump(mode="json", include={"dtype", "allow_pickle", "trust_remote_code"}),
    )
    found = _conditioning(path, f"{where} {spec.model}", info, conditioned)
    return info if found is None else info.model_copy(update={"conditioning": found})


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
    path, _ = locate(ref, None, where, "tokenizer_config.json")
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


def _refuse_remote_code(config: dict[str, Any], spec: ModelSpec, where: str) -> None:
    if config.get("auto_map") and not spec.trust_remote_code:
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
        shards = read_checked(index, IndexFile, where).get("weight_map")
        if not shards:
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
        # So that a torn download fails here and not inside an engine.
        read_header(file, where)
    if safe:
        return safe, False
    found = [*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    pickled = sorted(file for file in found if file.is_file())
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
    except Exception as error:  # tokenizers raises that very class
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
    folder = path if path.is_dir() else locate(ref, revision, where, "adapter_config.json")[0]
    return (folder / "adapter_config.json").is_file()


def inspect_adapter(
    ref: str,
    model: ModelInfo,
    *,
    revision: str | None = None,
    allow_template_mismatch: bool = False,
    conditioned: bool = False,
) -> AdapterInfo:
    """Read what identifies a peft adapter and check that it fits the model.

    Args:
        ref: folder or hub id.
        model: its base.
        revision: hub revision.
        allow_template_mismatch: go on where the base has another chat template.
        conditioned: the caller applies the conditioning that the adapter was trained with; else such a one is refused.

    Raises:
        UserError: no such adapter, not an adapter folder, another base, another chat template.
    """
    where = "--adapter"
    path, revision = locate(ref, revision, where, "adapter_config.json")
    config = read_adapter_config(path / "adapter_config.json", where)
    weights = sorted(path.glob("adapter_model*.safetensors"))
    if not weights:
        what, fix = "no adapter_model.safetensors in that folder", "Give a whole peft adapter."
        if (path / "adapter_model.bin").is_file():
            what = "only pickled weights (adapter_model.bin), and unpickling can run any code"
            fix = "Convert them to adapter_model.safetensors where you trust where they come from."
        raise UserError(f"{where} {ref}", what, fix)
    _check_base(ref, path, config, model)
    header = {name: entry for file in weights for name, entry in read_header(file, where).items()}
    check_keys(f"{where} {ref}", config, header, _base_of(model))
    template = read_chat_template(path)
    check_template(f"{where} {ref}", template, model, allowed=allow_template_mismatch)
    return AdapterInfo(
        ref=ref,
        path=str(path),
        name=short_name(ref, revision, path),
        digest=adapter_digest(path),
        rank=largest_rank(config),
        config=config,
        chat_template=template,
        conditioning=_conditioning(path, f"{where} {ref}", model, conditioned),
    )


def adapter_modules(adapter: AdapterInfo) -> list[str]:
    """Modules of the base that an adapter's file has tensors for, by their full names; torch-free.

    Raises:
        UserError: the file cannot be read.
    """
    if not adapter.path:  # it is not there yet
        return []
    files = sorted(Path(adapter.path).glob("adapter_model*.safetensors"))
    return sorted({module_of(name) for file in files for name in read_header(file)})


def _conditioning(path: Path, where: str, model: ModelInfo, honoured: bool) -> Conditioning | None:
    """What conditions prompts, for those who apply it; without it adapter or model is another one than was trained."""
    if not any(path.glob(f"{CONDITIONING}*")):
        return None
    found = read_conditioning(path, where, model, _base_of(model))
    if found is not None and not honoured:
        raise UserError(
            where,
            f"was trained with a conditioning (conditioning.json; values: {', '.join(found.values)}), which is not "
            "applied here",
            "Without it the answers are those of no trained value. Evaluate, serve, merge or fold it "
            "(docs/conditioning.md), or take one that has none.",
        )
    return found


def _base_of(model: ModelInfo) -> Base | None:
    """Modules of the base, as far as its files tell them; None where they do not."""
    if is_url(model.ref) or model.pickled or not model.path:
        return None
    entries: dict[str, Entry] = {}
    for file in weight_files(model):
        entries |= read_header(file, "--model")
    return Base.of({name: entry.shape for name, entry in entries.items()}, model.config)


def _check_base(ref: str, path: Path, config: dict[str, Any], model: ModelInfo) -> None:
    """The lineage the harness wrote decides; else peft's base_model_name_or_path, as far as it says anything."""
    lineage = path / "lineage.json"
    if lineage.is_file():
        digest = read_checked(lineage, LineageFile, "--adapter").get("base", {}).get("weights")
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
    # OSError: a name that is too long for a path.
    with contextlib.suppress(UserError, OSError):
        if not same and Path(named).is_dir():
            same = (
                {model.name}
                if inspect_model(ModelSpec(model=named), conditioned=True).weights_digest == model.weights_digest
                else same
            )
    if not same:
        raise UserError(
            f"--adapter {ref}",
            f"its base is {named!r}, not {model.ref!r}",
            "Give its own base as --model; if they are the same weights, mend base_model_name_or_path in "
            "adapter_config.json.",
        )


def check_template(where: str, template: str | None, model: ModelInfo, *, allowed: bool) -> None:
    """The parity gate: evaluation must send the template that training used.

    Raises:
        UserError: the model's is another one than ``template``, an adapter's.
    """
    if template is None or allowed or model.chat_template is None:
        return
    digest = digest_of_bytes(template.encode())
    if digest != model.template_digest:
        raise UserError(
            where,
            f"was trained with chat template {digest[:12]}, and {model.ref} has "
            f"{model.template_digest[:12] if model.template_digest else 'none'}",
            "Give the base with that template, or pass --allow-template-mismatch.",
        )
