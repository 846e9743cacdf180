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


@pytest.fixture(autouse=True)
def addresses_stay_inside_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, every load and store of a kernel must hit a tensor that was passed to it."""
    if torch.cuda.is_available():
        return
    import numpy as np
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    spans: list[tuple[int, int]] = []
    take_arguments = GridExecutor._init_args_hst

    def take_and_note_arguments(self, arguments, options):
        taken = take_arguments(self, arguments, options)
        spans.clear()
        for argument in (*taken[0], *taken[1].values()):
            if isinstance(argument, torch.Tensor) and argument.numel():
                reach = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
                first = argument.data_ptr()
                spans.append((first, first + (reach + 1) * argument.element_size()))
        return taken

    def check(pointers, mask) -> None:
        address = pointers.data[mask.data.astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(address.shape, dtype=bool)
        for first, past in spans:
            inside |= (address >= first) & (address + np.uint64(size) <= past)
        assert inside.all(), f"{np.count_nonzero(~inside)} of {inside.size} addresses lie outside the arguments"

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", take_and_note_arguments)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
