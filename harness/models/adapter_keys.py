"""Which tensors a LoRA, VeRA or IA3 adapter must have on a base, by peft's rules, and whether its file has just those.

peft fills what a file lacks with what it starts training from (a change of nothing), ignores what it does not know, and
says so in a warning at most. No torch. The rules are those of ``peft.tuners.tuners_utils.check_target_module_exists``,
``peft.utils.other._set_trainable`` and ``peft.utils.save_and_load.get_peft_model_state_dict`` (peft 0.21).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from harness.core.errors import UserError
from harness.core.regex_guard import Pattern, check_patterns

PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings", "embed_positions")
"""Last names of modules that are embeddings; peft has other tensors for those."""
_FAMILIES = {
    "LORA": "lora_", "ADALORA": "lora_", "IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "VERA": "vera_lambda_",
    "OFT": "oft_", "BOFT": "boft_", "HRA": "hra_", "LN_TUNING": "ln_tuning_",
}  # fmt: skip
"""Kinds of adapters, and how the names of their tensors begin."""
_OTHER_RULES = (
    "target_parameters", "layer_replication", "megatron_config", "arrow_config", "use_bdlora", "use_qalora",
    "kasa_config", "monteclora_config", "velora_config", "ensure_weight_tying",
)  # fmt: skip
"""Settings of LoRA that bring tensors of other names: only the attached adapter shows which."""
_PART = re.compile(
    r"\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?|"
    r"token_adapter\.trainable_tokens_delta)$"
)
_SHOWN = 3


class Shaped(Protocol):
    """A tensor's entry in a header."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its dimensions."""


@dataclass(frozen=True)
class Base:
    """The modules of a base, from the names of its tensors."""

    weights: Mapping[str, tuple[int, ...]]
    """Module -> shape of its weight."""
    others: Mapping[str, tuple[int, ...]]
    """Further tensors by their full names (biases)."""
    renamed: bool
    """Whether transformers gives some modules other names than the files do."""

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Base:
        """From the shapes of all tensors and config.json."""
        weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
        others = {name: shape for name, shape in shapes.items() if not name.endswith(".weight")}
        head = "lm_head" if "lm_head" in weights else None
        embedding = next((m for m in weights if m.rpartition(".")[2] in EMBEDDINGS and "pos" not in m), None)
        if head is None and embedding is not None and config.get("tie_word_embeddings", True):
            weights["lm_head"] = weights[embedding]
        composed = any(name.endswith("_config") and isinstance(value, dict) for name, value in config.items())
        kinds = {config.get("model_type"), *(config.get("architectures") or ())}
        return cls(weights, others, composed or not kinds.isdisjoint(_renamed_kinds()))


@cache
def _renamed_kinds() -> frozenset[str]:
    """Model types and classes whose tensors transformers renames, read from its source so that it is not imported."""
    spec = find_spec("transformers")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        source = Path(folder) / "conversion_mapping.py"
        if source.is_file():
            return frozenset(re.findall(r"\"(\w+)\"", source.read_text(encoding="utf-8")))
    return frozenset()


@dataclass
class _Expected:
    """What a file should hold: names without peft's prefix -> shapes (None: any)."""

    required: dict[str, tuple[int, ...] | None] = field(default_factory=dict)
    allowed: set[str] = field(default_factory=set)


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to."""
    plain = name.removeprefix(PREFIX)
    part = _PART.search(plain)
    return plain[: part.start()] if part else _plain(plain).rpartition(".")[0]


def check_keys(where: str, config: Mapping[str, Any], header: Mapping[str, Shaped], base: Base | None) -> None:
    """Hold the tensors of an adapter's file against those that its configuration asks for on this base.

    Args:
        where: option and adapter, for messages.
        config: adapter_config.json, as ``read_adapter_config`` returns it.
        header: the tensors of the file.
        base: None where its modules cannot be told from its files.

    Raises:
        UserError: no tensors, tensors that are missing, that nobody asked for or that have another shape; a regular
            expression that does not end.
    """
    kind = config["peft_type"]
    found = {_plain(name.removeprefix(PREFIX)): tuple(entry.shape) for name, entry in header.items()}
    if not found:
        raise UserError(where, "holds no tensors", "Give a whole adapter, or save it again.")
    family = _FAMILIES.get(kind)
    if family is not None and not any(f".{family}" in name for name in found):
        raise UserError(
            where,
            f"is of peft_type {kind}, and none of its {len(found)} tensors is ({next(iter(found))}, ...)",
            "Restore its adapter_config.json, or save the adapter again.",
        )
    modules = {module_of(name) for name in found}
    check_patterns(where, _patterns(config), [*modules, *(base.weights if base is not None else ())])
    if kind not in _LAYERS or base is None or base.renamed or any(config.get(key) for key in _OTHER_RULES):
        return  # the attached adapter tells; see ``harness.models.attaching``
    expected = _expected(config, _as_loaded(base, modules), found)
    _compare(where, found, expected)


def _plain(name: str) -> str:
    """peft wraps modules; what it wraps keeps its name."""
    return name.replace(".base_layer.", ".")


def _patterns(config: Mapping[str, Any]) -> list[Pattern]:
    """Every regular expression that peft makes of the configuration."""
    made = []
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(config.get(key), str):
            made.append(Pattern(key, config[key], "fullmatch"))
    for key in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(key), dict):
            made += [Pattern(key, one, "match", rf"(.*\.)?({one})$") for one in config[key]]
    made += [Pattern("modules_to_save", one, "match", _under(one)) for one in config.get("modules_to_save") or ()]
    made += [Pattern("layers_pattern", one, "match", _numbered(one)) for one in _listed(config.get("layers_pattern"))]
    return made


def _under(module: str) -> str:
    return rf"(^|.*\.){module}($|\..*)"


def _numbered(layers: str) -> str:
    return rf"(?:^|.*?\.){layers}\.(?P<idx>\d+)\."


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | int) else list(value or ())


def _as_loaded(base: Base, modules: Iterable[str]) -> Base:
    """The base with the prefix that its modules have once they are loaded: files may leave it out, or have one more."""
    votes: Counter[tuple[str, str]] = Counter()
    for module in modules:
        if module in base.weights:
            votes["", ""] += 1
            continue
        parts = module.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in base.weights:
                votes[".".join(parts[:cut]) + ".", ""] += 1
                break
        else:
            longer = next((name for name in base.weights if name.endswith(f".{module}")), None)
            if longer is not None:
                votes["", longer.removesuffix(module)] += 1
    if not votes:
        return base
    more, less = votes.most_common(1)[0][0]

    def named(name: str) -> str:
        return name if name.startswith("lm_head") else more + name.removeprefix(less)

    return Base(
        {named(name): shape for name, shape in base.weights.items()},
        {named(name): shape for name, shape in base.others.items()},
        base.renamed,
    )


def targeted(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The modules that get a layer of the adapter's, by peft's rule."""
    return [name for name in names if _is_target(config, name)]


def _is_target(config: Mapping[str, Any], name: str) -> bool:
    excluded, targets = config.get("exclude_modules"), config.get("target_modules")
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, name):
            return False
    elif excluded and _ends(name, excluded):
        return False
    if any(re.match(_under(one), name) for one in config.get("modules_to_save") or ()):
        return False
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            return name.rpartition(".")[2] not in (*EMBEDDINGS, "lm_head")
        return re.fullmatch(targets, name) is not None
    targets = targets or ()
    return name in targets or (_ends(name, targets) and _in_layers(config, name))


def _ends(name: str, ends: Sequence[str]) -> bool:
    return name in ends or any(name.endswith(f".{end}") for end in ends)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = _listed(config.get("layers_pattern"))
    if not patterns:
        match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
    else:
        match = next((found for one in patterns if (found := re.match(_numbered(one), name))), None)
    return match is not None and int(match["idx"]) in _listed(wanted)


def _expected(config: Mapping[str, Any], base: Base, found: Mapping[str, tuple[int, ...]]) -> _Expected:
    made = _Expected()
    matrices = [name for name, shape in base.weights.items() if len(shape) > 1]
    modules = targeted(config, matrices)
    for module in modules:
        _LAYERS[config["peft_type"]](made, config, module, base.weights[module])
    tensors = {f"{name}.weight": shape for name, shape in base.weights.items()} | dict(base.others)
    for saved in config.get("modules_to_save") or ():
        # peft takes every module whose name ends so, with all that lies in it.
        owners = {name[: cut.end()] for name in tensors for cut in re.finditer(rf"{re.escape(saved)}(?=\.)", name)}
        made.required |= {n: shape for n, shape in tensors.items() if any(n.startswith(f"{o}.") for o in owners)}
    if config.get("bias", "none") != "none":
        owned = {f"{module}.bias" for module in modules}
        made.required |= {n: s for n, s in base.others.items() if n in owned or _trained_bias(config, n)}
    tokens = config.get("trainable_token_indices")
    for end in tokens if isinstance(tokens, dict) else EMBEDDINGS if tokens else ():
        for module in (name for name in base.weights if name.endswith(end)):
            made.allowed.add(f"{module}.token_adapter.trainable_tokens_delta")
    if tokens and not made.allowed & set(found):
        made.required |= dict.fromkeys(made.allowed)
    # Beside a LoRA on embeddings, and where the vocabulary has grown, peft saves the embeddings themselves.
    made.allowed |= {f"{n}.weight" for n in base.weights if n.rpartition(".")[2] in ("embed_tokens", "lm_head")}
    return made


def _trained_bias(config: Mapping[str, Any], name: str) -> bool:
    return config["bias"] == "all" and name.endswith(".bias")


def _expect_lora(made: _Expected, config: Mapping[str, Any], module: str, weight: tuple[int, ...]) -> None:
    patterns = config.get("rank_pattern") or {}
    rank = next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), config.get("r", 8))
    more: list[str] = ["lora_magnitude_vector"] if config.get("use_dora") else []
    if module.rpartition(".")[2] in EMBEDDINGS:
        # An embedding's weight is (tokens, width), and its A takes tokens.
        made.required[f"{module}.lora_embedding_A"] = (rank, weight[0])
        made.required[f"{module}.lora_embedding_B"] = (weight[1], rank)
        made.required |= {f"{module}.{part}": (weight[1],) for part in more}
        return
    more += ["lora_B.bias"] if config.get("lora_bias") else []
    if len(weight) == 2:
        out, inner = reversed(weight) if config.get("fan_in_fan_out") else weight
        made.required |= {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (out, rank)}
        made.required |= {f"{module}.{part}": (out,) for part in more}
    else:
        made.required |= {f"{module}.{part}": None for part in ("lora_A.weight", "lora_B.weight", *more)}


def _expect_vera(made: _Expected, config: Mapping[str, Any], module: str, weight: tuple[int, ...]) -> None:
    out = weight[1] if config.get("fan_in_fan_out") else weight[0]
    made.required |= {f"{module}.vera_lambda_b": (out,), f"{module}.vera_lambda_d": (config.get("r", 256),)}
    if config.get("save_projection", True):
        made.required |= {"base_model.vera_A": None, "base_model.vera_B": None}


def _expect_ia3(made: _Expected, config: Mapping[str, Any], module: str, weight: tuple[int, ...]) -> None:
    inner, out = weight[:2] if config.get("fan_in_fan_out") else reversed(weight[:2])
    inputs = config.get("feedforward_modules") or ()
    on_inputs = re.fullmatch(inputs, module) if isinstance(inputs, str) else any(module.endswith(one) for one in inputs)
    # Convolutions have vectors of more dimensions.
    made.required[f"{module}.ia3_l"] = None if len(weight) > 2 else (1, inner) if on_inputs else (out, 1)


_LAYERS = {"LORA": _expect_lora, "VERA": _expect_vera, "IA3": _expect_ia3}
"""Kinds of adapters whose tensors are known from their configuration; of all others the attached adapter tells."""


def _compare(where: str, found: Mapping[str, tuple[int, ...]], expected: _Expected) -> None:
    have = {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): s for name, s in found.items()}
    missing = sorted(set(expected.required) - set(have))
    surplus = sorted(set(have) - set(expected.required) - expected.allowed)
    fix = (
        "Restore adapter_config.json and adapter_model.safetensors, or give the base that it was trained on as --model."
    )
    if not expected.required:
        raise UserError(where, "its target_modules are no modules of the base", fix)
    if missing or surplus:
        raise misfit(where, missing, surplus, fix)
    for name, shape in expected.required.items():
        if shape is not None and have[name] != shape:
            raise UserError(
                where, f"{name} has shape {list(have[name])}, and on this base it has to have {list(shape)}", fix
            )


def misfit(where: str, missing: Sequence[str], surplus: Sequence[str], fix: str) -> UserError:
    """The error for an adapter whose file does not hold what its configuration asks for on its base."""
    said = [
        f"{what}: {len(names)} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (("missing tensors", missing), ("tensors that would be ignored", surplus))
        if names
    ]
    return UserError(where, f"does not fit its base or its adapter_config.json: {'; '.join(said)}", fix)
