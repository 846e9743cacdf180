"""Notices that a run should stop: SIGTERM, SIGUSR1, or a launcher that died."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.ranks import under_srun

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again to go on
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
IMPATIENT_AFTER = 5.0  # seconds
PATIENT_AT_START = 10.0  # seconds


class StopRequest:
    """Remembers a request to stop until the ranks agree on it; a second signal, later, ends the process at once.

    A thread of its own receives the signals: the main thread may be inside a collective that never comes back. As long
    as the ranks have not met, there is nothing to save and nobody to agree with, and the process leaves by itself.
    """

    def __init__(self) -> None:
        self._launcher = os.getppid()
        self._above = _deepspeed_above(self._launcher)
        self._reason: str | None = None
        self._have_met = threading.Event()
        self._is_leaving = False
        # Threads that start later inherit this: none but ours is ever interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=self._receive, daemon=True).start()

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._reason is None and self._launcher_is_gone():
            self._reason = "the launcher is gone"
        return self._reason

    def _launcher_is_gone(self) -> bool:
        if os.getppid() != self._launcher:
            return True
        with suppress(psutil.Error):
            return self._above is not None and psutil.Process(self._launcher).ppid() != self._above
        return True

    def ranks_have_met(self) -> None:
        """From here on the ranks leave together."""
        self._have_met.set()

    def _receive(self) -> None:
        number = signal.sigwait(SIGNALS)
        first_signal = time.monotonic()
        self._reason = signal.Signals(number).name
        print(f"{self._reason} received: saving at the end of this step", file=sys.stderr, flush=True)
        if not self._have_met.wait(PATIENT_AT_START):
            os._exit(0 if under_srun() else EXIT_PREEMPTED)
        while True:
            number = signal.sigwait(SIGNALS)
            # A launcher passes on the signal that its whole process group has got already: that is not a second wish.
            if time.monotonic() - first_signal > IMPATIENT_AFTER and not self._is_leaving:
                os._exit(128 + number)

    def ignore_signals(self) -> None:
        """From here on signals are ignored: all that is left is to go."""
        self._is_leaving = True


def _deepspeed_above(launcher: int) -> int | None:
    """Process id of the `deepspeed` command above its launcher, which dies without telling those below."""
    with suppress(psutil.Error):
        above = psutil.Process(launcher).parent()
        if above is not None and any(Path(word).name == "deepspeed" for word in above.cmdline()[:2]):
            return above.pid
    return None
