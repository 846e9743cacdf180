"""Triton kernels of `route`: scores and top-k, a stable counting sort, and their backward; three launches, no sync."""

# N tokens, E experts, K choices per token, M = N*K slots, B blocks of BLOCK_N tokens. Padding slots count as expert E.
# Permuted order: kept slots by expert, then those over the capacity by expert, then padding.

import torch
import triton
import triton.language as tl
from torch import Tensor

from capgap_kernels.reference import RENORMALIZE_FLOOR

# Slots that one program sorts: it compares each with each, so 128 are 16384 comparisons, 128 per thread of 4 warps.
SLOTS_PER_BLOCK = 128
LARGEST = tl.constexpr(3.4028234663852886e38)
FLOOR = tl.constexpr(RENORMALIZE_FLOOR)


@triton.jit
def _load_logits(
    logits_ptr,  # [N, E]
    valid_ptr,  # [N] or unused
    token_N,
    expert_E,
    N,
    stride_n,
    stride_e,
    E: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """The logits in float32 (0 in padding rows, -inf past E) and which rows are valid tokens."""
    valid_N = token_N < N
    if HAS_VALID:
        valid_N &= tl.load(valid_ptr + token_N, mask=valid_N, other=0) != 0
    real_NE = valid_N[:, None] & (expert_E < E)[None, :]
    address_NE = token_N[:, None] * stride_n + expert_E.to(tl.int64)[None, :] * stride_e
    logits_NE = tl.load(logits_ptr + address_NE, mask=real_NE, other=0.0).to(tl.float32)
    return tl.where((expert_E < E)[None, :], logits_NE, float("-inf")), valid_N


@triton.jit
def _scores(logits_NE, expert_E, E: tl.constexpr, SIGMOID: tl.constexpr):
    """(scores, softmax, logsumexp) of the logits; scores are 0 past E."""
    top_N = tl.max(logits_NE, 1)
    exp_NE = tl.exp(logits_NE - top_N[:, None])
    sum_N = tl.sum(exp_NE, 1)
    softmax_NE = exp_NE / sum_N[:, None]
    scores_NE = softmax_NE
    if SIGMOID:
        # exp(-x) of a very negative x is inf, and 1 / inf is the 0 that it should be.
        scores_NE = tl.where((expert_E < E)[None, :], 1.0 / (1.0 + tl.exp(-logits_NE)), 0.0)
    return scores_NE, softmax_NE, top_N + tl.log(sum_N)


@triton.jit
def route_scores_kernel(
    logits_ptr,  # [N, E]
    bias_ptr,  # [E] or unused
    valid_ptr,  # [N] or unused
    expert_ptr,  # out [N, K]
    gate_ptr,  # out [N, K]
    count_ptr,  # out [E + 1, B]: slots of each block per expert
    gate_sum_ptr,  # out [E, B]
    z_loss_ptr,  # out [B]
    entropy_ptr,  # out [B]
    N,
    B,
    stride_n,
    stride_e,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    block = tl.program_id(0)
    token_N = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert_E = tl.arange(0, BLOCK_E)
    choice_K = tl.arange(0, BLOCK_K)
    logits_NE, valid_N = _load_logits(logits_ptr, valid_ptr, token_N, expert_E, N, stride_n, stride_e, E, HAS_VALID)
    scores_NE, _, lse_N = _scores(logits_NE, expert_E, E, SIGMOID)

    selection_NE = logits_NE
    if HAS_BIAS:
        bias_E = tl.load(bias_ptr + expert_E, mask=expert_E < E, other=0.0).to(tl.float32)
        selection_NE = scores_NE + bias_E[None, :]
    # Experts with a logit of -inf or NaN stay above those already taken and those past E, so that no choice repeats.
    selection_NE = tl.where(selection_NE > -LARGEST, selection_NE, -LARGEST)
    selection_NE = tl.where((expert_E < E)[None, :], selection_NE, float("-inf"))
    gate_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    chosen_NK = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    for choice in tl.static_range(K):
        best_N = tl.argmax(selection_NE, 1, tie_break_left=True)
        taken_NE = expert_E[None, :] == best_N[:, None]
        score_N = tl.sum(tl.where(taken_NE, scores_NE, 0.0), 1)
        gate_NK = tl.where(choice_K[None, :] == choice, score_N[:, None], gate_NK)
        chosen_NK = tl.where(choice_K[None, :] == choice, best_N[:, None], chosen_NK)
        count_E += tl.sum((taken_NE & valid_N[:, None]).to(tl.int32), 0)
        selection_NE = tl.where(taken_NE, float("-inf"), selection_NE)
    if RENORMALIZE:
        gate_NK = gate_NK / (tl.sum(gate_NK, 1) + FLOOR)[:, None]
    gate_NK = tl.where(valid_N[:, None], gate_NK, 0.0)

    slot_NK = token_N[:, None] * K + choice_K[None, :]
    stored_NK = (token_N < N)[:, None] & (choice_K < K)[None, :]
    tl.store(gate_ptr + slot_NK, gate_NK, mask=stored_NK)
    tl.store(expert_ptr + slot_NK, chosen_NK.to(tl.int64), mask=stored_NK)

    address_E = expert_E.to(tl.int64) * B + block
    tl.store(count_ptr + address_E, count_E, mask=expert_E < E)
    num_padding = tl.sum(((token_N < N) & (valid_N == 0)).to(tl.int32), 0)
    tl.store(count_ptr + tl.full([], E, tl.int64) * B + block, num_padding * K)
    gate_sum_E = tl.sum(tl.where(valid_N[:, None], scores_NE, 0.0), 0)
    tl.store(gate_sum_ptr + address_E, gate_sum_E, mask=expert_E < E)
    tl.store(z_loss_ptr + block, tl.sum(tl.where(valid_N, lse_N * lse_N, 0.0), 0))
    share_NE = scores_NE / tl.sum(scores_NE, 1)[:, None]
    entropy_N = -tl.sum(tl.where(share_NE > 0, share_NE * tl.log(tl.where(share_NE > 0, share_NE, 1.0)), 0.0), 1)
    tl.store(entropy_ptr + block, tl.sum(tl.where(valid_N, entropy_N, 0.0), 0))


@triton.jit
def route_scan_kernel(
    count_ptr,  # [E + 1, B]: slots of each block per expert
    before_ptr,  # out [E + 1, B]: slots of the blocks before it (not in place: warps may hold copies of one count)
    total_ptr,  # out [E + 1]
    gate_sum_ptr,  # [E, B]
    z_loss_ptr,  # [B]
    entropy_ptr,  # [B]
    gate_total_ptr,  # out [E]
    z_loss_total_ptr,  # out []
    entropy_total_ptr,  # out []
    B,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program per expert (and one for padding) walks over the blocks."""
    expert = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.int32)
    sum_B = tl.zeros([BLOCK_B], tl.float32)
    entropy_B = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        block_B = start + tl.arange(0, BLOCK_B)
        inside_B = block_B < B
        count_B = tl.load(count_ptr + expert * B + block_B, mask=inside_B, other=0)
        tl.store(before_ptr + expert * B + block_B, total + tl.cumsum(count_B, 0) - count_B, mask=inside_B)
        total += tl.sum(count_B, 0)
        if expert < E:
            sum_B += tl.load(gate_sum_ptr + expert * B + block_B, mask=inside_B, other=0.0)
        else:
            sum_B += tl.load(z_loss_ptr + block_B, mask=inside_B, other=0.0)
            entropy_B += tl.load(entropy_ptr + block_B, mask=inside_B, other=0.0)
    tl.store(total_ptr + expert, total)
    if expert < E:
        tl.store(gate_total_ptr + expert, tl.sum(sum_B, 0))
    else:
        tl.store(z_loss_total_ptr, tl.sum(sum_B, 0))
        tl.store(entropy_total_ptr, tl.sum(entropy_B, 0))


@triton.jit
def route_place_kernel(
    expert_ptr,  # [N, K]
    valid_ptr,  # [N] or unused
    before_ptr,  # [E + 1, B]
    total_ptr,  # [E + 1]
    gate_ptr,  # in and out [N, K]: dropped slots get 0
    slot_ptr,  # out [M]
    position_ptr,  # out [N, K]
    tokens_per_expert_ptr,  # out [E]
    offsets_ptr,  # out [E + 1]
    N,
    B,
    capacity,  # at least as many as there are slots where there is none
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E1: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_VALID: tl.constexpr,
):
    """A slot's position: kept slots of lower experts, slots of its expert in earlier blocks, and earlier in its block;
    past the capacity the same among the dropped ones."""
    block = tl.program_id(0).to(tl.int64)
    index_S = tl.arange(0, BLOCK_N * BLOCK_K)  # slots of this block in order
    token_S = block * BLOCK_N + index_S // BLOCK_K
    choice_S = index_S % BLOCK_K
    inside_S = (token_S < N) & (choice_S < K)
    slot_S = token_S * K + choice_S
    key_S = tl.load(expert_ptr + slot_S, mask=inside_S, other=E).to(tl.int32)
    if HAS_VALID:
        key_S = tl.where(tl.load(valid_ptr + token_S, mask=inside_S, other=0) != 0, key_S, E)
    earlier_SS = (index_S[None, :] < index_S[:, None]) & inside_S[None, :]
    rank_S = tl.sum((earlier_SS & (key_S[:, None] == key_S[None, :])).to(tl.int32), 1)

    expert_E = tl.arange(0, BLOCK_E1)
    total_E = tl.load(total_ptr + expert_E, mask=expert_E <= E, other=0)
    kept_E = tl.where(expert_E < E, tl.minimum(total_E, capacity), 0)
    dropped_E = tl.where(expert_E < E, total_E - kept_E, 0)
    start_E = tl.cumsum(kept_E, 0) - kept_E  # of expert E, padding: where the last expert stops
    after_E = tl.cumsum(dropped_E, 0) - dropped_E + tl.sum(kept_E, 0)
    before_S = tl.load(before_ptr + key_S.to(tl.int64) * B + block, mask=inside_S, other=0)
    rank_S += before_S
    over_S = (rank_S >= capacity) & (key_S < E)
    behind_S = tl.gather(after_E, key_S, 0) + rank_S - tl.where(key_S < E, capacity, 0)
    position_S = tl.where(over_S | (key_S == E), behind_S, tl.gather(start_E, key_S, 0) + rank_S).to(tl.int64)
    tl.store(position_ptr + slot_S, position_S, mask=inside_S)
    tl.store(slot_ptr + position_S, slot_S, mask=inside_S)
    tl.store(gate_ptr + slot_S, tl.zeros_like(position_S).to(tl.float32), mask=inside_S & over_S)
    if block == 0:
        tl.store(tokens_per_expert_ptr + expert_E, total_E.to(tl.int64), mask=expert_E < E)
        tl.store(offsets_ptr + expert_E, start_E.to(tl.int64), mask=expert_E <= E)


@triton.jit
def _load_grad_gate(grad_gate_ptr, position_ptr, end_ptr, slot_N, inside_N, HAS_CAPACITY: tl.constexpr):
    """The upstream gradient of one choice's gates; 0 for dropped slots, whose gates are constants."""
    if HAS_CAPACITY:
        inside_N &= tl.load(position_ptr + slot_N, mask=inside_N, other=0) < tl.load(end_ptr)
    return tl.load(grad_gate_ptr + slot_N, mask=inside_N, other=0.0).to(tl.float32)


@triton.jit
def route_backward_kernel(
    logits_ptr,  # [N, E]
    valid_ptr,  # [N] or unused
    expert_ptr,  # [N, K]
    position_ptr,  # [N, K] or unused
    end_ptr,  # []: offsets[E], or unused
    grad_gate_ptr,  # [N, K]
    grad_gate_sum_ptr,  # [E]
    grad_z_loss_ptr,  # []
    grad_logits_ptr,  # out [N, E]
    N,
    stride_n,
    stride_e,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_CAPACITY: tl.constexpr,
):
    token_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert_E = tl.arange(0, BLOCK_E)
    inside_N = token_N < N
    logits_NE, valid_N = _load_logits(logits_ptr, valid_ptr, token_N, expert_E, N, stride_n, stride_e, E, HAS_VALID)
    scores_NE, softmax_NE, lse_N = _scores(logits_NE, expert_E, E, SIGMOID)

    grad_scores_NE = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    sum_N = tl.full([BLOCK_N], FLOOR, tl.float32)
    dot_N = tl.zeros([BLOCK_N], tl.float32)
    if RENORMALIZE:
        for choice in tl.static_range(K):
            chosen_N = tl.load(expert_ptr + token_N * K + choice, mask=inside_N, other=0).to(tl.int32)
            grad_N = _load_grad_gate(grad_gate_ptr, position_ptr, end_ptr, token_N * K + choice, inside_N, HAS_CAPACITY)
            score_N = tl.sum(tl.where(expert_E[None, :] == chosen_N[:, None], scores_NE, 0.0), 1)
            sum_N += score_N
            dot_N += grad_N * score_N
        dot_N = dot_N / sum_N
    for choice in tl.static_range(K):
        chosen_N = tl.load(expert_ptr + token_N * K + choice, mask=inside_N, other=0).to(tl.int32)
        grad_N = _load_grad_gate(grad_gate_ptr, position_ptr, end_ptr, token_N * K + choice, inside_N, HAS_CAPACITY)
        if RENORMALIZE:
            grad_N = (grad_N - dot_N) / sum_N
        grad_scores_NE += tl.where(expert_E[None, :] == chosen_N[:, None], grad_N[:, None], 0.0)
    grad_gate_sum_E = tl.load(grad_gate_sum_ptr + expert_E, mask=expert_E < E, other=0.0).to(tl.float32)
    grad_scores_NE += grad_gate_sum_E[None, :]
    if SIGMOID:
        grad_logits_NE = grad_scores_NE * scores_NE * (1.0 - scores_NE)
    else:
        grad_logits_NE = scores_NE * (grad_scores_NE - tl.sum(scores_NE * grad_scores_NE, 1)[:, None])
    grad_z_loss = tl.load(grad_z_loss_ptr).to(tl.float32)
    grad_logits_NE += 2.0 * grad_z_loss * lse_N[:, None] * softmax_NE
    grad_logits_NE = tl.where(valid_N[:, None], grad_logits_NE, 0.0)
    tl.store(
        grad_logits_ptr + token_N[:, None] * E + expert_E[None, :],
        grad_logits_NE.to(grad_logits_ptr.dtype.element_ty),
        mask=inside_N[:, None] & (expert_E < E)[None, :],
    )


def _tokens_per_block(top_k: int) -> int:
    return max(1, SLOTS_PER_BLOCK // triton.next_power_of_2(top_k))


def route_forward(
    logits_NE: Tensor,
    bias_E: Tensor | None,
    valid_N: Tensor | None,
    *,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
    capacity: int | None,
) -> tuple[Tensor, ...]:
    """The fields of `Routing`, in their order."""
    (num_tokens, num_experts), device = logits_NE.shape, logits_NE.device
    block_n, block_k = _tokens_per_block(top_k), triton.next_power_of_2(top_k)
    num_blocks = max(1, triton.cdiv(num_tokens, block_n))
    num_slots = num_tokens * top_k

    expert_NK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    gate_NK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    count_EB = torch.empty(num_experts + 1, num_blocks, dtype=torch.int32, device=device)
    partial = torch.empty(num_experts + 2, num_blocks, dtype=torch.float32, device=device)
    route_scores_kernel[(num_blocks,)](
        logits_NE,
        bias_E,
        valid_N,
        expert_NK,
        gate_NK,
        count_EB,
        partial,
        partial[num_experts],
        partial[num_experts + 1],
        num_tokens,
        num_blocks,
        *logits_NE.stride(),
        E=num_experts,
        K=top_k,
        BLOCK_N=block_n,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=block_k,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        HAS_BIAS=bias_E is not None,
        HAS_VALID=valid_N is not None,
    )

    before_EB = torch.empty_like(count_EB)
    total_E = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    gate_sum_E = torch.empty(num_experts, dtype=torch.float32, device=device)
    z_loss_sum = torch.empty((), dtype=torch.float32, device=device)
    entropy_sum = torch.empty((), dtype=torch.float32, device=device)
    route_scan_kernel[(num_experts + 1,)](
        count_EB,
        before_EB,
        total_E,
        partial,
        partial[num_experts],
        partial[num_experts + 1],
        gate_sum_E,
        z_loss_sum,
        entropy_sum,
        num_blocks,
        E=num_experts,
        BLOCK_B=min(1024, triton.next_power_of_2(num_blocks)),
    )

    slot_M = torch.empty(num_slots, dtype=torch.int64, device=device)
    position_NK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    tokens_per_expert_E = torch.empty(num_experts, dtype=torch.int64, device=device)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int64, device=device)
    route_place_kernel[(num_blocks,)](
        expert_NK,
        valid_N,
        before_EB,
        total_E,
        gate_NK,
        slot_M,
        position_NK,
        tokens_per_expert_E,
        offsets_E1,
        num_tokens,
        num_blocks,
        num_slots if capacity is None else min(capacity, num_slots),
        E=num_experts,
        K=top_k,
        BLOCK_N=block_n,
        BLOCK_E1=triton.next_power_of_2(num_experts + 1),
        BLOCK_K=block_k,
        HAS_VALID=valid_N is not None,
    )
    return (
        expert_NK, gate_NK, tokens_per_expert_E, gate_sum_E, z_loss_sum, entropy_sum, slot_M, position_NK, offsets_E1,
    )  # fmt: skip


def route_backward(
    logits_NE: Tensor,
    valid_N: Tensor | None,
    expert_NK: Tensor,
    position_NK: Tensor | None,
    end: Tensor | None,
    grad_gate_NK: Tensor,
    grad_gate_sum_E: Tensor,
    grad_z_loss_sum: Tensor,
    *,
    sigmoid: bool,
    renormalize: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype; `position_NK` and `end` where a capacity drops slots."""
    (num_tokens, num_experts), top_k = logits_NE.shape, expert_NK.shape[1]
    grad_logits_NE = torch.empty(num_tokens, num_experts, dtype=logits_NE.dtype, device=logits_NE.device)
    block_e = triton.next_power_of_2(num_experts)
    block_n = max(1, min(128, 1024 // block_e))
    route_backward_kernel[(max(1, triton.cdiv(num_tokens, block_n)),)](
        logits_NE,
        valid_N,
        expert_NK,
        position_NK,
        end,
        grad_gate_NK.contiguous(),
        grad_gate_sum_E.contiguous(),
        grad_z_loss_sum,
        grad_logits_NE,
        num_tokens,
        *logits_NE.stride(),
        E=num_experts,
        K=top_k,
        BLOCK_N=block_n,
        BLOCK_E=block_e,
        SIGMOID=sigmoid,
        RENORMALIZE=renormalize,
        HAS_VALID=valid_N is not None,
        HAS_CAPACITY=position_NK is not None,
    )
    return grad_logits_NE
