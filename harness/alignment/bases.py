"""The base under an alignment: watched, so that none is trained on a changed one, and kept open for the next.

An adapter is a difference from the weights on disk. A method that writes to frozen weights makes one that nobody can
use, in silence; so every base is held against what it was opened with. Only such a base is kept, with its modules,
hooks and settings put back as they were: what it is next trained with cannot tell it from a fresh one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.alignment.plan import AlignPlan
from harness.alignment.policy import described_quantization, open_base, release
from harness.core.errors import StepError

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 1 << 24
"""Words of 64 bits that are summed at once: 128 MiB."""


class Bases:
    """At most one base, open from one alignment of this process to the next."""

    def __init__(self, *, keep: bool = False) -> None:
        """``keep``: let it stay open once its alignment has ended; whoever says so calls :meth:`release`."""
        self._keep = keep
        self._open: _Open | None = None

    def release(self) -> None:
        """Let the base go, and its memory."""
        if self._open is not None:
            self._open = None
            release()

    def open(self, plan: AlignPlan, device: int, log: Callable[..., None]) -> Any:
        """The base of a plan, without anything attached: that which is open, where it is the same, or a fresh one.

        Args:
            plan: of the alignment.
            device: number of its GPU, where there are any.
            log: told whether it was open, as an event ``base``.
        """
        key = _key(plan, device)
        if self._open is None or self._open.key != key:
            # Before the next one is opened: both might not fit.
            self.release()
            base = open_base(plan, device)
            self._open = _Open(key, base)
            log("base", kept=False)
        else:
            log("base", kept=True)
        return self._open.base

    @contextlib.contextmanager
    def in_use(self, plan: AlignPlan) -> Iterator[None]:
        """Hold the base against what it was when this ends, and keep it or let it go; after an error it always goes.

        Raises:
            StepError: frozen weights of it have been changed.
        """
        kept = False
        try:
            yield
            kept = self._open is not None and self._open.restored(plan) and self._keep
        finally:
            if not kept:
                self.release()


@dataclass
class _Open:
    """A base with what it was when it was opened."""

    key: tuple[Any, ...]
    base: Any
    tree: Tree = field(init=False)

    def __post_init__(self) -> None:
        self.tree = Tree(self.base)

    def restored(self, plan: AlignPlan) -> bool:
        """Whether the base is what it was, to the bit, with everything else put back.

        Raises:
            StepError: weights have changed that nobody trains.
        """
        if not hasattr(self.base, "peft_config"):
            # A whole model is left, not an adapter: its weights may be what they like.
            return False
        trained = {name for name, one in self.tree.parameters.items() if one.requires_grad}
        changed = self.tree.changed()
        if frozen := sorted((changed & self.tree.parameters.keys()) - trained):
            more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
            what = (
                f"{plan.spec.method} with {plan.spec.adapter} has changed frozen weights of the base: {frozen[0]}{more}"
            )
            fix = (
                "Its adapter fits no base there is. Train such weights as part of the adapter, or with --adapter none."
            )
            raise StepError(plan.arm, what, fix)
        if trained or changed:
            # Buffers are no weights, but what is attached next would see them.
            return False
        self.tree.restore()
        return True


def _key(plan: AlignPlan, device: int) -> tuple[Any, ...]:
    """All that a base is opened with."""
    model, spec = plan.model, plan.spec.model
    quantization = described_quantization(plan.adapter.quantization(plan.adapter_options))
    told = sorted(quantization.items()) if quantization is not None else None
    return (model.path, model.weights_digest, spec.dtype, str(told), device, spec.allow_pickle, spec.trust_remote_code)


class Tree:
    """What a model is made of, to be put back: modules, their attributes and hooks, settings, flags of weights.

    Libraries leave things behind when they are asked to let go (hooks, ``peft_config``, a ``forward`` of their own);
    so nothing is undone here step by step, but all of it is set to what it was.
    """

    def __init__(self, model: Any) -> None:
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.buffers: dict[str, Tensor] = dict(model.named_buffers())
        self._prints = self._printed()
        self._modules = [(module, type(module), _contents(vars(module))) for module in model.modules()]
        self._settings = [(one, _contents(vars(one), deep=True)) for one in _settings_of(model)]
        self._flags = [(one, one.requires_grad, dict(vars(one))) for one in self.parameters.values()]

    def changed(self) -> set[str]:
        """Names of weights and buffers that are no longer the bits that they were."""
        now = self._printed()
        return {name for name, found in self._prints.items() if now[name] != found}

    def restore(self) -> None:
        """Put everything back but the bits of weights and buffers."""
        for module, kind, contents in self._modules:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(_contents(contents))
        for one, contents in self._settings:
            vars(one).clear()
            vars(one).update(_contents(contents, deep=True))
        for parameter, trainable, contents in self._flags:
            parameter.grad = None
            parameter.requires_grad_(trainable)
            vars(parameter).clear()
            vars(parameter).update(contents)

    def _printed(self) -> dict[str, tuple[Any, ...]]:
        return {name: fingerprint(tensor) for name, tensor in (self.parameters | self.buffers).items()}


def _contents(attributes: dict[str, Any], *, deep: bool = False) -> dict[str, Any]:
    """Attributes, and copies of the containers among them: the one that is restored must not be changed later."""
    from transformers import GenerationConfig, PreTrainedConfig

    def copied(value: Any) -> Any:
        if deep and not isinstance(value, PreTrainedConfig | GenerationConfig):
            return copy.deepcopy(value)
        return copy.copy(value) if isinstance(value, dict | list | set) else value

    return {name: copied(value) for name, value in attributes.items()}


def _settings_of(model: Any) -> list[Any]:
    """The configurations that a model's modules share, and those within them; each once."""
    from transformers import GenerationConfig, PreTrainedConfig

    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        one = waiting.pop()
        if isinstance(one, PreTrainedConfig | GenerationConfig) and id(one) not in found:
            found[id(one)] = one
            waiting += vars(one).values()
    return list(found.values())


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from any other: where it lies, type, shape, a 64-bit sum over its bits; of 4-bit weights
    their scales, too.

    A change of one word always shows; that changes of several cancel each other has a chance of about 2**-64.
    """
    state = getattr(tensor, "quant_state", None)
    more: dict[str, Any] = state.as_dict() if state is not None else {}
    scales = [(name, _sum(one) if hasattr(one, "untyped_storage") else repr(one)) for name, one in more.items()]
    return (str(tensor.device), str(tensor.dtype), tuple(tensor.shape), _sum(tensor), tuple(scales))


def _sum(tensor: Tensor) -> int:
    """Words of 64 bits, each times an odd number of its place (a splitmix64 step), modulo 2**64; where it lies.

    Not torch.hash_tensor, whose XOR forgets places, and any even number of changed signs.
    """
    import torch
    from torch.nn.functional import pad

    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = 0
    for start in range(0, data.numel(), 8 * WORDS):
        piece = data[start : start + 8 * WORDS]
        # A copy where it does not begin at, or end on, a word.
        piece = pad(piece, (0, -piece.numel() % 8)) if piece.numel() % 8 else piece
        words = (piece.clone() if piece.storage_offset() % 8 else piece).view(torch.int64)
        places = torch.arange(start // 8, start // 8 + words.numel(), device=words.device)
        mixed = places * -0x61C8864680B583EB
        mixed = (mixed ^ (mixed >> 30)) * -0x40A7B892E31B1A47
        total += int((words * (mixed | 1)).sum())
    return total % (1 << 64)
