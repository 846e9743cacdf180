"""No program of a launch waits for another's writes: run in the opposite order, a layer gives the same bits."""

import pytest
import torch
from kernel_cases import CASES, draw, draw_logits, draw_valid

from capgap_kernels import combine, expert_mlp, permute, route, router_logits, use_backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="orders what the interpreter executes")


def layer_and_gradients(case) -> list[torch.Tensor]:
    leaves = [
        draw(case.num_experts, case.hidden, seed=4),
        draw(case.num_tokens, case.hidden, seed=1),
        draw(case.num_experts, case.width, case.hidden, seed=2),
        draw(case.num_experts, case.hidden, case.width, seed=3),
    ]
    router_ED, hidden_ND, w1_EFD, w2_EDF = leaves = [leaf.float().requires_grad_() for leaf in leaves]
    logits_NE = router_logits(hidden_ND, router_ED) + draw_logits(case).float()
    routing = route(logits_NE, top_k=case.top_k, valid_N=draw_valid(case), capacity=case.capacity)
    out_ND = expert_mlp(hidden_ND, routing, w1_EFD, w2_EDF) + combine(permute(hidden_ND, routing), routing)
    gradients = torch.autograd.grad([out_ND, routing.z_loss_sum], leaves, [torch.ones_like(out_ND), None])
    return [out_ND, routing.slot_M, routing.gate_sum_E, routing.entropy_sum, *gradients]


@pytest.mark.parametrize("case", ["more slots than a block", "k experts over their capacity"])
def test_programs_may_run_in_the_opposite_order(case, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    with use_backend("triton"):
        forwards = layer_and_gradients(CASES[case])
        set_grid_idx = InterpreterBuilder.set_grid_idx

        def set_opposite_grid_idx(self, x, y, z):
            size = self.grid_dim
            set_grid_idx(self, size[0] - 1 - x, size[1] - 1 - y, size[2] - 1 - z)

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", set_opposite_grid_idx)
        backwards = layer_and_gradients(CASES[case])
    for first, second in zip(forwards, backwards, strict=True):
        assert torch.equal(first, second)
