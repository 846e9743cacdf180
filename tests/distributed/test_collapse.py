"""A router that sends everything to two of its eight experts: warned of, re-seeded, or the end of the run."""

import shutil
from pathlib import Path

import pytest
import torch

from launching import distill, exported_weights, numbers_of
from tiny_decoders import RECIPE, build_model, write_blocks, write_decoder, write_word_tokenizer

pytestmark = pytest.mark.fault(25)
ROUTER = "layers.0.mlp"


@pytest.fixture(scope="module")
def collapsed_recipe(tmp_path_factory) -> Path:
    """The student's first router knows one direction: tokens on its one side go to expert 0, all others to expert 1."""
    folder = tmp_path_factory.mktemp("collapse")
    student = build_model("mixtral", seed=1, num_local_experts=8, num_experts_per_tok=1)
    with torch.no_grad():
        gate_ED = student.model.layers[0].mlp.gate.weight
        direction = gate_ED[0] / gate_ED[0].norm()
        gate_ED.zero_()
        gate_ED[0], gate_ED[1] = 20 * direction, -20 * direction
    student.save_pretrained(folder / "student")
    write_word_tokenizer(folder / "student")
    teacher = write_decoder(folder / "teacher", "llama")
    rows = write_blocks(folder / "rows")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=folder / "run", shards=rows, teacher=teacher, student=folder / "student"))
    return recipe


def run(recipe: Path, name: str, *flags: str, ranks: int | None = None) -> tuple[Path, int, str]:
    out = recipe.parent / name
    often = ("--steps", "14", "--checkpoint.every_steps", "3", "--checkpoint.keep_last", "9")
    code, output = distill("--config", str(recipe), "--out", str(out), *often, *flags, ranks=ranks)
    return out, code, output


def dead_shares(out: Path) -> list[float]:
    return [line[f"router/{ROUTER}/dead_share"] for line in numbers_of(out)]


def test_dead_experts_come_back_and_a_resumed_run_reseeds_as_the_unbroken_one_did(collapsed_recipe):
    out, code, output = run(collapsed_recipe, "unbroken", "--engine.on_collapse", "reseed", "--batch.micro_size", "16")
    assert code == 0, output
    assert f"step 5: router/{ROUTER} is collapsing" in output
    assert f"step 5: router/{ROUTER}: experts [2, 3, 4, 5, 6, 7] begin again" in output
    assert max(dead_shares(out)[5:]) < min(dead_shares(out)[:5]) == 0.75
    numbers, weights = numbers_of(out), exported_weights(out)

    # Back to a checkpoint within the five logs that it takes to be sure.
    (out / "DONE").unlink()
    shutil.rmtree(out / "export")
    for path in (out / "checkpoints").iterdir():
        if path.name > "step-00000003":
            shutil.rmtree(path)
    out, code, output = run(collapsed_recipe, "unbroken", "--engine.on_collapse", "reseed", "--batch.micro_size", "16")
    assert code == 0 and "step 3 of 14" in output, output
    assert numbers_of(out) == numbers
    assert all(weight.equal(weights[name]) for name, weight in exported_weights(out).items())


def test_a_run_that_is_to_stop_ends_with_a_checkpoint(collapsed_recipe):
    out, code, output = run(collapsed_recipe, "stopped", "--engine.on_collapse", "stop", "--batch.micro_size", "16")
    assert code == 5 and f"router/{ROUTER} collapsed at step 5" in output, output
    assert "Traceback" not in output
    assert (out / "checkpoints" / "step-00000005" / "checkpoint.json").exists()
    assert dead_shares(out) == [0.75] * 5
