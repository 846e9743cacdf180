"""Between two logs the trainer asks no tensor for its value: on a GPU each such question would wait for all work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_decoders
from launching import PROJECT, environment

# What is asked once per optimizer step inside DeepSpeed: whether the update is to be skipped.
OF_DEEPSPEED = {
    "zero/stage_1_and_2.has_overflow: _local_scalar_dense": 1,
    "runtime/utils.is_invalid_grad_norm: _local_scalar_dense": 3,
}
# transformers asks once per forward whether a row holds several documents.
OF_TRANSFORMERS = {"models/decoders.run_packed: _local_scalar_dense", "models/decoders.<listcomp>: _local_scalar_dense"}


def asked_between_logs(recipe: Path, *flags: str) -> list[dict[str, int]]:
    """Questions per step, without those of the kernels' plain twins, which run on CPUs alone."""
    out = recipe.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).with_name("count_waits.py")), str(out), "--config", str(recipe)]
    still = ("--log.every_steps", "100", "--checkpoint.every_steps", "100", *flags)
    done = subprocess.run(
        [*command, *still], cwd=PROJECT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads(out.read_text())
    assert len(steps) == 7 and any("capgap_kernels" in name for name in steps[1])
    # The first step sets things up; what follows the last one belongs to its log.
    return [{name: n for name, n in step.items() if not name.startswith("capgap_kernels/")} for step in steps[1:6]]


def test_an_encoder_in_bf16(recipe):
    for step in asked_between_logs(recipe, "--engine.precision", "bf16", "--engine.ds_config", "ds_configs/zero2.json"):
        assert step.items() <= OF_DEEPSPEED.items(), step


@pytest.mark.slow
def test_a_decoder_at_zero_3(tmp_path):
    teacher = tiny_decoders.write_decoder(tmp_path / "teacher", "llama")
    student = tiny_decoders.write_decoder(tmp_path / "student", "mixtral", seed=1)
    rows = tiny_decoders.write_blocks(tmp_path / "rows")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_decoders.RECIPE.format(out=tmp_path / "run", shards=rows, teacher=teacher, student=student))
    for step in asked_between_logs(recipe, "--engine.ds_config", "ds_configs/zero3.json"):
        assert step.keys() <= OF_DEEPSPEED.keys() | OF_TRANSFORMERS, step
