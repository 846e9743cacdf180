"""Gives a student its first weights from a BERT-family model, and one feed-forward layer's neurons to experts."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertModel

from data_prep.errors import ConfigError
from pipeline.config import StudentConfig
from pipeline.models.modeling_minimoe import MiniMoEModel

# E experts, F width of an expert, S width of the source layer, D hidden width


def spread_layers(num_source: int, num_student: int) -> tuple[int, ...]:
    """Evenly spaced source layers that end at the last: 12 -> 3 gives 3, 7, 11."""
    return tuple((index + 1) * num_source // num_student - 1 for index in range(num_student))


@torch.no_grad()
def copy_bert_layers(student: BertModel, source: nn.Module, layers: tuple[int, ...]) -> None:
    """Copies embeddings and the chosen layers of a BERT-family encoder into a BertModel of the same widths."""
    taken = dict(source.state_dict())
    own = student.state_dict()
    for name, tensor in own.items():
        source_name = name
        if name.startswith("encoder.layer."):
            index, rest = name.removeprefix("encoder.layer.").split(".", 1)
            source_name = f"encoder.layer.{layers[int(index)]}.{rest}"
        if source_name not in taken:
            raise ConfigError(f"student.init_from has no weight {source_name} - only BERT-family models can be copied")
        given = taken[source_name]
        # A RoBERTa has two more positions than BERT and one segment: the rows that fit are copied.
        if name.startswith("embeddings.") and given.shape[1:] == tensor.shape[1:]:
            rows = min(len(given), len(tensor))
            tensor[:rows].copy_(given[:rows])
        elif given.shape != tensor.shape:
            raise ConfigError(
                f"student.init_from: {source_name} has shape {list(given.shape)}, the student needs "
                f"{list(tensor.shape)} - set student widths to the source's, or leave init_from out"
            )
        else:
            tensor.copy_(given)


@torch.no_grad()
def fill_minimoe(student: MiniMoEModel, source: BertModel, config: StudentConfig, generator: torch.Generator) -> None:
    """Turns a dense encoder into MiniMoE: everything is copied, each feed-forward layer becomes experts."""
    dense = dict(source.state_dict())

    def take(target: Any, name: str) -> None:
        target.copy_(dense[name])

    for part in ("word", "position", "token_type"):
        take(getattr(student.embeddings, f"{part}_embeddings").weight, f"embeddings.{part}_embeddings.weight")
    take(student.embeddings.norm.weight, "embeddings.LayerNorm.weight")
    take(student.embeddings.norm.bias, "embeddings.LayerNorm.bias")
    for index, layer in enumerate(student.layers):
        bert = f"encoder.layer.{index}."
        attention = layer.attention
        maps = [bert + f"attention.self.{part}" for part in ("query", "key", "value")]
        output = bert + "attention.output.dense"
        if attention.gate is None:
            for linear, name in zip((attention.query, attention.key, attention.value), maps, strict=True):
                take(linear.weight, name + ".weight")
                take(linear.bias, name + ".bias")
            take(attention.output.weight, output + ".weight")
            take(attention.output.bias, output + ".bias")
        else:
            attention.qkv_weight.copy_(torch.cat([dense[name + ".weight"] for name in maps]))
            attention.qkv_bias.copy_(torch.cat([dense[name + ".bias"] for name in maps]))
            attention.output_weight.copy_(dense[output + ".weight"])
            attention.output_bias.copy_(dense[output + ".bias"])
        for norm, name in ((layer.attention_norm, "attention.output"), (layer.output_norm, "output")):
            take(norm.weight, f"{bert}{name}.LayerNorm.weight")
            take(norm.bias, f"{bert}{name}.LayerNorm.bias")
        w1_EFD, b1_EF, w2_EDF, b2_ED = split_experts(
            dense[bert + "intermediate.dense.weight"],
            dense[bert + "intermediate.dense.bias"],
            dense[bert + "output.dense.weight"],
            dense[bert + "output.dense.bias"],
            num_experts=config.num_experts,
            width=config.intermediate_size,
            how=config.expert_init,
            shared_fraction=config.shared_fraction,
            generator=generator,
        )
        layer.moe.experts.w1.copy_(w1_EFD)
        layer.moe.experts.w2.copy_(w2_EDF)
        layer.moe.experts.w3.copy_(torch.cat([b1_EF, b2_ED], dim=-1).unsqueeze(1))


def split_experts(
    w1_SD: Tensor,
    b1_S: Tensor,
    w2_DS: Tensor,
    b2_D: Tensor,
    *,
    num_experts: int,
    width: int,
    how: str,
    shared_fraction: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One dense feed-forward layer of S neurons as E experts of F: w1 [E, F, D], b1 [E, F], w2 [E, D, F], b2 [E, D].

    `identical` repeats the layer. `shared` keeps its first neurons in every expert and deals out the ones beyond, as
    far as there are any, expert by expert (arXiv 2305.12129); neurons still missing are drawn with the mean and spread
    of the layer's own weights (arXiv 2502.19261). `importance` does the same after sorting the neurons by the product
    of the norms of their ingoing and outgoing weights, so that the strongest are the shared ones.
    """
    source_width = w1_SD.shape[0]
    if how == "identical":
        if source_width != width:
            raise ConfigError(
                f"student.expert_init=identical needs student.intermediate_size ({width}) equal to the source's "
                f"({source_width}) - set it so, or use shared or importance"
            )
        repeated = (w1_SD, b1_S, w2_DS, b2_D)
        return tuple(t.unsqueeze(0).repeat(num_experts, *[1] * t.dim()) for t in repeated)  # type: ignore[return-value]
    if how == "importance":
        order = (w1_SD.norm(dim=1) * w2_DS.norm(dim=0)).argsort(descending=True, stable=True)
        w1_SD, b1_S, w2_DS = w1_SD[order], b1_S[order], w2_DS[:, order]
    num_shared = min(round(shared_fraction * width), source_width)
    experts = []
    for expert in range(num_experts):
        own = torch.arange(num_shared + expert, source_width, num_experts) if source_width > width else torch.arange(0)
        kept = torch.cat([torch.arange(num_shared), own])[:width]
        missing = width - len(kept)

        def drawn(like: Tensor, *shape: int) -> Tensor:
            noise = torch.randn(*shape, generator=generator, dtype=like.dtype)
            return noise * like.std() + like.mean()

        experts.append(
            (
                torch.cat([w1_SD[kept], drawn(w1_SD, missing, w1_SD.shape[1])]),
                torch.cat([b1_S[kept], torch.zeros(missing, dtype=b1_S.dtype)]),
                torch.cat([w2_DS[:, kept], drawn(w2_DS, w2_DS.shape[0], missing)], dim=1),
                b2_D,
            )
        )
    w1, b1, w2, b2 = (torch.stack(parts) for parts in zip(*experts, strict=True))
    return w1, b1, w2, b2
