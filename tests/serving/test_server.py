"""A server started, waited for and ended, with a stand-in for vLLM: nothing of it remains, whatever ends first."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness import ModelSpec, StepError, UserError, load_plugins
from harness.core.specs import ServeSpec
from harness.serving import check as serve_check, server as serving
from harness.serving.check import is_loopback
from harness.steps.provenance import digest_of_bytes
from harness.testing import tiny_adapter, tiny_model
from tests.conditioned import lora, soft, written

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_vllm

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def seen(alone: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in in place of vLLM, here and in child processes; the file in which it says what it was given."""
    site = fake_vllm.write(alone / "site")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("FAKE_VLLM_SEEN", str(alone / "seen.json"))
    monkeypatch.setenv("TMPDIR", str(alone / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (alone / "tmp").mkdir()
    for name in ("VLLM_API_KEY", "FAKE_VLLM"):
        monkeypatch.delenv(name, raising=False)
    return alone / "seen.json"


@pytest.fixture
def left_over(seen: Path, alone: Path) -> Callable[[], tuple[list[int], list[str]]]:
    """Processes of the server's group and temporary folders that are still there, after at most 20 s."""

    def look() -> tuple[list[int], list[str]]:
        group = fake_vllm.seen(seen)["group"]
        end = time.monotonic() + 20
        while True:
            found = fake_vllm.alive(group), [path.name for path in (alone / "tmp").iterdir()]
            if found == ([], []) or time.monotonic() > end:
                return found
            time.sleep(0.05)

    return look


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapters") / "polite", tiny)


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def context(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"])


# ------------------------------------------------------------------------------------------------------ from Python


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("127.0.0.1.evil.example", False),
        ("127.evil.example", False),
        ("localhost.evil.example", False),
        ("0.0.0.0", False),
        ("10.0.0.7", False),
    ],
)
def test_which_addresses_are_of_this_machine_alone(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_a_base_and_its_adapter_are_served(tiny: Path, adapter: Path, seen: Path, left_over: Any) -> None:
    with serving.serve(tiny, adapters=[f"kind={adapter}"], name="base") as server:
        given = fake_vllm.seen(seen)
        arguments = given["arguments"]
        assert server.models == ("base", "kind")
        assert server.url == f"http://127.0.0.1:{value(arguments, '--port')}/v1"
        assert value(arguments, "--host") == "127.0.0.1"
        assert value(arguments, "--lora-modules") == f"kind={adapter}"
        # Rank 2 of the tiny adapter, in the next of vLLM's steps; on a processor one adapter in a batch.
        assert (value(arguments, "--max-lora-rank"), value(arguments, "--max-loras")) == ("8", "1")
        assert value(arguments, "--middleware") == "harness_plugins.engines.vllm.gate.Gate"
        # Its context, and the token generated last, which is never fed.
        assert value(arguments, "--max-model-len") == str(context(tiny) + 1)
        own = json.loads((tiny / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        assert given["template"] == own
        assert server.facts["template_digest"] == digest_of_bytes(own.encode())
        assert given["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "1"
        # The server, the one that watches over it, and the server's own child.
        assert len(fake_vllm.alive(given["group"])) == 3
    assert left_over() == ([], [])


def test_values_that_are_adapters_are_served_by_name(tiny: Path, seen: Path, alone: Path) -> None:
    """The plain name is the default; each is the sum of adapter and control, which is there while the server is."""
    folder = lora(alone / "polite", tiny)
    with serving.serve(tiny, adapters=[folder], name="base") as server:
        assert server.models == ("base", "polite", "polite@good", "polite@bad")
        arguments = fake_vllm.seen(seen)["arguments"]
        at = arguments.index("--lora-modules") + 1
        given = dict(one.rsplit("=", 1) for one in arguments[at : at + 3])
        assert list(given) == ["polite", "polite@good", "polite@bad"]
        ranks = [json.loads((Path(path) / "adapter_config.json").read_text())["r"] for path in given.values()]
        assert ranks == [2 + 3, 2 + 3, 2 + 1]
        # The least of vLLM's steps that takes rank 5.
        assert value(arguments, "--max-lora-rank") == "8"
        controls = [one["control"] for one in server.facts["adapters"]]
        assert controls == ["good", "good", "bad"]
    assert not any(Path(path).exists() for path in given.values())


def test_values_that_stand_in_prompts_are_not_served(tiny: Path, seen: Path, alone: Path) -> None:
    """Without them an adapter is another than was trained, and clients write the prompts."""
    for make, kind in ((written, "text"), (soft, "embeddings")):
        spec = ServeSpec(model=ModelSpec(model=str(tiny)), adapters=(str(make(alone / kind, tiny)),))
        said = [one.what for one in serve_check.check(spec, load_plugins()).problems]
        assert f"cannot be served: was trained with a conditioning by {kind}, which stands in prompts" in said[0]
        # vLLM 0.32 beside LoRA says it of virtual tokens in its own words, too.
        assert len(said) == (1 if kind == "text" else 2)


def test_without_adapters_there_is_no_gate_and_options_reach_vllm(tiny: Path, seen: Path) -> None:
    options = {"max_model_len": 64, "enforce_eager": False, "enable_prefix_caching": False, "cpu_kvcache_gib": 2}
    with serving.serve(tiny, options=options):
        given = fake_vllm.seen(seen)
        arguments = given["arguments"]
        assert not {"--middleware", "--enable-lora", "--enforce-eager", "--enable-prefix-caching"} & set(arguments)
        assert value(arguments, "--max-model-len") == "65" and "--no-enable-prefix-caching" in arguments
        assert given["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "2"


def test_an_adapters_template_is_served_where_the_base_has_none(alone: Path, seen: Path) -> None:
    base = tiny_model(alone / "base", chat_template=False)
    made = tiny_adapter(alone / "made", base)
    (made / "chat_template.jinja").write_text("{{ bos_token }}Q: {{ messages[0]['content'] }} A:", encoding="utf-8")
    with serving.serve(base, adapters=[made]) as server:
        assert fake_vllm.seen(seen)["template"] == "{{ bos_token }}Q: {{ messages[0]['content'] }} A:"
        assert server.facts["template_digest"] == digest_of_bytes(fake_vllm.seen(seen)["template"].encode())


def test_a_half_precision_model_is_served_in_fp32_on_a_cpu(tiny: Path, seen: Path, alone: Path) -> None:
    half = tiny_model(alone / "half")
    config = json.loads((half / "config.json").read_text(encoding="utf-8"))
    (half / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    checked = serve_check.check(ServeSpec(model=ModelSpec(model=str(half)), port=0), load_plugins())
    arguments = list(checked.command(1, None).arguments)
    assert value(arguments, "--dtype") == "float32"


def test_the_key_goes_from_environment_to_environment(
    tiny: Path, seen: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    # A proxy is not asked for a server on this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving.serve(tiny, api_key_env="MY_KEY", log=str(alone / "kept.log")) as server:
        given = fake_vllm.seen(seen)
        assert given["environment"]["VLLM_API_KEY"] == KEY
        assert KEY not in " ".join(given["arguments"]) and KEY not in str(server.facts)
        assert "loading ***" in server.child.said()
        assert KEY.encode() not in Path(f"/proc/{server.child.pid}/cmdline").read_bytes()
    # Of a variable that nobody named nothing is handed on.
    monkeypatch.setenv("VLLM_API_KEY", "another")
    with serving.serve(tiny):
        assert "VLLM_API_KEY" not in fake_vllm.seen(seen)["environment"]


def test_death_at_the_start_is_seen_at_once_and_shows_why(
    tiny: Path, seen: Path, left_over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "dies")
    with pytest.raises(StepError) as error, serving.serve(tiny, ready_timeout=600.0):
        raise AssertionError("never ready")
    assert error.value.what == (
        "the server ended while it started with exit code 1: ValueError: head size 7 is not supported"
    )
    assert error.value.fix.splitlines()[-1] == (
        "  | RuntimeError: Engine core initialization failed. See root cause above."
    )
    assert left_over() == ([], [])


def test_a_server_that_is_never_ready_is_given_up(
    tiny: Path, seen: Path, left_over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "never")
    with pytest.raises(StepError, match=r"was not ready within 2 s \(--ready-timeout\)"):
        serving.serve(tiny, ready_timeout=2.0).__enter__()
    assert left_over() == ([], [])


def test_death_while_serving_is_seen(tiny: Path, seen: Path, left_over: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "brief")
    with pytest.raises(StepError, match="the server ended with exit code 9"), serving.serve(tiny) as server:
        server.wait()
    assert left_over() == ([], [])


def test_a_free_port_that_somebody_took_meanwhile_is_replaced(
    tiny: Path, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "taken")
    with serving.serve(tiny) as server:
        assert server.models == (tiny.name,)


def test_a_stubborn_server_is_killed(tiny: Path, seen: Path, left_over: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    monkeypatch.setattr(serving, "GRACE", 0.5)
    with serving.serve(tiny):
        assert fake_vllm.alive(fake_vllm.seen(seen)["group"])
    assert left_over() == ([], [])


def test_an_error_in_the_block_ends_the_server(tiny: Path, seen: Path, left_over: Any) -> None:
    with pytest.raises(ZeroDivisionError), serving.serve(tiny):
        1 / 0
    assert left_over() == ([], [])


def test_a_taken_port_is_refused_before_anything_starts(tiny: Path, seen: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: is taken on 127.0.0.1"):
            serving.serve(tiny, port=port).__enter__()
    assert not seen.exists()


# ------------------------------------------------------------------------------------------- from the command line


@pytest.fixture
def started(tiny: Path, seen: Path, alone: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`harness serve --json`, once it has said that it is ready."""
    running: list[subprocess.Popen[str]] = []

    def start(
        *more: str, ready: bool = True, python: Sequence[str] = ("-m", "harness.cli.app")
    ) -> subprocess.Popen[str]:
        command = [sys.executable, *python, "serve", "--model", str(tiny), "--port", "0", "--json", *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        end = time.monotonic() + 60
        while not seen.exists():
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.02)
        if ready:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert '"models": ["tiny"]' in line and '"local_only": true' in line
        return process

    yield start
    for process in running:
        process.kill()  # a test that failed leaves nothing behind
        process.wait()


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted: the server has ended"),
        (signal.SIGTERM, 75, "stopped by a signal: the server has ended"),
    ],
)
def test_a_signal_ends_it_in_order(
    started: Callable[..., subprocess.Popen[str]], left_over: Any, number: int, code: int, said: str
) -> None:
    process = started()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.splitlines()[-1] == said
    assert left_over() == ([], [])


def test_ctrl_c_while_it_starts(
    started: Callable[..., subprocess.Popen[str]], left_over: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM", "never")
    process = started(ready=False)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_over() == ([], [])


def test_a_second_ctrl_c_does_not_wait(
    started: Callable[..., subprocess.Popen[str]], left_over: Any, seen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has an hour to end, and does not end: only the second Ctrl-C ends the command."""
    monkeypatch.setenv("FAKE_VLLM", "stubborn")
    process = started(
        python=(
            "-c",
            "from harness.cli import app; from harness.serving import server; server.GRACE = 3600.0; app.main()",
        )
    )
    process.send_signal(signal.SIGINT)
    end = time.monotonic() + 60
    while not seen.with_name("seen.json.told").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    assert process.poll() is None, "it waits for the server"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_over() == ([], [])


@pytest.mark.parametrize("behaviour", ["healthy", "never"])
def test_nothing_outlives_a_killed_parent(
    started: Callable[..., subprocess.Popen[str]], left_over: Any, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    monkeypatch.setenv("FAKE_VLLM", behaviour)
    process = started(ready=behaviour == "healthy")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert left_over() == ([], [])


def test_nothing_outlives_the_watching_process(
    started: Callable[..., subprocess.Popen[str]], seen: Path, left_over: Any
) -> None:
    process = started()
    os.kill(fake_vllm.seen(seen)["group"], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "harness serve: the server ended" in error
    assert left_over() == ([], [])


def test_what_is_printed_can_be_typed(cli: Any, tiny: Path, seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VLLM", "brief")
    ran = cli("serve", "--model", tiny, "--port", "0", "--name", "base")
    port = value(fake_vllm.seen(seen)["arguments"], "--port")
    first, second = ran.out.splitlines()
    assert first == f"http://127.0.0.1:{port}/v1 serves base; Ctrl-C ends it"
    assert second.split() == [
        *("harness", "eval", "--model", f"http://127.0.0.1:{port}/v1", "--set", "engine.model=base"),
        *("--set", f"engine.tokenizer={tiny}", "--set", f"engine.max_length={context(tiny)}"),
    ]
    assert ran.code == 3


def test_check_starts_nothing(cli: Any, tiny: Path, adapter: Path, seen: Path) -> None:
    ran = cli("serve", "--model", tiny, "--adapter", adapter, "--check")
    assert ran.code == 0 and not seen.exists()
    assert ran.out.splitlines()[-1].startswith("can be served: tiny, polite (chat template ")


def test_a_model_of_another_shape_is_another_problem(cli: Any, alone: Path, seen: Path) -> None:
    strange = tiny_model(alone / "strange")
    config = (strange / "config.json").read_text(encoding="utf-8")
    (strange / "config.json").write_text(config.replace("LlamaForCausalLM", "StrangeForCausalLM"), encoding="utf-8")
    ran = cli("serve", "--model", strange, "--check", "--json")
    assert ran.code == 2 and '"servable": false' in ran.out
