"""Which combinations of ZeRO, offload and expert parallelism are proven; every other one is refused with its mend."""

from typing import Any

from data_prep.errors import ConfigError


def check_parallelism(
    settings: dict[str, Any], *, expert_parallel_size: int, num_experts: int, world_size: int, precision: str
) -> int:
    """The ZeRO stage of a checked DeepSpeed config.

    Args:
        settings: the DeepSpeed JSON.
        num_experts: feed-forward experts per layer of the student; 1 for a dense one.

    Raises:
        ConfigError: names the value and the nearest legal ones.
    """
    zero = settings.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    size = expert_parallel_size
    key = f"engine.expert_parallel_size ({size})"
    if size < 1:
        raise ConfigError(f"{key} must be at least 1")
    if size > 1 and num_experts == 1:
        raise ConfigError(f"{key}: the student is dense, there are no experts to spread - set it to 1")
    if num_experts % size or world_size % size:
        legal = [n for n in range(1, min(num_experts, world_size) + 1) if num_experts % n == 0 and world_size % n == 0]
        what = f"{num_experts} experts" if num_experts % size else f"{world_size} ranks"
        raise ConfigError(f"{key} does not divide {what} - use {_listed(legal)}")
    if stage == 0 and precision == "bf16":
        raise ConfigError(
            "engine.ds_config: ZeRO 0 with bf16 keeps no fp32 sum of the gradients - "
            "use ds_configs/zero1.json, or engine.precision fp32"
        )
    for part in ("offload_optimizer", "offload_param"):
        device = zero.get(part, {}).get("device", "none")
        if device == "nvme":
            raise ConfigError(f"engine.ds_config: {part} to nvme is unproven - use device cpu")
    return stage


def _listed(values: list[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))
