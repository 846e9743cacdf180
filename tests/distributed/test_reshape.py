"""A run goes on with its optimizer on any number of ranks, at any ZeRO stage and expert-parallel size."""

import shutil

import pytest
from engine_launching import case, run_cases
from test_expert_parallel import check_follows_float32, check_same_as_one_process

from launching import distill, exported_weights, numbers_of

pytestmark = pytest.mark.fault(18)


def check_goes_on_as_if_unbroken(result):
    """What was loaded is what was saved, and the steps after it are those of an unbroken run."""
    assert result["after load"] == 0
    check_same_as_one_process(result)


def test_from_two_ranks_to_four_that_share_experts_in_pairs(four_ranks):
    check_goes_on_as_if_unbroken(four_ranks["ZeRO 3, from two ranks"])


@pytest.fixture(scope="session")
def two_ranks_again(engine_recipe, two_ranks, four_ranks):
    clipped = four_ranks["ZeRO 2, each rank one expert"]["saved"]
    pair = two_ranks["ZeRO 1"]["saved"]
    cases = {
        "4 ranks sharing experts to 2 that do not, ZeRO 2 to 1": case("zero1", micro=4, clip=0.05, resume=clipped),
        "4 ranks sharing experts to 2, ZeRO 2 to 3": case("zero3", experts=2, micro=8, clip=0.05, resume=clipped),
        "the same cut": case("zero1", experts=2, micro=8, resume=pair),
        "ZeRO 1 to 2 offloaded": case("zero2_offload", experts=2, micro=8, resume=pair),
        "ZeRO 1 to 3 offloaded": case("zero3_offload", micro=8, resume=pair),
        "bf16": case("zero3", micro=8, precision="bf16", resume=two_ranks["bf16 at ZeRO 1, accumulation"]["saved"]),
    }
    return run_cases(engine_recipe, cases, ranks=2, folder=engine_recipe.parent / "two again")


@pytest.mark.parametrize(
    "name",
    [
        "4 ranks sharing experts to 2 that do not, ZeRO 2 to 1",
        "4 ranks sharing experts to 2, ZeRO 2 to 3",
        "the same cut",
        "ZeRO 1 to 2 offloaded",
        "ZeRO 1 to 3 offloaded",
    ],
)
def test_on_two_ranks(two_ranks_again, name):
    check_goes_on_as_if_unbroken(two_ranks_again[name])


def test_bf16_goes_on_with_its_float32_masters_in_another_cut(two_ranks_again):
    result = two_ranks_again["bf16"]
    assert result["after load"] == 0
    check_follows_float32(result)


@pytest.fixture(scope="session")
def one_rank(engine_recipe, decoder_recipe, two_ranks, four_ranks):
    clipped = four_ranks["ZeRO 2, each rank one expert"]["saved"]
    cases = {
        "4 ranks to 1, ZeRO 2 to 0": case("zero0", clip=0.05, resume=clipped),
        "4 ranks to 1, ZeRO 2 to 3": case("zero3", clip=0.05, resume=clipped),
        "2 ranks to 1, ZeRO 1 to 2": case("zero2", resume=two_ranks["ZeRO 1"]["saved"]),
        "a decoder from 2 ranks to 1, ZeRO 3 to 1": case(
            "zero1",
            recipe=decoder_recipe,
            flags=("--optimizer.epsilon", "1e-5", "--loss.hidden_cosine", "0.2", "--loss.hidden_layers", "[0, 2]"),
            resume=two_ranks["a decoder at ZeRO 3"]["saved"],
            reseed=True,
        ),
    }
    return run_cases(engine_recipe, cases, ranks=1, folder=engine_recipe.parent / "one")


@pytest.mark.parametrize(
    "name",
    [
        "4 ranks to 1, ZeRO 2 to 0",
        "4 ranks to 1, ZeRO 2 to 3",
        "2 ranks to 1, ZeRO 1 to 2",
        "a decoder from 2 ranks to 1, ZeRO 3 to 1",
    ],
)
def test_on_one_rank(one_rank, name):
    check_goes_on_as_if_unbroken(one_rank[name])


@pytest.mark.slow
def test_a_real_run_of_two_ranks_that_share_experts_goes_on_alone(recipe):
    """Logged sums that span the change come out as well, over 50 steps."""
    run = recipe.parent / "run"
    still = ("--student.dropout", "0", "--student.router_jitter", "0")
    flags = [
        "--config",
        str(recipe),
        *still,
        "--steps",
        "50",
        "--log.every_steps",
        "3",
        "--checkpoint.every_steps",
        "10",
    ]
    flags += ["--checkpoint.keep_last", "9"]
    shared = ("--engine.expert_parallel_size", "2", "--engine.ds_config", "ds_configs/zero3.json")
    code, output = distill(*flags, *shared, ranks=2)
    assert code == 0, output
    numbers, weights = numbers_of(run), exported_weights(run)

    (run / "DONE").unlink()
    shutil.rmtree(run / "export")
    for step in (20, 30, 40, 50):
        shutil.rmtree(run / f"checkpoints/step-000000{step}")
    alone = ("--engine.ds_config", "ds_configs/zero0.json", "--batch.micro_size", "16")
    code, output = distill(*flags, *alone)
    assert code == 0, output
    assert "from 2 ranks, now 1" in output
    for ours, expected in zip(numbers_of(run), numbers, strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, abs=1e-5), name
    found = exported_weights(run)
    assert found.keys() == weights.keys()
    assert all((found[name] - weights[name]).abs().max() < 1e-5 for name in weights)
