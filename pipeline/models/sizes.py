"""Counts parameters, multiply-accumulates and bytes of a run before it starts."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from capgap_kernels.linear_kl import CHUNK_BYTES
from pipeline.config import RunConfig, load_ds_config
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
    """Bytes on one rank, on the device that trains."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    losses: int
    teacher: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in asdict(self).items())
        return f"{self.total / 2**20:.0f} MiB ({parts})"


def checkpoint_bytes(student: nn.Module) -> int:
    """Bytes of one checkpoint over all ranks: weights, their float32 master copy and two moments."""
    return 16 * num_parameters(student)


LIBRARIES = 160 * 2**20  # on a CPU: scratch memory of oneDNN and modules that are imported on first use
BUCKET = 500_000_000  # elements that DeepSpeed reduces at a time, unless its config says otherwise


def estimate_memory(
    student: nn.Module,
    teacher: nn.Module,
    config: RunConfig,
    *,
    zero_stage: int,
    world_size: int,
    length: int,
    on_gpu: bool = False,
    teacher_shards: int = 1,
) -> MemoryEstimate:
    """What one rank will hold at the height of a step.

    On CPUs it is within 15 % of the peaks that were measured (tests/distributed/test_memory.py). The C library keeps
    most of what is freed, so the parts of a step that follow each other are added there; on a GPU that is too much.
    """
    shape: Any = student.get_submodule("backbone").config
    zero = load_ds_config(config.engine.ds_config).get("zero_optimization", {})
    offloaded = {
        part for part in ("offload_optimizer", "offload_param") if on_gpu and zero.get(part, {}).get("device") == "cpu"
    }
    is_bf16, is_decoder = config.engine.precision == "bf16", config.student.architecture == "decoder"
    size = 2 if is_bf16 else 4
    weights, gradients, optimizer = _trained_bytes(student, config, zero_stage, world_size, zero, on_gpu)
    if is_bf16 and not on_gpu:
        weights += 4 * num_parameters(student)  # it was built in float32
    tokens, num_layers = config.batch.micro_size * length, shape.num_hidden_layers
    recomputed = config.engine.activation_checkpointing
    per_token = _bytes_per_token_and_block(shape, is_decoder, size)
    if config.student.dropout:
        # Masks, what they leave, and an attention that keeps its scores.
        per_token += 8 * shape.hidden_size * size
    # Recomputed, one block and the temporaries of its backward are there at a time.
    activations = tokens * per_token * (2 if recomputed else num_layers)
    if recomputed:
        activations += num_layers * tokens * shape.hidden_size * size
    teacher_hidden = next(teacher.parameters()).shape[-1] if num_parameters(teacher) else shape.hidden_size
    activations += tokens * 12 * teacher_hidden * size
    # The vocabulary loss holds the head's gradient and two chunks of logits, the relation loss nine maps.
    chunk = min(tokens * shape.vocab_size * size, CHUNK_BYTES["triton" if on_gpu else "eager"])
    over_vocabulary = shape.vocab_size * shape.hidden_size * 4 + 2 * chunk
    return MemoryEstimate(
        weights=0 if "offload_param" in offloaded else weights,
        gradients=gradients,
        optimizer=0 if offloaded else optimizer,
        activations=activations,
        losses=over_vocabulary if is_decoder else tokens * 3 * (2 * shape.hidden_size + teacher_hidden) * 4,
        teacher=num_parameters(teacher) * size // teacher_shards,
        libraries=0 if on_gpu else LIBRARIES,
    )


def _trained_bytes(
    student: nn.Module, config: RunConfig, zero_stage: int, world_size: int, zero: dict[str, Any], on_gpu: bool
) -> tuple[int, int, int]:
    """Weights, gradients and optimizer of a rank."""
    numel = {name: parameter.numel() for name, parameter in student.named_parameters() if parameter.requires_grad}
    experts = sum(count for name, count in numel.items() if ".experts." in name)
    trained = sum(numel.values())
    frozen = num_parameters(student) - trained
    is_bf16 = config.engine.precision == "bf16"
    size = 2 if is_bf16 else 4
    here = trained - experts + experts // config.engine.expert_parallel_size
    # Experts that are spread already are cut further between the ranks that hold the same ones.
    share = trained // world_size
    bucket = int(zero.get("reduce_bucket_size", BUCKET))
    # A GPU gives all of it at once, and twice to overlap; a CPU only the pages that are written.
    bucket = bucket * (2 if zero.get("overlap_comm") else 1) if on_gpu else min(here, bucket)
    sums = 4 * here if is_bf16 else 0
    if zero_stage == 0:
        return (here + frozen) * size, here * size, 8 * here
    optimizer = (8 + 4) * share
    # The step copies the gradients of a rank's share once more, in float32.
    if zero_stage == 1:
        return (here + frozen) * size, here * size + sums + 4 * share, optimizer
    if zero_stage == 2:
        staged = size * share if "offload_optimizer" in zero else 0
        return (here + frozen) * size, bucket * size + 4 * share + staged, optimizer
    gathered = min(here, int(zero.get("stage3_max_live_parameters", 10**9)))
    return (share + frozen // world_size + gathered) * size, 2 * bucket * size + 2 * 4 * share, optimizer


def _bytes_per_token_and_block(shape: Any, is_decoder: bool, size: int) -> int:
    """What the backward of a block needs, per token."""
    hidden, chosen = shape.hidden_size, getattr(shape, "num_experts_per_tok", 0)
    ffn = getattr(shape, "moe_intermediate_size", shape.intermediate_size) * max(1, chosen)
    if not is_decoder:
        # Queries, keys, values, context, two sums and their norms, rows sorted by expert and back; the inner layer
        # before and after its activation.
        return (11 * hidden + 2 * ffn) * size
    # Beside those, rotated queries and keys, repeated keys and values; gate, its activation, the other factor and their
    # product. A mixture sorts the chosen rows and puts them back. Norms are computed in float32.
    kept = 15 * hidden + 4 * ffn + 3 * chosen * hidden
    return kept * size + (12 * hidden if size == 2 else 0)
