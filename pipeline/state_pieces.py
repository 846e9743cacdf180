"""The trained state of an engine as named pieces of whole tensors, so that any cut of it can be filled from any other.

DeepSpeed flattens, shards and offloads weights and Adam's moments in a way of its own per ZeRO stage. What all of them
share: the part of a parameter that a rank keeps is a run of elements of the flattened parameter. A rank's experts are a
run of the flattened experts as well. A piece is such a run, with views into the engine's own memory: writing a
checkpoint copies out of them, resuming copies into them. Nothing depends on world size, stage or expert parallelism.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A run of elements of one flattened tensor of the student, as this rank holds it."""

    name: str
    """Name in the student, the same for every cut."""
    start: int
    """First element within the whole flattened tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    views: dict[str, Tensor]
    """`weight`, and for trained parameters `exp_avg` and `exp_avg_sq`: flat views, float32 for trained parameters."""
    owned: slice
    """The part of the piece that this rank writes; where several ranks hold the same elements, they share the work."""

    @property
    def numel(self) -> int:
        return self.views["weight"].numel()


def held_pieces(engine: Any) -> list[Piece]:
    """What this rank holds: trained parameters with their moments, frozen ones, and persistent buffers."""
    stage = engine.zero_optimization_stage()
    pieces = []
    for name, parameter in engine.module.named_parameters():
        trained = parameter.requires_grad
        if stage == 3:
            found = _piece_of_stage_3(engine, parameter) if trained else _frozen_piece_of_stage_3(parameter)
        elif stage == 0 or not trained:
            found = 0, _replicated_views(engine, parameter)
        else:
            found = _piece_of_stages_1_and_2(engine, parameter)
        if found is None:
            continue
        start, views = found
        offset, shape = _place_among_experts(parameter)
        is_replicated = not trained or stage == 0
        numel = views["weight"].numel()
        owned = _share(numel, _holders(parameter)) if is_replicated and stage != 3 else slice(0, numel)
        pieces.append(Piece(name, start + offset, shape, views, owned))
    for name, buffer in _persistent_buffers(engine.module):
        views = {"weight": buffer.data.view(-1)}
        pieces.append(Piece(name, 0, tuple(buffer.shape), views, _share(buffer.numel())))
    return pieces


def whole_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """The names and whole shapes of all pieces, whether or not this rank holds a part of them."""
    shapes = {name: _place_among_experts(parameter)[1] for name, parameter in engine.module.named_parameters()}
    return shapes | {name: tuple(buffer.shape) for name, buffer in _persistent_buffers(engine.module)}


def updates_taken(engine: Any) -> int:
    """Adam's step count, the same for every parameter; skipped steps do not count."""
    states = _adam(engine).state.values()
    counts = {int(state["step"]) for state in states if "step" in state}
    assert len(counts) <= 1, f"parameters have taken different numbers of updates: {counts}"
    return counts.pop() if counts else 0


def finish_filling(engine: Any, updates: int) -> None:
    """Sets the step count and the copies that the model runs on; every rank calls it once its pieces are filled."""
    adam = _adam(engine)
    for group in adam.param_groups:
        for key in _flat_keys(engine, group):
            # Its own tensor each: Adam adds one in place, and a shared one would be counted once per group.
            adam.state[key]["step"] = torch.tensor(float(updates), device=key.device if group.get("fused") else "cpu")
    stage = engine.zero_optimization_stage()
    if stage == 3:
        _copy_masters_of_stage_3(engine.optimizer)
    elif stage:
        engine.optimizer.update_lp_params()


def _adam(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _flat_keys(engine: Any, group: dict[str, Any]) -> list[Tensor]:
    """The tensors under which Adam keeps the state of a group."""
    if engine.zero_optimization_stage() == 3:
        # Stage 3 hides them from the groups outside of its own step.
        return engine.optimizer.fp32_partitioned_groups_flat if group is _adam(engine).param_groups[0] else []
    return group["params"]


def _moments(adam: torch.optim.Optimizer, key: Tensor) -> dict[str, Tensor]:
    """Adam's moments of a tensor, created as Adam would where it has not taken a step yet."""
    state = adam.state[key]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(key.data)
    state.setdefault("step", torch.tensor(0.0))
    return {name: state[name].view(-1) for name in MOMENTS}


def _replicated_views(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    views = {"weight": parameter.data.view(-1)}
    return views | _moments(_adam(engine), parameter) if parameter.requires_grad else views


def _piece_of_stages_1_and_2(engine: Any, parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    optimizer, group = engine.optimizer, mapping.param_group_index
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
    flat = (optimizer.fp32_groups_flat_partition if masters is None else masters)[group]
    address = mapping.hp_fragment_address
    run = slice(address.start, address.start + address.numel)
    moments = _moments(_adam(engine), flat)
    return mapping.lp_fragment_address.start, {
        "weight": flat.data[run],
        **{name: value[run] for name, value in moments.items()},
    }


def _piece_of_stage_3(engine: Any, parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
    optimizer = engine.optimizer
    group, offset, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * partition
    # The last partitions end in padding.
    numel = min(partition, parameter.ds_numel - start)
    if numel <= 0:
        return None
    flat = optimizer.fp32_partitioned_groups_flat[group]
    run = slice(offset, offset + numel)
    moments = _moments(_adam(engine), flat)
    return start, {"weight": flat.data[run], **{name: value[run] for name, value in moments.items()}}


def _frozen_piece_of_stage_3(parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
    partition = parameter.ds_tensor.data.view(-1)
    start = dist.get_rank(group=parameter.ds_process_group) * partition.numel()
    numel = min(partition.numel(), parameter.ds_numel - start)
    return None if numel <= 0 else (start, {"weight": partition[:numel]})


def _copy_masters_of_stage_3(optimizer: Any) -> None:
    """What stage 3 does at the end of its step: working partitions from the masters, then the gathered small ones."""
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _place_among_experts(parameter: Any) -> tuple[int, tuple[int, ...]]:
    """Where this rank's tensor starts in the whole one, and the shape of the whole one."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    if getattr(parameter, "allreduce", True):
        return 0, shape
    from deepspeed.utils import groups

    group = groups._get_expert_parallel_group(parameter.group_name)
    numel = 1
    for size in shape:
        numel *= size
    return dist.get_rank(group=group) * numel, (shape[0] * dist.get_world_size(group=group), *shape[1:])


def _holders(parameter: Any) -> Any:
    """The group of ranks that hold the same tensor; None is all of them."""
    if getattr(parameter, "allreduce", True):
        return None
    from deepspeed.utils import groups

    return groups._get_expert_data_parallel_group(parameter.group_name)


def _share(numel: int, holders: Any = None) -> slice:
    """This rank's even share of a run that several ranks hold."""
    rank, size = dist.get_rank(group=holders), dist.get_world_size(group=holders)
    return slice(numel * rank // size, numel * (rank + 1) // size)


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, owner in module.named_modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
