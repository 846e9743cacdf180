"""Every kernel benchmark on a GPU with one command: correctness, tables, results/*.json, and which goals are met.

    python kernels/benchmarks/bench_gpu.py [--only routing expert_mlp relation_kl linear_kl] [--minutes 10] [--tests]
    python kernels/benchmarks/bench_gpu.py --smoke      # no GPU: toy shapes under Triton's interpreter, nothing written

Each case is held to its float64 twin first and has no times where it disagrees; each benchmark measures the copy
bandwidth and the matmul rate of the GPU in its own run. What fails (a kernel, a peer, even the GPU's context) costs its
own figures alone: results are saved after every case, and a benchmark that died goes on with its next case in a fresh
process. The time is shared out beforehand; cases that it does not suffice for are named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from goals import table, verdicts
from measuring import GPU_IS_LOST, results_path, saved_rows

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# Shares of the time: compiling and tuning the experts takes most.
BENCHMARKS = {"routing": 0.2, "expert_mlp": 0.5, "relation_kl": 0.1, "linear_kl": 0.2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=10, help="for all benchmarks together")
    parser.add_argument("--tests", action="store_true", help="run tests/kernels on the GPU first, beyond the minutes")
    parser.add_argument("--smoke", action="store_true", help="no GPU: toy shapes under Triton's interpreter")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        print("bench-gpu: torch sees no CUDA GPU here, so nothing was measured (--smoke tries the scripts without one)")
        return 1
    tests_failed = options.tests and run(None, sys.executable, "-m", "pytest", "tests/kernels", "-q") != 0
    failed = ["tests/kernels"] if tests_failed else []
    device = ["--device", "cpu", "--smoke"] if options.smoke else ["--device", "cuda", "--save"]
    end = time.monotonic() + 60 * options.minutes
    for position, name in enumerate(options.only):
        share = BENCHMARKS[name] / sum(BENCHMARKS[later] for later in options.only[position:])
        if not run_benchmark(name, [*device, "--rounds", options.rounds], seconds=share * (end - time.monotonic())):
            failed.append(name)
    if not options.smoke:
        records = {name: results_path(name, torch.device("cuda")) for name in options.only}
        print("\n## Goals\n")
        print(table(verdicts({name: json.loads(path.read_text()) for name, path in records.items() if path.exists()})))
    if failed:
        print("bench-gpu: not everything ran, see above:", ", ".join(failed))
    return 1 if failed else 0


def run_benchmark(name: str, arguments: list[object], *, seconds: float) -> bool:
    """Whether all of its cases have their figures; started anew behind a case that the GPU did not survive."""
    print(f"\n## {name}, {seconds:.0f} s", flush=True)
    end, first, script = time.monotonic() + seconds, 0, HERE / f"bench_{name}.py"
    while True:
        left = max(1.0, end - time.monotonic())
        status = run(left + 60, sys.executable, script, *arguments, "--first", first, "--seconds", f"{left:.0f}")
        if status != GPU_IS_LOST:
            return status == 0
        first = 1 + max(row["index"] for row in saved_rows(name, torch.device("cuda")))
        print(f"{name}: a fresh process goes on with case {first}", flush=True)


def run(timeout: float | None, *command: object) -> int:
    path = os.pathsep.join([str(REPOSITORY / "kernels"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    try:
        return subprocess.run(
            [str(part) for part in command],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
            timeout=timeout,
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {timeout:.0f} s", flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
