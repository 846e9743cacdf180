"""Other projects' mixture-of-experts layers behind one signature, for the benchmarks to run on the same tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

# N tokens, D hidden, E experts, K chosen, F feed-forward width, M = N*K


@dataclass(frozen=True)
class Experts:
    """Weights of one layer; `w3_EFD` given means gated (SwiGLU, no biases), else GELU with biases."""

    w1_EFD: Tensor
    w2_EDF: Tensor
    b1_EF: Tensor | None
    b2_ED: Tensor | None
    w3_EFD: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.w1_EFD, self.w2_EDF, self.b1_EF, self.b2_ED, self.w3_EFD) if leaf is not None]


# (hidden_ND, expert_NK, gate_NK, experts) -> [N, D]
Peer = Callable[[Tensor, Tensor, Tensor, Experts], Tensor]


def plain_loop(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """A Python loop over the experts, as in the predecessors and in transformers' eager experts."""
    out_ND = torch.zeros_like(hidden_ND)
    for expert in range(len(experts.w1_EFD)):
        token, choice = (expert_NK == expert).nonzero(as_tuple=True)
        inner = F.linear(
            hidden_ND[token], experts.w1_EFD[expert], None if experts.b1_EF is None else experts.b1_EF[expert]
        )
        inner = (
            F.gelu(inner)
            if experts.w3_EFD is None
            else F.silu(inner) * F.linear(hidden_ND[token], experts.w3_EFD[expert])
        )
        y = F.linear(inner, experts.w2_EDF[expert], None if experts.b2_ED is None else experts.b2_ED[expert])
        out_ND = out_ND.index_add(0, token, (y * gate_NK[token, choice, None]).to(out_ND.dtype))
    return out_ND


def torch_grouped_mm(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """torch's own grouped GEMM between a sort and its inverse."""
    top_k = expert_NK.shape[1]
    sorted_M, slot_M = expert_NK.flatten().sort(stable=True)
    offsets = torch.searchsorted(sorted_M, torch.arange(len(experts.w1_EFD), device=sorted_M.device), right=True).int()
    x_MD = hidden_ND[slot_M // top_k]
    inner_MF = torch._grouped_mm(x_MD, experts.w1_EFD.mT, offs=offsets)
    if experts.b1_EF is not None:
        inner_MF = inner_MF + experts.b1_EF[sorted_M]
    if experts.w3_EFD is None:
        inner_MF = F.gelu(inner_MF)
    else:
        inner_MF = F.silu(inner_MF) * torch._grouped_mm(x_MD, experts.w3_EFD.mT, offs=offsets)
    y_MD = torch._grouped_mm(inner_MF, experts.w2_EDF.mT, offs=offsets)
    if experts.b2_ED is not None:
        y_MD = y_MD + experts.b2_ED[sorted_M]
    weighted_MD = torch.empty_like(y_MD).index_copy(0, slot_M, (y_MD * gate_NK.flatten()[slot_M, None]).to(y_MD.dtype))
    return weighted_MD.view(*expert_NK.shape, -1).sum(1)


def transformers_grouped_mm(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """`transformers.integrations.moe.grouped_mm_experts_forward`, the default experts of transformers 5."""
    forward = importlib.import_module("transformers.integrations.moe").grouped_mm_experts_forward
    layer = SimpleNamespace(
        num_experts=len(experts.w1_EFD),
        has_gate=experts.w3_EFD is not None,
        has_bias=experts.b1_EF is not None,
        has_post_expert_norm=False,
        is_transposed=False,
        _is_expert_parallel=False,
        up_proj=experts.w1_EFD,
        up_proj_bias=experts.b1_EF,
        down_proj=experts.w2_EDF,
        down_proj_bias=experts.b2_ED,
        act_fn=F.gelu,
        _apply_gate=lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    )
    if experts.w3_EFD is not None:
        layer.gate_up_proj = _gate_and_up(experts)
    return forward(layer, hidden_ND, expert_NK, gate_NK)


def deepspeed_experts(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """DeepSpeed's AutoEP layer on one rank (`deepspeed/moe/ep_experts.py`): argsort, grouped_mm, weighted restore."""
    run = importlib.import_module("deepspeed.moe.ep_experts")._run_experts_grouped_mm
    return _deepspeed(run, hidden_ND, expert_NK, gate_NK, experts)


def deepspeed_triton_experts(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """The same with DeepSpeed's own grouped GEMM (`deepspeed/ops/triton_ops/group_gemm_triton.py`)."""
    run = importlib.import_module("deepspeed.moe.ep_experts")._run_experts_triton_grouped_mm
    return _deepspeed(run, hidden_ND, expert_NK, gate_NK, experts)


def _deepspeed(
    run: Callable[..., Tensor], hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts
) -> Tensor:
    count = importlib.import_module("deepspeed.moe.ep_count").count_tokens_per_expert
    slot_M = torch.argsort(expert_NK.view(-1), stable=True)
    counts_E = count(expert_NK, len(experts.w1_EFD))
    y_MD = run(experts.w1_EFD, experts.w2_EDF, experts.w3_EFD, hidden_ND[slot_M // expert_NK.shape[1]], counts_E)
    return deepspeed_restore(y_MD, gate_NK, slot_M)


def liger_experts(hidden_ND: Tensor, expert_NK: Tensor, gate_NK: Tensor, experts: Experts) -> Tensor:
    """`LigerFusedMoEFunction` of liger-kernel."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    return function.apply(hidden_ND, _gate_and_up(experts), experts.w2_EDF, expert_NK.int(), gate_NK)


def deepspeed_route_permute_combine(
    logits_NE: Tensor, hidden_ND: Tensor, top_k: int, experts_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """DeepSpeed 0.19's eager path: TokenChoiceTopKRouter's scoring, argsort, gather, weighted restore."""
    scores_NE = F.softmax(logits_NE.float(), dim=1)
    _, expert_NK = torch.topk(scores_NE, k=top_k, dim=-1, sorted=False)
    gate_NK = scores_NE.gather(1, expert_NK)
    importlib.import_module("deepspeed.moe.ep_count").count_tokens_per_expert(expert_NK, logits_NE.shape[1])
    slot_M = torch.argsort(expert_NK.view(-1), stable=True)
    return deepspeed_restore(experts_of(hidden_ND[slot_M // top_k]), gate_NK, slot_M)


def deepspeed_restore(y_MD: Tensor, gate_NK: Tensor, slot_M: Tensor) -> Tensor:
    """`combine_from_routed` of deepspeed/module_inject/auto_ep_layer.py with its default settings."""
    combine = importlib.import_module("deepspeed.module_inject.auto_ep_layer").combine_from_routed
    num_tokens, top_k = gate_NK.shape
    shape = (1, num_tokens, y_MD.shape[1])
    return combine(y_MD, gate_NK, slot_M, top_k, score_apply="post", combine_impl="weighted_sum", shape=shape)[0]


def expert_peers(*, gated: bool) -> tuple[dict[str, Peer], dict[str, str]]:
    """(peers that can run here, why the others cannot)."""
    wanted: dict[str, tuple[Peer, str]] = {
        "plain loop": (plain_loop, "torch"),
        "torch._grouped_mm": (torch_grouped_mm, "torch"),
        "transformers grouped_mm": (transformers_grouped_mm, "transformers.integrations.moe"),
        "deepspeed grouped_mm": (deepspeed_experts, "deepspeed.moe.ep_experts"),
        "deepspeed triton": (deepspeed_triton_experts, "deepspeed.ops.triton_ops.group_gemm_triton"),
        "liger": (liger_experts, "liger_kernel.ops.fused_moe"),
    }
    found: dict[str, Peer] = {}
    missing: dict[str, str] = {}
    for name, (peer, module) in wanted.items():
        if name in ("deepspeed grouped_mm", "deepspeed triton", "liger") and not gated:
            missing[name] = "has gated experts without biases only"
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a package that is there but breaks must not end the benchmark either
            missing[name] = f"not importable: {type(error).__name__}: {error}"
        else:
            found[name] = peer
    return found, missing


def _gate_and_up(experts: Experts) -> Tensor:
    """[E, 2F, D]: transformers and Liger keep both in one tensor, which is what they are timed with."""
    assert experts.w3_EFD is not None
    if not hasattr(experts.w1_EFD, "gate_and_up"):
        both = torch.cat([experts.w1_EFD.detach(), experts.w3_EFD.detach()], 1)
        experts.w1_EFD.gate_and_up = both.requires_grad_(experts.w1_EFD.requires_grad)  # type: ignore[attr-defined]
    return experts.w1_EFD.gate_and_up  # type: ignore[attr-defined, no-any-return]
