"""`capgap prune`: cuts a dense decoder down to a smaller shape, keeping what matters on calibration text."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import ConfigError, DataError, reports_errors

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

    taylor goes through the layers twice and keeps the hidden states of every layer in memory.
    """
    calibration_rows: int = 32
    """Rows of the shards that are read."""
    calibration_length: int = 512
    """Tokens of each row that are read."""
    batch_rows: int = 8
    """Rows that go through a layer together."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < 1:
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
    """Measures importance and cuts, both layer by layer; memory is that of one layer and of the calibration rows."""
    from data_prep.files import make_folder, read_json, write_json
    from data_prep.model_folders import find_model_folder
    from data_prep.shards import open_shards
    from pipeline.model_files import PARTIAL, ModelFiles, config_of, dtype_bytes, is_written, write_model

    source = ModelFiles(find_model_folder(config.model))
    dense = config_of(source.folder)
    before, after = shape_of(dense), target_shape(config, dense)
    shards = open_shards(config.shards)
    if shards.manifest.rows != "lm-blocks":
        raise DataError(f"--shards: {config.shards} holds {shards.manifest.rows} - prepare it with --rows lm-blocks")
    if shards.manifest.tokenizer["vocab_size"] > dense.vocab_size:
        raise DataError(f"--shards: {config.shards} has more ids than the model - use the model's tokenizer")
    settings = {key: value for key, value in asdict(config).items() if key not in ("model", "shards", "out")}
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
        kept = choose(measure(config, source, dense, shards), before, after)
        make_folder(unfinished)
        write_json(record, {"made_from": made_from, "kept": asdict(kept)})

    pieces: dict[str, Callable[[], dict[str, Any]]] = {"embeddings": partial(cut_outer, source, dense, kept)}
    for new, old in enumerate(kept.layers):
        pieces[f"layer {old}"] = partial(cut_layer, source, kept, dense, old=old, new=new)
    target = target_config(dense, after, kept)
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


# --- importance ---


@dataclass
class Importance:
    """How much each unit matters: larger is more."""

    layers: list[float]
    hidden: Any  # [D]
    heads: list[Any]  # per layer, [heads]
    neurons: list[Any]  # per layer, [neurons]


def measure(config: PruneConfig, source: Any, dense: Any, shards: Any) -> Importance:
    """Runs calibration rows through the layers, one layer in memory at a time."""
    import torch

    from data_prep.progress import Progress
    from pipeline.batches import decoder_batch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = []
    for start in range(0, min(config.calibration_rows, len(shards)), config.batch_rows):
        stop = min(start + config.batch_rows, config.calibration_rows, len(shards))
        batches.append(decoder_batch(first_tokens(shards.read(spread(start, stop, config, shards)), config)))
    embedding = source["model.embed_tokens.weight"].float()
    states = [embedding[batch.input_ids] for batch in batches]
    del embedding
    runner = LayerRunner(source, dense, device)
    with_taylor = config.importance == "taylor"
    inputs = []
    found = Importance([0.0] * dense.num_hidden_layers, torch.zeros(dense.hidden_size), [], [])
    passes = (2 if with_taylor else 1) * dense.num_hidden_layers
    with Progress("importance", passes, unit="layers") as progress:
        for index in range(dense.num_hidden_layers):
            runner.load(index)
            if with_taylor:
                inputs.append(states)
                with torch.no_grad():
                    states = [runner(state, batch).cpu() for state, batch in zip(states, batches, strict=True)]
            else:
                states = activations_of_layer(runner, states, batches, found, index)
            progress.advance()
        if with_taylor:
            gradients = loss_gradients(source, dense, states, batches, device)
            for index in reversed(range(dense.num_hidden_layers)):
                runner.load(index)
                gradients = taylor_of_layer(runner, inputs.pop(), gradients, batches, found, index)
                progress.advance()
            found.heads.reverse()
            found.neurons.reverse()
    return found


def spread(start: int, stop: int, config: PruneConfig, shards: Any) -> Any:
    """Shard rows of calibration rows start to stop, evenly over the whole set."""
    import numpy as np

    count = min(config.calibration_rows, len(shards))
    return np.arange(start, stop) * len(shards) // count


def first_tokens(columns: dict[str, Any], config: PruneConfig) -> dict[str, Any]:
    length = config.calibration_length
    return {
        "input_ids": columns["input_ids"][:, :length],
        "length": columns["length"].clip(max=length),
        "document_index": columns["document_index"][:, :length],
    }


class LayerRunner:
    """A decoder of one layer, whose weights are exchanged; it does what the whole model does around a layer."""

    def __init__(self, source: Any, dense: Any, device: Any):
        import copy

        import torch
        from transformers import AutoModelForCausalLM

        shape = copy.deepcopy(dense)
        # Hidden states go in and come out: no embedding is needed, and no norm at the end.
        shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = 1, 1, None
        if getattr(shape, "layer_types", None):
            shape.layer_types = shape.layer_types[:1]
        self.model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).model.to(device).eval()
        self.model.norm = torch.nn.Identity()
        self.model.requires_grad_(False)
        self.source, self.device = source, device
        self.layer = self.model.layers[0]

    def load(self, index: int) -> None:
        self.layer.load_state_dict({name: tensor.float() for name, tensor in self.source.layer(index).items()})

    def __call__(self, hidden_BTD: Any, batch: Any) -> Any:
        positions = batch.position_ids.to(self.device)
        hidden_BTD = hidden_BTD.to(self.device)
        return self.model(inputs_embeds=hidden_BTD, position_ids=positions, use_cache=False).last_hidden_state

    def watched(self, seen: dict[str, Any], *, keep_gradient: bool = False) -> Any:
        """While it is open, what goes into o_proj and down_proj and comes out of the norms is put into `seen`."""
        from contextlib import ExitStack

        def remember(name: str, tensor: Any) -> None:
            if keep_gradient:
                tensor.retain_grad()
            seen[name] = tensor

        hooks = ExitStack()
        for name, module in (("heads", self.layer.self_attn.o_proj), ("neurons", self.layer.mlp.down_proj)):
            handle = module.register_forward_pre_hook(lambda _, given, name=name: remember(name, given[0]))
            hooks.callback(handle.remove)
        for name in ("input_layernorm", "post_attention_layernorm"):
            handle = getattr(self.layer, name).register_forward_hook(lambda _, __, out, name=name: remember(name, out))
            hooks.callback(handle.remove)
        return hooks


def per_head(values_C: Any, num_heads: int) -> Any:
    """[heads] root of the summed squares over the channels of each head."""
    return values_C.view(num_heads, -1).square().sum(1).sqrt()


def activations_of_layer(runner: LayerRunner, states: list, batches: list, found: Importance, index: int) -> list:
    """Runs a layer forward and adds the mean sizes of its units; returns the hidden states after it."""
    import torch

    heads: Any = 0
    neurons: Any = 0
    outputs, num_tokens, change = [], 0, 0.0
    for state, batch in zip(states, batches, strict=True):
        seen: dict[str, Any] = {}
        with torch.no_grad(), runner.watched(seen):
            output = runner(state, batch).cpu()
        valid = batch.valid_BT
        num_tokens += int(valid.sum())
        sizes = {name: tensor.cpu()[valid].abs().sum(0) for name, tensor in seen.items()}
        heads, neurons = heads + sizes["heads"], neurons + sizes["neurons"]
        found.hidden += sizes["input_layernorm"] + sizes["post_attention_layernorm"]
        similar = torch.nn.functional.cosine_similarity(state[valid], output[valid], dim=-1)
        change += float((1 - similar).sum())
        outputs.append(output)
    # A unit counts with what it hands on: its size times that of its outgoing weights.
    outgoing = runner.layer.self_attn.o_proj.weight.norm(dim=0).cpu()
    found.heads.append(per_head(heads / num_tokens * outgoing, runner.model.config.num_attention_heads))
    found.neurons.append(neurons / num_tokens * runner.layer.mlp.down_proj.weight.norm(dim=0).cpu())
    found.layers[index] = change / num_tokens
    return outputs


def loss_gradients(source: Any, dense: Any, states: list, batches: list, device: Any) -> list:
    """The gradient of the cross-entropy by the hidden states after the last layer."""
    from capgap_kernels import linear_kl

    head_name = "model.embed_tokens.weight" if dense.tie_word_embeddings else "lm_head.weight"
    head_VD, norm_D = source[head_name].float().to(device), source["model.norm.weight"].float().to(device)
    gradients = []
    for state, batch in zip(states, batches, strict=True):
        hidden = state.to(device).requires_grad_()
        normed = hidden * (hidden.square().mean(-1, keepdim=True) + dense.rms_norm_eps).rsqrt() * norm_D
        labels = batch.labels_BT.flatten().to(device)
        linear_kl(
            normed.flatten(0, 1), head_VD, None, labels_N=labels, kl_weight=0.0, ce_weight=1.0
        ).loss_sum.backward()
        gradients.append(hidden.grad.cpu())
    return gradients


def taylor_of_layer(
    runner: LayerRunner, states: list, gradients: list, batches: list, found: Importance, index: int
) -> list:
    """Runs a layer again with gradients and adds |unit * gradient|; returns the gradient by the states before it."""
    heads: Any = 0
    neurons: Any = 0
    before = []
    for state, gradient, batch in zip(states, gradients, batches, strict=True):
        seen: dict[str, Any] = {}
        entering = state.to(runner.device).requires_grad_()
        with runner.watched(seen, keep_gradient=True):
            output = runner(entering, batch)
            output.backward(gradient.to(runner.device))
        valid = batch.valid_BT
        # Summed over a unit's channels before the absolute value: the loss's change when the whole unit goes.
        effect = {name: (tensor * tensor.grad).detach().cpu()[valid] for name, tensor in seen.items()}
        by_head = effect["heads"].unflatten(-1, (runner.model.config.num_attention_heads, -1)).sum(-1)
        heads, neurons = heads + by_head.abs().sum(0), neurons + effect["neurons"].abs().sum(0)
        found.hidden += sum(effect[name].abs().sum(0) for name in ("input_layernorm", "post_attention_layernorm"))
        moved = (output.detach() - entering.detach()).cpu()[valid]
        found.layers[index] += float((moved * gradient[valid]).sum(-1).abs().sum())
        assert entering.grad is not None
        before.append(entering.grad.cpu())
    found.heads.append(heads)
    found.neurons.append(neurons)
    return before


# --- choice and cut ---


def choose(importance: Importance, before: Shape, after: Shape) -> Kept:
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


def target_config(dense: Any, after: Shape, kept: Kept) -> Any:
    """The parent's config with the new sizes."""
    import copy

    target = copy.deepcopy(dense)
    target.head_dim = head_width(dense)
    target.num_hidden_layers, target.hidden_size = after.num_layers, after.hidden_size
    target.num_attention_heads, target.num_key_value_heads = after.num_heads, after.num_kv_heads
    target.intermediate_size = after.intermediate_size
    if getattr(target, "layer_types", None):
        target.layer_types = [target.layer_types[layer] for layer in kept.layers]
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
