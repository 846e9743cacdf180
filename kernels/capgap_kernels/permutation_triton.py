"""Triton kernels of `permute` and `combine`: a token's row is read once, its K rows written or read by address."""

# N tokens, K choices per token, M = N*K permuted rows, D hidden. Positions from offsets[E] on belong to padding and to
# slots that a capacity drops.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def spread_kernel(
    hidden_ptr,  # [N, D]
    position_ptr,  # [N, K]
    end_ptr,  # []: offsets[E]
    gate_ptr,  # [N, K] or unused
    permuted_ptr,  # [M, D] or unused: the rows that the gates weighted
    spread_ptr,  # out [M, D]
    grad_gate_ptr,  # out [N, K] or unused
    N,
    D,
    stride_n,
    stride_d,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """Row of every slot: its token's, weighted by its gate in the backward of combine, which also yields the gates'
    gradient. Rows of padding and of dropped slots are 0."""
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = token_N < N
    end = tl.load(end_ptr)
    choice_K = tl.arange(0, BLOCK_K)
    # Rows that no choice of theirs needs are not read: that is all of the padding.
    position_NK = tl.load(
        position_ptr + token_N[:, None] * K + choice_K[None, :],
        mask=inside_N[:, None] & (choice_K < K)[None, :],
        other=end,
    )
    needed_N = tl.min(position_NK, 1) < end
    dot_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, D, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D).to(tl.int64)
        inside_ND = inside_N[:, None] & (column_D < D)[None, :]
        hidden_address_ND = token_N[:, None] * stride_n + column_D[None, :] * stride_d
        hidden_ND = tl.load(hidden_ptr + hidden_address_ND, mask=inside_ND & needed_N[:, None], other=0.0)
        for choice in tl.static_range(K):
            slot_N = token_N * K + choice
            position_N = tl.load(position_ptr + slot_N, mask=inside_N, other=0)
            placed_N = inside_N & (position_N < end)
            address_ND = position_N[:, None] * D + column_D[None, :]
            row_ND = tl.where(placed_N[:, None], hidden_ND, 0.0)
            if WEIGHTED:
                permuted_ND = tl.load(permuted_ptr + address_ND, mask=inside_ND & placed_N[:, None], other=0.0)
                dot_N = tl.sum(row_ND.to(tl.float32) * permuted_ND.to(tl.float32), 1)
                dot_NK += tl.where(choice_K[None, :] == choice, dot_N[:, None], 0.0)
                gate_N = tl.load(gate_ptr + slot_N, mask=placed_N, other=0.0).to(tl.float32)
                row_ND = row_ND.to(tl.float32) * gate_N[:, None]
            tl.store(spread_ptr + address_ND, row_ND.to(spread_ptr.dtype.element_ty), mask=inside_ND)
    if WEIGHTED:
        tl.store(
            grad_gate_ptr + token_N[:, None] * K + choice_K[None, :],
            dot_NK,
            mask=inside_N[:, None] & (choice_K < K)[None, :],
        )


@triton.jit
def gather_sum_kernel(
    permuted_ptr,  # [M, D]
    position_ptr,  # [N, K]
    end_ptr,  # []: offsets[E]
    gate_ptr,  # [N, K] or unused
    out_ptr,  # out [N, D]
    N,
    D,
    stride_m,
    stride_d,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The (gate-weighted) sum of each token's K rows, in float32; 0 for padding."""
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside_N = token_N < N
    end = tl.load(end_ptr)
    sum_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for choice in tl.static_range(K):
        slot_N = token_N * K + choice
        position_N = tl.load(position_ptr + slot_N, mask=inside_N, other=0)
        placed_N = inside_N & (position_N < end)
        row_ND = tl.load(
            permuted_ptr + position_N[:, None] * stride_m + column_D[None, :] * stride_d,
            mask=placed_N[:, None] & (column_D < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        if WEIGHTED:
            gate_N = tl.load(gate_ptr + slot_N, mask=placed_N, other=0.0).to(tl.float32)
            row_ND = row_ND * gate_N[:, None]
        sum_ND += row_ND
    tl.store(
        out_ptr + token_N[:, None] * D + column_D[None, :],
        sum_ND.to(out_ptr.dtype.element_ty),
        mask=inside_N[:, None] & (column_D < D)[None, :],
    )


def _blocks(hidden: int) -> tuple[int, int]:
    """(tokens, columns) of a program: 4096 elements, 16 bytes per thread and load in half precision."""
    block_d = min(512, triton.next_power_of_2(hidden))
    return max(1, 4096 // block_d), block_d


def spread(
    hidden_ND: Tensor,
    position_NK: Tensor,
    end: Tensor,
    *,
    gate_NK: Tensor | None = None,
    permuted_MD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[M, D] rows of `hidden_ND` in permuted order; with gates and the rows that they weighted (the backward of
    combine, `hidden_ND` its upstream gradient) also the gradient of the gates."""
    (num_tokens, hidden), top_k = hidden_ND.shape, position_NK.shape[1]
    spread_MD = torch.empty(num_tokens * top_k, hidden, dtype=hidden_ND.dtype, device=hidden_ND.device)
    grad_gate_NK = None if gate_NK is None else torch.empty_like(gate_NK)
    block_n, block_d = _blocks(hidden)
    spread_kernel[(max(1, triton.cdiv(num_tokens, block_n)),)](
        hidden_ND,
        position_NK,
        end,
        gate_NK,
        permuted_MD,
        spread_MD,
        grad_gate_NK,
        num_tokens,
        hidden,
        *hidden_ND.stride(),
        K=top_k,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=triton.next_power_of_2(top_k),
        WEIGHTED=gate_NK is not None,
    )
    return spread_MD, grad_gate_NK


def gather_sum(permuted_MD: Tensor, position_NK: Tensor, end: Tensor, *, gate_NK: Tensor | None = None) -> Tensor:
    """[N, D]: the sum of each token's rows, weighted when there are gates, in the dtype of the rows."""
    (num_tokens, top_k), hidden = position_NK.shape, permuted_MD.shape[1]
    out_ND = torch.empty(num_tokens, hidden, dtype=permuted_MD.dtype, device=permuted_MD.device)
    block_n, block_d = _blocks(hidden)
    gather_sum_kernel[(max(1, triton.cdiv(num_tokens, block_n)), triton.cdiv(hidden, block_d))](
        permuted_MD,
        position_NK,
        end,
        gate_NK,
        out_ND,
        num_tokens,
        hidden,
        *permuted_MD.stride(),
        K=top_k,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        WEIGHTED=gate_NK is not None,
    )
    return out_ND
