"""`capgap upcycle`: turns a dense decoder into a mixture of experts of a standard architecture, layer by layer."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import ConfigError, reports_errors

# E experts, F width of an expert, S width of the dense feed-forward layer, D hidden width

# What the two architectures share with dense decoders; everything else of the source is its own affair.
SHARED_KEYS = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act rms_norm_eps "
    "max_position_embeddings initializer_range tie_word_embeddings attention_dropout rope_parameters "
    "bos_token_id eos_token_id pad_token_id"
).split()
PARENTS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
MAX_CHOSEN = 8


@dataclass(frozen=True)
class UpcycleConfig:
    """Turns a dense decoder into a mixture of experts. By default the result computes exactly what its parent did."""

    model: str
    """Dense parent: a LLaMA, Mistral (they become a Mixtral) or Qwen3 (a Qwen3-MoE), folder or hub name."""
    out: Path
    """Folder of the new model."""
    architecture: Literal["auto", "mixtral", "qwen3_moe"] = "auto"
    """Architecture of the new model; auto takes the one that can hold the parent's attention."""
    num_experts: int = 4
    """Copies of the feed-forward layer."""
    top_k: int = 2
    """Copies that a token meets."""
    granularity: int = 1
    """Pieces into which each copy is cut: num_experts x granularity experts, top_k x granularity of them chosen.

    The pieces of a copy share a router row at first, so that they are chosen together (arXiv 2410.07524).
    """
    dense_layers: int = 0
    """Lowest layers that stay dense: a pyramid of experts, which only Qwen3-MoE can hold.

    Finer ones have no place: both architectures have one number of experts for all layers that have any.
    """
    reinitialize_fraction: float = 0.0
    """Part of each expert's neurons that is drawn anew, so that experts differ (drop-upcycling, arXiv 2502.19261).

    With 0 the logits are the parent's.
    """
    router_std: float = 0.02
    """Standard deviation of the first router weights."""
    seed: int = 0
    """Seed of router weights and redrawn neurons."""
    dry_run: bool = False
    """Only print experts, parameters and bytes; needs no weights."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must be at least 1")
        chosen = self.top_k * self.granularity
        if self.top_k > self.num_experts:
            raise ConfigError(f"--top-k ({self.top_k}) is more than --num-experts ({self.num_experts}) - lower it")
        if not 2 <= chosen <= MAX_CHOSEN:
            why = (
                "a single weight is always 1, so the router would learn nothing" if chosen < 2 else "too many to route"
            )
            raise ConfigError(
                f"--top-k x --granularity ({self.top_k} x {self.granularity} = {chosen}) - {why} - "
                f"choose 2 to {MAX_CHOSEN}"
            )
        if not 0 <= self.reinitialize_fraction <= 1:
            raise ConfigError(f"--reinitialize-fraction ({self.reinitialize_fraction}) must lie between 0 and 1")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Writes the new model folder; a second run of the same command goes on where the first was stopped."""
    import tyro

    upcycle(tyro.cli(UpcycleConfig, args=argv, prog="capgap upcycle"))
    return 0


def upcycle(config: UpcycleConfig) -> None:
    """Streams the parent layer by layer into experts; memory is that of one new layer."""
    from data_prep.model_folders import find_model_folder
    from pipeline.model_files import ModelFiles, config_of, dtype_bytes, size_of, write_model

    folder = find_model_folder(config.model, with_weights=not config.dry_run)
    dense = config_of(folder)
    target = target_config(config, dense)
    if config.dry_run:
        print(f"{config.model}: {size_of(dense)}\n{config.out}: {target.model_type}, {size_of(target)}")
        return
    source = ModelFiles(folder)
    pieces: dict[str, Callable[[], dict[str, Any]]] = {"embeddings": partial(outer_tensors, source, dense)}
    for index in range(dense.num_hidden_layers):
        pieces[f"layer {index}"] = partial(layer_tensors, config, source, target.model_type, index)
    settings = {key: value for key, value in asdict(config).items() if key not in ("model", "out", "dry_run")}
    widest = dense.num_hidden_layers * config.num_experts * 3 * dense.intermediate_size * dense.hidden_size
    write_model(
        config.out,
        json.loads(target.to_json_string(use_diff=False)),
        pieces,
        label="upcycle",
        made_from={"source": source.fingerprint(), **settings},
        tokenizer_folder=source.folder,
        card=card(config, target),
        num_bytes=source.num_bytes() + widest * dtype_bytes(dense),
    )
    experts = config.num_experts * config.granularity
    print(f"{config.out}: {target.model_type}, {experts} experts per layer, {config.top_k * config.granularity} chosen")


def target_config(config: UpcycleConfig, dense: Any) -> Any:
    """The transformers config of the new model; ConfigError where the architecture cannot do what the parent does."""
    from transformers import AutoConfig

    parent = dense.model_type
    if parent not in PARENTS:
        raise ConfigError(
            f"--model: {parent} cannot be upcycled - parents are {', '.join(PARENTS)} - choose one of them"
        )
    kind = PARENTS[parent] if config.architecture == "auto" else config.architecture
    if kind != PARENTS[parent]:
        raise ConfigError(
            f"--architecture ({kind}) cannot hold the attention of a {parent}, which "
            f"{'has' if parent == 'qwen3' else 'lacks'} norms on queries and keys - use {PARENTS[parent]}"
        )
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(dense, name, False):
            raise ConfigError(f"--model: {name} is set, which {kind} has no place for - choose another parent")
    if dense.intermediate_size % config.granularity:
        raise ConfigError(
            f"--granularity ({config.granularity}) does not divide the parent's feed-forward width "
            f"({dense.intermediate_size}) - pieces must be equal - choose a divisor"
        )
    if config.dense_layers and kind == "mixtral":
        raise ConfigError(f"--dense-layers ({config.dense_layers}): a Mixtral has experts in every layer - leave it 0")
    if not 0 <= config.dense_layers < dense.num_hidden_layers:
        raise ConfigError(f"--dense-layers ({config.dense_layers}) must be 0 to {dense.num_hidden_layers - 1}")
    values = {name: getattr(dense, name) for name in SHARED_KEYS}
    values["head_dim"] = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    experts, chosen = config.num_experts * config.granularity, config.top_k * config.granularity
    width = dense.intermediate_size // config.granularity
    if kind == "mixtral":
        values |= {"num_local_experts": experts, "intermediate_size": width}
        values["sliding_window"] = getattr(dense, "sliding_window", None)
        values["architectures"] = ["MixtralForCausalLM"]
    else:
        values |= {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True}
        values |= {"intermediate_size": dense.intermediate_size, "mlp_only_layers": list(range(config.dense_layers))}
        values["architectures"] = ["Qwen3MoeForCausalLM"]
    return AutoConfig.for_model(kind, **values, num_experts_per_tok=chosen, dtype=dense.dtype)


def outer_tensors(source: Any, dense: Any) -> dict[str, Any]:
    """Embedding, last norm and head, as they are."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not dense.tie_word_embeddings:
        names.append("lm_head.weight")
    return {name: source[name] for name in names}


def layer_tensors(config: UpcycleConfig, source: Any, kind: str, index: int) -> dict[str, Any]:
    """The tensors of a new layer, under their names on disk."""
    import torch

    dense = source.layer(index)
    prefix = f"model.layers.{index}."
    kept = {prefix + name: tensor for name, tensor in dense.items() if not name.startswith("mlp.")}
    if index < config.dense_layers:
        return kept | {prefix + name: tensor for name, tensor in dense.items() if name.startswith("mlp.")}
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    gate_SD, up_SD, down_DS = (source[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    router_CD = torch.randn(config.num_experts, gate_SD.shape[1], generator=generator) * config.router_std
    router_ED = router_CD.repeat_interleave(config.granularity, dim=0).to(gate_SD.dtype)
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    kept[f"{prefix}{block}.gate.weight"] = router_ED
    width = gate_SD.shape[0] // config.granularity
    for expert in range(config.num_experts * config.granularity):
        piece = slice(expert % config.granularity * width, (expert % config.granularity + 1) * width)
        # A copy's weight is dealt out over its pieces in equal parts: what they add up to is taken times their number.
        whole = config.granularity == 1
        parts = [gate_SD[piece], up_SD[piece], down_DS if whole else down_DS[:, piece] * config.granularity]
        if config.reinitialize_fraction:
            parts = redrawn(parts, config.reinitialize_fraction, generator)
        for name, tensor in zip(names, parts, strict=True):
            kept[f"{prefix}{block}.experts.{expert}.{name}.weight"] = tensor
    return kept


def redrawn(parts: list[Any], fraction: float, generator: Any) -> list[Any]:
    """Copies in which a part of an expert's neurons is drawn anew, with mean and spread of what they replace."""
    import torch

    parts = [weight.clone() for weight in parts]
    width = len(parts[0])
    chosen = torch.randperm(width, generator=generator)[: round(fraction * width)]
    for number, weight in enumerate(parts):
        rows = weight.t() if number == 2 else weight
        old = rows[chosen].float()
        rows[chosen] = (torch.randn(old.shape, generator=generator) * old.std() + old.mean()).to(weight.dtype)
    return parts


def card(config: UpcycleConfig, target: Any) -> str:
    """The model card of a model that was upcycled and not trained yet."""
    settings = ", ".join(
        f"{key} {value}" for key, value in asdict(config).items() if key not in ("model", "out", "dry_run")
    )
    return (
        f"---\nlibrary_name: transformers\ntags: [mixture-of-experts, capgap]\nbase_model: {config.model}\n---\n\n"
        f"# {config.out.name}\n\nA {target.model_type} made from `{config.model}` with `capgap upcycle` ({settings}), "
        "not trained yet.\n"
    )


if __name__ == "__main__":
    import sys

    sys.exit(main())
