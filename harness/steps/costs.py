"""Measures what steps take while they are carried out, and says so in a file beside them that others may watch.

Torch is asked only where something has imported it. ``.heartbeat.json`` lies in a step's folder from a few seconds
after it began until it has ended well: what a killed attempt took is known from it; `harness study status` reads it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core.costs import Costs
from harness.core.errors import CorruptionError
from harness.core.machine import gpu_names
from harness.core.progress import Reporter, stored
from harness.steps.files import read_json, write_json
from harness.steps.folder import StepFolder

HEARTBEAT = ".heartbeat.json"
HEARTBEAT_SECONDS = 5.0
"""Between two heartbeats of a step."""
_METERS: weakref.WeakSet[Meter] = weakref.WeakSet()
"""Of all steps that are under way in this process: whoever sets the peaks back must tell them what those were."""


class Meter:
    """What one step has taken so far."""

    def __init__(self, folder: StepFolder) -> None:
        self.folder, self.begun = folder, time.time()
        before = read_heartbeat(folder.path) or {}
        self.earlier = sum(float(before.get(key, 0.0)) for key in ("seconds", "earlier_seconds"))
        self.seconds, self.alone = 0.0, True
        self.done, self.total = 0, 0
        self.facts: dict[str, Any] = {}
        self._rss = self._device = self._allocated = self._devices = 0
        self._of_step = _set_back()
        _METERS.add(self)

    def look(self) -> None:
        """Take note of the peaks of memory since they were last set back."""
        self._rss = max(self._rss, _peak_rss())
        used = [(reserved, allocated) for reserved, allocated in _peaks_of_devices() if reserved]
        self._devices = max(self._devices, len(used))
        self._device = max([self._device, *(reserved for reserved, _ in used)])
        self._allocated = max([self._allocated, *(allocated for _, allocated in used)])

    def costs(self, spent: float | None = None, disk: int | None = None) -> Costs:
        """What it took.

        Args:
            spent: seconds that the step itself counted, which may have begun before it was announced.
            disk: size of what it left (bytes).
        """
        self.look()
        seconds = self.seconds if spent is None else spent if not self.alone else max(spent, self.seconds)
        seconds, earlier = round(seconds, 3), round(self.earlier, 3)
        facts = dict(self.facts)
        devices = int(facts.pop("devices", self._devices))
        return Costs(
            seconds=seconds,
            earlier_seconds=earlier,
            devices=devices,
            device=", ".join(dict.fromkeys(gpu_names())) or None if devices else None,
            gpu_seconds=round(devices * (seconds + earlier), 3),
            rss_bytes=self._rss or None,
            rss_of="step" if self._of_step else "process",
            device_bytes=self._device or None,
            device_allocated_bytes=self._allocated or None,
            disk_bytes=disk,
            **facts,
        )

    def beat(self) -> None:
        """Write the heartbeat; one that cannot be written costs the watcher, never the step."""
        with contextlib.suppress(Exception):
            if self.folder.path.is_dir() and self.folder.is_current():
                told = self.costs().model_dump(mode="json", exclude={"disk_bytes"})
                progress = {"done": self.done, "total": self.total} if self.total else {}
                now = {"time": round(time.time(), 3), "begun": round(self.begun, 3), "pid": os.getpid()}
                write_json(self.folder.path / HEARTBEAT, {**told, **progress, **now}, durable=False)


class Meters:
    """The steps that one runner has under way: time that passes is shared out equally among them."""

    def __init__(self) -> None:
        self._open: dict[Path, Meter] = {}
        self._lock = threading.RLock()
        self._last = time.monotonic()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()

    def begin(self, folder: StepFolder) -> None:
        """A step has begun."""
        with self._lock:
            self._pass()
            self._open[folder.path] = Meter(folder)
            if len(self._open) > 1:
                for meter in self._open.values():
                    meter.alone = False
            if self._thread is None:
                self._wake.clear()
                self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
                self._thread.start()

    def spent(self, folder: StepFolder, **facts: Any) -> None:
        """Fields of its costs that the step itself knows: tokens, devices, what a judge was paid."""
        with self._lock:
            if (meter := self._open.get(folder.path)) is not None:
                meter.facts |= facts

    def moved(self, items: int, *, total: int | None = None) -> None:
        """The newest bar has moved; ``total``: a new bar begins."""
        with self._lock:
            for meter in self._open.values():
                meter.done, meter.total = (items, total) if total is not None else (meter.done + items, meter.total)

    def stop(self, folder: StepFolder) -> None:
        """A step is left without having ended: what it took so far stays in its heartbeat."""
        with self._lock:
            self._pass()
            if (meter := self._open.pop(folder.path, None)) is not None:
                self._rest()
                meter.beat()

    def end(self, folder: StepFolder, spent: float | None, *, well: bool) -> Costs:
        """What a step took that has ended; of one that ended well no heartbeat stays."""
        with self._lock:
            self._pass()
            meter = self._open.pop(folder.path, None) or Meter(folder)
            self._rest()
            costs = meter.costs(spent, size_of(folder) if well else None)
            if well:
                with contextlib.suppress(OSError):
                    (folder.path / HEARTBEAT).unlink(missing_ok=True)
            else:
                meter.seconds = costs.seconds
                meter.beat()
            return costs

    def _rest(self) -> None:
        if not self._open:
            self._thread = None
            self._wake.set()

    def _pass(self) -> None:
        now = time.monotonic()
        for meter in self._open.values():
            meter.seconds += (now - self._last) / len(self._open)
        self._last = now

    def _watch(self) -> None:
        me = threading.current_thread()
        while not self._wake.wait(HEARTBEAT_SECONDS):
            with self._lock:
                if self._thread is not me:
                    return
                self._pass()
                for meter in self._open.values():
                    meter.beat()


class Watched(Reporter):
    """A reporter whose bars also say how far the steps under way are."""

    def __init__(self, inner: Reporter, meters: Meters) -> None:
        self._inner, self._meters = inner, meters

    def note(self, text: str) -> None:
        self._inner.note(text)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        self._meters.moved(done, total=total)
        return _Advance(self._inner.start(title, total, done), self._meters)

    def close(self) -> None:
        self._inner.close()


class _Advance:
    """A bar's advance, told to both."""

    def __init__(self, inner: Callable[[int], None], meters: Meters) -> None:
        self._inner, self._meters = inner, meters

    def __call__(self, items: int) -> None:
        self._inner(items)
        self._meters.moved(items)

    def stored(self, items: int) -> None:
        stored(self._inner, items)
        self._meters.moved(items)


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat of a step; None where there is none, or a damaged one.

    Args:
        folder: of the step's record.
    """
    with contextlib.suppress(OSError, CorruptionError, ValueError, TypeError):
        found = read_json(folder / HEARTBEAT)
        Costs.model_validate({key: found[key] for key in Costs.model_fields if key in found})
        float(found["time"]), float(found["begun"])
        return dict(found)
    return None


def size_of(folder: StepFolder) -> int:
    """Size of what a step left, without its record where that lies within (bytes)."""
    record = folder.path if folder.artifact in folder.path.parents else None
    files = (path for path in folder.artifact.rglob("*") if record not in path.parents)
    return sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink())


def _torch_cuda() -> Any:
    """``torch.cuda`` where this process uses a GPU already; nothing is imported or woken for it."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _peaks_of_devices() -> list[tuple[int, int]]:
    """For each GPU that torch sees: the most that was reserved and allocated (bytes)."""
    cuda = _torch_cuda()
    numbers = range(cuda.device_count()) if cuda is not None else ()
    return [(cuda.max_memory_reserved(number), cuda.max_memory_allocated(number)) for number in numbers]


def _peak_rss() -> int:
    """Most resident memory since it was set back, else since the process began (bytes)."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        with Path("/proc/self/status").open(encoding="ascii", errors="replace") as lines:
            line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _set_back() -> bool:
    """Set the peaks of memory back; whether the system let us do so for the resident memory."""
    for meter in _METERS:
        meter.look()
    if (cuda := _torch_cuda()) is not None:
        for number in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(number)
    try:
        # 5: "reset the peak resident set size", proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
