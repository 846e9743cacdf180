"""Parameter groups and the learning rate."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.config import OptimizerConfig, StudentConfig
from pipeline.models.students import build_student
from pipeline.optimizer import learning_rate, parameter_groups

TINY = {"vocab_size": 60, "max_position_embeddings": 24}


def groups_by_name(model: nn.Module, weight_decay: float = 0.1) -> dict[str, tuple[str, float]]:
    """Group name and decay of every trained parameter, which must be in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["name"], group["weight_decay"])
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return found


@pytest.mark.parametrize("architecture", ["dense", "minimoe"])
def test_matrices_and_embeddings_decay_biases_and_norms_do_not(architecture):
    config = StudentConfig(
        architecture, num_hidden_layers=2, hidden_size=16, num_attention_heads=4, intermediate_size=8
    )
    student = build_student(config, teacher_config=TINY, init_folder=None, seed=0)
    for name, group in groups_by_name(student).items():
        is_plain = name.endswith((".bias", ".w3")) or "norm" in name.lower()
        assert group == (("plain", 0.0) if is_plain else ("decayed", 0.1)), name


def test_the_packed_biases_of_attention_experts_do_not_decay_although_they_are_matrices():
    config = StudentConfig(
        num_hidden_layers=1, hidden_size=16, num_attention_heads=4, intermediate_size=8, num_attention_experts=2
    )
    groups = groups_by_name(build_student(config, teacher_config=TINY, init_folder=None, seed=0))
    layer = "backbone.layers.0."
    for name in ("attention.qkv_bias", "attention.output_bias", "moe.experts.w3", "attention.gate.bias"):
        assert groups[layer + name] == ("plain", 0.0)
    for name in (
        "attention.qkv_weight",
        "attention.output_weight",
        "moe.experts.w1",
        "moe.experts.w2",
        "moe.gate.weight",
    ):
        assert groups[layer + name] == ("decayed", 0.1)


def test_what_is_frozen_is_in_no_group_and_an_empty_group_is_left_out():
    model = nn.Linear(2, 2, bias=False)
    assert [group["name"] for group in parameter_groups(model, 0.1)] == ["decayed"]
    assert parameter_groups(model.requires_grad_(False), 0.1) == []


def rates(num_steps: int, **changes) -> list[float]:
    return [learning_rate(step, num_steps, OptimizerConfig(**changes)) for step in range(num_steps)]


def test_the_rate_rises_from_the_first_step_to_the_peak_and_falls_in_a_line():
    found = rates(10, learning_rate=1.0, warmup_fraction=0.3)
    assert found == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_a_cosine_falls_slowly_at_both_ends_and_ends_at_its_floor():
    found = rates(101, learning_rate=2.0, schedule="cosine", warmup_fraction=0.0, final_learning_rate_ratio=0.1)
    assert found[0] == 2.0
    assert found[50] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 50 / 101))))
    assert found[100] == pytest.approx(0.2, abs=1e-3)
    falls = [before - after for before, after in pairwise(found)]
    assert falls[0] < falls[50] > falls[-1]


def test_a_constant_rate_stays_at_the_peak_after_the_warm_up():
    assert set(rates(50, learning_rate=0.5, schedule="constant", warmup_fraction=0.1)[5:]) == {0.5}


@settings(deadline=None)
@given(
    num_steps=st.integers(1, 400),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    warmup=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_the_rate_is_never_zero_never_above_the_peak_and_turns_once(num_steps, schedule, warmup, floor):
    found = rates(
        num_steps, learning_rate=3e-4, schedule=schedule, warmup_fraction=warmup, final_learning_rate_ratio=floor
    )
    assert all(0 < rate <= 3e-4 * (1 + 1e-9) for rate in found)
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(found[top:]))
