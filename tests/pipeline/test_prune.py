"""Pruning: nothing is lost when nothing is cut, dead parts go first, groups of heads stay whole, kills are survived."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prep.errors import DataError
from data_prep.files import watching_operations
from pipeline.importance import LayerRunner
from pipeline.prune import PruneConfig, main, prune
from tiny_decoders import LENGTH, WORDS, write_blocks, write_decoder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_blocks(tmp_path_factory.mktemp("prune") / "rows", rows=24)


def logits_of(folder) -> torch.Tensor:
    ids = torch.arange(4, 4 + 3 * LENGTH).remainder(len(WORDS)).view(3, LENGTH)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


def kept(folder) -> dict:
    return json.loads((folder / "kept.json").read_text())["kept"]


def with_dead_parts(folder, *, heads=(1, 3), neurons=(0, 3, 40), layer=1) -> None:
    """Silences heads and neurons of one layer, and makes the last layer do nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        block = model.model.layers[layer]
        width = block.self_attn.head_dim
        for head in heads:
            block.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
        block.mlp.down_proj.weight[:, list(neurons)] = 0
        model.model.layers[-1].self_attn.o_proj.weight.zero_()
        model.model.layers[-1].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_model_that_keeps_its_shape_keeps_its_logits(tmp_path, rows, kind):
    parent = write_decoder(tmp_path / "parent", kind)
    prune(PruneConfig(model=str(parent), shards=rows, out=tmp_path / "cut"))
    assert logits_of(tmp_path / "cut").equal(logits_of(parent))


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_what_does_nothing_is_cut_first_and_the_logits_stay(tmp_path, rows, importance):
    parent = write_decoder(tmp_path / "parent", num_hidden_layers=3, num_key_value_heads=4)
    with_dead_parts(parent)
    config = PruneConfig(
        model=str(parent), shards=rows, out=tmp_path / "cut", num_layers=2, importance=importance, batch_rows=5
    )
    prune(config)
    assert kept(tmp_path / "cut")["layers"] == [0, 1]
    torch.testing.assert_close(logits_of(tmp_path / "cut"), logits_of(parent), atol=1e-5, rtol=1e-5)
    narrow = PruneConfig(
        model=str(parent),
        shards=rows,
        out=tmp_path / "narrow",
        num_heads=2,
        intermediate_size=45,
        importance=importance,
    )
    prune(narrow)
    found = kept(tmp_path / "narrow")
    assert found["heads"]["1"] == [0, 2] == found["kv_heads"]["1"]
    assert set(range(48)) - set(found["neurons"]["1"]) == {0, 3, 40}


def test_groups_of_query_heads_follow_their_key_head(tmp_path, rows):
    parent = write_decoder(tmp_path / "parent", num_attention_heads=8, num_key_value_heads=4)
    with_dead_parts(parent, heads=(2, 3, 4, 7), neurons=(), layer=0)
    prune(PruneConfig(model=str(parent), shards=rows, out=tmp_path / "fewer", num_heads=4))
    found = kept(tmp_path / "fewer")
    assert found["kv_heads"]["0"] == [0, 1, 2, 3]
    assert found["heads"]["0"][2:] == [5, 6]  # the live one of each half-dead group
    model, before = (AutoModelForCausalLM.from_pretrained(tmp_path / name).model for name in ("fewer", "parent"))
    cut, whole = model.layers[0].self_attn, before.layers[0].self_attn
    assert cut.k_proj.weight.equal(whole.k_proj.weight)
    assert cut.q_proj.weight[8:16].equal(whole.q_proj.weight[20:28])
    assert cut.o_proj.weight[:, 8:16].equal(whole.o_proj.weight[:, 20:28])
    prune(PruneConfig(model=str(parent), shards=rows, out=tmp_path / "groups", num_heads=4, num_kv_heads=2))
    found = kept(tmp_path / "groups")
    assert 1 not in found["kv_heads"]["0"]  # heads 2 and 3 are dead
    assert found["heads"]["0"] == [head for kv in found["kv_heads"]["0"] for head in (2 * kv, 2 * kv + 1)]


def test_every_dimension_can_be_cut_at_once_and_the_result_trains(tmp_path, rows):
    parent = write_decoder(tmp_path / "parent", "qwen3", num_hidden_layers=4, tie_word_embeddings=True)
    shape = {"num_layers": 2, "hidden_size": 20, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 30}
    prune(PruneConfig(model=str(parent), shards=rows, out=tmp_path / "cut", **shape))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert model.config.hidden_size == 20 and model.config.head_dim == 8 and len(model.model.layers) == 2
    ids = torch.arange(4, 20)[None]
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Killed(BaseException):
    pass


def test_a_killed_pruning_does_not_measure_again_and_ends_with_the_same_bytes(tmp_path, rows, monkeypatch):
    parent = write_decoder(tmp_path / "parent", num_hidden_layers=3)
    options = {"model": str(parent), "shards": rows, "hidden_size": 24}
    prune(PruneConfig(out=tmp_path / "whole", **options))

    def kill_at_the_second_file(operation, path):
        if operation == "rename" and path.name.startswith("model-00002"):
            raise Killed

    config = PruneConfig(out=tmp_path / "cut", **options)
    with pytest.raises(Killed), watching_operations(kill_at_the_second_file):
        prune(config)
    monkeypatch.setattr("pipeline.importance.measure", lambda *_: pytest.fail("measured twice"))
    prune(config)
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (config.out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("importance", "passes"), [("activation", 1), ("taylor", 2)])
def test_wherever_a_measurement_is_killed_it_goes_on_with_the_next_layer_and_finds_the_same(
    tmp_path, rows, monkeypatch, importance, passes
):
    parent = write_decoder(tmp_path / "parent", num_hidden_layers=3)
    options = {"model": str(parent), "shards": rows, "hidden_size": 24, "importance": importance, "batch_rows": 6}
    count = 0

    def count_files(operation, path):
        nonlocal count
        count += operation == "rename" and path.parent.name == "calibration"

    with watching_operations(count_files):
        prune(PruneConfig(out=tmp_path / "whole", **options))
    loaded: list[int] = []
    load = LayerRunner.load
    monkeypatch.setattr(LayerRunner, "load", lambda self, index: (loaded.append(index), load(self, index)))
    for number in range(3, count + 1, 4):
        config, seen = PruneConfig(out=tmp_path / f"killed-{number}", **options), 0

        def kill(operation, path, last=number):
            nonlocal seen
            seen += operation == "rename" and path.parent.name == "calibration"
            if seen == last:
                raise Killed

        loaded.clear()
        with pytest.raises(Killed), watching_operations(kill):
            prune(config)
        prune(config)
        # Nothing twice but the layer that was killed.
        assert len(loaded) <= passes * 3 + 1
        assert kept(config.out) == kept(tmp_path / "whole")
        assert not (config.out / "calibration").exists()
        for path in (tmp_path / "whole").glob("*.safetensors"):
            assert (config.out / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_note_is_named(tmp_path, rows):
    parent = write_decoder(tmp_path / "parent", num_hidden_layers=3)
    config = PruneConfig(model=str(parent), shards=rows, out=tmp_path / "cut", hidden_size=24)

    def kill_at_the_second_layer(operation, path):
        if operation == "rename" and path.name.startswith("state-2-"):
            raise Killed

    with pytest.raises(Killed), watching_operations(kill_at_the_second_layer):
        prune(config)
    path = tmp_path / "cut.partial" / "calibration" / "state-1-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"state-1-0\.safetensors: missing or damaged - remove"):
        prune(config)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--hidden-size", "33"], ["--hidden-size (33)", "more than the parent has (32)"]),
        (["--num-heads", "1"], ["--num-heads (1) does not fit --num-kv-heads (2)", "2, 4"]),
        (["--hidden-size", "30"], ["--hidden-size (30)", "--num-heads (4)"]),
        (["--num-layers", "0"], ["--num-layers (0) must be at least 1"]),
    ],
)
def test_a_mistake_in_pruning_is_one_line(tmp_path, rows, capsys, flags, parts):
    parent = write_decoder(tmp_path / "parent")
    assert main(["--model", str(parent), "--shards", str(rows), "--out", str(tmp_path / "cut"), *flags]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(part in message for part in parts), message


def test_a_mixture_cannot_be_pruned_and_other_rows_are_refused(tmp_path, rows, capsys):
    from tiny_runs import write_rows

    parent = write_decoder(tmp_path / "parent", "mixtral")
    assert main(["--model", str(parent), "--shards", str(rows), "--out", str(tmp_path / "cut")]) == 2
    assert "mixtral cannot be pruned" in capsys.readouterr().err
    dense = write_decoder(tmp_path / "dense")
    with pytest.raises(DataError, match="lm-blocks"):
        prune(PruneConfig(model=str(dense), shards=write_rows(tmp_path / "pairs"), out=tmp_path / "cut"))


def test_the_shapes_of_7b_are_planned_from_its_config_alone(tmp_path, capsys):
    """LLaMA-2-7B to the shape of MiniMA-3B (arXiv 2311.07052), and that to a mixture of four."""
    from transformers import LlamaConfig

    from pipeline import cli

    llama = LlamaConfig(intermediate_size=11008, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="float16")
    llama.save_pretrained(tmp_path / "7b")
    shape = "--num-layers 24 --hidden-size 3072 --num-heads 24 --intermediate-size 8192".split()
    command = ["prune", "--model", str(tmp_path / "7b"), "--shards", "none", "--out", str(tmp_path / "3b"), *shape]
    assert cli.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "6,738,415,616 parameters, 13.48 GB" in printed
    layer = 4 * 3072**2 + 3 * 3072 * 8192 + 2 * 3072
    assert f"{24 * layer + 2 * 32000 * 3072 + 3072:,} parameters, 5.83 GB" in printed
    assert not (tmp_path / "3b").exists()

    small = LlamaConfig(
        hidden_size=3072, num_hidden_layers=24, num_attention_heads=24, intermediate_size=8192, dtype="float16"
    )
    small.save_pretrained(tmp_path / "3b")
    command = ["upcycle", "--model", str(tmp_path / "3b"), "--num-experts", "4", "--top-k", "2", "--dry-run"]
    assert cli.main([*command, "--out", str(tmp_path / "4x3b")]) == 0
    experts = 24 * (3 * 3 * 3072 * 8192 + 4 * 3072)
    served = 24 * layer + 2 * 32000 * 3072 + 3072 + experts
    assert f"{served:,} parameters ({served - 24 * 2 * 3 * 3072 * 8192:,} active)" in capsys.readouterr().out
