"""How far a folded model is from the adapter applied live: KL divergences of next-token distributions on short texts.

KL(P || Q) = sum over tokens of p (log p - log q), in nats, at every position of a text; the mean over a text's
positions is that text's value, and the interval is over texts. Models compute in fp32, so what is measured is the
difference of their weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import UserError
from harness.core.progress import Reporter
from harness.core.stats import summarise
from harness.merging.inputs import OpenModels
from harness.models.attaching import attach_adapter
from harness.models.inspect import open_tokenizer

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 256
"""A longer text is cut: the distributions of all texts are kept until the folded model has been read too."""
MOST_BYTES = 4_000_000_000
_OPTION = "--probe"
_BASES = {"bf16": "stored", "nf4-roundtrip": "nf4"}

SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Please explain to a child why the sky is blue on a clear day.",
    "To make bread you need flour, water, salt, yeast and some patience.",
    "In 1969 two people walked on the Moon for the first time.",
    "The sum of two even numbers is always even, because each of them is twice a whole number.",
    "She opened the window, looked at the rain, and decided to stay at home with a book.",
    "A good answer says what is known, what is not known, and how one could find out.",
    "Water boils at one hundred degrees Celsius at sea level, and at less on a mountain.",
    "My neighbour asked me how to grow tomatoes on a small balcony.",
    "The train to the coast leaves at half past seven from platform four.",
    "Write a short and friendly letter that thanks a colleague for her help.",
    "Sorting a list of n items by comparisons takes on the order of n log n steps.",
    "The museum is closed on Mondays, but the garden behind it is open all week.",
    "If you are not sure whether a mushroom can be eaten, do not eat it.",
    "He has played the violin since he was six, and the piano since he was nine.",
    "Leaves are green because chlorophyll takes in red and blue light.",
    "What should I pack for a walk of three days in the mountains in autumn?",
    "The committee will meet again next week to talk about the new library.",
    "A triangle with sides of three, four and five has a right angle.",
    "Many birds fly south in winter, where there is more to eat.",
)
"""Read where no file is given."""


def probe_texts(file: Path | None, most: int | None) -> tuple[str, ...]:
    """The texts to compare on.

    Args:
        file: JSON lines with ``text`` (or ``prompt``); None: the bundled sentences.
        most: how many of them; None: all; 0: none.

    Raises:
        UserError: the file cannot be read, a line holds no text, there are too few.
    """
    if most is not None and most < 0:
        raise UserError("--probe-prompts", f"{most} is negative", "Give 0 (no comparison) or more.")
    texts = list(SENTENCES) if file is None else _read(file)
    if most is not None and file is None and most > len(texts):
        raise UserError(
            "--probe-prompts", f"{most}, and {len(texts)} sentences are bundled", f"Give {_OPTION} FILE with more."
        )
    return tuple(texts[:most])


def _read(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_OPTION} {file}", f"cannot be read: {error}", "Give a UTF-8 file of JSON lines.") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        text = (row.get("text") or row.get("prompt")) if isinstance(row, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{_OPTION} {file}:{number}", "holds no text", 'Write one object per line: {"text": "..."}.'
            )
        texts.append(text)
    if not texts:
        raise UserError(f"{_OPTION} {file}", "is empty", 'Write one object per line: {"text": "..."}.')
    return texts


@dataclass
class _Distributions:
    """Log-probabilities of every text under one model, fp32, (positions, vocabulary) each."""

    name: str
    logps: list[torch.Tensor]


def probe_ids(opened: OpenModels, texts: Sequence[str]) -> list[list[int]]:
    """The texts as token ids; asked before anything is folded.

    Raises:
        UserError: no tokenizer, or more texts than can be compared.
    """
    tokenizer = open_tokenizer(opened.info, "--base")
    limit = min(MOST_TOKENS, opened.info.max_length)
    ids = [list(tokenizer(text)["input_ids"])[:limit] for text in texts]
    vocabulary = opened.info.vocab_size or len(tokenizer)
    needed = 5 * 4 * vocabulary * sum(map(len, ids))
    if needed > MOST_BYTES:
        raise UserError(
            _OPTION,
            f"the distributions of {len(ids):,} texts take {needed / 1e9:.1f} GB of memory, "
            f"and at most {MOST_BYTES / 1e9:.0f} GB are used",
            f"Read fewer: --probe-prompts {max(1, len(ids) * MOST_BYTES // needed)}.",
        )
    return ids


def compare(
    opened: OpenModels, folded: Path, precision: str, ids: Sequence[Sequence[int]], reporter: Reporter
) -> dict[str, Any]:
    """What the fold changed, on some texts.

    Args:
        opened: base and adapter.
        folded: folder of the folded model.
        precision: of the fold; the live model of the same precision comes first.
        ids: the texts, as :func:`probe_ids` gives them.
        reporter: told which model is read.

    Returns:
        ``comparisons``: KL of the live adapter's distributions against the folded model's, for both precisions of the
        base where bitsandbytes is there, and of the base against its 4-bit form.
    """
    advance = reporter.start("probe", 5 if _has_bitsandbytes() else 3)
    live: dict[str, _Distributions] = {}
    bases: dict[str, _Distributions] = {}
    for kind in ("bf16", "nf4-roundtrip") if _has_bitsandbytes() else ("bf16",):
        model = _open(opened.info.path, opened, nf4=kind != "bf16")
        bases[kind] = _read_all(f"{_BASES[kind]} base", model, ids)
        advance(1)
        model = _with_adapter(model, opened)
        live[kind] = _read_all(f"{_BASES[kind]} base with the adapter live", model, ids)
        advance(1)
        del model
    made = _read_all(f"folded into the {_BASES[precision]} base", _open(str(folded), opened), ids)
    advance(1)
    order = [precision, *sorted(set(live) - {precision})]
    pairs = [(live[kind], made) for kind in order if kind in live]
    if len(bases) > 1:
        pairs.append((bases["bf16"], bases["nf4-roundtrip"]))
    cut = sum(len(one) == MOST_TOKENS for one in ids)
    return {
        "unit": "nats per token",
        "direction": "KL(of || against): the expectation is under `of`",
        "computed_in": "float32, CPU",
        "texts_cut": cut,
        "comparisons": [_divergence(one, other) for one, other in pairs],
    }


def _has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def _open(path: str, opened: OpenModels, *, nf4: bool = False) -> Any:
    """A model in fp32, its linear layers through NF4 and back where asked."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=None if opened.info.pickled else True,
            trust_remote_code=bool(opened.info.spec.get("trust_remote_code")),
        )
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if nf4:
        from harness.merging.fold.nf4 import quantised_modules, roundtrip

        stored = getattr(torch, opened.info.dtype or "float32")
        for name, transposed in quantised_modules(opened.info).items():
            weight = model.get_submodule(name).weight
            weight.data = roundtrip(weight.data.to(stored), transposed=transposed).float()
    return model.eval()


def _with_adapter(model: Any, opened: OpenModels) -> Any:
    adapter = opened.inputs[0].adapter
    assert adapter is not None
    return attach_adapter(model, adapter.info, "adapter", f"ADAPTER {adapter.info.ref}")


def _read_all(name: str, model: Any, ids: Sequence[Sequence[int]]) -> _Distributions:
    import torch

    with torch.inference_mode():
        found = [torch.log_softmax(model(torch.tensor([one])).logits[0].double(), dim=-1).float() for one in ids]
    return _Distributions(name, found)


def _divergence(one: _Distributions, other: _Distributions) -> dict[str, Any]:
    """KL(one || other): its mean over texts of the means over positions, with a 95 % interval (Student's t)."""
    import torch

    means = []
    for p_TV, q_TV in zip(one.logps, other.logps, strict=True):
        # Normalised again: what rounding to fp32 took would make a divergence of nothing negative.
        p, q = (torch.log_softmax(one.double(), dim=-1) for one in (p_TV, q_TV))
        means.append(float((p.exp() * (p - q)).sum(dim=-1).mean()))
    found = summarise(means)
    return {
        "of": one.name,
        "against": other.name,
        "mean": found.mean,
        "ci95": [found.interval.low, found.interval.high] if found.interval is not None else None,
        "texts": found.n,
        "tokens": sum(len(p) for p in one.logps),
    }
