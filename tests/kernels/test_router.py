"""router_logits against its float64 twin: value, each gradient by name, mixed dtypes, autocast, no atomics."""

import pytest
import torch
from kernel_cases import assert_close, draw

from capgap_kernels import reference, router_logits, use_backend

BACKENDS = ["eager", "triton"]
# tokens, hidden, experts
SHAPES = {
    "one token": (1, 8, 4),
    "primes": (37, 23, 3),
    "several blocks of tokens and columns": (101, 150, 5),
    "one expert": (33, 16, 1),
    "as many experts as are fused": (40, 129, 8),
    "more experts than are fused": (20, 16, 9),
}


def value_and_gradients(function, shape, dtypes, device, *, backend="eager"):
    num_tokens, hidden, num_experts = shape
    drawn = {
        "hidden_ND": draw(num_tokens, hidden, seed=0),
        "weight_ED": draw(num_experts, hidden, seed=1) * hidden**-0.5,
        "bias_E": draw(num_experts, seed=2),
    }
    # What the lower precision cannot hold is no error of the kernel.
    leaves = {name: value.to(torch.bfloat16).to(device, dtypes[name]) for name, value in drawn.items()}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    with use_backend(backend):
        logits_NE = function(**leaves)
        logits_NE.backward(draw(num_tokens, num_experts, seed=3).float().to(device, logits_NE.dtype))
    return {"logits": logits_NE, **{f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}}


def dtypes_of(hidden, weight):
    return {"hidden_ND": hidden, "weight_ED": weight, "bias_E": weight}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_every_gradient_equal_the_float64_twin(shape, backend, device):
    wide = dtypes_of(torch.float64, torch.float64)
    expected = value_and_gradients(reference.router_logits, shape, wide, "cpu")
    single = dtypes_of(torch.float32, torch.float32)
    actual = value_and_gradients(router_logits, shape, single, device, backend=backend)
    for what, value in expected.items():
        assert_close(actual[what], value, relative=2e-6, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_hidden_states_are_multiplied_in_float32(weight, backend, device):
    shape = SHAPES["several blocks of tokens and columns"]
    wide = dtypes_of(torch.float64, torch.float64)
    expected = value_and_gradients(reference.router_logits, shape, wide, "cpu")
    dtypes = dtypes_of(torch.bfloat16, weight)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradients(router_logits, shape, dtypes, device, backend=backend)
    assert actual["logits"].dtype == torch.float32
    assert_close(
        actual["logits"], expected["logits"], relative=1e-3 if weight == torch.float16 else 1e-6, what="logits"
    )
    for name, dtype in dtypes.items():
        gradient = actual[f"gradient of {name}"]
        assert gradient.dtype == dtype
        assert_close(gradient, expected[f"gradient of {name}"], relative=5e-3, what=f"gradient of {name}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_and_upstream_gradients(backend, device):
    hidden_DN, weight_DE = draw(12, 40, seed=0).float().to(device), draw(12, 3, seed=1).float().to(device)
    results = []
    for which, leaves in (
        (backend, [hidden_DN.t(), weight_DE.t()]),
        ("eager", [hidden_DN.t().double(), weight_DE.t().double()]),
    ):
        for leaf in leaves:
            leaf.requires_grad_()
        with use_backend(which):
            logits_NE = router_logits(*leaves)
            results.append([logits_NE, *torch.autograd.grad(logits_NE.t()[:, ::3].sum(), leaves)])
    for what, actual, expected in zip(("logits", "hidden", "weight"), *results, strict=True):
        assert_close(actual, expected, relative=1e-6, what=what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_at_all(backend, device):
    hidden_ND, weight_ED = (torch.ones(rows, 8, device=device, requires_grad=True) for rows in (0, 4))
    with use_backend(backend):
        logits_NE = router_logits(hidden_ND, weight_ED)
        logits_NE.sum().backward()
    assert logits_NE.shape == (0, 4) and not weight_ED.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_bit_for_bit(backend, device):
    runs = [
        value_and_gradients(
            router_logits,
            SHAPES["several blocks of tokens and columns"],
            dtypes_of(torch.float32, torch.float32),
            device,
            backend=backend,
        )
        for _ in range(2)
    ]
    for what, value in runs[0].items():
        assert torch.equal(value, runs[1][what]), what
