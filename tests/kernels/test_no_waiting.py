"""The Triton paths never wait for the GPU, launch the same whatever the values are, and have no atomics."""

import ast
import contextlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from kernel_cases import draw
from torch.utils._python_dispatch import TorchDispatchMode

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

HAS_GPU = torch.cuda.is_available()
NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_IDS = 48, 16, 4, 37
# What reads a value on the host, or makes a tensor whose size depends on values.
WAITING = re.compile(
    r"waits|_local_scalar_dense|item|nonzero|is_nonzero|masked_select|unique|bincount|repeat_interleave"
)


def inputs_of(seed: int, device) -> dict[str, torch.Tensor]:
    """Static buffers of one call: seed 0 spreads the tokens over the experts, seed 1 sends all to one expert."""
    named = {
        "hidden_ND": draw(NUM_TOKENS, HIDDEN, seed=10 + seed),
        "router_ED": draw(NUM_EXPERTS, HIDDEN, seed=20) * HIDDEN**-0.5,
        "bias_E": 50.0 * seed * torch.eye(NUM_EXPERTS, dtype=torch.float64)[2],
        "w1_EFD": draw(NUM_EXPERTS, 24, HIDDEN, seed=21) * 0.3,
        "w2_EDF": draw(NUM_EXPERTS, HIDDEN, 24, seed=22) * 0.3,
        "b1_EF": draw(NUM_EXPERTS, 24, seed=23),
        "b2_ED": draw(NUM_EXPERTS, HIDDEN, seed=24),
        "head_VD": draw(NUM_IDS, HIDDEN, seed=25),
        "teacher_head_VD": draw(NUM_IDS, HIDDEN, seed=26),
    }
    named = {name: tensor.float().to(device) for name, tensor in named.items()}
    index_N = torch.arange(NUM_TOKENS, device=device)
    named["valid_N"] = index_N % (3 + seed) != 1
    named["labels_N"] = (index_N * 7 + seed) % NUM_IDS
    return named


def experts_with(**options):
    def call(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x[n].requires_grad_() for n in ("hidden_ND", "router_ED", "w1_EFD", "w2_EDF", "b1_EF", "b2_ED")]
        logits_NE = router_logits(x["hidden_ND"], x["router_ED"], x["bias_E"])
        routing = route(logits_NE, valid_N=x["valid_N"], **options)
        out_ND = expert_mlp(x["hidden_ND"], routing, x["w1_EFD"], x["w2_EDF"], b1_EF=x["b1_EF"], b2_ED=x["b2_ED"])
        out_ND = out_ND + combine(permute(x["hidden_ND"], routing), routing)
        loss = (out_ND * out_ND).sum() + routing.z_loss_sum
        return [out_ND, routing.gate_NK, routing.offsets_E1, *torch.autograd.grad(loss, leaves)]

    return call


def relation(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    student = x["hidden_ND"].view(3, -1, HIDDEN).requires_grad_()
    loss = relation_kl((student,) * 3, (student.detach() * 2,) * 3, x["valid_N"].view(3, -1), num_relation_heads=2)
    return [loss, *torch.autograd.grad(loss, [student])]


def vocabulary_with(kind: str):
    def call(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x[name].requires_grad_() for name in ("hidden_ND", "head_VD")]
        ids_NK = x["labels_N"][:, None] * 5 + torch.arange(3, device=x["labels_N"].device)
        teacher = {
            "head": TeacherHead(x["hidden_ND"].detach() * 2, x["teacher_head_VD"]),
            "top k": TeacherTopK(ids_NK % NUM_IDS, torch.full_like(ids_NK, -2, dtype=torch.float32)),
            "samples": TeacherSamples(ids_NK % 2, torch.full_like(ids_NK, 1, dtype=torch.float32) / 3),
        }[kind]
        sums = linear_kl(*leaves, teacher, labels_N=x["labels_N"], valid_N=x["valid_N"], kl_weight=0.5, ce_weight=0.5)
        return [sums.loss_sum, *torch.autograd.grad(sums.loss_sum, leaves)]

    return call


CALLS = {
    "one expert per token": experts_with(),
    "two experts per token with a capacity": experts_with(top_k=2, renormalize=True, capacity=20),
    "relation": relation,
    "vocabulary from a head": vocabulary_with("head"),
    "vocabulary from ids": vocabulary_with("top k"),
    "vocabulary from samples": vocabulary_with("samples"),
}


class Operations(TorchDispatchMode):
    """Names every operation of PyTorch with the shapes that it makes."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        shapes = [tuple(x.shape) for x in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(x)]
        self.seen.append(f"{func.name().removeprefix('aten::').split('.')[0]} {shapes}")
        return made


@contextlib.contextmanager
def noted(seen: list[str], monkeypatch: pytest.MonkeyPatch):
    """Notes operations, launches with their grids and scalars, and reads of a tensor's values by the host; what the
    interpreter does to tensors in place of a GPU does not count."""
    from triton.runtime.interpreter import GridExecutor

    execute, is_interpreting = GridExecutor.__call__, []

    def execute_and_note(self, *arguments, **options):
        scalars = [value for value in (*arguments, *options.values()) if not torch.is_tensor(value)]
        grid = self.grid(dict(options)) if callable(self.grid) else self.grid
        seen.append(f"{self.fn.__name__} {grid} {scalars}")
        is_interpreting.append(True)
        with torch.utils._python_dispatch._disable_current_modes():
            execute(self, *arguments, **options)
        is_interpreting.pop()

    def noting(name):
        read = getattr(torch.Tensor, name)

        def read_and_note(self, *arguments, **options):
            if not is_interpreting:
                seen.append(f"waits in {name}")
            return read(self, *arguments, **options)

        return read_and_note

    with monkeypatch.context() as patched, Operations(seen):
        patched.setattr(GridExecutor, "__call__", execute_and_note)
        for name in ("tolist", "cpu", "numpy", "item", "__bool__", "__int__", "__float__", "__index__"):
            patched.setattr(torch.Tensor, name, noting(name))
        yield


@pytest.mark.skipif(HAS_GPU, reason="watches what the interpreter is given; the CUDA graph below does it on a GPU")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_value_is_read_on_the_host_and_no_shape_depends_on_values(call, monkeypatch):
    histories = []
    for seed in (0, 1):
        inputs = inputs_of(seed, "cpu")
        history: list[str] = []
        with use_backend("triton"), noted(history, monkeypatch):
            call(inputs)
        assert any("_kernel (" in line for line in history)
        assert not [line for line in history if WAITING.match(line)]
        histories.append(history)
    assert histories[0] == histories[1]


@pytest.mark.skipif(HAS_GPU, reason="watches what the interpreter is given")
def test_the_watcher_sees_that_the_eager_path_waits(monkeypatch):
    history: list[str] = []
    with use_backend("eager"), noted(history, monkeypatch):
        CALLS["one expert per token"](inputs_of(0, "cpu"))
    assert {"waits in tolist", "waits in __int__"} <= {line for line in history if WAITING.match(line)}


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_cuda_graph_replays_forward_and_backward_on_other_inputs(call):
    static, others = inputs_of(0, "cuda"), inputs_of(1, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and tunes
            call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(static)
    for values in (others, inputs_of(0, "cuda")):
        with torch.no_grad():
            for name, tensor in static.items():
                tensor.copy_(values[name])
        graph.replay()
        for actual, expected in zip(captured, call(values), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_two_runs_on_a_gpu_are_equal_bit_for_bit_where_pytorch_is_told_to_be_deterministic(call, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    first, second = call(inputs_of(0, "cuda")), call(inputs_of(0, "cuda"))
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_nothing_waits_for_the_gpu(call):
    inputs = inputs_of(0, "cuda")
    call(inputs)  # compiles and tunes
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_kernel_has_atomics():
    paths = list(Path(inspect.getfile(route)).parent.glob("*_triton.py"))
    assert len(paths) == 6
    for path in paths:
        calls = [node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [name for name in calls if "atomic" in name], path.name
