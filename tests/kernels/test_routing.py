"""route against its float64 twin: every output and the gradient of the logits, ties, padding, order."""

import itertools

import pytest
import torch
from kernel_cases import CASES, assert_close, draw, draw_logits, draw_valid

from capgap_kernels import reference, route, use_backend

BACKENDS = ["eager", "triton"]
OPTIONS = {
    "softmax": {},
    "sigmoid": {"score_function": "sigmoid"},
    "renormalised softmax": {"renormalize": True},
    "renormalised sigmoid with a bias": {"score_function": "sigmoid", "renormalize": True, "bias": True},
    "softmax with a bias": {"bias": True},
}
FLOATS = ("gate_NK", "gate_sum_E", "z_loss_sum", "entropy_sum")
INTEGERS = ("expert_NK", "tokens_per_expert_E", "slot_M", "position_NK", "offsets_E1")


def routed(function, logits_NE, case, options, dtype, device):
    """The routing, and the gradient of the logits for an upstream gradient that is not 1 on every output."""
    options = dict(options)
    bias_E = draw(case.num_experts, seed=5).mul(0.3).to(device, dtype) if options.pop("bias", False) else None
    valid_N = draw_valid(case)
    logits_NE = logits_NE.to(device, dtype).requires_grad_()
    routing = function(
        logits_NE,
        top_k=case.top_k,
        selection_bias_E=bias_E,
        valid_N=None if valid_N is None else valid_N.to(device),
        capacity=case.capacity,
        **options,
    )
    gate_weight = draw(case.num_tokens, case.top_k, seed=6).to(device)
    expert_weight = draw(case.num_experts, seed=7).to(device)
    loss = (routing.gate_NK * gate_weight).sum() + (routing.gate_sum_E * expert_weight).sum()
    (loss + 0.3 * routing.z_loss_sum).backward()
    return routing, logits_NE.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_output_and_the_gradient_equal_the_float64_twin(case, options, backend, device):
    logits_NE = draw_logits(case).float()
    expected, expected_gradient = routed(reference.route, logits_NE, case, options, torch.float64, "cpu")
    with use_backend(backend):
        actual, gradient = routed(route, logits_NE, case, options, torch.float32, device)
    valid_N = draw_valid(case)
    for name in INTEGERS:
        value, wanted = getattr(actual, name).cpu(), getattr(expected, name)
        if name == "expert_NK" and valid_N is not None:
            assert value.min() >= 0 and value.max() < case.num_experts
            value, wanted = value[valid_N], wanted[valid_N]
        assert value.dtype == torch.int64
        assert torch.equal(value, wanted), name
    for name in FLOATS:
        assert getattr(actual, name).dtype == torch.float32, name
        assert_close(getattr(actual, name), getattr(expected, name), relative=1e-5, what=name)
    if case.num_experts > 1:  # one expert has gate 1 whatever its logit, but for rounding
        assert_close(gradient, expected_gradient, relative=1e-5, what="gradient of the logits")
    if valid_N is not None:
        assert not gradient.cpu()[~valid_N].any(), "a padding token received a gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_logits_are_computed_in_float32(backend, device):
    case = CASES["k experts and padding"]
    logits_NE = draw_logits(case).bfloat16()
    expected, expected_gradient = routed(reference.route, logits_NE, case, {}, torch.float64, "cpu")
    with use_backend(backend):
        actual, gradient = routed(route, logits_NE, case, {}, torch.bfloat16, device)
    assert actual.gate_NK.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert_close(actual.gate_NK, expected.gate_NK, relative=1e-6, what="gate_NK")
    assert_close(gradient, expected_gradient, relative=1e-2, what="gradient of the logits")


def test_float64_stays_float64():
    routing = route(draw_logits(CASES["with padding"]))
    assert routing.gate_NK.dtype == routing.z_loss_sum.dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_choose_the_lower_expert(backend, device):
    with use_backend(backend):
        routing = route(torch.zeros(9, 6, device=device), top_k=3)
    assert routing.expert_NK.tolist() == [[0, 1, 2]] * 9


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_keep_their_order_within_an_expert(backend, device):
    with use_backend(backend):
        routing = route(draw(301, 5, seed=0).float().to(device), top_k=2)
    bounds = routing.offsets_E1.tolist()
    for start, stop in itertools.pairwise(bounds):
        token = routing.slot_M[start:stop] // 2
        assert (token.diff() > 0).all()
    assert torch.equal(routing.slot_M[routing.position_NK.flatten()], torch.arange(602, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_over_its_capacity_keeps_its_first_tokens(backend, device):
    logits_NE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], device=device)
    valid_N = torch.tensor([False, True, True, True, True], device=device)
    with use_backend(backend):
        routing = route(logits_NE, valid_N=valid_N, capacity=2)
    assert routing.slot_M.tolist() == [1, 3, 2, 4, 0]  # expert 0, expert 1, dropped, padding
    assert routing.tokens_per_expert_E.tolist() == [3, 1]
    assert routing.rows_per_expert_E.tolist() == [2, 1]
    assert routing.dropped_per_expert_E.tolist() == [1, 0]
    assert (routing.gate_NK[:, 0] != 0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_capacity_that_nothing_exceeds_changes_nothing(backend, device):
    logits_NE = draw(40, 4, seed=0).float().to(device)
    with use_backend(backend):
        free = route(logits_NE, top_k=2)
        limited = route(logits_NE, top_k=2, capacity=int(free.tokens_per_expert_E.max()))
    for name in (*FLOATS, *INTEGERS):
        assert torch.equal(getattr(free, name), getattr(limited, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_padding_rows_reaches_nothing(backend, device):
    valid_N = torch.arange(40, device=device) < 25
    logits_NE = draw(40, 4, seed=0).float().to(device)
    expected = route(logits_NE, valid_N=valid_N)
    garbage_NE = logits_NE.masked_fill(~valid_N[:, None], float("nan")).requires_grad_()
    with use_backend(backend):
        actual = route(garbage_NE, valid_N=valid_N)
        (actual.gate_NK.sum() + actual.gate_sum_E[0] + actual.z_loss_sum).backward()
    for name in FLOATS:
        assert_close(getattr(actual, name), getattr(expected, name), relative=1e-6, what=name)
    assert torch.equal(actual.slot_M, expected.slot_M)
    assert garbage_NE.grad.isfinite().all() and not garbage_NE.grad[25:].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_logits_stay_within_the_experts(backend, device):
    with use_backend(backend):
        routing = route(torch.full((10, 4), float("nan"), device=device), top_k=2)
    assert routing.expert_NK.min() >= 0 and routing.expert_NK.max() < 4
    assert routing.tokens_per_expert_E.sum() == 20 and routing.z_loss_sum.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_logits(backend, device):
    wide = draw(6, 50, seed=0).float().to(device)
    leaf = wide.clone().requires_grad_()
    with use_backend(backend):
        actual = route(leaf.t()[::2], top_k=2)
    expected = route(wide.t()[::2].contiguous(), top_k=2)
    assert torch.equal(actual.slot_M, expected.slot_M)
    actual.gate_NK[:, 0].sum().backward()
    assert not leaf.grad[:, 1::2].any() and leaf.grad[:, ::2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_steers_the_choice_and_not_the_gate(backend, device):
    logits_NE = draw(20, 4, seed=0).float().to(device)
    with use_backend(backend):
        routing = route(logits_NE, selection_bias_E=torch.tensor([0.0, 0.0, 5.0, 0.0], device=device))
    assert routing.tokens_per_expert_E.tolist() == [0, 0, 20, 0]
    assert_close(routing.gate_NK[:, 0], logits_NE.softmax(-1)[:, 2], relative=1e-6, what="gate")


def test_no_gradient_is_asked_for_none_is_kept():
    assert not route(torch.randn(5, 3)).gate_NK.requires_grad
