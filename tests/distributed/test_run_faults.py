"""Faults on real ranks: a NaN, a rank that hangs, a launcher that dies, a second job in the same folder."""

import os
import signal

import psutil
import pytest

from launching import (
    PROJECT,
    distill,
    distill_command,
    exported_weights,
    gone,
    json_lines,
    numbers_of,
    ranks_of,
    started,
    wait_for,
)


@pytest.fixture
def poisoned_teacher(tmp_path, teacher_folder, shards_folder):
    """The tiny teacher with a NaN in the embedding of a word, and the step of 16 samples in which it stands."""
    import shutil

    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file

    from data_prep.shards import open_shards
    from pipeline.batches import sample_rows

    folder = tmp_path / "poisoned"
    shutil.copytree(teacher_folder, folder)
    shards = open_shards(shards_folder)
    words = shards.read(np.arange(len(shards)))["input_ids"]
    rows = [sample_rows(16 * step, 16 * step + 16, num_rows=len(shards), seed=0) for step in range(6)]
    # A word that stands in the rows of exactly one of the first six steps, and not in the first.
    for word in range(5, 200):
        steps = [step for step in range(6) if (words[rows[step]] == word).any()]
        if len(steps) == 1 and steps[0] > 0:
            break
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][word] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, steps


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [(2, ("zero1", "fp32")), pytest.param(2, ("zero2", "bf16"), marks=pytest.mark.slow), (None, ("zero0", "fp32"))],
)
def test_a_nan_skips_one_update_on_all_ranks_and_is_named(recipe, poisoned_teacher, ranks, flags):
    teacher, (bad_step,) = poisoned_teacher
    run = recipe.parent / "run"
    settings = ("--engine.ds_config", f"ds_configs/{flags[0]}.json", "--engine.precision", flags[1])
    code, output = distill("--config", str(recipe), "--teacher.model", str(teacher), *settings, ranks=ranks)
    assert code == 0, output
    assert f"step {bad_step + 1} skipped" in output and "data-0000" in output
    skipped = [line["step"] for line in json_lines(run / "metrics.jsonl") if line["skipped_steps"]]
    assert skipped == [bad_step + 1]
    assert all(weight.isfinite().all() for weight in exported_weights(run).values())


@pytest.mark.fault(17)
def test_nans_in_a_row_stop_the_run_with_a_finite_checkpoint(recipe, poisoned_teacher):
    import torch
    from safetensors.torch import load_file, save_file

    teacher, _ = poisoned_teacher
    weights = load_file(teacher / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.bias"][0] = torch.nan
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    code, output = distill("--config", str(recipe), "--teacher.model", str(teacher))
    assert code == 5, output
    assert "3 steps in a row were not finite" in output
    assert "Traceback" not in output
    assert (recipe.parent / "run" / "checkpoints" / "step-00000003" / "checkpoint.json").exists()


@pytest.mark.fault(32)
def test_a_stuck_rank_is_named_and_the_others_end(recipe):
    flags = ["--config", str(recipe), "--steps", "2000", "--engine.timeout_minutes", "0.15"]
    ledger = recipe.parent / "run" / "ledger.jsonl"
    with started(distill_command(*flags, ranks=2)) as process:
        wait_for(lambda: ledger.exists() and len(ledger.read_text().splitlines()) >= 3)
        other, stuck = ranks_of(process)
        stuck.send_signal(signal.SIGSTOP)
        assert gone([other], within=9 + 10)
        # The launcher would wait another 30 s for the stopped one.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert "rank 1 did not arrive" in output or "rank 1 stopped inside the step" in output, output


@pytest.mark.fault(2)
def test_ranks_whose_launcher_is_killed_save_and_leave(recipe):
    flags = ["--config", str(recipe), "--steps", "2000", "--checkpoint.every_steps", "1000"]
    run = recipe.parent / "run"
    with started(distill_command(*flags, ranks=2)) as process:
        wait_for(lambda: (run / "ledger.jsonl").exists() and len((run / "ledger.jsonl").read_text().splitlines()) >= 3)
        ranks = ranks_of(process)
        for launcher in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            if launcher not in ranks:
                launcher.send_signal(signal.SIGKILL)
        assert gone(ranks, within=10), "ranks outlived their launcher"
    assert not (run / "DONE").exists()
    saved = list((run / "checkpoints").glob("step-*/checkpoint.json"))
    assert len(saved) == 1, "no checkpoint was saved at the end of the step"


@pytest.mark.fault(21)
def test_a_second_job_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock(recipe):
    flags = ["--config", str(recipe), "--steps", "150"]
    ledger = recipe.parent / "run" / "ledger.jsonl"
    with started(distill_command(*flags, ranks=None)) as process:
        wait_for(lambda: ledger.exists() and ledger.read_text())
        code, output = distill(*flags)
        assert code == 3 and str(process.pid) in output, output
        os.kill(process.pid, signal.SIGKILL)
    code, output = distill("--config", str(recipe), "--steps", "150", "--checkpoint.every_steps", "100")
    assert code == 0, output


def test_torchrun_starts_the_same_run(recipe):
    from launching import BIN

    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "pipeline.distill"]
    with started([*command, "--config", str(recipe), "--steps", "2"]) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert len(numbers_of(recipe.parent / "run")) == 2
    assert PROJECT.is_dir()
