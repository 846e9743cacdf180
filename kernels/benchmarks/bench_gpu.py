"""Every kernel benchmark on a GPU with one command: correctness first, then tables, then results/*.json.

    python kernels/benchmarks/bench_gpu.py [--only routing expert_mlp relation_kl linear_kl] [--rounds 9]
    python kernels/benchmarks/bench_gpu.py --smoke      # no GPU: toy shapes under Triton's interpreter, nothing written

Each benchmark measures the copy bandwidth and the matmul rate of the GPU in its own run and prints its figures beside
them. A benchmark whose kernel disagrees with its float64 twin stops without times; the others still run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BENCHMARKS = ("routing", "expert_mlp", "relation_kl", "linear_kl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--skip-tests", action="store_true", help="do not run tests/kernels on the GPU first")
    parser.add_argument("--smoke", action="store_true", help="no GPU: toy shapes under Triton's interpreter")
    options = parser.parse_args()
    if options.smoke:
        return smoke(options.only)
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no CUDA GPU here, so nothing was measured (--smoke tries the scripts without one)")
        return 1
    if not options.skip_tests and run(sys.executable, "-m", "pytest", "tests/kernels", "-q"):
        print(
            "bench-gpu: tests/kernels fails on this GPU, so nothing was measured (--skip-tests measures all the same)"
        )
        return 1
    failed = []
    for name in options.only:
        print(f"\n## {name}", flush=True)
        if run(
            sys.executable, str(HERE / f"bench_{name}.py"), "--device", "cuda", "--rounds", options.rounds, "--save"
        ):
            failed.append(name)
    if failed:
        print("bench-gpu: failed:", ", ".join(failed))
    return 1 if failed else 0


def smoke(names: list[str]) -> int:
    """The scripts of routing and expert_mlp at toy size, and the correctness check of the losses, in one process."""
    from capgap_kernels.interpreter import prepare_interpreter

    prepare_interpreter()
    import bench_linear_kl
    import bench_relation_kl

    from capgap_kernels import use_backend

    failed = False
    for name in ("routing", "expert_mlp"):
        if name in names:
            failed |= (
                run(sys.executable, str(HERE / f"bench_{name}.py"), "--device", "cpu", "--rounds", 1, "--smoke") != 0
            )
    with use_backend("triton"):
        for module in (bench_relation_kl, bench_linear_kl):
            name = module.__name__.removeprefix("bench_")
            if name in names:
                error = module.largest_error(torch.float32, torch.device("cpu"))
                print(f"{name}: largest relative error {error:.1e}")
                failed |= not error <= module.ALLOWED[torch.float32]
    return int(failed)


def run(*command: object) -> int:
    path = os.pathsep.join([str(REPOSITORY / "kernels"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, check=False
    ).returncode


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY / "kernels"))
    sys.exit(main())
