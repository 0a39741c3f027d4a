"""Tensors made by several threads, a bounded number of bytes at a time, and written as they come.

Threads, since torch releases the interpreter's lock where the time goes; each computes alone (torch's own threads are
set to one), so that a tensor's bytes do not depend on how many work beside it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.merging.write import Shards, TensorShape

if TYPE_CHECKING:
    import torch

_ROOM = 2 << 30
"""Bytes that tensors in flight may take, where one alone does not take more."""


@dataclass(frozen=True)
class TensorWork:
    """One tensor to be made."""

    plan: TensorShape
    needs: int
    """Bytes that it takes while it is made, roughly."""
    make: Callable[[], torch.Tensor]
    """Returns it in its planned type, on the CPU."""


@dataclass
class Clock:
    """Seconds by what they were spent on, summed over threads; and bytes read."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    read: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the block's time."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[what] += time.perf_counter() - begun

    def count(self, size: int) -> None:
        """Add to the bytes that were read."""
        with self._lock:
            self.read += size


class _Queue:
    """Hands jobs out in their order, as long as there is room."""

    def __init__(self, jobs: Sequence[TensorWork], workers: int) -> None:
        self._jobs = iter(jobs)
        self._next = next(self._jobs, None)
        largest = max((job.needs for job in jobs), default=0)
        self._room = max(largest, min(workers * largest, _ROOM))
        self._taken = self._in_hand = 0
        self._changed = threading.Condition()
        self._stopped = False

    def take(self) -> TensorWork | None:
        """The next job, once there is room for it; None: there is none, or work has stopped."""
        with self._changed:
            while self._next is not None and not self._stopped:
                if self._taken == 0 or self._taken + self._next.needs <= self._room:
                    job, self._next = self._next, next(self._jobs, None)
                    self._taken += job.needs
                    self._in_hand += 1
                    return job
                self._changed.wait()
            return None

    def done(self, job: TensorWork) -> None:
        """Give back the room of a job that is done."""
        with self._changed:
            self._taken -= job.needs
            self._in_hand -= 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Hand out nothing more, and wait for what is in hand: nobody writes when this returns."""
        self.stop()
        with self._changed:
            self._changed.wait_for(lambda: self._in_hand == 0)


def default_workers() -> int:
    """The default number of threads: as many as this process may use cores, up to 8: beyond that the disk decides."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 8))


def carry_out(
    jobs: Sequence[TensorWork], shards: Shards, workers: int, clock: Clock, advance: Callable[[int], None]
) -> None:
    """Make and write every tensor.

    Args:
        jobs: in the order in which they are begun.
        shards: where to.
        workers: threads.
        clock: for the time of writing; ``make`` counts its own.
        advance: told after every tensor.

    Raises:
        Exception: the first that a job raised; nothing new is begun after it, or after Ctrl-C.
    """
    import torch

    queue = _Queue(jobs, workers)
    before = torch.get_num_threads()

    def work() -> None:
        # Of this thread; the setting is each thread's own.
        torch.set_num_threads(1)
        try:
            while (job := queue.take()) is not None:
                try:
                    made = job.make()
                    with clock.on("write"):
                        shards.write(job.plan.name, made)
                    del made
                finally:
                    queue.done(job)
                advance(1)
        except BaseException:
            queue.stop()
            raise

    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge")
    try:
        futures = [pool.submit(work) for _ in range(workers)]
        wait(futures)
        for future in futures:
            future.result()
    finally:
        # Ctrl-C may come while a thread starts, which the pool then knows nothing of.
        queue.drain()
        pool.shutdown()
        torch.set_num_threads(before)
