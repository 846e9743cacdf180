"""Counts parameters, multiply-accumulates and bytes of a run before it starts."""

from dataclasses import asdict, dataclass

from torch import nn

from pipeline.config import RunConfig
from pipeline.models.modeling_minimoe import MiniMoEAttention, MiniMoEFeedForward


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def linear_macs(encoder: nn.Module, length: int) -> int:
    """Multiply-accumulates of the linear layers of one row of `length` tokens, active experts only.

    Embeddings, attention scores and norms are not counted. The papers print this figure as "GFLOPs"; an operation
    count would be twice as large.
    """
    per_token = 0
    for module in encoder.modules():
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
    student: nn.Module, teacher: nn.Module, config: RunConfig, *, zero_stage: int, world_size: int, length: int
) -> MemoryEstimate:
    """What one rank will hold at the height of a step. Allocators round up and libraries add workspaces."""
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    total = num_parameters(student)
    bf16 = config.engine.precision == "bf16"
    size = 2 if bf16 else 4
    split = [1, world_size, world_size, world_size][zero_stage]
    master = 4 if bf16 or zero_stage else 0
    tokens = config.batch.micro_size * length
    hidden, ffn = config.student.hidden_size, config.student.intermediate_size
    # Per block: queries, keys, values, context, two normalised sums and their inputs, and twice the inner layer.
    block = tokens * (9 * hidden + 2 * ffn) * size
    blocks = 1 if config.engine.activation_checkpointing else config.student.num_hidden_layers
    kept = config.student.num_hidden_layers * tokens * hidden * size if config.engine.activation_checkpointing else 0
    teacher_hidden = next(teacher.parameters()).shape[-1] if num_parameters(teacher) else hidden
    passing = tokens * 12 * teacher_hidden * size
    relations = tokens * 3 * (2 * hidden + teacher_hidden) * 4
    return MemoryEstimate(
        weights=total * size,
        gradients=trained * (4 if bf16 else size) // (split if zero_stage >= 2 else 1),
        optimizer=trained * (8 + master) // split,
        activations=blocks * block + kept + passing + relations,
        teacher=num_parameters(teacher) * size,
    )
