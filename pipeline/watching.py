"""Notices what a person at the screen would notice: experts that collapse, a loss that jumps, a rank that hangs."""

import faulthandler
import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

COLLAPSED_BELOW = 0.5  # effective experts / experts
DEAD_BELOW = 0.1  # of an even share of the tokens
COLLAPSED_LOGS = 5  # logged windows in a row
SPIKE_FACTOR = 2.0  # of the median of the last logged losses
SPIKE_HISTORY = 20


def router_health(load: list[float]) -> dict[str, float]:
    """What a load (share of the tokens per expert) says about a router.

    `max_violation` is how far the fullest expert is above an even share (arXiv 2408.15664), `dead_share` the part
    of experts with less than a tenth of an even share, `effective_share` is exp(entropy of the load) /
    experts, 1 when even.
    """
    even = 1 / len(load)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return {
        "max_violation": max(load) / even - 1,
        "dead_share": sum(share < DEAD_BELOW * even for share in load) / len(load),
        "effective_share": math.exp(entropy) / len(load),
    }


class Alarms:
    """Turns logged values into notices; it remembers just enough to be neither late nor nervous."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """From the state that a checkpoint has kept: a resumed run is alarmed when the unbroken one would have been."""
        state = state or {"collapsed": {}, "losses": []}
        self._collapsed: dict[str, int] = state["collapsed"]
        self._losses: deque[float] = deque(state["losses"], maxlen=SPIKE_HISTORY)

    def to_json(self) -> dict[str, Any]:
        return {"collapsed": dict(self._collapsed), "losses": list(self._losses)}

    def notices(self, step: int, values: dict[str, Any]) -> list[str]:
        """One line per thing worth a look in the values of a logged step."""
        found = []
        for name, share in values.items():
            if not name.endswith("/effective_share"):
                continue
            router = name.removesuffix("/effective_share")
            self._collapsed[router] = self._collapsed.get(router, 0) + 1 if share < COLLAPSED_BELOW else 0
            if self._collapsed[router] == COLLAPSED_LOGS:
                found.append(
                    f"step {step}: {router} is collapsing: its tokens go to {share:.0%} of its experts, "
                    f"{COLLAPSED_LOGS} logs in a row - raise loss.balance or student.router_jitter"
                )
        if (loss := values.get("train/loss")) is None:  # every update of the window was skipped
            return found
        if len(self._losses) >= SPIKE_HISTORY // 2 and loss > SPIKE_FACTOR * statistics.median(self._losses):
            found.append(f"step {step}: loss {loss:.4f} is {SPIKE_FACTOR:g} times the median of the last logs")
        self._losses.append(loss)
        return found

    @property
    def collapsed(self) -> list[str]:
        """Routers that are in alarm now."""
        return [router for router, count in self._collapsed.items() if count >= COLLAPSED_LOGS]

    def calm(self, router: str) -> None:
        """Starts to count again: something was done about this router."""
        self._collapsed[router] = 0


class HangWatch:
    """Ends a rank that has made no progress for `timeout` seconds, naming the ranks that did not arrive.

    Each rank notes in the shared store that it has arrived at a step, just before the collective that waits for all.
    When a collective does not come back, the rank that has not noted the step is the slow one; if all have, it is the
    one whose watching thread counts no further (a stopped process, a lost node). A thread watches, so it works while
    the main thread waits inside a collective.
    """

    def __init__(self, store: Any, *, rank: int, world_size: int, timeout: float, on_hang: Callable[[], None]):
        self._store, self._rank, self._world_size, self._timeout = store, rank, world_size, timeout
        self._on_hang = on_hang
        self._step, self._beat = -1, time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def arrive(self, step: int) -> None:
        """Says that this rank is about to wait for the others at `step`."""
        self._step, self._beat = step, time.monotonic()
        if self._world_size > 1:
            self._store.set(f"arrived/{self._rank}", str(step))

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        pulse = 0
        while not self._closed.wait(min(1.0, self._timeout / 10)):
            pulse += 1
            if self._world_size > 1 and not self._set_pulse(pulse):
                return  # The store went away with rank 0, whose end the launcher has noticed.
            if time.monotonic() - self._beat > self._timeout:
                who = self._who_is_missing()
                print(
                    f"error: rank {self._rank}: no progress for {self._timeout:.0f} s at step {self._step}: {who} - "
                    "its node may be down or its file system stuck; stacks of this rank follow - "
                    "run the same command again to resume",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                self._on_hang()
                return

    def _set_pulse(self, pulse: int) -> bool:
        try:
            self._store.set(f"pulse/{self._rank}", str(pulse))
            return True
        except RuntimeError:
            return time.monotonic() - self._beat > self._timeout / 2

    def _who_is_missing(self) -> str:
        if self._world_size == 1:
            return "it is the only rank, so a read, a write or a kernel of its own does not come back"
        arrived = self._read_others("arrived")
        if not arrived:
            return "rank 0, which keeps the ranks' common store, does not answer"
        late = [rank for rank, step in arrived.items() if step < self._step]
        if late:
            return f"rank {', '.join(map(str, late))} did not arrive"
        before = self._read_others("pulse")
        time.sleep(3)
        after = self._read_others("pulse")
        still = [rank for rank, pulse in after.items() if before.get(rank) == pulse]
        if still:
            return f"rank {', '.join(map(str, still))} stopped inside the step"
        return "every rank is alive and arrived, so a collective between them is stuck"

    def _read_others(self, what: str) -> dict[int, int]:
        """The number that each other rank has noted, -1 where none; empty when the store does not answer."""
        answers: dict[int, int] = {}

        def ask() -> None:
            with suppress(RuntimeError):  # the store lives in rank 0, which may be the one that is gone
                for rank in range(self._world_size):
                    key = f"{what}/{rank}"
                    if rank != self._rank:
                        # A question about a key that is not there would wait for it.
                        answers[rank] = int(self._store.get(key)) if self._store.check([key]) else -1

        # A store whose server hangs would hold this thread too.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(timeout=5)
        return dict(answers)


def end_process(code: int) -> None:
    """Leaves without waiting for anybody: a process group with a missing rank cannot be taken down in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
