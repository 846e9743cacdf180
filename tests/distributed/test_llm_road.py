"""The whole road of language models at toy size: pretrain, prune, upcycle, cache, distil, compare with text alone."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from data_prep.shards import open_shards
from launching import PROJECT, distill, numbers_of
from pipeline import cli
from pipeline.batches import decoder_batch
from pipeline.config import LossConfig
from pipeline.losses import next_token
from pipeline.models.decoders import DecoderStudent
from pipeline.signals import Signals
from tiny_decoders import WORDS, write_blocks

RECIPES = PROJECT / "pipeline" / "recipes"


def cross_entropy(folder: Path, rows: Path) -> float:
    """Mean over the labels of held-out rows, in nats."""
    shards = open_shards(rows)
    batch = decoder_batch(shards.read(np.arange(len(shards))))
    student = DecoderStudent(AutoModelForCausalLM.from_pretrained(folder), num_ids=len(WORDS))
    with torch.no_grad():
        seen = student(batch)
        found = next_token(seen, Signals(batch.valid_BT), LossConfig(), {"cross_entropy": 1.0})
    return float(found.parts["cross_entropy"]) / int(batch.valid_BT.sum())


def test_from_text_to_a_mixture_that_beats_its_like_without_a_teacher(tmp_path):
    """The recipes of `make demo-llm`, on 150 rows of 24 words and with models of about 100,000 parameters."""
    rows = write_blocks(tmp_path / "rows", rows=150)
    held = write_blocks(tmp_path / "held", rows=40, seed=7)
    common = ["--data.shards", str(rows), "--batch.global_size", "32", "--batch.micro_size", "32"]

    def run(recipe: str, out: str, *flags: str) -> Path:
        words = ["--config", str(RECIPES / f"{recipe}.yaml"), "--out", str(tmp_path / out), *common, *flags]
        code, output = distill(*words, timeout=250)
        assert code == 0, output
        return tmp_path / out / "export"

    small = ["--student.hidden_size", "48", "--student.num_attention_heads", "4", "--student.intermediate_size", "96"]
    teacher = run("tiny-llm-teacher", "teacher", *small, "--steps", "120", "--optimizer.learning_rate", "1e-2")
    pruned, mixture, cached = (tmp_path / name for name in ("pruned", "mixture", "cached"))
    prune = ["prune", "--model", str(teacher), "--shards", str(rows), "--out", str(pruned)]
    assert cli.main([*prune, "--num-layers", "3", "--intermediate-size", "64"]) == 0
    assert cli.main(["upcycle", "--model", str(pruned), "--num-experts", "4", "--out", str(mixture)]) == 0
    assert cli.main(["cache", "--teacher", str(teacher), "--shards", str(rows), "--k", "16", "--out", str(cached)]) == 0

    start = ["--student.init_from", str(mixture), "--steps", "15"]
    student = run("tiny-llm", "student", *start, "--teacher.model", "null", "--teacher.cache", str(cached))
    scratch = run("tiny-llm-scratch", "scratch", *start)
    assert [line["tokens"] for line in numbers_of(student.parent)] == [
        line["tokens"] for line in numbers_of(scratch.parent)
    ]
    reached = {name: cross_entropy(folder, held) for name, folder in (("student", student), ("scratch", scratch))}
    assert reached["student"] < reached["scratch"] - 0.2, reached
    assert cross_entropy(teacher, held) < np.log(len(WORDS)) - 1
