"""Distillation and router losses: pure functions of a student's and a teacher's Signals.

Each is a *sum over the valid tokens* of its micro-batch. The one division, by the valid tokens of the global batch,
stands in the training step, so that ranks, accumulation steps and padding cannot change the result.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from capgap_kernels import linear_kl
from capgap_kernels import relation_kl as relation_kl_kernel
from pipeline.config import LossConfig
from pipeline.signals import Signals


def relation_kl(student: Signals, teacher: Signals, config: LossConfig) -> Tensor:
    """KL between the self-relations of queries, keys and values. MiniLMv2, arXiv 2012.15828."""
    assert student.relations is not None and teacher.relations is not None
    return relation_kl_kernel(
        student.relations, teacher.relations, student.valid_BT, num_relation_heads=config.num_relation_heads
    )


def balance(student: Signals, teacher: Signals, config: LossConfig) -> Tensor:
    """E * sum_e(mean gate_e * token share_e), mean over routers, times the valid tokens so that it sums like the rest.

    The share is that of the global batch: a share taken per micro-batch would push every micro-batch to be balanced
    for itself, and would change with the number of ranks (arXiv 2501.11873).
    """
    parts = []
    for router in student.routers.values():
        assert router.load_share_E is not None, "the training step fills in load_share_E"
        parts.append(len(router.gate_sum_E) * (router.gate_sum_E * router.load_share_E).sum())
    return torch.stack(parts).mean()


def router_z(student: Signals, teacher: Signals, config: LossConfig) -> Tensor:
    """Squared logsumexp of the router logits, mean over routers. ST-MoE, arXiv 2202.08906."""
    return torch.stack([router.z_loss_sum for router in student.routers.values()]).mean()


def hidden_cosine(student: Signals, teacher: Signals, config: LossConfig) -> Tensor:
    """1 - cosine between the teacher's hidden states and the student's, mapped to its width; mean over the layers."""
    parts = []
    for ours_BTD, theirs_BTD in zip(student.compared_states, teacher.compared_states, strict=True):
        distance_BT = 1 - torch.nn.functional.cosine_similarity(ours_BTD.float(), theirs_BTD.float(), dim=-1)
        parts.append(distance_BT.masked_fill(~student.valid_BT, 0.0).sum())
    return torch.stack(parts).mean()


def next_token(student: Signals, teacher: Signals, config: LossConfig, weights: dict[str, float]) -> "Losses":
    """The losses over the vocabulary, in one pass over the logits: a divergence, the cross-entropy, or both."""
    assert student.hidden_states_BTD is not None and student.head_VD is not None and student.labels_BT is not None
    divergence = next((name for name in DIVERGENCES if name in weights), None)
    sums = linear_kl(
        student.hidden_states_BTD.flatten(0, 1),
        student.head_VD,
        teacher.next_token if divergence else None,
        bias_V=student.head_bias_V,
        labels_N=student.labels_BT.flatten(),
        valid_N=student.valid_BT.flatten(),
        vocab_size=student.num_ids,
        divergence=DIVERGENCES[divergence or "logit_kl"],
        beta=config.jsd_beta,
        temperature=config.temperature,
        kl_weight=weights.get(divergence, 0.0) if divergence else 0.0,
        ce_weight=weights.get("cross_entropy", 0.0),
    )
    parts = {} if divergence is None else {divergence: sums.kl_sum}
    return Losses(sums.loss_sum, parts | {"cross_entropy": sums.ce_sum})


@dataclass(frozen=True)
class Losses:
    """What is trained on, and what is logged."""

    total: Tensor
    """The weighted sum, differentiable."""
    parts: dict[str, Tensor]
    """Each loss by its name, not weighted."""


Loss = Callable[[Signals, Signals, LossConfig], Tensor]
LOSSES: dict[str, Loss] = {
    "relation_kl": relation_kl,
    "hidden_cosine": hidden_cosine,
    "balance": balance,
    "router_z": router_z,
}
ROUTER_LOSSES = ("balance", "router_z")
# At most one of these has a weight. With the cross-entropy it shares one pass over the student's logits.
DIVERGENCES: dict[str, Literal["forward_kl", "reverse_kl", "jsd"]] = {
    "logit_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jsd": "jsd",
}
NEXT_TOKEN_LOSSES = (*DIVERGENCES, "cross_entropy")


def compute_losses(weights: dict[str, float], student: Signals, teacher: Signals, config: LossConfig) -> Losses:
    """The losses named in `weights` of one micro-batch, each a sum over its valid tokens."""
    parts = {name: LOSSES[name](student, teacher, config) for name in weights if name in LOSSES}
    terms = [weights[name] * loss for name, loss in parts.items()]
    over_vocabulary = {name: weight for name, weight in weights.items() if name in NEXT_TOKEN_LOSSES}
    if over_vocabulary:
        found = next_token(student, teacher, config, over_vocabulary)
        terms.append(found.total)
        parts = found.parts | parts
    return Losses(torch.stack(terms).sum(), parts)


def needs_teacher(weights: dict[str, float]) -> bool:
    """Whether one of the losses compares with a teacher."""
    return any(name in ("relation_kl", "hidden_cosine", *DIVERGENCES) for name in weights)


def active_losses(
    config: LossConfig, *, has_routers: bool, is_decoder: bool = False, progress: float = 0.0
) -> dict[str, float]:
    """The losses of non-zero weight that the student can offer, with their weights after a part of all steps.

    What a schedule takes from the divergence, the cross-entropy gains: their sum stays.
    """
    own = ("hidden_cosine", *NEXT_TOKEN_LOSSES) if is_decoder else ("relation_kl",)
    offered = [*own, *(ROUTER_LOSSES if has_routers else [])]
    weights = {name: getattr(config, name) for name in offered}
    share = distillation_share(config, progress)
    for name in DIVERGENCES:
        if share < 1 and weights.get(name):
            weights["cross_entropy"] += weights[name] * (1 - share)
            weights[name] *= share
    return {name: weight for name, weight in weights.items() if weight}


def distillation_share(config: LossConfig, progress: float) -> float:
    """The part of the divergence's weight that is left after `progress` (0 to 1) of all steps."""
    if config.distillation_schedule == "constant" or progress < config.distillation_hold:
        return 1.0
    if config.distillation_schedule == "stop":
        return 0.0
    return max(0.0, (1 - progress) / max(1e-9, 1 - config.distillation_hold))
