"""The memory estimate of the preflight against the peaks of real runs, libraries as imported not counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_decoders
from launching import PROJECT, environment
from tiny_runs import RECIPE, write_rows, write_teacher


def peak_and_estimate(recipe: Path, *flags: str) -> dict:
    out = recipe.with_name("memory.json")
    few = ("--steps", "3", "--checkpoint.every_steps", "3", *flags)
    command = [sys.executable, str(Path(__file__).with_name("memory_worker.py")), str(out), "--config", str(recipe)]
    done = subprocess.run([*command, *few], cwd=PROJECT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def check_close(found: dict) -> None:
    ratio = found["estimate"] / found["peak"]
    print(f"estimate / peak {ratio:.3f}: {found['parts']}, peak {found['peak'] / 2**20:.0f} MiB")
    assert 0.85 <= ratio <= 1.15, f"peak {found['peak'] / 2**20:.0f} MiB, estimate {found['parts']}"


@pytest.fixture(scope="module")
def encoder_recipe(tmp_path_factory) -> Path:
    """MiniMoE 3L;384H of a teacher 768 wide; rows of 16 tokens, so many that they make real batches."""
    folder = tmp_path_factory.mktemp("encoder")
    teacher = write_teacher(folder / "teacher", layers=6, hidden=768)
    recipe = RECIPE.format(out=folder / "run", shards=write_rows(folder / "rows", rows=512), teacher=teacher)
    first, last = recipe.index("student:"), recipe.index("loss:")
    student = "student: {num_experts: 4, dropout: 0.1}\n"
    (folder / "recipe.yaml").write_text(recipe[:first] + student + recipe[last:])
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def decoder_recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    words = [*tiny_decoders.WORDS[:4], *(f"word{number}" for number in range(7996))]
    sizes = {"vocab_size": len(words), "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 4}
    for name, kind, layers in (("teacher", "llama", 6), ("llama", "llama", 4), ("mixtral", "mixtral", 3)):
        tiny_decoders.write_decoder(folder / name, kind, **sizes, num_hidden_layers=layers)
        tiny_decoders.write_word_tokenizer(folder / name, words)
    rows = tiny_decoders.write_blocks(folder / "rows", rows=128, words=words)
    recipe = tiny_decoders.RECIPE.format(
        out=folder / "run", shards=rows, teacher=folder / "teacher", student=folder / "llama"
    )
    (folder / "recipe.yaml").write_text(recipe)
    return folder / "recipe.yaml"


def batch(rows: int) -> tuple[str, ...]:
    return ("--batch.micro_size", str(rows), "--batch.global_size", str(rows))


def test_an_encoder(encoder_recipe):
    check_close(peak_and_estimate(encoder_recipe, *batch(128), "--out", str(encoder_recipe.parent / "plain")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "flags"),
    [
        (256, ()),
        (128, ("--engine.ds_config", "ds_configs/zero0.json")),
        (128, ("--engine.ds_config", "ds_configs/zero2.json")),
        (128, ("--engine.ds_config", "ds_configs/zero3.json")),
        (128, ("--engine.precision", "bf16")),
        (256, ("--engine.activation_checkpointing", "true")),
    ],
    ids=["a larger batch", "ZeRO 0", "ZeRO 2", "ZeRO 3", "bf16", "recomputed"],
)
def test_an_encoder_otherwise(encoder_recipe, tmp_path, rows, flags):
    check_close(peak_and_estimate(encoder_recipe, *batch(rows), *flags, "--out", str(tmp_path / "run")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "flags"),
    [(64, ()), (128, ()), (64, ("--engine.precision", "bf16")), (64, ("mixtral",))],
    ids=["a LLaMA", "a larger batch", "bf16", "a Mixtral"],
)
def test_a_decoder(decoder_recipe, tmp_path, rows, flags):
    if flags == ("mixtral",):
        flags = ("--student.init_from", str(decoder_recipe.parent / "mixtral"))
    check_close(peak_and_estimate(decoder_recipe, *batch(rows), *flags, "--out", str(tmp_path / "run")))
