"""`capgap checkpoint`: what is in a checkpoint, whether it is whole, and one file out of many."""

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.files import write_json
from pipeline.checkpoint_tool import main
from pipeline.checkpoints import FORMAT, RECORD, _record_hash, trained_weights, verified_record
from pipeline.state_files import write_pieces
from pipeline.state_pieces import Piece


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Two ranks, each with a part of a matrix and one with a frozen vector."""
    path = tmp_path / "run" / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    matrix = torch.arange(12.0).view(3, 4)
    files = {}
    for rank, run in enumerate((slice(0, 5), slice(5, 12))):
        flat = {name: factor * matrix.flatten()[run] for name, factor in
                (("weight", 1), ("exp_avg", 2), ("exp_avg_sq", 3))}  # fmt: skip
        pieces = [Piece("layer.weight", run.start, (3, 4), flat, slice(0, run.stop - run.start))]
        if rank == 1:
            pieces.append(Piece("frozen", 0, (2,), {"weight": torch.ones(2, dtype=torch.bfloat16)}, slice(0, 2)))
        name = f"state-{rank:05d}.safetensors"
        files[name] = write_pieces(path / name, pieces)
        files[f"rank-{rank:05d}.json"] = write_json(path / f"rank-{rank:05d}.json", {"random": {}})
    record = {
        "format": FORMAT,
        "position": {"step": 3, "tokens": 1200},
        "topology": {"world_size": 2, "zero_stage": 2, "precision": "bf16", "expert_parallel_size": 2},
        "updates": 3,
        "fingerprints": {},
        "files": files,
    }
    write_json(path / RECORD, record | {"hash": _record_hash(record)})
    return path


def test_show_says_where_the_run_was_and_how_it_was_cut(checkpoint, capsys):
    assert main(["show", str(checkpoint.parent.parent)]) == 0
    shown = capsys.readouterr().out
    assert "step 3, 1,200 tokens, 3 updates; 2 ranks, ZeRO 2, expert_parallel_size 2, bf16" in shown


@pytest.mark.fault(9)
def test_verify_names_the_damaged_file(checkpoint, capsys):
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000006"))
    assert main(["verify", str(checkpoint.parent)]) == 0
    data = bytearray((checkpoint / "state-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "state-00001.safetensors").write_bytes(data)
    assert main(["verify", str(checkpoint.parent)]) == 4
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert "step-00000003: damaged" in lines[0] and "state-00001.safetensors" in lines[0]
    assert "step-00000006: whole" in lines[1]


def test_convert_writes_whole_tensors_that_read_the_same(checkpoint, tmp_path):
    assert main(["convert", str(checkpoint), "--out", str(tmp_path / "merged")]) == 0
    merged = tmp_path / "merged" / checkpoint.name
    assert [path.name for path in sorted(merged.glob("state-*"))] == ["state-00000.safetensors"]
    assert verified_record(merged)["topology"] == verified_record(checkpoint)["topology"]
    before, after = trained_weights(checkpoint), trained_weights(merged)
    assert before.keys() == after.keys() == {"layer.weight", "frozen"}
    assert all(before[name].equal(after[name]) for name in before)
    assert after["layer.weight"].equal(torch.arange(12.0).view(3, 4))


def test_a_file_as_other_tools_read_it(checkpoint):
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "state-00001.safetensors")
    assert tensors["weight/layer.weight"].tolist() == list(range(5, 12))
    assert tensors["weight/frozen"].dtype == torch.bfloat16


def test_elements_that_no_file_holds_are_named(checkpoint):
    from data_prep.errors import CheckpointError

    (checkpoint / "state-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"elements 0 to 12 of weight of layer.weight are missing"):
        trained_weights(checkpoint)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "{empty}"], "no checkpoint there"),
        (["convert", "{checkpoint}"], "--out is missing"),
        (["convert", "{root}", "--out", "x"], "holds 2 checkpoints"),
    ],
)
def test_a_wrong_call_says_how_to_mend_it(checkpoint, tmp_path, capsys, words, message):
    shutil.copytree(checkpoint, checkpoint.with_name("step-00000006"))
    names = {"empty": tmp_path / "empty", "checkpoint": checkpoint, "root": checkpoint.parent}
    assert main([word.format(**names) for word in words]) == 2
    assert message in capsys.readouterr().err
