"""The transformers engine against lm-eval's own HFLM, peft, model.generate one by one, and arithmetic done by hand."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from harness import AdapterInfo, Decoding, ModelInfo, Output, Request
from harness.core.errors import UserError
from harness_plugins.engines.transformers.engine import TransformersEngine
from harness_plugins.engines.transformers.plan import Limits, StopText, cut_at_stop, plan

torch = pytest.importorskip("torch")

CONTEXT = 96
TEXT = "red green blue one two three . , ? Q: A: stop\n"
FIRST, LAST = 4, 279  # ids of ordinary tokens in the tiny vocabulary


def info(path: Path, **spec: Any) -> ModelInfo:
    defaults = {"dtype": "auto", "allow_pickle": False, "trust_remote_code": False}
    config = json.loads((path / "config.json").read_text())
    length = config["max_position_embeddings"]
    return ModelInfo(
        ref=path.name,
        path=str(path),
        name=path.name,
        config=config,
        max_length=length,
        weights_digest="w",
        tokenizer_digest="t",
        spec=defaults | spec,
    )


def build(folder: Path, seed: int = 0) -> Path:
    """A random Llama whose logits are far enough apart that greedy decoding is no coin toss."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": ["<|end|>"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to gain from a second thread, and a busy machine makes threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


def session(
    path: Path, adapters: Sequence[AdapterInfo] = (), spec: dict[str, Any] | None = None, **options: Any
) -> Any:
    engine = TransformersEngine()
    return engine.open(info(path, **(spec or {})), adapters, engine.Config(device="cpu", **options))


@pytest.fixture(scope="module")
def opened(folder: Path) -> Any:
    return session(folder, batch_size=4)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    """The same model, opened without the engine."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def drive(opened: Any, requests: Sequence[Request]) -> list[Output]:
    """As the core does: plan, then batch by batch."""
    outputs: dict[int, Output] = {}
    for batch in opened.batches(requests):
        outputs |= zip(batch, opened.run([requests[index] for index in batch]), strict=True)
    return [outputs[index] for index in range(len(requests))]


def prompts(count: int, low: int = 2, high: int = 40, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randint(FIRST, LAST) for _ in range(rng.randint(low, high))) for _ in range(count)]


def choices(count: int) -> list[Request]:
    """Items of four one-token choices, and a few longer continuations."""
    requests = [Request("loglikelihood", ids, (40 + n,)) for ids in prompts(count) for n in range(4)]
    return requests + [
        Request("loglikelihood", a, b) for a, b in zip(prompts(5), prompts(5, 2, 9, seed=1), strict=True)
    ]


def by_hand(model: Any, request: Request) -> tuple[float, bool]:
    """One row, all logits: sum of log softmax over the continuation."""
    ids = request.prompt_ids + request.continuation_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    positions = range(len(request.prompt_ids) - 1, len(ids) - 1)
    logps = [float(torch.log_softmax(logits[at], -1)[ids[at + 1]]) for at in positions]
    return sum(logps), all(int(logits[at].argmax()) == ids[at + 1] for at in positions)


def likeliest(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Greedy decoding by repeated full forward passes."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


# ------------------------------------------------------------------------------------------------------------ planning

ids_strategy = st.lists(st.integers(4, 9), max_size=6).map(tuple)
request_strategy = st.one_of(
    st.builds(Request, st.just("loglikelihood"), ids_strategy, ids_strategy, adapter=st.sampled_from([None, "a"])),
    st.builds(
        Request,
        st.just("generate"),
        ids_strategy,
        decoding=st.sampled_from([Decoding(max_new_tokens=3), Decoding(max_new_tokens=9, temperature=1.0)]),
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(request_strategy, max_size=30), st.integers(1, 5), st.integers(1, 40), st.integers(1, 9))
def test_plan_is_a_partition_within_limits_and_stable(
    requests: list[Request], rows: int, tokens: int, positions: int
) -> None:
    limits = Limits(rows, tokens, positions, max_length=8, vocabulary=9)
    batches = plan(requests, limits)
    indices = [[index for row in batch for index in row.members] for batch in batches]
    assert sorted(index for batch in indices for index in batch) == list(range(len(requests)))
    for batch, members in zip(batches, indices, strict=True):
        assert len(batch) <= rows
        widest = max(row.width for row in batch)
        assert len(batch) == 1 or len(batch) * widest <= tokens
        assert len(batch) == 1 or sum(row.scored for row in batch) <= positions
        assert len({(requests[i].kind, requests[i].adapter, requests[i].decoding) for i in members}) == 1 or all(
            row.budget == 0 for row in batch
        )
        again = plan([requests[index] for index in members], limits)
        assert [[i for row in b for i in row.members] for b in again] == [list(range(len(members)))]


def test_longest_first_and_ties_by_index(opened: Any) -> None:
    lengths = [3, 7, 5, 7, 5]
    requests = [Request("loglikelihood", (*range(10, 10 + n), 50 + k), (4,)) for k, n in enumerate(lengths)]
    assert opened.batches(requests) == [[1, 3, 2, 4], [0]]


def test_choices_of_an_item_cost_one_row(opened: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    heads: list[tuple[int, ...]] = []
    forward = opened._model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        result = forward(*args, **kwargs)
        heads.append(tuple(result.logits.shape))
        return result

    monkeypatch.setattr(opened._model, "forward", counting)
    items = prompts(6, 10, 10)
    requests = [Request("loglikelihood", ids, (30 + n,)) for n in range(4) for ids in items]
    outputs = drive(opened, requests)
    assert sum(rows for rows, _ in shapes) == 6  # not 24
    assert [shape[:2] for shape in heads] == [(1, 4), (1, 2)]  # one position per row has logits, of 10
    assert [o.logprob for o in outputs] == pytest.approx([by_hand(plain, r)[0] for r in requests], abs=1e-4)


def test_identical_greedy_generations_share_a_row_and_samples_do_not(opened: Any) -> None:
    greedy = [Request("generate", (5, 6, 7), decoding=Decoding(max_new_tokens=4))] * 3
    drawn = [Request("generate", (5, 6, 7), decoding=Decoding(max_new_tokens=8, temperature=2.0, seed=1))] * 4
    limits = Limits(4, 1000, 1000, CONTEXT, 280)
    assert [len(batch) for batch in plan(greedy + drawn, limits)] == [1, 4]
    outputs = drive(opened, greedy + drawn)
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({output.token_ids for output in outputs[3:]}) == 4


# ------------------------------------------------------------------------------------------------------ log-likelihood


def test_loglikelihood_equals_one_row_at_a_time(opened: Any, plain: Any) -> None:
    requests = choices(7)
    greedy = likeliest(plain, (9, 8, 7), 3)
    requests.append(Request("loglikelihood", (9, 8, 7), greedy))
    requests.append(Request("loglikelihood", (9, 8, 7), (*greedy[:-1], 4 if greedy[-1] != 4 else 5)))
    expected = [by_hand(plain, request) for request in requests]
    outputs = drive(opened, requests)
    assert [output.logprob for output in outputs] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
    assert [output.is_greedy for output in outputs] == [greedy for _, greedy in expected]
    assert [output.is_greedy for output in outputs[-2:]] == [True, False]
    assert not any(output.batch_dependent for output in outputs)


def test_a_model_whose_head_is_called_in_another_way_gives_the_same(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = choices(3)
    expected = drive(opened, requests)
    monkeypatch.setattr(opened._model, "get_output_embeddings", lambda: None)
    assert [o.logprob for o in drive(opened, requests)] == pytest.approx([o.logprob for o in expected], abs=1e-5)


def test_byte_identical_from_run_to_run(folder: Path, opened: Any) -> None:
    requests = choices(9) + [Request("generate", ids, decoding=Decoding(max_new_tokens=6)) for ids in prompts(5)]
    again = session(folder, batch_size=4)
    assert drive(opened, requests) == drive(again, requests)


def test_numbers_that_are_none(folder: Path) -> None:
    broken = session(folder)
    broken._model.lm_head.weight.data[:] = float("nan")
    output = broken.run([Request("loglikelihood", (5, 6), (7,))])[0]
    assert output.logprob is None
    assert output.error == "the model's log-probability is not finite (nan)"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_from_logits_that_are_not_finite_is_none(
    folder: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Not-a-number after one prompt, infinite after its third new token for another; the rest are answered."""
    broken = session(folder)
    forward, calls = broken._model.forward, []

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 1:
            result.logits[0] = float("nan")
        if len(calls) == 3:
            result.logits[1, :, 7] = float("inf")
        result.logits[2, :, 40:] = -float("inf")  # a mask
        return result

    monkeypatch.setattr(broken._model, "forward", spoilt)
    decoding = Decoding(max_new_tokens=6, temperature=temperature, seed=1)
    requests = [Request("generate", ids, decoding=decoding) for ids in ((5, 6), (9, 9), (8, 7), (7, 7))]
    outputs = broken.run(requests)
    assert [output.error for output in outputs] == [
        "the model's logits are not finite (token 1 of the answer)",
        "the model's logits are not finite (token 3 of the answer)",
        None,
        None,
    ]
    assert (outputs[0].text, outputs[0].token_ids) == ("", ())
    assert outputs[3].token_ids and max(outputs[2].token_ids) < 40
    if temperature == 0.0:
        assert outputs[3].token_ids == likeliest(plain, (7, 7), 6)


def test_what_is_not_finite_after_the_end_of_an_answer_is_no_error(folder: Path) -> None:
    opened = session(folder)
    new = [5, 1, 2, 2]
    assert opened._finished(new, None, frozenset([1]), [], bad=2).error is None
    assert opened._finished(new, None, frozenset([1]), [], bad=1).error is not None
    assert opened._finished(new, 1, frozenset([1]), ["x"], bad=1).error is None


def test_requests_that_cannot_be_answered_fail_alone(opened: Any) -> None:
    full = tuple(range(4, 4 + CONTEXT))
    requests = [
        Request("loglikelihood", (), (5,)),
        Request("loglikelihood", (5,), ()),
        Request("loglikelihood", full, (5, 6)),
        Request("loglikelihood", full, (5,)),
        Request("generate", full, decoding=Decoding(max_new_tokens=1)),
        Request("loglikelihood", (5,), (99_999,)),
    ]
    errors = [output.error for output in drive(opened, requests)]
    assert errors[0] == "the prompt has no tokens (not even BOS): there is nothing to predict from"
    assert errors[1] == "the continuation has no tokens"
    assert errors[2] == f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"
    assert errors[3] is None
    assert errors[5] is not None
    assert "token id 99999 is not among the model's" in errors[5]
    assert errors[4] == f"a prompt of {CONTEXT} tokens leaves no room in the context of {CONTEXT}"


# ---------------------------------------------------------------------------------------------------------- generation


def test_generation_equals_generate_one_by_one(opened: Any, plain: Any) -> None:
    requests = [Request("generate", ids, decoding=Decoding(max_new_tokens=12)) for ids in prompts(10)]
    for request, output in zip(requests, drive(opened, requests), strict=True):
        row = torch.tensor([request.prompt_ids])
        alone = plain.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12)
        new = alone[0, row.shape[1] :].tolist()
        ended = 1 in new
        assert output.token_ids == tuple(new[: new.index(1)] if ended else new)
        assert output.finish == ("stop" if ended else "length")


def test_a_batch_of_generations_tells_how_far_it_is(opened: Any) -> None:
    """Three rows of up to eight tokens: after step 3, 6 and 8 one, two and three of them are as good as done."""
    requests = [
        Request("generate", tuple(range(FIRST + 3 * k, FIRST + 3 * k + 5)), decoding=Decoding(max_new_tokens=8))
        for k in range(3)
    ]
    opened.progress = (told := []).append  # type: ignore[var-annotated]
    try:
        outputs = opened.run(requests)
    finally:
        opened.progress = None
    steps = max(len(output.token_ids) + (output.finish == "stop") for output in outputs)
    assert told == [1] * (3 * steps // 8)
    assert outputs == opened.run(requests)


def test_eos_ends_an_answer_and_the_rest_of_the_batch_goes_on(folder: Path, plain: Any, tmp_path: Path) -> None:
    """The second id that greedy decoding gives for one prompt is made an end-of-sequence id of the model."""
    first, *others = prompts(4, 5, 9, seed=3)
    free = {ids: likeliest(plain, ids, 8) for ids in (first, *others)}
    end = free[first][1]
    copy = tmp_path / "ends"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    requests = [Request("generate", ids, decoding=Decoding(max_new_tokens=8)) for ids in (first, *others)]
    for request, output in zip(requests, drive(session(copy), requests), strict=True):
        ids = free[request.prompt_ids]
        upto = next((at for at, token in enumerate(ids) if token in (1, end)), None)
        assert output.token_ids == ids[:upto]
        assert output.finish == ("length" if upto is None else "stop")


def test_stop_strings_end_rows_one_by_one(opened: Any, plain: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(opened._model.config._name_or_path)
    free = {ids: likeliest(plain, ids, 16) for ids in prompts(8, 3, 20, seed=5)}
    texts = {
        ids: tokenizer.decode(new[: new.index(1)] if 1 in new else new, skip_special_tokens=True)
        for ids, new in free.items()
    }
    longest = max(texts.values(), key=len)
    stops = (longest[4:6], "no such text")  # two characters that one answer certainly holds
    requests = [Request("generate", ids, decoding=Decoding(max_new_tokens=16, stop=stops)) for ids in free]
    outputs = drive(opened, requests)
    for request, output in zip(requests, outputs, strict=True):
        whole = texts[request.prompt_ids]
        assert output.text == whole.split(stops[0])[0]
        assert output.finish == ("stop" if stops[0] in whole or 1 in free[request.prompt_ids] else "length")
        if stops[0] in whole:  # the ids end with the token that completed the stop string
            assert stops[0] in tokenizer.decode(output.token_ids, skip_special_tokens=True)
            assert stops[0] not in tokenizer.decode(output.token_ids[:-1], skip_special_tokens=True)
    assert any(len(output.token_ids) < 16 and output.finish == "stop" for output in outputs)


def test_a_stop_string_that_is_a_special_token_is_an_id(opened: Any) -> None:
    assert opened._stops(("</s>", "<|end|>", "Q:", "")) == (["Q:"], [1, 3])
    assert opened._stops(("never seen",)) == (["never seen"], [1])


def test_stop_criterion_looks_at_new_text_only(opened: Any) -> None:
    """A prompt that ends with half a stop string, and one that holds it, do not end the answer."""
    encode = opened._tokenizer.encode
    prompt, new = encode("red stop sto"), encode("p one stop")
    criterion = StopText(opened._tokenizer, ["stop"], len(prompt), frozenset({0, 1, 2, 3}))
    ended = []
    for count in range(1, len(new) + 1):
        ended.append(bool(criterion(torch.tensor([prompt + new[:count]]), None)[0]))
    assert ended == [False] * (len(new) - 1) + [True]
    assert criterion.ended == {0: len(new)}


def test_stop_strings_in_parts_of_characters(opened: Any) -> None:
    new = opened._tokenizer.encode("é→x")
    criterion = StopText(opened._tokenizer, ["→"], 0, frozenset())
    first = next(n for n in range(1, len(new) + 1) if bool(criterion(torch.tensor([new[:n]]), None)[0]))
    assert opened._tokenizer.decode(new[:first]) == "é→"


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("a\n\nQ: b", ("Q:", "\n\n"), ("a", True)),
        ("abc", ("x",), ("abc", False)),
        ("abc", (), ("abc", False)),
        ("abc", ("",), ("abc", False)),
        ("stop", ("stop",), ("", True)),
    ],
)
def test_cut_at_stop(text: str, stops: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stops) == expected


def test_an_answer_ends_at_the_context(opened: Any, plain: Any) -> None:
    ids = prompts(1, CONTEXT - 3, CONTEXT - 3)[0]
    output = drive(opened, [Request("generate", ids, decoding=Decoding(max_new_tokens=50))])[0]
    assert output.token_ids == likeliest(plain, ids, 3)
    assert output.finish == "length"


def test_generation_config_of_the_folder_does_not_leak(folder: Path, opened: Any, tmp_path: Path) -> None:
    copy = tmp_path / "leaky"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = {
        "eos_token_id": 1,
        "repetition_penalty": 5.0,
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 2,
        "min_new_tokens": 5,
        "max_new_tokens": 2,
        "suppress_tokens": list(range(4, 200)),
    }
    (copy / "generation_config.json").write_text(json.dumps(settings))
    decodings = [Decoding(max_new_tokens=10), Decoding(max_new_tokens=10, temperature=1.5, top_p=0.9, seed=4)]
    requests = [Request("generate", ids, decoding=decoding) for ids in prompts(6) for decoding in decodings]
    assert drive(session(copy, batch_size=4), requests) == drive(opened, requests)


def test_sampling_follows_the_softmax_and_its_seed(opened: Any, plain: Any) -> None:
    """Frequencies of 2,000 first tokens against the softmax at that temperature: also beyond the 50 likeliest."""
    count, temperature = 2000, 3.0
    with torch.no_grad():
        expected = torch.softmax(plain(torch.tensor([[7, 8, 9]])).logits[0, -1].double() / temperature, -1)
    drawn = [
        Request("generate", (7, 8, 9), decoding=Decoding(max_new_tokens=1, temperature=temperature, seed=seed))
        for seed in (1, 2)
        for _ in range(count)
    ]
    wide = opened._limits
    try:
        opened._limits = Limits(count, 10**6, 10**6, CONTEXT, 280)
        state = torch.random.get_rng_state()
        first, again = opened.run(drawn), opened.run(drawn)
        assert torch.equal(state, torch.random.get_rng_state())
    finally:
        opened._limits = wide
    assert first == again
    assert first[:count] != first[count:]
    tokens = [output.token_ids[0] if output.token_ids else 1 for output in first[:count]]
    seen = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double() / count
    # Standard error of a frequency: sqrt(p (1 - p) / n); 5 of them, over all tokens.
    assert bool(((seen - expected).abs() < 5 * (expected * (1 - expected) / count).sqrt() + 2 / count).all())
    tail = expected.sort(descending=True).indices[50:]
    assert float(seen[tail].sum()) == pytest.approx(float(expected[tail].sum()), abs=0.06)
    assert float(expected[tail].sum()) > 0.2


# ------------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch(
    folder: Path, opened: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    requests = choices(7) + [Request("generate", ids, decoding=Decoding(max_new_tokens=5)) for ids in prompts(6)]
    small = session(folder, batch_size=8)
    forward, sizes = small._model.forward, []

    def tight(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(small._model, "forward", tight)
    expected, outputs = drive(opened, requests), drive(small, requests)
    assert max(sizes) > 3
    assert [o.logprob for o in outputs[:33]] == pytest.approx([o.logprob for o in expected[:33]], abs=1e-4)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    split = {index for batch in small.batches(requests) if len(batch) > 4 for index in batch}
    assert all(outputs[index].batch_dependent for index in split)
    assert not any(output.error for output in outputs)


def test_a_single_request_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tight = session(folder)
    forward = tight._model.forward

    def narrow(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] > 10:
            raise torch.OutOfMemoryError("tried to allocate 9 GiB")
        return forward(*args, **kwargs)

    monkeypatch.setattr(tight._model, "forward", narrow)
    outputs = tight.run([Request("loglikelihood", tuple(range(4, 4 + n)), (9,)) for n in (30, 5)])
    assert outputs[0].error == "out of memory with a single request of 30 tokens: tried to allocate 9 GiB"
    assert outputs[1].error is None
    assert outputs[1].batch_dependent


def test_other_runtime_errors_are_raised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = session(folder)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(broken._model, "forward", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        broken.run(choices(2))


def test_bfloat16_is_marked(folder: Path) -> None:
    half = session(folder, spec={"dtype": "bfloat16"})
    assert half.facts["dtype"] == "bfloat16"
    assert all(output.batch_dependent for output in half.run(choices(1)))


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterInfo]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for number, rank in enumerate((4, 8)):
        torch.manual_seed(number)
        model = AutoModelForCausalLM.from_pretrained(folder)
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        path = tmp_path_factory.mktemp("adapters") / f"a.{number}"
        get_peft_model(model, config).save_pretrained(path)
        made.append(AdapterInfo(ref=path.name, path=str(path), name=f"a.{number}", digest="d", rank=rank))
    return made


def test_adapters_and_base_in_one_session(folder: Path, opened: Any, adapters: list[AdapterInfo]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    several = session(folder, adapters)
    base = choices(3) + [Request("generate", ids, decoding=Decoding(max_new_tokens=6)) for ids in prompts(3)]
    names = [None, "a.0", "a.1", None]
    requests = [
        Request(r.kind, r.prompt_ids, r.continuation_ids, r.decoding, adapter=name) for r in base for name in names
    ]
    outputs = drive(several, requests)
    alone = drive(opened, base)
    for number, name in enumerate(names):
        answers = outputs[number :: len(names)]
        scored, generated = answers[: len(answers) - 3], answers[len(answers) - 3 :]
        if name is None:
            assert [o.logprob for o in scored] == pytest.approx([o.logprob for o in alone[:-3]], abs=1e-4)
            assert [o.token_ids for o in generated] == [o.token_ids for o in alone[-3:]]
            continue
        model = AutoModelForCausalLM.from_pretrained(folder)
        model = PeftModel.from_pretrained(model, next(a.path for a in adapters if a.name == name)).eval()
        assert [o.logprob for o in scored] == pytest.approx([by_hand(model, r)[0] for r in base[:-3]], abs=1e-4)
        assert [o.logprob for o in scored] != pytest.approx([o.logprob for o in alone[:-3]], abs=1e-2)
        for request, output in zip(base[-3:], generated, strict=True):
            assert output.token_ids == likeliest(model, request.prompt_ids, 6)[: len(output.token_ids)]


def test_weights_that_are_not_finite_are_named_and_others_answer(
    folder: Path, adapters: list[AdapterInfo], tmp_path: Path
) -> None:
    """Queries that are not numbers leave finite logits behind on a CPU, so that the weights are looked at."""
    from safetensors.torch import load_file, save_file

    torn = tmp_path / "torn"
    torn.mkdir()
    for file in Path(adapters[1].path).iterdir():
        (torn / file.name).write_bytes(file.read_bytes())
    tensors = load_file(torn / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, torn / "adapter_model.safetensors")
    broken = adapters[1].model_copy(update={"path": str(torn), "name": "torn"})
    ask = Request("generate", (5, 6, 7), decoding=Decoding(max_new_tokens=2))
    scored = Request("loglikelihood", (5, 6), (7,))
    requests = [replace(one, adapter=adapter) for one in (ask, scored) for adapter in (None, adapters[0].name, "torn")]
    outputs = drive(session(folder, [adapters[0], broken]), requests)
    part = name.removeprefix("base_model.model.")
    why = f"adapter torn: its weights are not finite ({part})"
    assert [output.error for output in outputs] == [None, None, why] * 2

    whole = tmp_path / "base"
    whole.mkdir()
    for file in folder.iterdir():
        (whole / file.name).write_bytes(file.read_bytes())
    tensors = load_file(whole / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 1] = float("nan")
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    why = "the model's weights are not finite (model.layers.1.self_attn.k_proj.weight)"
    assert [output.error for output in session(whole).run([ask, scored])] == [why] * 2
    opened = session(whole, [adapters[0]])
    assert opened.run([replace(ask, adapter=adapters[0].name)])[0].error == why


def test_an_adapter_that_is_not_open(folder: Path, adapters: list[AdapterInfo]) -> None:
    opened = session(folder, adapters[:1])
    with pytest.raises(UserError, match=r"(?s)adapter 'a.O' is not open.*Did you mean 'a.0'"):
        opened.batches([Request("loglikelihood", (5,), (6,), adapter="a.O")])


def test_an_adapter_folder_without_weights(folder: Path, tmp_path: Path) -> None:
    adapter = AdapterInfo(ref="lost", path=str(tmp_path), name="lost", digest="d", rank=1)
    with pytest.raises(UserError, match=r"(?s)--adapter lost: it holds no adapter_model.safetensors.*save_pretrained"):
        session(folder, [adapter])
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"(?s)--adapter lost: adapter_model.bin: pickled.*--allow-pickle"):
        session(folder, [adapter])


def test_an_adapter_of_another_base(folder: Path, adapters: list[AdapterInfo], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(adapters[0].path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].clone() for name, tensor in load_file(weights).items()}, weights)
    wrong = adapters[0].model_copy(update={"path": str(tmp_path)})
    with pytest.raises(UserError, match=r"(?s)--adapter a.0: cannot be loaded: RuntimeError:.*size mismatch.*Check"):
        session(folder, [wrong])


def test_prompt_learning_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    adapter = AdapterInfo(
        ref="soft", path=str(tmp_path), name="soft", digest="d", rank=1, config={"peft_type": "PROMPT_TUNING"}
    )
    with pytest.raises(UserError, match=r"(?s)PROMPT_TUNING adapters put embeddings before the prompt.*LoRA-like"):
        session(folder, [adapter])


def test_a_control_that_nobody_trained(opened: Any) -> None:
    with pytest.raises(UserError, match=r"--control kind: the model has no conditioning"):
        opened.run([Request("loglikelihood", (5,), (6,), control="kind")])


# ------------------------------------------------------------------------------------------------------- broken models


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_pickled_weights_need_leave(folder: Path, opened: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pickled = copied(folder, tmp_path / "pickled")
    weights = pickled / "model.safetensors"
    torch.save(load_file(weights), pickled / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"(?s)--model pickled: .*pickled, not safetensors.*--allow-pickle"):
        session(pickled)
    with pytest.raises(UserError, match=r"(?s)--model pickled: weights: pickled, not safetensors.*--allow-pickle"):
        TransformersEngine().open(info(pickled).model_copy(update={"pickled": True}), [], TransformersEngine.Config())
    trusted = session(pickled, spec={"allow_pickle": True}, batch_size=4)
    assert drive(trusted, choices(2)) == drive(opened, choices(2))


def test_remote_code_needs_leave(folder: Path, tmp_path: Path) -> None:
    remote = copied(folder, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UserError, match=r"(?s)--model remote: needs Python code.*--trust-remote-code"):
        session(remote)


def test_torn_and_incomplete_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torn = copied(folder, tmp_path / "torn")
    data = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"(?s)--model torn: cannot be loaded: SafetensorError:.*folder is complete"):
        session(torn)
    partial = copied(folder, tmp_path / "partial")
    tensors = {name: t for name, t in load_file(partial / "model.safetensors").items() if "layers.1.mlp.up" not in name}
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"(?s)1 tensors of .*up_proj.*random numbers"):
        session(partial)


def test_device_that_is_not_there(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UserError, match=r"(?s)engine option device=cuda:7: torch .* cannot use cuda here.*device=cpu"):
        TransformersEngine().open(info(folder), [], TransformersEngine.Config(device="cuda:7"))


# ------------------------------------------------------------------------------------------------------ engine's words


def test_identity_holds_what_may_move_a_number() -> None:
    engine = TransformersEngine()
    auto = engine.identity(engine.Config(device="cpu"))
    assert auto == engine.identity(engine.Config(device="cpu", batch_size=256, max_batch_tokens=8_192))
    assert engine.identity(engine.Config(device="cuda:0")) == engine.identity(engine.Config(device="cuda:1"))
    for other in ({"batch_size": 7}, {"max_batch_tokens": 99}, {"attention": "eager"}, {"device": "cuda"}):
        assert engine.identity(engine.Config(**{"device": "cpu", **other})) != auto


def test_capabilities(folder: Path) -> None:
    engine = TransformersEngine()
    can = engine.capabilities(info(folder), engine.Config())
    assert can.lacks(["generate", "loglikelihood", "adapters", "prompt_embeds", "loglikelihood_embeds"]) == {}
    layered = info(folder).model_copy(update={"config": {"text_config": {"hidden_size_per_layer_input": 8}}})
    lacking = engine.capabilities(layered, engine.Config()).lacks(["generate", "prompt_embeds", "loglikelihood_embeds"])
    assert set(lacking) == {"prompt_embeds", "loglikelihood_embeds"}
    assert "in every layer" in lacking["loglikelihood_embeds"]
    t5 = info(folder).model_copy(update={"config": {"is_encoder_decoder": True}})
    assert set(engine.capabilities(t5, engine.Config()).lacks(["generate", "adapters"])) == {"generate", "adapters"}
    assert engine.availability().usable


def test_nothing_heavy_is_imported_until_a_model_is_opened() -> None:
    code = (
        "import sys; from harness_plugins.engines.transformers.engine import TransformersEngine as E; e = E()\n"
        "e.identity(e.Config()); e.availability(); from harness import ModelInfo\n"
        "e.capabilities(ModelInfo(ref='', path='', name='', weights_digest='', tokenizer_digest=''), e.Config())\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------------- lm-eval


def compare_with_lm_eval(path: Path, items: int, new_tokens: int, text: str) -> None:
    """The same requests, by lm-eval's own hf model in fp32 and by the engine."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(path), dtype="float32", batch_size=4, device="cpu")
    lm.model.generation_config.max_new_tokens = (
        None  # the folder's own leaks into lm-eval's, and wins over max_gen_toks
    )
    words = text.split(" ")
    contexts = [" ".join(words[n : n + 4 + 3 * (n % 5)]) for n in range(items)]
    pairs = [(context, choice) for context in contexts for choice in (" one", " two", " red three", " ?")]
    theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    encoded = [lm._encode_pair(*pair) for pair in pairs]
    opened = session(path, spec={"dtype": "float32"}, batch_size=4)
    ours = drive(opened, [Request("loglikelihood", tuple(a), tuple(b)) for a, b in encoded])
    assert [o.logprob for o in ours] == pytest.approx([logprob for logprob, _ in theirs], abs=1e-4)
    assert [o.is_greedy for o in ours] == [greedy for _, greedy in theirs]
    until = [".", "\n\n"]
    arguments = {"until": until, "max_gen_toks": new_tokens, "do_sample": False}
    texts = lm.generate_until([Instance("g", {}, (c, dict(arguments)), 0) for c in contexts], disable_tqdm=True)
    decoding = Decoding(max_new_tokens=new_tokens, stop=tuple(until))
    outputs = drive(opened, [Request("generate", tuple(lm.tok_encode(c)), decoding=decoding) for c in contexts])
    assert [output.text for output in outputs] == texts


def test_equals_lm_eval(folder: Path) -> None:
    compare_with_lm_eval(folder, 9, 12, "red one Q: two ? green three A: blue , one red . two two " * 3)


@pytest.mark.shared
@pytest.mark.skipif("HARNESS_SHARED" not in os.environ, reason="HARNESS_SHARED is unset: no tiny-base")
def test_equals_lm_eval_on_a_real_model() -> None:
    path = Path(os.environ["HARNESS_SHARED"]) / "models" / "tiny-base"
    text = (
        "The river runs from the mountains to the sea and the people who live near it say that it was once much wider"
    )
    compare_with_lm_eval(path, 8, 24, text)
