"""The distillation step against its parts, its arithmetic and a bare loop; CPU seconds, one thread, interleaved.

    OMP_NUM_THREADS=1 python -m pipeline.benchmarks.bench_step --rounds 3

BERT-base-size teacher (random weights) -> MiniMoE 3L;384H with 4 experts, 32 rows of 128 tokens, no padding.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.config import LossConfig, OptimizerConfig, StudentConfig
from pipeline.losses import active_losses, compute_losses
from pipeline.models.students import build_student
from pipeline.models.teachers import RelationTeacher
from pipeline.optimizer import parameter_groups
from pipeline.signals import Batch

ROWS, LENGTH, VOCABULARY = 32, 128, 30522
CONFIG = {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
# Forward of the teacher up to its last queries, keys and values, three times the student's forward; per token.
FLOP_PER_STEP = (174.6e6 + 37.2e6) * ROWS * LENGTH


def make_teacher(dtype: torch.dtype) -> RelationTeacher:
    from transformers import BertConfig, BertModel

    from pipeline.models.bert import cut_after

    torch.manual_seed(0)
    return RelationTeacher(cut_after(BertModel(BertConfig(), add_pooling_layer=False), -1).to(dtype))


def make_student(dtype: torch.dtype) -> Any:
    student = build_student(StudentConfig(), teacher_config=CONFIG, init_folder=None, seed=0)
    return student.to(dtype).train()


def random_batch() -> Batch:
    input_ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    valid = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    return Batch(input_ids, valid, torch.zeros_like(input_ids))


def distil_once(student: Any, teacher: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    from dataclasses import replace

    config = LossConfig()
    seen_by_teacher, seen = teacher(batch), student(batch)
    tokens = ROWS * LENGTH
    routers = {n: replace(r, load_share_E=r.tokens_per_expert_E / tokens) for n, r in seen.routers.items()}
    losses = compute_losses(
        active_losses(config, has_routers=True), replace(seen, routers=routers), seen_by_teacher, config
    )
    (losses.total / tokens).backward()
    update(student, optimizer)


def label_once(student: Any, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    """A plain cross-entropy step: the student's own cost of learning from labels, two classes per token."""
    hidden = student(batch).hidden_states_BTD
    F.cross_entropy(hidden[..., :2].float().flatten(0, 1), batch.input_ids.flatten() % 2).backward()
    update(student, optimizer)


def update(student: Any, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def cpu_seconds(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def interleaved(actions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each action; one warm-up each, then A B C A B C ..."""
    for action in actions.values():
        action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            seconds[name].append(cpu_seconds(action))
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the teacher's feed-forward products, the largest in the step."""
    left, right = torch.randn(ROWS * LENGTH, 768, dtype=dtype), torch.randn(768, 3072, dtype=dtype)
    flop = 2 * ROWS * LENGTH * 768 * 3072
    left @ right
    return flop / statistics.median(cpu_seconds(lambda: left @ right) for _ in range(7))


def measure_parts(rounds: int, dtype: torch.dtype) -> dict[str, float]:
    student, teacher, batch = make_student(dtype), make_teacher(dtype), random_batch()
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.01), lr=3e-4)
    result = interleaved(
        {
            "step": lambda: distil_once(student, teacher, batch, optimizer),
            "teacher": lambda: teacher(batch),
            "student": lambda: label_once(student, batch, optimizer),
        },
        rounds,
    )
    result["gemm_flop_per_second"] = gemm_rate(dtype)
    return result


def measure_engine(rounds: int) -> dict[str, float]:
    """The DeepSpeed engine at ZeRO-1 against the same models in a bare loop, one rank, fp32."""
    from dataclasses import replace

    import deepspeed

    from pipeline.config import BatchConfig, EngineConfig, RunConfig
    from pipeline.parallel import join, start_engine, take_step
    from pipeline.ranks import Place

    ranks = join(Place(0, 0, 1, "none"), 10)
    config = RunConfig(
        batch=BatchConfig(global_size=ROWS, micro_size=ROWS),
        engine=EngineConfig(precision="fp32"),
        optimizer=OptimizerConfig(),
    )
    bare, teacher, batch = make_student(torch.float32), make_teacher(torch.float32), random_batch()
    optimizer = torch.optim.AdamW(parameter_groups(bare, 0.01), lr=3e-4, fused=True)
    student = make_student(torch.float32)
    engine = start_engine(student, config, ranks)
    losses_config = LossConfig()

    def engine_step() -> None:
        seen_by_teacher, seen = teacher(batch), engine(batch)
        routers = {n: replace(r, load_share_E=r.tokens_per_expert_E / ROWS / LENGTH) for n, r in seen.routers.items()}
        weights = active_losses(losses_config, has_routers=True)
        losses = compute_losses(weights, replace(seen, routers=routers), seen_by_teacher, losses_config)
        engine.backward(losses.total / (ROWS * LENGTH))
        take_step(engine)

    del deepspeed
    return interleaved({"bare": lambda: distil_once(bare, teacher, batch, optimizer), "engine": engine_step}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=["fp32", "bf16", "engine"], help="measure one part and print JSON")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.part:
        if flags.part == "engine":
            result = measure_engine(flags.rounds)
        else:
            result = measure_parts(flags.rounds, torch.float32 if flags.part == "fp32" else torch.bfloat16)
        result["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(result))
        return
    # A process for each part: the peak of memory is that part's own.
    parts = {}
    for part in ("fp32", "bf16", "engine"):
        command = [
            sys.executable,
            "-m",
            "pipeline.benchmarks.bench_step",
            "--part",
            part,
            "--rounds",
            str(flags.rounds),
        ]
        parts[part] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    fp32, bf16, engine = parts["fp32"], parts["bf16"], parts["engine"]
    floor = FLOP_PER_STEP / fp32["gemm_flop_per_second"]
    print(f"torch {torch.__version__}, {flags.rounds} rounds, CPU seconds, one thread")
    print(f"fp32 step {fp32['step']:.2f} s; teacher {fp32['teacher']:.2f}, student with labels {fp32['student']:.2f}")
    print(f"(a) step / (teacher + student with labels): {fp32['step'] / (fp32['teacher'] + fp32['student']):.3f}")
    print(
        f"(b) {FLOP_PER_STEP / 1e9:.0f} GFLOP at {fp32['gemm_flop_per_second'] / 1e9:.0f} GFLOP/s take {floor:.2f} s: "
        f"step / floor {fp32['step'] / floor:.2f}; bf16 step {bf16['step']:.2f} s, {fp32['step'] / bf16['step']:.2f} "
        f"times faster; peak {fp32['peak_rss_bytes'] / 1e9:.2f} GB fp32, {bf16['peak_rss_bytes'] / 1e9:.2f} GB bf16"
    )
    print(f"(c) engine / bare loop: {engine['bare'] / engine['engine']:.3f} of its tokens per second")


if __name__ == "__main__":
    main()
