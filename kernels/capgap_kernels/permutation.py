"""Sorts token rows by expert and brings them back: the two ends of an all-to-all in expert parallelism."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels.dispatch import backend_of
from capgap_kernels.reference import Routing


def permute(hidden_ND: Tensor, routing: Routing) -> Tensor:
    """[M, D] with M = N*K: the rows of `hidden_ND`, one per slot, sorted by expert, token order kept within an expert.

    Rows `routing.offsets_E1[-1]` and later belong to padding tokens: they are 0 and receive no gradient.
    Raises ValueError when `hidden_ND` is not [N, D] for the N of `routing`, not floating point, or elsewhere.
    """
    num_tokens = routing.gate_NK.shape[0]
    if hidden_ND.ndim != 2 or hidden_ND.shape[0] != num_tokens:
        raise ValueError(f"hidden_ND must be [{num_tokens}, D] for this routing, got shape {tuple(hidden_ND.shape)}")
    _check_rows("hidden_ND", hidden_ND, routing)
    if backend_of(hidden_ND) == "triton":
        return _TritonPermute.apply(hidden_ND, routing.position_NK, routing.offsets_E1[-1])
    return _EagerPermute.apply(hidden_ND, routing.slot_M, routing.position_NK, int(routing.offsets_E1[-1]))


def combine(permuted_MD: Tensor, routing: Routing) -> Tensor:
    """[N, D]: each token's K rows of `permuted_MD` [M, D], weighted by its gates and summed; 0 for padding tokens.

    Accumulates in float32 and returns the dtype of `permuted_MD`. Gradients flow to the rows and to the gates.
    Raises ValueError when `permuted_MD` is not [M, D] for the M of `routing`, not floating point, or elsewhere.
    """
    num_slots = routing.slot_M.shape[0]
    if permuted_MD.ndim != 2 or permuted_MD.shape[0] != num_slots:
        raise ValueError(
            f"permuted_MD must be [{num_slots}, D] for this routing of {routing.gate_NK.shape[0]} tokens to "
            f"{routing.top_k} experts each, got shape {tuple(permuted_MD.shape)}"
        )
    _check_rows("permuted_MD", permuted_MD, routing)
    if backend_of(permuted_MD) == "triton":
        return _TritonCombine.apply(permuted_MD, routing.gate_NK, routing.position_NK, routing.offsets_E1[-1])
    return _EagerCombine.apply(
        permuted_MD, routing.gate_NK, routing.slot_M, routing.position_NK, int(routing.offsets_E1[-1])
    )


def _check_rows(name: str, rows: Tensor, routing: Routing) -> None:
    if not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {rows.dtype}")
    if rows.device != routing.slot_M.device:
        raise ValueError(f"{name} is on {rows.device}, the routing on {routing.slot_M.device}")


def weighted_sum(rows_MD: Tensor, gate_NK: Tensor | None, position_NK: Tensor) -> Tensor:
    """[N, D]: each token's rows of `rows_MD`, weighted by its gates where given, in eager PyTorch.

    One pass that accumulates in float32; half-precision rows are weighted by gates rounded to their dtype.
    """
    if gate_NK is None and position_NK.shape[1] == 1:
        return rows_MD.index_select(0, position_NK[:, 0])
    gate_NK = None if gate_NK is None else gate_NK.to(rows_MD.dtype)
    return F.embedding_bag(position_NK, rows_MD, per_sample_weights=gate_NK, mode="sum")


def _spread(hidden_ND: Tensor, slot_M: Tensor, top_k: int, num_rows: int) -> Tensor:
    """[M, D]: the row of every slot's token; 0 from `num_rows` on."""
    spread_MD = hidden_ND.index_select(0, slot_M if top_k == 1 else slot_M // top_k)
    spread_MD[num_rows:] = 0
    return spread_MD


def _without_padding(rows_MD: Tensor, num_rows: int) -> Tensor:
    """The rows with 0 from `num_rows` on; the same tensor when there is no padding."""
    if num_rows == rows_MD.shape[0]:
        return rows_MD
    rows_MD = rows_MD.clone()
    rows_MD[num_rows:] = 0
    return rows_MD


class _EagerPermute(torch.autograd.Function):
    """Its own backward because autograd's would add rows one by one where a gather does."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, slot_M: Tensor, position_NK: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(position_NK)
        ctx.num_rows = num_rows
        return _spread(hidden_ND, slot_M, position_NK.shape[1], num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (position_NK,) = ctx.saved_tensors
        return weighted_sum(_without_padding(grad_outputs[0], ctx.num_rows), None, position_NK), None, None, None


class _EagerCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, permuted_MD: Tensor, gate_NK: Tensor, slot_M: Tensor, position_NK: Tensor, num_rows: int
    ) -> Tensor:
        permuted_MD = _without_padding(permuted_MD, num_rows)
        ctx.save_for_backward(permuted_MD, gate_NK, slot_M)
        ctx.num_rows = num_rows
        return weighted_sum(permuted_MD, gate_NK, position_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        permuted_MD, gate_NK, slot_M = ctx.saved_tensors
        grad_MD = _spread(grad_outputs[0], slot_M, gate_NK.shape[1], ctx.num_rows)
        grad_gate_NK = None
        if ctx.needs_input_grad[1]:
            grad_gate_M = torch.empty_like(gate_NK).flatten()
            grad_gate_M[slot_M] = (grad_MD * permuted_MD).sum(-1, dtype=gate_NK.dtype)
            grad_gate_NK = grad_gate_M.view_as(gate_NK)
        gate_M1 = gate_NK.flatten().index_select(0, slot_M)[:, None]
        return grad_MD.mul_(gate_M1.to(grad_MD.dtype)), grad_gate_NK, None, None, None


class _TritonPermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, position_NK: Tensor, end: Tensor) -> Tensor:
        from capgap_kernels.permutation_triton import spread

        ctx.save_for_backward(position_NK, end)
        return spread(hidden_ND, position_NK, end)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from capgap_kernels.permutation_triton import gather_sum

        return gather_sum(grad_outputs[0], *ctx.saved_tensors), None, None


class _TritonCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, permuted_MD: Tensor, gate_NK: Tensor, position_NK: Tensor, end: Tensor) -> Tensor:
        from capgap_kernels.permutation_triton import gather_sum

        ctx.save_for_backward(permuted_MD, gate_NK, position_NK, end)
        return gather_sum(permuted_MD, position_NK, end, gate_NK=gate_NK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from capgap_kernels.permutation_triton import spread

        permuted_MD, gate_NK, position_NK, end = ctx.saved_tensors
        grad_MD, grad_gate_NK = spread(
            grad_outputs[0], position_NK, end, gate_NK=gate_NK, permuted_MD=permuted_MD.contiguous()
        )
        return grad_MD, grad_gate_NK, None, None
