"""The 7B recipes are planned from configs alone, and refused with three mends where they cannot fit."""

import shutil
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from launching import PROJECT
from pipeline import cli, preflight
from tiny_decoders import write_blocks, write_word_tokenizer

GIB = 2**30


def write_shape(folder: Path, config) -> Path:
    """A model folder that knows its shape and has no weights but one: who reads them anyway fails."""
    config.save_pretrained(folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    return write_word_tokenizer(folder)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, MixtralConfig

    root = tmp_path_factory.mktemp("shapes")
    llama = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    write_shape(root / "7b", LlamaConfig(intermediate_size=11008, **llama))
    small = {"hidden_size": 3072, "num_hidden_layers": 24, "num_attention_heads": 24, "intermediate_size": 8192}
    write_shape(root / "minima-3b", LlamaConfig(**small, **llama))
    mixture = {"num_key_value_heads": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
    write_shape(root / "minimix-4x3b", MixtralConfig(vocab_size=32000, **small, **mixture, **llama))
    write_blocks(root / "rows", rows=256)
    return root


def run_check(shapes: Path, recipe: str, *flags: str) -> int:
    paths = {"data.shards": "rows", "teacher.model": "7b", "student.init_from": recipe}
    words = [word for key, name in paths.items() for word in (f"--{key}", str(shapes / name))]
    path = str(PROJECT / "pipeline" / "recipes" / f"{recipe}.yaml")
    return cli.main(["check", "--config", path, "--ranks", "8", "--out", str(shapes / "run"), *words, *flags])


def with_memory(monkeypatch, num_bytes: int, disk: int = 2**50) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": num_bytes}))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Disk", (), {"free": disk}))
    monkeypatch.setattr(preflight, "check_port", lambda port: None)


@pytest.mark.parametrize("recipe", ["minima-3b", "minimix-4x3b"])
def test_7b_is_refused_where_it_cannot_fit_with_three_mends_in_order(shapes, monkeypatch, capsys, recipe):
    with_memory(monkeypatch, 24 * GIB)
    assert run_check(shapes, recipe) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: batch.micro_size") and "3072 MiB are free" in message, message
    # The recipes recompute already.
    mends = ("halve batch.micro_size", "teacher.cache (capgap cache)", "ds_configs/zero3.json")
    places = [message.index(mend) for mend in mends]
    assert places == sorted(places), message


def test_too_little_disk_and_too_little_memory_are_told_at_once(shapes, monkeypatch, capsys):
    with_memory(monkeypatch, 24 * GIB, disk=50 * GIB)
    assert run_check(shapes, "minima-3b") == 3
    message = capsys.readouterr().err
    assert f"bytes needed, {50 * GIB} free" in message and "3072 MiB are free" in message, message


@pytest.mark.parametrize(("recipe", "count"), [("minima-3b", 2_914_667_520), ("minimix-4x3b", 8_351_200_000)])
def test_where_there_is_room_the_plan_of_7b_is_printed(shapes, monkeypatch, capsys, recipe, count):
    with_memory(monkeypatch, 640 * GIB)
    assert run_check(shapes, recipe) == 0
    printed = capsys.readouterr().out
    assert "'parameters_served': 6738415616" in printed and "ok: nothing found" in printed
    student = int(printed.split("'parameters_served': ")[1].split(",")[0])
    assert abs(student - count) < 1e-3 * count


def test_the_estimate_divides_what_zero_and_shared_experts_divide(shapes):
    """Mixtral-size: weights, gradients and optimizer of a rank, by stage and by the ranks that share experts."""
    from dataclasses import replace

    from pipeline.building import build_models
    from pipeline.config import load_run_config
    from pipeline.models.sizes import estimate_memory
    from pipeline.preflight import check_run

    recipe = str(PROJECT / "pipeline" / "recipes" / "minimix-4x3b.yaml")
    paths = {"data.shards": "rows", "teacher.model": "7b", "student.init_from": "minimix-4x3b"}
    words = [word for key, name in paths.items() for word in (f"--{key}", str(shapes / name))]
    config = load_run_config(recipe, [*words, "--out", str(shapes / "run")])
    student, teacher = build_models(config, check_run(config, 8))
    numel = sum(parameter.numel() for parameter in student.parameters())
    experts = sum(p.numel() for name, p in student.named_parameters() if ".experts." in name)

    def estimate(zero: str, stage: int, shared: int = 1):
        engine = replace(config.engine, ds_config=f"ds_configs/{zero}.json", expert_parallel_size=shared)
        changed = replace(config, engine=engine)
        return estimate_memory(student, teacher, changed, zero_stage=stage, world_size=8, length=24, on_gpu=True)

    whole, spread = estimate("zero1", 1), estimate("zero1", 1, shared=4)
    assert whole.weights == 2 * numel and whole.optimizer == 12 * (numel // 8)
    assert spread.weights == 2 * (numel - experts + experts // 4) and spread.optimizer == whole.optimizer
    assert estimate("zero2", 2).gradients < whole.gradients / 2
    assert estimate("zero2_offload", 2).optimizer == 0
    assert estimate("zero3_offload", 3).weights == 0
    assert estimate("zero3", 3).total < estimate("zero2", 2).total < whole.total
