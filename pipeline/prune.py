"""`capgap prune`: cuts a dense decoder down to a smaller shape, keeping what matters on calibration text."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.errors import ConfigError, DataError, reports_errors

if TYPE_CHECKING:
    from pipeline.importance import Importance

PARENTS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class PruneConfig:
    """Cuts a dense decoder down to a smaller shape. What is not given stays as it is."""

    model: str
    """Dense parent: LLaMA, Mistral, Qwen2 or Qwen3; folder or hub name."""
    shards: Path
    """lm-blocks shards of *training* text on which importance is measured."""
    out: Path
    """Folder of the new model."""
    num_layers: int | None = None
    """Layers to keep: those that change the hidden states most."""
    hidden_size: int | None = None
    """Width of the hidden states; the same channels are kept in every layer."""
    num_heads: int | None = None
    """Query heads per layer; their width stays."""
    num_kv_heads: int | None = None
    """Key and value heads per layer. Whole groups are kept, then the best query heads of each."""
    intermediate_size: int | None = None
    """Neurons of each feed-forward layer."""
    importance: Literal["activation", "taylor"] = "activation"
    """Mean size of what a unit hands on (arXiv 2407.14679), or of its product with the loss's gradient.

    taylor goes through the layers twice and keeps the hidden states of every layer on disk meanwhile.
    """
    calibration_rows: int = 32
    """Rows of the shards that are read."""
    calibration_length: int = 512
    """Tokens of each row that are read."""
    batch_rows: int = 8
    """Rows that go through a layer together."""
    dry_run: bool = False
    """Only print shapes, parameters and bytes; needs no weights and no shards."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} ({value}) must be at least 1")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int


@dataclass(frozen=True)
class Kept:
    """Integer indices of what stays, in their old order; heads and neurons by the old number of their layer."""

    layers: list[int]
    hidden: list[int]
    heads: dict[int, list[int]]
    kv_heads: dict[int, list[int]]
    neurons: dict[int, list[int]]


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Writes the new model folder; a second run of the same command goes on where the first was stopped."""
    import tyro

    prune(tyro.cli(PruneConfig, args=argv, prog="capgap prune"))
    return 0


def prune(config: PruneConfig) -> None:
    """Measures importance and cuts, both layer by layer; memory is that of one layer and of one batch of rows."""
    from data_prep.files import read_json, remove_folder, write_json
    from data_prep.model_folders import find_model_folder
    from data_prep.shards import open_shards
    from pipeline.importance import Calibration, Notes, measure
    from pipeline.model_files import PARTIAL, ModelFiles, config_of, dtype_bytes, is_written, size_of, write_model

    folder = find_model_folder(config.model, with_weights=not config.dry_run)
    dense = config_of(folder)
    before, after = shape_of(dense), target_shape(config, dense)
    if config.dry_run:
        print(f"{config.model}: {asdict(before)}, {size_of(dense)}")
        print(f"{config.out}: {asdict(after)}, {size_of(target_config(dense, after, list(range(after.num_layers))))}")
        return
    source = ModelFiles(folder)
    shards = open_shards(config.shards)
    if shards.manifest.rows != "lm-blocks":
        raise DataError(f"--shards: {config.shards} holds {shards.manifest.rows} - prepare it with --rows lm-blocks")
    if shards.manifest.tokenizer["vocab_size"] > dense.vocab_size:
        raise DataError(f"--shards: {config.shards} has more ids than the model - use the model's tokenizer")
    settings = {key: value for key, value in asdict(config).items() if key not in ("model", "shards", "out", "dry_run")}
    made_from = {"source": source.fingerprint(), "shards": shards.manifest.fingerprint, **settings}
    if is_written(config.out, made_from):
        print(f"{config.out} is complete already: nothing to do")
        return
    unfinished = config.out.with_name(config.out.name + PARTIAL)
    record = unfinished / "kept.json"
    found = read_json(record, f"remove {unfinished}") if record.exists() else None
    if found is not None and found["made_from"] == made_from:
        kept = kept_from_json(found["kept"])
    else:
        calibration = Calibration(
            config.importance, config.calibration_rows, config.calibration_length, config.batch_rows
        )
        notes = Notes(unfinished / "calibration", made_from)
        kept = choose(measure(calibration, source, dense, shards, notes), before, after)
        write_json(record, {"made_from": made_from, "kept": asdict(kept)})
    remove_folder(unfinished / "calibration")

    pieces: dict[str, Callable[[], dict[str, Any]]] = {"embeddings": partial(cut_outer, source, dense, kept)}
    for new, old in enumerate(kept.layers):
        pieces[f"layer {old}"] = partial(cut_layer, source, kept, dense, old=old, new=new)
    target = target_config(dense, after, kept.layers)
    layer = after.hidden_size * (2 * (after.num_heads + after.num_kv_heads) * head_width(dense))
    layer += 3 * after.hidden_size * after.intermediate_size
    weights = after.num_layers * layer + 2 * dense.vocab_size * after.hidden_size
    write_model(
        config.out,
        json.loads(target.to_json_string(use_diff=False)),
        pieces,
        label="prune",
        made_from=made_from,
        tokenizer_folder=source.folder,
        card=card(config, target),
        num_bytes=weights * dtype_bytes(dense),
    )
    print(f"{config.out}: {asdict(before)} -> {asdict(after)}")


def head_width(dense: Any) -> int:
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def shape_of(dense: Any) -> Shape:
    """The sizes of a transformers config; ConfigError when it is not a dense decoder that we can cut."""
    if dense.model_type not in PARENTS:
        raise ConfigError(
            f"--model: {dense.model_type} cannot be pruned - parents are {', '.join(PARENTS)} - choose one"
        )
    if getattr(dense, "use_sliding_window", False):
        raise ConfigError("--model: use_sliding_window differs by layer, which pruning would mix up - choose another")
    return Shape(
        dense.num_hidden_layers,
        dense.hidden_size,
        dense.num_attention_heads,
        dense.num_key_value_heads,
        dense.intermediate_size,
    )


def target_shape(config: PruneConfig, dense: Any) -> Shape:
    """The shape asked for; ConfigError when something would grow or groups of heads would not fit."""
    before = shape_of(dense)
    is_grouped = before.num_kv_heads != before.num_heads
    kv_heads = config.num_kv_heads or (before.num_kv_heads if is_grouped else config.num_heads or before.num_kv_heads)
    after = Shape(
        config.num_layers or before.num_layers,
        config.hidden_size or before.hidden_size,
        config.num_heads or before.num_heads,
        kv_heads,
        config.intermediate_size or before.intermediate_size,
    )
    for name, value in asdict(after).items():
        if value > getattr(before, name):
            flag = f"--{name.replace('_', '-')} ({value})"
            raise ConfigError(f"{flag} is more than the parent has ({getattr(before, name)}) - pruning only cuts")
    if dense.model_type == "llama" and after.hidden_size % after.num_heads:
        raise ConfigError(
            f"--hidden-size ({after.hidden_size}) is not a multiple of --num-heads ({after.num_heads}) - transformers "
            "refuses such a LLaMA - change one of the two"
        )
    group = before.num_heads // before.num_kv_heads
    if after.num_heads % after.num_kv_heads or after.num_heads // after.num_kv_heads > group:
        legal = [after.num_kv_heads * size for size in range(1, group + 1)]
        raise ConfigError(
            f"--num-heads ({after.num_heads}) does not fit --num-kv-heads ({after.num_kv_heads}): the parent has "
            f"groups of {group} - use {', '.join(map(str, legal))} heads, or other key and value heads"
        )
    return after


def choose(importance: "Importance", before: Shape, after: Shape) -> Kept:
    """The most important units of each kind; groups of query heads stay together with their key and value head."""
    layers = best(importance.layers, after.num_layers)
    group, kept_of_group = before.num_heads // before.num_kv_heads, after.num_heads // after.num_kv_heads
    heads, kv_heads = {}, {}
    for layer in layers:
        by_group = [importance.heads[layer][kv * group : (kv + 1) * group] for kv in range(before.num_kv_heads)]
        kv_heads[layer] = best([float(scores.sum()) for scores in by_group], after.num_kv_heads)
        heads[layer] = [kv * group + head for kv in kv_heads[layer] for head in best(by_group[kv], kept_of_group)]
    return Kept(
        layers=layers,
        hidden=best(importance.hidden, after.hidden_size),
        heads=heads,
        kv_heads=kv_heads,
        neurons={layer: best(importance.neurons[layer], after.intermediate_size) for layer in layers},
    )


def best(scores: Any, count: int) -> list[int]:
    """Indices of the `count` largest scores, ascending; ties go to the lower index."""
    values = [float(score) for score in scores]
    return sorted(sorted(range(len(values)), key=lambda index: (-values[index], index))[:count])


def kept_from_json(value: dict[str, Any]) -> Kept:
    by_layer = {name: {int(k): v for k, v in value[name].items()} for name in ("heads", "kv_heads", "neurons")}
    return Kept(layers=value["layers"], hidden=value["hidden"], **by_layer)


def cut_outer(source: Any, dense: Any, kept: Kept) -> dict[str, Any]:
    """Embedding, last norm and head with the kept channels."""
    names = ["model.embed_tokens.weight", *([] if dense.tie_word_embeddings else ["lm_head.weight"])]
    cut = {name: source[name][:, kept.hidden] for name in names}
    return cut | {"model.norm.weight": source["model.norm.weight"][kept.hidden]}


def cut_layer(source: Any, kept: Kept, dense: Any, *, old: int, new: int) -> dict[str, Any]:
    """The tensors of layer `old` with the kept channels, heads and neurons, under the names of layer `new`."""
    width = head_width(dense)
    queries = channels(kept.heads[old], width)
    keys = channels(kept.kv_heads[old], width)
    hidden, neurons = kept.hidden, kept.neurons[old]
    # Kept rows and columns of each map, by the end of its name.
    maps = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (neurons, hidden),
        "up_proj": (neurons, hidden),
        "down_proj": (hidden, neurons),
        "input_layernorm": (hidden, None),
        "post_attention_layernorm": (hidden, None),
        "q_norm": (None, None),
        "k_norm": (None, None),
    }
    cut = {}
    for name, tensor in source.layer(old).items():
        part = name.split(".")[-2] if "." in name else name
        if part not in maps:
            raise DataError(f"model weight {name} of layer {old} is not one we can cut - choose another parent")
        rows, columns = maps[part]
        kept_rows = tensor if rows is None else tensor[rows]
        cut[f"model.layers.{new}.{name}"] = kept_rows if columns is None or tensor.dim() == 1 else kept_rows[:, columns]
    return cut


def channels(heads: list[int], width: int) -> list[int]:
    return [head * width + channel for head in heads for channel in range(width)]


def target_config(dense: Any, after: Shape, layers: list[int]) -> Any:
    """The parent's config with the new sizes and these of its layers."""
    import copy

    target = copy.deepcopy(dense)
    target.head_dim = head_width(dense)
    target.num_hidden_layers, target.hidden_size = after.num_layers, after.hidden_size
    target.num_attention_heads, target.num_key_value_heads = after.num_heads, after.num_kv_heads
    target.intermediate_size = after.intermediate_size
    if getattr(target, "layer_types", None):
        target.layer_types = [target.layer_types[layer] for layer in layers]
    return target


def card(config: PruneConfig, target: Any) -> str:
    """The model card of a model that was cut and not trained since."""
    return (
        f"---\nlibrary_name: transformers\ntags: [pruning, capgap]\nbase_model: {config.model}\n---\n\n"
        f"# {config.out.name}\n\n`{config.model}` cut by `capgap prune` ({config.importance} importance on "
        f"{config.calibration_rows} rows) to {target.num_hidden_layers} layers, {target.hidden_size} wide, "
        f"{target.num_attention_heads} heads, {target.intermediate_size} neurons; not trained since.\n"
    )


if __name__ == "__main__":
    import sys

    sys.exit(main())
