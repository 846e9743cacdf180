"""Counts parameters, multiply-accumulates and bytes of a run before it starts."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from capgap_kernels.linear_kl import CHUNK_BYTES
from pipeline.config import RunConfig
from pipeline.models.decoders import is_mixture
from pipeline.models.modeling_minimoe import MiniMoEAttention, MiniMoEFeedForward


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def num_active_parameters(model: nn.Module) -> int:
    """Parameters that one token meets: of each layer of experts, the chosen ones."""
    spared = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if is_mixture(module):
            spared += sum(weight.numel() for weight in module.experts.parameters()) - _active_in(module, model)
        elif isinstance(module, MiniMoEAttention) and module.gate is not None:
            maps = (module.qkv_weight, module.qkv_bias, module.output_weight, module.output_bias)
            spared += sum(parameter[1:].numel() for parameter in maps)
    return num_parameters(model) - spared


def _active_in(module: Any, model: Any) -> int:
    """Parameters of a layer's experts that one token meets."""
    chosen = getattr(model.config, "num_experts_per_tok", 1)
    return chosen * sum(weight[0].numel() for weight in module.experts.parameters())


def linear_macs(encoder: nn.Module, length: int) -> int:
    """Multiply-accumulates of the linear layers of one row of `length` tokens, active experts only.

    Embeddings, attention scores and norms are not counted. The papers print this figure as "GFLOPs"; an operation
    count would be twice as large.
    """
    per_token = 0
    for module in encoder.modules():
        if is_mixture(module) and not isinstance(module, MiniMoEFeedForward):
            # transformers keeps gates and experts as bare parameters.
            per_token += module.gate.weight.numel() + _active_in(module, encoder)
        if isinstance(module, nn.Linear):
            per_token += module.weight.numel()
        elif isinstance(module, MiniMoEFeedForward):
            per_token += module.experts.w1[0].numel() + module.experts.w2[0].numel()
        elif isinstance(module, MiniMoEAttention) and module.gate is not None:
            per_token += module.qkv_weight[0].numel() + module.output_weight[0].numel()
    return per_token * length


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in asdict(self).items())
        return f"{self.total / 2**20:.0f} MiB ({parts})"


def checkpoint_bytes(student: nn.Module) -> int:
    """Bytes of one checkpoint over all ranks: weights, their float32 master copy and two moments."""
    return 16 * num_parameters(student)


def estimate_memory(
    student: nn.Module,
    teacher: nn.Module,
    config: RunConfig,
    *,
    zero_stage: int,
    world_size: int,
    length: int,
    teacher_shards: int = 1,
) -> MemoryEstimate:
    """What one rank will hold at the height of a step. Allocators round up and libraries add workspaces."""
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    total = num_parameters(student)
    bf16 = config.engine.precision == "bf16"
    size = 2 if bf16 else 4
    split = [1, world_size, world_size, world_size][zero_stage]
    master = 4 if bf16 or zero_stage else 0
    tokens = config.batch.micro_size * length
    shape: Any = student.get_submodule("backbone").config
    is_decoder = config.student.architecture == "decoder"
    hidden, num_layers = shape.hidden_size, shape.num_hidden_layers
    ffn = getattr(shape, "moe_intermediate_size", shape.intermediate_size) * getattr(shape, "num_experts_per_tok", 1)
    # Per block: queries, keys, values, context, two normalised sums and their inputs, and the inner layer before and
    # after its activation (a gated one also by the gate).
    block = tokens * (9 * hidden + (3 if is_decoder else 2) * ffn) * size
    blocks = 1 if config.engine.activation_checkpointing else num_layers
    kept = num_layers * tokens * hidden * size if config.engine.activation_checkpointing else 0
    teacher_hidden = next(teacher.parameters()).shape[-1] if num_parameters(teacher) else hidden
    passing = tokens * 12 * teacher_hidden * size
    # The vocabulary loss holds the head's gradient and two chunks of logits, the relation loss nine maps.
    chunk = min(tokens * shape.vocab_size * size, max(CHUNK_BYTES.values()))
    over_vocabulary = shape.vocab_size * hidden * 4 + 2 * chunk
    loss = over_vocabulary if is_decoder else tokens * 3 * (2 * hidden + teacher_hidden) * 4
    return MemoryEstimate(
        weights=total * size,
        gradients=trained * (4 if bf16 else size) // (split if zero_stage >= 2 else 1),
        optimizer=trained * (8 + master) // split,
        activations=blocks * block + kept + passing + loss,
        teacher=num_parameters(teacher) * size // teacher_shards,
    )
