"""Starts real runs with the real launchers and reads what they left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from pipeline.doctor import numbers

PROJECT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    """The environment of a run: the virtual environment first, one thread per rank, CPU ranks."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TRITON_INTERPRET"):
        env.pop(key, None)
    path = f"{BIN}{os.pathsep}{env.get('PATH', '')}"
    return env | {"PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def distill_command(*arguments: str, ranks: int | None) -> list[str]:
    """`deepspeed --num_gpus N --module pipeline.distill ...`, or `python -m` for ranks=None."""
    if ranks is None:
        return [sys.executable, "-m", "pipeline.distill", *arguments]
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), "--module"]
    return [*launcher, "pipeline.distill", *arguments]


@contextmanager
def started(command: list[str], **env: str) -> Iterator[subprocess.Popen]:
    """A run in a session of its own, of which nothing is left when the block ends."""
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def distill(*arguments: str, ranks: int | None = None, timeout: float = 120, **env: str) -> tuple[int, str]:
    """Runs a distillation to its end; returns exit code and output."""
    with started(distill_command(*arguments, ranks=ranks), **env) as process:
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output


def distill_after(code: str, *arguments: str, **env: str) -> tuple[int, str]:
    """The same in one process that runs `code` first: a fault that comes from inside."""
    program = f"{code}\nimport sys\nfrom pipeline.distill import main\nsys.exit(main(sys.argv[1:]))"
    with started([sys.executable, "-c", program, *arguments], **env) as process:
        output, _ = process.communicate(timeout=120)
        return process.returncode, output


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below a launcher, in the order of their ranks."""
    found: dict[int, psutil.Process] = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        # Gone again, or not a rank: a launcher has no RANK.
        with suppress(psutil.Error, KeyError):
            if "pipeline.distill" in child.cmdline():
                found.setdefault(int(child.environ()["RANK"]), child)
    return [found[rank] for rank in sorted(found)]


def gone(processes: list[psutil.Process], *, within: float) -> bool:
    """Whether all processes end within so many seconds; one that nobody has buried yet has ended."""

    def is_alive(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    deadline = time.monotonic() + within
    while any(map(is_alive, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def wait_for(condition, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers_of(run: Path) -> list[dict]:
    """metrics.jsonl without what measures time and memory."""
    return numbers(run / "metrics.jsonl")


def exported_weights(run: Path):
    from safetensors.torch import load_file

    return load_file(run / "export" / "model.safetensors")
