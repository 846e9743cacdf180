"""A sharded teacher says what a whole one does, and no rank ever holds the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launching import PROJECT, environment, free_port
from tiny_decoders import write_decoder

WORKER = Path(__file__).with_name("teacher_worker.py")


def load_on_two_ranks(teachers: list[Path], out: Path) -> list[dict]:
    shared = environment(
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
        PYTHONPATH=os.pathsep.join(str(PROJECT / part) for part in (".", "kernels", "tests")),
        # glibc would keep what tensors of this size leave behind; real ones are given back at once.
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(out), *map(str, teachers)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_a_rank_holds_its_share_of_the_teacher_and_few_layers_at_a_time(tmp_path):
    """The first teacher is there to be imported for, the others measure; the last is loaded whole at first."""
    wide = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    teachers = [
        write_decoder(tmp_path / "tied", tie_word_embeddings=True),
        write_decoder(tmp_path / "big", num_hidden_layers=16, **wide),
        write_decoder(tmp_path / "mixture", "qwen3_moe"),
    ]
    layer = 4 * (4 * 384**2 + 3 * 384 * 1024)
    for found in load_on_two_ranks(teachers, tmp_path):
        assert [teacher["difference"] for teacher in found.values()] == [0, 0, 0]
        big = found["big"]
        assert 8 * layer < big["held"] < 8.1 * layer, found
        assert big["loading"] < big["held"] + 3 * layer, found
        assert big["running"] < big["held"] + 7 * layer, found
