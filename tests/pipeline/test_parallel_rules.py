"""Every combination of ranks, ZeRO and experts is legal or refused with its mend, before torch is imported."""

import pytest

from data_prep.errors import ConfigError
from pipeline.parallel_rules import check_parallelism


def stage_of(stage=2, size=1, num_experts=4, world_size=4, precision="fp32", **zero):
    settings = {"zero_optimization": {"stage": stage, **zero}}
    return check_parallelism(
        settings, expert_parallel_size=size, num_experts=num_experts, world_size=world_size, precision=precision
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sizes_that_divide_experts_and_ranks_are_legal(stage, size):
    assert stage_of(stage, size) == stage


def test_a_config_without_zero_is_stage_0():
    assert check_parallelism({}, expert_parallel_size=1, num_experts=4, world_size=2, precision="fp32") == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "must be at least 1"),
        ({"size": 3}, r"expert_parallel_size \(3\) does not divide 4 experts - use 1, 2 or 4"),
        ({"size": 4, "world_size": 6}, "does not divide 6 ranks - use 1 or 2"),
        ({"size": 2, "world_size": 1}, "does not divide 1 ranks - use 1$"),
        ({"size": 2, "num_experts": 1}, "the student is dense"),
        ({"stage": 0, "precision": "bf16"}, "use ds_configs/zero1.json, or engine.precision fp32"),
        ({"offload_optimizer": {"device": "nvme"}}, "nvme is unproven - use device cpu"),
    ],
)
def test_what_is_impossible_or_unproven_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        stage_of(**wrong)
