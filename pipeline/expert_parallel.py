"""MiniMoE's expert layer with its experts spread over ranks, on the groups and gradients of DeepSpeed's AutoEP.

AutoEP makes the process groups, keeps each rank's experts, and averages their gradients over the ranks that hold the
same ones. Its own forward knows neither biases nor padding nor GELU and would drop them without a word, so each of its
layers is turned into ours right after `deepspeed.initialize`.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from capgap_kernels import Routing, combine, expert_mlp, permute
from pipeline.models.students import RoutedFeedForward, routed
from pipeline.signals import RouterSignals

# B rows, T tokens of a row, D hidden width, N = B*T tokens, E experts, L experts of this rank, P ranks of the group,
# M = permuted rows, V = rows of valid tokens, R = rows received


def autoep_settings(expert_parallel_size: int) -> dict[str, Any]:
    """The `expert_parallel` section of a DeepSpeed config for a MiniMoE student."""
    return {
        "enabled": True,
        "autoep_size": expert_parallel_size,
        "moe_layer_pattern": r"backbone\.layers\.\d+\.moe",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        # Three tensors of any shape; w3 holds the packed biases.
        "expert_w1": "w1",
        "expert_w2": "w2",
        "expert_w3": "w3",
        "top_k": 1,
        # AutoEP's default divides a top-1 gate by itself: the router would learn nothing from the task.
        "route_norm": False,
        "use_grouped_mm": False,
    }


class LocalExperts(nn.Module):
    """The experts [L, ...] that this rank holds; DeepSpeed has created the parameters."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def forward(self, rows_RD: Tensor, counts_PL: Tensor) -> Tensor:
        """[R, D] through the experts; rows come by source rank and, within one, by expert."""
        width = self.w1.shape[1]
        bias_LF, bias_LD = self.w3[:, 0, :width], self.w3[:, 0, width:]
        routing = _routing_of_received(counts_PL, len(rows_RD))
        return expert_mlp(rows_RD, routing, self.w1, self.w2, b1_EF=bias_LF, b2_ED=bias_LD, activation="gelu")


class ExpertParallelFeedForward(AutoEPMoELayer):
    """The expert layer of `RoutedFeedForward` with the same parameter names, each rank holding a part of the experts.

    Tokens travel to the rank of their expert and back. Every rank of the group must call it equally often.
    """

    router_jitter: float
    gate: nn.Linear

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor) -> tuple[Tensor, RouterSignals]:  # type: ignore[override]
        hidden_ND = hidden_BTD.flatten(0, 1)
        routing, signals = routed(self.gate, hidden_ND, valid_BT.flatten(), self.router_jitter)
        # [P, L]: this rank's tokens for each expert of each rank, and what each rank has for the experts here.
        sent_PL = routing.tokens_per_expert_E.view(self.ep_size, self.num_local_experts)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self.ep_group)
        # The one wait for the device: the sizes of the exchange must be known on the host.
        sizes = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        num_rows = sum(sizes[0])

        permuted_MD = permute(hidden_ND, routing)
        rows_RD = _AllToAll.apply(permuted_MD[:num_rows], sizes[0], sizes[1], self.ep_group)
        output_RD = self.experts(rows_RD, received_PL)
        output_VD = _AllToAll.apply(output_RD, sizes[1], sizes[0], self.ep_group)
        output_MD = torch.cat([output_VD, output_VD.new_zeros(len(permuted_MD) - num_rows, output_VD.shape[1])])
        return combine(output_MD, routing).view(hidden_BTD.shape), signals


def use_our_layers(student: nn.Module, router_jitter: float) -> None:
    """Turns every AutoEP layer into an `ExpertParallelFeedForward` under the parameter names of the plain layer."""
    for layer in student.modules():
        if isinstance(layer, AutoEPMoELayer):
            layer.__class__ = ExpertParallelFeedForward
            layer.router_jitter = router_jitter
            layer.gate = layer.router.gate
            del layer.router
            layer.experts.__class__ = LocalExperts
        assert not isinstance(layer, RoutedFeedForward), "AutoEP has missed an expert layer"


class _AllToAll(torch.autograd.Function):
    """Sends consecutive runs of rows to the ranks of a group and receives theirs; the backward goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows_VD: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows_VD, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grad_outputs[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows_VD: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    output_RD = rows_VD.new_empty(sum(received), rows_VD.shape[1])
    dist.all_to_all_single(output_RD, rows_VD.contiguous(), received, sent, group=group)
    return output_RD


def _routing_of_received(counts_PL: Tensor, num_rows: int) -> Routing:
    """Each received row goes to one local expert with gate 1: its own gate is applied where it came from."""
    num_sources, num_local = counts_PL.shape
    device = counts_PL.device
    expert_PL = torch.arange(num_local, device=device).expand(num_sources, num_local)
    expert_R = expert_PL.flatten().repeat_interleave(counts_PL.flatten(), output_size=num_rows)
    slot_R = expert_R.argsort(stable=True)
    position_R = torch.empty_like(slot_R)
    position_R[slot_R] = torch.arange(num_rows, device=device)
    tokens_per_expert_L = counts_PL.sum(0)
    nothing = torch.zeros((), device=device)
    return Routing(
        expert_NK=expert_R.unsqueeze(1),
        gate_NK=torch.ones(num_rows, 1, device=device),
        tokens_per_expert_E=tokens_per_expert_L,
        gate_sum_E=nothing,
        z_loss_sum=nothing,
        entropy_sum=nothing,
        slot_M=slot_R,
        position_NK=position_R.unsqueeze(1),
        offsets_E1=nn.functional.pad(tokens_per_expert_L.cumsum(0), (1, 0)),
    )
