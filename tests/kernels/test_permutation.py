"""permute and combine against their float64 twins: values, every gradient by name, padding."""

import pytest
import torch
from kernel_cases import CASES, assert_close, draw, draw_logits, draw_valid

from capgap_kernels import combine, expert_mlp, permute, reference, route, router_logits, use_backend

BACKENDS = ["eager", "triton"]


def routing_of(case, dtype, device):
    valid_N = draw_valid(case)
    logits_NE = draw_logits(case).float().to(device, dtype)
    valid_N = None if valid_N is None else valid_N.to(device)
    return route(logits_NE, top_k=case.top_k, valid_N=valid_N, capacity=case.capacity)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_permute_equals_the_float64_twin(case, backend, device):
    results = []
    for function, dtype, where in ((reference.permute, torch.float64, "cpu"), (permute, torch.float32, device)):
        hidden_ND = draw(case.num_tokens, case.hidden, seed=1).float().to(where, dtype).requires_grad_()
        with use_backend(backend if function is permute else "eager"):
            permuted_MD = function(hidden_ND, routing_of(case, dtype, where))
            upstream_MD = draw(*permuted_MD.shape, seed=2).float().to(where, dtype)
            permuted_MD.backward(upstream_MD)
        results.append({"permuted": permuted_MD, "gradient of hidden": hidden_ND.grad})
    for what in results[0]:
        assert_close(results[1][what], results[0][what], relative=1e-6, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_combine_equals_the_float64_twin(case, backend, device):
    results = []
    for function, dtype, where in ((reference.combine, torch.float64, "cpu"), (combine, torch.float32, device)):
        logits_NE = draw_logits(case).float().to(where, dtype).requires_grad_()
        valid_N = draw_valid(case)
        permuted_MD = draw(case.num_tokens * case.top_k, case.hidden, seed=1).float().to(where, dtype)
        permuted_MD.requires_grad_()
        with use_backend(backend if function is combine else "eager"):
            valid_N = None if valid_N is None else valid_N.to(where)
            routing = route(logits_NE, top_k=case.top_k, valid_N=valid_N, capacity=case.capacity)
            routing.gate_NK.retain_grad()
            combined_ND = function(permuted_MD, routing)
            combined_ND.backward(draw(*combined_ND.shape, seed=2).float().to(where, dtype))
        results.append(
            {
                "combined": combined_ND,
                "gradient of permuted": permuted_MD.grad,
                "gradient of gate": routing.gate_NK.grad,
                "gradient of logits": logits_NE.grad if case.num_experts > 1 else torch.zeros(1),
            }
        )
    for what in results[0]:
        assert_close(results[1][what], results[0][what], relative=2e-6, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_in_the_rows_of_padding_reaches_nothing(backend, device):
    case = CASES["k experts and padding"]
    valid_N = draw_valid(case).to(device)
    with use_backend(backend):
        routing = routing_of(case, torch.float32, device)
        hidden_ND = torch.where(valid_N[:, None], 1.0, torch.nan).requires_grad_()
        permuted_MD = permute(hidden_ND, routing)
        assert permuted_MD.isfinite().all()
        num_rows = int(routing.offsets_E1[-1])
        garbage_MD = permuted_MD.detach().clone()
        garbage_MD[num_rows:] = torch.nan
        garbage_MD.requires_grad_()
        combined_ND = combine(garbage_MD, routing)
        upstream_ND = torch.where(valid_N[:, None], combined_ND.detach(), torch.nan)
        combined_ND.backward(upstream_ND)
        permuted_MD.backward(
            torch.where(torch.arange(len(garbage_MD), device=device)[:, None] < num_rows, 1.0, torch.nan)
        )
    assert combined_ND.isfinite().all() and not combined_ND[~valid_N].any()
    assert garbage_MD.grad.isfinite().all() and not garbage_MD.grad[num_rows:].any()
    assert hidden_ND.grad.isfinite().all() and not hidden_ND.grad[~valid_N].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_combine_undoes_permute_when_gates_sum_to_one(backend, device):
    hidden_ND = draw(50, 12, seed=0).to(device, torch.bfloat16)
    with use_backend(backend):
        routing = route(draw(50, 5, seed=1).float().to(device), top_k=2, renormalize=True)
        again_ND = combine(permute(hidden_ND, routing), routing)
    assert again_ND.dtype == torch.bfloat16
    assert_close(again_ND, hidden_ND, relative=5e-3, what="hidden")


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_upstream_gradients(backend, device):
    hidden_ND = draw(12, 40, seed=0).float().to(device).t()
    assert not hidden_ND.is_contiguous()
    results = []
    for which, leaf in ((backend, hidden_ND.detach()), ("eager", hidden_ND.contiguous())):
        leaf.requires_grad_()
        with use_backend(which):
            routing = route(draw(40, 3, seed=1).float().to(device), top_k=2)
            combined_ND = combine(permute(leaf, routing) * 2, routing)
            (gradient,) = torch.autograd.grad(combined_ND.t()[::3].sum(), leaf)
        results.append((combined_ND, gradient))
    assert_close(results[0][0], results[1][0], relative=1e-6, what="combined")
    assert_close(results[0][1], results[1][1], relative=1e-6, what="gradient of hidden")


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter executes")
@pytest.mark.parametrize(("top_k", "launches_of_experts"), [(1, 2), (3, 3)])
def test_a_layer_is_few_launches(top_k, launches_of_experts, monkeypatch):
    from triton.runtime.interpreter import GridExecutor

    launched = []
    execute = GridExecutor.__call__

    def execute_and_count(self, *arguments, **options):
        launched.append(self.fn.__name__)
        return execute(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", execute_and_count)
    hidden_ND, weight = draw(20, 8, seed=0).float(), draw(4, 8, 8, seed=1).float()
    with use_backend("triton"), torch.no_grad():
        logits_NE = router_logits(hidden_ND, weight[0, :4])
        assert len(launched) == 1
        routing = route(logits_NE, top_k=top_k)
        assert len(launched) == 4
        combine(permute(hidden_ND, routing), routing)
        assert len(launched) == 6
        expert_mlp(hidden_ND, routing, weight, weight)
        assert len(launched) == 6 + launches_of_experts
