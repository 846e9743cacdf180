"""Pruning and upcycling hold a few layers, whatever the size of the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.files import write_json
from launching import PROJECT, environment
from pipeline.state_files import write_tensors
from tiny_decoders import WORDS, decoder_config, write_blocks, write_decoder, write_word_tokenizer

WIDTH, FFN, NUM_LAYERS = 1024, 2816, 16
LAYER_BYTES = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * FFN)

# Prints the peak of this process, which imports and a tiny model have made before, and that of the conversion.
MEASURE = """
import json, sys
from pathlib import Path
from pipeline import cli

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

tiny, real = json.loads(sys.argv[1])
assert cli.main(tiny) == 0
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
assert cli.main(real) == 0
print("PEAK", memory("VmHWM") - before)
"""


def write_big(folder: Path) -> Path:
    """A LLaMA of 0.4 GB in bf16, written layer by layer."""
    folder.mkdir()
    changes = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": NUM_LAYERS, "dtype": "bfloat16"}
    config = decoder_config("llama", num_attention_heads=8, num_key_value_heads=8, **changes)
    config.architectures = ["LlamaForCausalLM"]
    write_json(folder / "config.json", json.loads(config.to_json_string(use_diff=False)))
    write_word_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    outer = {name: random(len(WORDS), WIDTH) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    outer["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
    files = {"model-00000.safetensors": outer}
    weight_map = {}
    for index in range(NUM_LAYERS + 1):
        name, tensors = f"model-{index:05d}.safetensors", files.get(f"model-{index:05d}.safetensors")
        if tensors is None:
            prefix = f"model.layers.{index - 1}."
            shapes = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (WIDTH, WIDTH))
            shapes |= {"mlp.gate_proj": (FFN, WIDTH), "mlp.up_proj": (FFN, WIDTH), "mlp.down_proj": (WIDTH, FFN)}
            tensors = {f"{prefix}{part}.weight": random(*shape) for part, shape in shapes.items()}
            for part in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{part}.weight"] = torch.ones(WIDTH, dtype=torch.bfloat16)
        write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return folder


def peak(tiny: list[str], real: list[str]) -> float:
    """Bytes that the second command needs at most beyond what the first has left, in layers of the parent."""
    # glibc would keep what tensors of this size leave behind; those of a 7B model are given back at once.
    env = environment(PYTHONPATH=f"{PROJECT}:{PROJECT / 'kernels'}", MALLOC_MMAP_THRESHOLD_="65536")
    command = [sys.executable, "-c", MEASURE, json.dumps([tiny, real])]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=400)
    assert found.returncode == 0, found.stderr
    return int(found.stdout.split("PEAK")[1]) / LAYER_BYTES


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_conversions_hold_a_few_layers_of_sixteen(tmp_path):
    big, tiny = write_big(tmp_path / "big"), write_decoder(tmp_path / "tiny")
    rows = write_blocks(tmp_path / "rows", rows=64)

    def prune(model: Path, importance: str, *shape: str) -> list[str]:
        out = tmp_path / f"{model.name}-{importance}"
        command = ["prune", "--model", str(model), "--shards", str(rows), "--out", str(out)]
        return [*command, "--importance", importance, "--calibration-rows", "32", *shape]

    def upcycle(model: Path, name: str, *more: str) -> list[str]:
        return ["upcycle", "--model", str(model), "--out", str(tmp_path / f"{model.name}-{name}"), *more]

    smaller = ("--hidden-size", "768", "--num-heads", "6", "--intermediate-size", "2048", "--num-layers", "10")
    redraw = ("--reinitialize-fraction", "0.5")
    found = {
        "prune, activation": peak(prune(tiny, "activation"), prune(big, "activation", *smaller)),
        "prune, taylor": peak(prune(tiny, "taylor"), prune(big, "taylor", *smaller)),
        "upcycle to 4 experts": peak(upcycle(tiny, "copies"), upcycle(big, "copies")),
        "with redrawn neurons": peak(upcycle(tiny, "redrawn", *redraw), upcycle(big, "redrawn", *redraw)),
    }
    print({name: round(layers, 2) for name, layers in found.items()}, "of", LAYER_BYTES / 1e6, "MB")
    assert all(layers < 6 for layers in found.values()), found
