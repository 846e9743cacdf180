"""The benchmark of the 7B step: it has the shapes that it claims, its losses are the same, and it runs."""

import os
import subprocess
import sys

import torch

from launching import PROJECT, environment
from pipeline.benchmarks.bench_llm import LOSS, SIZES, configs, flop_per_token, naive_losses, random_batch
from pipeline.losses import compute_losses
from pipeline.models.decoders import CausalTeacher, DecoderStudent
from pipeline.models.sizes import num_active_parameters, num_parameters


def models(name: str, device: str) -> list:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return [AutoModelForCausalLM.from_config(config) for config in configs(SIZES[name])]


def test_the_shapes_are_7b_and_about_3b_active():
    teacher, student = models("7b", "meta")
    assert num_parameters(teacher) == 6_738_415_616
    assert 4.7e9 < num_parameters(student) < 4.8e9 and 2.9e9 < num_active_parameters(student) < 3.0e9
    flop, length = flop_per_token(SIZES["7b"]), 4096
    # Twice the weights that multiply (all but the embedding), and half the attention scores of both kinds.
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    assert flop["teacher"] == 2 * weights + 2 * 32 * 4096 * length


def test_full_logits_give_the_same_losses():
    teacher, student = models("toy", "cpu")
    batch = random_batch(SIZES["toy"], torch.device("cpu"))
    student = DecoderStudent(student, num_ids=SIZES["toy"].vocabulary)
    weights = {"logit_kl": 0.5, "cross_entropy": 0.5, "router_z": 0.001}
    seen, said = student(batch), CausalTeacher(teacher)(batch)
    ours = compute_losses(weights, seen, said, LOSS)
    naive = naive_losses(weights, seen, said, LOSS)
    torch.testing.assert_close(naive.total, ours.total)


def test_it_runs_at_toy_size_on_a_cpu():
    command = [sys.executable, "-m", "pipeline.benchmarks.bench_llm", "--size", "toy", "--rounds", "1"]
    env = environment(PYTHONPATH=os.pathsep.join([str(PROJECT), str(PROJECT / "kernels")]))
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert all(f"{variant}: " in done.stdout for variant in ("online", "naive", "cached"))
    assert done.stdout.count("tokens/s") == 3
