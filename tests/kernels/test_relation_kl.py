"""relation_kl against its float64 twin: value, each gradient by name, padding, dtypes, and what it refuses."""

import importlib

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from capgap_kernels import reference
from capgap_kernels.dispatch import use_backend
from capgap_kernels.relation_kl import relation_kl

NAMES = ("query", "key", "value")

# B, T, student width, teacher width, relation heads
SHAPES = {
    "one token": (1, 1, 4, 8, 2),
    "primes": (2, 13, 9, 15, 3),
    "the widths of MiniLM heads, 12 and 24": (1, 37, 24, 48, 2),
    "one head": (2, 17, 5, 3, 1),
    "several tiles": (1, 71, 3, 9, 1),
}


@pytest.fixture(autouse=True)
def tensors_are_made_on_the_device(device):
    with torch.device(device):
        yield


@pytest.fixture(params=["eager", "triton"])
def backend(request):
    """Both meet the same twin; Triton runs under its interpreter where there is no GPU."""
    with use_backend(request.param):
        yield request.param


def draw(num_rows: int, length: int, width: int, *, seed: int, dtype=torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = (torch.randn(num_rows, length, width, generator=generator, device="cpu") for _ in NAMES)
    return tuple(x.to(torch.get_default_device(), dtype) for x in drawn)


def some_padding(num_rows: int, length: int) -> Tensor:
    """Rows of different lengths, the first one full."""
    return torch.arange(length)[None, :] < torch.tensor([max(1, length - 5 * row) for row in range(num_rows)])[:, None]


def value_and_gradients(loss, student, teacher, valid_BT, num_heads, *, dtype, upstream=1.0):
    student = tuple(x.detach().to(dtype).requires_grad_() for x in student)
    teacher = tuple(x.detach().to(dtype) for x in teacher)
    value = loss(student, teacher, valid_BT, num_relation_heads=num_heads)
    (value * upstream).backward()
    return value.detach(), {name: x.grad for name, x in zip(NAMES, student, strict=True)}


def assert_close(actual: Tensor, expected: Tensor, *, relative: float, what: str) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error <= relative, f"{what}: relative error {error:.2e} > {relative:.0e}"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_every_gradient_equal_the_float64_twin(backend, shape):
    num_rows, length, student_width, teacher_width, num_heads = shape
    student, teacher = draw(num_rows, length, student_width, seed=0), draw(num_rows, length, teacher_width, seed=1)
    valid_BT = some_padding(num_rows, length)
    args = (student, teacher, valid_BT, num_heads)
    value, gradients = value_and_gradients(relation_kl, *args, dtype=torch.float32, upstream=0.37)
    expected, expected_gradients = value_and_gradients(reference.relation_kl, *args, dtype=torch.float64, upstream=0.37)
    assert value.dtype == torch.float32
    if length > 1:  # one token has one relation, to itself: the loss is 0
        assert_close(value, expected, relative=1e-6, what="value")
    for name in NAMES:
        assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=f"gradient of student {name}")
        assert not gradients[name][~valid_BT].any(), f"padding of {name} received a gradient"


def test_chunks_of_rows_and_of_heads_change_nothing(monkeypatch):
    """Rows of 13, 8 and 3 valid tokens with 7 heads: chunks hold several rows, or a row, or some of its heads."""
    student, teacher, valid_BT = draw(6, 13, 21, seed=0), draw(6, 13, 35, seed=1), some_padding(3, 13).repeat(2, 1)
    args = (student, teacher, valid_BT, 7)
    expected, expected_gradients = value_and_gradients(reference.relation_kl, *args, dtype=torch.float64)
    module = importlib.import_module("capgap_kernels.relation_kl")  # the package's name for it is the function
    for size in (1, 3 * 13 * 13, 2 * 7 * 8 * 8):
        monkeypatch.setattr(module, "CHUNK_SCORES", size)
        value, gradients = value_and_gradients(relation_kl, *args, dtype=torch.float32)
        assert_close(value, expected, relative=1e-6, what=f"value in chunks of {size}")
        for name in NAMES:
            assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=name)


def test_float64_stays_float64(backend):
    student, teacher, valid_BT = draw(2, 9, 12, seed=0), draw(2, 9, 24, seed=1), some_padding(2, 9)
    value, gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 3, dtype=torch.float64)
    expected, expected_gradients = value_and_gradients(
        reference.relation_kl, student, teacher, valid_BT, 3, dtype=torch.float64
    )
    assert value.dtype == torch.float64
    assert_close(value, expected, relative=1e-13, what="value")
    for name in NAMES:
        assert_close(gradients[name], expected_gradients[name], relative=1e-12, what=name)


def test_bf16_inputs_stay_within_a_hundredth_also_under_autocast(backend, device):
    student, teacher = draw(2, 40, 48, seed=0, dtype=torch.bfloat16), draw(2, 40, 96, seed=1, dtype=torch.bfloat16)
    valid_BT = some_padding(2, 40)
    expected, expected_gradients = value_and_gradients(
        reference.relation_kl, student, teacher, valid_BT, 4, dtype=torch.float64
    )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        value, gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 4, dtype=torch.bfloat16)
    assert value.dtype == torch.float32
    assert_close(value, expected, relative=1e-6, what="value")
    for name in NAMES:
        assert gradients[name].dtype == torch.bfloat16
        assert_close(gradients[name], expected_gradients[name], relative=1e-2, what=name)


def test_what_stands_in_the_padding_does_not_matter(backend):
    student, teacher, valid_BT = draw(3, 16, 8, seed=0), draw(3, 16, 8, seed=1), some_padding(3, 16)
    poisoned = tuple(x.masked_fill(~valid_BT[..., None], float("nan")) for x in student)
    clean, clean_gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32)
    value, gradients = value_and_gradients(relation_kl, poisoned, teacher, valid_BT, 2, dtype=torch.float32)
    assert value == clean
    for name in NAMES:
        assert torch.equal(gradients[name], clean_gradients[name])


def test_padding_on_the_left_and_holes_count_as_padding(backend):
    student, teacher = draw(2, 12, 8, seed=0), draw(2, 12, 8, seed=1)
    valid_BT = draw(2, 12, 1, seed=2)[0][..., 0] < 0.3
    value, gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32)
    expected, expected_gradients = value_and_gradients(
        reference.relation_kl, student, teacher, valid_BT, 2, dtype=torch.float64
    )
    assert_close(value, expected, relative=1e-6, what="value")
    for name in NAMES:
        assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=name)


@pytest.mark.parametrize("valid_rows", [[], [1]], ids=["no row", "one row of three"])
def test_a_row_without_a_valid_token_adds_nothing(backend, valid_rows):
    student, teacher = draw(3, 8, 8, seed=0), draw(3, 8, 8, seed=1)
    valid_BT = torch.zeros(3, 8, dtype=torch.bool)
    valid_BT[valid_rows] = True
    value, gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32)
    expected, _ = value_and_gradients(reference.relation_kl, student, teacher, valid_BT, 2, dtype=torch.float64)
    torch.testing.assert_close(value, expected.float())
    for name in NAMES:
        assert torch.isfinite(gradients[name]).all()
        assert not gradients[name][~valid_BT].any()


def test_non_contiguous_inputs_are_read_as_they_are(backend):
    student = tuple(x.transpose(0, 1) for x in draw(11, 3, 8, seed=0))
    teacher = tuple(x[..., ::2] for x in draw(3, 11, 32, seed=1))
    valid_BT = some_padding(11, 3).t()
    value, gradients = value_and_gradients(relation_kl, student, teacher, valid_BT, 4, dtype=torch.float32)
    expected, expected_gradients = value_and_gradients(
        reference.relation_kl, student, teacher, valid_BT, 4, dtype=torch.float64
    )
    assert_close(value, expected, relative=1e-6, what="value")
    for name in NAMES:
        assert_close(gradients[name], expected_gradients[name], relative=1e-5, what=name)


def test_the_teacher_receives_no_gradient(backend):
    student = tuple(x.requires_grad_() for x in draw(2, 6, 8, seed=0))
    teacher = tuple(x.requires_grad_() for x in draw(2, 6, 8, seed=1))
    relation_kl(student, teacher, some_padding(2, 6), num_relation_heads=2).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)


def test_only_the_projections_that_need_a_gradient_get_one(backend):
    query, key, value = draw(2, 6, 8, seed=0)
    key.requires_grad_()
    relation_kl((query, key, value), draw(2, 6, 8, seed=1), some_padding(2, 6), num_relation_heads=2).backward()
    assert key.grad is not None
    assert query.grad is None


def test_a_student_equal_to_its_teacher_has_no_loss(backend):
    both = draw(2, 20, 16, seed=0)
    value, gradients = value_and_gradients(relation_kl, both, both, some_padding(2, 20), 4, dtype=torch.float32)
    assert abs(value) < 1e-4  # of 35 tokens
    for name in NAMES:
        assert gradients[name].abs().max() < 1e-6


def test_large_scores_stay_finite(backend):
    student, teacher = (tuple(100 * x for x in draw(2, 10, 16, seed=seed)) for seed in (0, 1))
    valid_BT = some_padding(2, 10)
    value, _ = value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32)
    expected, _ = value_and_gradients(reference.relation_kl, student, teacher, valid_BT, 2, dtype=torch.float64)
    assert_close(value, expected, relative=1e-6, what="value")


def test_no_matrix_of_all_scores_exists(backend, monkeypatch):
    """Scores of 2 rows, 2 heads and 40 tokens are 6400 numbers, a chunk of them 1600."""
    monkeypatch.setattr(importlib.import_module("capgap_kernels.relation_kl"), "CHUNK_SCORES", 1600)
    student, teacher, valid_BT = draw(2, 40, 4, seed=0), draw(2, 40, 4, seed=1), torch.ones(2, 40, dtype=torch.bool)
    with LargestTensor() as largest:
        value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32)
    assert largest.num_bytes <= 4 * 1600


def test_two_runs_are_equal_bit_for_bit(backend):
    student, teacher, valid_BT = draw(2, 20, 8, seed=0), draw(2, 20, 8, seed=1), some_padding(2, 20)
    runs = [value_and_gradients(relation_kl, student, teacher, valid_BT, 2, dtype=torch.float32) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    for name in NAMES:
        assert torch.equal(runs[0][1][name], runs[1][1][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_BT": torch.ones(2, 6)}, "valid_BT must be a bool tensor"),
        ({"valid_BT": torch.ones(2, 5, dtype=torch.bool)}, r"student query has shape \[2, 6, 8\], valid_BT \[2, 5\]"),
        ({"num_relation_heads": 3}, "student query has width 8, not divisible by num_relation_heads=3"),
        ({"teacher": (torch.randn(2, 6, 8),) * 2}, "teacher must be .query, key, value., got 2"),
        ({"teacher": (torch.ones(2, 6, 8, dtype=torch.int64),) * 3}, "teacher query has dtype torch.int64"),
    ],
    ids=["mask of floats", "length differs", "width not divisible", "two projections", "integers"],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = {
        "student": (torch.randn(2, 6, 8),) * 3,
        "teacher": (torch.randn(2, 6, 8),) * 3,
        "valid_BT": torch.ones(2, 6, dtype=torch.bool),
        "num_relation_heads": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        relation_kl(**arguments)
