"""The long campaigns on two real ranks: killed and stopped at random, and at the end equal to the unbroken run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from rank_server import RankServer, rank_server

from launching import BIN, distill_command, gone, json_lines, ranks_of, started, wait_for
from pipeline.checkpoints import newest_valid
from pipeline.doctor import compare, steps_taken
from pipeline.stopping import IMPATIENT_AFTER
from tiny_runs import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS = 200
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def server():
    with rank_server() as server:
        yield server


@pytest.fixture(scope="module")
def flags(tmp_path_factory, teacher_folder, shards_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("campaigns")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "run", shards=shards_folder, teacher=teacher_folder))
    return ["--config", str(path), "--steps", str(STEPS), "--checkpoint.every_steps", "5", "--log.every_steps", "3"]


@pytest.fixture(scope="module")
def unbroken(server, flags, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    finish(server, flags, run)
    return run


def finish(server: RankServer, flags: list[str], run: Path) -> None:
    ranks = server.start(*flags, "--out", str(run), log=run.parent / "log.txt")
    assert ranks.exit_codes(300) == [0, 0], ranks.log.read_text()[-4000:]


def saved_step(run: Path) -> int:
    """Step of the newest checkpoint, whose files all match their hashes."""
    found = newest_valid(run / "checkpoints")
    return found[1]["position"]["step"] if found else 0


def is_in_save(run: Path, *, since: set[str]) -> bool:
    return any(path.name not in since for path in run.glob("checkpoints/*.partial"))


@pytest.mark.fault(25)
def test_two_hundred_healthy_steps_raise_no_alarm(unbroken, injected):
    log = (unbroken.parent / "log.txt").read_text()
    injected(0, note=f"none in {STEPS} healthy steps")
    assert f"{STEPS}/{STEPS} steps" in log and "collapsing" not in log


@pytest.mark.fault(1)
def test_twenty_kills_of_a_rank_leave_no_trace(server, flags, unbroken, tmp_path, injected):
    run, chance, slowest, lost = tmp_path / "run", random.Random(0), 0.0, 0
    for number in range(20):
        before = steps_taken(run)
        ranks = server.start(*flags, "--out", str(run), log=tmp_path / "log.txt")
        wanted, delay = before + chance.randint(1, 10), chance.random() * 0.2
        wait_for(lambda wanted=wanted: steps_taken(run) >= wanted)
        time.sleep(delay)
        os.kill(ranks.pids[chance.randrange(2)], signal.SIGKILL)
        began = time.monotonic()
        codes = ranks.exit_codes(30)
        slowest = max(slowest, time.monotonic() - began)
        assert -signal.SIGKILL in codes and 0 not in codes, (number, codes)
        assert not (run / "DONE").exists()
        lost += steps_taken(run) - saved_step(run)
    finish(server, flags, run)
    differences = compare(unbroken, run)
    injected(20, 0 if differences else 20, f"the other rank left within {slowest:.1f} s; {lost} steps repeated")
    assert not differences


@pytest.mark.fault(5)
def test_every_signal_to_any_rank_is_a_checkpoint_at_the_end_of_the_step(server, flags, unbroken, tmp_path, injected):
    run, chance, most = tmp_path / "run", random.Random(1), 0
    targets = ([0], [1], [0, 1])
    moments = [(number, target, moment) for number in SIGNALS for target in targets for moment in MOMENTS]
    chance.shuffle(moments)
    for number, target, moment in moments:
        before = steps_taken(run)
        partial = {path.name for path in run.glob("checkpoints/*.partial")}
        ranks = server.start(*flags, "--out", str(run), log=tmp_path / "log.txt")
        if moment == "at the start":
            wait_for(lambda ranks=ranks: all(map(expects_signals, ranks.pids)))
        elif moment == "in a save":
            wait_for(lambda partial=partial: is_in_save(run, since=partial))
        else:
            wanted = before + chance.randint(1, 4)
            wait_for(lambda wanted=wanted: steps_taken(run) >= wanted)
            time.sleep(chance.random() * 0.1)
        taken = steps_taken(run)
        for rank in target:
            os.kill(ranks.pids[rank], number)
        assert ranks.exit_codes(30) == [75, 75], (number, target, moment, ranks.log.read_text()[-3000:])
        assert not (run / "DONE").exists()
        assert saved_step(run) == steps_taken(run), "a step was lost"
        if moment != "at the start":
            most = max(most, steps_taken(run) - taken)
    finish(server, flags, run)
    differences = compare(unbroken, run)
    # The step in which it comes, and one that may have ended while we looked.
    injected(len(moments), 0 if differences else len(moments), f"saved at most {most} steps after the signal")
    assert most <= 2
    assert not differences


MOMENTS = ("at the start", "in a step", "in another step", "in a save")


def expects_signals(pid: int) -> bool:
    """Whether the process has blocked SIGTERM, which its own thread then waits for."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigBlk"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.fault(5)
def test_a_second_signal_ends_a_rank_that_waits_for_another(server, flags, tmp_path):
    run = tmp_path / "run"
    ranks = server.start(*flags, "--out", str(run), log=tmp_path / "log.txt")
    wait_for(lambda: steps_taken(run) >= 3)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(ranks.pids[0], signal.SIGTERM)
    time.sleep(IMPATIENT_AFTER + 1)
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert gone([psutil.Process(ranks.pids[0])], within=5)
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.exit_codes(30) == [128 + signal.SIGTERM, -signal.SIGKILL]


@pytest.mark.fault(9)
def test_damaged_and_foreign_checkpoints_start_no_run_over(server, flags, unbroken, tmp_path, injected):
    """The newest one damaged: back to the one before. All damaged, or those of another run: refused."""
    injected(3)
    run, other, log = tmp_path / "run", tmp_path / "other", tmp_path / "log.txt"
    for out, more in ((run, ()), (other, ("--optimizer.learning_rate", "2e-3"))):
        ranks = server.start(*flags, *more, "--out", str(out), log=log)
        wait_for(lambda out=out: saved_step(out) >= 10)
        for pid in ranks.pids:
            os.kill(pid, signal.SIGTERM)
        assert ranks.exit_codes(30) == [75, 75]
    whole = sorted((run / "checkpoints").iterdir())
    aside = tmp_path / "aside"
    shutil.copytree(run / "checkpoints", aside)
    for damaged in (whole, []):
        for path in damaged:
            (path / "rank-00001.json").write_bytes(b"")
        if not damaged:
            shutil.rmtree(run / "checkpoints")
            shutil.copytree(other / "checkpoints", run / "checkpoints")
        log.unlink()
        ranks = server.start(*flags, "--out", str(run), log=log)
        assert ranks.exit_codes(60) == [4, 4]
        assert ("no usable checkpoint" if damaged else "optimizer.learning_rate (0.002 -> 0.001)") in log.read_text()
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(aside, run / "checkpoints")
    (run / "checkpoints" / whole[-1].name / "state-00000.safetensors").unlink()
    finish(server, flags, run)
    assert f"warning: checkpoint {whole[-1].name}" in log.read_text()
    assert compare(unbroken, run) == []


@pytest.mark.fault(5)
def test_signals_to_the_launcher_reach_the_ranks(server, flags, unbroken, tmp_path, injected):
    """To `deepspeed`, to the launcher below it, and to all of them at once."""
    run = tmp_path / "run"
    cases = [(number, target) for number in SIGNALS for target in ("deepspeed", "launch", "all")]
    for number, target in cases:
        before = steps_taken(run)
        with started(distill_command(*flags, "--out", str(run), ranks=2)) as process:
            wait_for(lambda before=before: steps_taken(run) >= before + 2)
            ranks = ranks_of(process)
            (launch,) = {rank.parent() for rank in ranks}
            if target == "all":
                os.killpg(process.pid, number)
            else:
                os.kill(process.pid if target == "deepspeed" else launch.pid, number)
            assert gone(ranks, within=30), (number, target)
        assert not (run / "DONE").exists()
        assert saved_step(run) == steps_taken(run), "a step was lost"
    finish(server, flags, run)
    differences = compare(unbroken, run)
    injected(len(cases), 0 if differences else len(cases))
    assert not differences


@pytest.mark.fault(2)
def test_five_killed_launchers_leave_no_orphan(server, flags, unbroken, tmp_path, injected):
    run = tmp_path / "run"
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m", "pipeline.distill", *flags]
    for launcher in ("deepspeed", "launch", "deepspeed", "launch", "torchrun"):
        command = torchrun if launcher == "torchrun" else distill_command(*flags, ranks=2)
        before = steps_taken(run)
        with started([*command, "--out", str(run)]) as process:
            wait_for(lambda before=before: steps_taken(run) >= before + 2)
            ranks = ranks_of(process)
            above = {rank.parent() for rank in ranks}
            for parent in above | ({psutil.Process(process.pid)} if launcher == "deepspeed" else set()):
                parent.kill()
            assert gone(ranks, within=10), f"ranks outlived {launcher}"
        assert not (run / "DONE").exists()
        assert saved_step(run) == steps_taken(run), "a step was lost"
    finish(server, flags, run)
    differences = compare(unbroken, run)
    injected(5, 0 if differences else 5)
    assert not differences
    assert len(json_lines(run / "ledger.jsonl")) == STEPS
