"""The contract of an executor, tried on a little graph of real orders, with one that fails and one that crashes."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.contracts.executor import Event, Executor, ExecutorContext, Order, Pool
from harness.core.machine import memory_bytes, usable_cores, visible_devices
from harness.core.progress import Reporter
from harness.steps.orders import RelayObservers
from harness.testing.common import check_plugin, demand, options_of
from harness.testing.order_worker import EXIT_CODE, ITEMS, MISTAKE, NOTES, left_by, process

ENDS = "Every order that was submitted ends once."
ORDERED = "Events of an order come in order: what its worker said, then how it ended, and nothing after that."
RELAYED = "What a worker says reaches the reporter of the context, or comes as events, all of it and in order."


def check_executor(
    executor: Executor,
    *,
    options: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    seconds: float = 120.0,
) -> None:
    """Try an executor against its contract: every order ends once, nothing is lost, and a crash takes only its own.

    An executor that carries out orders in the process of its caller is not tried with an order that crashes.

    Args:
        executor: the instance that the hook yields.
        options: for the executor's Config.
        folder: empty, and to be written by all workers, wherever they are; a temporary one of this machine by default.
        seconds: longest that any part of it may take.

    Raises:
        AssertionError: names the rule and what was seen.
    """
    check_plugin(executor, Executor)
    chosen = options_of(executor, options)
    with tempfile.TemporaryDirectory() as temporary:
        trial = _Trial(folder or Path(temporary), seconds)
        silent = RelayObservers("", lambda event: None)
        machine = (visible_devices(), usable_cores(), memory_bytes()[0])
        context = ExecutorContext(trial.heard, silent, dict(os.environ), *machine)
        with executor.open(chosen, context) as pool:
            _check(trial, pool)
        pool.close()
        trial.check_processes()


def _check(trial: _Trial, pool: Pool) -> None:
    early = trial.listen(pool)
    demand(not early, "`events` of a new pool ends at once, without any.", f"{len(early)} events")
    most = pool.capacity()
    demand(most >= 1, "`capacity` of a pool that does nothing is at least 1.", str(most))
    (first,) = trial.carry_out(pool, [trial.order("first")])
    apart = first.result["process"] != process()
    trial.carry_out(pool, [trial.order("last", after=["b", "a"]), trial.order("b"), trial.order("a")])
    failing = [trial.order("raising", does="raises"), trial.order("mistaken", does="mistakes"), trial.order("fine")]
    trial.carry_out(pool, failing, {"raising": "failed", "mistaken": "failed"})
    trial.cancel(pool, trial.order("cancelled", does="waits"), under_way=apart)
    if apart:
        crashing = [trial.order("crashing", does="crashes"), *map(trial.order, ("beside", "behind"))]
        trial.carry_out(pool, crashing, {"crashing": "crashed"})
    if most >= 2:
        meeting = [trial.order("one", does="meets", other="two"), trial.order("two", does="meets", other="one")]
        trial.carry_out(pool, meeting)
    seen = pool.capacity()
    demand(seen == most, "`capacity` is what it was when all orders have ended.", f"{seen}, and {most} at first")


class _Heard(Reporter):
    """Keeps what reaches the reporter of the context directly."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.items: Counter[str] = Counter()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def start(self, title: str, total: int, done: int = 0) -> Callable[[int], None]:
        return lambda items: self.items.update({title: items})


class _Trial:
    """Orders, what became of them, and what that shows."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self.heard = _Heard()
        self._processes: set[tuple[str, int]] = set()

    def order(self, name: str, **spec: Any) -> Order:
        """One order of the kit's own worker."""
        where = {"run": str(self._folder.absolute()), "folder": str(Path.cwd())}
        return Order(
            id=name,
            worker="harness.testing.order_worker",
            keys=(name,),
            spec={"seconds": self._seconds / 2, **spec},
            **where,
        )

    def carry_out(self, pool: Pool, orders: Sequence[Order], expected: Mapping[str, str] | None = None) -> list[Event]:
        """Submit orders as they become ready, and hold the pool to what must come of them; how they ended, in order."""
        ended: set[str] = set()
        waiting = list(orders)

        def submit() -> None:
            ready = [one for one in waiting if ended.issuperset(one.spec.get("after", ()))]
            for order in ready[: max(0, pool.capacity())]:
                waiting.remove(order)
                pool.submit(order)

        def heard(event: Event) -> None:
            if event.kind == "ended":
                ended.add(event.order)
                submit()

        submit()
        events = self.listen(pool, heard)
        for order in (order for order in orders if order not in waiting):
            ends = sum(event.kind == "ended" and event.order == order.id for event in events)
            demand(ends == 1, ENDS, f"{order.id} ended {ends} times")
        rule = "`capacity` grows again when an order ends."
        demand(not waiting, rule, f"{len(waiting)} orders could not be submitted")
        return [self._judge(order, events, (expected or {}).get(order.id, "done")) for order in orders]

    def cancel(self, pool: Pool, order: Order, *, under_way: bool) -> None:
        """Cancel an order; ``under_way``: once its worker has spoken, which an order in this process cannot be."""
        pool.submit(order)
        if not under_way:
            pool.cancel(order.id)

        def heard(event: Event) -> None:
            if event.kind == "note" and NOTES[-1] in event.text:
                pool.cancel(order.id)

        events = self.listen(pool, heard)
        outcomes = [event.outcome for event in events if event.kind == "ended" and event.order == order.id]
        demand(outcomes == ["stopped"], "An order that is cancelled ends as `stopped`, once.", str(outcomes))

    def check_processes(self) -> None:
        """Hold a closed pool to having ended what it started here."""
        host, own = process()
        alive = [pid for where, pid in self._processes if where == host and pid != own and _runs(pid)]
        demand(not alive, "`close` ends every process of the pool.", f"processes {alive} run")

    def listen(self, pool: Pool, heard: Callable[[Event], None] = lambda event: None) -> list[Event]:
        """All events until nothing is under way."""
        events: list[Event] = []
        raised: list[BaseException] = []

        def listen() -> None:
            try:
                for event in pool.events():
                    events.append(event)
                    heard(event)
            except BaseException as error:
                raised.append(error)

        # A pool that never ends an order must not keep the kit waiting for ever.
        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        listener.join(self._seconds)
        seen = f"after {self._seconds:.0f} s it waits; the last events: {[_short(event) for event in events[-3:]]}"
        demand(not listener.is_alive(), "`events` ends when nothing is under way.", seen)
        demand(not raised, "`events` raises nothing: failures are events.", repr(raised[:1]))
        return events

    def _judge(self, order: Order, events: Sequence[Event], expected: str) -> Event:
        own = [event for event in events if event.order == order.id]
        demand(own[-1].kind == "ended", ORDERED, f"{order.id}: {[_short(event) for event in own]}")
        end = own[-1]
        rule = "An order ends as `done`, or `failed` where its worker raised, or `crashed` where its process ended."
        failure = f" ({end.failure.text.strip().splitlines()[-1]})" if end.failure is not None else ""
        demand(end.outcome == expected, rule, f"{order.id} ended as {end.outcome}{failure}, and not as {expected}")
        if expected != "crashed":
            self._check_said(order, own)
        if expected == "failed":
            _check_failure(order, end)
        if end.outcome == "crashed":
            # Where somebody else's daemon is its parent, nobody can know.
            demand(end.code in (EXIT_CODE, None), "A crash tells the exit code of its process.", str(end.code))
        files = left_by(self._folder, order.id)
        wanted = 1 if expected == "done" else 0
        demand(len(files) == wanted, "An order is carried out once.", f"{order.id} was, {len(files)} times")
        if expected == "done":
            same = end.result.get("order") == order.model_dump(mode="json")
            demand(same, "The worker gets the order as it was submitted, and its result comes back.", str(end.result))
            self._processes.add(tuple(end.result["process"]))
        return end

    def _check_said(self, order: Order, own: Sequence[Event]) -> None:
        wanted = [f"{order.id}: {note}" for note in NOTES]
        notes = [event.text for event in own if event.kind == "note"]
        direct = [note for note in self.heard.notes if note.startswith(f"{order.id}: ")]
        demand(wanted in (notes, direct), RELAYED, f"notes of {order.id}: {notes or direct}")
        items = sum(event.more for event in own if event.kind == "bar") or self.heard.items[order.id]
        demand(items == ITEMS, RELAYED, f"{order.id}: {items} of {ITEMS} items")


def _check_failure(order: Order, end: Event) -> None:
    failure = end.failure
    demand(failure is not None, "An order that failed says why.", f"{order.id}: no `failure`")
    assert failure is not None
    if order.spec["does"] == "mistakes":
        rule = "A user's mistake comes back in its three parts."
        demand((failure.kind, failure.parts) == ("user", MISTAKE), rule, f"{failure.kind}: {failure.parts}")
    else:
        demand("fails on purpose" in failure.text, "An order that failed says why.", f"{order.id}: {failure.text!r}")


def _short(event: Event) -> str:
    return f"{event.order} {event.kind}" + (f" {event.outcome}" if event.outcome else "")


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
