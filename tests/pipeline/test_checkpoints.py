"""Checkpoints: complete or absent, never a wrong step, whatever is killed, lost or flipped."""

import errno
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data_prep.errors import CapgapError, CheckpointError
from data_prep.files import watching_operations
from pipeline.checkpoint_copies import Copies, copy_checkpoint
from pipeline.checkpoints import (
    RECORD,
    Position,
    Topology,
    checkpoint_name,
    keep_last,
    load,
    newest_valid,
    save,
    verified_record,
)
from pipeline.parallel import Ranks

TOPOLOGY = Topology(world_size=1, zero_stage=0, precision="fp32", expert_parallel_size=1)


class Crash(BaseException):
    """What a killed process looks like from inside: nothing is cleaned up."""


class PlainEngine:
    """What a checkpoint asks of a DeepSpeed engine without ZeRO: a module and its AdamW."""

    def __init__(self, seed: int = 0, width: int = 6):
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(width, 5), nn.Dropout(0.5), nn.LayerNorm(5))
        self.counted = torch.zeros(3, dtype=torch.int64)
        self.module.register_buffer("counted", self.counted)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def zero_optimization_stage(self) -> int:
        return 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.module(torch.ones(4, 6)).pow(2).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.counted += 1

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.module.state_dict().items()}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Ranks(0, 0, 1, torch.device("cpu"), dist.new_group(backend="gloo"), store)
    dist.destroy_process_group()


def write(root: Path, engine: PlainEngine, ranks: Ranks, step: int) -> Path:
    return save(
        root,
        engine,
        ranks,
        position=Position(step, 100 * step),
        topology=TOPOLOGY,
        rank_state={"window": {"steps": step}},
        fingerprints={"data": "abc"},
    )


@pytest.fixture
def saved(tmp_path, ranks) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A folder with the checkpoints of steps 2 and 4, and the weights that each must give back."""
    root, engine, weights = tmp_path / "checkpoints", PlainEngine(), {}
    for step in (2, 4):
        engine.train(2)
        weights[step] = engine.weights()
        write(root, engine, ranks, step)
    return root, weights


def resumed(root: Path, ranks: Ranks) -> tuple[int, dict[str, torch.Tensor]]:
    """Step and weights of a fresh engine after a resume."""
    found = newest_valid(root)
    assert found is not None
    engine = PlainEngine(seed=9)
    position, states = load(*found, engine, ranks, TOPOLOGY, seed=0)
    assert states[0]["window"] == {"steps": position.step}
    assert position.tokens == 100 * position.step
    assert found[0].name == checkpoint_name(position.step)
    return position.step, engine.weights()


def check_resume(root: Path, ranks: Ranks, weights: dict[int, dict[str, torch.Tensor]], *allowed: int) -> int:
    """Asserts that a resume finds one of the allowed steps with that step's weights; returns the step."""
    step, found = resumed(root, ranks)
    assert step in allowed
    assert all(found[name].equal(weights[step][name]) for name in weights[step])
    return step


def test_training_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path, ranks):
    """With dropout on: weights, moments, step count and random state all come back."""
    unbroken = PlainEngine()
    unbroken.train(3)
    path = write(tmp_path, unbroken, ranks, 3)
    unbroken.train(4)
    again = PlainEngine(seed=5)
    load(path, verified_record(path), again, ranks, TOPOLOGY, seed=0)
    again.train(4)
    for name, tensor in unbroken.weights().items():
        assert tensor.equal(again.weights()[name]), name


def test_a_folder_without_checkpoints_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path / "none") is None
    assert newest_valid(tmp_path) is None


def operations_of(action) -> list[str]:
    seen: list[str] = []
    with watching_operations(lambda operation, path: seen.append(f"{operation} {path.name}")):
        action()
    return seen


@pytest.mark.parametrize("same_step", [False, True], ids=["the next step", "a damaged one again"])
@pytest.mark.fault(3)
def test_a_crash_at_any_operation_leaves_a_checkpoint_that_is_whole(saved, ranks, monkeypatch, same_step, injected):
    # So that a few hundred bytes have several middles to be killed in.
    monkeypatch.setattr("data_prep.files.WRITE_PIECE", 96)
    root, weights = saved
    engine = PlainEngine()
    load(root / checkpoint_name(4), verified_record(root / checkpoint_name(4)), engine, ranks, TOPOLOGY, seed=0)
    engine.train(2)
    step = 6
    weights[step] = engine.weights()
    if same_step:
        shutil.copytree(root / checkpoint_name(4), root / checkpoint_name(6))  # says 4 inside: never valid as 6
        (root / checkpoint_name(6) / RECORD).write_text("{", encoding="utf-8")
    before = root.parent / "before"
    shutil.copytree(root, before)

    def save_and_tidy() -> None:
        keep_last(write(root, engine, ranks, step), 1)

    operations = operations_of(save_and_tidy)
    assert len(operations) >= 75
    injected(len(operations))
    assert [path.name for path in root.iterdir()] == [checkpoint_name(6)]
    found = []
    for crash_at in range(len(operations)):
        shutil.rmtree(root)
        shutil.copytree(before, root)
        countdown = iter(range(crash_at, -1, -1))

        def crash(operation, path, countdown=countdown):
            if next(countdown) == 0:
                raise Crash

        with pytest.raises(Crash), watching_operations(crash):
            save_and_tidy()
        found.append(check_resume(root, ranks, weights, 4, 6))
        # The same command again finishes the work.
        save_and_tidy()
        assert check_resume(root, ranks, weights, 6) == 6
    assert found == sorted(found) and set(found) == {4, 6}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.fault(6)
def test_a_full_disk_at_any_operation_is_one_line_and_keeps_what_was_complete(saved, ranks, code, injected):
    root, weights = saved
    engine = PlainEngine()
    load(root / checkpoint_name(4), verified_record(root / checkpoint_name(4)), engine, ranks, TOPOLOGY, seed=0)
    engine.train(2)
    weights[6] = engine.weights()
    operations = operations_of(lambda: write(root, engine, ranks, 6))
    # A rename that only changes names needs no space, and what follows it comes after the checkpoint is complete.
    writing = ("mkdir", "open", "write", "fsync")
    needing_space = [index for index, name in enumerate(operations) if name.split()[0] in writing]
    assert len(needing_space) >= 8
    injected(len(needing_space))
    for full_at in needing_space:
        shutil.rmtree(root / checkpoint_name(6), ignore_errors=True)
        count = iter(range(1000))

        def fill(operation, path, count=count, full_at=full_at):
            if next(count) >= full_at and operation in writing:
                raise OSError(code, os.strerror(code), str(path))

        with pytest.raises(CheckpointError, match="writing") as caught, watching_operations(fill):
            write(root, engine, ranks, 6)
        assert "\n" not in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        check_resume(root, ranks, weights, 4)
    write(root, engine, ranks, 6)
    check_resume(root, ranks, weights, 6)


PASSING = ("rename", "stat")


@pytest.mark.fault(33)
def test_names_that_show_up_late_and_renames_that_fail_once_do_not_hurt(saved, ranks, monkeypatch, injected):
    monkeypatch.setattr("data_prep.files.RETRY_DELAYS", (0.0, 0.0))
    root, weights = saved
    engine = PlainEngine()
    load(root / checkpoint_name(4), verified_record(root / checkpoint_name(4)), engine, ranks, TOPOLOGY, seed=0)
    engine.train(2)
    weights[6] = engine.weights()
    operations = operations_of(lambda: write(root, engine, ranks, 6))
    places = [index for index, name in enumerate(operations) if name.split()[0] in PASSING]
    assert len(places) >= 7
    injected(2 * len(places))
    for place in places:
        for tries in (2, 99):
            shutil.rmtree(root / checkpoint_name(6), ignore_errors=True)
            count, failures = iter(range(1000)), iter(range(tries))

            def delay(operation, path, count=count, failures=failures, place=place):
                if next(count) >= place and operation in PASSING and next(failures, None) is not None:
                    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

            with watching_operations(delay):
                if tries == 2:
                    write(root, engine, ranks, 6)
                else:
                    with pytest.raises(CheckpointError, match="writing"):
                        write(root, engine, ranks, 6)
            check_resume(root, ranks, weights, 6 if tries == 2 else 4)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a bit flipped in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "a bit flipped at the end": lambda path: flip(path, -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.fault(9)
def test_every_damaged_file_is_noticed_and_the_checkpoint_before_is_used(saved, ranks, capsys, damage, injected):
    root, weights = saved
    newest = root / checkpoint_name(4)
    files = files_of(newest)
    assert len(files) == 3
    injected(len(files))
    for file in files:
        content = file.read_bytes()
        DAMAGES[damage](file)
        if file.name == RECORD and damage == "a bit flipped at the end":
            file.write_bytes(content)  # The last byte of the record is a line break, which says nothing.
            continue
        check_resume(root, ranks, weights, 2)
        assert f"warning: checkpoint {newest.name}: " in capsys.readouterr().err
        file.write_bytes(content)
    check_resume(root, ranks, weights, 4)


@pytest.mark.fault(9)
def test_no_flipped_bit_in_the_record_resumes_at_a_wrong_step(saved, injected):
    """The record holds the step; it must not be the one file that nothing vouches for."""
    root, _ = saved
    path = root / checkpoint_name(4)
    content = (path / RECORD).read_bytes()
    whole = verified_record(path)
    until_files = content.index(b'"files"')
    places = [*range(until_files), *range(until_files, len(content), 7)]
    injected(len(places))
    for place in places:
        (path / RECORD).write_bytes(content)
        flip(path / RECORD, place)
        try:
            assert verified_record(path) == whole
        except CheckpointError:
            continue


@pytest.mark.fault(9)
def test_files_of_another_step_do_not_pass(saved, ranks, injected):
    root, weights = saved
    injected(2)
    for name in (path.name for path in files_of(root / checkpoint_name(4)) if path.name != RECORD):
        file = root / checkpoint_name(4) / name
        content = file.read_bytes()
        shutil.copyfile(root / checkpoint_name(2) / name, file)
        check_resume(root, ranks, weights, 2)
        file.write_bytes(content)


@pytest.mark.fault(9)
def test_when_all_are_damaged_the_run_stops_instead_of_starting_over(saved):
    root, _ = saved
    for path in root.iterdir():
        (path / "rank-00000.json").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*: all 2 are damaged .*--out"):
        newest_valid(root)


@pytest.mark.fault(3)
def test_what_was_never_completed_is_ignored_and_named(saved, ranks, capsys):
    root, weights = saved
    shutil.copytree(root / checkpoint_name(4), root / f"{checkpoint_name(6)}.partial")
    check_resume(root, ranks, weights, 4)
    assert f"{checkpoint_name(6)}.partial: was never completed, ignored" in capsys.readouterr().err


@pytest.mark.fault(20)
def test_only_names_decide_which_is_newest(saved, ranks):
    root, weights = saved
    for age, step in ((10**9, 4), (10, 2)):
        for file in [root / checkpoint_name(step), *files_of(root / checkpoint_name(step))]:
            os.utime(file, (2 * 10**9 - age, 2 * 10**9 - age))
    check_resume(root, ranks, weights, 4)


@pytest.mark.fault(30)
def test_a_file_outside_the_folder_is_not_followed(saved, tmp_path, ranks, monkeypatch):
    import pipeline.checkpoints as module
    from data_prep.files import file_hash, read_json, write_json

    root, _ = saved
    path = root / checkpoint_name(4)
    (tmp_path / "elsewhere").write_text("x", encoding="utf-8")
    record = read_json(path / RECORD, "")
    record["files"]["../../elsewhere"] = file_hash(tmp_path / "elsewhere")
    write_json(path / RECORD, record | {"hash": module._record_hash(record)})
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        verified_record(path)


def test_the_last_ones_are_kept_and_partial_ones_before_them_go(saved, ranks):
    root, _ = saved
    engine = PlainEngine()
    engine.train(1)
    (root / f"{checkpoint_name(1)}.partial").mkdir()
    (root / f"{checkpoint_name(9)}.partial").mkdir()
    keep_last(write(root, engine, ranks, 6), 2)
    expected = [checkpoint_name(4), checkpoint_name(6), f"{checkpoint_name(9)}.partial"]
    assert sorted(path.name for path in root.iterdir()) == expected


class Payload:
    """Pickled, it creates a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.fault(30)
def test_pickles_in_a_checkpoint_are_never_opened(saved, tmp_path, ranks, injected):
    """Not even where a forged record vouches for them, and not those that other programs would look for."""
    from data_prep.files import content_hash, read_json, write_json
    from pipeline.checkpoints import _record_hash

    root, weights = saved
    path, marker = root / checkpoint_name(4), tmp_path / "ran"
    pickled = pickle.dumps(Payload(marker))
    pickle.loads(pickled).close()
    assert marker.exists(), "the payload does nothing"
    marker.unlink()
    record = read_json(path / RECORD, "")
    names = sorted(record["files"])
    injected(len(names) + 1)
    for name in names:
        content = (path / name).read_bytes()
        (path / name).write_bytes(pickled)
        forged = {**record, "files": {**record["files"], name: content_hash(pickled)}}
        forged["hash"] = _record_hash(forged)
        write_json(path / RECORD, forged)
        with pytest.raises(CapgapError, match=name):
            resumed(root, ranks)
        (path / name).write_bytes(content)
    write_json(path / RECORD, record)
    for name in ("mp_rank_00_model_states.pt", "optimizer.pt", ".metadata", "pytorch_model.bin", "latest"):
        (path / name).write_bytes(pickled)
        (root / name).write_bytes(pickled)
    check_resume(root, ranks, weights, 4)
    assert not marker.exists()


@pytest.mark.fault(9)
def test_a_damaged_later_checkpoint_does_not_push_out_the_good_one_before_it(saved, ranks, capsys):
    """Back from 4 (damaged) to 2, then on to 3: keeping one must keep 3, not the ruin of 4."""
    root, weights = saved
    (root / checkpoint_name(4) / "rank-00000.json").unlink()
    engine = PlainEngine(seed=3)
    load(root / checkpoint_name(2), verified_record(root / checkpoint_name(2)), engine, ranks, TOPOLOGY, seed=0)
    engine.train(1)
    weights[3] = engine.weights()
    keep_last(write(root, engine, ranks, 3), 1)
    check_resume(root, ranks, weights, 3)
    assert not (root / checkpoint_name(2)).exists()


@pytest.mark.fault(9)
def test_another_precision_or_another_student_is_refused(saved, ranks, injected):
    root, _ = saved
    path = root / checkpoint_name(4)
    injected(2)
    other = Topology(world_size=1, zero_stage=0, precision="bf16", expert_parallel_size=1)
    with pytest.raises(CapgapError, match=r"written with precision fp32, this run has bf16"):
        load(path, verified_record(path), PlainEngine(), ranks, other, seed=0)
    with pytest.raises(CapgapError, match=r"0\.weight has shape"):
        load(path, verified_record(path), PlainEngine(width=7), ranks, TOPOLOGY, seed=0)


# A second place


@pytest.fixture
def copies(saved, tmp_path) -> Path:
    """Where copies go; the run's own record, which goes with them, is there."""
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    return tmp_path / "elsewhere"


@pytest.mark.fault(6)
def test_a_new_checkpoint_that_reads_back_wrong_removes_no_older_one(saved, ranks):
    root, weights = saved
    engine = PlainEngine()

    def lie(operation, path):
        if operation == "read" and path.suffix == ".safetensors":
            flip(path, -1)

    wrong = pytest.raises(CheckpointError, match=r"state-00000.safetensors reads back with hash")
    with wrong as caught, watching_operations(lie):
        keep_last(write(root, engine, ranks, 6), 1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in root.iterdir()) == [checkpoint_name(2), checkpoint_name(4)]
    check_resume(root, ranks, weights, 4)


def test_a_copy_resumes_as_the_original_and_the_newest_of_both_places_is_taken(saved, copies, ranks, capsys):
    root, weights = saved
    copy_checkpoint(root / checkpoint_name(4), copies)
    assert verified_record(copies / checkpoint_name(4)) == verified_record(root / checkpoint_name(4))
    assert (copies / "run.json").exists()
    assert newest_valid(root, copies)[0].parent == root
    (root / checkpoint_name(4) / "rank-00000.json").unlink()
    assert newest_valid(root, copies)[0].parent == copies
    assert f"warning: checkpoint {checkpoint_name(4)}" in capsys.readouterr().err
    shutil.rmtree(root)
    check_resume(copies, ranks, weights, 4)
    assert newest_valid(root, copies)[0].parent == copies
    assert newest_valid(root, copies.parent / "not mounted") is None


@pytest.mark.fault(3)
def test_a_crash_at_any_operation_of_a_copy_leaves_no_damaged_one(saved, copies, ranks):
    root, weights = saved
    newest = root / checkpoint_name(4)
    copy_checkpoint(root / checkpoint_name(2), copies)
    operations = operations_of(lambda: copy_checkpoint(newest, copies))
    shutil.rmtree(copies / newest.name)
    for crash_at in range(len(operations)):
        countdown = iter(range(crash_at, -1, -1))

        def crash(operation, path, countdown=countdown):
            if next(countdown) == 0:
                raise Crash

        with pytest.raises(Crash), watching_operations(crash):
            copy_checkpoint(newest, copies)
        check_resume(copies, ranks, weights, 2, 4)
        copy_checkpoint(newest, copies)
        check_resume(copies, ranks, weights, 4)
        shutil.rmtree(copies / newest.name)


def test_copies_are_made_meanwhile_and_the_last_ones_are_kept(saved, copies, ranks):
    root, weights = saved
    thread = Copies(copies, keep=1)
    for step in (2, 4):
        thread.add(root / checkpoint_name(step))
        thread.finish()
    assert sorted(path.name for path in copies.iterdir()) == ["run.json", checkpoint_name(4)]
    assert thread.in_use is None
    check_resume(copies, ranks, weights, 4)


def test_what_cannot_be_copied_is_told_and_the_next_one_is_tried(saved, copies, capsys):
    root, _ = saved
    copies.write_text("a file in the way", encoding="utf-8")
    thread = Copies(copies, keep=1)
    thread.add(root / checkpoint_name(2))
    thread.finish()
    told = capsys.readouterr().err
    assert f"warning: {checkpoint_name(2)} is not copied to {copies}" in told and told.count("\n") == 1
    copies.unlink()
    thread.add(root / checkpoint_name(4))
    thread.finish()
    assert verified_record(copies / checkpoint_name(4))


def test_a_checkpoint_that_is_being_copied_is_not_removed(saved, ranks):
    root, _ = saved
    spare = root / checkpoint_name(2)
    keep_last(root / checkpoint_name(4), 1, spare=spare)
    assert spare.exists()
    keep_last(root / checkpoint_name(4), 1)
    assert not spare.exists()
