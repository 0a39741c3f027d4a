"""What this machine is: processor, memory, disks, GPUs, caches, and the environment that matters here.

Reads a few files and asks nvidia-smi; imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from harness.core.caches import hub_cache, prepared_cache

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "MALLOC_TOP_PAD_": "268435456",
}
"""glibc settings under which CPU training does not drown in page faults; read once, when a process starts."""
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
GIB = 1024**3


@dataclass(frozen=True)
class Gpu:
    """One GPU, as nvidia-smi sees it; memory in MiB."""

    name: str
    memory_total: int
    memory_free: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Machine:
    """The machine and the environment; sizes in GiB, for a folder that is not there yet those of its disk to be."""

    python: str
    executable: str
    system: str
    cores: int
    cpu_features: tuple[str, ...]
    memory_total: float
    memory_available: float
    disk_free: Mapping[str, float]
    gpus: tuple[Gpu, ...]
    gpu_trouble: str
    caches: Mapping[str, str]
    offline: Mapping[str, str | None]
    allocator: Mapping[str, str | None]


def look_at_machine() -> Machine:
    """Look at the machine and the environment this process runs in."""
    total, available = memory_bytes()
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    caches = {"HF_HUB_CACHE": str(hub_cache()), "HF_DATASETS_CACHE": str(prepared_cache())}
    gpus, trouble = _gpus()
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        cpu_features=tuple(feature for feature in CPU_FEATURES if feature in present),
        memory_total=total / GIB,
        memory_available=available / GIB,
        disk_free={folder: _disk_free(folder) for folder in (str(Path.cwd()), caches["HF_HUB_CACHE"])},
        gpus=gpus,
        gpu_trouble=trouble,
        caches=caches,
        offline={name: os.environ.get(name) for name in OFFLINE_FLAGS},
        allocator={name: os.environ.get(name) for name in ALLOCATOR},
    )


def hush_libraries() -> None:
    """Let nothing that is imported later report to anybody, or complain of what nobody asked for."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # bitsandbytes wants a package of faster kernels as soon as it is imported, 4-bit weights or not.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> tuple[int, int]:
    """The memory that there is and what of it is free (bytes); 0 where the system does not say."""
    memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE))
    total, available = (int(memory.get(key, 0)) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit = _read("/sys/fs/cgroup/memory.max").strip()  # a container's own limit; "max" if it has none
    if limit.isdigit():
        total, available = min(total, int(limit)), min(available, int(limit))
    return total, available


def torch_device() -> str:
    """The device that torch would compute on, found out without importing torch: step ids depend on it.

    It is an accelerator where this torch was built for one and the machine shows its device files.
    """
    spec = importlib.util.find_spec("torch")
    version = Path(spec.origin).parent / "version.py" if spec is not None and spec.origin else None
    built = version.read_text(encoding="utf-8") if version is not None and version.is_file() else ""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    nvidia = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    for name, present in (("cuda", nvidia), ("hip", Path("/dev/kfd").exists())):
        if present and not hidden and re.search(rf"^{name}\b[^=]*=\s*['\"]", built, re.MULTILINE):
            return "cuda"
    return "mps" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def visible_devices() -> tuple[str, ...]:
    """The NVIDIA GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them."""
    if torch_device() != "cuda":
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(one.strip() for one in named.split(",") if one.strip())
    return tuple(str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*")))


@lru_cache(maxsize=1)
def gpu_names() -> tuple[str, ...]:
    """Names of the GPUs that this process may use; empty where there is none, or the driver does not say."""
    visible = visible_devices()
    names = [gpu.name for gpu in _gpus()[0]] if visible else []
    numbers = [int(one) for one in visible if one.isdigit() and int(one) < len(names)]
    # Where devices are named by their UUID, those that there are will do.
    return tuple(names[number] for number in numbers) or tuple(names)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _disk_free(folder: str) -> float:
    place = Path(folder)
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free / GIB


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs, and what is wrong if nvidia-smi is there and shows none."""
    if shutil.which("nvidia-smi") is None:
        return (), ""
    query = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    if answer.returncode != 0:
        return (), (answer.stderr or answer.stdout).strip().splitlines()[
            0
        ] if answer.stderr or answer.stdout else "no message"
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.count(",") == 4]
    # A GPU that shares its memory with the CPU answers "[N/A]" for sizes.
    return tuple(Gpu(name, _number(total), _number(free), *rest) for name, total, free, *rest in rows), ""


def _number(cell: str) -> int:
    return int(cell) if cell.isdigit() else 0
