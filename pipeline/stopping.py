"""Notices that a run should stop: SIGTERM, SIGUSR1, or a launcher that died."""

import os
import signal
import sys
import time

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again to go on
IMPATIENT_AFTER = 5.0  # seconds


class StopRequest:
    """Remembers a request to stop until the ranks agree on it; a second signal, later, ends the process at once."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._reason: str | None = None
        self._pid = os.getpid()
        self._first_signal = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        if self._reason is None and os.getppid() != self._parent:
            self._reason = "the launcher is gone"
        return self._reason

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:  # A forked reader gets the group's signals too.
            return
        if self._reason is not None:
            # A launcher passes on the signal that its whole process group has got already: that is not a second wish.
            if time.monotonic() - self._first_signal > IMPATIENT_AFTER:
                os._exit(128 + number)
            return
        self._first_signal = time.monotonic()
        self._reason = signal.Signals(number).name
        # os.write, because print is not safe inside a signal handler.
        os.write(sys.stderr.fileno(), f"{self._reason} received: saving at the end of this step\n".encode())

    def ignore_signals(self) -> None:
        """From here on signals are ignored: Python restores the defaults while it exits, and would die of them."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
