"""Losses are sums over valid tokens, so that no cut of the global batch can change them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import LossConfig
from pipeline.losses import LOSSES, ROUTER_LOSSES, active_losses, balance, relation_kl, router_z
from pipeline.signals import RouterSignals, Signals

# B rows, T tokens of a row, D width, E experts


def relations(rows: int, length: int, width: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, rows, length, width, generator=generator, dtype=torch.float64)
    return query, key, value


VALID_BT = torch.arange(6) < torch.tensor([6, 4, 1]).unsqueeze(1)


def naive_relation_kl(student: Any, teacher: Any, valid_BT: Tensor, heads: int) -> Tensor:
    """The definition in loops, from the paper's formulas 3 to 5 (arXiv 2012.15828)."""
    total = torch.zeros((), dtype=torch.float64)
    for row, valid_T in enumerate(valid_BT):
        length = int(valid_T.sum())
        for ours, theirs in zip(student, teacher, strict=True):
            for head in range(heads):

                def distribution(part: Tensor, row=row, length=length, head=head) -> Tensor:
                    states = part[row, :length].chunk(heads, dim=-1)[head]
                    return (states @ states.T / states.shape[-1] ** 0.5).softmax(-1)

                p, q = distribution(theirs), distribution(ours)
                total = total + (p * (p.log() - q.log())).sum() / (3 * heads)
    return total


def test_relation_kl_is_the_papers_formula_summed_over_valid_tokens_for_two_different_widths():
    student, teacher = relations(3, 6, 8, seed=0), relations(3, 6, 12, seed=1)
    config = LossConfig(num_relation_heads=4)
    loss = relation_kl(Signals(VALID_BT, relations=student), Signals(VALID_BT, relations=teacher), config)
    expected = naive_relation_kl(student, teacher, VALID_BT, 4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_relation_kl_of_equal_relations_is_zero_and_its_gradient_too():
    same = relations(3, 6, 8, seed=0)
    student = tuple(part.clone().requires_grad_() for part in same)
    config = LossConfig(num_relation_heads=2)
    loss = relation_kl(Signals(VALID_BT, relations=student), Signals(VALID_BT, relations=same), config)  # type: ignore[arg-type]
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert all(part.grad is not None and part.grad.abs().max() < 1e-6 for part in student)


def test_relation_kl_adds_up_over_rows_and_does_not_see_padding():
    student, teacher = relations(3, 6, 8, seed=2), relations(3, 6, 8, seed=3)
    config = LossConfig(num_relation_heads=4)

    def loss(rows: slice, spoil: float = 0.0) -> Tensor:
        valid_BT = VALID_BT[rows]
        noise = (~valid_BT).unsqueeze(-1) * spoil
        (sq, sk, sv), (tq, tk, tv) = ([part[rows] + noise for part in parts] for parts in (student, teacher))
        return relation_kl(Signals(valid_BT, relations=(sq, sk, sv)), Signals(valid_BT, relations=(tq, tk, tv)), config)

    whole = loss(slice(None))
    torch.testing.assert_close(whole, loss(slice(0, 1)) + loss(slice(1, 3)))
    torch.testing.assert_close(whole, loss(slice(None), spoil=100.0))


def router(*, tokens: list[int], gates: list[float], z: float = 0.0, share: list[float] | None = None) -> RouterSignals:
    return RouterSignals(
        gate_sum_E=torch.tensor(gates, dtype=torch.float64, requires_grad=True),
        tokens_per_expert_E=torch.tensor(tokens),
        z_loss_sum=torch.tensor(z, dtype=torch.float64),
        entropy_sum=torch.tensor(0.0),
        load_share_E=None if share is None else torch.tensor(share, dtype=torch.float64),
    )


def signals(**routers: RouterSignals) -> Signals:
    return Signals(VALID_BT, routers=routers)


EMPTY = Signals(VALID_BT)


def test_balance_is_one_per_token_when_experts_share_alike_and_their_number_when_one_takes_all():
    tokens, experts = 12, 4
    even = router(tokens=[3] * experts, gates=[tokens / experts] * experts, share=[1 / experts] * experts)
    assert balance(signals(a=even), EMPTY, LossConfig()).item() / tokens == pytest.approx(1.0)
    collapsed = router(tokens=[12, 0, 0, 0], gates=[12.0, 0, 0, 0], share=[1.0, 0, 0, 0])
    assert balance(signals(a=collapsed), EMPTY, LossConfig()).item() / tokens == pytest.approx(experts)
    both = balance(signals(a=even, b=collapsed), EMPTY, LossConfig())
    assert both.item() / tokens == pytest.approx((1 + experts) / 2), "the mean over routers"


def test_balance_is_the_same_however_the_global_batch_is_cut():
    """E * sum_e(mean gate_e * token share_e) over all tokens, from micro-batches that each are far out of balance."""
    gates = torch.tensor([[3.0, 1.0, 0.5], [0.5, 2.0, 1.5]], dtype=torch.float64)
    counts = torch.tensor([[4, 0, 0], [0, 3, 1]])
    total = int(counts.sum())
    share = (counts.sum(0) / total).tolist()
    parts = [
        balance(signals(a=router(tokens=c.tolist(), gates=g.tolist(), share=share)), EMPTY, LossConfig())
        for c, g in zip(counts, gates, strict=True)
    ]
    expected = 3 * ((gates.sum(0) / total) * torch.tensor(share, dtype=torch.float64)).sum()
    torch.testing.assert_close(sum(parts, torch.zeros(())) / total, expected, check_dtype=False)


def test_the_gradient_of_balance_pushes_down_the_gate_that_gets_most_and_not_the_counts():
    part = router(tokens=[9, 3], gates=[8.0, 4.0], share=[0.75, 0.25])
    balance(signals(a=part), EMPTY, LossConfig()).backward()
    assert part.gate_sum_E.grad is not None
    assert part.gate_sum_E.grad.tolist() == [2 * 0.75, 2 * 0.25]


def test_balance_without_the_global_share_is_our_own_bug_and_not_a_wrong_number():
    with pytest.raises(AssertionError, match="fills in load_share_E"):
        balance(signals(a=router(tokens=[1, 1], gates=[1.0, 1.0])), EMPTY, LossConfig())


def test_router_z_is_the_mean_over_routers_of_their_sums():
    parts = signals(a=router(tokens=[1], gates=[1.0], z=6.0), b=router(tokens=[1], gates=[1.0], z=2.0))
    assert float(router_z(parts, EMPTY, LossConfig())) == 4.0


def test_a_loss_of_weight_zero_is_not_computed_and_a_dense_student_has_no_router_losses():
    config = LossConfig(relation_kl=2.0, balance=0.01, router_z=0.0)
    assert active_losses(config, has_routers=True) == {"relation_kl": 2.0, "balance": 0.01}
    assert active_losses(config, has_routers=False) == {"relation_kl": 2.0}
    everything = active_losses(replace(config, router_z=0.001), has_routers=True)
    assert everything["router_z"] == 0.001


def test_every_loss_has_a_weight_of_its_name():
    assert set(ROUTER_LOSSES) <= LOSSES.keys()
    assert all(isinstance(getattr(LossConfig(), name), float) for name in LOSSES)
