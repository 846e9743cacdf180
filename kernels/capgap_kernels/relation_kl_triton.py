"""Triton kernels of `relation_kl`: scores exist as tiles in registers, never as a length x length matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# B batch, T tokens of a row, H relation heads, W width of a head (WS student, WT teacher).
# Tiles are [Q queries, K keys]. Scores are kept in units of log2, because the GPU's exponential is 2^x.

LOG2_E = 1.4426950408889634
# Score of a padding key. Finite, so that a tile without any valid key rescales to 0 and does not become NaN.
MASKED = tl.constexpr(-1e30)


@triton.jit
def _load_head(
    ptr,  # [B, T, H * W] through its strides, the last one 1
    row,
    tokens,  # [tile]
    valid,  # [tile]
    head,
    stride_b,
    stride_t,
    W: tl.constexpr,
    W_PADDED: tl.constexpr,
):
    """[tile, W_PADDED] of one head; zeros for padding tokens, so that no garbage of theirs enters a product."""
    columns = tl.arange(0, W_PADDED)
    offsets = row * stride_b + tokens.to(tl.int64)[:, None] * stride_t + head * W + columns[None, :]
    return tl.load(ptr + offsets, mask=valid[:, None] & (columns[None, :] < W), other=0.0)


@triton.jit
def relation_kl_forward_kernel(
    student_ptr,  # [B, T, H * WS]
    teacher_ptr,  # [B, T, H * WT]
    valid_ptr,  # [B, T] uint8
    kl_ptr,  # [B, H, cdiv(T, Q)] float32, out: sum over the tile's valid queries
    student_lse_ptr,  # [B, H, T] float32, out
    teacher_lse_ptr,  # [B, H, T] float32, out
    length,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    student_scale,  # log2(e) / sqrt(WS)
    teacher_scale,
    H: tl.constexpr,
    WS: tl.constexpr,
    WS_PADDED: tl.constexpr,
    WT: tl.constexpr,
    WT_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    # Heads vary fastest: neighbouring programs read the same cache lines of [B, T, D].
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    row = tl.program_id(1).to(tl.int64)
    queries = tile * Q + tl.arange(0, Q)
    query_valid = tl.load(valid_ptr + row * length + queries, mask=queries < length, other=0) != 0
    student_query = _load_head(
        student_ptr, row, queries, query_valid, head, student_stride_b, student_stride_t, WS, WS_PADDED
    )
    teacher_query = _load_head(
        teacher_ptr, row, queries, query_valid, head, teacher_stride_b, teacher_stride_t, WT, WT_PADDED
    )
    student_max = tl.full([Q], MASKED, tl.float32)
    teacher_max = tl.full([Q], MASKED, tl.float32)
    student_sum = tl.zeros([Q], tl.float32)
    teacher_sum = tl.zeros([Q], tl.float32)
    difference = tl.zeros([Q], tl.float32)  # sum over keys of 2^(teacher score - max) (teacher score - student score)
    for first in range(0, length, K):
        keys = first + tl.arange(0, K)
        key_valid = tl.load(valid_ptr + row * length + keys, mask=keys < length, other=0) != 0
        student_key = _load_head(
            student_ptr, row, keys, key_valid, head, student_stride_b, student_stride_t, WS, WS_PADDED
        )
        teacher_key = _load_head(
            teacher_ptr, row, keys, key_valid, head, teacher_stride_b, teacher_stride_t, WT, WT_PADDED
        )
        student_score = tl.dot(student_query, tl.trans(student_key), input_precision="ieee") * student_scale
        teacher_score = tl.dot(teacher_query, tl.trans(teacher_key), input_precision="ieee") * teacher_scale
        student_score = tl.where(key_valid[None, :], student_score, MASKED)
        teacher_score = tl.where(key_valid[None, :], teacher_score, MASKED)

        new_max = tl.maximum(student_max, tl.max(student_score, 1))
        student_sum = student_sum * tl.exp2(student_max - new_max)
        student_sum += tl.sum(tl.exp2(student_score - new_max[:, None]), 1)
        student_max = new_max

        new_max = tl.maximum(teacher_max, tl.max(teacher_score, 1))
        rescale = tl.exp2(teacher_max - new_max)
        teacher_weight = tl.exp2(teacher_score - new_max[:, None])
        teacher_sum = teacher_sum * rescale + tl.sum(teacher_weight, 1)
        difference = difference * rescale + tl.sum(teacher_weight * (teacher_score - student_score), 1)
        teacher_max = new_max

    # 0 for padding: the backward masks what it computes from it, and a number never overflows there.
    student_lse = tl.where(query_valid, student_max + tl.log2(student_sum), 0.0)
    teacher_lse = tl.where(query_valid, teacher_max + tl.log2(teacher_sum), 0.0)
    # KL(p || q) = sum_j p_j (teacher score_j - student score_j) - lse(teacher) + lse(student)
    kl = (difference / teacher_sum - teacher_lse + student_lse) * 0.6931471805599453
    kl = tl.where(query_valid, kl, 0.0)
    row_head = row * H + head
    tl.store(kl_ptr + row_head * tl.cdiv(length, Q) + tile, tl.sum(kl))
    tl.store(student_lse_ptr + row_head * length + queries, student_lse, mask=queries < length)
    tl.store(teacher_lse_ptr + row_head * length + queries, teacher_lse, mask=queries < length)


@triton.jit
def relation_kl_backward_kernel(
    student_ptr,  # [B, T, H * WS]
    teacher_ptr,  # [B, T, H * WT]
    valid_ptr,  # [B, T] uint8
    student_lse_ptr,  # [B, H, T] float32
    teacher_lse_ptr,  # [B, H, T] float32
    upstream_ptr,  # scalar float32: gradient of the sum over tokens and heads
    gradient_ptr,  # [B, T, H * WS] contiguous, out
    length,
    student_stride_b,
    student_stride_t,
    teacher_stride_b,
    teacher_stride_t,
    student_scale,
    teacher_scale,
    gradient_scale,  # 1 / sqrt(WS)
    H: tl.constexpr,
    WS: tl.constexpr,
    WS_PADDED: tl.constexpr,
    WT: tl.constexpr,
    WT_PADDED: tl.constexpr,
    Q: tl.constexpr,
    K: tl.constexpr,
):
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    row = tl.program_id(1).to(tl.int64)
    lse_row = (row * H + head) * length
    queries = tile * Q + tl.arange(0, Q)
    query_valid = tl.load(valid_ptr + row * length + queries, mask=queries < length, other=0) != 0
    student_query = _load_head(
        student_ptr, row, queries, query_valid, head, student_stride_b, student_stride_t, WS, WS_PADDED
    )
    teacher_query = _load_head(
        teacher_ptr, row, queries, query_valid, head, teacher_stride_b, teacher_stride_t, WT, WT_PADDED
    )
    student_lse = tl.load(student_lse_ptr + lse_row + queries, mask=queries < length, other=0.0)
    teacher_lse = tl.load(teacher_lse_ptr + lse_row + queries, mask=queries < length, other=0.0)
    gradient = tl.zeros([Q, WS_PADDED], tl.float32)
    for first in range(0, length, K):
        keys = first + tl.arange(0, K)
        key_valid = tl.load(valid_ptr + row * length + keys, mask=keys < length, other=0) != 0
        student_key = _load_head(
            student_ptr, row, keys, key_valid, head, student_stride_b, student_stride_t, WS, WS_PADDED
        )
        teacher_key = _load_head(
            teacher_ptr, row, keys, key_valid, head, teacher_stride_b, teacher_stride_t, WT, WT_PADDED
        )
        key_student_lse = tl.load(student_lse_ptr + lse_row + keys, mask=keys < length, other=0.0)
        key_teacher_lse = tl.load(teacher_lse_ptr + lse_row + keys, mask=keys < length, other=0.0)
        student_score = tl.dot(student_query, tl.trans(student_key), input_precision="ieee") * student_scale
        teacher_score = tl.dot(teacher_query, tl.trans(teacher_key), input_precision="ieee") * teacher_scale
        # Scores are symmetric: this tile holds both how query i reads key j and how query j reads key i, and each X
        # collects the gradient of both roles here. No second pass, no atomics.
        as_query = tl.exp2(student_score - student_lse[:, None]) - tl.exp2(teacher_score - teacher_lse[:, None])
        as_key = tl.exp2(student_score - key_student_lse[None, :]) - tl.exp2(teacher_score - key_teacher_lse[None, :])
        by_score = tl.where(query_valid[:, None] & key_valid[None, :], as_query + as_key, 0.0)
        gradient = tl.dot(by_score.to(student_key.dtype), student_key, gradient, input_precision="ieee")
    gradient *= tl.load(upstream_ptr) * gradient_scale
    columns = tl.arange(0, WS_PADDED)
    offsets = (row * length + queries[:, None]) * (H * WS) + head * WS + columns[None, :]
    mask = (queries[:, None] < length) & (columns[None, :] < WS)
    tl.store(gradient_ptr + offsets, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)


def forward(
    student_BTD: Tensor, teacher_BTD: Tensor, valid_BT: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over valid tokens and heads of the KL of one relation, and both log-sum-exps [B, H, T] for `backward`."""
    num_rows, length = valid_BT.shape
    options = _options(student_BTD, teacher_BTD, num_heads, length)
    num_tiles = triton.cdiv(length, options["Q"])
    device = student_BTD.device
    kl = torch.empty(num_rows, num_heads, num_tiles, dtype=torch.float32, device=device)
    student_lse_BHT = torch.empty(num_rows, num_heads, length, dtype=torch.float32, device=device)
    teacher_lse_BHT = torch.empty_like(student_lse_BHT)
    relation_kl_forward_kernel[num_tiles * num_heads, num_rows](
        student_BTD,
        teacher_BTD,
        valid_BT,
        kl,
        student_lse_BHT,
        teacher_lse_BHT,
        length,
        *student_BTD.stride()[:2],
        *teacher_BTD.stride()[:2],
        LOG2_E * options["WS"] ** -0.5,
        LOG2_E * options["WT"] ** -0.5,
        **options,
    )
    return kl.sum(), student_lse_BHT, teacher_lse_BHT


def backward(
    student_BTD: Tensor,
    teacher_BTD: Tensor,
    valid_BT: Tensor,
    student_lse_BHT: Tensor,
    teacher_lse_BHT: Tensor,
    upstream: Tensor,
) -> Tensor:
    """[B, T, D]: gradient by the student's projection of `upstream` times the sum that `forward` returned."""
    num_rows, num_heads, length = student_lse_BHT.shape
    options = _options(student_BTD, teacher_BTD, num_heads, length)
    gradient_BTD = torch.empty(student_BTD.shape, dtype=student_BTD.dtype, device=student_BTD.device)
    relation_kl_backward_kernel[triton.cdiv(length, options["Q"]) * num_heads, num_rows](
        student_BTD,
        teacher_BTD,
        valid_BT,
        student_lse_BHT,
        teacher_lse_BHT,
        upstream,
        gradient_BTD,
        length,
        *student_BTD.stride()[:2],
        *teacher_BTD.stride()[:2],
        LOG2_E * options["WS"] ** -0.5,
        LOG2_E * options["WT"] ** -0.5,
        options["WS"] ** -0.5,
        **options,
    )
    return gradient_BTD


def _options(student_BTD: Tensor, teacher_BTD: Tensor, num_heads: int, length: int) -> dict[str, int]:
    widths = {"WS": student_BTD.shape[-1] // num_heads, "WT": teacher_BTD.shape[-1] // num_heads}
    # tl.dot wants at least 16 on every side: heads of 12 and 24 are padded to 16 and 32 in registers.
    padded = {f"{name}_PADDED": max(16, triton.next_power_of_2(width)) for name, width in widths.items()}
    # 64 x 32 in half precision and 32 x 32 in float32 (no tensor cores there) keep every variant of the compile check
    # below 128 registers and off the stack; 64 x 64 does not.
    tile = min(64 if student_BTD.dtype.itemsize == 2 else 32, max(16, triton.next_power_of_2(length)))
    return {"H": num_heads, **widths, **padded, "Q": tile, "K": min(32, tile), "num_warps": 4}
