"""Runs every token through the two-layer feed-forward networks of its chosen experts."""

# N tokens, D hidden, E experts, K chosen experts, F feed-forward width, V = slots of valid tokens, M = N*K slots

import functools
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels.dispatch import backend_of
from capgap_kernels.permutation import weighted_sum
from capgap_kernels.reference import Routing


def expert_mlp(
    hidden_ND: Tensor,
    routing: Routing,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    b1_EF: Tensor | None = None,
    b2_ED: Tensor | None = None,
    w3_EFD: Tensor | None = None,
    activation: Literal["gelu", "silu"] = "gelu",
) -> Tensor:
    """[N, D]: the gate-weighted sum of `w2 act(w1 x + b1) + b2` over each token's chosen experts.

    With `w3_EFD` the experts are gated, `w2 (act(w1 x + b1) * (w3 x)) + b2` (SwiGLU with activation="silu"). GELU is
    the exact one (erf). Padding tokens of `routing` give exactly 0 and get no gradient. Under autocast the products run
    in the autocast dtype; otherwise all tensors share one dtype. The result has the dtype of the products. Gradients
    flow to `hidden_ND`, `routing.gate_NK` and every weight and bias.

    Raises ValueError for shapes or devices that do not fit together, mixed dtypes and an unknown activation.
    """
    _check(hidden_ND, routing, w1_EFD, w2_EDF, b1_EF, b2_ED, w3_EFD, activation)
    device = hidden_ND.device.type
    tensors = [hidden_ND, w1_EFD, w2_EDF, b1_EF, b2_ED, w3_EFD]
    if torch.is_autocast_enabled(device) and hidden_ND.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if len(dtypes) > 1:
        given = zip(("hidden_ND", "w1_EFD", "w2_EDF", "b1_EF", "b2_ED", "w3_EFD"), tensors, strict=True)
        raise ValueError(
            "all tensors of expert_mlp must share one dtype outside autocast, got "
            + ", ".join(f"{name} {tensor.dtype}" for name, tensor in given if tensor is not None)
        )
    function = _TritonExpertMLP if backend_of(hidden_ND) == "triton" else _EagerExpertMLP
    with torch.autocast(device, enabled=False):
        return function.apply(routing.gate_NK, *tensors, routing, activation, torch.is_grad_enabled())


def _check(
    hidden_ND: Tensor,
    routing: Routing,
    w1_EFD: Tensor,
    w2_EDF: Tensor,
    b1_EF: Tensor | None,
    b2_ED: Tensor | None,
    w3_EFD: Tensor | None,
    activation: str,
) -> None:
    num_tokens, num_experts = routing.gate_NK.shape[0], routing.num_experts
    if hidden_ND.ndim != 2 or hidden_ND.shape[0] != num_tokens:
        raise ValueError(f"hidden_ND must be [{num_tokens}, D] for this routing, got shape {tuple(hidden_ND.shape)}")
    if not hidden_ND.is_floating_point():
        raise ValueError(f"hidden_ND must be floating point, got {hidden_ND.dtype}")
    hidden = hidden_ND.shape[1]
    if w1_EFD.ndim != 3 or w1_EFD.shape[0] != num_experts or w1_EFD.shape[2] != hidden:
        raise ValueError(
            f"w1_EFD must be [{num_experts}, F, {hidden}] for this routing and hidden_ND {tuple(hidden_ND.shape)}, "
            f"got shape {tuple(w1_EFD.shape)}"
        )
    width = w1_EFD.shape[1]
    expected = {
        "w2_EDF": (w2_EDF, (num_experts, hidden, width)),
        "b1_EF": (b1_EF, (num_experts, width)),
        "b2_ED": (b2_ED, (num_experts, hidden)),
        "w3_EFD": (w3_EFD, (num_experts, width, hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} for w1_EFD {tuple(w1_EFD.shape)}, got {tuple(tensor.shape)}"
            )
    for name, tensor in (("hidden_ND", hidden_ND), ("w1_EFD", w1_EFD), *((n, t) for n, (t, _) in expected.items())):
        if tensor is not None and tensor.device != routing.slot_M.device:
            raise ValueError(f"{name} is on {tensor.device}, the routing on {routing.slot_M.device}")
    if activation not in ("gelu", "silu"):
        raise ValueError(f"activation={activation!r} must be 'gelu' or 'silu'")


# Half-precision products on a CPU take up to a tenth longer when their rows are no multiple of this.
ROW_MULTIPLE = 8


class _EagerExpertMLP(torch.autograd.Function):
    """Sorted rows, one contiguous slice per expert.

    Its own backward because autograd through `w1_EFD[expert]` would add a full-size zero tensor per expert.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_NK: Tensor,
        hidden_ND: Tensor,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        b1_EF: Tensor | None,
        b2_ED: Tensor | None,
        w3_EFD: Tensor | None,
        routing: Routing,
        activation: str,
        keep_for_backward: bool,
    ) -> Tensor:
        bounds = routing.offsets_E1.tolist()
        num_rows, num_slots, hidden = bounds[-1], routing.slot_M.shape[0], hidden_ND.shape[1]
        slot_V = routing.slot_M[:num_rows]
        x_VD = hidden_ND.index_select(0, slot_V // routing.top_k)
        # Rows of padding slots stay 0, so that combining needs no mask.
        y_MD = x_VD.new_empty(num_slots, hidden)
        y_MD[num_rows:] = 0
        kept: list[Tensor | None] = []
        for expert, (start, stop) in enumerate(pairwise(bounds)):
            rows = _rows_and_some(start, stop, num_rows)
            b1_F, b2_D = (None if bias is None else bias[expert] for bias in (b1_EF, b2_ED))
            pre = _linear(x_VD[rows], w1_EFD[expert], b1_F)
            inner = _activate(pre, activation, out=None if keep_for_backward else pre)
            up = None
            if w3_EFD is not None:
                up = _linear(x_VD[rows], w3_EFD[expert], None)
                inner *= up
            y_MD[rows] = _linear(inner, w2_EDF[expert], b2_D)
            if keep_for_backward:
                kept += [pre, inner, up]
        out_ND = weighted_sum(y_MD, gate_NK, routing.position_NK)

        if keep_for_backward:
            ctx.save_for_backward(gate_NK, w1_EFD, w2_EDF, w3_EFD, x_VD, y_MD[:num_rows], slot_V, *kept)
        ctx.position_NK, ctx.bounds, ctx.activation = routing.position_NK, bounds, activation
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_ND,) = grad_outputs
        gate_NK, w1_EFD, w2_EDF, w3_EFD, x_VD, y_VD, slot_V, *kept = ctx.saved_tensors
        needs_gate, needs_hidden, needs_w1, needs_w2, needs_b1, needs_b2, needs_w3 = ctx.needs_input_grad[:7]
        num_rows, num_slots = x_VD.shape[0], gate_NK.numel()
        grad_VD = grad_ND.index_select(0, slot_V // gate_NK.shape[1])
        gate_V = gate_NK.flatten().index_select(0, slot_V)

        grad_gate_NK = None
        if needs_gate:
            grad_gate_M = gate_NK.new_zeros(num_slots)
            grad_gate_M[slot_V] = (grad_VD * y_VD).sum(-1, dtype=gate_NK.dtype)
            grad_gate_NK = grad_gate_M.view_as(gate_NK)

        grad_y_VD = grad_VD * gate_V[:, None].to(x_VD.dtype)
        grad_x_MD = x_VD.new_empty(num_slots, x_VD.shape[1])
        grad_x_MD[num_rows:] = 0
        grad_w1_EFD = torch.empty_like(w1_EFD) if needs_w1 else None
        grad_w2_EDF = torch.empty_like(w2_EDF) if needs_w2 else None
        grad_w3_EFD = torch.empty_like(w3_EFD) if needs_w3 else None
        grad_b1_EF = w1_EFD.new_empty(w1_EFD.shape[:2]) if needs_b1 else None
        grad_b2_ED = w2_EDF.new_empty(w2_EDF.shape[:2]) if needs_b2 else None
        for expert, (start, stop) in enumerate(pairwise(ctx.bounds)):
            rows, own, num_own = _rows_and_some(start, stop, num_rows), slice(start, stop), stop - start
            pre, inner, up = kept[3 * expert : 3 * expert + 3]
            grad_inner = grad_y_VD[rows] @ w2_EDF[expert]
            # A product over no rows is 0: the gradient of an expert without tokens.
            if grad_w2_EDF is not None:
                torch.mm(grad_y_VD[own].t(), inner[:num_own], out=grad_w2_EDF[expert])
            if grad_b2_ED is not None:
                torch.sum(grad_y_VD[own], 0, out=grad_b2_ED[expert])
            grad_up = None
            if up is not None:
                grad_up = grad_inner * _activate(pre, ctx.activation)
                grad_inner *= up
            grad_pre = _activation_backward(grad_inner, pre, ctx.activation)
            if grad_w1_EFD is not None:
                torch.mm(grad_pre[:num_own].t(), x_VD[own], out=grad_w1_EFD[expert])
            if grad_b1_EF is not None:
                torch.sum(grad_pre[:num_own], 0, out=grad_b1_EF[expert])
            if needs_hidden:
                torch.mm(grad_pre, w1_EFD[expert], out=grad_x_MD[rows])
            if grad_up is not None:
                if grad_w3_EFD is not None:
                    torch.mm(grad_up[:num_own].t(), x_VD[own], out=grad_w3_EFD[expert])
                if needs_hidden:
                    grad_x_MD[rows].addmm_(grad_up, w3_EFD[expert])
        grad_hidden_ND = weighted_sum(grad_x_MD, None, ctx.position_NK) if needs_hidden else None
        return (
            grad_gate_NK,
            grad_hidden_ND,
            grad_w1_EFD,
            grad_w2_EDF,
            grad_b1_EF,
            grad_b2_ED,
            grad_w3_EFD,
            None,
            None,
            None,
        )


class _TritonExpertMLP(torch.autograd.Function):
    """Keeps the hidden states and the values before the activation; everything else is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_NK: Tensor,
        hidden_ND: Tensor,
        w1_EFD: Tensor,
        w2_EDF: Tensor,
        b1_EF: Tensor | None,
        b2_ED: Tensor | None,
        w3_EFD: Tensor | None,
        routing: Routing,
        activation: str,
        keep_for_backward: bool,
    ) -> Tensor:
        from capgap_kernels.expert_mlp_triton import expert_mlp_forward

        gate_NK = gate_NK.contiguous()
        out_ND, pre_MF, up_MF = expert_mlp_forward(
            hidden_ND,
            gate_NK,
            routing.slot_M,
            routing.position_NK,
            routing.offsets_E1,
            w1_EFD,
            w2_EDF,
            b1_EF,
            b2_ED,
            w3_EFD,
            gelu=activation == "gelu",
            keep_for_backward=keep_for_backward,
        )
        if keep_for_backward:
            ctx.save_for_backward(gate_NK, hidden_ND, w1_EFD, w2_EDF, b2_ED, w3_EFD, pre_MF, up_MF)
            ctx.routing, ctx.gelu = routing, activation == "gelu"
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from capgap_kernels import expert_mlp_triton as kernels

        (grad_ND,) = grad_outputs
        gate_NK, hidden_ND, w1_EFD, w2_EDF, b2_ED, w3_EFD, pre_MF, up_MF = ctx.saved_tensors
        slot_M, position_NK, offsets_E1 = ctx.routing.slot_M, ctx.routing.position_NK, ctx.routing.offsets_E1
        needs_gate, needs_hidden, needs_w1, needs_w2, needs_b1, needs_b2, needs_w3 = ctx.needs_input_grad[:7]
        top_k = gate_NK.shape[1]
        if grad_ND.stride(1) != 1:  # an expanded or transposed gradient would be gathered element by element
            grad_ND = grad_ND.contiguous()
        grad_pre_MF, grad_up_MF, weighted_inner_MF, part_GM = kernels.gradient_before_activation(
            grad_ND, gate_NK, slot_M, offsets_E1, w2_EDF, pre_MF, up_MF, gelu=ctx.gelu
        )
        grad_gate_NK = grad_hidden_ND = grad_w1_EFD = grad_b1_EF = grad_w2_EDF = grad_b2_ED = grad_w3_EFD = None
        if needs_gate:
            grad_gate_NK = kernels.gate_gradient(
                part_GM, grad_ND, b2_ED, ctx.routing.expert_NK, position_NK, offsets_E1[-1]
            )
        if needs_w2 or needs_b2:
            grad_w2_EDF, grad_b2_ED = kernels.weight_gradient(
                grad_ND,
                weighted_inner_MF,
                slot_M,
                offsets_E1,
                top_k=top_k,
                gather_p=True,
                with_bias=needs_b2,
                gate_NK=gate_NK,
            )
        if needs_w1 or needs_b1:
            grad_w1_EFD, grad_b1_EF = kernels.weight_gradient(
                grad_pre_MF, hidden_ND, slot_M, offsets_E1, top_k=top_k, gather_q=True, with_bias=needs_b1
            )
        if needs_w3 and grad_up_MF is not None:
            grad_w3_EFD, _ = kernels.weight_gradient(
                grad_up_MF, hidden_ND, slot_M, offsets_E1, top_k=top_k, gather_q=True
            )
        if needs_hidden:
            grad_hidden_ND = kernels.hidden_gradient(
                grad_pre_MF, grad_up_MF, slot_M, position_NK, offsets_E1, w1_EFD, w3_EFD
            )
        return (
            grad_gate_NK,
            grad_hidden_ND,
            grad_w1_EFD,
            grad_w2_EDF,
            grad_b1_EF,
            grad_b2_ED,
            grad_w3_EFD,
            None,
            None,
            None,
        )


def _rows_and_some(start: int, stop: int, num_rows: int) -> slice:
    """An expert's rows, up to a multiple of ROW_MULTIPLE where more follow: these the next expert writes again."""
    return slice(start, min(num_rows, start - (start - stop) // ROW_MULTIPLE * ROW_MULTIPLE))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _adds_bias_within_product():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias.contiguous(), "none", [], "")  # ignores bias strides
    return F.linear(x, weight, bias)


@functools.cache
def _adds_bias_within_product() -> bool:
    """Whether this CPU has oneDNN's bf16 linear, what torch.compile uses: F.linear writes the bias first, as a pass of
    its own (5 % of a feed-forward)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _activate(pre: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    function = torch.ops.aten.gelu if activation == "gelu" else torch.ops.aten.silu
    return function(pre) if out is None else function.out(pre, out=out)


def _activation_backward(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """The gradient before the activation; overwrites and returns `grad`."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, pre, grad_input=grad)
    return torch.ops.aten.silu_backward.grad_input(grad, pre, grad_input=grad)
