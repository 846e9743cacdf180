"""linear_kl against its float64 twin: every teacher, divergence and gradient, padding, odd vocabularies, refusals."""

import dataclasses
import importlib
import itertools

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from capgap_kernels import reference
from capgap_kernels.dispatch import use_backend
from capgap_kernels.linear_kl import linear_kl
from capgap_kernels.teacher_signals import TeacherHead, TeacherLogits, TeacherSamples, TeacherTopK

NAMES = ("hidden", "head", "bias")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
# Both backends meet the same twin; Triton runs under its interpreter where there is no GPU.
BACKENDS = ("eager", "triton")


@pytest.fixture(autouse=True)
def tensors_are_made_on_the_device(device):
    with torch.device(device):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one ragged, for inputs of any size."""
    module = importlib.import_module("capgap_kernels.linear_kl")  # the package's name for it is the function
    monkeypatch.setattr(module, "CHUNK_BYTES", {"eager": 1, "triton": 1})
    monkeypatch.setattr(module, "PRODUCT_ELEMENTS", {"eager": 100, "triton": 100})


@dataclasses.dataclass
class Case:
    """Float64 inputs of one call; `hidden`, `head` and `bias` are the differentiable ones."""

    hidden: Tensor
    head: Tensor
    bias: Tensor
    teacher: TeacherHead | TeacherLogits | TeacherTopK | TeacherSamples | None
    labels: Tensor
    valid: Tensor


def draw(num_tokens: int, width: int, num_ids: int, *, teacher: str = "head", num_kept: int = 5, seed: int = 0) -> Case:
    generator, here = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(here)

    states = TeacherHead(normal(num_tokens, width + 3), normal(num_ids, width + 3) / 2, normal(num_ids))
    logits_NV = states.hidden_ND @ states.head_VD.t() + states.bias_V
    labels = torch.randint(0, num_ids, (num_tokens,), generator=generator, device="cpu").to(here)
    labels[::4] = -100
    valid = normal(num_tokens) < 0.8
    valid[-1] = True
    return Case(
        hidden=normal(num_tokens, width),
        head=normal(num_ids, width) / 2,
        bias=normal(num_ids),
        teacher=teacher_of(teacher, states, logits_NV, min(num_kept, num_ids)),
        labels=labels,
        valid=valid,
    )


def teacher_of(kind: str, states: TeacherHead, logits_NV: Tensor, num_kept: int):
    if kind == "head":
        return states
    if kind == "logits":
        return TeacherLogits(logits_NV)
    if kind == "topk":
        log_probs_NK, ids_NK = logits_NV.log_softmax(-1).topk(num_kept)
        return TeacherTopK(ids_NK.int(), log_probs_NK)
    if kind == "samples":
        ids_NK = logits_NV.softmax(-1).multinomial(num_kept, replacement=True)
        entropy_N = torch.special.entr(logits_NV.softmax(-1)).sum(-1)
        return TeacherSamples(ids_NK, torch.full_like(ids_NK, 1 / num_kept, dtype=torch.float64), entropy_N)
    return None


def converted(value, dtype: torch.dtype):
    """The same teacher with its real-valued tensors in `dtype`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: converted(field, dtype) for name, field in fields.items()})
    if isinstance(value, Tensor):
        return value.to(dtype if value.is_floating_point() else value.dtype)
    return value


def sums_and_gradients(loss, case: Case, *, dtype: torch.dtype, upstream: float = 1.0, bias: bool = True, **options):
    leaves = [leaf.to(dtype).detach().requires_grad_() for leaf in (case.hidden, case.head, case.bias)]
    sums = loss(
        leaves[0],
        leaves[1],
        converted(case.teacher, dtype),
        bias_V=leaves[2] if bias else None,
        **{"labels_N": case.labels, "valid_N": case.valid} | options,
    )
    (sums.loss_sum * upstream).backward()
    return sums, {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def assert_equal_to_twin(case: Case, *, relative: float, dtype: torch.dtype = torch.float32, **options) -> None:
    sums, gradients = sums_and_gradients(linear_kl, case, dtype=dtype, upstream=0.37, **options)
    # The twin reads the numbers that the kernel reads, so that only the arithmetic differs.
    seen = dataclasses.replace(
        case,
        **{name: converted(getattr(case, name), dtype).double() for name in NAMES},
        teacher=converted(case.teacher, dtype),
    )
    expected, expected_gradients = sums_and_gradients(
        reference.linear_kl, seen, dtype=torch.float64, upstream=0.37, **options
    )
    for name in ("loss_sum", "kl_sum", "ce_sum"):
        assert_close(getattr(sums, name), getattr(expected, name), relative=relative, what=name)
    for name in NAMES:
        if expected_gradients[name] is not None:
            assert_close(gradients[name], expected_gradients[name], relative=relative, what=f"gradient of {name}")


def assert_close(actual: Tensor, expected: Tensor, *, relative: float, what: str) -> None:
    # Below 1e-2 what counts is the rounding of the logits, which are of the order of 1.
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-2)
    assert error <= relative, f"{what}: relative error {error:.2e} > {relative:.0e}"


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("teacher", "divergence"),
    [*itertools.product(["head", "logits", "topk"], DIVERGENCES), ("samples", "forward_kl")],
)
def test_sums_and_every_gradient_equal_the_float64_twin(backend, small_chunks, teacher, divergence, temperature):
    assert_equal_to_twin(
        draw(21, 8, 53, teacher=teacher),
        relative=1e-5,
        divergence=divergence,
        temperature=temperature,
        beta=0.3,
        kl_weight=0.7,
        ce_weight=0.6,
    )


@pytest.mark.parametrize(("num_tokens", "width", "num_ids"), [(1, 1, 1), (1, 4, 2), (7, 3, 1031), (41, 5, 17)], ids=str)
@pytest.mark.parametrize("teacher", ["head", "topk"])
def test_awkward_sizes(backend, small_chunks, teacher, num_tokens, width, num_ids):
    assert_equal_to_twin(draw(num_tokens, width, num_ids, teacher=teacher), relative=1e-5, ce_weight=0.5, kl_weight=0.5)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)], ids=["kl", "ce", "both"])
@pytest.mark.parametrize("teacher", ["head", "samples"])
def test_either_part_alone(backend, teacher, weights):
    assert_equal_to_twin(draw(9, 4, 30, teacher=teacher), relative=1e-5, kl_weight=weights[0], ce_weight=weights[1])


def test_cross_entropy_without_a_teacher(backend, small_chunks):
    assert_equal_to_twin(draw(33, 4, 30, teacher="none"), relative=1e-5, kl_weight=0.0, ce_weight=1.0)


def test_without_bias_labels_or_padding(backend):
    assert_equal_to_twin(draw(20, 6, 41), relative=1e-5, bias=False, labels_N=None, valid_N=None)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_stays_within_a_hundredth(backend, small_chunks, divergence):
    assert_equal_to_twin(
        draw(40, 16, 97), relative=1e-2, dtype=torch.bfloat16, divergence=divergence, ce_weight=0.5, kl_weight=0.5
    )


@pytest.mark.parametrize("teacher", ["head", "topk", "samples"])
def test_float64_stays_float64(teacher):
    assert_equal_to_twin(draw(21, 6, 41, teacher=teacher), relative=1e-11, dtype=torch.float64, ce_weight=0.5)


def test_autocast_computes_logits_in_bf16_and_returns_float32_gradients(device):
    case = draw(40, 16, 97)
    expected, expected_gradients = sums_and_gradients(reference.linear_kl, case, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        sums, gradients = sums_and_gradients(linear_kl, case, dtype=torch.float32)
    assert sums.loss_sum.dtype == torch.float32
    assert_close(sums.loss_sum, expected.loss_sum, relative=1e-2, what="loss_sum")
    for name in NAMES:
        assert gradients[name].dtype == torch.float32
        assert_close(gradients[name], expected_gradients[name], relative=2e-2, what=name)


def test_a_teacher_whose_padded_rows_end_with_its_memory_is_read_to_its_end_alone():
    """Rows of 43 ids in a tensor of 48 are read to 48, the next multiple of 16; those in a tensor of 43 are not."""
    with use_backend("triton"):
        from capgap_kernels.linear_kl_triton import _whole_columns

        padded_NV, tight_NV = torch.zeros(3, 48), torch.zeros(3, 43)
        assert _whole_columns(padded_NV[:, :43]).shape == (3, 48)
        assert _whole_columns(padded_NV[:, 5:]).shape == (3, 43)
        assert _whole_columns(tight_NV).shape == (3, 43)
        assert _whole_columns(torch.zeros(2, 43).expand(2, 43)[:1].expand(3, 43)).shape == (3, 43)


@pytest.mark.parametrize("teacher", ["head", "logits"])
def test_only_the_real_ids_of_padded_vocabularies_count(backend, teacher):
    case = draw(12, 4, 50, teacher=teacher)
    case.labels %= 43
    padded = dataclasses.replace(
        case, head=torch.cat([case.head, torch.full((9, 4), 77.0)]), bias=torch.zeros(59).double()
    )
    padded.bias[:50] = case.bias
    options = {"ce_weight": 0.5, "dtype": torch.float32, "vocab_size": 43}
    sums, gradients = sums_and_gradients(linear_kl, padded, **options)
    expected, expected_gradients = sums_and_gradients(reference.linear_kl, case, **options | {"dtype": torch.float64})
    assert_close(sums.loss_sum, expected.loss_sum, relative=1e-5, what="loss_sum")
    assert_close(gradients["head"][:50], expected_gradients["head"], relative=1e-5, what="head")
    assert not gradients["head"][43:].any()
    assert not gradients["bias"][43:].any()


def test_all_ids_kept_equals_the_whole_distribution(backend):
    options = {"dtype": torch.float32, "ce_weight": 0.5}
    for divergence in DIVERGENCES:
        cached = draw(12, 6, 40, teacher="topk", num_kept=40)
        sums, gradients = sums_and_gradients(linear_kl, cached, divergence=divergence, **options)
        expected, expected_gradients = sums_and_gradients(linear_kl, draw(12, 6, 40), divergence=divergence, **options)
        assert_close(sums.kl_sum, expected.kl_sum, relative=1e-5, what=divergence)
        for name in NAMES:
            assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=f"{divergence}, {name}")


def test_a_tail_that_the_student_gives_almost_nothing_keeps_its_gradient(backend):
    """The student's mass on the tail is 1e-11: 1 minus the rest is 0 in float32, and the sum of the tail is not."""
    hidden = torch.eye(3, dtype=torch.float64)[:1]
    head = torch.full((10, 3), -27.0, dtype=torch.float64)
    head[0, 0] = 0.0
    teacher = TeacherTopK(torch.tensor([[0]]), torch.tensor([[0.9]], dtype=torch.float64).log())
    case = Case(hidden, head, torch.zeros(10).double(), teacher, torch.tensor([0]), torch.tensor([True]))
    assert_equal_to_twin(case, relative=1e-5)


def test_a_kept_tail_mass_replaces_what_the_ids_leave_over(backend):
    case = draw(12, 6, 40, teacher="topk")
    other = dataclasses.replace(case.teacher, log_tail_N=torch.full((12,), 0.3, dtype=torch.float64).log())
    assert_equal_to_twin(dataclasses.replace(case, teacher=other), relative=1e-5)


def test_samples_are_unbiased():
    """The mean gradient over many draws approaches the gradient of the whole distribution as 1 / sqrt(draws)."""
    num_draws = 4000
    case = draw(6, 5, 20)
    case.valid[:] = True
    _, expected = sums_and_gradients(reference.linear_kl, case, dtype=torch.float64)
    logits_NV = case.teacher.hidden_ND @ case.teacher.head_VD.t() + case.teacher.bias_V
    torch.manual_seed(0)
    ids_NK = logits_NV.softmax(-1).multinomial(num_draws, replacement=True)
    errors = []
    for kept in (num_draws // 100, num_draws):
        weights_NK = torch.full((6, kept), 1 / kept, dtype=torch.float64)
        sampled = dataclasses.replace(case, teacher=TeacherSamples(ids_NK[:, :kept], weights_NK))
        _, gradients = sums_and_gradients(linear_kl, sampled, dtype=torch.float64)
        errors.append((gradients["hidden"] - expected["hidden"]).norm() / expected["hidden"].norm())
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4


def test_what_stands_in_the_padding_does_not_matter(backend):
    case = draw(30, 6, 40)
    clean, clean_gradients = sums_and_gradients(linear_kl, case, dtype=torch.float32)
    poison = ~case.valid[:, None]
    teacher = dataclasses.replace(case.teacher, hidden_ND=case.teacher.hidden_ND.masked_fill(poison, torch.nan))
    poisoned = dataclasses.replace(case, hidden=case.hidden.masked_fill(poison, torch.nan), teacher=teacher)
    sums, gradients = sums_and_gradients(linear_kl, poisoned, dtype=torch.float32)
    assert sums.loss_sum == clean.loss_sum
    for name in NAMES:
        assert torch.equal(gradients[name], clean_gradients[name])
    assert not gradients["hidden"][~case.valid].any()


def test_no_valid_token_is_a_zero(backend):
    case = draw(5, 4, 9)
    case.valid[:] = False
    sums, gradients = sums_and_gradients(linear_kl, case, dtype=torch.float32, ce_weight=1.0)
    assert sums.loss_sum == sums.kl_sum == sums.ce_sum == 0
    assert not any(gradients[name].any() for name in NAMES)


def test_non_contiguous_inputs_are_read_as_they_are(backend):
    case = draw(14, 6, 40, teacher="logits")
    case.hidden, case.head = case.hidden.t().contiguous().t(), case.head.repeat(1, 2)[:, ::2]
    case.teacher = TeacherLogits(case.teacher.logits_NV.repeat_interleave(2, 1)[:, ::2])
    case.valid, case.labels = case.valid.repeat_interleave(2)[::2], case.labels.repeat_interleave(2)[::2]
    assert_equal_to_twin(case, relative=1e-5, ce_weight=0.5)


def test_the_teacher_is_neither_written_nor_differentiated(backend):
    case = draw(12, 6, 40, teacher="logits")
    logits_NV = case.teacher.logits_NV.float().requires_grad_()
    before = logits_NV.detach().clone()
    linear_kl(case.hidden.float().requires_grad_(), case.head.float(), TeacherLogits(logits_NV)).loss_sum.backward()
    assert logits_NV.grad is None
    assert torch.equal(logits_NV, before)


def test_a_frozen_head_receives_no_gradient_and_scoring_needs_none(backend):
    case = draw(12, 6, 40)
    hidden, head = case.hidden.float().requires_grad_(), case.head.float()
    teacher = converted(case.teacher, torch.float32)
    trained = linear_kl(hidden, head, teacher, labels_N=case.labels, ce_weight=0.5)
    trained.loss_sum.backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        scored = linear_kl(hidden, head, teacher, labels_N=case.labels, ce_weight=0.5)
    assert not scored.loss_sum.requires_grad
    assert scored.kl_sum == trained.kl_sum
    assert scored.ce_sum == trained.ce_sum


def test_no_tensor_grows_with_tokens_times_vocabulary(backend, small_chunks):
    """A chunk is 16 tokens here, so 64 tokens must not need a tensor larger than 16 x 256: 201 ids, rows rounded up."""
    case = draw(64, 5, 201)
    with LargestTensor() as largest:
        sums_and_gradients(linear_kl, case, dtype=torch.float32, ce_weight=0.5, valid_N=None)
    assert largest.num_bytes <= 4 * 16 * 256


def test_two_runs_are_equal_bit_for_bit(backend, small_chunks):
    runs = [sums_and_gradients(linear_kl, draw(20, 5, 40), dtype=torch.float32, ce_weight=0.5) for _ in range(2)]
    assert runs[0][0].loss_sum == runs[1][0].loss_sum
    for name in NAMES:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


def test_no_tokens_at_all_are_a_zero(backend):
    hidden, head = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    linear_kl(hidden, head, TeacherLogits(torch.zeros(0, 9))).loss_sum.backward()
    assert hidden.grad is not None and head.grad is not None
    assert not head.grad.any()


def test_a_second_backward_says_why_it_cannot():
    case = draw(4, 4, 9)
    loss = linear_kl(case.hidden.requires_grad_(), case.head, case.teacher).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="keeps its gradients for one backward"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(4, 7)}, r"hidden_ND has shape \[4, 7\], head_VD \[9, 5\]"),
        ({"hidden_ND": torch.zeros(4, 5).bfloat16()}, "hidden_ND has dtype torch.bfloat16, head_VD torch.float32"),
        ({"labels_N": torch.zeros(3).long()}, r"labels_N has shape \[3\], expected \[4\]"),
        ({"valid_N": torch.ones(4)}, "valid_N has dtype torch.float32, expected torch.bool"),
        ({"divergence": "forward"}, "divergence='forward', expected 'forward_kl', 'reverse_kl' or 'jsd'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta=1.0, expected a number between 0 and 1"),
        ({"temperature": 0.0}, "temperature=0.0, expected a positive number"),
        ({"ce_weight": 0.5}, "ce_weight=0.5 needs labels_N"),
        ({"teacher": None}, "kl_weight=1.0 needs a teacher"),
        (
            {"teacher": TeacherLogits(torch.zeros(4, 11))},
            "head_VD has 9 ids, the teacher's logits_NV 11: pass vocab_size",
        ),
        ({"vocab_size": 10}, "vocab_size=10, but head_VD has 9 ids"),
        ({"teacher": TeacherLogits(torch.zeros(3, 9))}, r"logits_NV has shape \[3, 9\], expected \[4, V\]"),
        ({"teacher": TeacherHead(torch.zeros(4, 3), torch.zeros(9, 2))}, r"hidden_ND has shape \[4, 3\], its head_VD"),
        (
            {"teacher": TeacherTopK(torch.zeros(4, 2).long(), torch.zeros(4, 3))},
            r"ids_NK has shape \[4, 2\], its log_probs_NK \[4, 3\]",
        ),
        (
            {"teacher": TeacherSamples(torch.zeros(4, 2).long(), torch.zeros(4, 2)), "divergence": "jsd"},
            "TeacherSamples can estimate 'forward_kl' alone",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "hidden_ND": torch.zeros(4, 5),
        "head_VD": torch.zeros(9, 5),
        "teacher": TeacherLogits(torch.zeros(4, 9)),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_kl(**arguments)
