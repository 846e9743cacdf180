"""One rank of several small trainings, each compared with a bare single-process loop over the same global batches.

Started by `engine_launching.run_cases` with a file of cases; starting ranks costs more than training them.
"""

import json
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoints
from pipeline.batches import BatchPlan
from pipeline.building import build_models, load_models
from pipeline.config import RunConfig, load_run_config
from pipeline.losses import compute_losses
from pipeline.optimizer import parameter_groups
from pipeline.parallel import backward, gradient_norm, join, replicated_gradient_norm, start_engine, take_step
from pipeline.preflight import check_run
from pipeline.ranks import place_from_environment
from pipeline.reseeding import reseed
from pipeline.state_files import StateFiles
from pipeline.state_pieces import held_pieces, updates_taken

RATES = (1e-3, 8e-4, 6e-4, 4e-4, 2e-4, 1e-4)
STILL = ("--student.dropout", "0", "--student.router_jitter", "0")
ROUTER_WEIGHTS = {"balance": 0.5, "router_z": 0.01}
ENCODER_WEIGHTS = {"relation_kl": 1.0, **ROUTER_WEIGHTS}
DECODER_WEIGHTS = {"logit_kl": 0.5, "cross_entropy": 0.5, **ROUTER_WEIGHTS}


def summed_loss(student: Any, teacher: Any, config: RunConfig) -> torch.Tensor:
    weights = DECODER_WEIGHTS if config.student.architecture == "decoder" else ENCODER_WEIGHTS
    if config.loss.hidden_cosine:
        weights = weights | {"hidden_cosine": config.loss.hidden_cosine}
    return compute_losses(weights, student, teacher, config.loss).total


def with_shares(seen: Any, loads: dict[str, torch.Tensor]) -> Any:
    routers = {
        name: replace(router, load_share_E=loads[name] / loads[name].sum()) for name, router in seen.routers.items()
    }
    return replace(seen, routers=routers)


def move_biases(student: Any, loads: dict[str, torch.Tensor], config: RunConfig) -> None:
    if config.student.selection_bias_rate:
        student.move_selection_biases(loads, config.student.selection_bias_rate)


class BareLoop:
    """What every cut of the work must equal: one process, the whole batch at once, plain torch."""

    def __init__(self, config: RunConfig, checked: Any, prepare: Any):
        self.config = config = replace(config, batch=replace(config.batch, micro_size=config.batch.global_size))
        models = build_models(config, checked)
        self.student, self.teacher = load_models(config, checked, *models, torch.device("cpu"), is_sharded=False)
        prepare(self.student)
        self.plan = BatchPlan(checked.shards, config.batch, config.data.order_seed, 0, 1)
        self.adam = torch.optim.AdamW(
            parameter_groups(self.student, config.optimizer.weight_decay),
            lr=1.0,
            betas=config.optimizer.betas,
            eps=config.optimizer.epsilon,
        )

    def step(self, step: int) -> tuple[float, float]:
        """Loss per token and gradient norm of a step."""
        data = self.plan.step_data(step)
        (batch,) = data.micro_batches
        seen = self.student(batch)
        loads = {name: router.tokens_per_expert_E for name, router in seen.routers.items()}
        seen = with_shares(seen, loads)
        loss = summed_loss(seen, self.teacher(batch), self.config) / data.num_valid_tokens
        loss.backward()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.optimizer.max_grad_norm or float("inf"))
        for group in self.adam.param_groups:
            group["lr"] = RATES[step]
        self.adam.step()
        self.adam.zero_grad()
        move_biases(self.student, loads, self.config)
        return float(loss.detach()), float(norm)


class EngineLoop:
    """The same steps on a DeepSpeed engine, this process being one of its ranks."""

    def __init__(self, config: RunConfig, checked: Any, ranks: Any, prepare: Any):
        self.config, self.ranks = config, ranks
        models = build_models(config, checked)
        self.student, self.teacher = load_models(config, checked, *models, torch.device("cpu"), is_sharded=False)
        prepare(self.student)
        self.engine = start_engine(self.student, config, ranks)
        self.student.train()
        if config.engine.activation_checkpointing:
            self.student.backbone.gradient_checkpointing_enable()
        self.plan = BatchPlan(checked.shards, config.batch, config.data.order_seed, ranks.rank, ranks.world_size)
        self.topology = checkpoints.Topology(
            ranks.world_size, checked.zero_stage, config.engine.precision, config.engine.expert_parallel_size
        )

    def step(self, step: int) -> tuple[float, float]:
        data, ranks, engine = self.plan.step_data(step), self.ranks, self.engine
        num_tokens = sum(ranks.gather(data.num_valid_tokens))
        loads: dict[str, Any] = {}
        with torch.no_grad():
            for batch in data.micro_batches:
                for name, router in engine(batch).routers.items():
                    loads[name] = loads.get(name, 0) + router.tokens_per_expert_E
        for load in loads.values():
            torch.distributed.all_reduce(load)
        for group in engine.optimizer.param_groups:
            group["lr"] = RATES[step]
        scale, total, norm = len(data.micro_batches) * ranks.world_size / num_tokens, 0.0, None
        self.was_applied = False
        for batch in data.micro_batches:
            seen_by_teacher = self.teacher(batch)
            seen = with_shares(engine(batch), loads)
            loss = summed_loss(seen, seen_by_teacher, self.config)
            backward(engine, loss * scale)
            norm = replicated_gradient_norm(engine)
            self.was_applied = take_step(engine)
            total += float(loss.detach())
        if self.was_applied:
            move_biases(self.student, loads, self.config)
        return sum(ranks.gather(total)) / num_tokens, norm or gradient_norm(engine)

    def poisoned_step(self, step: int, where: str, rank: int) -> bool:
        """A step in which something of one rank is not finite: whether any rank applied it, or any weight changed."""

        def poisoned(tensor: torch.Tensor) -> torch.Tensor:
            return tensor * float("nan") if self.ranks.rank == rank else tensor

        if where == "gradient of an expert":
            name, parameter = next((n, p) for n, p in self.student.named_parameters() if ".experts." in n)
            assert name.endswith(("w1", "gate_up_proj"))
            handle = parameter.register_hook(poisoned)
        else:
            model = {"input": self.student, "teacher": self.teacher}[where]
            embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Embedding))
            handle = embedding.register_forward_hook(lambda module, inputs, output: poisoned(output))
        before = [piece.views["weight"].clone() for piece in held_pieces(self.engine)]
        self.step(step)
        handle.remove()
        after = [piece.views["weight"] for piece in held_pieces(self.engine)]
        is_same = all(old.equal(new) for old, new in zip(before, after, strict=True))
        return any(self.ranks.gather(self.was_applied or not is_same))

    def compared_with(self, bare: BareLoop) -> dict[str, float]:
        """The largest difference of any weight and moment on any rank, and the parameters that no rank holds."""
        stored, buffers = bare.student.state_dict(), dict(bare.student.named_buffers())
        parameters: dict[str, Any] = dict(bare.student.named_parameters())
        parameters |= {name: buffer for name, buffer in buffers.items() if name in stored}
        largest = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), 0.0)
        covered: dict[str, int] = {}
        for piece in held_pieces(self.engine):
            whole = parameters[piece.name]
            expected = {"weight": whole.detach(), **bare.adam.state.get(whole, {})}
            assert piece.shape == tuple(whole.shape), (piece.name, piece.shape, whole.shape)
            for name, view in piece.views.items():
                wanted = expected[name].flatten()[piece.start : piece.start + piece.numel]
                largest[name] = max(largest[name], float((view - wanted).abs().max()))
            covered[piece.name] = covered.get(piece.name, 0) + len(range(*piece.owned.indices(piece.numel)))
        everywhere = self.ranks.gather((largest, covered))
        for name, whole in parameters.items():
            numel = sum(part[1].get(name, 0) for part in everywhere)
            assert numel == whole.numel(), f"{name}: {numel} of {whole.numel()} elements are written"
        return {name: max(part[0][name] for part in everywhere) for name in largest}

    def differences_from_files(self, path: Path) -> float:
        """The largest difference of anything that any rank holds from what the checkpoint says."""
        with ExitStack() as opened:
            state = StateFiles(sorted(path.glob("*.safetensors")), opened)
            largest = 0.0
            for piece in held_pieces(self.engine):
                for part, view in piece.views.items():
                    wanted = state.whole(part, piece.name).flatten()[piece.start : piece.start + piece.numel]
                    largest = max(largest, float((view - wanted).abs().max()))
        return max(self.ranks.gather(largest))


def starve_an_expert(student: Any) -> None:
    """The last expert of the last layer gets no token, on any rank."""
    with torch.no_grad():
        student.backbone.layers[-1].moe.gate.bias[-1] = -100.0


COLLAPSED = [0.02, 0.9, 0.06, 0.02]


def reseed_bare(bare: BareLoop, router: str) -> None:
    """What `reseed` must do to an engine, on whole tensors: experts 0 and 3 become copies of expert 1."""
    generator = torch.Generator().manual_seed(7)
    tensors = {**dict(bare.student.named_parameters()), **dict(bare.student.named_buffers())}
    for name in sorted(name for name in tensors if f".{router}." in name):
        weight = tensors[name].detach()
        for expert in (0, 3):
            new = weight[1].clone()
            if weight.dim() > 1:
                noise = torch.randn(new.numel(), generator=generator).view(new.shape)
                new += 0.01 * new.square().mean().sqrt() * noise
            weight[expert] = new
            for moment in ("exp_avg", "exp_avg_sq"):
                if name in dict(bare.student.named_parameters()):
                    state = bare.adam.state[tensors[name]][moment]
                    state[expert] = state[1]


def run_case(case: dict[str, Any], recipe: str, ranks: Any) -> dict[str, Any]:
    config = load_run_config(case["recipe"] or recipe, [*STILL, *case["flags"]])
    checked = check_run(config, ranks.world_size)
    prepare = starve_an_expert if case["starve"] else lambda student: None
    # In float32 even where the ranks run in bf16.
    still = replace(config, engine=replace(config.engine, precision="fp32"))
    bare = BareLoop(still, checked, prepare)
    loop = EngineLoop(config, checked, ranks, prepare)
    first, last = case["steps"]
    result: dict[str, Any] = {"loss": [], "norm": []}
    if case["resume"]:
        for step in range(first):
            bare.step(step)
        path = Path(case["resume"])
        record = checkpoints.verified_record(path)
        checkpoints.load(path, record, loop.engine, ranks, loop.topology, seed=0)
        result["after load"] = loop.differences_from_files(path)
        assert updates_taken(loop.engine) == first
    if case["poison"]:
        result["applied"] = {
            f"{where} of rank {rank}": loop.poisoned_step(first, where, rank)
            for where in ("input", "teacher", "gradient of an expert")
            for rank in range(ranks.world_size)
        }
    for step in range(first, last):
        (wanted, wanted_norm), (loss, norm) = bare.step(step), loop.step(step)
        result["loss"].append(abs(loss - wanted))
        result["norm"].append(abs(norm - wanted_norm))
        if case["reseed"] and step == first:
            router = loop.student.router_names[0]
            assert reseed(loop.engine, ranks, router=router, load=COLLAPSED, seed=7) == [0, 3]
            reseed_bare(bare, router)
        result.setdefault("losses", []).append(loss)
        result.setdefault("norms", []).append(norm)
    result |= loop.compared_with(bare)
    result["experts here"] = {
        getattr(parameter, "ds_shape", parameter.shape)[0]
        for name, parameter in loop.student.named_parameters()
        if name.endswith((".experts.w1", ".experts.gate_up_proj"))
    }.pop()
    if case["save"]:
        position = checkpoints.Position(last, 0)
        saved = checkpoints.save(
            Path(case["save"]), loop.engine, ranks, position=position, topology=loop.topology, rank_state={},
            fingerprints={},
        )  # fmt: skip
        result["saved"] = str(saved)
    loop.engine.destroy()
    return result


def main() -> int:
    cases, recipe, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], Path(sys.argv[3])
    ranks = join(place_from_environment(), 1.0)
    for name, case in cases.items():
        print(f"rank {ranks.rank}: {name}", flush=True)
        try:
            result = run_case(case, recipe, ranks)
        except Exception:
            traceback.print_exc()
            return 1
        if ranks.rank == 0:
            with (out / "results.jsonl").open("a") as file:
                file.write(json.dumps({name: result}) + "\n")
    ranks.barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
