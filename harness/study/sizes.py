"""What a model's size says of a step before one like it has run: bytes, and floating-point operations. No torch.

Formulae. Of a token, with N weights in matrix products, L layers of width d, and s tokens of context:

* forward 2 N + 4 L s d, backward twice that, so 6 N + 12 L s d to train all weights
  (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; the attention's part as Chowdhery et al. 2022, arXiv 2204.02311,
  appendix B);
* of the backward pass one half is the gradients of activations and the other those of weights, which an adapter does
  not need of a frozen base: 4 N + 12 L s d, and 6 times the adapter's own weights;
* recomputed activations cost one more forward pass (Chen et al. 2016, arXiv 1604.06174).

Bytes of a weight: as its type has, and 0.516 in NF4 with double quantisation (4 bits, 8/64 of a constant for each block
of 64, 32/(64 x 256) of a constant of constants; Dettmers et al. 2023, arXiv 2305.14314, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from harness.core.records import ModelInfo
from harness.models.adapter_keys import EMBEDDINGS
from harness.models.inspect import weight_files
from harness.models.tensors import read_header

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
HEADS = ("lm_head", "embed_out", "output")
GRADIENT_AND_STATES = 4 + 8
"""Of a trained weight in float32: its gradient, and AdamW's two moments."""


@dataclass(frozen=True)
class ModelSize:
    """How large a model is, and of what."""

    parameters: int
    matrices: int
    """Weights of the matrices within its layers: what 4-bit loading quantises and an adapter goes beside."""
    head: int
    """Weights of the last matrix, before the vocabulary; the embeddings' own where they are shared."""
    layers: int
    width: int
    key_values: int
    """Numbers that one layer keeps of a token for those after it: keys and values."""
    vocabulary: int
    modules: tuple[tuple[str, int, int], ...]
    """Last name, rows and columns of every matrix within its layers; empty where the files do not tell."""

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with."""
        return self.matrices + self.head

    def weight_bytes(self, dtype: str, *, nf4: bool = False) -> int:
        """Bytes of the weights in memory."""
        if not nf4:
            return self.parameters * BYTES[dtype]
        return round(self.matrices * NF4_BYTES) + (self.parameters - self.matrices) * BYTES[dtype]

    def adapter(self, targets: Sequence[str], rank: int) -> int:
        """Weights of a LoRA adapter: rank x (rows + columns) of each matrix (arXiv 2106.09685, section 4.1)."""
        return sum(rank * (rows + columns) for name, rows, columns in self.modules if name in targets)

    def forward(self, length: float) -> float:
        """Operations of a token's forward pass at so many tokens of context."""
        return 2 * self.multiplied + 4 * self.layers * length * self.width

    def training(self, length: float, adapter: int | None, *, recomputed: bool) -> float:
        """Operations of a token that is trained on.

        Args:
            length: tokens of context.
            adapter: weights of the adapter; None: all weights are trained.
            recomputed: whether activations are (gradient checkpointing).
        """
        forward = self.forward(length)
        gradients = 2 * self.multiplied if adapter is None else 6 * adapter
        backward = 2 * self.multiplied + 8 * self.layers * length * self.width
        return forward + backward + gradients + (forward if recomputed else 0)

    def activations(self, rows: int, length: int, *, recomputed: bool) -> int:
        """Bytes that a training pass keeps, in 16-bit types: an estimate.

        34 s b d of a layer (Korthikanti et al. 2022, arXiv 2205.05198, equation 1, without the attention's matrices,
        which fused kernels do not keep), or 2 s b d and one layer's whole where they are recomputed (section 5); and
        the logits with their gradient in float32.
        """
        token = rows * length
        layer = 34 * token * self.width
        kept = 2 * token * self.width * self.layers + layer if recomputed else layer * self.layers
        return kept + 2 * 4 * token * self.vocabulary


@lru_cache(maxsize=256)
def _modules(path: str, pickled: bool) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    if pickled or not path:
        return ()
    # What is trusted was settled when the model was inspected.
    files = weight_files(ModelInfo(ref=path, path=path, name="", weights_digest="", tokenizer_digest=""))
    return tuple((tuple(name.split(".")), entry.shape) for file in files for name, entry in read_header(file).items())


def measure(model: ModelInfo) -> ModelSize | None:
    """A model's size from the headers of its weights and its config.json; None for one behind an endpoint.

    Of pickled weights the number of parameters is their size in the stored type, and there are no modules.
    """
    if not model.path or not model.size_bytes:
        return None
    config = model.config.get("text_config") or model.config
    width, layers = _number(config, "hidden_size", "n_embd", "d_model"), _number(config, "num_hidden_layers", "n_layer")
    vocabulary = model.vocab_size or 0
    heads = _number(config, "num_attention_heads", "n_head") or 1
    groups = _number(config, "num_key_value_heads") or heads
    each = _number(config, "head_dim") or width // heads
    tensors = _modules(model.path, model.pickled)
    if not tensors:
        parameters = model.size_bytes // BYTES.get(model.dtype or "", 2)
        embeddings = vocabulary * width
        shared = bool(config.get("tie_word_embeddings"))
        matrices = max(0, parameters - embeddings * (1 if shared else 2))
        return ModelSize(parameters, matrices, embeddings, layers, width, 2 * groups * each, vocabulary, ())
    whole = embedded = head = 0
    modules: list[tuple[str, int, int]] = []
    for name, shape in tensors:
        count = _product(shape)
        whole += count
        last = name[-2] if len(name) > 1 else name[-1]
        if last in EMBEDDINGS:
            embedded += count
        elif last in HEADS:
            head += count
        elif len(shape) == 2:
            modules.append((last, *shape))
    matrices = sum(rows * columns for _, rows, columns in modules)
    return ModelSize(whole, matrices, head or embedded, layers, width, 2 * groups * each, vocabulary, tuple(modules))


def _product(shape: Sequence[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _number(config: object, *keys: str) -> int:
    found = (config.get(key) for key in keys) if isinstance(config, dict) else ()
    return next((value for value in found if isinstance(value, int)), 0)
