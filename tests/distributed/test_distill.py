"""Real runs under the real launcher: two ranks equal one, stop and resume, kill and resume."""

import os
import shutil
import signal

import pytest

from launching import distill, distill_command, exported_weights, json_lines, numbers_of, started, wait_for

STILL = ("--student.dropout", "0", "--student.router_jitter", "0")


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture(scope="module")
def big_batch(tmp_path_factory, teacher_folder, shards_folder):
    """One process, one micro-batch per step: what every other cut of the batch must equal."""
    from tiny_runs import RECIPE

    folder = tmp_path_factory.mktemp("big")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=folder / "run", shards=shards_folder, teacher=teacher_folder))
    code, output = distill("--config", str(recipe), "--batch.micro_size", "16", *STILL)
    assert code == 0, output
    return folder / "run"


@pytest.mark.parametrize(
    ("ranks", "micro", "ds_config", "experts"),
    [(None, 4, "zero0", 1), (2, 8, "zero1", 1), (2, 4, "zero3", 2)],
    ids=["four accumulation steps", "two ranks", "two ranks that share experts, two accumulation steps each, ZeRO 3"],
)
def test_however_the_global_batch_is_cut_the_weights_are_the_same(recipe, big_batch, ranks, micro, ds_config, experts):
    run = recipe.parent / "run"
    flags = ["--batch.micro_size", str(micro), "--engine.ds_config", f"ds_configs/{ds_config}.json"]
    flags += ["--engine.expert_parallel_size", str(experts)]
    code, output = distill("--config", str(recipe), *flags, *STILL, ranks=ranks)
    assert code == 0, output
    assert largest_difference(exported_weights(run), exported_weights(big_batch)) < 1e-6
    for ours, expected in zip(numbers_of(run), numbers_of(big_batch), strict=True):
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, abs=2e-6), (name, expected["step"])
    ledgers = [json_lines(folder / "ledger.jsonl") for folder in (run, big_batch)]
    assert ledgers[0] == ledgers[1]


@pytest.mark.fault(1, 5)
def test_a_run_that_is_stopped_and_resumed_on_two_ranks_equals_the_unbroken_run_bit_for_bit(recipe):
    unbroken, broken = recipe.parent / "unbroken", recipe.parent / "broken"
    flags = ["--config", str(recipe), "--steps", "30", "--log.every_steps", "3", "--checkpoint.every_steps", "10"]
    code, output = distill(*flags, "--out", str(unbroken), ranks=2)
    assert code == 0, output

    again = [*flags, "--out", str(broken)]
    ledger = broken / "ledger.jsonl"
    with started(distill_command(*again, ranks=2)) as process:
        wait_for(lambda: ledger.exists() and len(ledger.read_text().splitlines()) >= 4)
        os.killpg(process.pid, signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    assert "SIGUSR1" in output, output
    assert not (broken / "DONE").exists()
    with started(distill_command(*again, ranks=2)) as process:
        wait_for(lambda: len(ledger.read_text().splitlines()) >= 12)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (broken / "DONE").exists()
    code, output = distill(*again, ranks=2)
    assert code == 0, output
    assert "resumed from" in output and "step-000000" in output

    assert numbers_of(broken) == numbers_of(unbroken)
    assert json_lines(broken / "ledger.jsonl") == json_lines(unbroken / "ledger.jsonl")
    ours, expected = exported_weights(broken), exported_weights(unbroken)
    assert all(ours[name].equal(expected[name]) for name in expected)

    code, output = distill(*again, ranks=2)
    assert code == 0 and "complete already" in output


def test_bf16_with_activation_checkpointing_follows_fp32_and_exports_the_master_weights(recipe, big_batch):
    run = recipe.parent / "run"
    flags = ("--engine.precision", "bf16", "--engine.activation_checkpointing", "true", *STILL)
    code, output = distill("--config", str(recipe), *flags, ranks=2)
    assert code == 0, output
    for ours, expected in zip(numbers_of(run), numbers_of(big_batch), strict=True):
        assert ours["train/loss"] == pytest.approx(expected["train/loss"], rel=0.02)
    weights = exported_weights(run)
    matrix = weights["layers.0.moe.experts.w1"]
    assert not matrix.equal(matrix.bfloat16().float()), "the export holds bf16 weights, not the fp32 master copy"


@pytest.mark.fault(9)
def test_a_run_whose_folder_is_lost_goes_on_from_the_copies(recipe):
    run, copies = recipe.parent / "run", recipe.parent / "copies"
    flags = ["--config", str(recipe), "--batch.micro_size", "16", "--checkpoint.copy_to", str(copies)]
    code, output = distill(*flags)
    assert code == 0, output
    numbers, weights = numbers_of(run), exported_weights(run)
    assert sorted(path.name for path in copies.iterdir())[-1] == "step-00000006"

    shutil.rmtree(run)
    shutil.rmtree(copies / "step-00000006")
    code, output = distill(*flags, "--seed", "1")
    assert code == 2 and "checkpoint.copy_to" in output and "seed (0 -> 1)" in output, output
    code, output = distill(*flags)
    assert code == 0 and f"resumed from {copies}/step-00000004: step 4 of 6" in output, output
    assert numbers_of(run) == numbers[4:]
    assert all(weight.equal(weights[name]) for name, weight in exported_weights(run).items())
