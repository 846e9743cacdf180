"""The plain twin of every kernel: these lines are the definition that the tests hold the fast paths to.

Shape legend: N tokens, D hidden, E experts, K chosen experts per token, M = N*K slots, F expert feed-forward width,
B batch, T tokens of a row.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from capgap_kernels.teacher_signals import (
    DistillationSums,
    Teacher,
    TeacherHead,
    TeacherLogits,
    TeacherSamples,
    TeacherTopK,
)

# Keeps a renormalised gate finite when every chosen sigmoid has underflowed.
RENORMALIZE_FLOOR = 1e-20
# Of an outcome without probability: 1e-30, so that p log p and p / q stay numbers.
LOWEST_LOG_PROBABILITY = math.log(1e-30)


@dataclass(frozen=True)
class Routing:
    """Where every token goes, with what weight, and the sums that router losses need.

    A *slot* is one choice of one token, flat index `token * K + choice`. Slots sorted by expert (token order kept
    within an expert) give the *permuted* order; behind them come the slots that an expert's capacity drops, also by
    expert, and those of padding tokens.
    """

    expert_NK: Tensor  # int64, best first; meaningless for padding tokens (but in range)
    gate_NK: Tensor  # float32 (float64 for float64 logits), differentiable; 0 for padding tokens and dropped slots
    tokens_per_expert_E: Tensor  # int64, slots of valid tokens that chose it, the dropped ones included
    gate_sum_E: Tensor  # differentiable: sum over valid tokens of the full score (softmax or sigmoid)
    z_loss_sum: Tensor  # differentiable scalar: sum over valid tokens of logsumexp(logits)^2
    entropy_sum: Tensor  # scalar without gradient: sum over valid tokens of the entropy of the scores, in nats
    slot_M: Tensor  # int64: permuted position -> slot
    position_NK: Tensor  # int64: slot -> permuted position, the inverse of slot_M
    offsets_E1: Tensor  # int64 [E+1]: rows offsets[e]:offsets[e+1] of the permuted order belong to expert e

    @property
    def top_k(self) -> int:
        return self.gate_NK.shape[1]

    @property
    def num_experts(self) -> int:
        return self.tokens_per_expert_E.shape[0]

    @property
    def placed_NK(self) -> Tensor:
        """True for the slots that an expert computes, False for those of padding tokens and the dropped ones."""
        return self.position_NK < self.offsets_E1[-1]

    @property
    def rows_per_expert_E(self) -> Tensor:
        """int64: slots that each expert computes."""
        return self.offsets_E1.diff()

    @property
    def dropped_per_expert_E(self) -> Tensor:
        """int64: slots of valid tokens over each expert's capacity."""
        return self.tokens_per_expert_E - self.rows_per_expert_E


def router_logits(hidden_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """[N, E]: the linear map to the experts in float32 (float64 for float64 hidden states)."""
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    return F.linear(hidden_ND.to(dtype), weight_ED.to(dtype), None if bias_E is None else bias_E.to(dtype))


def route(
    router_logits_NE: Tensor,
    *,
    top_k: int = 1,
    score_function: str = "softmax",
    renormalize: bool = False,
    selection_bias_E: Tensor | None = None,
    valid_N: Tensor | None = None,
    capacity: int | None = None,
) -> Routing:
    """Routing of every token to its `top_k` experts; ties go to the lower expert index, and an expert with more than
    `capacity` slots keeps the first ones."""
    num_tokens, num_experts = router_logits_NE.shape
    logits_NE = router_logits_NE if router_logits_NE.dtype == torch.float64 else router_logits_NE.float()
    padding_N1 = torch.zeros_like(logits_NE[:, :1], dtype=torch.bool) if valid_N is None else ~valid_N.bool()[:, None]
    logits_NE = logits_NE.masked_fill(padding_N1, 0.0)  # first, so that garbage in padding rows reaches nothing
    scores_NE = logits_NE.softmax(-1) if score_function == "softmax" else logits_NE.sigmoid()
    # Both score functions are monotone: without a bias the logits choose, so that saturated scores do not tie.
    selection_NE = logits_NE if selection_bias_E is None else scores_NE + selection_bias_E.to(scores_NE.dtype)
    if top_k == 1:
        expert_NK = selection_NE.detach().argmax(-1, keepdim=True)
    else:
        expert_NK = selection_NE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    gate_NK = scores_NE.gather(1, expert_NK)
    if renormalize:
        gate_NK = gate_NK / (gate_NK.sum(-1, keepdim=True) + RENORMALIZE_FLOOR)

    key_M = expert_NK.masked_fill(padding_N1, num_experts).flatten()
    slot_M, position_M = sorted_slots(key_M)
    tokens_per_expert_E = torch.bincount(key_M, minlength=num_experts + 1)[:num_experts]
    rows_per_expert_E = tokens_per_expert_E
    if capacity is not None:
        rows_per_expert_E = tokens_per_expert_E.clamp_max(capacity)
        first_of_group = F.pad(tokens_per_expert_E.cumsum(0), (1, 0))
        dropped_M = (position_M - first_of_group[key_M] >= capacity) & (key_M < num_experts)
        gate_NK = gate_NK.masked_fill(dropped_M.view_as(gate_NK), 0.0)
        key_M = torch.where(dropped_M, num_experts + key_M, key_M).masked_fill(key_M == num_experts, 2 * num_experts)
        slot_M, position_M = sorted_slots(key_M)
    z_loss_N = logits_NE.logsumexp(-1).square()
    share_NE = (scores_NE / scores_NE.sum(-1, keepdim=True)).detach()
    entropy_N = torch.special.entr(share_NE).sum(-1)
    return Routing(
        expert_NK=expert_NK,
        gate_NK=gate_NK.masked_fill(padding_N1, 0.0),
        tokens_per_expert_E=tokens_per_expert_E,
        gate_sum_E=scores_NE.masked_fill(padding_N1, 0.0).sum(0),
        z_loss_sum=z_loss_N.masked_fill(padding_N1[:, 0], 0.0).sum(),
        entropy_sum=entropy_N.masked_fill(padding_N1[:, 0], 0.0).sum(),
        slot_M=slot_M,
        position_NK=position_M.view(num_tokens, top_k),
        offsets_E1=F.pad(rows_per_expert_E.cumsum(0), (1, 0)),
    )


def sorted_slots(key_M: Tensor) -> tuple[Tensor, Tensor]:
    """(slot of each position, position of each slot) when slots are sorted by key, equal keys in their order."""
    slot_M = key_M.argsort(stable=True)
    position_M = torch.empty_like(slot_M)
    position_M[slot_M] = torch.arange(slot_M.numel(), device=slot_M.device)
    return slot_M, position_M


def permute(hidden_ND: Tensor, routing: Routing) -> Tensor:
    """[M, D]: the row of every slot's token, sorted by expert; rows past `offsets_E1[-1]` (dropped, padding) are 0."""
    permuted_MD = hidden_ND[routing.slot_M // routing.top_k]
    past_end_M = torch.arange(len(permuted_MD), device=permuted_MD.device) >= routing.offsets_E1[-1]
    return permuted_MD.masked_fill(past_end_M[:, None], 0.0)


def combine(permuted_MD: Tensor, routing: Routing) -> Tensor:
    """[N, D]: the gate-weighted sum of each token's placed rows; 0 for padding tokens."""
    rows_NKD = permuted_MD[routing.position_NK].masked_fill(~routing.placed_NK[..., None], 0.0)
    gate_NK = routing.gate_NK.masked_fill(~routing.placed_NK, 0.0)
    return (rows_NKD * gate_NK[..., None]).sum(1).to(permuted_MD.dtype)


def expert_mlp(
    hidden_ND: Tensor,
    routing: Routing,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    b1_EF: Tensor | None = None,
    b2_ED: Tensor | None = None,
    w3_EFD: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """[N, D]: every expert computes every token here; the gates of the chosen ones weight the sum."""
    act = F.gelu if activation == "gelu" else F.silu
    placed_NK = routing.placed_NK
    hidden_ND = hidden_ND.masked_fill(~placed_NK.any(1, keepdim=True), 0.0)
    out_ND = torch.zeros_like(hidden_ND, dtype=torch.promote_types(hidden_ND.dtype, routing.gate_NK.dtype))
    for expert in range(routing.num_experts):
        inner_NF = act(F.linear(hidden_ND, w1_EFD[expert], None if b1_EF is None else b1_EF[expert]))
        if w3_EFD is not None:
            inner_NF = inner_NF * F.linear(hidden_ND, w3_EFD[expert])
        expert_out_ND = F.linear(inner_NF, w2_EDF[expert], None if b2_ED is None else b2_ED[expert])
        chosen_NK = (routing.expert_NK == expert) & placed_NK
        gate_N = routing.gate_NK.masked_fill(~chosen_NK, 0.0).sum(1)
        out_ND = out_ND + gate_N[:, None] * expert_out_ND
    return out_ND.to(hidden_ND.dtype)


# ---- relation_kl: B batch, T tokens of a row, H relation heads, D width of one side ----


def relation_kl(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    valid_BT: Tensor,
    *,
    num_relation_heads: int = 32,
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) between self-relations, mean over the three and over heads."""

    def log_relation_BHTT(projected_BTD: Tensor) -> Tensor:
        width = projected_BTD.shape[-1] // num_relation_heads
        dtype = torch.float64 if projected_BTD.dtype == torch.float64 else torch.float32
        heads_BHTW = projected_BTD.to(dtype).unflatten(-1, (num_relation_heads, width)).transpose(1, 2)
        scores_BHTT = heads_BHTW @ heads_BHTW.transpose(-1, -2) * width**-0.5
        # The lowest finite number and not -inf: a row without any valid key must stay a number.
        return scores_BHTT.masked_fill(~valid_BT[:, None, None, :], torch.finfo(dtype).min).log_softmax(-1)

    sums = []
    for of_student_BTD, of_teacher_BTD in zip(student, teacher, strict=True):
        log_q, log_p = log_relation_BHTT(of_student_BTD), log_relation_BHTT(of_teacher_BTD.detach())
        kl_BT = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
        sums.append(kl_BT.masked_fill(~valid_BT, 0.0).sum())
    return torch.stack(sums).mean()


# ---- linear_kl: N tokens, D hidden, V vocabulary, K kept ids per token ----


def linear_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher | None,
    *,
    bias_V: Tensor | None = None,
    labels_N: Tensor | None = None,
    valid_N: Tensor | None = None,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> DistillationSums:
    """Sums over valid tokens of the divergence from the teacher and of the cross-entropy with the labels."""
    real = slice(vocab_size)
    wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32

    def logits_of(hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        return F.linear(hidden_ND.to(wide), head_VD[real].to(wide), None if bias_V is None else bias_V[real].to(wide))

    valid_N = torch.ones(len(hidden_ND), dtype=torch.bool, device=hidden_ND.device) if valid_N is None else valid_N
    logits_NV = logits_of(hidden_ND.masked_fill(~valid_N[:, None], 0.0), head_VD, bias_V)
    kl_N = torch.zeros_like(logits_NV[:, 0])
    ce_N = torch.zeros_like(logits_NV[:, 0])
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    with torch.no_grad():
        if isinstance(teacher, TeacherHead):
            log_p_NV = logits_of(teacher.hidden_ND, teacher.head_VD, teacher.bias_V).div(temperature).log_softmax(-1)
        elif isinstance(teacher, TeacherLogits):
            log_p_NV = teacher.logits_NV[:, real].to(wide).div(temperature).log_softmax(-1)
    if isinstance(teacher, TeacherSamples):
        kl_N = -(teacher.weights_NK.to(wide) * log_q_NV.gather(1, teacher.ids_NK.long())).sum(-1)
        if teacher.entropy_N is not None:
            kl_N = kl_N - teacher.entropy_N.to(wide)
    elif teacher is not None:
        if isinstance(teacher, TeacherTopK):
            # K ids and the outcome "any other id", whose mass on the student's side is summed and not 1 - the rest.
            log_p_NV = with_tail(teacher, log_q_NV.shape[1], wide)
            others_NV = log_q_NV.scatter(1, teacher.ids_NK.long(), -torch.inf)
            log_rest_N1 = others_NV.exp().sum(-1, keepdim=True).clamp_min(math.exp(LOWEST_LOG_PROBABILITY)).log()
            log_q_NV = torch.cat([log_q_NV.gather(1, teacher.ids_NK.long()), log_rest_N1], dim=1)
        if divergence == "forward_kl":
            kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        elif divergence == "reverse_kl":
            kl_N = (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)
        else:  # "jsd": beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, arXiv 2306.13649
            log_m_NV = torch.logaddexp(log_p_NV + math.log(beta), log_q_NV + math.log1p(-beta))
            kl_N = beta * (log_p_NV.exp() * (log_p_NV - log_m_NV)).sum(-1)
            kl_N = kl_N + (1 - beta) * (log_q_NV.exp() * (log_q_NV - log_m_NV)).sum(-1)
    if labels_N is not None:
        ce_N = F.cross_entropy(logits_NV, labels_N.long().clamp_min(0), reduction="none").masked_fill(labels_N < 0, 0.0)
    kl_sum, ce_sum = (part_N.masked_fill(~valid_N, 0.0).sum() for part_N in (kl_N, ce_N))
    return DistillationSums(kl_weight * kl_sum + ce_weight * ce_sum, kl_sum.detach(), ce_sum.detach())


def with_tail(teacher: TeacherTopK, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """[N, K+1]: log-probabilities of the kept ids and of "any other id", normalised (a cache may have rounded them)."""
    log_probs_NK = teacher.log_probs_NK.to(dtype)
    if log_probs_NK.shape[1] == vocab_size:
        log_tail_N = torch.full_like(log_probs_NK[:, 0], LOWEST_LOG_PROBABILITY)
    elif teacher.log_tail_N is None:
        log_tail_N = (1 - log_probs_NK.exp().sum(-1)).clamp_min(math.exp(LOWEST_LOG_PROBABILITY)).log()
    else:
        log_tail_N = teacher.log_tail_N.to(dtype)
    return torch.cat([log_probs_NK, log_tail_N[:, None]], 1).clamp_min(LOWEST_LOG_PROBABILITY).log_softmax(-1)
