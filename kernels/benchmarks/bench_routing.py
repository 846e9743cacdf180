"""route, permute and combine: correctness first, then time and bytes against the plain twin and DeepSpeed's eager path.

    PYTHONPATH=kernels python kernels/benchmarks/bench_routing.py [--device cuda] [--rounds 9] [--save] [--smoke]

The experts between permute and combine are the identity, so that only the moving of rows is timed. The router's own
product is not in it but for the last two variants: in float32, by torch and by `router_logits`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from measuring import Options, Roof, answers, captured, interleaved, options_of, run_cases, within
from peers import deepspeed_route_permute_combine
from torch import Tensor

from capgap_kernels import combine, permute, reference, route, router_logits, use_backend
from capgap_kernels.router import MAX_FUSED_EXPERTS


@dataclass(frozen=True)
class Case:
    hidden: int
    num_experts: int
    top_k: int
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def forward_bytes(self) -> int:
        """Logits, rows and indices once: route, then permute and combine as separate passes over the rows."""
        slots = self.num_tokens * self.top_k
        route_bytes = self.num_tokens * self.num_experts * 4 + slots * (8 + 4 + 8 + 8)
        rows = (self.num_tokens + slots) * self.hidden * self.dtype.itemsize
        return route_bytes + 2 * (rows + slots * 8)

    @property
    def backward_bytes(self) -> int:
        """combine: upstream rows in, permuted rows in and out; permute: rows in, summed rows out; logits in and out."""
        slots = self.num_tokens * self.top_k
        rows = (2 * self.num_tokens + 3 * slots) * self.hidden * self.dtype.itemsize
        return rows + slots * (2 * 8 + 8 + 8) + 2 * self.num_tokens * self.num_experts * 4

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.hidden} E{self.num_experts} k{self.top_k}, {self.num_tokens} tokens, {dtype}"


CPU_CASES = [Case(384, 4, 1, 4096, torch.float32), Case(2048, 64, 8, 1024, torch.float32)]
# Those with a goal first: the time may not suffice for all.
GPU_CASES = [
    *(Case(384, 4, 1, tokens) for tokens in (65536, 131072)),
    *(Case(768, 4, 1, tokens) for tokens in (65536, 131072)),
    Case(2048, 64, 8, 32768),
    Case(4096, 8, 2, 32768),
    Case(2048, 128, 8, 32768),
    *(Case(hidden, 4, 1, 16384) for hidden in (384, 768)),
    Case(2048, 64, 8, 8192),
    Case(4096, 8, 2, 8192),
    Case(2048, 128, 8, 8192),
]
SMOKE_CASES = [Case(16, 3, 1, 50, torch.float32), Case(16, 5, 2, 50, torch.float32)]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs_of(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    logits_NE = torch.randn(case.num_tokens, case.num_experts, generator=generator, device=device)
    hidden_ND = torch.randn(case.num_tokens, case.hidden, generator=generator, device=device).to(case.dtype)
    return logits_NE.requires_grad_(), hidden_ND.requires_grad_()


def there_and_back(module: Callable[..., Tensor] | object, logits_NE: Tensor, hidden_ND: Tensor, top_k: int) -> Tensor:
    routing = module.route(logits_NE, top_k=top_k)  # type: ignore[union-attr]
    return module.combine(module.permute(hidden_ND, routing), routing)  # type: ignore[union-attr]


class Ours:
    """The public functions, beside `reference` with the same names."""

    route, permute, combine = staticmethod(route), staticmethod(permute), staticmethod(combine)


def largest_error(case: Case, device: torch.device) -> float:
    logits_NE, hidden_ND = inputs_of(case, device)
    upstream_ND = torch.randn_like(hidden_ND)
    out_ND = there_and_back(Ours, logits_NE, hidden_ND, case.top_k)
    actual = [out_ND, *torch.autograd.grad(out_ND, [logits_NE, hidden_ND], upstream_ND)]
    exact = [leaf.detach().double().requires_grad_() for leaf in (logits_NE, hidden_ND)]
    out_ND = there_and_back(reference, exact[0], exact[1], case.top_k)
    expected = [out_ND, *torch.autograd.grad(out_ND, exact, upstream_ND.double())]
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(actual, expected, strict=True))


def launches_of(call: Callable[[], object], device: torch.device) -> int:
    """GPU kernels that one call starts (operations of PyTorch where there is no GPU)."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        call()
        answers(device)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    return sum(event.device_type == wanted for event in profiled.events())


def variants_of(case: Case, logits_NE: Tensor, hidden_ND: Tensor) -> dict[str, Callable[[], Tensor]]:
    variants: dict[str, Callable[[], Tensor]] = {
        "plain twin": lambda: there_and_back(reference, logits_NE, hidden_ND, case.top_k),
        "deepspeed eager": lambda: deepspeed_route_permute_combine(
            logits_NE, hidden_ND, case.top_k, lambda rows_MD: rows_MD
        ),
        "capgap": lambda: there_and_back(Ours, logits_NE, hidden_ND, case.top_k),
    }
    if case.num_experts <= MAX_FUSED_EXPERTS:
        weight_ED = torch.randn(case.num_experts, case.hidden, device=hidden_ND.device) * case.hidden**-0.5
        weight_ED.requires_grad_()
        for name, router in (("torch's router", reference.router_logits), ("router_logits", router_logits)):
            variants[f"capgap after {name}"] = lambda router=router: there_and_back(
                Ours, router(hidden_ND, weight_ED), hidden_ND, case.top_k
            )
    return variants


def measure(case: Case, roof: Roof, seconds: float, options: Options) -> list[dict[str, Any]]:
    print(f"{case}", flush=True)
    within(largest_error(case, options.device), ALLOWED[case.dtype])
    logits_NE, hidden_ND = inputs_of(case, options.device)
    upstream_ND = torch.ones_like(hidden_ND)
    variants = variants_of(case, logits_NE, hidden_ND)
    with torch.no_grad():
        launches = launches_of(variants["capgap"], options.device)
    print(f"  {launches} {'launches' if options.device.type == 'cuda' else 'operations of PyTorch'} forward")
    rows: list[dict[str, Any]] = [{"case": str(case), "launches": launches}]
    passes: dict[str, tuple[Callable[[Callable[[], Tensor]], None], int]] = {
        "forward": (_without_gradients, case.forward_bytes),
        "forward+backward": (
            lambda call: call().backward(upstream_ND),
            case.forward_bytes + case.backward_bytes,
        ),
    }
    print("| pass | variant | ms | twin / this [range] | peak MiB | GB/s of ideal bytes | of copy rate |")
    print("|---|---|---|---|---|---|---|")
    for name, (run, num_bytes) in passes.items():
        calls: dict[str, Callable[[], object]] = {
            variant: lambda run=run, call=call: run(call) for variant, call in variants.items()
        }
        if options.device.type == "cuda":
            # At these sizes the host that launches may be slower than the GPU.
            calls["capgap, CUDA graph"] = LazyGraph(calls["capgap"])
        measured, failed = interleaved(calls, rounds=options.rounds, device=options.device, seconds=seconds / 2)
        for row in measured:
            rate = num_bytes / row.milliseconds * 1e3
            low, high = row.times_faster_range
            print(
                f"| {name} | {row.name} | {row.milliseconds:.3f} | {row.times_faster:.2f} [{low:.2f}..{high:.2f}] "
                f"| {row.peak_mib:.0f} | {rate / 1e9:.1f} | {rate / roof.copy:.0%} |",
                flush=True,
            )
            rows.append({"case": str(case), "pass": name, **asdict(row), "bytes": num_bytes})
        rows += [{"case": str(case), "pass": name, "name": variant, "failed": why} for variant, why in failed.items()]
    return rows


class LazyGraph:
    """Captures at the first call, so that a capture that fails costs this variant alone."""

    def __init__(self, call: Callable[[], object]):
        self.call, self.replay = call, None

    def __call__(self) -> None:
        self.replay = self.replay or captured(self.call)
        self.replay()


def _without_gradients(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def main() -> int:
    options = options_of(__doc__, rounds=9)
    cases = SMOKE_CASES if options.smoke else CPU_CASES if options.device.type == "cpu" else GPU_CASES
    with use_backend("triton" if options.runs_triton else "eager"):
        return run_cases("routing", cases, lambda *given: measure(*given, options), options, dtypes=[])


if __name__ == "__main__":
    sys.exit(main())
