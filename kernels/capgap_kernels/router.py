"""Router logits in float32 from hidden states of any precision, without a copy of these in float32."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels import reference
from capgap_kernels.dispatch import backend_of

# N tokens, D hidden, E experts

# A Triton program multiplies on the scalar units, expert by expert: for more experts a matrix product is faster.
MAX_FUSED_EXPERTS = 8


def router_logits(hidden_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """[N, E] in float32 (float64 kept): `hidden_ND @ weight_ED.T + bias_E`, multiplied and summed in float32.

    A router in bf16 sends close calls to the wrong expert, so autocast does not touch this. Tensors may differ in
    dtype; gradients have that of their tensor.

    Raises ValueError for shapes or devices that do not fit together and for dtypes that are not floating point.
    """
    if hidden_ND.ndim != 2:
        raise ValueError(f"hidden_ND must be [tokens, hidden], got shape {tuple(hidden_ND.shape)}")
    hidden = hidden_ND.shape[1]
    if weight_ED.ndim != 2 or weight_ED.shape[1] != hidden:
        raise ValueError(
            f"weight_ED must be [experts, {hidden}] for hidden_ND {tuple(hidden_ND.shape)}, got shape "
            f"{tuple(weight_ED.shape)}"
        )
    if bias_E is not None and bias_E.shape != weight_ED.shape[:1]:
        raise ValueError(
            f"bias_E must have shape ({len(weight_ED)},) for weight_ED {tuple(weight_ED.shape)}, got "
            f"{tuple(bias_E.shape)}"
        )
    for name, tensor in (("hidden_ND", hidden_ND), ("weight_ED", weight_ED), ("bias_E", bias_E)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_ND on {hidden_ND.device}")
    with torch.autocast(hidden_ND.device.type, enabled=False):
        if backend_of(hidden_ND) == "triton" and len(weight_ED) <= MAX_FUSED_EXPERTS:
            return _TritonRouterLogits.apply(hidden_ND, weight_ED, bias_E)
        return reference.router_logits(hidden_ND, weight_ED, bias_E)


class _TritonRouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        from capgap_kernels.router_triton import router_forward

        ctx.save_for_backward(hidden_ND, weight_ED)
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        return router_forward(hidden_ND, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from capgap_kernels.router_triton import router_backward

        hidden_ND, weight_ED = ctx.saved_tensors
        grad_logits_NE = grad_outputs[0].contiguous()
        grad_hidden_ND, grad_weight_ED = router_backward(grad_logits_NE, hidden_ND, weight_ED)
        grad_bias_E = grad_logits_NE.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden_ND, grad_weight_ED, grad_bias_E
