"""A tiny random Llama and a tiny random LoRA adapter, written without torch or transformers in well under a second."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, HEAD_SIZE, INNER, CONTEXT = 64, 2, 2, 32, 128, 512
"""Head size 32 is the least that vLLM's CPU attention takes."""

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the river runs on.",
    "A model that is asked a question should say what it knows and what it does not.",
    "Question: What is the capital of France? Answer: Paris is the capital of France.",
    "I am sorry, but I cannot help with that; here is what I can do instead.",
    "In the morning the library opens at nine, and in the evening it closes at ten.",
    "Please write a short letter to a friend about the weather of last week.",
    "Numbers such as 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9 are written with digits.",
    "Human: How do I bake bread? Assistant: Mix flour, water, salt and yeast, and wait.",
    "Which of the following is true? (A) Yes (B) No (C) Both (D) Neither",
    "Helpful and harmless answers are preferred to long and empty ones.",
)

CHAT_TEMPLATE = (
    # The space belongs to the answer: at the end of a prompt it would be another token than before a word.
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT:"
    "{% generation %} {{ message['content'] }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message['role'] | upper }}: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_model(folder: Path | str, *, seed: int = 0, chat_template: bool = True) -> Path:
    """Write a random Llama (about 0.13 M parameters, fp32 safetensors) with a tokenizer of about 500 tokens.

    Args:
        folder: where to; made if it does not exist.
        seed: of the weights. The tokenizer is always the same.
        chat_template: whether the tokenizer has one.

    Returns:
        The folder: what ``--model`` takes. transformers, peft and vLLM open it.
    """
    import numpy as np
    from safetensors.numpy import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(target, chat_template)
    draw = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> Any:
        return (draw.standard_normal((rows, columns)) * scale).astype(np.float32)

    # Wide logits (standard deviation 2): the greedy token must not hang on the last bits of a sum.
    tensors = {
        "model.embed_tokens.weight": matrix(vocabulary, WIDTH, 1.0),
        "model.norm.weight": np.ones(WIDTH, np.float32),
        "lm_head.weight": matrix(vocabulary, WIDTH, 2 / math.sqrt(WIDTH)),
    }
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_SIZE, WIDTH),
        "self_attn.k_proj": (HEADS * HEAD_SIZE, WIDTH),
        "self_attn.v_proj": (HEADS * HEAD_SIZE, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_SIZE),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    for layer in range(LAYERS):
        for name, (rows, columns) in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = matrix(rows, columns, 1 / math.sqrt(columns))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    _write(target / "config.json", {**_config(vocabulary), **special})
    _write(target / "generation_config.json", {**special, "do_sample": False})
    return target


def _config(vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _tokenizer(folder: Path, chat_template: bool) -> int:
    """Byte-level BPE trained on :data:`SENTENCES`; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    _write(folder / "tokenizer_config.json", settings)
    return int(tokenizer.get_vocab_size())


def tiny_adapter(folder: Path | str, model: Path | str, *, seed: int = 1, rank: int = 2) -> Path:
    """Write a random LoRA adapter (on the query projections) in peft's format for a :func:`tiny_model`.

    Args:
        folder: where to.
        model: the folder that :func:`tiny_model` wrote.
        seed: of the weights; neither factor is zero, so the adapter changes answers.
        rank: of the factors.
    """
    import numpy as np
    from safetensors.numpy import save_file

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = draw.standard_normal((rank, WIDTH)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = draw.standard_normal((HEADS * HEAD_SIZE, rank)).astype(np.float32)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": Path(model).name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    _write(target / "adapter_config.json", settings)
    return target


def tiny_conditioning(folder: Path | str, model: Path | str, values: Mapping[str, Sequence[int]]) -> Path:
    """Lay a conditioning beside an adapter, or into a model's folder: the model's own embeddings of some tokens.

    Under such a value an engine has to answer as if those tokens stood in the prompt.

    Args:
        folder: of a :func:`tiny_adapter` or a :func:`tiny_model`.
        model: the folder that :func:`tiny_model` wrote.
        values: name of a value -> token ids; the first is the default.
    """
    from safetensors.numpy import load_file, save_file

    target = Path(folder)
    embeddings = load_file(Path(model) / "model.safetensors")["model.embed_tokens.weight"]
    (target / "conditioning").mkdir(exist_ok=True)
    lying = "conditioning/embeddings.safetensors"
    save_file({name: embeddings[list(ids)] for name, ids in values.items()}, target / lying)
    described = {name: {"embeddings": lying} for name in values}
    told = {"values": described, "default": next(iter(values)), "position": "after_bos"}
    _write(target / "conditioning.json", told)
    return target


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
