"""Expert layers with their experts spread over ranks, on the groups and gradients of DeepSpeed's AutoEP.

AutoEP makes the process groups, keeps each rank's experts, and averages their gradients over the ranks that hold the
same ones. Its own forward knows neither biases nor padding nor GELU and would drop them without a word, so each of its
layers is turned into ours right after `deepspeed.initialize`. Parameters keep the names of the plain layers.
"""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import ACT2FN

from capgap_kernels import Routing, combine, expert_mlp, permute
from data_prep.errors import ConfigError
from pipeline.models.decoders import is_mixture
from pipeline.models.students import MiniMoEStudent, RoutedFeedForward, routed
from pipeline.signals import RouterSignals

# B rows, T tokens of a row, D hidden width, N = B*T tokens, E experts, L experts of this rank, P ranks of the group,
# K chosen experts, F width of an expert, M = permuted rows, V = rows of valid tokens, R = rows received


def autoep_settings(expert_parallel_size: int, *, is_decoder: bool) -> dict[str, Any]:
    """The `expert_parallel` section of a DeepSpeed config."""
    if is_decoder:
        pattern, tensors = r"backbone\.model\.layers\.\d+\.(mlp|block_sparse_moe)", GATED_TENSORS
    else:
        pattern, tensors = r"backbone\.layers\.\d+\.moe", ("w1", "w2", "w3")
    return {
        "enabled": True,
        "autoep_size": expert_parallel_size,
        "moe_layer_pattern": pattern,
        "router_pattern": "gate",
        "expert_pattern": "experts",
        # Three tensors of any shape, which AutoEP only cuts between experts.
        "expert_w1": tensors[0],
        "expert_w2": tensors[1],
        "expert_w3": tensors[2],
        # Read by AutoEP's own router alone, which is not used.
        "top_k": 1,
        # AutoEP's default divides a top-1 gate by itself: the router would learn nothing from the task.
        "route_norm": False,
        "use_grouped_mm": False,
    }


class LocalExperts(nn.Module):
    """The experts [L, ...] of MiniMoE that this rank holds; DeepSpeed has created the parameters."""

    w1: nn.Parameter
    w2: nn.Parameter
    w3: nn.Parameter

    def forward(self, rows_RD: Tensor, routing: Routing) -> Tensor:
        width = self.w1.shape[1]
        bias_LF, bias_LD = self.w3[:, 0, :width], self.w3[:, 0, width:]
        return expert_mlp(rows_RD, routing, self.w1, self.w2, b1_EF=bias_LF, b2_ED=bias_LD, activation="gelu")


class LocalGatedExperts(nn.Module):
    """The experts [L, ...] of a decoder that this rank holds."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def forward(self, rows_RD: Tensor, routing: Routing) -> Tensor:
        gate_LFD, up_LFD = self.gate_up_proj.chunk(2, dim=1)
        return expert_mlp(rows_RD, routing, gate_LFD, self.down_proj, w3_EFD=up_LFD, activation="silu")


class SpreadExperts(AutoEPMoELayer):
    """Sends tokens to the rank of their expert and back. Every rank of the group must call it equally often."""

    gate: nn.Module

    def run_experts(self, hidden_ND: Tensor, routing: Routing) -> Tensor:
        """[N, D]: the gate-weighted sum over each token's experts, wherever they are."""
        # [P, L]: this rank's tokens for each expert of each rank, and what each rank has for the experts here.
        sent_PL = routing.rows_per_expert_E.view(self.ep_size, self.num_local_experts)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=self.ep_group)
        # The one wait for the device: the sizes of the exchange must be known on the host.
        sizes = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        num_rows = sum(sizes[0])

        permuted_MD = permute(hidden_ND, routing)
        rows_RD = _AllToAll.apply(permuted_MD[:num_rows], sizes[0], sizes[1], self.ep_group)
        output_RD = self.experts(rows_RD, _routing_of_received(received_PL, len(rows_RD)))
        output_VD = _AllToAll.apply(output_RD, sizes[1], sizes[0], self.ep_group)
        output_MD = torch.cat([output_VD, output_VD.new_zeros(len(permuted_MD) - num_rows, output_VD.shape[1])])
        return combine(output_MD, routing)


class ExpertParallelFeedForward(SpreadExperts):
    """The expert layer of `RoutedFeedForward`, each rank holding a part of the experts."""

    router_jitter: float
    gate: nn.Linear
    selection_bias: Tensor | None

    def forward(self, hidden_BTD: Tensor, valid_BT: Tensor) -> tuple[Tensor, RouterSignals]:  # type: ignore[override]
        hidden_ND = hidden_BTD.flatten(0, 1)
        routing, signals = routed(self.gate, self.selection_bias, hidden_ND, valid_BT.flatten(), self.router_jitter)
        return self.run_experts(hidden_ND, routing).view(hidden_BTD.shape), signals


class ExpertParallelBlock(SpreadExperts):
    """A decoder's mixture of experts, each rank holding a part of the experts; the gate is transformers' own."""

    def forward(self, hidden_BTD: Tensor) -> Tensor:  # type: ignore[override]
        hidden_ND = hidden_BTD.flatten(0, -2)
        _, gate_NK, expert_NK = self.gate(hidden_ND)
        routing = _routing_of_choice(expert_NK, gate_NK, self.num_experts)
        return self.run_experts(hidden_ND, routing).view(hidden_BTD.shape)


# A decoder's experts have two tensors; the third that AutoEP asks for is empty and goes again.
GATED_TENSORS = ("gate_up_proj", "down_proj", "no_third_tensor")


def prepare_layers(student: nn.Module) -> dict[str, Any]:
    """Makes a decoder's layers readable for AutoEP, before `deepspeed.initialize`.

    Returns, by the layer's name, what AutoEP would lose: a decoder's gate, a MiniMoE layer's selection bias.

    Raises ConfigError for experts other than SwiGLU in two tensors (Mixtral, Qwen3-MoE).
    """
    if isinstance(student, MiniMoEStudent):
        return {
            name: layer.selection_bias
            for name, layer in student.named_modules()
            if isinstance(layer, RoutedFeedForward)
        }
    gates: dict[str, Any] = {}
    for name, block in student.named_modules():
        if is_mixture(block):
            experts = block.experts
            is_known = {n for n, _ in experts.named_parameters()} == set(GATED_TENSORS[:2])
            inner = getattr(experts, "act_fn", None)
            if not is_known or not isinstance(inner, nn.SiLU | type(ACT2FN["silu"])) or len(list(block.children())) > 2:
                raise ConfigError(
                    f"engine.expert_parallel_size: {type(block).__name__} is unproven - use a student with the experts "
                    "of Mixtral or Qwen3-MoE, or set it to 1"
                )
            third = torch.zeros(len(experts.gate_up_proj), 1, 1, device=experts.gate_up_proj.device)
            experts.register_parameter(GATED_TENSORS[2], nn.Parameter(third, requires_grad=False))
            gates[name] = block.gate
    return gates


def _turned_into(original: nn.Module, gate: nn.Module) -> nn.Module:
    """AutoEP's gate with the forward and the settings of the original; DeepSpeed's hooks on it stay."""
    gate.__class__ = type(original)
    settings = {name: value for name, value in vars(original).items() if not name.startswith("_")}
    vars(gate).update(settings)
    return gate


def use_our_layers(student: nn.Module, kept: dict[str, Any], router_jitter: float) -> None:
    """Turns every AutoEP layer into ours after `deepspeed.initialize`, under the parameter names of the plain one."""
    for name, layer in student.named_modules():
        if isinstance(layer, AutoEPMoELayer):
            experts = layer.experts
            if isinstance(student, MiniMoEStudent):
                layer.__class__ = ExpertParallelFeedForward
                layer.router_jitter = router_jitter
                layer.gate = layer.router.gate
                layer.register_buffer("selection_bias", kept[name])
                experts.__class__ = LocalExperts
            else:
                layer.__class__ = ExpertParallelBlock
                layer.gate = _turned_into(kept[name], layer.router.gate)
                experts.__class__ = LocalGatedExperts
                experts.gate_up_proj, experts.down_proj = experts.w1, experts.w2
                del experts.w1, experts.w2, experts.w3
            del layer.router
        assert name not in kept or isinstance(layer, SpreadExperts), f"AutoEP has missed {name}"


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
    """Rows come by source rank and, within one, by expert. Their gates, 1 here, are applied where they came from."""
    num_sources, num_local = counts_PL.shape
    expert_PL = torch.arange(num_local, device=counts_PL.device).expand(num_sources, num_local)
    expert_R = expert_PL.flatten().repeat_interleave(counts_PL.flatten(), output_size=num_rows)
    gate_R1 = torch.ones(num_rows, 1, device=counts_PL.device)
    return _routing_of_choice(expert_R.unsqueeze(1), gate_R1, num_local)


def _routing_of_choice(expert_NK: Tensor, gate_NK: Tensor, num_experts: int) -> Routing:
    """The routing of a choice that is made already; nothing of it is for router losses."""
    slot_M = expert_NK.flatten().argsort(stable=True)
    position_M = torch.empty_like(slot_M)
    position_M[slot_M] = torch.arange(len(slot_M), device=slot_M.device)
    tokens_per_expert_E = torch.bincount(expert_NK.flatten(), minlength=num_experts)
    nothing = torch.zeros((), device=slot_M.device)
    return Routing(
        expert_NK=expert_NK,
        gate_NK=gate_NK.float(),
        tokens_per_expert_E=tokens_per_expert_E,
        gate_sum_E=nothing,
        z_loss_sum=nothing,
        entropy_sum=nothing,
        slot_M=slot_M,
        position_NK=position_M.view(expert_NK.shape),
        offsets_E1=nn.functional.pad(tokens_per_expert_E.cumsum(0), (1, 0)),
    )
