"""Sorts token rows by expert and brings them back: the two ends of an all-to-all in expert parallelism."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels import reference
from capgap_kernels.dispatch import backend_of
from capgap_kernels.reference import Routing


def permute(hidden_ND: Tensor, routing: Routing) -> Tensor:
    """[M, D] with M = N*K: the rows of `hidden_ND`, one per slot, sorted by expert, token order kept within an expert.

    Rows `routing.offsets_E1[-1]` and later belong to padding tokens: they are 0 and receive no gradient.
    Raises ValueError when `hidden_ND` is not [N, D] for the N of `routing`.
    """
    num_tokens = routing.gate_NK.shape[0]
    if hidden_ND.ndim != 2 or hidden_ND.shape[0] != num_tokens:
        raise ValueError(f"hidden_ND must be [{num_tokens}, D] for this routing, got shape {tuple(hidden_ND.shape)}")
    if backend_of(hidden_ND) == "triton":
        return _TritonPermute.apply(hidden_ND, routing.position_NK, routing.offsets_E1[-1])
    return reference.permute(hidden_ND, routing)


def combine(permuted_MD: Tensor, routing: Routing) -> Tensor:
    """[N, D]: each token's K rows of `permuted_MD` [M, D], weighted by its gates and summed; 0 for padding tokens.

    Accumulates in float32 and returns the dtype of `permuted_MD`. Gradients flow to the rows and to the gates.
    Raises ValueError when `permuted_MD` is not [M, D] for the M of `routing`.
    """
    num_slots = routing.slot_M.shape[0]
    if permuted_MD.ndim != 2 or permuted_MD.shape[0] != num_slots:
        raise ValueError(
            f"permuted_MD must be [{num_slots}, D] for this routing of {routing.gate_NK.shape[0]} tokens to "
            f"{routing.top_k} experts each, got shape {tuple(permuted_MD.shape)}"
        )
    if backend_of(permuted_MD) == "triton":
        return _TritonCombine.apply(permuted_MD, routing.gate_NK, routing.position_NK, routing.offsets_E1[-1])
    return reference.combine(permuted_MD, routing)


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
