"""Which implementation a kernel call runs: Triton for CUDA tensors, eager PyTorch for the rest."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

log = logging.getLogger(__name__)

Backend = Literal["triton", "eager"]

_forced: ContextVar[Backend | None] = ContextVar("capgap_kernels_backend", default=None)
_said: set[tuple[str, Backend]] = set()


def backend_of(tensor: torch.Tensor) -> Backend:
    """The implementation for kernels whose first argument is `tensor`; said once per device type in the log.

    Triton for CUDA tensors, but eager for float64, which the Triton kernels do not compute in.
    """
    if tensor.dtype == torch.float64:
        return "eager"
    forced = _forced.get()
    if forced is not None:
        return forced
    backend: Backend = "triton" if tensor.device.type == "cuda" else "eager"
    said = (tensor.device.type, backend)
    if said not in _said:
        _said.add(said)
        log.info("capgap_kernels: %s tensors run the %s kernels; float64 always runs eager", *said)
    return backend


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Force one implementation inside the block: `use_backend("triton")` runs the Triton kernels on CPU tensors
    under TRITON_INTERPRET=1, `use_backend("eager")` compares on a GPU."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)
