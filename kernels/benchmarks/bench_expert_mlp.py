"""expert_mlp: correctness first, then time against the dense feed-forward and against other projects' experts.

    PYTHONPATH=kernels python kernels/benchmarks/bench_expert_mlp.py [--device cuda] [--rounds 9] [--save] [--smoke]

On a CPU (one thread, CPU seconds): a whole MoE feed-forward, router included, against the dense one of equal active
compute. On a GPU: the shapes of issue 4 with every importable peer. --smoke: toy shapes under Triton's interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Options, Roof, interleaved, options_of, run_cases, within
from peers import Experts, expert_peers
from torch import Tensor

from capgap_kernels import Routing, expert_mlp, reference, route, use_backend


@dataclass(frozen=True)
class Case:
    hidden: int
    width: int
    num_experts: int
    top_k: int
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def gated(self) -> bool:
        """Decoder shapes choose several small SwiGLU experts, encoder shapes one GELU expert."""
        return self.top_k > 1

    @property
    def forward_flop(self) -> int:
        return 2 * self.num_tokens * self.top_k * self.hidden * self.width * (3 if self.gated else 2)

    @property
    def forward_bytes(self) -> int:
        """Each token read and written, the inner activations written and read, every weight read once."""
        rows = self.num_tokens * self.top_k
        weights = self.num_experts * self.hidden * self.width * (3 if self.gated else 2)
        return self.dtype.itemsize * (2 * self.num_tokens * self.hidden + 2 * rows * self.width + weights)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.hidden}/{self.width} E{self.num_experts} k{self.top_k}, {self.num_tokens} tokens, {dtype}"


CPU_CASES = [Case(384, 1536, 4, 1, 4096, torch.float32), Case(384, 1536, 4, 1, 4096)]
# Those with a goal first: the time may not suffice for all.
GPU_CASES = [
    Case(384, 1536, 4, 1, 65536),
    Case(2048, 1024, 64, 8, 32768),
    Case(768, 3072, 4, 1, 65536),
    Case(4096, 14336, 8, 2, 32768),
    Case(2048, 768, 128, 8, 32768),
    *(Case(hidden, 4 * hidden, 4, 1, tokens) for tokens in (16384, 131072) for hidden in (384, 768)),
    *(Case(2048, width, experts, 8, 8192) for width, experts in ((1024, 64), (768, 128))),
    Case(4096, 14336, 8, 2, 8192),
    Case(384, 1536, 4, 1, 65536, torch.float32),
]
SMOKE_CASES = [Case(16, 24, 3, 1, 20, torch.float32), Case(16, 24, 4, 2, 20, torch.float32)]
# A bf16 result of K terms is rounded a few times on the way; twice the error of one rounding per step is right.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Inputs:
    hidden_ND: Tensor
    router_ED: Tensor
    experts: Experts
    upstream_ND: Tensor


def inputs_of(case: Case, device: torch.device, *, num_tokens: int | None = None) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device) * scale
        return drawn.to(case.dtype).requires_grad_()

    tokens, experts = num_tokens or case.num_tokens, case.num_experts
    return Inputs(
        hidden_ND=leaf(tokens, case.hidden),
        router_ED=leaf(experts, case.hidden, scale=case.hidden**-0.5),
        experts=Experts(
            w1_EFD=leaf(experts, case.width, case.hidden, scale=case.hidden**-0.5),
            w2_EDF=leaf(experts, case.hidden, case.width, scale=case.width**-0.5),
            b1_EF=None if case.gated else leaf(experts, case.width),
            b2_ED=None if case.gated else leaf(experts, case.hidden),
            w3_EFD=leaf(experts, case.width, case.hidden, scale=case.hidden**-0.5) if case.gated else None,
        ),
        upstream_ND=leaf(tokens, case.hidden).detach(),
    )


def run_experts(function: Callable[..., Tensor], inputs: Inputs, routing: Routing) -> Tensor:
    experts = inputs.experts
    return function(
        inputs.hidden_ND,
        routing,
        experts.w1_EFD,
        experts.w2_EDF,
        b1_EF=experts.b1_EF,
        b2_ED=experts.b2_ED,
        w3_EFD=experts.w3_EFD,
        activation="gelu" if experts.w3_EFD is None else "silu",
    )


def routing_of(case: Case, inputs: Inputs) -> Routing:
    return route(F.linear(inputs.hidden_ND, inputs.router_ED), top_k=case.top_k, renormalize=case.top_k > 1)


def dense_of(case: Case, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The feed-forward of equal active compute: as wide as the chosen experts together."""
    one = inputs_of(Case(case.hidden, case.width * case.top_k, 1, case.top_k, 1, case.dtype), device).experts
    w1, w2 = (weight.detach()[0].requires_grad_() for weight in (one.w1_EFD, one.w2_EDF))
    if one.w3_EFD is None:
        b1, b2 = (bias.detach()[0].requires_grad_() for bias in (one.b1_EF, one.b2_ED) if bias is not None)
        return lambda hidden_ND: F.linear(F.gelu(F.linear(hidden_ND, w1, b1)), w2, b2)
    w3 = one.w3_EFD.detach()[0].requires_grad_()
    return lambda hidden_ND: F.linear(F.silu(F.linear(hidden_ND, w1)) * F.linear(hidden_ND, w3), w2)


def largest_error(case: Case, device: torch.device) -> float:
    """Of the output and every gradient, relative to the float64 twin, which computes every expert for every token.

    On a GPU with slots enough for the tile sizes and the split of the weight gradients that large calls use.
    """
    num_tokens = 257 if device.type == "cpu" else 4099 if case.top_k == 1 else 1031
    inputs = inputs_of(case, device, num_tokens=min(case.num_tokens, num_tokens))
    leaves = [inputs.hidden_ND, inputs.router_ED, *inputs.experts.leaves()]
    routing = routing_of(case, inputs)
    results = []
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out_ND = run_experts(expert_mlp, inputs, routing)
    results.append([out_ND, *torch.autograd.grad(out_ND, leaves, inputs.upstream_ND)])
    biased = inputs.experts.b1_EF is not None
    exact_inputs = Inputs(
        exact[0],
        exact[1],
        Experts(exact[2], exact[3], exact[4] if biased else None, exact[5] if biased else None, None)
        if biased
        else Experts(exact[2], exact[3], None, None, exact[4] if case.gated else None),
        inputs.upstream_ND.double(),
    )
    # The logits are rounded to the layer's dtype before the choice: the twin takes the same ones.
    logits_NE = F.linear(inputs.hidden_ND, inputs.router_ED).double()
    exact_logits_NE = F.linear(exact_inputs.hidden_ND, exact_inputs.router_ED)
    exact_logits_NE = exact_logits_NE + (logits_NE - exact_logits_NE).detach()
    exact_routing = reference.route(exact_logits_NE, top_k=case.top_k, renormalize=case.top_k > 1)
    out_ND = run_experts(reference.expert_mlp, exact_inputs, exact_routing)
    results.append([out_ND, *torch.autograd.grad(out_ND, exact, exact_inputs.upstream_ND)])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))


def variants_of(case: Case, options: Options) -> dict[str, Callable[[], Tensor]]:
    inputs = inputs_of(case, options.device)
    dense = dense_of(case, options.device)
    variants: dict[str, Callable[[], Tensor]] = {
        "dense of equal compute": lambda: dense(inputs.hidden_ND),
        "capgap, router included": lambda: run_experts(expert_mlp, inputs, routing_of(case, inputs)),
    }
    if not options.runs_triton:
        return variants
    with torch.no_grad():
        routing = routing_of(case, inputs)
    gate_NK = routing.gate_NK.detach().requires_grad_()
    fixed = Routing(**{**vars(routing), "gate_NK": gate_NK})
    variants["capgap, experts alone"] = lambda: run_experts(expert_mlp, inputs, fixed)
    # DeepSpeed's and Liger's Triton kernels ask for a GPU even under the interpreter.
    needs_gpu = () if options.device.type == "cuda" else ("deepspeed triton", "liger")
    peers, missing = expert_peers(gated=case.gated)
    for name, why in missing.items():
        print(f"  without {name}: {why}")
    for name, peer in peers.items():
        if name not in needs_gpu:
            variants[name] = lambda peer=peer: peer(inputs.hidden_ND, routing.expert_NK, gate_NK, inputs.experts)
    return variants


def forward_only(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def forward_and_backward(call: Callable[[], Tensor]) -> None:
    out_ND = call()
    # Gradients accumulate into .grad in every variant alike.
    out_ND.backward(torch.ones_like(out_ND))


def measure(case: Case, roof: Roof, seconds: float, options: Options) -> list[dict[str, Any]]:
    print(f"{case}", flush=True)
    within(largest_error(case, options.device), ALLOWED[case.dtype])
    variants = variants_of(case, options)
    print("| pass | variant | ms | dense / this [range] | peak MiB | TFLOP/s | of matmul rate | floor ms |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name, run, share in (("forward", forward_only, 1), ("forward+backward", forward_and_backward, 3)):
        calls = {variant: lambda run=run, call=call: run(call) for variant, call in variants.items()}
        flop, num_bytes = share * case.forward_flop, share * case.forward_bytes
        floor = max(flop / roof.matmul[case.dtype], num_bytes / roof.copy)
        measured, failed = interleaved(calls, rounds=options.rounds, device=options.device, seconds=seconds / 2)
        for row in measured:
            rate, peak = flop / row.milliseconds * 1e3, roof.matmul[case.dtype]
            low, high = row.times_faster_range
            print(
                f"| {name} | {row.name} | {row.milliseconds:.2f} | {row.times_faster:.2f} [{low:.2f}..{high:.2f}] "
                f"| {row.peak_mib:.0f} | {rate / 1e12:.2f} | {rate / peak:.0%} | {1e3 * floor:.2f} |",
                flush=True,
            )
            rows.append({"case": str(case), "pass": name, **asdict(row), "flop": flop, "bytes": num_bytes})
        rows += [{"case": str(case), "pass": name, "name": variant, "failed": why} for variant, why in failed.items()]
    return rows


def main() -> int:
    options = options_of(__doc__, rounds=9)
    cases = SMOKE_CASES if options.smoke else CPU_CASES if options.device.type == "cpu" else GPU_CASES
    dtypes = sorted({case.dtype for case in cases}, key=str)
    with use_backend("triton" if options.runs_triton else "eager"):
        return run_cases("expert_mlp", cases, lambda *given: measure(*given, options), options, dtypes=dtypes)


if __name__ == "__main__":
    sys.exit(main())
