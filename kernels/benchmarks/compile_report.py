"""Compiles every Triton kernel for GPUs that need not be there, and reports registers, spills and shared memory.

    PYTHONPATH=kernels python kernels/benchmarks/compile_report.py [--every-config] [--json report.json] [NAME ...]

The kernels are reached the way users reach them: each entry of CALLS runs a public function forward and backward on
CPU tensors of real widths, with Triton told that a GPU of the wanted kind is there and every launch replaced by
its compilation. So the signatures, constants and alignments are those of real launches.
"""

import argparse
import contextlib
import functools
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.autotuner import Autotuner

from capgap_kernels import (
    TeacherHead,
    TeacherSamples,
    TeacherTopK,
    combine,
    expert_mlp,
    linear_kl,
    permute,
    relation_kl,
    route,
    router_logits,
    use_backend,
)

ARCHITECTURES = (80, 90)


def encoder_experts() -> None:
    """384/1536, 4 experts, one choice, GELU and biases in bf16: the MiniMoE student."""
    _route_and_run_experts(8192, 384, 1536, 4, 1, gated=False, dtype=torch.bfloat16, masked=True)


def decoder_experts() -> None:
    """2048/1024, 64 experts, eight choices, SwiGLU in bf16."""
    _route_and_run_experts(1024, 2048, 1024, 64, 8, gated=True, dtype=torch.bfloat16, masked=False)


def float32_experts() -> None:
    """384/1536, 4 experts, one choice, in float32 without tf32."""
    _route_and_run_experts(8192, 384, 1536, 4, 1, gated=False, dtype=torch.float32, masked=False)


def routers() -> None:
    """384 to 4 experts: bf16 hidden states with a router in float32 (autocast) and in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        weight_ED, bias_E = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((4, 384), (4,)))
        hidden_ND = torch.zeros(64, 384, dtype=torch.bfloat16, requires_grad=True)
        router_logits(hidden_ND, weight_ED, bias_E).sum().backward()


def permute_and_combine() -> None:
    """The two ends of an all-to-all, experts with a capacity."""
    logits_NE = torch.randn(64, 8, requires_grad=True)
    routing = route(logits_NE, top_k=2, score_function="sigmoid", renormalize=True, capacity=20)
    hidden_ND = torch.randn(64, 384, dtype=torch.bfloat16, requires_grad=True)
    combined_ND = combine(permute(hidden_ND, routing), routing)
    combined_ND.backward(torch.zeros_like(combined_ND))


def relation_losses() -> None:
    """32 relation heads at length 128: heads of 12 (student, 384) and 24 (teacher, 768), in bf16 and in float32."""
    for dtype in (torch.bfloat16, torch.float32):
        student, teacher = (
            tuple(torch.zeros(2, 128, width, dtype=dtype, requires_grad=True) for _ in range(3)) for width in (384, 768)
        )
        relation_kl(student, teacher, torch.ones(2, 128, dtype=torch.bool)).backward()


def vocabulary_losses() -> None:
    """32000 ids in bf16: every divergence, with and without temperature, labels and padding; every teacher."""
    hidden_ND, head_VD = (torch.zeros(rows, 16, dtype=torch.bfloat16, requires_grad=True) for rows in (32, 32000))
    labels_N, ids_NK = torch.zeros(32, dtype=torch.int64), torch.arange(8).expand(32, 8)
    head = TeacherHead(hidden_ND, head_VD)
    top_k = TeacherTopK(ids_NK, torch.full((32, 8), -3.0))
    samples = TeacherSamples(ids_NK, torch.full((32, 8), 0.125))
    mixed: dict[str, Any] = {"labels_N": labels_N, "ce_weight": 0.5}
    for teacher, options in (
        (head, {}),
        (head, mixed | {"valid_N": labels_N == 0}),
        (head, mixed | {"divergence": "reverse_kl", "temperature": 2.0}),
        (head, mixed | {"divergence": "jsd", "temperature": 2.0}),
        (top_k, mixed | {"divergence": "jsd", "temperature": 2.0}),
        (samples, {}),
    ):
        linear_kl(hidden_ND, head_VD, teacher, **options).loss_sum.backward()


# A kernel's name in the report -> a call that launches it; the docstring of the call says which shapes.
CALLS: dict[str, Callable[[], None]] = {
    "encoder_experts": encoder_experts,
    "decoder_experts": decoder_experts,
    "float32_experts": float32_experts,
    "routers": routers,
    "permute_and_combine": permute_and_combine,
    "relation_losses": relation_losses,
    "vocabulary_losses": vocabulary_losses,
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    call: str
    kernel: str
    architecture: int
    config: str
    registers: int  # per thread
    spilled: int  # bytes of stack per thread
    shared: int  # bytes per program
    matrix_instruction: str  # wgmma (Hopper), mma, or none


def compile_call(name: str, architecture: int, *, every_config: bool = False) -> list[Compiled]:
    """Everything that one entry of CALLS launches, compiled; the first tuning configuration or every one."""
    found: list[Compiled] = []
    seen: set[tuple[str, str]] = set()
    compile_launch = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        compiled = compile_launch(self, *args, grid=grid, warmup=True, **kwargs)
        config = ", ".join(
            f"{key}={value}"
            for key, value in kwargs.items()
            if key.startswith("BLOCK")
            or key
            in ("num_warps", "num_stages", "KEEP", "GATED", "WEIGHTED", "TWO", "DIVERGENCE", "TEMPERED", "HAS_LABELS")
        )
        if compiled is not None and (compiled.hash, config) not in seen:
            seen.add((compiled.hash, config))
            found.append(Compiled(name, self.fn.__name__, architecture, config, *_resources(compiled)))

    def tune(self: Autotuner, *args: object, **kwargs: object) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        for config in configs if every_config else configs[:1]:
            try:
                self.fn.run(*args, **kwargs, **config.all_kwargs())
            except triton.runtime.errors.OutOfResources:
                continue

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(Autotuner, "run", tune),
        _pretended_gpu(architecture),
        use_backend("triton"),
    ):
        torch.manual_seed(0)
        CALLS[name]()
    return found


def _route_and_run_experts(
    num_tokens: int,
    hidden: int,
    width: int,
    num_experts: int,
    top_k: int,
    *,
    gated: bool,
    dtype: torch.dtype,
    masked: bool,
) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    logits_NE = torch.randn(num_tokens, num_experts, requires_grad=True)
    routing = route(
        logits_NE, top_k=top_k, renormalize=top_k > 1, valid_N=torch.arange(num_tokens) < 50 if masked else None
    )
    out_ND = expert_mlp(
        leaf(num_tokens, hidden),
        routing,
        leaf(num_experts, width, hidden),
        leaf(num_experts, hidden, width),
        b1_EF=None if gated else leaf(num_experts, width),
        b2_ED=None if gated else leaf(num_experts, hidden),
        w3_EFD=leaf(num_experts, width, hidden) if gated else None,
        activation="silu" if gated else "gelu",
    )
    torch.autograd.backward([out_ND, routing.z_loss_sum], [torch.zeros_like(out_ND), None])


@contextlib.contextmanager
def _pretended_gpu(architecture: int) -> Iterator[None]:
    """Triton's driver, reduced to what a compilation asks of it."""
    pretended = mock.Mock()
    # The device index is a key of Triton's caches: one per architecture.
    pretended.get_current_device.return_value = architecture
    pretended.get_current_stream.return_value = 0
    pretended.get_current_target.return_value = GPUTarget("cuda", architecture, 32)
    before = driver._active
    driver.set_active(pretended)
    try:
        yield
    finally:
        driver._active = before


def _resources(compiled: triton.compiler.CompiledKernel) -> tuple[int, int, int, str]:
    """(registers, spilled bytes, shared bytes, matrix instruction) from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))  # type: ignore[index]
    ptx = compiled.asm["ptx"]
    instruction = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none"
    return registers, stack, compiled.metadata.shared, instruction


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CALLS), help="entries of CALLS (default: all)")
    parser.add_argument("--architectures", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--every-config", action="store_true", help="every tuning configuration, not only the first")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    say = functools.partial(print, flush=True)
    say("| call | kernel | sm | registers | spilled B | shared B | matrix | configuration |")
    say("|---|---|---|---|---|---|---|---|")
    rows: list[Compiled] = []
    for name in options.names:
        for architecture in options.architectures:
            for row in compile_call(name, architecture, every_config=options.every_config):
                rows.append(row)
                say(
                    f"| {row.call} | {row.kernel} | {row.architecture} | {row.registers} | {row.spilled} "
                    f"| {row.shared} | {row.matrix_instruction} | {row.config} |"
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
