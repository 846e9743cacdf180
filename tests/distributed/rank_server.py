"""Starts ranks of the trainer from a process that has imported everything already.

A campaign restarts its ranks dozens of times, and the imports cost ten times more than the training. Each rank is a
process of its own that runs `pipeline.distill.main`, as a launcher would start it.
"""

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import PROJECT, environment, free_port


class Ranks:
    """The ranks of a run that has just been started: their process ids, and their exit codes at the end."""

    def __init__(self, server: "RankServer", arguments: list[str], log: Path, world_size: int):
        self._server, self.log = server, log
        request = {"arguments": arguments, "log": str(log), "world_size": world_size, "port": free_port()}
        self.pids: list[int] = server.ask(request)

    def exit_codes(self, timeout: float) -> list[int]:
        """Of each rank, negative for a signal; AssertionError when one is still there after `timeout` seconds."""
        return self._server.answer(timeout)


class RankServer:
    def __init__(self, process: subprocess.Popen):
        self._process = process

    def start(self, *arguments: str, log: Path, world_size: int = 2) -> Ranks:
        return Ranks(self, list(arguments), log, world_size)

    def ask(self, request: dict) -> list[int]:
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self.answer(120)

    def answer(self, timeout: float) -> list[int]:
        assert select.select([self._process.stdout], [], [], timeout)[0], f"no answer within {timeout:.0f} s"
        return json.loads(self._process.stdout.readline())


@contextmanager
def rank_server() -> Iterator[RankServer]:
    process = subprocess.Popen(
        [sys.executable, __file__],
        cwd=PROJECT,
        env=environment(PYTHONPATH=os.pathsep.join(str(PROJECT / part) for part in (".", "kernels", "tests"))),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    )
    try:
        yield RankServer(process)
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def serve() -> None:
    """Forks the ranks of each line of stdin, prints their process ids, and when all have gone their exit codes."""
    import deepspeed  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers  # noqa: F401

    import pipeline.building
    import pipeline.checkpoints
    import pipeline.models.students  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        pids = []
        for rank in range(request["world_size"]):
            if (pid := os.fork()) == 0:
                become(rank, request)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def become(rank: int, request: dict) -> None:
    """This process is a rank from here to its end."""
    from pipeline.distill import main

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(request["world_size"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(request["port"]),
    }
    code = 1
    try:
        code = main(request["arguments"])
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
