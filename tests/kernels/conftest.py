"""Kernel tests run Triton on the GPU where there is one, elsewhere under Triton's interpreter; fresh memory is NaN."""

from collections.abc import Iterator

import pytest
import torch

from capgap_kernels.interpreter import prepare_interpreter

# Before the test modules import anything that imports triton.
if not torch.cuda.is_available():
    prepare_interpreter()


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN (the largest integer for integers), so that reading what nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
