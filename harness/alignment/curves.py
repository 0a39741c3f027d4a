"""Hands what a trainer logs on to trackers, live, through transformers' own callbacks.

Heavy: imported when training starts. A tracker is given copies, never the model, and the random state is as it was when
it returns, so that it can change no result; one that raises is named and left out of what follows.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from harness.core.text import first_line
from harness.core.trackers import TrackedRun, Tracking, open_run

Note = Callable[[str], None]


@contextlib.contextmanager
def tracked(tracking: Tracking | None, run: str, note: Note) -> Iterator[list[Curves]]:
    """Callbacks for a trainer, one for each tracker; their runs are ended when it has ended, well or not.

    Args:
        tracking: which trackers; None: none.
        run: what the training is called there.
        note: hears of a tracker that fails.
    """
    found = [Curves(name, tracking, run, note) for name in tracking.names] if tracking is not None else []
    try:
        yield found
    finally:
        for one in found:
            one.close()


class Curves(TrainerCallback):
    """The callback of one tracker, kept from everything but the numbers."""

    def __init__(self, name: str, tracking: Tracking, run: str, note: Note) -> None:
        self._name, self._tracking, self._run, self._note = name, tracking, run, note
        self._opened: TrackedRun | None = None
        self._callback: Any = None
        self._failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with self._apart():
            self._opened = open_run(self._name, self._tracking, self._run, "train")
            self._callback = _callback_of(self._name, self._opened)
            self._callback.on_train_begin(*self._copies(args, state, control))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        with self._apart():
            if self._callback is not None:
                self._callback.on_log(*self._copies(args, state, control), logs=dict(logs or {}))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing: held-out rows may be measured once more, and :meth:`close` ends the run."""

    def close(self) -> None:
        """End the run; what failed is ended too, as far as it can be."""
        opened, self._opened, self._callback = self._opened, None, None
        if opened is not None:
            with self._apart():
                opened.close()

    def _copies(self, args: Any, state: Any, control: Any) -> tuple[Any, Any, Any]:
        told = copy.copy(args)
        # No folder of this machine is told to anybody.
        told.output_dir, told.run_name, told.project = "", self._run, self._tracking.project
        return told, copy.deepcopy(state), copy.copy(control)

    @contextlib.contextmanager
    def _apart(self) -> Iterator[None]:
        """Run what a tracker does with the random state kept, and name its failure once."""
        before = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        try:
            yield
        except Exception as error:
            if not self._failed:
                why = first_line(str(error)) or type(error).__name__
                self._note(f"tracker {self._name}: {self._run}: {why}; it is told no more of this training")
            self._failed, self._callback = True, None
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            if cuda:
                torch.cuda.set_rng_state_all(cuda)


def _callback_of(name: str, opened: TrackedRun) -> Any:
    """transformers' callback for `report_to`, which finds the run that is open."""
    from transformers.integrations import integration_utils

    (cls,) = integration_utils.get_reporting_integration_callbacks([name])  # type: ignore[no-untyped-call]
    return cls(opened.writer) if opened.writer is not None else cls()
