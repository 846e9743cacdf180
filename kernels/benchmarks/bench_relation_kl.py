"""relation_kl against its plain twin, forward and backward: correctness first, then time, memory and the roofline.

    PYTHONPATH=kernels python kernels/benchmarks/bench_relation_kl.py [--device cuda] [--rounds 5] [--save] [--smoke]

On a CPU: one thread, CPU seconds. Widths 384 and 768 in 32 heads, as in a 3-layer MiniLM student of BERT-base.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from measuring import copy_bytes_per_second, device_name, interleaved, matmul_flop_per_second, save

from capgap_kernels import reference, relation_kl, use_backend

STUDENT_WIDTH, TEACHER_WIDTH, NUM_HEADS = 384, 768, 32
# (rows, length, dtype, share of valid tokens in the shortest row)
CPU_CASES = [(32, 128, torch.float32, 1.0), (32, 128, torch.bfloat16, 1.0), (32, 128, torch.float32, 0.25)]
GPU_CASES = [(128, 128, torch.bfloat16, 1.0), (128, 128, torch.float32, 1.0), (32, 512, torch.bfloat16, 1.0)]
SMOKE_CASES = [(2, 40, torch.float32, 0.5)]
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


def largest_error(dtype, device) -> float:
    """Of the value and the three gradients, relative to the float64 twin, on a smaller ragged batch."""
    student, teacher, valid_BT = inputs_of(3, 67, dtype, 0.4, device)
    value = relation_kl(student, teacher, valid_BT, num_relation_heads=NUM_HEADS)
    value.backward()
    exact = tuple(x.detach().double().requires_grad_() for x in student)
    expected = reference.relation_kl(
        exact, tuple(x.detach().double() for x in teacher), valid_BT, num_relation_heads=NUM_HEADS
    )
    expected.backward()
    pairs = [(value, expected), *((x.grad, y.grad) for x, y in zip(student, exact, strict=True))]
    return max(((actual.double() - right).norm() / right.norm()).item() for actual, right in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one toy shape: does this script run?")
    parser.add_argument("--save", action="store_true", help="write results/relation_kl-DEVICE.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    for dtype, allowed in ALLOWED.items():
        error = largest_error(dtype, device)
        print(f"largest relative error in {dtype}: {error:.1e} (allowed {allowed:.0e})")
        if not error <= allowed:
            raise SystemExit("the kernel is wrong here: no times")
    print(f"{device_name(device)}: copy {copy_bytes_per_second(device) / 1e9:.1f} GB/s", end=", ")
    print(f"float32 matmul {matmul_flop_per_second(device, torch.float32) / 1e9:.0f} GFLOP/s")
    print("| rows x length, dtype | variant | ms | peak MiB | times faster [range] | ideal bytes MB | GFLOP |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    cases = SMOKE_CASES if options.smoke else CPU_CASES if device.type == "cpu" else GPU_CASES
    for num_rows, length, dtype, shortest in cases:
        student, teacher, valid_BT = inputs_of(num_rows, length, dtype, shortest, device)
        variants = {
            "plain twin": lambda args=(student, teacher, valid_BT): step(reference.relation_kl, *args),
            "capgap": lambda args=(student, teacher, valid_BT): step(relation_kl, *args),
        }
        if device.type == "cuda":
            variants["capgap eager"] = lambda args=(student, teacher, valid_BT): eager_step(*args)
        # Read both sides, write the student's gradient; scores of both sides once and two products for the gradient.
        ideal_bytes = 3 * num_rows * length * (2 * STUDENT_WIDTH + TEACHER_WIDTH) * dtype.itemsize
        flop = 3 * 2 * num_rows * length**2 * (3 * STUDENT_WIDTH + TEACHER_WIDTH)
        name = f"{num_rows} x {length}, {str(dtype).removeprefix('torch.')}"
        name += "" if shortest == 1 else f", {valid_BT.float().mean():.0%} valid"
        for row in interleaved(variants, rounds=options.rounds, device=device):
            low, high = row.times_faster_range
            print(
                f"| {name} | {row.name} | {row.milliseconds:.1f} | {row.peak_mib:.0f} "
                f"| {row.times_faster:.2f} [{low:.2f}..{high:.2f}] | {ideal_bytes / 1e6:.1f} | {flop / 1e9:.1f} |",
                flush=True,
            )
            rows.append({"case": name, **asdict(row), "ideal_bytes": ideal_bytes, "flop": flop})
    if options.save:
        print(save("relation_kl", rows, device=device))


def eager_step(student, teacher, valid_BT):
    with use_backend("eager"):
        step(relation_kl, student, teacher, valid_BT)


if __name__ == "__main__":
    main()
