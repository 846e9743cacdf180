"""Distils one student from one teacher: the job behind `deepspeed --module pipeline.distill --config RECIPE`.

Read it from top to bottom: check, build, resume, loop, export.
"""

import argparse
import sys
import time
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import CapgapError, CheckpointError, NumericsError
from data_prep.files import make_folder, write_json
from data_prep.locks import folder_lock
from data_prep.model_folders import keep_code_out_of_home
from data_prep.progress import Progress
from pipeline.building import build_models, describe, load_models, print_plan, require_resources
from pipeline.config import RunConfig, changed_keys, load_run_config, print_fields
from pipeline.failures import explain
from pipeline.preflight import Checked, check_port, check_run
from pipeline.ranks import Place, is_taken, place_from_environment, port_of_launcher, under_srun
from pipeline.watching import end_process, router_health

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.batches import StepData
    from pipeline.checkpoints import Position
    from pipeline.parallel import Ranks
    from pipeline.signals import Batch, RouterSignals, Signals

DONE = "DONE"


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 75 stopped early (0 under srun)."""
    flags, overrides = read_flags(argv)
    place = place_from_environment()
    try:
        config = load_run_config(flags.config, overrides)
        checked = check_run(config, place.world_size)
        if (Path(config.out) / DONE).exists():
            say(place.rank, f"{config.out} is complete already: nothing to do (its export is {config.out}/export)")
            return 0
        if flags.dry_run:
            if place.rank == 0:
                print_plan(config, checked, place.world_size)
            return 0
        meet_at_a_free_port(place)
    except CapgapError as error:
        # Every rank has met the same error. The launcher kills all of them once one is gone: the one that speaks
        # goes first.
        if place.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)
        return error.exit_code
    try:
        return distill(config, checked)
    except Exception as error:
        known = explain(error, config)
        print(f"error: rank {place.rank}: {known}", file=sys.stderr, flush=True)
        end_process(known.exit_code)
        raise  # not reached


def meet_at_a_free_port(place: Place) -> None:
    """Refuses a port that is taken: the ranks would wait for each other until their timeout, or talk to a stranger."""
    port = port_of_launcher()
    if port is None or not is_taken(port):
        return
    if place.rank == 0:
        check_port(port)
    # The launcher ends this rank as soon as rank 0 has said so; or it is rank 0 itself that listens, far ahead of us.
    time.sleep(5)


def read_flags(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """--config, --dry-run and the launcher's --local_rank; the rest are dotted overrides."""
    parser = argparse.ArgumentParser(prog="pipeline.distill", allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0)
    parser.add_argument("-h", "--help", action="store_true")
    flags, overrides = parser.parse_known_args(argv)
    if flags.help or not flags.config:
        print("usage: deepspeed --num_gpus N --module pipeline.distill --config RECIPE.yaml [--dry-run]")
        print("       [--section.field VALUE ...]\n\nEvery field of a recipe is a flag:\n")
        print_fields()
        raise SystemExit(0 if flags.help else 2)
    return flags, overrides


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


@dataclass
class Window:
    """Sums since the last logged step. Tensors stay on the device: reading one would wait for it."""

    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    seconds: float = 0.0
    losses: dict[str, "Tensor"] = field(default_factory=dict)
    routers: dict[str, "RouterSignals"] = field(default_factory=dict)

    def add(self, losses: dict[str, "Tensor"], routers: dict[str, "RouterSignals"]) -> None:
        for name, value in losses.items():
            # In float32 whatever the model's arithmetic: these are sums over many tokens.
            self.losses[name] = self.losses.get(name, 0.0) + value.detach().float()
        for name, new in routers.items():
            old = self.routers.get(name)
            self.routers[name] = replace(
                new,
                gate_sum_E=new.gate_sum_E.detach() + (old.gate_sum_E if old else 0),
                tokens_per_expert_E=new.tokens_per_expert_E + (old.tokens_per_expert_E if old else 0),
                z_loss_sum=new.z_loss_sum.detach() + (old.z_loss_sum if old else 0),
                entropy_sum=new.entropy_sum + (old.entropy_sum if old else 0),
            )

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run logs what the unbroken run would have logged."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "losses": {name: float(value) for name, value in self.losses.items()},
            "routers": {
                name: {part: getattr(router, part).tolist() for part in ROUTER_PARTS}
                for name, router in self.routers.items()
            },
        }

    @staticmethod
    def resumed(states: list[dict[str, Any]], ranks: "Ranks") -> "Window":
        """This rank's window, from those of all ranks of then; on another number of ranks the first takes the sums."""
        if len(states) == ranks.world_size:
            return Window.from_json(states[ranks.rank], ranks.device)
        window, *others = (Window.from_json(state, ranks.device) for state in states)
        for other in others:
            window.add(other.losses, other.routers)
        if ranks.rank > 0:
            window.losses = {name: 0 * value for name, value in window.losses.items()}
            window.routers = {
                name: replace(router, **{part: 0 * getattr(router, part) for part in ROUTER_PARTS})
                for name, router in window.routers.items()
            }
        return window

    @staticmethod
    def from_json(state: dict[str, Any], device: Any) -> "Window":
        import torch

        from pipeline.signals import RouterSignals

        def tensor(value: Any) -> "Tensor":
            return torch.tensor(value, device=device)

        return Window(
            steps=state["steps"],
            tokens=state["tokens"],
            skipped=state["skipped"],
            losses={name: tensor(value) for name, value in state["losses"].items()},
            routers={
                name: RouterSignals(**{part: tensor(value) for part, value in router.items()})
                for name, router in state["routers"].items()
            },
        )


ROUTER_PARTS = ("gate_sum_E", "tokens_per_expert_E", "z_loss_sum", "entropy_sum")


def distill(config: RunConfig, checked: Checked) -> int:
    """Trains, exports, and marks the run done. Returns the exit code."""
    from pipeline.stopping import EXIT_PREEMPTED, StopRequest

    # Before torch: a signal during its slow import must not kill the rank.
    stop = StopRequest()
    if config.teacher.trust_remote_code:
        keep_code_out_of_home()
    import torch

    # DeepSpeed 0.19 calls a collective that torch 2.13 has renamed: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

    from pipeline import checkpoints
    from pipeline.batches import BatchPlan, to_device
    from pipeline.checkpoint_copies import Copies
    from pipeline.losses import active_losses, compute_losses, needs_teacher
    from pipeline.optimizer import learning_rate
    from pipeline.parallel import (
        backward,
        gradient_norm,
        join,
        replicated_gradient_norm,
        start_engine,
        take_step,
    )
    from pipeline.reseeding import reseed
    from pipeline.signals import Signals
    from pipeline.tracking import JsonLines, Tracker
    from pipeline.watching import Alarms, HangWatch

    out = Path(config.out)
    make_folder(out)
    lock = ExitStack()
    if place_from_environment().rank == 0:
        lock.enter_context(folder_lock(out, "run"))
    ranks = join(place_from_environment(), config.engine.timeout_minutes)
    stop.ranks_have_met()
    student, teacher = build_models(config, checked)
    sizes = describe(config, checked, student, teacher)
    is_sharded = ranks.rank == 0 and require_resources(config, checked, student, teacher, ranks.world_size)
    is_sharded = ranks.gather(is_sharded)[0]
    if is_sharded:
        say(ranks.rank, f"teacher: its layers are sharded over {ranks.world_size} ranks")
    student, teacher = load_models(config, checked, student, teacher, ranks.device, is_sharded=is_sharded)
    if config.teacher.compile:
        teacher.compile()
    record = {"config": asdict(config), "data_fingerprint": checked.shards.manifest.fingerprint, **sizes}
    torch.manual_seed(config.seed * 1_000_003 + ranks.rank)
    engine = start_engine(student, config, ranks)
    student.train()
    if config.engine.activation_checkpointing:
        student.backbone.gradient_checkpointing_enable()
    topology = checkpoints.Topology(
        ranks.world_size, checked.zero_stage, config.engine.precision, config.engine.expert_parallel_size
    )
    plan = BatchPlan(checked.shards, config.batch, config.data.order_seed, ranks.rank, ranks.world_size, checked.cache)

    # Resume: the newest checkpoint that is whole decides the position, and the position decides the data.
    found = ranks.gather(_newest_valid(config) if ranks.rank == 0 else None)[0]
    if isinstance(found, CapgapError):
        raise found
    position, window, alarms = checkpoints.Position(), Window(), Alarms()
    if found is not None:
        position, states = checkpoints.load(Path(found[0]), found[1], engine, ranks, topology, seed=config.seed)
        refuse_foreign(found[0], states[0], record)
        window = Window.resumed([state["window"] for state in states], ranks)
        alarms = Alarms(states[0].get("alarms"))
        say(ranks.rank, f"resumed from {found[0]}: step {position.step} of {checked.num_steps}")
    else:
        say(
            ranks.rank, f"starting {config.out}: {checked.num_steps} steps on {ranks.world_size} ranks ({ranks.device})"
        )
    tracker = ledger = copies = None
    if ranks.rank == 0:
        write_json(out / "run.json", record)
        tracker = Tracker(out, resume_step=position.step)
        ledger = JsonLines(out / "ledger.jsonl", resume_step=position.step)
        if config.checkpoint.copy_to is not None:
            copies = Copies(Path(config.checkpoint.copy_to), config.checkpoint.keep_last)
            if found is not None and Path(found[0]).parent == out / "checkpoints":
                copies.add(Path(found[0]))
    ranks.barrier()

    def save() -> None:
        newest = checkpoints.save(
            out / "checkpoints",
            engine,
            ranks,
            position=position,
            topology=topology,
            rank_state={"window": window.to_json(), "alarms": alarms.to_json(), "config": record["config"]},
            fingerprints={"data": checked.shards.manifest.fingerprint},
        )
        if copies is not None:
            copies.add(newest)
        if ranks.rank == 0:
            spare = None if copies is None else copies.in_use
            checkpoints.keep_last(newest, config.checkpoint.keep_last, spare=spare)

    progress = Progress("distil", checked.num_steps, unit="steps", start=position.step) if ranks.rank == 0 else None
    saved_step, skipped_in_a_row, started = position.step, 0, time.monotonic()
    hang_watch = HangWatch(
        ranks.store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=60 * config.engine.timeout_minutes,
        on_hang=lambda: end_process(1),
    )
    for data in plan.steps(position.step, checked.num_steps):
        hang_watch.arrive(position.step)
        # One small all-reduce of integers: the global token count, whether anyone wants to stop, and proof of the data.
        num_tokens, num_stops, digest = _sum_over_ranks(
            [data.num_valid_tokens, int(bool(stop.reason)), data.digest], ranks
        )
        if num_stops:
            say(ranks.rank, f"stopping at step {position.step}: {stop.reason or 'another rank was told to stop'}")
            if saved_step != position.step:
                save()
            return _leave(ranks, 0 if under_srun() else EXIT_PREEMPTED, stop)

        rate = learning_rate(position.step, checked.num_steps, config.optimizer)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        micro_batches = [to_device(batch, ranks.device) for batch in data.micro_batches]
        # DeepSpeed averages over ranks and divides by the accumulation steps: undo both, divide by tokens once.
        scale = len(micro_batches) * ranks.world_size / num_tokens
        weights = active_losses(
            config.loss,
            has_routers=bool(getattr(student, "router_names", ())),
            is_decoder=config.student.architecture == "decoder",
            progress=position.step / checked.num_steps,
        )
        counted = None
        if len(micro_batches) > 1 and "balance" in weights:
            counted = count_loads(engine, micro_batches, ranks)
        is_logged = (position.step + 1) % config.log.every_steps == 0 or position.step + 1 == checked.num_steps
        step_sums = Window()
        for batch in micro_batches:
            seen_by_teacher = teacher(batch) if needs_teacher(weights) else Signals(batch.valid_BT)
            seen_by_student = engine(batch)
            seen_by_student = with_load_shares(seen_by_student, counted, ranks)
            losses = compute_losses(weights, seen_by_student, seen_by_teacher, config.loss)
            backward(engine, losses.total * scale)
            norm = replicated_gradient_norm(engine) if is_logged else None
            was_applied = take_step(engine)
            step_sums.add(losses.parts, seen_by_student.routers)
        position = checkpoints.Position(position.step + 1, position.tokens + num_tokens)
        window.steps += 1
        if was_applied:
            window.add(step_sums.losses, step_sums.routers)
            window.tokens += num_tokens
            skipped_in_a_row = 0
            if config.student.selection_bias_rate:
                student.move_selection_biases(
                    _global_loads(step_sums.routers, ranks), config.student.selection_bias_rate
                )
        else:
            skipped_in_a_row += 1
            window.skipped += 1
            report_skipped_step(position.step, step_sums, data, checked.shards, ranks)
            if skipped_in_a_row >= config.engine.max_skipped_steps:
                save()
                raise NumericsError(
                    f"training: gradients of {skipped_in_a_row} steps in a row were not finite, up to step "
                    f"{position.step}; none of their updates was applied and the weights are saved - look at the rows "
                    "named above, lower optimizer.learning_rate, or use engine.precision fp32"
                )

        if ledger is not None:
            ledger.write({"step": position.step, "first_sample": (position.step - 1) * config.batch.global_size,
                          "samples": config.batch.global_size, "digest": digest})  # fmt: skip
        if is_logged:
            window.seconds = time.monotonic() - started
            values = measurements(window, weights, ranks)
            values |= {"learning_rate": rate, "grad_norm": norm or gradient_norm(engine), "tokens": position.tokens}
            values |= memory_in_use(ranks)
            if tracker is not None and progress is not None:
                tracker.log(position.step, values)
                progress.advance(window.steps, note=f"loss {values.get('train/loss', float('nan')):.4f}")
            for notice in alarms.notices(position.step, values):
                say(ranks.rank, f"notice: {notice}")
            window, started = Window(), time.monotonic()
            if alarms.collapsed and config.engine.on_collapse == "stop":
                save()
                raise NumericsError(
                    f"training: {', '.join(alarms.collapsed)} collapsed at step {position.step} - "
                    "raise loss.balance or student.router_jitter, or set engine.on_collapse to warn or reseed"
                )
            if config.engine.on_collapse == "reseed":
                for number, router in enumerate(alarms.collapsed):
                    seed = (config.seed * 1_000_003 + position.step) * 1_009 + number
                    dead = reseed(
                        engine, ranks, router=router.removeprefix("router/"), load=values[f"{router}/load"], seed=seed
                    )
                    alarms.calm(router)
                    say(ranks.rank, f"notice: step {position.step}: {router}: experts {dead} begin again as copies of "
                                    "its busiest one")  # fmt: skip
        if position.step % config.checkpoint.every_steps == 0 or position.step == checked.num_steps:
            save()
            saved_step = position.step

    # No step follows: a long export is no hang.
    hang_watch.close()
    if progress is not None:
        progress.__exit__(None, None, None)
    if ranks.rank == 0:
        export(config, checked, student, position, sizes)
    code = _leave(ranks, 0, stop)
    if ranks.rank == 0:
        assert tracker is not None and ledger is not None
        tracker.close()
        ledger.close()
        # The other ranks are gone: a slow second place keeps nobody waiting.
        if copies is not None:
            copies.finish()
        write_json(out / DONE, {"step": position.step, "tokens": position.tokens})
        print(f"done: {out}/export (logs: {out}/metrics.jsonl, {out}/tensorboard)", flush=True)
    return code


def refuse_foreign(path: str, state: dict[str, Any], record: dict[str, Any]) -> None:
    """A checkpoint that somebody has put there, or that two runs keep in one place, is not this run's."""
    differing = changed_keys(state["config"], record["config"])
    if differing:
        raise CheckpointError(
            f"checkpoint {path}: belongs to a run with another config: {'; '.join(differing)} - "
            "take it out of the folder, or set them back"
        )


def report_skipped_step(step: int, sums: "Window", data: "StepData", shards: Any, ranks: "Ranks") -> None:
    """Names the ranks and rows behind a non-finite gradient."""
    import math

    is_bad = not all(math.isfinite(float(loss)) for loss in sums.losses.values())
    rows = [shards.locate(int(row)) for part in data.rows for row in part] if is_bad else []
    for rank, found in enumerate(ranks.gather(rows)):
        if found:
            shown = ", ".join(f"{file}:{row}" for file, row in found[:8])
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            say(ranks.rank, f"notice: step {step} skipped: loss of rank {rank} is not finite, rows {shown}{more}")
    if not any(ranks.gather(is_bad)):
        say(ranks.rank, f"notice: step {step} skipped: the losses are finite but their gradient is not")


def with_load_shares(signals: "Signals", counted: dict[str, "Tensor"] | None, ranks: "Ranks") -> "Signals":
    """Fills in each router's load over the global batch, which the balance loss reads."""
    if not signals.routers:
        return signals
    loads = counted or _global_loads(signals.routers, ranks)
    return replace(
        signals,
        routers={
            name: replace(router, load_share_E=loads[name].to(router.gate_sum_E.dtype) / loads[name].sum())
            for name, router in signals.routers.items()
        },
    )


def count_loads(engine: Any, micro_batches: list["Batch"], ranks: "Ranks") -> dict[str, "Tensor"]:
    """Tokens per expert over the whole step, by a student forward without gradients.

    The load of later micro-batches is not known when the first is trained on; with it the accumulated gradient is that
    of one big batch. The price is one student forward per micro-batch, only where there are several of them.
    """
    import torch

    loads: dict[str, Tensor] = {}
    # The same jitter and dropout must be drawn again by the forward that trains.
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for batch in micro_batches:
            for name, router in engine(batch).routers.items():
                loads[name] = loads.get(name, 0) + router.tokens_per_expert_E
    return _sum_loads(loads, ranks)


def _global_loads(routers: dict[str, "RouterSignals"], ranks: "Ranks") -> dict[str, "Tensor"]:
    return _sum_loads({name: router.tokens_per_expert_E for name, router in routers.items()}, ranks)


def _sum_loads(loads: dict[str, "Tensor"], ranks: "Ranks") -> dict[str, "Tensor"]:
    """Sums every router's counts over the ranks with one all-reduce, on the device and without waiting for it."""
    if ranks.world_size == 1:
        return loads
    import torch
    import torch.distributed as dist

    flat = torch.cat(list(loads.values()))
    dist.all_reduce(flat)
    parts = flat.split([len(load) for load in loads.values()])
    return dict(zip(loads, parts, strict=True))


def _sum_over_ranks(values: list[int], ranks: "Ranks") -> list[int]:
    if ranks.world_size == 1:
        return values
    import torch
    import torch.distributed as dist

    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total, group=ranks.control)
    return total.tolist()


def measurements(window: Window, weights: dict[str, float], ranks: "Ranks") -> dict[str, Any]:
    """The window's means over all ranks, as they are logged. The only place that waits for the device."""
    parts: dict[str, Any] = {"losses": {name: float(value) for name, value in window.losses.items()}, "routers": {}}
    for name, router in window.routers.items():
        parts["routers"][name] = (router.tokens_per_expert_E.tolist(), float(router.entropy_sum))
    everywhere = ranks.gather(parts)
    values: dict[str, Any] = {}
    for name in window.losses:
        values[f"train/{name}"] = sum(part["losses"][name] for part in everywhere) / max(1, window.tokens)
    if not values:
        return {"skipped_steps": window.skipped}
    # A part without a weight is only watched.
    values = {"train/loss": sum(weights.get(name, 0) * values[f"train/{name}"] for name in window.losses), **values}
    values["skipped_steps"] = window.skipped
    values["tokens_per_second"] = window.tokens / max(window.seconds, 1e-9)
    for name in window.routers:
        counts = [sum(column) for column in zip(*(part["routers"][name][0] for part in everywhere), strict=True)]
        load = [count / max(1, sum(counts)) for count in counts]
        values[f"router/{name}/load"] = load
        values |= {f"router/{name}/{part}": value for part, value in router_health(load).items()}
        values[f"router/{name}/entropy"] = sum(part["routers"][name][1] for part in everywhere) / max(1, window.tokens)
    return values


def memory_in_use(ranks: "Ranks") -> dict[str, float]:
    """Bytes that this rank holds or has held at most."""
    import psutil
    import torch

    if ranks.device.type == "cuda":
        return {"memory/gpu_peak_bytes": torch.cuda.max_memory_allocated(ranks.device)}
    return {"memory/rss_bytes": psutil.Process().memory_info().rss}


def export(config: RunConfig, checked: Checked, student: Any, position: "Position", sizes: dict) -> None:
    """Writes RUN/export from the float32 weights of the last checkpoint."""
    from pipeline.checkpoints import checkpoint_name, trained_weights
    from pipeline.models.export import export_decoder, export_student

    path = Path(config.out) / "checkpoints" / checkpoint_name(position.step)
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in trained_weights(path).items()
        if name.startswith("backbone.")
    }
    facts = {
        "name": Path(config.out).name,
        "teacher": config.teacher.model,
        "parameters": sizes["student"]["parameters_served"],
        "active": sizes["student"]["parameters_active"],
        "precision": config.engine.precision,
        "macs": sizes["student"]["linear_macs_per_sequence"] / 1e9,
        "length": sizes["student"]["sequence_length"],
        "tokens": position.tokens,
    }
    model = student.served_model().float()
    write = export_decoder if config.student.architecture == "decoder" else export_student
    write(Path(config.out) / "export", model, state, checked.shards.folder / "tokenizer", facts)


def _newest_valid(config: RunConfig) -> Any:
    from pipeline.checkpoints import newest_valid

    copies = config.checkpoint.copy_to
    try:
        found = newest_valid(Path(config.out) / "checkpoints", None if copies is None else Path(copies))
        return found and (str(found[0]), found[1])
    except CapgapError as error:
        return error


def _leave(ranks: "Ranks", code: int, stop: Any) -> int:
    """Ends the process group on all ranks together."""
    import torch.distributed as dist

    ranks.barrier()
    stop.ignore_signals()
    dist.destroy_process_group()
    return code


if __name__ == "__main__":
    # Python would take a second or two per rank to tear everything down, object by object.
    end_process(main())
