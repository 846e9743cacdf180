"""However experts, gradients and optimizer are spread over ranks, training is that of one process with one batch."""

import pytest

CLOSE = 1e-6


def check_same_as_one_process(result):
    for name in ("loss", "norm"):
        assert max(result[name]) < CLOSE, (name, result[name])
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        assert result[name] < CLOSE, (name, result[name])


def check_follows_float32(result):
    assert max(result["loss"]) < 0.02 * min(result["losses"])
    assert max(result["norm"]) < 0.03 * min(result["norms"])


@pytest.mark.parametrize(
    "name",
    [
        "ZeRO 0, clipped",
        "ZeRO 1",
        "ZeRO 2, accumulation, clipped",
        "ZeRO 3, an expert without tokens",
        "a decoder at ZeRO 3",
        "ZeRO 2 offloaded, recomputed",
        "ZeRO 3 offloaded, accumulation",
    ],
)
def test_two_ranks_equal_one_process(two_ranks, name):
    check_same_as_one_process(two_ranks[name])
    assert two_ranks[name]["experts here"] == 2
    if "clipped" in name:
        assert min(two_ranks[name]["norms"]) > 0.05, "nothing was clipped"


@pytest.mark.fault(17)
def test_what_is_not_finite_on_one_rank_is_applied_on_none(two_ranks, injected):
    """Input, teacher or gradient, of either rank, at every ZeRO stage, in fp32 and bf16; the steps after them, compared
    above and below, are as if they had not been."""
    applied = {name: result["applied"] for name, result in two_ranks.items() if "applied" in result}
    assert len(applied) == 7 and {len(steps) for steps in applied.values()} == {6}
    wrong = [(name, step) for name, steps in applied.items() for step, was_applied in steps.items() if was_applied]
    injected(42, 42 - len(wrong))
    assert not wrong


@pytest.mark.parametrize("name", ["bf16 at ZeRO 1, accumulation", *(f"bf16 at ZeRO {stage}" for stage in (2, 3))])
def test_bf16_follows_float32(two_ranks, name):
    check_follows_float32(two_ranks[name])


def test_four_ranks_with_one_expert_each_equal_one_process(four_ranks):
    result = four_ranks["ZeRO 2, each rank one expert"]
    check_same_as_one_process(result)
    assert result["experts here"] == 1
