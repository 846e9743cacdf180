"""Awkward shapes and the comparison that the mixture-of-experts kernel tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes of one test, and which experts its tokens want (None: any)."""

    num_tokens: int
    num_experts: int
    top_k: int
    hidden: int = 8
    width: int = 12
    wanted: tuple[int, ...] | None = None
    padding: bool = False
    capacity: int | None = None


CASES = {
    "one token": Case(1, 4, 1),
    "a prime of everything": Case(37, 3, 1, hidden=23, width=37),
    "with padding": Case(37, 4, 1, padding=True),
    "k experts and padding": Case(23, 5, 3, hidden=17, width=19, padding=True),
    "experts without tokens": Case(33, 6, 1, wanted=(1, 4)),
    "all tokens on one expert": Case(35, 4, 1, wanted=(2,)),
    "one expert": Case(19, 1, 1),
    "every expert": Case(13, 4, 4),
    "more slots than a block": Case(70, 4, 2, hidden=33, width=35),
    "only padding": Case(5, 3, 1, wanted=(), padding=True),
    "a capacity that drops some": Case(53, 4, 1, padding=True, capacity=9),
    "k experts over their capacity": Case(150, 5, 3, hidden=17, width=19, padding=True, capacity=50),
}


def draw_logits(case: Case, *, seed: int = 0) -> Tensor:
    """Float64 router logits [N, E] in which only the wanted experts win."""
    generator = torch.Generator().manual_seed(seed)
    logits_NE = 2 * torch.rand(case.num_tokens, case.num_experts, generator=generator, dtype=torch.float64)
    if case.wanted:
        unwanted = [expert for expert in range(case.num_experts) if expert not in case.wanted]
        logits_NE[:, unwanted] -= 3
    return logits_NE


def draw_valid(case: Case) -> Tensor | None:
    """Every third token is padding; with wanted=() all are."""
    if not case.padding:
        return None
    valid_N = torch.arange(case.num_tokens) % 3 != 1
    return torch.zeros_like(valid_N) if case.wanted == () else valid_N


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_close(actual: Tensor | None, expected: Tensor | None, *, relative: float, what: str) -> None:
    """Frobenius error relative to the expected norm; exact zero must be exact."""
    assert actual is not None and expected is not None, f"{what}: {actual} instead of {expected}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, scale = (actual - expected).norm().item(), expected.norm().item()
    assert error <= relative * scale, f"{what}: error {error:.2e}, {relative:.0e} of {scale:.2e} allowed"
