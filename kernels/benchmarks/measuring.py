"""Interleaved timings and peaks of memory (CPU seconds on a CPU, events on a GPU) and the machine's roofline."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """Medians of one variant over the rounds; the ratio is formed round by round against the first variant."""

    name: str
    milliseconds: float  # CPU milliseconds on a CPU, wall by events on a GPU
    peak_mib: float  # above what was allocated before the call
    times_faster: float
    times_faster_range: tuple[float, float]


def interleaved(variants: dict[str, Callable[[], object]], *, rounds: int, device: torch.device) -> list[Measured]:
    """Every variant once per round, A B C A B C, after one call each to warm up; ratios are against the first."""
    for call in variants.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            seconds[name].append(seconds_of(call, device=device))
    baseline = next(iter(seconds.values()))
    measured = []
    for name, of_variant in seconds.items():
        ratios = [base / own for base, own in zip(baseline, of_variant, strict=True)]
        measured.append(
            Measured(
                name=name,
                milliseconds=1e3 * statistics.median(of_variant),
                peak_mib=peak_mib_of(variants[name], device=device),
                times_faster=statistics.median(ratios),
                times_faster_range=(min(ratios), max(ratios)),
            )
        )
    return measured


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


def save(name: str, rows: list[dict[str, Any]], *, device: torch.device) -> Path:
    """Rows with device, versions and commit beside them, as results/NAME-DEVICE.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{device_name(device).split(',')[0].replace(' ', '-').lower()}.json"
    record = {
        "device": device_name(device),
        "versions": {
            name: _version_of(name) for name in ("torch", "triton", "transformers", "deepspeed", "liger-kernel")
        },
        "commit": commit.stdout.strip(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
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
