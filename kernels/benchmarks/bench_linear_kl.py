"""linear_kl against full logits, forward and backward: correctness first, then time, memory and the roofline.

    PYTHONPATH=kernels python kernels/benchmarks/bench_linear_kl.py [--device cuda] [--rounds 5] [--save] [--smoke]

On a CPU: one thread, CPU seconds. "matmuls alone" is the arithmetic that nobody can avoid: both heads forward, two
products backward, in the chunks of linear_kl. Peers run where they can be imported, on the same tensors.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Options, Roof, interleaved, options_of, run_cases, within

from capgap_kernels import TeacherHead, TeacherSamples, TeacherTopK, linear_kl, reference, use_backend

# (tokens, student width, teacher width, vocabulary, dtype)
CPU_CASES = [(2048, 768, 1024, 32000, torch.float32), (2048, 768, 1024, 32000, torch.bfloat16)]
GPU_CASES = [
    (8192, 3072, 4096, 32000, torch.bfloat16),
    (8192, 3072, 4096, 128256, torch.bfloat16),
    (32768, 3072, 4096, 32000, torch.bfloat16),
]
SMOKE_CASES = [(50, 16, 24, 97, torch.float32)]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
CHUNK = 2048


def inputs_of(num_tokens, width, teacher_width, num_ids, dtype, device):
    torch.manual_seed(0)

    def normal(rows, columns, scale=1.0):
        return (scale * torch.randn(rows, columns, device=device)).to(dtype)

    hidden_ND, head_VD = normal(num_tokens, width), normal(num_ids, width, 2 * width**-0.5)
    teacher = TeacherHead(normal(num_tokens, teacher_width), normal(num_ids, teacher_width, 2 * teacher_width**-0.5))
    labels_N = torch.randint(0, num_ids, (num_tokens,), device=device)
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), teacher, labels_N


def full_logits_kl(hidden_ND, head_VD, teacher):
    """What is written without a kernel: both sides' logits and log-probabilities as a whole, in float32."""
    log_q_NV = F.linear(hidden_ND, head_VD).float().log_softmax(-1)
    with torch.no_grad():
        log_p_NV = F.linear(teacher.hidden_ND, teacher.head_VD).float().log_softmax(-1)
    return F.kl_div(log_q_NV, log_p_NV, reduction="sum", log_target=True)


def matmuls_alone(hidden_ND, head_VD, teacher):
    with torch.no_grad():
        grad_head_VD = torch.zeros_like(head_VD)
        for hidden_nD, teacher_nD in zip(hidden_ND.split(CHUNK), teacher.hidden_ND.split(CHUNK), strict=True):
            teacher_nD @ teacher.head_VD.t()
            logits_nV = hidden_nD @ head_VD.t()
            logits_nV @ head_VD
            grad_head_VD.addmm_(logits_nV.t(), hidden_nD)


def liger_jsd(hidden_ND, head_VD, teacher):
    """liger-kernel's fused linear JSD; beta 0 is its name for forward KL, and it divides by the number of tokens."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(hidden_ND, head_VD, teacher.hidden_ND, teacher.head_VD, None)


def cut_cross_entropy(hidden_ND, head_VD, labels_N):
    """cut-cross-entropy's loss, which leaves out gradients too small to matter in bf16."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden_ND, head_VD, labels_N)


def variants_of(hidden_ND, head_VD, teacher, labels_N, *, with_peers):
    def step(loss):
        def call():
            hidden_ND.grad = head_VD.grad = None
            loss().backward()
            hidden_ND.grad = head_VD.grad = None

        return call

    with torch.no_grad():
        logits_NV = F.linear(teacher.hidden_ND, teacher.head_VD)
        log_probs_NK, ids_NK = logits_NV.float().log_softmax(-1).topk(min(64, logits_NV.shape[1]))
        del logits_NV
    top_k = TeacherTopK(ids_NK.int(), log_probs_NK)
    samples = TeacherSamples(ids_NK.int(), log_probs_NK.softmax(-1))
    mixed = {"labels_N": labels_N, "kl_weight": 0.5, "ce_weight": 0.5}
    variants = {
        "full logits": step(lambda: full_logits_kl(hidden_ND, head_VD, teacher)),
        "capgap": step(lambda: linear_kl(hidden_ND, head_VD, teacher).loss_sum),
        "matmuls alone": lambda: matmuls_alone(hidden_ND, head_VD, teacher),
    }
    variants |= {
        "capgap, half cross-entropy": step(lambda: linear_kl(hidden_ND, head_VD, teacher, **mixed).loss_sum),
        "capgap, reverse": step(lambda: linear_kl(hidden_ND, head_VD, teacher, divergence="reverse_kl").loss_sum),
        "capgap, jsd": step(lambda: linear_kl(hidden_ND, head_VD, teacher, divergence="jsd").loss_sum),
        "capgap, cached top 64": step(lambda: linear_kl(hidden_ND, head_VD, top_k).loss_sum),
        "capgap, 64 cached samples": step(lambda: linear_kl(hidden_ND, head_VD, samples).loss_sum),
        "capgap, cross-entropy alone": step(
            lambda: linear_kl(hidden_ND, head_VD, None, labels_N=labels_N, kl_weight=0.0, ce_weight=1.0).loss_sum
        ),
    }
    if with_peers and importlib.util.find_spec("liger_kernel"):
        variants["liger fused linear jsd"] = step(lambda: liger_jsd(hidden_ND, head_VD, teacher))
    if with_peers and importlib.util.find_spec("cut_cross_entropy"):
        variants["cut_cross_entropy (no teacher)"] = step(lambda: cut_cross_entropy(hidden_ND, head_VD, labels_N))
    return variants


def largest_error(dtype, device) -> float:
    """Of the sum and the two gradients, relative to the float64 twin, on 300 tokens and 1031 ids."""
    hidden_ND, head_VD, teacher, labels_N = inputs_of(300, 64, 96, 1031, dtype, device)
    options = {"labels_N": labels_N, "kl_weight": 0.7, "ce_weight": 0.3, "valid_N": labels_N % 5 != 0}
    value = linear_kl(hidden_ND, head_VD, teacher, **options).loss_sum
    value.backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden_ND, head_VD)]
    exact_teacher = TeacherHead(teacher.hidden_ND.double(), teacher.head_VD.double())
    expected = reference.linear_kl(*exact, exact_teacher, **options).loss_sum
    expected.backward()
    pairs = [(value, expected), (hidden_ND.grad, exact[0].grad), (head_VD.grad, exact[1].grad)]
    return max(((actual.double() - right).norm() / right.norm()).item() for actual, right in pairs)


def measure(case: tuple, roof: Roof, seconds: float, options: Options) -> list[dict[str, Any]]:
    num_tokens, width, teacher_width, num_ids, dtype = case
    flop = 2 * num_tokens * num_ids * (3 * width + teacher_width)
    logits_bytes = num_tokens * num_ids * 4
    name = f"{num_tokens}, {width}/{teacher_width}, {num_ids}, {str(dtype).removeprefix('torch.')}"
    print(f"{name}: {flop / 1e9:.1f} GFLOP, one float32 tensor of logits {logits_bytes / 1e6:.0f} MB", flush=True)
    within(largest_error(dtype, options.device), ALLOWED[dtype])
    variants = variants_of(
        *inputs_of(num_tokens, width, teacher_width, num_ids, dtype, options.device),
        with_peers=options.device.type == "cuda",
    )
    print("| variant | ms | peak MiB | times faster [range] | of matmul rate |")
    print("|---|---|---|---|---|")
    measured, failed = interleaved(variants, rounds=options.rounds, device=options.device, seconds=seconds)
    for row in measured:
        low, high = row.times_faster_range
        print(
            f"| {row.name} | {row.milliseconds:.2f} | {row.peak_mib:.0f} "
            f"| {row.times_faster:.2f} [{low:.2f}..{high:.2f}] "
            f"| {flop / row.milliseconds * 1e3 / roof.matmul[dtype]:.0%} |",
            flush=True,
        )
    rows = [{"case": name, **asdict(row), "flop": flop, "logits_bytes": logits_bytes} for row in measured]
    return rows + [{"case": name, "name": variant, "failed": why} for variant, why in failed.items()]


def main() -> int:
    options = options_of(__doc__, rounds=5)
    cases = SMOKE_CASES if options.smoke else CPU_CASES if options.device.type == "cpu" else GPU_CASES
    with use_backend("triton" if options.runs_triton else "eager"):
        return run_cases("linear_kl", cases, lambda *given: measure(*given, options), options, dtypes=list(ALLOWED))


if __name__ == "__main__":
    sys.exit(main())
