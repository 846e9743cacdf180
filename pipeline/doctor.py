"""`capgap doctor --config RECIPE`: kills the user's own run at random points, resumes it, and compares bit for bit.

The recipe keeps its models and data; only the batch and the number of steps are made small.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.errors import CapgapError, CheckpointError, reports_errors
from data_prep.files import file_hash
from pipeline.config import load_run_config

# Of what is logged, the parts that a repeated run cannot repeat.
TIMING = ("tokens_per_second", "memory/")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when every kill was survived bit for bit, 4 otherwise."""
    parser = argparse.ArgumentParser(prog="capgap doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the recipe; its fields are flags too")
    parser.add_argument("--ranks", type=int, default=1, help="processes to start on this machine")
    parser.add_argument(
        "--kills", type=int, default=4, help="how often the run is killed; every other kill is in a save"
    )
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of the drill")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments at which it is killed")
    flags, overrides = parser.parse_known_args(argv)
    load_run_config(flags.config, overrides)  # a mistake is told once, here, and not by every rank
    folder = Path(tempfile.mkdtemp(prefix="capgap-doctor-"))
    drill = [
        *("--config", flags.config, *overrides, "--steps", str(flags.steps), "--epochs", "null"),
        *("--batch.micro_size", "1", "--batch.global_size", str(2 * flags.ranks)),
        *("--checkpoint.every_steps", str(max(1, flags.steps // 4)), "--checkpoint.keep_last", "2"),
        *("--checkpoint.copy_to", "null"),
        *("--log.every_steps", "1"),
    ]
    try:
        print(f"unbroken run of {flags.steps} steps on {flags.ranks} ranks", flush=True)
        run_to_end([*drill, "--out", str(folder / "unbroken")], flags.ranks)
        chance = random.Random(flags.seed)
        for number in range(flags.kills):
            moment = kill_once(
                [*drill, "--out", str(folder / "broken")], flags.ranks, in_save=bool(number % 2), chance=chance
            )
            print(f"kill {number + 1} of {flags.kills}: {moment}", flush=True)
        run_to_end([*drill, "--out", str(folder / "broken")], flags.ranks)
        differences = compare(folder / "unbroken", folder / "broken")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if differences:
        raise CheckpointError(f"resume drill: {flags.kills} kills, but {'; '.join(differences)} differ - report this")
    print(f"ok: {flags.kills} kills survived; losses, samples and exported weights are equal bit for bit")
    return 0


def command(arguments: list[str], ranks: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", "pipeline.distill", *arguments]


def start(arguments: list[str], ranks: int) -> subprocess.Popen:
    # A session of its own: the kill takes the launcher and all ranks at once.
    return subprocess.Popen(
        command(arguments, ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run_to_end(arguments: list[str], ranks: int) -> None:
    process = start(arguments, ranks)
    output, _ = process.communicate()
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if line.startswith("error:")] or output.splitlines()[-3:]
        error = CapgapError(f"the drill's run ended with code {process.returncode}: {' / '.join(lines)}")
        error.exit_code = process.returncode
        raise error


def kill_once(arguments: list[str], ranks: int, *, in_save: bool, chance: random.Random) -> str:
    """Starts the run, kills it after a few more steps or inside a save, and says when that was."""
    out = Path(arguments[-1])
    before = steps_taken(out)
    wanted = before + chance.randint(1, 3)
    process = start(arguments, ranks)
    try:
        while process.poll() is None:
            if in_save and list(out.glob("checkpoints/*.partial")):
                time.sleep(chance.random() * 0.05)
                break
            if not in_save and steps_taken(out) >= wanted:
                time.sleep(chance.random() * 0.05)
                break
            time.sleep(0.002)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    where = "inside a save" if list(out.glob("checkpoints/*.partial")) else "between saves"
    return f"after step {steps_taken(out)}, {where}"


def steps_taken(out: Path) -> int:
    ledger = out / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def compare(unbroken: Path, broken: Path) -> list[str]:
    """What differs between two runs: nothing should."""
    differences = []
    if numbers(unbroken / "metrics.jsonl") != numbers(broken / "metrics.jsonl"):
        differences.append("logged numbers")
    if (unbroken / "ledger.jsonl").read_bytes() != (broken / "ledger.jsonl").read_bytes():
        differences.append("samples")
    weights = [file_hash(run / "export" / "model.safetensors") for run in (unbroken, broken)]
    if weights[0] != weights[1]:
        differences.append("exported weights")
    return differences


def numbers(path: Path) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in line.items() if not name.startswith(TIMING)} for line in lines]
