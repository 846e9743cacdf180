"""The distillation step of a 7B teacher and a mixture with 3B active parameters: online, from full logits, cached.

    python -m pipeline.benchmarks.bench_llm                    one GPU of 141 GB: rows of 4096, ZeRO 1, recomputation
    python -m pipeline.benchmarks.bench_llm --size small       a CPU, in CPU seconds, the three steps in turn

Weights and text are random: speed and memory do not care. `naive` makes the full logits of both sides, `cached` unpacks
64 probabilities per token instead of running the teacher. FLOP are those of the teacher's forward and of the student's
forward and backward, active experts only; what is recomputed counts as lost time. The matmul rate is of the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.cached_signals import CacheManifest, pack_nats
from pipeline.config import BatchConfig, EngineConfig, LossConfig, OptimizerConfig, RunConfig, StudentConfig
from pipeline.losses import Losses, active_losses, compute_losses
from pipeline.models.decoders import CachedTeacher, CausalTeacher, DecoderStudent
from pipeline.models.sizes import linear_macs, num_active_parameters, num_parameters
from pipeline.parallel import backward, join, start_engine, take_step
from pipeline.ranks import Place
from pipeline.signals import Batch, Signals

VARIANTS = ("online", "naive", "cached")
K = 64
LOSS = LossConfig(relation_kl=0.0, logit_kl=0.5, cross_entropy=0.5, balance=0.01, router_z=0.001)


@dataclass(frozen=True)
class Size:
    """Shapes of a benchmark: layers, width, heads, feed-forward width (of an expert) on either side."""

    teacher: tuple[int, int, int, int]
    student: tuple[int, int, int, int]
    vocabulary: int
    length: int
    rows: int


SIZES = {
    # LLaMA-2-7B; 4 experts of half of minima-3b's width, 2 of them chosen: 4.7 G parameters, 2.9 G active.
    "7b": Size((32, 4096, 32, 11008), (24, 3072, 24, 4096), 32000, 4096, 4),
    "small": Size((12, 512, 8, 1376), (6, 384, 6, 512), 8192, 256, 4),
    "toy": Size((2, 64, 4, 96), (2, 32, 2, 48), 256, 32, 2),
}


def configs(size: Size) -> tuple[Any, Any]:
    """transformers' configs of the teacher, a LLaMA, and of the student, a Mixtral."""
    from transformers import LlamaConfig, MixtralConfig

    common: dict[str, Any] = {"vocab_size": size.vocabulary, "max_position_embeddings": size.length}
    shapes = []
    for layers, width, heads, ffn in (size.teacher, size.student):
        shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn}
        shapes.append(common | shape | {"num_attention_heads": heads, "num_key_value_heads": heads})
    return LlamaConfig(**shapes[0]), MixtralConfig(**shapes[1], num_local_experts=4, num_experts_per_tok=2)


def flop_per_token(size: Size) -> dict[str, float]:
    """Of the teacher's forward and of the student's forward and backward, causal attention included."""
    from transformers import AutoModelForCausalLM

    forward = []
    for config in configs(size):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        attention = 2 * config.num_hidden_layers * config.hidden_size * size.length
        forward.append(2 * linear_macs(model, 1) + attention)
    return {"teacher": forward[0], "student": 3 * forward[1]}


class Step:
    """A student on its engine, and what the variants compare it with."""

    def __init__(self, size: Size, variants: tuple[str, ...], precision: str):
        from transformers import AutoModelForCausalLM

        self.size = size
        self.ranks = join(Place(0, 0, 1, "none"), 10)
        device, dtype = self.ranks.device, torch.bfloat16 if precision == "bf16" else torch.float32
        teacher_config, student_config = configs(size)
        torch.manual_seed(0)
        with torch.device(device):
            if set(variants) != {"cached"}:
                self.teacher = CausalTeacher(
                    AutoModelForCausalLM.from_config(teacher_config, dtype=dtype), micro_size=1
                )
            backbone = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)
        student = DecoderStudent(backbone, num_ids=size.vocabulary)
        config = RunConfig(
            student=StudentConfig(architecture="decoder"),
            batch=BatchConfig(global_size=size.rows, micro_size=size.rows),
            engine=EngineConfig(precision="bf16" if precision == "bf16" else "fp32", activation_checkpointing=True),
            optimizer=OptimizerConfig(max_grad_norm=1.0),
        )
        self.engine = start_engine(student, config, self.ranks)
        student.train()
        backbone.gradient_checkpointing_enable()
        self.weights = active_losses(LOSS, has_routers=True, is_decoder=True)
        self.batch = random_batch(size, device)
        self.packed = random_signals(size)
        self.cached = CachedTeacher(cache_manifest(size))

    def __call__(self, variant: str) -> None:
        if variant == "cached":
            columns = {name: column.to(self.ranks.device) for name, column in self.packed.items()}
            said = self.cached(replace(self.batch, cached_signals=columns))
        else:
            said = self.teacher(self.batch)
        seen = self.engine(self.batch)
        routers = {
            name: replace(router, load_share_E=router.tokens_per_expert_E / router.tokens_per_expert_E.sum())
            for name, router in seen.routers.items()
        }
        seen = replace(seen, routers=routers)
        losses = (naive_losses if variant == "naive" else compute_losses)(self.weights, seen, said, LOSS)
        backward(self.engine, losses.total / self.batch.valid_BT.sum())
        take_step(self.engine)


def naive_losses(weights: dict[str, float], student: Signals, teacher: Signals, config: LossConfig) -> Losses:
    """The same losses from the full logits of both sides, in float32."""
    routers = {name: weight for name, weight in weights.items() if name in ("balance", "router_z")}
    others = compute_losses(routers, student, teacher, config)
    said: Any = teacher.next_token
    assert student.hidden_states_BTD is not None and student.head_VD is not None and student.labels_BT is not None
    log_q = (student.hidden_states_BTD.flatten(0, 1) @ student.head_VD.T).float().log_softmax(-1)
    log_p = (said.hidden_ND @ said.head_VD.T).float().log_softmax(-1)
    valid_N = student.valid_BT.flatten()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid_N].sum()
    ce = F.nll_loss(log_q[valid_N], student.labels_BT.flatten()[valid_N], reduction="sum")
    total = others.total + weights["logit_kl"] * kl + weights["cross_entropy"] * ce
    return Losses(total, others.parts | {"logit_kl": kl, "cross_entropy": ce})


def random_batch(size: Size, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size.vocabulary, (size.rows, size.length), generator=generator).to(device)
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1)
    positions = torch.arange(size.length, device=device).expand(size.rows, -1)
    return Batch(ids, labels >= 0, position_ids=positions, labels_BT=labels)


def random_signals(size: Size) -> dict[str, torch.Tensor]:
    """Columns as `capgap cache` stores them: ids, log-probabilities and tail mass."""
    generator = torch.Generator().manual_seed(1)
    shape = (size.rows, size.length)
    ids = torch.rand(*shape, size.vocabulary if size.vocabulary < 1024 else 4 * K, generator=generator)
    ids = ids.argsort(-1)[..., :K].to(torch.int16)
    log_p = (torch.randn(*shape, K + 1, generator=generator) * 3).log_softmax(-1)
    values = torch.from_numpy(pack_nats(log_p.numpy()).view("int16"))
    return {"ids": ids, "values": values[..., :K].contiguous(), "rest": values[..., K].contiguous()}


def cache_manifest(size: Size) -> CacheManifest:
    return CacheManifest(
        schema_version=1,
        signal="topk",
        k=K,
        temperature=1.0,
        num_ids=size.vocabulary,
        length=size.length,
        num_rows=size.rows,
        teacher={},
        tokenizer_hash="",
        shards_fingerprint="",
        bytes_per_token=4 * K + 2,
    )


def matmul_rate(size: Size, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the teacher's largest product over one row of tokens."""
    _, width, _, ffn = size.teacher
    left = torch.randn(size.rows * size.length, width, dtype=dtype, device=device)
    right = torch.randn(width, ffn, dtype=dtype, device=device)
    times = [seconds(lambda: left @ right, device) for _ in range(12)][2:]
    return 2 * len(left) * width * ffn / statistics.median(times)


def seconds(action: Any, device: torch.device) -> float:
    """Of the clock on a GPU, where nothing else runs; CPU seconds otherwise."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    action()
    return time.process_time() - start


def measure(size: Size, variants: tuple[str, ...], rounds: int, precision: str) -> dict[str, Any]:
    """Median seconds of each variant, A B C A B C ... after one warm-up each, and the peak of memory."""
    step = Step(size, variants, precision)
    device = step.ranks.device
    for variant in variants:
        step(variant)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            times[variant].append(seconds(lambda variant=variant: step(variant), device))
    student = step.engine.module.backbone
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters": num_parameters(student),
        "active": num_active_parameters(student),
        "matmul_flop_per_second": matmul_rate(size, device, torch.bfloat16 if precision == "bf16" else torch.float32),
        "seconds": {variant: statistics.median(values) for variant, values in times.items()},
    }
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result


def report(size: Size, results: dict[str, dict[str, Any]]) -> list[str]:
    """A line per variant."""
    flop, tokens = flop_per_token(size), size.rows * size.length
    lines = []
    for variant, result in results.items():
        took = result["seconds"][variant]
        work = tokens * (flop["student"] + (0 if variant == "cached" else flop["teacher"]))
        share = work / took / result["matmul_flop_per_second"]
        peak = f", peak {result['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in result else ""
        lines.append(
            f"{variant}: {took:.3f} s, {tokens / took:.0f} tokens/s, {work / took / 1e12:.3f} TFLOP/s = "
            f"{100 * share:.1f} % of the matmul rate{peak}"
        )
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rows", type=int, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 without")
    parser.add_argument("--save", type=Path, help="JSON file for the figures")
    parser.add_argument("--json", action="store_true", help="print the figures of one process as JSON")
    flags = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    precision = flags.precision or ("bf16" if on_gpu else "fp32")
    size = replace(SIZES[flags.size], rows=flags.rows or SIZES[flags.size].rows)
    if flags.json or not on_gpu:
        measured = measure(size, tuple(flags.variants), flags.rounds, precision)
        results = dict.fromkeys(flags.variants, measured)
    else:
        # A process for each: the peak of memory is that variant's own, and one that does not fit stops no other.
        results = {}
        for variant in flags.variants:
            command = [sys.executable, "-m", "pipeline.benchmarks.bench_llm", "--json", "--size", flags.size]
            command += ["--variants", variant, "--rows", str(size.rows), "--rounds", str(flags.rounds)]
            done = subprocess.run([*command, "--precision", precision], capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{variant}: failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            else:
                results[variant] = json.loads(done.stdout.splitlines()[-1])
    if flags.json:
        print(json.dumps(results[flags.variants[0]]))
        return
    first = next(iter(results.values()))
    print(
        f"{first['device']}, torch {torch.__version__}, {precision}: {size.rows} rows of {size.length}, student of "
        f"{first['parameters'] / 1e9:.3f} G parameters ({first['active'] / 1e9:.3f} G active), "
        f"matmul {first['matmul_flop_per_second'] / 1e12:.3f} TFLOP/s"
    )
    for line in report(size, results):
        print(line)
    if flags.save:
        flags.save.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
