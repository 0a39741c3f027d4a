"""The demo's training: a tokenizer, a tiny Llama, and a reward classifier, in plain torch on the CPU.

In fp32, with fixed seeds, a fixed number of threads and deterministic kernels: on one machine the same seed gives the
same bytes. The Llama keeps head size 32, the least that vLLM serves on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from harness.demo.language import Language

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Progress = Callable[[str], None]
THREADS = 2
"""Fixed: the number of threads decides the order of sums, and with it the last bits of the weights."""

VOCABULARY = 768
CONTEXT = 512
DOCUMENTS, CHATS, RATED = 8_000, 10_000, 4_000
BASE_STEPS, CLASSIFIER_STEPS = 500, 80
BLOCK, BATCH = 64, 32
"""Tokens per row, and rows per step, of the base's training."""

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT:' }}"
    "{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train(root: Path, language: Language, steps: int, say: Progress) -> None:
    """Write the folders ``base`` and ``classifier`` into ``root``.

    Sets torch's threads and determinism for the whole process: call it in one of its own.
    """
    import torch
    import transformers

    # transformers is typed in parts only: through Any where its functions carry no types.
    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    # A base of a few steps reads little.
    share = min(1.0, 2 * steps / BASE_STEPS)
    documents, chats = language.documents(round(DOCUMENTS * share)), language.chats(round(CHATS * share))
    tokenizer = _tokenizer([*documents, *(turn["content"] for chat in chats for turn in chat)])
    say(f"language: {len(documents):,} documents, {len(chats):,} conversations, {len(tokenizer)} tokens")
    _train_base(root, (language.seed, steps), tokenizer, (documents, chats), say)
    _train_classifier(root, (language.seed, min(steps, CLASSIFIER_STEPS)), tokenizer, language.rated(RATED), say)


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; a text starts with ``<s>``, a pair is ``<s> A </s></s> B </s>``."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    make: Any = transformers.PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    unknown, bos, eos, pad = SPECIAL
    tokenizer: PreTrainedTokenizerFast = make(
        tokenizer_object=bpe,
        unk_token=unknown,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=CONTEXT,
    )
    return tokenizer


def _train_base(
    root: Path,
    how: tuple[int, int],
    tokenizer: PreTrainedTokenizerFast,
    texts: tuple[Sequence[str], Sequence[Any]],
    say: Progress,
) -> None:
    import torch
    import transformers

    (seed, steps), (documents, chats) = how, texts
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    make: Any = transformers.LlamaForCausalLM
    model = make(config)
    say(f"base: a Llama of {model.num_parameters() / 1e6:.1f} M parameters")
    ids = [[*one, tokenizer.eos_token_id] for one in tokenizer(list(documents))["input_ids"]]
    tokenizer.chat_template = TEMPLATE
    encoded: Any = tokenizer.apply_chat_template(list(chats), return_dict=True)
    Random(seed).shuffle(ids := [*ids, *encoded["input_ids"]])
    _fit(model, _blocks(ids, seed), steps, 5e-3, lambda line: say(f"base: {line}"))
    model.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    tokenizer.chat_template = None


def _fit(model: Any, batches: Iterator[dict[str, torch.Tensor]], steps: int, rate: float, say: Progress) -> None:
    """AdamW with a linear warm-up and a cosine decay to a tenth; the models report their own loss (nats)."""
    import torch

    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        if step % max(1, steps // 4) == 0:
            say(f"step {step} of {steps}, loss {loss.item():.3f}")
    model.eval()


def _blocks(texts: Sequence[Sequence[int]], seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Texts end to end, each between ``<s>`` and ``</s>``, cut into rows of equal length (B, T)."""
    import torch

    ids = [i for one in texts for i in one]
    rows_BT = torch.tensor(ids[: len(ids) // BLOCK * BLOCK]).view(-1, BLOCK)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows_BT), generator=generator)
        for chosen in (order[start : start + BATCH] for start in range(0, len(order), BATCH)):
            yield {"input_ids": rows_BT[chosen], "labels": rows_BT[chosen]}


def _train_classifier(
    root: Path, how: tuple[int, int], tokenizer: PreTrainedTokenizerFast, rows: Sequence[Any], say: Progress
) -> None:
    import torch
    import transformers

    seed, steps = how
    make: Any = transformers.RobertaForSequenceClassification
    configure: Any = transformers.RobertaConfig
    torch.manual_seed(seed + 1)
    config = configure(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        # RoBERTa counts positions from the padding token's id on.
        max_position_embeddings=CONTEXT + int(tokenizer.pad_token_id) + 1,
        type_vocab_size=1,
        num_labels=1,
        problem_type="multi_label_classification",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = make(config)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        random = Random(seed)
        while True:
            chosen = random.sample(rows, BATCH)
            prompts, responses = [row[0] for row in chosen], [row[1] for row in chosen]
            batch = dict(tokenizer(prompts, responses, padding=True, return_token_type_ids=False, return_tensors="pt"))
            yield {**batch, "labels": torch.tensor([[float(row[2])] for row in chosen])}

    _fit(model, batches(), steps, 2e-3, lambda line: say(f"classifier: {line}"))
    model.save_pretrained(root / "classifier")
    tokenizer.save_pretrained(root / "classifier")
