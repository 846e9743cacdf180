"""Ranks, process groups and the DeepSpeed engine."""

import math
import os
import socket
import subprocess
import warnings
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig, load_ds_config
from pipeline.optimizer import parameter_groups
from pipeline.ranks import Place


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup
    """A gloo group for flags and counts, which therefore never wait for the GPU."""
    store: dist.Store
    """Shared by all ranks; who has arrived where."""

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values


def join(place: Place, timeout_minutes: float) -> Ranks:
    """Joins the process group as the rank that the launcher named."""
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    _export(place)
    import deepspeed

    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    else:
        _skip_cpu_op_builds()
    # Longer than what the HangWatch allows: it names the rank that is missing, a collective only says that it gave up.
    patience = timedelta(minutes=1.5 * timeout_minutes + 0.5)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=patience, verbose=False)
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    control = dist.new_group(backend="gloo", timeout=patience)
    store = dist.PrefixStore("capgap", dist.distributed_c10d._get_default_store())
    return Ranks(place.rank, place.local_rank, place.world_size, device, control, store)


def _export(place: Place) -> None:
    """DeepSpeed reads its place from the environment; srun and a plain `python -m` do not put it there."""
    os.environ["RANK"] = str(place.rank)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ["WORLD_SIZE"] = str(place.world_size)
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if place.launcher == "slurm":
        nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        first = subprocess.run(nodes, capture_output=True, text=True, check=True).stdout.split()[0]
        os.environ.setdefault("MASTER_ADDR", first)
        # Below the ephemeral ports, and the same on every rank without asking anybody.
        os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ["SLURM_JOB_ID"]) % 20000))
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.setdefault("MASTER_PORT", str(probe.getsockname()[1]))
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def _skip_cpu_op_builds() -> None:
    """Tells DeepSpeed that no compiled op fits this machine.

    On a CPU it would otherwise build a shared-memory all-reduce at start (40 s, or for ever after a killed
    build).
    """
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    deepspeed.ops.__dict__["__compatible_ops__"] = dict.fromkeys(ALL_OPS, False)


def engine_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: the chosen JSON, and what RunConfig says."""
    settings = load_ds_config(config.engine.ds_config)
    settings |= {
        "train_micro_batch_size_per_gpu": config.batch.micro_size,
        "gradient_accumulation_steps": config.batch.accumulation_steps(world_size),
        "gradient_clipping": config.optimizer.max_grad_norm,
        "steps_per_print": 2**31,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.optimizer.learning_rate,
                "betas": list(config.optimizer.betas),
                "eps": config.optimizer.epsilon,
                "weight_decay": config.optimizer.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
    }
    if config.engine.expert_parallel_size > 1:
        from pipeline.expert_parallel import autoep_settings

        is_decoder = config.student.architecture == "decoder"
        settings |= {"expert_parallel": autoep_settings(config.engine.expert_parallel_size, is_decoder=is_decoder)}
    if config.engine.precision == "bf16":
        # Summing micro-batch gradients in bf16 loses their low bits.
        settings |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return settings


def start_engine(student: nn.Module, config: RunConfig, ranks: Ranks) -> Any:
    """A DeepSpeed engine around the student, with its optimizer."""
    import deepspeed

    student.to(ranks.device)
    spread = config.engine.expert_parallel_size > 1
    if spread:
        from pipeline.expert_parallel import prepare_layers, use_our_layers

        kept = prepare_layers(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(
            model=student,
            model_parameters=parameter_groups(student, config.optimizer.weight_decay),
            config=engine_settings(config, ranks.world_size),
        )
    if spread:
        use_our_layers(student, kept, config.student.router_jitter)
        if engine.zero_optimization_stage() == 0:
            # DeepSpeed's own (issue 8475) clips on each rank by the norm of the experts of that rank.
            engine.clip_fp32_gradients = partial(_clip_replicated_gradients, engine)
    if engine.zero_optimization_stage() == 3:
        _keep_whole(engine, student)
    return engine


def _keep_whole(engine: Any, student: Any) -> None:
    """Exempts a head from ZeRO 3's partitioning between uses: the losses read it after the forward that gathers it."""
    head = student.backbone.get_output_embeddings()
    parameters = [] if head is None else list(head.parameters())
    kept = engine.optimizer.persistent_parameters
    for parameter in parameters:
        parameter.ds_persist = True
        if not any(parameter is other for other in kept):
            kept.append(parameter)
    if parameters:
        parameters[0].all_gather(parameters)


def backward(engine: Any, loss: Tensor) -> None:
    """engine.backward(loss), prepared as DeepSpeed means it to be.

    It prepares each backward in hooks on the tensors that the forward returned, which it does not find inside our
    Signals. Without that, bf16 at ZeRO 1 counts the first of several micro-batches once more with each later one.
    """
    from deepspeed.runtime.utils import register_output_backward_hooks

    register_output_backward_hooks(
        loss,
        preprocess_once_fn=engine._backward_prologue,
        preprocess_per_tensor_fn=engine._backward_prologue_per_tensor,
    )
    engine.backward(loss)


def take_step(engine: Any) -> bool:
    """engine.step(), which updates the weights at the last micro-batch; False when the gradient was not finite.

    Then no weight, moment or master copy has changed, on any rank. The engine refuses such a step by itself, except in
    fp32 without ZeRO.
    """
    norm = replicated_gradient_norm(engine)
    if norm is not None and not math.isfinite(norm):
        for parameter in engine.module.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        engine.optimizer.step = lambda *_: None
        try:
            engine.step()
        finally:
            del engine.optimizer.step
        return False
    engine.step()
    return bool(engine.was_step_applied())


def replicated_gradient_norm(engine: Any) -> float | None:
    """The global gradient norm where DeepSpeed keeps none: fp32 without ZeRO. Call it between backward and step."""
    if engine.zero_optimization_stage() != 0 or not engine.is_gradient_accumulation_boundary():
        return None
    return float(_norm_of_replicated_gradients(engine))


def _norm_of_replicated_gradients(engine: Any) -> Tensor:
    """The norm over the whole model, the same on every rank: experts of other ranks are asked for theirs."""
    from deepspeed.utils import groups

    norms: dict[str | None, list[Tensor]] = {None: []}
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            is_spread = not getattr(parameter, "allreduce", True)
            norms.setdefault(parameter.group_name if is_spread else None, []).append(parameter.grad)
    squared = torch.zeros((), device=engine.device)
    for name, gradients in norms.items():
        part = nn.utils.get_total_norm(gradients).to(engine.device).square()
        if name is not None:
            dist.all_reduce(part, group=groups._get_expert_parallel_group(name))
        squared = squared + part
    return squared.sqrt()


def _clip_replicated_gradients(engine: Any) -> None:
    factor = engine.gradient_clipping() / (_norm_of_replicated_gradients(engine) + 1e-6)
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor.clamp(max=1.0))


def gradient_norm(engine: Any) -> float | None:
    """Global gradient norm before clipping of the step that has just been taken, where DeepSpeed keeps one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)
