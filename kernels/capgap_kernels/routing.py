"""Routes tokens to experts: scores, top-k choice, gates, router-loss sums and the permutation in one call."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels import reference
from capgap_kernels.dispatch import backend_of
from capgap_kernels.reference import Routing

MAX_TOP_K = 8


def route(
    router_logits_NE: Tensor,
    *,
    top_k: int = 1,
    score_function: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: bool = False,
    selection_bias_E: Tensor | None = None,
    valid_N: Tensor | None = None,
    capacity: int | None = None,
) -> Routing:
    """The `Routing` of N tokens over E experts, from router logits [N, E], without a host sync on a GPU.

    Scores are the softmax (or sigmoid) of the logits in float32 (float64 stays float64). The `top_k` best are chosen by
    score, or by score + `selection_bias_E` [E], which steers the choice and never the gate (arXiv 2408.15664); ties go
    to the lower index. `renormalize` divides a token's gates by their sum. Tokens with `valid_N` [N] False are counted
    nowhere, get gate 0, no gradient and the last permuted rows.
    With `capacity` an expert computes its first so many slots in token order; the others are dropped as in the Switch
    Transformer (arXiv 2101.03961): gate 0 and no gradient of it, while the token's other gates stay as they are.
    `Routing.dropped_per_expert_E` counts them.
    Gradients flow from `gate_NK`, `gate_sum_E` and `z_loss_sum` to the logits.

    Raises ValueError for wrong shapes, dtypes or devices, a top_k outside 1..min(E, 8) and a capacity below 1.
    """
    if router_logits_NE.ndim != 2:
        raise ValueError(f"router_logits_NE must be [tokens, experts], got shape {tuple(router_logits_NE.shape)}")
    if not router_logits_NE.is_floating_point():
        raise ValueError(f"router_logits_NE must be floating point, got {router_logits_NE.dtype}")
    num_tokens, num_experts = router_logits_NE.shape
    if not 1 <= top_k <= min(num_experts, MAX_TOP_K):
        raise ValueError(
            f"top_k={top_k} must lie in 1..{min(num_experts, MAX_TOP_K)}: router_logits_NE has {num_experts} experts, "
            f"and at most {MAX_TOP_K} may be chosen"
        )
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"score_function={score_function!r} must be 'softmax' or 'sigmoid'")
    if selection_bias_E is not None and selection_bias_E.shape != (num_experts,):
        raise ValueError(
            f"selection_bias_E must have shape ({num_experts},) for router_logits_NE {tuple(router_logits_NE.shape)}, "
            f"got {tuple(selection_bias_E.shape)}"
        )
    if valid_N is not None and valid_N.shape != (num_tokens,):
        raise ValueError(
            f"valid_N must have shape ({num_tokens},) for router_logits_NE {tuple(router_logits_NE.shape)}, "
            f"got {tuple(valid_N.shape)}"
        )
    if valid_N is not None and valid_N.dtype != torch.bool:
        raise ValueError(f"valid_N must be torch.bool, got {valid_N.dtype}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity={capacity} must be at least 1 slot per expert, or None for no limit")
    for name, tensor in (("selection_bias_E", selection_bias_E), ("valid_N", valid_N)):
        if tensor is not None and tensor.device != router_logits_NE.device:
            raise ValueError(f"{name} is on {tensor.device}, router_logits_NE on {router_logits_NE.device}")
    if selection_bias_E is not None:
        selection_bias_E = selection_bias_E.detach()
    if backend_of(router_logits_NE) == "triton":
        return Routing(
            *_TritonRoute.apply(
                router_logits_NE, selection_bias_E, valid_N, top_k, score_function == "sigmoid", renormalize, capacity
            )
        )
    return reference.route(
        router_logits_NE,
        top_k=top_k,
        score_function=score_function,
        renormalize=renormalize,
        selection_bias_E=selection_bias_E,
        valid_N=valid_N,
        capacity=capacity,
    )


class _TritonRoute(torch.autograd.Function):
    """The fields of `Routing`, of which gates, gate sums and z-loss carry a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        router_logits_NE: Tensor,
        selection_bias_E: Tensor | None,
        valid_N: Tensor | None,
        top_k: int,
        sigmoid: bool,
        renormalize: bool,
        capacity: int | None,
    ) -> tuple[Tensor, ...]:
        from capgap_kernels.routing_triton import route_forward

        fields = route_forward(
            router_logits_NE,
            selection_bias_E,
            valid_N,
            top_k=top_k,
            sigmoid=sigmoid,
            renormalize=renormalize,
            capacity=capacity,
        )
        expert_NK, _, tokens_per_expert_E, _, _, entropy_sum, slot_M, position_NK, offsets_E1 = fields
        ctx.mark_non_differentiable(expert_NK, tokens_per_expert_E, entropy_sum, slot_M, position_NK, offsets_E1)
        placement = (None, None) if capacity is None else (position_NK, offsets_E1[-1])
        ctx.save_for_backward(router_logits_NE, valid_N, expert_NK, *placement)
        ctx.sigmoid, ctx.renormalize = sigmoid, renormalize
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from capgap_kernels.routing_triton import route_backward

        router_logits_NE, valid_N, expert_NK, position_NK, end = ctx.saved_tensors
        _, grad_gate_NK, _, grad_gate_sum_E, grad_z_loss_sum, *_ = grad_outputs
        grad_logits_NE = route_backward(
            router_logits_NE,
            valid_N,
            expert_NK,
            position_NK,
            end,
            grad_gate_NK,
            grad_gate_sum_E,
            grad_z_loss_sum,
            sigmoid=ctx.sigmoid,
            renormalize=ctx.renormalize,
        )
        return grad_logits_NE, None, None, None, None, None, None
