"""Sorts token rows by expert and brings them back: the two ends of an all-to-all in expert parallelism."""

from torch import Tensor

from capgap_kernels import reference
from capgap_kernels.reference import Routing


def permute(hidden_ND: Tensor, routing: Routing) -> Tensor:
    """[M, D] with M = N*K: the rows of `hidden_ND`, one per slot, sorted by expert, token order kept within an expert.

    Rows `routing.offsets_E1[-1]` and later belong to padding tokens: they are 0 and receive no gradient.
    Raises ValueError when `hidden_ND` is not [N, D] for the N of `routing`.
    """
    num_tokens = routing.gate_NK.shape[0]
    if hidden_ND.ndim != 2 or hidden_ND.shape[0] != num_tokens:
        raise ValueError(f"hidden_ND must be [{num_tokens}, D] for this routing, got shape {tuple(hidden_ND.shape)}")
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
    return reference.combine(permuted_MD, routing)
