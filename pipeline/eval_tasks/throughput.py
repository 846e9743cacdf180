"""How many tokens per millisecond a model encodes."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Throughput:
    """Tokens per millisecond of the base model's forward pass on full rows: median and range of several batches."""

    tokens_per_ms: float
    slowest: float
    fastest: float
    length: int
    batch_size: int
    num_batches: int
    precision: str
    device: str


@torch.inference_mode()
def measure_throughput(
    model: nn.Module, rows_BT: Tensor, *, precision: str, min_batches: int = 8, max_seconds: float = 2.0
) -> Throughput:
    """Encodes the same batch `min_batches` times, then on until `max_seconds`, after two uncounted ones.

    On a CPU it counts the CPU time of one thread: on a machine six times overloaded the batches of each of three models
    came out within 10 % of each other, where the clock on the wall was wrong by factors. The rows should be real text
    without padding: what a router does with random ids says little.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    inputs = {"input_ids": rows_BT.to(device), "attention_mask": torch.ones_like(rows_BT, device=device)}
    model.eval()
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if on_gpu else 1)
    try:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            while len(seconds) < 2 + min_batches or time.perf_counter() - began < max_seconds:
                start = clock()
                model(**inputs)
                if on_gpu:
                    torch.cuda.synchronize(device)
                seconds.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    rates = sorted(rows_BT.numel() / (1000 * taken) for taken in seconds[2:])
    return Throughput(
        tokens_per_ms=statistics.median(rates),
        slowest=rates[0],
        fastest=rates[-1],
        length=rows_BT.shape[1],
        batch_size=rows_BT.shape[0],
        num_batches=len(rates),
        precision=precision,
        device=torch.cuda.get_device_name(device) if on_gpu else "one CPU core",
    )
