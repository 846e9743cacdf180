"""Parameter groups, and the learning rate as a pure function of the step."""

import math
from typing import Any

from torch import nn

from pipeline.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices and embeddings decay, biases and norms do not.

    The packed expert biases `w3` are three-dimensional but biases all the same.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = parameter.dim() < 2 or name.endswith((".w3", "_bias"))
        (plain if is_bias else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "plain"},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """The rate of optimizer step `step` (counted from 0) of `num_steps`.

    It rises over the warm-up so that the first step already moves, and reaches its end with the last step.
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = config.final_learning_rate_ratio
    fall = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress)), "constant": 1.0}[
        config.schedule
    ]
    return config.learning_rate * (floor + (1 - floor) * fall)
