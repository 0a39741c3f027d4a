"""A merge as a low-rank adapter: exact where the merger works on factors, else the best approximation of a rank.

The best approximation of rank r of a matrix D, in the Frobenius norm, is made of its r greatest singular triples
(Eckart and Young 1936). Large matrices go through a randomised range finder with power iterations (Halko, Martinsson
and Tropp 2011, SIAM Review 53:217, algorithm 4.4 and 5.1); what is lost is measured, not estimated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError
from harness.merging.compute import Maker
from harness.merging.inputs import OpenModels
from harness.merging.sources import is_embedding
from harness.merging.tensor_plan import TensorRecipe
from harness.models.lineage import CONFIG, base_for_peft
from harness.steps.files import write_bytes

if TYPE_CHECKING:
    import torch

_EXACT = 512
"""Matrices up to this size get a full decomposition: it takes a fraction of a second."""
_OVERSAMPLING, _POWERS = 16, 3
_OPTION = "--as adapter"


@dataclass
class LowRank:
    """One tensor's change in factors, and what they lose."""

    a: torch.Tensor
    """(rank, in), float32"""
    b: torch.Tensor
    """(out, rank), float32"""
    how: str
    """``exact`` (the merger's own factors), ``svd``, or ``randomised svd``."""
    lost: float
    """Square of the Frobenius norm of what is lost."""
    whole: float
    """Square of the Frobenius norm of the change."""


def changed_recipes(recipes: Sequence[TensorRecipe], maker: Maker) -> list[TensorRecipe]:
    """What an adapter must hold; checkpoints are compared with the base byte by byte.

    Raises:
        UserError: a tensor changes that no LoRA layer lies on.
    """
    found = []
    for recipe in recipes:
        if recipe.base is None or maker.opened.base is None:
            raise UserError(_OPTION, "there is no base that an adapter could lie on", "Add --base BASE.")
        if maker.equal(recipe) is not None:
            continue
        untouched = maker.untouched(recipe)
        if untouched and maker.merger.operates_on == "deltas":
            continue
        if untouched:
            raise UserError(
                _OPTION,
                f"{maker.merger.name} with these weights changes {recipe.name}, which no input changes",
                "Give weights that sum to 1, or write a model: --as model.",
            )
        if len(maker.opened.base.entry(recipe.base.tensor).shape) != 2 or is_embedding(recipe.name):
            raise UserError(
                f"{_OPTION}, {recipe.name}",
                "is changed, and only linear layers can be written as an adapter",
                "Write a model: --as model.",
            )
        found.append(recipe)
    if not found:
        raise UserError(_OPTION, "no input changes any tensor of the base", "Look at --inputs and --base.")
    return found


def rank_of(opened: OpenModels, recipes: Sequence[TensorRecipe], asked: int | None) -> int:
    """The rank of every module: as asked, or the sum of the inputs', and never more than a matrix can have.

    Raises:
        UserError: none was asked for, and an input has none.
    """
    assert opened.base is not None
    most = max(min(opened.base.entry(r.base.tensor).shape) for r in recipes if r.base is not None)
    if asked is not None:
        if asked > most:
            raise UserError(
                "--rank", f"{asked}, and no changed matrix has a rank above {most}", f"Give {most} or less."
            )
        return asked
    for model in opened.inputs:
        if model.adapter is None or not model.adapter.factor_parts:
            kind = "a checkpoint" if model.adapter is None else f"of peft_type {model.adapter.config['peft_type']}"
            raise UserError("--rank", f"{model.name} is {kind}: its change has no rank of its own", "Add --rank R.")
    return min(sum(model.adapter.info.rank for model in opened.inputs if model.adapter is not None), most)


def low_rank(recipe: TensorRecipe, maker: Maker, rank: int) -> LowRank:
    """One tensor's merged change in factors of a rank, zeros where it needs less."""
    factors = maker.factors(recipe)
    if factors is not None:
        merged = maker.merger.merge_factors(factors, weights=recipe.weights, config=recipe.options)
        if merged is not None:
            # For the record's figures; and a merger that is not linear may be asked as well.
            maker.delta(recipe)
            return _from_factors(merged.A.float(), merged.B.float() * merged.scale, rank)
    delta = maker.delta(recipe)
    return _padded(_truncated(delta, rank, maker.generator(recipe.name)(-1)), rank)


def _from_factors(a: torch.Tensor, b: torch.Tensor, rank: int) -> LowRank:
    """The product B A as it is where its rank is small enough; else its best approximation, through the core's SVD."""
    import torch

    gram = (b.double().t() @ b.double()) * (a.double() @ a.double().t())
    whole = float(gram.sum())
    if a.shape[0] <= rank:
        return _padded(LowRank(a, b, "exact", 0.0, whole), rank)
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().t())
    u, s, vh = torch.linalg.svd(rb @ ra.t())
    root = s[:rank].sqrt()
    lost = float((s[rank:] ** 2).sum())
    kept_b, kept_a = (qb @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ qa.t())
    how = "exact" if lost <= 1e-14 * whole else "svd"
    return _padded(LowRank(kept_a.float(), kept_b.float(), how, lost, whole), rank)


def _truncated(delta: torch.Tensor, rank: int, generator: torch.Generator) -> LowRank:
    import torch

    small = min(delta.shape)
    if small <= _EXACT or 4 * rank >= small:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        how = "svd"
    else:
        basis = delta @ torch.randn(delta.shape[1], rank + _OVERSAMPLING, generator=generator)
        basis = torch.linalg.qr(basis)[0]
        for _ in range(_POWERS):
            basis = torch.linalg.qr(delta.t() @ basis)[0]
            basis = torch.linalg.qr(delta @ basis)[0]
        inner, s, vh = torch.linalg.svd(basis.t() @ delta, full_matrices=False)
        u, how = basis @ inner, "randomised svd"
    root = s[:rank].sqrt()
    b, a = u[:, :rank] * root, root[:, None] * vh[:rank]
    lost = torch.addmm(delta, b, a, alpha=-1)
    return LowRank(
        a.contiguous(), b.contiguous(), how, float(lost.double().pow(2).sum()), float(delta.double().pow(2).sum())
    )


def _padded(found: LowRank, rank: int) -> LowRank:
    """The same with zeros up to the rank: engines want one rank for all modules."""
    import torch

    more = rank - found.a.shape[0]
    if more > 0:
        found.a = torch.cat([found.a, torch.zeros(more, found.a.shape[1])])
        found.b = torch.cat([found.b, torch.zeros(found.b.shape[0], more)], dim=1)
    return found


def is_transposed(opened: OpenModels) -> bool:
    """Whether the base's linear weights are stored as (in, out), as its adapters say."""
    return any(m.adapter is not None and bool(m.adapter.config.get("fan_in_fan_out")) for m in opened.inputs)


def write_adapter_config(out: Path, opened: OpenModels, recipes: Sequence[TensorRecipe], rank: int) -> None:
    """adapter_config.json in peft's format: one rank, scale 1."""
    modules = sorted(recipe.name.removesuffix(".weight") for recipe in recipes)
    ends = sorted({module.rsplit(".", 1)[-1] for module in modules})
    have = [n.removesuffix(".weight") for n in opened.base_names or () if n.endswith(".weight")]
    covered = {module for module in have if module.rsplit(".", 1)[-1] in ends}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **base_for_peft(opened.info, out),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        # By their last names where all such modules have the adapter, else one by one.
        "target_modules": ends if covered == set(modules) else modules,
        "bias": "none",
        "fan_in_fan_out": is_transposed(opened),
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    write_bytes(out / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
