"""Upcycling: the mixture computes what its parent did, in every form of it, and goes on after a kill."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.errors import CapgapError
from data_prep.files import watching_operations
from pipeline.upcycle import UpcycleConfig, main, upcycle
from tiny_decoders import LENGTH, WORDS, write_decoder


def logits_of(folder, **options) -> torch.Tensor:
    ids = torch.arange(4, 4 + 3 * LENGTH).remainder(len(WORDS)).view(3, LENGTH)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(ids).logits


@pytest.mark.parametrize(
    ("kind", "changes", "options"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 16}, {"num_experts": 3}),
        ("mistral", {}, {"granularity": 4, "top_k": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}, {"granularity": 2}),
        ("qwen3", {}, {"granularity": 3, "num_experts": 3}),
        ("qwen3", {"num_hidden_layers": 3}, {"dense_layers": 2}),
    ],
    ids=["copies", "tied, wide heads", "virtual groups of one copy", "scaled rope", "virtual groups of two", "pyramid"],
)
def test_the_mixture_gives_the_logits_of_its_parent(tmp_path, kind, changes, options):
    parent = write_decoder(tmp_path / "parent", kind, **changes)
    upcycle(UpcycleConfig(model=str(parent), out=tmp_path / "mixture", **options))
    expected, ours = logits_of(parent), logits_of(tmp_path / "mixture")
    assert float((ours - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").config
    assert config.model_type == ("qwen3_moe" if kind == "qwen3" else "mixtral")
    assert (tmp_path / "mixture" / "tokenizer.json").is_file()
    # Readers of transformers 4 look for the rotary base elsewhere, and have another default for a Mixtral.
    written, rope = json.loads((tmp_path / "mixture" / "config.json").read_text()), config.rope_parameters
    assert written["rope_theta"] == rope["rope_theta"]
    assert written.get("rope_scaling", {}).get("factor") == rope.get("factor")


def test_drop_upcycling_redraws_the_asked_part_of_each_expert(tmp_path):
    parent = write_decoder(tmp_path / "parent")
    upcycle(UpcycleConfig(model=str(parent), out=tmp_path / "mixture", reinitialize_fraction=0.5))
    dense = AutoModelForCausalLM.from_pretrained(parent).model.layers[1].mlp
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture").model.layers[1].mlp.experts
    kept = [(experts.gate_up_proj[e, :48] == dense.gate_proj.weight).all(1) for e in range(4)]
    assert [int(rows.sum()) for rows in kept] == [24] * 4
    assert not kept[0].equal(kept[1])
    columns = (experts.down_proj[0] == dense.down_proj.weight).all(0)
    assert columns.equal(kept[0])
    assert not logits_of(tmp_path / "mixture").allclose(logits_of(parent), atol=1e-3)


def test_a_bf16_parent_stays_bf16(tmp_path):
    parent = write_decoder(tmp_path / "parent")
    AutoModelForCausalLM.from_pretrained(parent, dtype=torch.bfloat16).save_pretrained(parent)
    upcycle(UpcycleConfig(model=str(parent), out=tmp_path / "mixture"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


class Killed(BaseException):
    pass


def test_a_killed_conversion_goes_on_and_ends_with_the_same_bytes(tmp_path):
    parent = write_decoder(tmp_path / "parent", num_hidden_layers=4)
    upcycle(UpcycleConfig(model=str(parent), out=tmp_path / "whole"))
    config = UpcycleConfig(model=str(parent), out=tmp_path / "mixture")
    written = []

    def kill_at_the_third_file(operation, path):
        if operation == "rename" and path.suffix == ".safetensors":
            written.append(path.name)
            if len(written) == 3:
                raise Killed

    with pytest.raises(Killed), watching_operations(kill_at_the_third_file):
        upcycle(config)
    assert not config.out.exists()
    written.clear()
    with watching_operations(kill_at_the_third_file), pytest.raises(Killed):
        upcycle(config)
    assert written == [f"model-0000{n}-of-00005.safetensors" for n in (3, 4, 5)]
    upcycle(config)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == 5
    for name in [*files, "model.safetensors.index.json", "config.json"]:
        assert (config.out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    upcycle(config)  # complete: nothing to do
    with pytest.raises(CapgapError, match="was not written by this command"):
        upcycle(UpcycleConfig(model=str(parent), out=config.out, num_experts=3))


@pytest.mark.parametrize(
    ("kind", "flags", "parts"),
    [
        ("mixtral", [], ["mixtral cannot be upcycled", "llama, mistral, qwen3"]),
        ("llama", ["--architecture", "qwen3_moe"], ["lacks norms on queries and keys", "use mixtral"]),
        ("llama", ["--granularity", "5", "--top-k", "1"], ["--granularity (5) does not divide", "(48)"]),
        ("llama", ["--dense-layers", "1"], ["every layer", "leave it 0"]),
        ("qwen3", ["--dense-layers", "2"], ["--dense-layers (2) must be 0 to 1"]),
        ("llama", ["--top-k", "1"], ["learn nothing", "choose 2 to 8"]),
        ("llama", ["--top-k", "5"], ["--top-k (5)", "--num-experts (4)"]),
        ("llama", ["--reinitialize-fraction", "1.5"], ["(1.5) must lie between 0 and 1"]),
    ],
)
def test_a_mistake_in_upcycling_is_one_line(tmp_path, capsys, kind, flags, parts):
    parent = write_decoder(tmp_path / "parent", kind)
    assert main(["--model", str(parent), "--out", str(tmp_path / "mixture"), *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(part in message for part in parts), message


def test_a_folder_without_weights_names_the_missing_file(tmp_path, capsys):
    parent = write_decoder(tmp_path / "parent")
    (parent / "model.safetensors").unlink()
    assert main(["--model", str(parent), "--out", str(tmp_path / "mixture")]) == 3
    assert "model.safetensors - weights are needed" in capsys.readouterr().err
