"""Self-relation distillation loss of MiniLMv2 that keeps no length x length matrix of the whole batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels.dispatch import backend_of

# B batch, T tokens of a row, D width of one side, H relation heads, W = D / H; R rows of a chunk, L valid tokens of
# these rows, G heads of a chunk.

# Scores of one chunk and side. 2 MB in float32: five such matrices are alive at once, and they should stay in the cache
# between the passes (measured at T=128: 2 MB is 1.1x faster than 1 MB).
CHUNK_SCORES = 2**19


def relation_kl(
    student: tuple[Tensor, Tensor, Tensor],
    teacher: tuple[Tensor, Tensor, Tensor],
    valid_BT: Tensor,
    *,
    num_relation_heads: int = 32,
) -> Tensor:
    """Sum over valid tokens of KL(teacher || student) between self-relations: a scalar in float32 (float64 kept).

    `student` and `teacher` are (query, key, value), each [B, T, D] with a width of its own; `valid_BT` is true where a
    token is real. Relations are softmax(X X^T / sqrt(W)) over the valid keys; the sum is the mean over Q-Q, K-K, V-V
    and over heads. Divide it by the global number of valid tokens. The gradient goes to the student alone and is not
    differentiable again. MiniLMv2, arXiv 2012.15828.

    Raises ValueError when shapes, dtypes or devices do not fit together.
    """
    _check("student", student, valid_BT, num_relation_heads)
    _check("teacher", teacher, valid_BT, num_relation_heads)
    teacher = tuple(projected_BTD.detach() for projected_BTD in teacher)  # type: ignore[assignment]
    loss = _TritonRelationKL if backend_of(student[0]) == "triton" else _EagerRelationKL
    return loss.apply(valid_BT, num_relation_heads, *student, *teacher)


def _check(side: str, projections: tuple[Tensor, Tensor, Tensor], valid_BT: Tensor, num_relation_heads: int) -> None:
    if valid_BT.dtype != torch.bool or valid_BT.dim() != 2:
        raise ValueError(f"valid_BT must be a bool tensor [B, T], got {valid_BT.dtype} {list(valid_BT.shape)}")
    if len(projections) != 3:
        raise ValueError(f"{side} must be (query, key, value), got {len(projections)} tensors")
    for name, projected_BTD in zip(("query", "key", "value"), projections, strict=True):
        if projected_BTD.dim() != 3 or projected_BTD.shape[:2] != valid_BT.shape:
            raise ValueError(
                f"{side} {name} has shape {list(projected_BTD.shape)}, valid_BT {list(valid_BT.shape)}: "
                "expected [B, T, D] and [B, T]"
            )
        if projected_BTD.shape[-1] % num_relation_heads:
            raise ValueError(
                f"{side} {name} has width {projected_BTD.shape[-1]}, "
                f"not divisible by num_relation_heads={num_relation_heads}"
            )
        if not projected_BTD.is_floating_point():
            raise ValueError(f"{side} {name} has dtype {projected_BTD.dtype}, expected a floating-point one")
        if projected_BTD.device != valid_BT.device:
            raise ValueError(f"{side} {name} is on {projected_BTD.device}, valid_BT on {valid_BT.device}")


class _EagerRelationKL(torch.autograd.Function):
    """Loss and gradient chunk by chunk in the forward; the backward only multiplies."""

    @staticmethod
    def forward(ctx, valid_BT: Tensor, num_relation_heads: int, *projections: Tensor) -> Tensor:
        student, teacher = projections[:3], projections[3:]
        dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
        chunks = list(_rows_of_equal_length(valid_BT, num_relation_heads))
        total = torch.zeros((), dtype=torch.float64, device=valid_BT.device)
        gradients: list[Tensor | None] = []
        with torch.autocast(valid_BT.device.type, enabled=False):
            for index, (of_student_BTD, of_teacher_BTD) in enumerate(zip(student, teacher, strict=True)):
                student_ND, teacher_ND = of_student_BTD.flatten(0, 1), of_teacher_BTD.flatten(0, 1)
                gradient_ND = None
                if ctx.needs_input_grad[2 + index]:
                    gradient_ND = student_ND.new_zeros(student_ND.shape)
                for token_RL in chunks:
                    total += _sum_of_rows(
                        token_RL,
                        student_ND,
                        teacher_ND,
                        num_relation_heads=num_relation_heads,
                        gradient_ND=gradient_ND,
                        dtype=dtype,
                    )
                gradients.append(None if gradient_ND is None else gradient_ND.view_as(of_student_BTD))
        ctx.gradients = gradients
        return (total / (3 * num_relation_heads)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        gradients = (None if gradient is None else gradient * grad_output for gradient in ctx.gradients)
        return None, None, *gradients, None, None, None


class _TritonRelationKL(torch.autograd.Function):
    """Keeps one log-sum-exp per query and side; the backward computes the scores again."""

    @staticmethod
    def forward(ctx, valid_BT: Tensor, num_relation_heads: int, *projections: Tensor) -> Tensor:
        from capgap_kernels import relation_kl_triton

        # The kernels take any strides of batch and token, such as those of a fused QKV projection.
        projections = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in projections)
        valid_BT = valid_BT.contiguous().view(torch.uint8)
        sums, kept = [], []
        for student_BTD, teacher_BTD in zip(projections[:3], projections[3:], strict=True):
            kl_sum, *lse_BHT = relation_kl_triton.forward(student_BTD, teacher_BTD, valid_BT, num_relation_heads)
            sums.append(kl_sum)
            kept += lse_BHT
        ctx.save_for_backward(valid_BT, *projections, *kept)
        ctx.scale = 1 / (3 * num_relation_heads)
        return torch.stack(sums).sum() * ctx.scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        from capgap_kernels import relation_kl_triton

        valid_BT, *saved = ctx.saved_tensors
        student, teacher, kept = saved[:3], saved[3:6], saved[6:]
        upstream = (grad_output * ctx.scale).float()
        gradients = [
            relation_kl_triton.backward(student[i], teacher[i], valid_BT, kept[2 * i], kept[2 * i + 1], upstream)
            if ctx.needs_input_grad[2 + i]
            else None
            for i in range(3)
        ]
        return None, None, *gradients, None, None, None


def _rows_of_equal_length(valid_BT: Tensor, num_relation_heads: int) -> Iterator[Tensor]:
    """Positions [R, L] of the valid tokens in the flat batch, rows with equally many of them together.

    Leaving out the padding is both the mask and, on short rows, most of the speed.
    """
    num_valid_B = valid_BT.sum(1)
    token_N = valid_BT.flatten().nonzero().squeeze(1)
    token_of_row = token_N.split(num_valid_B.tolist())
    for length in num_valid_B.unique().tolist():
        if length == 0:
            continue
        rows = (num_valid_B == length).nonzero().squeeze(1).tolist()
        rows_per_chunk = max(1, CHUNK_SCORES // (num_relation_heads * length * length))
        for first in range(0, len(rows), rows_per_chunk):
            yield torch.stack([token_of_row[row] for row in rows[first : first + rows_per_chunk]])


def _sum_of_rows(
    token_RL: Tensor,
    student_ND: Tensor,
    teacher_ND: Tensor,
    *,
    num_relation_heads: int,
    gradient_ND: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Sum over these rows and all heads of the KL of one relation; its gradient goes into `gradient_ND`."""
    num_rows, length = token_RL.shape
    heads_per_chunk = max(1, min(num_relation_heads, CHUNK_SCORES // (num_rows * length * length)))
    student_RLHW = student_ND[token_RL].to(dtype).unflatten(-1, (num_relation_heads, -1))
    teacher_RLHW = teacher_ND[token_RL].to(dtype).unflatten(-1, (num_relation_heads, -1))
    width = student_RLHW.shape[-1]
    # X / W^(1/4) on both sides of X X^T is the scale of the scores.
    student_RLHW *= width**-0.25
    teacher_RLHW *= teacher_RLHW.shape[-1] ** -0.25
    total = torch.zeros((), dtype=torch.float64, device=token_RL.device)
    gradient_RLHW = torch.empty_like(student_RLHW) if gradient_ND is not None else None
    for first in range(0, num_relation_heads, heads_per_chunk):
        heads = slice(first, first + heads_per_chunk)
        student_GLW = student_RLHW[:, :, heads].transpose(1, 2).reshape(-1, length, width)
        teacher_GLW = teacher_RLHW[:, :, heads].transpose(1, 2).reshape(-1, length, teacher_RLHW.shape[-1])
        student_scores_GLL = torch.bmm(student_GLW, student_GLW.transpose(1, 2))
        teacher_scores_GLL = torch.bmm(teacher_GLW, teacher_GLW.transpose(1, 2))
        q_GLL, p_GLL = student_scores_GLL.softmax(-1), teacher_scores_GLL.softmax(-1)
        # KL = sum_j p_j (teacher score_j - student score_j) - lse(teacher) + lse(student), and the largest score of a
        # row minus the log of its probability is that row's lse: two passes fewer than two log_softmax and two exp.
        student_lse_GL = student_scores_GLL.amax(-1) - q_GLL.amax(-1).log()
        teacher_lse_GL = teacher_scores_GLL.amax(-1) - p_GLL.amax(-1).log()
        difference_GLL = teacher_scores_GLL.sub_(student_scores_GLL)
        total += torch.dot(p_GLL.view(-1), difference_GLL.view(-1)) + (student_lse_GL - teacher_lse_GL).sum()
        if gradient_RLHW is not None:
            by_score_GLL = q_GLL.sub_(p_GLL)
            # Scores are X X^T: each X is a query once and a key once, hence G X + G^T X.
            gradient_GLW = torch.bmm(by_score_GLL, student_GLW)
            gradient_GLW.baddbmm_(by_score_GLL.transpose(1, 2), student_GLW)
            gradient_RLHW[:, :, heads] = gradient_GLW.view(num_rows, -1, length, width).transpose(1, 2)
    if gradient_ND is not None and gradient_RLHW is not None:
        gradient_RLHW *= width**-0.25 / (3 * num_relation_heads)
        gradient_ND[token_RL.flatten()] = gradient_RLHW.reshape(-1, gradient_ND.shape[-1]).to(gradient_ND.dtype)
    return total
