"""Triton kernels of `router_logits`: a row of hidden states is read once in its own precision, forward and backward."""

# N tokens, D hidden, E experts (few), P programs along the tokens

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret

# Sixteen threads load a row's 128 columns, 16 bytes each in half precision: 32 numbers per thread of 4 warps forward,
# half of that backward, where a thread also holds the gradient and the sums.
BLOCK_N, BACKWARD_BLOCK_N, BLOCK_D = 32, 16, 128
# Programs of the backward along the tokens times columns: four waves over an H200's 132 multiprocessors.
WANTED_PROGRAMS = 4 if INTERPRETED else 528


@triton.jit
def router_forward_kernel(
    hidden_ptr,  # [N, D]
    weight_ptr,  # [E, D] contiguous
    bias_ptr,  # [E] contiguous or unused
    logits_ptr,  # out [N, E] float32
    N,
    D,
    stride_n,
    stride_d,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert_E = tl.arange(0, BLOCK_E)
    inside_N = token_N < N
    logits_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if HAS_BIAS:
        logits_NE += tl.load(bias_ptr + expert_E, mask=expert_E < E, other=0.0).to(tl.float32)[None, :]
    for start in range(0, D, BLOCK_D):
        column_D = start + tl.arange(0, BLOCK_D).to(tl.int64)
        hidden_ND = tl.load(
            hidden_ptr + token_N[:, None] * stride_n + column_D[None, :] * stride_d,
            mask=inside_N[:, None] & (column_D < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        for expert in tl.static_range(E):
            weight_D = tl.load(weight_ptr + expert * D + column_D, mask=column_D < D, other=0.0).to(tl.float32)
            dot_N = tl.sum(hidden_ND * weight_D[None, :], 1)
            logits_NE += tl.where(expert_E[None, :] == expert, dot_N[:, None], 0.0)
    tl.store(
        logits_ptr + token_N[:, None] * E + expert_E[None, :],
        logits_NE,
        mask=inside_N[:, None] & (expert_E < E)[None, :],
    )


@triton.jit
def router_backward_kernel(
    grad_logits_ptr,  # [N, E] contiguous
    hidden_ptr,  # [N, D]
    weight_ptr,  # [E, D] contiguous
    grad_hidden_ptr,  # out [N, D] contiguous
    part_ptr,  # out [P, E, D] float32: the weight's gradient from every P-th block of tokens
    N,
    D,
    stride_n,
    stride_d,
    E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    column_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    inside_D = column_D < D
    expert_E = tl.arange(0, BLOCK_E)
    sum_ED = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for first in range(tl.program_id(0) * BLOCK_N, N, tl.num_programs(0) * BLOCK_N):
        token_N = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside_N = token_N < N
        inside_ND = inside_N[:, None] & inside_D[None, :]
        hidden_ND = tl.load(
            hidden_ptr + token_N[:, None] * stride_n + column_D[None, :] * stride_d, mask=inside_ND, other=0.0
        ).to(tl.float32)
        grad_hidden_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for expert in tl.static_range(E):
            grad_N = tl.load(grad_logits_ptr + token_N * E + expert, mask=inside_N, other=0.0).to(tl.float32)
            weight_D = tl.load(weight_ptr + expert * D + column_D, mask=inside_D, other=0.0).to(tl.float32)
            grad_hidden_ND += grad_N[:, None] * weight_D[None, :]
            sum_D = tl.sum(grad_N[:, None] * hidden_ND, 0)
            sum_ED += tl.where(expert_E[:, None] == expert, sum_D[None, :], 0.0)
        tl.store(
            grad_hidden_ptr + token_N[:, None] * D + column_D[None, :],
            grad_hidden_ND.to(grad_hidden_ptr.dtype.element_ty),
            mask=inside_ND,
        )
    row_E = tl.program_id(0).to(tl.int64) * E + expert_E
    tl.store(
        part_ptr + row_E[:, None] * D + column_D[None, :], sum_ED, mask=(expert_E < E)[:, None] & inside_D[None, :]
    )


def router_forward(hidden_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """[N, E] float32."""
    (num_tokens, hidden), num_experts = hidden_ND.shape, len(weight_ED)
    logits_NE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=hidden_ND.device)
    router_forward_kernel[(max(1, triton.cdiv(num_tokens, BLOCK_N)),)](
        hidden_ND,
        weight_ED.contiguous(),
        bias_E if bias_E is None else bias_E.contiguous(),
        logits_NE,
        num_tokens,
        hidden,
        *hidden_ND.stride(),
        E=num_experts,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        BLOCK_E=triton.next_power_of_2(num_experts),
        HAS_BIAS=bias_E is not None,
    )
    return logits_NE


def router_backward(grad_logits_NE: Tensor, hidden_ND: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of the hidden states [N, D], of the weight [E, D]), each in the dtype of its tensor."""
    (num_tokens, hidden), num_experts, device = hidden_ND.shape, len(weight_ED), hidden_ND.device
    column_blocks = triton.cdiv(hidden, BLOCK_D)
    programs = max(1, min(triton.cdiv(num_tokens, BACKWARD_BLOCK_N), WANTED_PROGRAMS // column_blocks))
    grad_hidden_ND = torch.empty(num_tokens, hidden, dtype=hidden_ND.dtype, device=device)
    part_PED = torch.empty(programs, num_experts, hidden, dtype=torch.float32, device=device)
    router_backward_kernel[(programs, column_blocks)](
        grad_logits_NE,
        hidden_ND,
        weight_ED.contiguous(),
        grad_hidden_ND,
        part_PED,
        num_tokens,
        hidden,
        *hidden_ND.stride(),
        E=num_experts,
        BLOCK_N=BACKWARD_BLOCK_N,
        BLOCK_D=BLOCK_D,
        BLOCK_E=triton.next_power_of_2(num_experts),
    )
    # Parts are summed in a fixed order: no atomics.
    return grad_hidden_ND, part_PED.sum(0).to(weight_ED.dtype)
