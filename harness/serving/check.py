"""What would be served, and why it cannot be: found out from files and from the machine, nothing is loaded."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness.contracts.engine import Engine, ServerCommand, Serving
from harness.contracts.registry import Registry
from harness.core.config import parse_options
from harness.core.errors import UserError
from harness.core.machine import GIB, Gpu, look_at_machine
from harness.core.records import AdapterInfo, ModelInfo
from harness.core.secrecy import read_secret
from harness.core.specs import ServeSpec
from harness.evaluation.arms import adapters_in, unique_names
from harness.evaluation.control import Steering
from harness.models.chat_templates import read_chat_template
from harness.models.inspect import inspect_adapter, inspect_model
from harness.models.locate import is_url
from harness.models.precision import BYTES, asked_dtype, settle_dtype
from harness.steps.provenance import digest_of_bytes

TAKEN = "address already in use"


@dataclass
class Checked:
    """What a server would serve; ``problems`` say why it cannot, ``limits`` what will not work and does no harm."""

    spec: ServeSpec
    engine: Engine | None = None
    options: Any = None
    model: ModelInfo | None = None
    name: str = ""
    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    controls: dict[str, Steering] = field(default_factory=dict)
    """Of adapters with a conditioning: what requests call it -> the adapter under a control."""
    template: str | None = None
    problems: list[UserError] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)

    @property
    def template_digest(self) -> str | None:
        """SHA-256 of the chat template that the server applies."""
        return digest_of_bytes(self.template.encode()) if self.template is not None else None

    def command(self, port: int, template: Path | None) -> ServerCommand:
        """How the engine's server is started; only where there are no problems."""
        assert self.engine is not None and self.model is not None
        return self.engine.server(
            Serving(self.model, self.name, self.adapters, self.options, self.spec.host, port, template)
        )

    def write_sums(self, scratch: Path) -> None:
        """Write the adapters that are sums of an adapter and its control, so that a server can open them."""
        for name, steering in self.controls.items():
            opened = steering.opened(scratch)
            assert opened is not None
            self.adapters[name] = opened

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "servable": not self.problems,
            "problems": [{"where": one.where, "what": one.what, "fix": one.fix} for one in self.problems],
            "limits": self.limits,
            "models": [self.name, *self.adapters] if self.model is not None else [],
            "template_digest": self.template_digest,
        }


def check(spec: ServeSpec, registry: Registry) -> Checked:
    """Look at model, adapters, engine and machine; everything that is wrong is collected, not the first thing alone.

    Raises:
        UserError: options that cannot be understood.
    """
    checked = Checked(spec)
    checked.engine = registry.find(Engine, spec.engine, "--engine")
    checked.options = parse_options(checked.engine.Config, spec.options, "--set engine")
    try:
        if is_url(spec.model.model):
            what = "is the address of a server, and not a model's folder"
            raise UserError(f"--model {spec.model.model}", what, "Give what that server would serve.")
        checked.model, note = settle_dtype(inspect_model(spec.model), checked.engine.device(checked.options))
    except UserError as error:
        checked.problems.append(error)
        return checked
    checked.limits += [note] if note is not None else []
    checked.name = spec.name or checked.model.name
    checked.problems += checked.engine.server_problems(checked.model, checked.options)
    _adapters(checked)
    _template(checked)
    if not checked.problems:
        # A place holder: port and file are settled when the server is started.
        command = checked.command(spec.port or 1, None)
        checked.limits += command.notes
        checked.problems += _memory(checked.model, command)
    checked.problems += _problems_of(lambda: free_port(spec.host, spec.port), lambda: api_key(spec))
    if not is_loopback(spec.host):
        checked.limits.append(_open_to_all(spec))
    return checked


def is_loopback(host: str) -> bool:
    """Whether an address is one of this machine alone; of names only localhost is: any other may lead anywhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _problems_of(*looks: Callable[[], object]) -> list[UserError]:
    found = []
    for look in looks:
        try:
            look()
        except UserError as error:
            found.append(error)
    return found


def _open_to_all(spec: ServeSpec) -> str:
    reach = f"{spec.host} is no address of this machine alone: whoever reaches it can use the model"
    if spec.api_key_env is None:
        return f"{reach}. Name a variable that holds a key (--api-key-env NAME), or leave --host out"
    return f"{reach}, if they know the key; the server asks for it below /v1 only, so a firewall is needed all the same"


def _adapters(checked: Checked) -> None:
    """Find the adapters and their names, and what keeps each from being served."""
    spec, model, engine = checked.spec, checked.model, checked.engine
    assert model is not None and engine is not None
    found: list[tuple[str | None, AdapterInfo]] = []
    for given in spec.adapters:
        name, ref = _named(given)
        refs = adapters_in(ref) if name is None else [ref]
        for one in refs:
            try:
                allowed = spec.model.allow_template_mismatch
                adapter = inspect_adapter(one, model, allow_template_mismatch=allowed, conditioned=True)
                found.append((name, adapter))
            except UserError as error:
                checked.problems.append(error)
    for _, adapter in found:
        checked.problems += _in_prompts(adapter)
        reason = engine.adapter_problem(model, adapter, checked.options)
        if reason is not None:
            fix = f"Make it a model first: `harness fold {adapter.ref} --base {model.ref} --out DIR`, "
            fix += "or `harness merge` with others; then serve DIR as --model."
            checked.problems.append(UserError(f"--adapter {adapter.ref}", f"cannot be served: {reason}", fix))
    own = iter(unique_names([adapter for name, adapter in found if name is None]))
    called = [(name if name is not None else next(own), adapter) for name, adapter in found]
    served = [one for name, adapter in called for one in _under_controls(model, name, adapter)]
    names = [name for name, _ in served]
    twice = [name for name, count in Counter([checked.name, *names]).items() if count > 1]
    if twice:
        fix = "Give names: --name NAME for the model, --adapter NAME=PATH for an adapter."
        checked.problems.append(UserError(f"--adapter {twice[0]}", "two of those served have that name", fix))
    strange = [name for name in names if not name or "=" in name or name != name.strip()]
    if strange:
        checked.problems.append(UserError(f"--adapter {strange[0]}", "cannot be a name", "Give another: NAME=PATH."))
    for name, steering in served:
        asked = steering.served
        assert asked is not None
        checked.adapters[name] = asked
        if steering.control is not None and not _in_prompts(asked):
            checked.controls[name] = steering
            checked.problems += _problems_of(partial(_refuse_sum, name, steering, checked))


def _in_prompts(adapter: AdapterInfo) -> list[UserError]:
    """Why values that stand in prompts are not served: the clients of a server write those."""
    found = adapter.conditioning
    kinds = sorted({found.kind(control) for control in found.controls} - {"adapter"}) if found is not None else []
    if not kinds:
        return []
    what = f"was trained with a conditioning by {' and '.join(kinds)}, which stands in prompts, and clients write those"
    fix = "`harness eval --adapter` puts it in; values that are adapters can be served."
    return [UserError(f"--adapter {adapter.ref}", f"cannot be served: {what}", fix)]


def _under_controls(model: ModelInfo, name: str, adapter: AdapterInfo) -> list[tuple[str, Steering]]:
    """What requests call an adapter: by its name under the default of its conditioning, and each value by its own."""
    found = adapter.conditioning
    if found is None:
        return [(name, Steering(model, adapter, name, None))]
    # The separators of several preferences mean something else to servers.
    controls = {f"{name}@{one.replace('=', ':').replace(',', '+')}": one for one in found.controls}
    controls = {name: found.default, **controls}
    return [(one, Steering(model, adapter, one, control)) for one, control in controls.items()]


def _refuse_sum(name: str, steering: Steering, checked: Checked) -> None:
    assert checked.engine is not None
    reason = steering.folded(checked.engine, checked.options)
    if reason is not None:
        fix = f"Fold it: `harness fold {steering.owner.ref} --control {steering.control} --base BASE --out DIR`."
        raise UserError(f"--adapter {name}", f"cannot be served: {reason}", fix)


def _named(given: str) -> tuple[str | None, str]:
    """``NAME=PATH``, unless a folder is called so."""
    name, equals, ref = given.partition("=")
    if not equals or "/" in name or Path(given).expanduser().exists():
        return None, given
    return name, ref


def _template(checked: Checked) -> None:
    """The model's own chat template, else the one that all of its adapters were trained with."""
    model = checked.model
    assert model is not None
    checked.template = model.chat_template
    if checked.template is not None:
        return
    brought = {name: read_chat_template(Path(adapter.path)) for name, adapter in checked.adapters.items()}
    different: dict[str, str] = {text: name for name, text in brought.items() if text is not None}
    if len(different) > 1:
        names = " and ".join(list(different.values())[:2])
        what = f"{model.ref} has no chat template, and {names} were trained with different ones; a server has one"
        fix = "Serve them one by one, each beside the base."
        checked.problems.append(UserError("--adapter", what, fix))
    elif different:
        checked.template = next(iter(different))
    else:
        what = "no chat template: /v1/completions works, /v1/chat/completions will refuse every request"
        checked.limits.append(f"{model.name} has {what}")


def weights_gib(model: ModelInfo) -> float:
    """The weights in memory, in the type that they are loaded in (GiB)."""
    asked, stored = asked_dtype(model), str(model.dtype or "")
    factor = BYTES[asked] / BYTES[stored] if asked in BYTES and stored in BYTES else 1.0
    return model.size_bytes * factor / GIB


def _memory(model: ModelInfo, command: ServerCommand) -> list[UserError]:
    machine = look_at_machine()
    need = weights_gib(model)
    where = f"--model {model.ref}"
    if command.gpus:
        return _gpu_memory(where, need, command, _visible(machine.gpus, os.environ))
    if machine.memory_total and need + command.beside_gib > machine.memory_available:
        what = f"needs {need:.1f} GiB for its weights and {command.beside_gib:g} GiB beside them, and "
        what += f"{machine.memory_available:.1f} GiB of memory are free"
        return [UserError(where, what, "Free some, lower engine.cpu_kvcache_gib, or take --dtype bfloat16.")]
    return []


def _visible(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, where it gives numbers."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(gpus)
    numbers = [entry.strip() for entry in named.split(",") if entry.strip()]
    if not all(number.isdigit() for number in numbers):
        return list(gpus)
    return [gpus[int(number)] for number in numbers if int(number) < len(gpus)]


def _gpu_memory(where: str, need: float, command: ServerCommand, gpus: Sequence[Gpu]) -> list[UserError]:
    if not gpus:
        return []  # nvidia-smi is not there to ask
    if len(gpus) < command.gpus:
        what = f"engine.tensor_parallel_size is {command.gpus}, and {len(gpus)} GPUs are visible"
        return [UserError(where, what, f"Set engine.tensor_parallel_size to {len(gpus)} or less.")]
    problems = []
    # One that shares its memory with the processor says 0: nothing is known of it.
    for gpu in [gpu for gpu in gpus[: command.gpus] if gpu.memory_total]:
        taken = gpu.memory_total / 1024 * command.gpu_share
        if need / command.gpus > taken:
            what = f"needs {need / command.gpus:.1f} GiB for its weights on each GPU, and may take {taken:.1f} GiB of "
            what += gpu.name
            fix = "Raise engine.gpu_memory_utilization or engine.tensor_parallel_size, or take --dtype bfloat16."
            problems.append(UserError(where, what, fix))
        elif taken > gpu.memory_free / 1024:
            what = f"takes {taken:.1f} GiB of {gpu.name} at once, and {gpu.memory_free / 1024:.1f} GiB are free"
            problems.append(UserError(where, what, "End what runs there, or lower engine.gpu_memory_utilization."))
    return problems[:1]


def free_port(host: str, port: int) -> int:
    """The port, if nobody has it, or a free one for 0.

    Raises:
        UserError: the port is taken, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: a connection that is only just closed does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except PermissionError:
            raise UserError(f"--port {port}", "may not be listened on by this user", "Take one from 1024 on.") from None
        except OSError as error:
            if error.errno is not None and os.strerror(error.errno).lower() == TAKEN:
                fix = "End what listens there, give another port, or --port 0 for a free one."
                raise UserError(f"--port {port}", f"is taken on {host}", fix) from None
            what = f"cannot be listened on: {error.strerror or error}"
            raise UserError(f"--host {host}", what, "Give an address of this machine, or leave --host out.") from None
        return int(probe.getsockname()[1])


def api_key(spec: ServeSpec) -> str | None:
    """The key that requests must bring, from the environment; None: the server asks for none.

    Raises:
        UserError: the variable is not set.
    """
    if spec.api_key_env is None:
        return None
    key = read_secret(spec.api_key_env, "--api-key-env")
    if not key:
        what = f"the environment variable {spec.api_key_env} is not set, or empty"
        raise UserError("--api-key-env", what, f"Set it: `export {spec.api_key_env}=...`.")
    return key
