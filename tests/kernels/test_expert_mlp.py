"""expert_mlp against its float64 twin: output and every gradient by name, padding, autocast."""

import importlib
import itertools

import pytest
import torch
from kernel_cases import CASES, Case, assert_close, draw, draw_logits, draw_valid

from capgap_kernels import expert_mlp, reference, route, use_backend

BACKENDS = ["eager", "triton"]
EXPERTS = {
    "gelu with biases": {"activation": "gelu", "biases": True, "gated": False},
    "swiglu": {"activation": "silu", "biases": False, "gated": True},
    "gated gelu with biases": {"activation": "gelu", "biases": True, "gated": True},
    "silu": {"activation": "silu", "biases": False, "gated": False},
}


def draw_inputs(case, experts):
    num_experts, hidden, width = case.num_experts, case.hidden, case.width
    inputs = {
        "logits": draw_logits(case),
        "hidden_ND": draw(case.num_tokens, hidden, seed=1),
        "w1_EFD": draw(num_experts, width, hidden, seed=2) * hidden**-0.5,
        "w2_EDF": draw(num_experts, hidden, width, seed=3) * width**-0.5,
    }
    if experts["biases"]:
        inputs["b1_EF"] = draw(num_experts, width, seed=4)
        inputs["b2_ED"] = draw(num_experts, hidden, seed=5)
    if experts["gated"]:
        inputs["w3_EFD"] = draw(num_experts, width, hidden, seed=6) * hidden**-0.5
    return {name: value.float() for name, value in inputs.items()}


def output_and_gradients(function, inputs, case, experts, dtype, device, *, backend="eager", logits_dtype=None):
    leaves = {name: value.detach().clone().to(device, dtype) for name, value in inputs.items()}
    leaves["logits"] = leaves["logits"].to(logits_dtype or dtype)
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    valid_N = draw_valid(case)
    valid_N = None if valid_N is None else valid_N.to(device)
    upstream_ND = draw(case.num_tokens, case.hidden, seed=9).to(device, dtype)
    with use_backend(backend):
        routing = route(leaves["logits"], top_k=case.top_k, valid_N=valid_N, capacity=case.capacity)
        routing.gate_NK.retain_grad()
        arguments = {name: value for name, value in leaves.items() if name not in ("logits", "hidden_ND")}
        out_ND = function(leaves["hidden_ND"], routing, **arguments, activation=experts["activation"])
        out_ND.backward(upstream_ND)
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    if case.num_experts == 1:  # a softmax over one expert is constant: its gradient is rounding
        del gradients["gradient of logits"]
    return {"output": out_ND, "gradient of gate": routing.gate_NK.grad, **gradients}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "experts"),
    [
        *itertools.product(CASES, ["gelu with biases", "swiglu"]),
        *itertools.product(["a prime of everything", "k experts and padding"], ["gated gelu with biases", "silu"]),
    ],
)
def test_output_and_every_gradient_equal_the_float64_twin(case, experts, backend, device):
    case, experts = CASES[case], EXPERTS[experts]
    inputs = draw_inputs(case, experts)
    expected = output_and_gradients(reference.expert_mlp, inputs, case, experts, torch.float64, "cpu")
    actual = output_and_gradients(expert_mlp, inputs, case, experts, torch.float32, device, backend=backend)
    for what, value in expected.items():
        assert_close(actual[what], value, relative=1e-5, what=what)
    valid_N = draw_valid(case)
    if valid_N is not None:
        assert not actual["output"][~valid_N].any() and not actual["gradient of hidden_ND"][~valid_N].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("experts", ["gelu with biases", "swiglu"])
def test_half_precision_keeps_its_sums_in_float32(experts, dtype, backend, device):
    case, experts = CASES["k experts and padding"], EXPERTS[experts]
    inputs = {name: value.to(dtype) for name, value in draw_inputs(case, experts).items()}
    expected = output_and_gradients(reference.expert_mlp, inputs, case, experts, torch.float64, "cpu")
    actual = output_and_gradients(
        expert_mlp, inputs, case, experts, dtype, device, backend=backend, logits_dtype=torch.float32
    )
    # Triton's interpreter cuts float32 to bf16 where a GPU rounds: twice the error.
    cut = backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu"
    for what, value in expected.items():
        assert_close(actual[what], value, relative=2e-2 if cut else 1e-2, what=what)
    assert actual["output"].dtype == dtype


def test_float64_is_exact():
    case, experts = CASES["k experts and padding"], EXPERTS["gated gelu with biases"]
    inputs = draw_inputs(case, experts)
    expected = output_and_gradients(reference.expert_mlp, inputs, case, experts, torch.float64, "cpu")
    actual = output_and_gradients(expert_mlp, inputs, case, experts, torch.float64, "cpu")
    for what, value in expected.items():
        assert_close(actual[what], value, relative=1e-13, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_bf16_and_gives_float32_gradients(backend, device):
    case, experts = CASES["a prime of everything"], EXPERTS["gelu with biases"]
    inputs = draw_inputs(case, experts)
    expected = output_and_gradients(reference.expert_mlp, inputs, case, experts, torch.float64, "cpu")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = output_and_gradients(expert_mlp, inputs, case, experts, torch.float32, device, backend=backend)
    assert actual["output"].dtype == torch.bfloat16
    for what, value in expected.items():
        assert_close(actual[what], value, relative=2e-2, what=what)
        assert what == "output" or actual[what].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_in_padding_tokens_reaches_nothing(backend, device):
    case, experts = CASES["k experts and padding"], EXPERTS["gelu with biases"]
    inputs = draw_inputs(case, experts)
    clean = output_and_gradients(expert_mlp, inputs, case, experts, torch.float32, device, backend=backend)
    inputs["hidden_ND"][~draw_valid(case)] = float("nan")
    dirty = output_and_gradients(expert_mlp, inputs, case, experts, torch.float32, device, backend=backend)
    for what, value in clean.items():
        assert torch.equal(dirty[what], value), what


@pytest.mark.parametrize("index", range(5))
def test_every_tile_size_that_tuning_may_choose_gives_the_float64_twin(index, device, monkeypatch):
    """The interpreter's own tiles are small; these are the ones of a GPU, with its other sizes."""
    module = importlib.import_module("capgap_kernels.expert_mlp_triton")
    monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(module, "GRAIN", 64)
    monkeypatch.setattr(module, "ROW_TILES_PER_GROUP", 8)
    for kernel, sizes in (
        (module.expand_kernel, module.WIDE_EPILOGUE_SIZES),
        (module.contract_kernel, module.ROW_SIZES),
        (module.expand_backward_kernel, module.WIDE_EPILOGUE_SIZES),
        (module.weight_gradient_kernel, module.WEIGHT_SIZES),
    ):
        monkeypatch.setattr(kernel, "configs", [module.configs_of(sizes)[min(index, len(sizes) - 1)]])
    case, experts = Case(140, 3, 2, hidden=72, width=136, padding=True, capacity=70), EXPERTS["gated gelu with biases"]
    # Wide tiles of float32 do not fit a GPU's shared memory; tuning never tries them there.
    dtype, relative = (torch.float32, 1e-5) if device.type == "cpu" else (torch.bfloat16, 1e-2)
    inputs = {name: value.to(dtype) for name, value in draw_inputs(case, experts).items()}
    expected = output_and_gradients(reference.expert_mlp, inputs, case, experts, torch.float64, "cpu")
    actual = output_and_gradients(
        expert_mlp, inputs, case, experts, dtype, device, backend="triton", logits_dtype=torch.float32
    )
    for what, value in expected.items():
        assert_close(actual[what], value, relative=relative, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_expert_without_tokens_gets_a_zero_gradient(backend, device):
    case, experts = CASES["experts without tokens"], EXPERTS["gated gelu with biases"]
    actual = output_and_gradients(
        expert_mlp, draw_inputs(case, experts), case, experts, torch.float32, device, backend=backend
    )
    for name in ("w1_EFD", "w2_EDF", "b1_EF", "b2_ED", "w3_EFD"):
        gradient = actual[f"gradient of {name}"]
        for expert in range(case.num_experts):
            assert bool(gradient[expert].any()) == (expert in case.wanted), (name, expert)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_non_contiguous_inputs(dtype, relative, backend, device):
    hidden_DN, w1_EDF, w2_EFD, b1_EFF, b2_DE = (
        draw(*shape, seed=seed).to(device, dtype)
        for seed, shape in enumerate(((10, 30), (4, 10, 14), (4, 14, 10), (4, 28), (10, 4)))
    )
    strided = [hidden_DN.t(), w1_EDF.mT, w2_EFD.mT, b1_EFF[:, ::2], b2_DE.t()]
    assert not any(tensor.is_contiguous() for tensor in strided)
    logits_NE = draw(30, 4, seed=9).float().to(device)
    results = []
    for which, leaves in ((backend, strided), ("eager", [tensor.double().contiguous() for tensor in strided])):
        for leaf in leaves:
            leaf.requires_grad_()
        with use_backend(which):
            routing = route(logits_NE, top_k=2)
            out_ND = expert_mlp(leaves[0], routing, *leaves[1:3], b1_EF=leaves[3], b2_ED=leaves[4])
            results.append([out_ND, *torch.autograd.grad(out_ND.t()[::2].sum(), leaves)])
    for what, actual, expected in zip(("output", "hidden", "w1", "w2", "b1", "b2"), *results, strict=True):
        assert_close(actual, expected, relative=relative, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_weights_get_no_gradient(backend, device):
    hidden_ND = draw(20, 8, seed=0).float().to(device).requires_grad_()
    w1_EFD, w2_EDF = draw(4, 12, 8, seed=1).float().to(device), draw(4, 8, 12, seed=2).float().to(device)
    w2_EDF.requires_grad_()
    with use_backend(backend):
        expert_mlp(hidden_ND, route(draw(20, 4, seed=3).float().to(device)), w1_EFD, w2_EDF).sum().backward()
    assert hidden_ND.grad.any() and w2_EDF.grad.any() and w1_EFD.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend, device):
    case, experts = CASES["k experts and padding"], EXPERTS["gelu with biases"]
    inputs = draw_inputs(case, experts)
    first, second = (
        output_and_gradients(expert_mlp, inputs, case, experts, torch.float32, device, backend=backend)
        for _ in range(2)
    )
    for what, value in first.items():
        assert torch.equal(value, second[what]), what
