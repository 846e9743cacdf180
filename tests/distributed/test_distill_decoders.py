"""Decoders under the real launcher: two ranks equal one, stop and resume, training on text alone."""

import os
import signal
from pathlib import Path

import pytest

from launching import distill, distill_command, exported_weights, json_lines, numbers_of, started, wait_for
from tiny_decoders import RECIPE, write_blocks, write_decoder

# Adam turns the rounding of gradients near 0 into steps of full size; not so with this.
STEADY = ("--optimizer.epsilon", "1e-5")


@pytest.fixture(scope="module")
def decoder_run(tmp_path_factory) -> Path:
    """A folder with a LLaMA teacher whose head is padded, a Mixtral student, packed rows and a recipe."""
    folder = tmp_path_factory.mktemp("decoders")
    teacher = write_decoder(folder / "teacher", "llama", num_hidden_layers=3, vocab_size=112)
    student = write_decoder(folder / "student", "mixtral", seed=1)
    rows = write_blocks(folder / "rows")
    recipe = RECIPE.format(out=folder / "run", shards=rows, teacher=teacher, student=student)
    (folder / "recipe.yaml").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def big_batch(decoder_run) -> Path:
    """One process, one micro-batch per step: what every other cut of the batch must equal."""
    out = decoder_run / "big"
    recipe = str(decoder_run / "recipe.yaml")
    code, output = distill("--config", recipe, "--out", str(out), "--batch.micro_size", "16", *STEADY)
    assert code == 0, output
    return out


@pytest.mark.parametrize(
    ("ranks", "micro", "ds_config", "placement", "experts"),
    [(None, 4, "zero0", "auto", 1), (2, 4, "zero2", "sharded", 2)],
    ids=[
        "four accumulation steps",
        "two ranks that share experts beside a sharded teacher, two accumulation steps each, ZeRO 2",
    ],
)
def test_however_a_decoders_batch_is_cut_the_weights_are_the_same(
    decoder_run, big_batch, ranks, micro, ds_config, placement, experts
):
    out = decoder_run / f"cut-{ds_config}"
    flags = ("--batch.micro_size", str(micro), "--engine.ds_config", f"ds_configs/{ds_config}.json")
    flags += ("--teacher.placement", placement, "--teacher.micro_size", "2")
    flags += ("--engine.expert_parallel_size", str(experts), *STEADY)
    code, output = distill("--config", str(decoder_run / "recipe.yaml"), "--out", str(out), *flags, ranks=ranks)
    assert code == 0, output
    assert ("teacher: its layers are sharded over 2 ranks" in output) == (placement == "sharded")
    expected, ours = exported_weights(big_batch), exported_weights(out)
    assert max(float((ours[name] - expected[name]).abs().max()) for name in expected) < 2e-6
    for line, unbroken in zip(numbers_of(out), numbers_of(big_batch), strict=True):
        for name, value in unbroken.items():
            assert line[name] == pytest.approx(value, abs=5e-6), (name, unbroken["step"])


def test_a_decoder_that_is_stopped_and_resumed_on_two_ranks_equals_the_unbroken_run_bit_for_bit(decoder_run):
    unbroken, broken = decoder_run / "unbroken", decoder_run / "broken"
    flags = ["--config", str(decoder_run / "recipe.yaml"), "--steps", "16", "--checkpoint.every_steps", "5"]
    code, output = distill(*flags, "--out", str(unbroken), ranks=2)
    assert code == 0, output
    again = [*flags, "--out", str(broken)]
    ledger = broken / "ledger.jsonl"
    with started(distill_command(*again, ranks=2)) as process:
        wait_for(lambda: ledger.exists() and len(ledger.read_text().splitlines()) >= 4, seconds=200)
        os.killpg(process.pid, signal.SIGUSR1)
        process.communicate(timeout=200)
    assert not (broken / "DONE").exists()
    code, output = distill(*again, ranks=2)
    assert code == 0 and "resumed from" in output, output
    assert numbers_of(broken) == numbers_of(unbroken)
    assert json_lines(broken / "ledger.jsonl") == json_lines(unbroken / "ledger.jsonl")
    ours, expected = exported_weights(broken), exported_weights(unbroken)
    assert all(ours[name].equal(expected[name]) for name in expected)


def test_without_a_teacher_a_decoder_of_the_recipes_sizes_learns_from_text_and_exports_what_it_trained(decoder_run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = decoder_run / "pretrained"
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    flags = [word for name, value in sizes.items() for word in (f"--student.{name}", str(value))]
    flags += ["--student.init_from", "null", "--student.intermediate_size", "64", "--teacher.model", "null"]
    flags += ["--loss.logit_kl", "0", "--loss.cross_entropy", "1", "--steps", "30", "--optimizer.learning_rate", "1e-2"]
    flags += ["--engine.precision", "bf16", "--engine.activation_checkpointing", "true"]
    code, output = distill("--config", str(decoder_run / "recipe.yaml"), "--out", str(out), *flags)
    assert code == 0, output
    losses = [line["train/cross_entropy"] for line in numbers_of(out)]
    assert losses[-1] < losses[0] - 0.5
    model = AutoModelForCausalLM.from_pretrained(out / "export")
    assert model.config.model_type == "llama" and model.dtype == torch.bfloat16
    tokens = AutoTokenizer.from_pretrained(out / "export")("word1 word2", return_tensors="pt")["input_ids"]
    assert model.generate(tokens, max_new_tokens=3).shape[1] > tokens.shape[1]
