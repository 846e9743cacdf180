"""What every benchmark here does alike: options, cases within a time budget, interleaved timings, peaks of memory, the
machine's roofline, results that are saved case by case."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


# A benchmark's exit status when the GPU itself no longer answers: whoever started it goes on with the next case.
GPU_IS_LOST = 3


@dataclass(frozen=True)
class Options:
    """What the user of a benchmark chooses."""

    device: torch.device
    rounds: int
    save: bool
    smoke: bool
    first: int
    seconds: float

    @property
    def runs_triton(self) -> bool:
        return self.smoke or self.device.type == "cuda"


def options_of(description: str | None, *, rounds: int) -> Options:
    """From the command line, with one thread and without tf32 from here on; --smoke prepares Triton's interpreter."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--save", action="store_true", help="write results/NAME-DEVICE.json, anew after every case")
    parser.add_argument("--smoke", action="store_true", help="toy shapes under Triton's interpreter")
    parser.add_argument("--first", type=int, default=0, help="skip so many cases, and keep what is saved of them")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after so many")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    if chosen.smoke:
        from capgap_kernels.interpreter import prepare_interpreter

        prepare_interpreter()
        chosen.rounds = 1
    return Options(**vars(chosen) | {"device": torch.device(chosen.device)})


@dataclass(frozen=True)
class Roof:
    """What this machine reaches in the same run: bytes copied and operations multiplied per second."""

    copy: float
    matmul: dict[torch.dtype, float]

    def __str__(self) -> str:
        rates = (f"{str(dtype).removeprefix('torch.')} {rate / 1e12:.2f}" for dtype, rate in self.matmul.items())
        return f"copy {self.copy / 1e9:.1f} GB/s, matmul TFLOP/s {', '.join(rates)}"


# A case -> its rows for the results file; the seconds that it may take.
MeasureCase = Callable[[Any, Roof, float], list[dict[str, Any]]]


def run_cases(
    name: str, cases: Sequence[Any], measure: MeasureCase, options: Options, *, dtypes: Sequence[torch.dtype]
) -> int:
    """Measures the cases one after another and returns the exit status: 0 when each has its figures.

    A case that fails costs its own figures alone; what is measured is saved at once.
    """
    begin = time.monotonic()
    roof = Roof(
        copy_bytes_per_second(options.device),
        {dtype: matmul_flop_per_second(options.device, dtype) for dtype in dtypes},
    )
    print(f"{device_name(options.device)}: {roof}")
    rows = saved_rows(name, options.device) if options.first and options.save else []
    failed = 0
    for index, case in enumerate(cases[options.first :], start=options.first):
        left = options.seconds - (time.monotonic() - begin)
        status = 0
        if left <= 0:
            print(f"{case}: not measured, the time is over", flush=True)
            new = [{"case": str(case), "failed": "not measured: the time is over"}]
        else:
            try:
                new = measure(case, roof, left / (len(cases) - index))
            except Exception as error:
                new = [{"case": str(case), "failed": one_line(error)}]
                print(f"{case}: FAILED: {one_line(error)}", flush=True)
                status = 0 if answers(options.device) else GPU_IS_LOST
        failed += any("failed" in row for row in new)
        rows += [{"index": index, **row} for row in new]
        if options.save:
            path = save(name, rows, device=options.device, roof=roof)
        if status:
            return status
    if options.save and rows:
        print("written:", path)
    return int(failed > 0)


def answers(device: torch.device) -> bool:
    """Whether the GPU still works: an illegal address, for one, ends every later call of the process too."""
    gc.collect()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def within(error: float, allowed: float) -> None:
    """Raises where a kernel is wrong: a wrong kernel has no speed."""
    print(f"  largest relative error {error:.1e} (allowed {allowed:.0e})", flush=True)
    if not error <= allowed:
        raise ArithmeticError(f"relative error {error:.1e}, allowed {allowed:.0e}: the kernel is wrong here, no times")


@dataclass(frozen=True)
class Measured:
    """Medians of one variant over the rounds; the ratio is formed round by round against the first variant."""

    name: str
    milliseconds: float  # CPU milliseconds on a CPU, wall by events on a GPU
    peak_mib: float  # above what was allocated before the call
    times_faster: float
    times_faster_range: tuple[float, float]


def interleaved(
    variants: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, seconds: float = math.inf
) -> tuple[list[Measured], dict[str, str]]:
    """Every variant once per round, A B C A B C, after one call each to warm up; ratios are against the first.

    Also the error of each variant that could not run: the others go on without it. The rounds end early, but not before
    the third, when `seconds` are over.
    """
    failed: dict[str, str] = {}
    for name, call in variants.items():
        try:
            call()
            answers(device)
        except Exception as error:
            failed[name] = one_line(error)
            print(f"  {name}: FAILED: {one_line(error)}", flush=True)
            if not answers(device):
                raise
    calls = {name: call for name, call in variants.items() if name not in failed}
    measured_seconds: dict[str, list[float]] = {name: [] for name in calls}
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 3 and time.monotonic() > end:
            break
        for name, call in calls.items():
            measured_seconds[name].append(seconds_of(call, device=device))
    measured = []
    for name, of_variant in measured_seconds.items():
        baseline = measured_seconds.get(next(iter(variants)), [math.nan] * len(of_variant))
        ratios = [base / own for base, own in zip(baseline, of_variant, strict=True)]
        measured.append(
            Measured(
                name=name,
                milliseconds=1e3 * statistics.median(of_variant),
                peak_mib=peak_mib_of(calls[name], device=device),
                times_faster=statistics.median(ratios),
                times_faster_range=(min(ratios), max(ratios)),
            )
        )
    return measured, failed


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: what its kernels take without the host that launches them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds_of(call: Callable[[], object], *, device: torch.device) -> float:
    """CPU seconds of this process (other load on the machine hardly matters), or GPU seconds between two events."""
    if device.type != "cuda":
        begin = time.process_time()
        call()
        return time.process_time() - begin
    # Writing more than any cache holds, so that the inputs come from memory as they do in a training step.
    torch.empty(256 * 2**20, dtype=torch.int8, device=device).zero_()
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return begin_event.elapsed_time(end_event) / 1e3


def peak_mib_of(call: Callable[[], object], *, device: torch.device) -> float:
    """MiB that the call needs beyond what is held before it (Linux on a CPU: the process's resident pages)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # What earlier calls freed must go back first, or this call finds it and seems to need nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 2**10


def copy_bytes_per_second(device: torch.device) -> float:
    """Bytes read and written per second by a large copy: the roof of everything that only moves data."""
    source = torch.zeros(2**26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    seconds = statistics.median(seconds_of(lambda: target.copy_(source), device=device) for _ in range(9))
    return 2 * source.numel() * source.element_size() / seconds


def matmul_flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product: the roof of everything that multiplies."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    return 2 * size**3 / statistics.median(seconds_of(lambda: left @ right, device=device) for _ in range(5))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].split(': ', 1)[1] if models else platform.machine()}, {torch.get_num_threads()} thread"


def results_path(name: str, device: torch.device) -> Path:
    return RESULTS / f"{name}-{device_name(device).split(',')[0].replace(' ', '-').lower()}.json"


def saved_rows(name: str, device: torch.device) -> list[dict[str, Any]]:
    path = results_path(name, device)
    return json.loads(path.read_text())["rows"] if path.exists() else []


def save(name: str, rows: list[dict[str, Any]], *, device: torch.device, roof: Roof) -> Path:
    """Rows with device, versions, commit and roofline beside them, as results/NAME-DEVICE.json."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    RESULTS.mkdir(exist_ok=True)
    path = results_path(name, device)
    record = {
        "device": device_name(device),
        "versions": {
            name: _version_of(name)
            for name in ("torch", "triton", "transformers", "deepspeed", "liger-kernel", "cut-cross-entropy")
        },
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip() + (", with changes" if changed.stdout.strip() else ""),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "copy_bytes_per_second": roof.copy,
        "matmul_flop_per_second": {str(dtype).removeprefix("torch."): rate for dtype, rate in roof.matmul.items()},
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
