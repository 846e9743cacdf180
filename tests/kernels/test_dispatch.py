"""Which implementation a call runs, and that the log says it once."""

import logging

import pytest
import torch

from capgap_kernels import backend_of, combine, dispatch, expert_mlp, permute, route, use_backend


def test_the_log_says_once_what_a_device_runs(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, logger="capgap_kernels.dispatch"):
        assert [backend_of(torch.zeros(3)) for _ in range(3)] == ["eager"] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "capgap_kernels: cpu tensors run the eager kernels; float64 always runs eager"
    ]


def test_a_forced_backend_ends_with_its_block_and_never_takes_float64():
    with use_backend("triton"):
        assert backend_of(torch.zeros(3)) == "triton"
        assert backend_of(torch.zeros(3, dtype=torch.float64)) == "eager"
        with use_backend("eager"):
            assert backend_of(torch.zeros(3)) == "eager"
        assert backend_of(torch.zeros(3)) == "triton"
    assert backend_of(torch.zeros(3)) == "eager"


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_no_tokens_at_all_are_routed_and_computed(backend, device):
    hidden_ND = torch.zeros(0, 8, device=device, requires_grad=True)
    with use_backend(backend):
        routing = route(torch.zeros(0, 4, device=device), top_k=2)
        assert routing.offsets_E1.tolist() == [0] * 5 and routing.z_loss_sum == 0
        assert combine(permute(hidden_ND, routing), routing).shape == (0, 8)
        weights = torch.zeros(4, 6, 8, device=device), torch.zeros(4, 8, 6, device=device)
        out_ND = expert_mlp(hidden_ND, routing, *weights)
    assert out_ND.shape == (0, 8)
    out_ND.sum().backward()
