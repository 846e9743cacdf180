"""Triton kernels of `linear_kl`: a row of logits is read twice, and the second time the gradient is written over it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from capgap_kernels.linear_kl import Mix

# n tokens of a chunk, R real ids, C >= R columns that may be read and written. Everything here works in units of log2,
# because the GPU's exponential is 2^x.

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Logit of the columns past the last id. Finite, so that the difference of two of them is 0.
MASKED = tl.constexpr(-1e30)


@triton.jit
def _load_scores(ptr, columns, num_ids, num_columns, scale):
    """[block] logits of one row, times scale * log2(e), in float32."""
    logits = tl.load(ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    return tl.where(columns < num_ids, logits * (scale * LOG2_E), MASKED)


@triton.jit
def _log2_middle(log_p, log_q, log_beta, log_one_minus_beta):
    """log2(beta p + (1 - beta) q) from log2 of p and q, finite where both vanish in float32."""
    of_p, of_q = log_p + log_beta, log_q + log_one_minus_beta
    return tl.maximum(of_p, of_q) + tl.log2(1.0 + tl.exp2(-tl.abs(of_p - of_q)))


@triton.jit
def dense_losses_kernel(
    logits_ptr,  # [n, C], in: the student's; out, WITH_GRADIENT: gradient by them
    teacher_ptr,  # [n, C of its own]
    label_ptr,  # [n] int64, negative: none; unused without HAS_LABELS
    valid_ptr,  # [n] uint8; unused without HAS_PADDING
    loss_ptr,  # [n, 2] float32, out: divergence and cross-entropy
    num_ids,
    num_columns,
    num_teacher_columns,
    stride_n,
    teacher_stride_n,
    inverse_temperature,
    log_beta,  # log2(beta), for jsd
    log_one_minus_beta,
    kl_scale,  # kl_weight / temperature
    ce_weight,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row. First reading: log-sum-exps online and the KL; second: gradient (jsd needs one between)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    teacher_ptr += row * teacher_stride_n
    is_valid = True
    if HAS_PADDING:
        is_valid = tl.load(valid_ptr + row) != 0

    student_max = MASKED
    teacher_max = MASKED
    ce_max = MASKED
    student_sum = 0.0
    teacher_sum = 0.0
    ce_sum = 0.0
    difference = 0.0  # forward: sum 2^(u - max) (u - s); reverse: sum 2^(s - max) (s - u)
    for first in range(0, num_ids, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        student = _load_scores(logits_ptr, columns, num_ids, num_columns, inverse_temperature)
        teacher = _load_scores(teacher_ptr, columns, num_ids, num_teacher_columns, inverse_temperature)
        new_max = tl.maximum(student_max, tl.max(student, 0))
        rescale = tl.exp2(student_max - new_max)
        weight = tl.exp2(student - new_max)
        student_sum = student_sum * rescale + tl.sum(weight, 0)
        student_max = new_max
        if DIVERGENCE == "reverse_kl":
            difference = difference * rescale + tl.sum(weight * (student - teacher), 0)
        new_max = tl.maximum(teacher_max, tl.max(teacher, 0))
        rescale = tl.exp2(teacher_max - new_max)
        weight = tl.exp2(teacher - new_max)
        teacher_sum = teacher_sum * rescale + tl.sum(weight, 0)
        teacher_max = new_max
        if DIVERGENCE == "forward_kl":
            difference = difference * rescale + tl.sum(weight * (teacher - student), 0)
        if HAS_LABELS and TEMPERED:
            untempered = _load_scores(logits_ptr, columns, num_ids, num_columns, 1.0)
            new_max = tl.maximum(ce_max, tl.max(untempered, 0))
            ce_sum = ce_sum * tl.exp2(ce_max - new_max) + tl.sum(tl.exp2(untempered - new_max), 0)
            ce_max = new_max
    student_lse = student_max + tl.log2(student_sum)
    teacher_lse = teacher_max + tl.log2(teacher_sum)

    to_middle = 0.0  # jsd: KL(q || m), in log2
    if DIVERGENCE == "forward_kl":
        divergence = difference / teacher_sum - teacher_lse + student_lse
    elif DIVERGENCE == "reverse_kl":
        divergence = difference / student_sum - student_lse + teacher_lse
    else:
        from_teacher = 0.0
        for first in range(0, num_ids, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            log_q = _load_scores(logits_ptr, columns, num_ids, num_columns, inverse_temperature) - student_lse
            log_p = _load_scores(teacher_ptr, columns, num_ids, num_teacher_columns, inverse_temperature) - teacher_lse
            log_m = _log2_middle(log_p, log_q, log_beta, log_one_minus_beta)
            to_middle += tl.sum(tl.exp2(log_q) * (log_q - log_m), 0)
            from_teacher += tl.sum(tl.exp2(log_p) * (log_p - log_m), 0)
        divergence = tl.exp2(log_beta) * from_teacher + tl.exp2(log_one_minus_beta) * to_middle
    tl.store(loss_ptr + row * 2, tl.where(is_valid, divergence * LN_2, 0.0))

    label = -1
    ce_lse = student_lse
    cross_entropy = 0.0
    if HAS_LABELS:
        label = tl.load(label_ptr + row)
        if TEMPERED:
            ce_lse = ce_max + tl.log2(ce_sum)
        # An id that does not exist gives NaN, which the trainer reports, and not a number from the next row.
        label_exists = tl.maximum(label, 0) < num_ids
        label_logit = tl.load(logits_ptr + tl.maximum(label, 0), mask=label_exists, other=float("nan")).to(tl.float32)
        cross_entropy = tl.where((label >= 0) & is_valid, ce_lse * LN_2 - label_logit, 0.0)
    tl.store(loss_ptr + row * 2 + 1, cross_entropy)

    if WITH_GRADIENT:
        # The row's label was read above by every thread, and below some thread overwrites it.
        tl.debug_barrier()
        for first in range(0, num_ids, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            log_q = _load_scores(logits_ptr, columns, num_ids, num_columns, inverse_temperature) - student_lse
            log_p = _load_scores(teacher_ptr, columns, num_ids, num_teacher_columns, inverse_temperature) - teacher_lse
            q = tl.exp2(log_q)
            if DIVERGENCE == "forward_kl":
                gradient = q - tl.exp2(log_p)
            elif DIVERGENCE == "reverse_kl":
                gradient = q * (log_q - log_p - divergence) * LN_2
            else:
                log_m = _log2_middle(log_p, log_q, log_beta, log_one_minus_beta)
                gradient = tl.exp2(log_one_minus_beta) * q * (log_q - log_m - to_middle) * LN_2
            gradient *= kl_scale
            if HAS_LABELS:
                if TEMPERED:
                    q = tl.exp2(_load_scores(logits_ptr, columns, num_ids, num_columns, 1.0) - ce_lse)
                by_label = q - tl.where(columns == label, 1.0, 0.0)
                gradient += tl.where(label >= 0, ce_weight * by_label, 0.0)
            gradient = tl.where(is_valid, gradient, 0.0)
            tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def row_logsumexp_kernel(
    logits_ptr,  # [n, C]
    lse_ptr,  # [n] float32, out: natural logarithm
    num_ids,
    num_columns,
    stride_n,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_n
    row_max = MASKED
    row_sum = 0.0
    for first in range(0, num_ids, BLOCK):
        scores = _load_scores(logits_ptr, first + tl.arange(0, BLOCK), num_ids, num_columns, inverse_temperature)
        new_max = tl.maximum(row_max, tl.max(scores, 0))
        # Logits of -inf (ids that the caller took out) must not count, not even where a whole block is of them.
        weight = tl.where(scores > MASKED, tl.exp2(scores - new_max), 0.0)
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(weight, 0)
        row_max = new_max
    tl.store(lse_ptr + row, (row_max + tl.log2(tl.maximum(row_sum, 1e-30))) * LN_2)


@triton.jit
def write_exponentials_kernel(
    logits_ptr,  # [n, C], in and out
    shift_ptr,  # [n] float32
    weight_ptr,  # [n] float32
    ce_shift_ptr,  # [n] float32; unused without HAS_LABELS
    ce_weight_ptr,  # [n] float32; unused without HAS_LABELS
    num_ids,
    num_columns,
    stride_n,
    inverse_temperature,
    HAS_LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * stride_n
    scores = _load_scores(logits_ptr, columns, num_ids, num_columns, 1.0)
    shift = tl.load(shift_ptr + row) * LOG2_E
    written = tl.load(weight_ptr + row) * tl.exp2(scores * inverse_temperature - shift)
    if HAS_LABELS:
        ce_shift = tl.load(ce_shift_ptr + row) * LOG2_E
        written += tl.load(ce_weight_ptr + row) * tl.exp2(scores - ce_shift)
    tl.store(logits_ptr + columns, written.to(logits_ptr.dtype.element_ty), mask=columns < num_columns)


def dense_losses_(
    logits_nR: Tensor,
    teacher_logits_nR: Tensor,
    labels_n: Tensor | None,
    valid_n: Tensor | None,
    *,
    mix: Mix,
    with_gradient: bool,
) -> Tensor:
    """[2]: sums of divergence and cross-entropy; with_gradient, `logits_nR` becomes the gradient by the logits."""
    num_tokens, num_ids = logits_nR.shape
    if teacher_logits_nR.stride(1) != 1:
        teacher_logits_nR = teacher_logits_nR.contiguous()
    logits_nC, teacher_logits_nC = _whole_columns(logits_nR), _whole_columns(teacher_logits_nR)
    loss_n2 = torch.empty(num_tokens, 2, dtype=torch.float32, device=logits_nR.device)
    dense_losses_kernel[(num_tokens,)](
        logits_nC,
        teacher_logits_nC,
        logits_nR if labels_n is None else labels_n.contiguous(),
        logits_nR if valid_n is None else valid_n.contiguous().view(torch.uint8),
        loss_n2,
        num_ids,
        logits_nC.shape[1],
        teacher_logits_nC.shape[1],
        logits_nR.stride(0),
        teacher_logits_nR.stride(0),
        1 / mix.temperature,
        math.log2(mix.beta) if mix.divergence == "jsd" else 0.0,
        math.log2(1 - mix.beta) if mix.divergence == "jsd" else 0.0,
        mix.kl_weight / mix.temperature,
        float(mix.ce_weight),
        DIVERGENCE=mix.divergence,
        TEMPERED=mix.temperature != 1,
        HAS_LABELS=labels_n is not None,
        HAS_PADDING=valid_n is not None,
        WITH_GRADIENT=with_gradient,
        **_block(num_ids),
    )
    return loss_n2.sum(0, dtype=torch.float64)


def row_logsumexp(logits_nR: Tensor, temperature: float) -> Tensor:
    """[n], float32: log of the sum over the row of exp(logit / temperature); below -1e29 for a row of -inf."""
    num_tokens, num_ids = logits_nR.shape
    lse_n = torch.empty(num_tokens, dtype=torch.float32, device=logits_nR.device)
    logits_nC = _whole_columns(logits_nR)
    row_logsumexp_kernel[(num_tokens,)](
        logits_nC, lse_n, num_ids, logits_nC.shape[1], logits_nR.stride(0), 1 / temperature, **_block(num_ids)
    )
    return lse_n


def write_exponentials_(
    logits_nR: Tensor,
    shift_n: Tensor,
    weight_n: Tensor,
    ce_shift_n: Tensor | None,
    ce_weight_n: Tensor | None,
    *,
    temperature: float,
) -> None:
    """Replace each logit by weight * exp(logit / temperature - shift) + ce_weight * exp(logit - ce_shift)."""
    num_tokens, num_ids = logits_nR.shape
    block, logits_nC = _block(num_ids), _whole_columns(logits_nR)
    write_exponentials_kernel[(num_tokens, triton.cdiv(num_ids, block["BLOCK"]))](
        logits_nC,
        shift_n.contiguous(),
        weight_n.contiguous(),
        shift_n if ce_shift_n is None else ce_shift_n.contiguous(),
        shift_n if ce_weight_n is None else ce_weight_n.contiguous(),
        num_ids,
        logits_nC.shape[1],
        logits_nR.stride(0),
        1 / temperature,
        HAS_LABELS=ce_weight_n is not None,
        **block,
    )


def _whole_columns(logits_nR: Tensor) -> Tensor:
    """[n, C]: the same rows up to a multiple of 16 where the gap between them allows it, so that no mask cuts through
    the 16 bytes of one access. What stands in the gap is read for nothing, and overwritten in the student's logits."""
    (num_tokens, num_ids), pitch = logits_nR.shape, logits_nR.stride(0)
    num_columns = triton.cdiv(num_ids, 16) * 16
    num_elements = logits_nR.untyped_storage().nbytes() // logits_nR.itemsize
    end_of_last_row = logits_nR.storage_offset() + (num_tokens - 1) * pitch + num_columns
    if num_columns > pitch or end_of_last_row > num_elements:
        return logits_nR
    return logits_nR.as_strided((num_tokens, num_columns), (pitch, 1))


def _block(num_ids: int) -> dict[str, int]:
    """4096 ids at a time: 16 per thread and side, so that both sides and their exponentials stay in registers."""
    return {"BLOCK": min(4096, max(16, triton.next_power_of_2(num_ids))), "num_warps": 8}
