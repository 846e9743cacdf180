"""relation_kl against its plain twin, forward and backward: correctness first, then time, memory and the roofline.

    PYTHONPATH=kernels python kernels/benchmarks/bench_relation_kl.py [--device cuda] [--rounds 5] [--save] [--smoke]

On a CPU: one thread, CPU seconds. Widths 384 and 768 in 32 heads, as in a 3-layer MiniLM student of BERT-base.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch
from measuring import Options, Roof, interleaved, options_of, run_cases, within

from capgap_kernels import reference, relation_kl, use_backend

STUDENT_WIDTH, TEACHER_WIDTH, NUM_HEADS = 384, 768, 32
# (rows, length, dtype, share of valid tokens in the shortest row)
CPU_CASES = [(32, 128, torch.float32, 1.0), (32, 128, torch.bfloat16, 1.0), (32, 128, torch.float32, 0.25)]
GPU_CASES = [
    (128, 128, torch.bfloat16, 1.0),
    (128, 128, torch.float32, 1.0),
    (32, 512, torch.bfloat16, 1.0),
    (128, 128, torch.bfloat16, 0.25),
]
SMOKE_CASES = [(1, 20, torch.float32, 0.5)]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs_of(num_rows, length, dtype, shortest, device):
    torch.manual_seed(0)

    def projections(width):
        return tuple(torch.randn(num_rows, length, width, device=device).to(dtype).requires_grad_() for _ in range(3))

    num_valid = torch.linspace(shortest * length, length, num_rows, device=device).round()
    valid_BT = torch.arange(length, device=device)[None, :] < num_valid[:, None]
    return projections(STUDENT_WIDTH), projections(TEACHER_WIDTH), valid_BT


def step(loss, student, teacher, valid_BT):
    for projected_BTD in student:
        projected_BTD.grad = None
    loss(student, teacher, valid_BT, num_relation_heads=NUM_HEADS).backward()


def largest_error(dtype, device, *, length=67) -> float:
    """Of the value and the three gradients, relative to the float64 twin, on a smaller ragged batch."""
    student, teacher, valid_BT = inputs_of(2, length, dtype, 0.4, device)
    value = relation_kl(student, teacher, valid_BT, num_relation_heads=NUM_HEADS)
    value.backward()
    exact = tuple(x.detach().double().requires_grad_() for x in student)
    expected = reference.relation_kl(
        exact, tuple(x.detach().double() for x in teacher), valid_BT, num_relation_heads=NUM_HEADS
    )
    expected.backward()
    pairs = [(value, expected), *((x.grad, y.grad) for x, y in zip(student, exact, strict=True))]
    return max(((actual.double() - right).norm() / right.norm()).item() for actual, right in pairs)


def eager_step(student, teacher, valid_BT):
    with use_backend("eager"):
        step(relation_kl, student, teacher, valid_BT)


def measure(case: tuple, roof: Roof, seconds: float, options: Options) -> list[dict[str, Any]]:
    num_rows, length, dtype, shortest = case
    student, teacher, valid_BT = inputs_of(num_rows, length, dtype, shortest, options.device)
    # Read both sides, write the student's gradient; scores of both sides once and two products for the gradient.
    num_bytes = 3 * num_rows * length * (2 * STUDENT_WIDTH + TEACHER_WIDTH) * dtype.itemsize
    flop = 3 * 2 * num_rows * length**2 * (3 * STUDENT_WIDTH + TEACHER_WIDTH)
    name = f"{num_rows} x {length}, {str(dtype).removeprefix('torch.')}"
    name += "" if shortest == 1 else f", {valid_BT.float().mean():.0%} valid"
    print(f"{name}: {num_bytes / 1e6:.1f} MB, {flop / 1e9:.1f} GFLOP at least", flush=True)
    within(largest_error(dtype, options.device, length=min(67, length)), ALLOWED[dtype])
    variants = {
        "plain twin": lambda: step(reference.relation_kl, student, teacher, valid_BT),
        "capgap": lambda: step(relation_kl, student, teacher, valid_BT),
    }
    if options.runs_triton:
        variants["capgap eager"] = lambda: eager_step(student, teacher, valid_BT)
    print("| variant | ms | peak MiB | times faster [range] |")
    print("|---|---|---|---|")
    measured, failed = interleaved(variants, rounds=options.rounds, device=options.device, seconds=seconds)
    for row in measured:
        low, high = row.times_faster_range
        print(
            f"| {row.name} | {row.milliseconds:.2f} | {row.peak_mib:.0f} "
            f"| {row.times_faster:.2f} [{low:.2f}..{high:.2f}] |",
            flush=True,
        )
    rows = [{"case": name, **asdict(row), "bytes": num_bytes, "flop": flop} for row in measured]
    return rows + [{"case": name, "name": variant, "failed": why} for variant, why in failed.items()]


def main() -> int:
    options = options_of(__doc__, rounds=5)
    cases = SMOKE_CASES if options.smoke else CPU_CASES if options.device.type == "cpu" else GPU_CASES
    with use_backend("triton" if options.runs_triton else "eager"):
        return run_cases("relation_kl", cases, lambda *given: measure(*given, options), options, dtypes=[torch.float32])


if __name__ == "__main__":
    sys.exit(main())
