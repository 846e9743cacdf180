"""route, permute and combine: correctness first, then time and bytes against the plain twin and DeepSpeed's eager path.

    PYTHONPATH=kernels python kernels/benchmarks/bench_routing.py [--device cuda] [--rounds 9] [--save] [--smoke]

The experts between permute and combine are the identity, so that only the moving of rows is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from measuring import copy_bytes_per_second, device_name, interleaved, save
from peers import deepspeed_route_permute_combine
from torch import Tensor

from capgap_kernels import combine, permute, reference, route, use_backend
from capgap_kernels.interpreter import prepare_interpreter


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
GPU_CASES = [
    *(Case(384, 4, 1, tokens) for tokens in (16384, 65536, 131072)),
    *(Case(768, 4, 1, tokens) for tokens in (65536, 131072)),
    *(Case(2048, 64, 8, tokens) for tokens in (8192, 32768)),
    *(Case(2048, 128, 8, tokens) for tokens in (8192, 32768)),
    *(Case(4096, 8, 2, tokens) for tokens in (8192, 32768)),
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


def launches_of(call: Callable[[], object]) -> int:
    """GPU kernels that one call starts."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--save", action="store_true", help="write results/routing-DEVICE.json")
    parser.add_argument("--smoke", action="store_true", help="toy shapes under Triton's interpreter")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    cases = SMOKE_CASES if options.smoke else CPU_CASES if device.type == "cpu" else GPU_CASES
    if options.smoke:
        prepare_interpreter()
    with use_backend("triton" if options.smoke or device.type == "cuda" else "eager"):
        for case in {(case.hidden, case.num_experts): case for case in cases}.values():
            error = largest_error(case, device)
            print(f"{case}: largest relative error {error:.1e} (allowed {ALLOWED[case.dtype]:.0e})")
            if not error <= ALLOWED[case.dtype]:
                raise SystemExit("the kernel is wrong here: no times")
        rows = measure(cases, device, rounds=options.rounds)
    if options.save:
        print("written:", save("routing", rows, device=device))


def measure(cases: list[Case], device: torch.device, *, rounds: int) -> list[dict[str, object]]:
    copy = copy_bytes_per_second(device)
    print(f"{device_name(device)}: copy {copy / 1e9:.1f} GB/s")
    print("| case | pass | variant | ms | twin / this [range] | peak MiB | GB/s of ideal bytes | of copy rate |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, object]] = []
    for case in cases:
        logits_NE, hidden_ND = inputs_of(case, device)
        upstream_ND = torch.ones_like(hidden_ND)

        def deepspeed(case: Case = case, logits_NE: Tensor = logits_NE, hidden_ND: Tensor = hidden_ND) -> Tensor:
            return deepspeed_route_permute_combine(logits_NE, hidden_ND, case.top_k, lambda rows_MD: rows_MD)

        variants: dict[str, Callable[[], Tensor]] = {
            "plain twin": lambda args=(logits_NE, hidden_ND, case.top_k): there_and_back(reference, *args),
            "deepspeed eager": deepspeed,
            "capgap": lambda args=(logits_NE, hidden_ND, case.top_k): there_and_back(Ours, *args),
        }
        if device.type == "cuda":
            with torch.no_grad():
                print(f"  {case}: {launches_of(variants['capgap'])} launches forward")
        passes = {
            "forward": (_without_gradients, case.forward_bytes),
            "forward+backward": (
                lambda call, upstream_ND=upstream_ND: call().backward(upstream_ND),
                case.forward_bytes + case.backward_bytes,
            ),
        }
        for name, (run, num_bytes) in passes.items():
            calls = {variant: lambda run=run, call=call: run(call) for variant, call in variants.items()}
            for measured in interleaved(calls, rounds=rounds, device=device):
                rate = num_bytes / measured.milliseconds * 1e3
                low, high = measured.times_faster_range
                print(
                    f"| {case} | {name} | {measured.name} | {measured.milliseconds:.3f} "
                    f"| {measured.times_faster:.2f} [{low:.2f}..{high:.2f}] | {measured.peak_mib:.0f} "
                    f"| {rate / 1e9:.1f} | {rate / copy:.0%} |",
                    flush=True,
                )
                rows.append(
                    {
                        "case": str(case),
                        "pass": name,
                        **asdict(measured),
                        "bytes": num_bytes,
                        "copy_bytes_per_second": copy,
                    }
                )
    return rows


def _without_gradients(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


if __name__ == "__main__":
    main()
