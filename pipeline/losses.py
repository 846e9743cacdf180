"""Distillation and router losses: pure functions of a student's and a teacher's Signals.

Each is a *sum over the valid tokens* of its micro-batch. The one division, by the valid tokens of the global batch,
stands in the training step, so that ranks, accumulation steps and padding cannot change the result.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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


Loss = Callable[[Signals, Signals, LossConfig], Tensor]
LOSSES: dict[str, Loss] = {"relation_kl": relation_kl, "balance": balance, "router_z": router_z}
ROUTER_LOSSES = ("balance", "router_z")


def active_losses(config: LossConfig, *, has_routers: bool) -> dict[str, float]:
    """The losses of non-zero weight that the student can offer, with their weights."""
    weights = {name: getattr(config, name) for name in LOSSES}
    return {name: w for name, w in weights.items() if w and (has_routers or name not in ROUTER_LOSSES)}
