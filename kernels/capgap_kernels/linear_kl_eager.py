"""What `linear_kl` does to a chunk of logits, in PyTorch: a few rows at a time, so that they stay in the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from capgap_kernels.linear_kl import Mix

# n tokens of a chunk, R real ids, B outcomes (R ids, or K kept ids and "any other")

# Elements of a block of rows: 1 MB in float32, three such blocks fit a cache of a few MB.
BLOCK_ELEMENTS = 2**18


def divergence(log_p_nB: Tensor, log_q_nB: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """The divergence [n, 1] and its gradient [n, B] by the student's logits (by their log, for a sum of outcomes)."""
    p_nB, q_nB = log_p_nB.exp(), log_q_nB.exp()
    if mix.divergence == "forward_kl":
        return (p_nB * (log_p_nB - log_q_nB)).sum(1, keepdim=True), q_nB - p_nB
    if mix.divergence == "reverse_kl":
        ratio_nB = log_q_nB - log_p_nB
        kl_n1 = (q_nB * ratio_nB).sum(1, keepdim=True)
        return kl_n1, q_nB * (ratio_nB - kl_n1)
    log_m_nB = torch.logaddexp(log_p_nB + math.log(mix.beta), log_q_nB + math.log1p(-mix.beta))
    ratio_nB = log_q_nB - log_m_nB
    to_middle_n1 = (q_nB * ratio_nB).sum(1, keepdim=True)
    jsd_n1 = mix.beta * (p_nB * (log_p_nB - log_m_nB)).sum(1, keepdim=True) + (1 - mix.beta) * to_middle_n1
    return jsd_n1, (1 - mix.beta) * q_nB * (ratio_nB - to_middle_n1)


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
    total = torch.zeros(2, dtype=torch.float64, device=logits_nR.device)
    wide = torch.float64 if logits_nR.dtype == torch.float64 else torch.float32
    for rows in _blocks(logits_nR):
        logits_bR, teacher_bR = logits_nR[rows].to(wide), teacher_logits_nR[rows].to(wide)
        scaled_bR, teacher_bR = _divided(logits_bR, mix.temperature), _divided(teacher_bR, mix.temperature)
        valid_b1 = None if valid_n is None else valid_n[rows, None]
        if mix.divergence == "forward_kl":
            q_bR, p_bR = scaled_bR.softmax(1), teacher_bR.softmax(1)
            # The largest logit minus the log of its probability is the row's lse: cheaper than two log_softmax.
            lse_b1 = scaled_bR.amax(1, keepdim=True) - q_bR.amax(1, keepdim=True).log()
            teacher_lse_b1 = teacher_bR.amax(1, keepdim=True) - p_bR.amax(1, keepdim=True).log()
            kl_b1 = torch.linalg.vecdot(p_bR, teacher_bR - scaled_bR)[:, None] + lse_b1 - teacher_lse_b1
        else:
            log_q_bR = scaled_bR.log_softmax(1)
            lse_b1 = scaled_bR[:, :1] - log_q_bR[:, :1]
            kl_b1, by_logit_bR = divergence(teacher_bR.log_softmax(1), log_q_bR, mix)
            q_bR = log_q_bR.exp_()
        total[0] += (kl_b1 if valid_b1 is None else kl_b1 * valid_b1).sum()
        ce_scale_b1, labels_b1 = None, None
        if labels_n is not None:
            labels_b1 = labels_n[rows, None].clamp_min(0)
            if mix.temperature != 1:
                lse_b1 = logits_bR.logsumexp(1, keepdim=True)
            has_label_b1 = labels_n[rows, None] >= 0
            total[1] += ((lse_b1 - logits_bR.gather(1, labels_b1)) * has_label_b1).sum()
            if mix.ce_weight:
                ce_scale_b1 = has_label_b1 * mix.ce_weight
        if not with_gradient:
            continue
        kl_scale = mix.kl_weight / mix.temperature
        if mix.divergence == "forward_kl":
            if ce_scale_b1 is None and kl_scale == 1:
                by_logit_bR = torch.sub(q_bR, p_bR, out=p_bR)
            else:
                by_logit_bR = torch.sub(q_bR, p_bR, out=p_bR).mul_(kl_scale)
        elif kl_scale != 1:
            by_logit_bR *= kl_scale
        if valid_b1 is not None:
            by_logit_bR *= valid_b1
        if ce_scale_b1 is not None and labels_b1 is not None:
            ce_q_bR = q_bR if mix.temperature == 1 else torch.sub(logits_bR, lse_b1, out=q_bR).exp_()
            by_logit_bR.addcmul_(ce_q_bR, ce_scale_b1.to(wide))
            by_logit_bR.scatter_add_(1, labels_b1, -ce_scale_b1.to(wide))
        logits_nR[rows] = by_logit_bR
    return total


def row_logsumexp(logits_nR: Tensor, temperature: float) -> Tensor:
    """[n], float32 or wider: log of the sum over the row of exp(logit / temperature)."""
    wide = torch.float64 if logits_nR.dtype == torch.float64 else torch.float32
    return torch.cat([_divided(logits_nR[rows].to(wide), temperature).logsumexp(1) for rows in _blocks(logits_nR)])


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
    for rows in _blocks(logits_nR):
        logits_bR = logits_nR[rows].to(shift_n.dtype)
        written_bR = _divided(logits_bR, temperature).sub(shift_n[rows, None]).exp_().mul_(weight_n[rows, None])
        if ce_shift_n is not None and ce_weight_n is not None:
            written_bR.addcmul_((logits_bR - ce_shift_n[rows, None]).exp_(), ce_weight_n[rows, None])
        logits_nR[rows] = written_bR


def _blocks(logits_nR: Tensor) -> Iterator[slice]:
    num_tokens, num_ids = logits_nR.shape
    size = max(1, BLOCK_ELEMENTS // num_ids)
    return (slice(first, first + size) for first in range(0, num_tokens, size))


def _divided(logits_bR: Tensor, temperature: float) -> Tensor:
    return logits_bR if temperature == 1 else logits_bR / temperature
