"""Starts ranks of `engine_worker` and returns what they measured."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launching import PROJECT, environment, free_port

WORKER = Path(__file__).with_name("engine_worker.py")


def plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def case(
    zero: str | Path,
    *,
    experts: int = 1,
    micro: int = 16,
    clip: float = 5.0,
    precision: str = "fp32",
    recompute: bool = False,
    starve: bool = False,
    poison: bool = False,
    reseed: bool = False,
    resume: str | None = None,
    save: Path | None = None,
    recipe: Path | None = None,
    flags: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Three steps of the global batch under a ZeRO config, with `experts` ranks sharing the experts of a layer.

    `poison` takes steps before them that must change nothing: something of one rank is not finite in each.
    `reseed` makes experts copies of another one after the first step.
    `resume` goes on from a checkpoint after three steps for two more, `save` writes one after the last step.
    """
    fields = {
        "engine.ds_config": zero if isinstance(zero, Path) else f"ds_configs/{zero}.json",
        "engine.expert_parallel_size": experts,
        "engine.precision": precision,
        "engine.activation_checkpointing": recompute,
        "batch.micro_size": micro,
        "optimizer.max_grad_norm": clip,
    }
    return {
        "flags": [word for key, value in fields.items() for word in (f"--{key}", plain(value))] + list(flags),
        "recipe": recipe and str(recipe),
        "steps": [3, 5] if resume else [0, 3],
        "starve": starve,
        "poison": poison,
        "reseed": reseed,
        "resume": resume,
        "save": save and str(save),
    }


def run_cases(recipe: Path, cases: dict[str, dict], *, ranks: int, folder: Path, timeout: float = 150) -> dict:
    """Runs the cases one after the other in one process group of `ranks` gloo ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    shared = environment(
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        PYTHONPATH=os.pathsep.join(str(PROJECT / part) for part in (".", "kernels", "tests")),
    )
    command = [sys.executable, str(WORKER), str(folder / "cases.json"), str(recipe), str(folder)]
    processes = []
    try:
        for rank in range(ranks):
            with (folder / f"rank-{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=PROJECT,
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in processes):
            failed = [process for process in processes if process.poll() not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-4000:] for rank in range(ranks))
    assert codes == [0] * ranks, f"exit codes {codes}\n{logs}"
    results: dict = {}
    for line in (folder / "results.jsonl").read_text().splitlines():
        results |= json.loads(line)
    return results
