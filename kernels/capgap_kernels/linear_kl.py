"""Distillation loss from hidden states and output heads that never holds the logits of more than a chunk of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capgap_kernels import linear_kl_eager
from capgap_kernels.dispatch import backend_of
from capgap_kernels.reference import LOWEST_LOG_PROBABILITY, with_tail
from capgap_kernels.teacher_signals import (
    DistillationSums,
    Teacher,
    TeacherHead,
    TeacherLogits,
    TeacherSamples,
    TeacherTopK,
)

# N tokens, D hidden (each side its own), V vocabulary, K kept ids per token; n tokens of a chunk.

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

# Bytes of one side's logits of a chunk. A larger chunk spreads the read and write of the head's gradient over more
# tokens; a smaller one needs less memory. On a CPU just above 32 MiB, from where glibc returns freed memory at once.
CHUNK_BYTES = {"eager": 40 * 2**20, "triton": 512 * 2**20}
MIN_CHUNK_TOKENS, MAX_CHUNK_TOKENS = 16, 4096
# Elements of the head's gradient that are multiplied in half precision at a time, on their way to float32.
PRODUCT_ELEMENTS = {"eager": 2**22, "triton": 2**26}
# A tokenizer's own number of ids is often odd (151669), and a GPU multiplies, reads and writes rows that begin at odd
# places one number at a time.
ROW_MULTIPLE = {"eager": 1, "triton": 64}


@dataclass(frozen=True)
class Mix:
    """Which numbers are computed from a row of logits."""

    divergence: Divergence
    beta: float
    temperature: float
    kl_weight: float
    ce_weight: float


def linear_kl(
    hidden_ND: Tensor,
    head_VD: Tensor,
    teacher: Teacher | None,
    *,
    bias_V: Tensor | None = None,
    labels_N: Tensor | None = None,
    valid_N: Tensor | None = None,
    vocab_size: int | None = None,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> DistillationSums:
    """Sums over valid tokens: divergence from the teacher, cross-entropy with the labels, and their weighted sum.

    The student's logits are `hidden_ND @ head_VD.T + bias_V`; `teacher` is a TeacherHead, TeacherLogits, TeacherTopK
    or TeacherSamples (None: cross-entropy alone). Divergences, with p the teacher, q the student, both at
    `temperature`: "forward_kl" KL(p || q), "reverse_kl" KL(q || p), "jsd" beta KL(p || m) + (1 - beta) KL(q || m)
    with m = beta p + (1 - beta) q (arXiv 2306.13649). They are not multiplied by temperature^2: put that into
    `kl_weight` where wanted. The cross-entropy is at temperature 1; a negative label has none. Only the first
    `vocab_size` ids of either side exist for the loss: heads padded to different sizes fit together.

    `loss_sum` is differentiable in `hidden_ND`, `head_VD` and `bias_V`, never in the teacher. The gradient is computed
    here, chunk by chunk, so that memory beyond the gradients themselves does not grow with N * V; it serves one
    backward, which does not read the head. (A ZeRO-3 head must have its shape in both all the same: keep it whole, or
    call this inside the forward of a module that reads it. Gathering it around call and backward is not enough.)
    The logits have the dtype of `hidden_ND` (under autocast, autocast's), everything after them float32 or wider; the
    head's gradient is accumulated in float32 over the chunks.

    Raises ValueError when shapes, dtypes, devices or choices do not fit together.
    """
    mix = Mix(divergence, beta, temperature, kl_weight, ce_weight)
    _check_shapes(hidden_ND, head_VD, bias_V=bias_V, labels_N=labels_N, valid_N=valid_N)
    _check_mix(mix, teacher, labels_N)
    vocab_size = _checked_vocab_size(vocab_size, len(head_VD), teacher)
    _check_teacher(teacher, len(hidden_ND), vocab_size, divergence)
    if teacher is not None:
        _check_devices(hidden_ND, **{f"the teacher's {name}": tensor for name, tensor in vars(teacher).items()})
    job = _Job(teacher, labels_N, valid_N, vocab_size, mix)
    loss_sum, kl_sum, ce_sum = _LinearKL.apply(hidden_ND, head_VD, bias_V, job)
    return DistillationSums(loss_sum, kl_sum, ce_sum)


@dataclass(frozen=True)
class _Job:
    """The arguments of `linear_kl` that receive no gradient."""

    teacher: Teacher | None
    labels_N: Tensor | None
    valid_N: Tensor | None
    vocab_size: int
    mix: Mix


def _check_shapes(hidden_ND: Tensor, head_VD: Tensor, **others: Tensor | None) -> None:
    if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"hidden_ND has shape {list(hidden_ND.shape)}, head_VD {list(head_VD.shape)}: expected [N, D] and [V, D]"
        )
    _check_dtypes("hidden_ND", hidden_ND, "head_VD", head_VD)
    _check_devices(hidden_ND, head_VD=head_VD, **others)
    expected = {"bias_V": len(head_VD), "labels_N": len(hidden_ND), "valid_N": len(hidden_ND)}
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != (expected[name],):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{expected[name]}]")
    valid_N = others["valid_N"]
    if valid_N is not None and valid_N.dtype != torch.bool:
        raise ValueError(f"valid_N has dtype {valid_N.dtype}, expected torch.bool")
    labels_N = others["labels_N"]
    if labels_N is not None and (labels_N.is_floating_point() or labels_N.dtype == torch.bool):
        raise ValueError(f"labels_N has dtype {labels_N.dtype}, expected an integer one")


def _check_mix(mix: Mix, teacher: Teacher | None, labels_N: Tensor | None) -> None:
    if mix.divergence not in ("forward_kl", "reverse_kl", "jsd"):
        raise ValueError(f"divergence={mix.divergence!r}, expected 'forward_kl', 'reverse_kl' or 'jsd'")
    if mix.divergence == "jsd" and not 0 < mix.beta < 1:
        raise ValueError(f"beta={mix.beta}, expected a number between 0 and 1 (the ends are the two KLs)")
    if not mix.temperature > 0:
        raise ValueError(f"temperature={mix.temperature}, expected a positive number")
    if mix.ce_weight and labels_N is None:
        raise ValueError(f"ce_weight={mix.ce_weight} needs labels_N, got None")
    if mix.kl_weight and teacher is None:
        raise ValueError(f"kl_weight={mix.kl_weight} needs a teacher, got None")


def _checked_vocab_size(vocab_size: int | None, num_ids: int, teacher: Teacher | None) -> int:
    if isinstance(teacher, TeacherHead):
        teacher_ids, of_teacher = teacher.head_VD.shape[0], "the teacher's head_VD"
    elif isinstance(teacher, TeacherLogits):
        teacher_ids, of_teacher = teacher.logits_NV.shape[-1], "the teacher's logits_NV"
    else:
        teacher_ids, of_teacher = num_ids, "the student's head_VD"
    if vocab_size is None:
        if num_ids != teacher_ids:
            raise ValueError(
                f"head_VD has {num_ids} ids, {of_teacher} {teacher_ids}: pass vocab_size, the number of real ids"
            )
        return num_ids
    if not 0 < vocab_size <= min(num_ids, teacher_ids):
        raise ValueError(f"vocab_size={vocab_size}, but head_VD has {num_ids} ids and {of_teacher} {teacher_ids}")
    return vocab_size


def _check_teacher(teacher: Teacher | None, num_tokens: int, vocab_size: int, divergence: str) -> None:
    if isinstance(teacher, TeacherHead):
        hidden_ND, head_VD = teacher.hidden_ND, teacher.head_VD
        if hidden_ND.dim() != 2 or head_VD.dim() != 2 or hidden_ND.shape != (num_tokens, head_VD.shape[1]):
            raise ValueError(
                f"the teacher's hidden_ND has shape {list(hidden_ND.shape)}, its head_VD {list(head_VD.shape)}: "
                f"expected [N, D] with N={num_tokens} and [V, D]"
            )
        _check_dtypes("the teacher's hidden_ND", hidden_ND, "its head_VD", head_VD)
    elif isinstance(teacher, TeacherLogits):
        if teacher.logits_NV.dim() != 2 or teacher.logits_NV.shape[0] != num_tokens:
            raise ValueError(
                f"the teacher's logits_NV has shape {list(teacher.logits_NV.shape)}, expected [{num_tokens}, V]"
            )
    elif teacher is not None:
        if isinstance(teacher, TeacherTopK):
            name, of_ids, per_token, of_token = "log_probs_NK", teacher.log_probs_NK, "log_tail_N", teacher.log_tail_N
        else:
            name, of_ids, per_token, of_token = "weights_NK", teacher.weights_NK, "entropy_N", teacher.entropy_N
            if divergence != "forward_kl":
                raise ValueError(f"divergence={divergence!r}, but TeacherSamples can estimate 'forward_kl' alone")
        ids_NK = teacher.ids_NK
        if ids_NK.is_floating_point():
            raise ValueError(f"the teacher's ids_NK has dtype {ids_NK.dtype}, expected an integer one")
        if ids_NK.dim() != 2 or ids_NK.shape[0] != num_tokens or ids_NK.shape != of_ids.shape:
            raise ValueError(
                f"the teacher's ids_NK has shape {list(ids_NK.shape)}, its {name} {list(of_ids.shape)}: "
                f"expected [N, K] of both with N={num_tokens}"
            )
        if isinstance(teacher, TeacherTopK) and ids_NK.shape[1] > vocab_size:
            raise ValueError(f"the teacher's ids_NK has {ids_NK.shape[1]} ids per token, more than {vocab_size=}")
        if of_token is not None and of_token.shape != (num_tokens,):
            raise ValueError(f"the teacher's {per_token} has shape {list(of_token.shape)}, expected [{num_tokens}]")


def _check_devices(hidden_ND: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden_ND.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden_ND on {hidden_ND.device}")


def _check_dtypes(of_hidden: str, hidden_ND: Tensor, of_head: str, head_VD: Tensor) -> None:
    if not hidden_ND.is_floating_point():
        raise ValueError(f"{of_hidden} has dtype {hidden_ND.dtype}, expected a floating-point one")
    if hidden_ND.dtype != head_VD.dtype and not torch.is_autocast_enabled(hidden_ND.device.type):
        raise ValueError(f"{of_hidden} has dtype {hidden_ND.dtype}, {of_head} {head_VD.dtype}: expected equal ones")


class _LinearKL(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward; the backward only multiplies."""

    @staticmethod
    def forward(ctx, hidden_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, job: _Job):
        device, dtype = hidden_ND.device, hidden_ND.dtype
        backend = backend_of(hidden_ND)
        # Autocast leaves float64 alone, here as everywhere.
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        gradients = [
            torch.zeros(leaf.shape, dtype=own, device=device) if leaf is not None and needed else None
            for leaf, own, needed in zip(
                (hidden_ND, head_VD, bias_V), (hidden_ND.dtype, wide, wide), ctx.needs_input_grad[:3], strict=True
            )
        ]
        kl_sum, ce_sum = _add_chunks(job, hidden_ND, head_VD, bias_V, *gradients, dtype=dtype, backend=backend)
        # Only now, with the chunks' logits released: they and the head's gradient twice would be the peak.
        ctx.gradients = [
            None if gradient is None or leaf is None else gradient.to(leaf.dtype)
            for gradient, leaf in zip(gradients, (hidden_ND, head_VD, bias_V), strict=True)
        ]
        loss_sum = job.mix.kl_weight * kl_sum + job.mix.ce_weight * ce_sum
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return loss_sum, kl_sum, ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("linear_kl keeps its gradients for one backward: call it again before the second")
        # In place: another [V, D] would be the largest allocation of the whole loss.
        gradients = [None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.gradients]
        ctx.gradients = None
        return *gradients, None


def _add_chunks(
    job: _Job,
    hidden_ND: Tensor,
    head_VD: Tensor,
    bias_V: Tensor | None,
    grad_hidden_ND: Tensor | None,
    grad_head_VD: Tensor | None,
    grad_bias_V: Tensor | None,
    *,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Both sums; the gradients of the weighted sum are added to those that are given."""
    real, device = slice(job.vocab_size), hidden_ND.device
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with_gradient = not (grad_hidden_ND is None and grad_head_VD is None and grad_bias_V is None)
    head_RD = head_VD[real].to(dtype)
    bias_R = None if bias_V is None else bias_V[real].to(dtype)
    tokens_per_chunk = CHUNK_BYTES[backend] // (job.vocab_size * dtype.itemsize)
    tokens_per_chunk = min(max(tokens_per_chunk, MIN_CHUNK_TOKENS), MAX_CHUNK_TOKENS)
    num_tokens = min(tokens_per_chunk, len(hidden_ND))
    logits_nR = _empty_logits(num_tokens, job.vocab_size, dtype, device, ROW_MULTIPLE[backend])
    teacher_logits_of = _teacher_logits_of(job, dtype, num_tokens, ROW_MULTIPLE[backend])
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for tokens in _chunks(job.valid_N, len(hidden_ND), tokens_per_chunk, backend):
            hidden_nD, valid_n = hidden_ND[tokens].to(dtype), None
            if backend == "triton" and job.valid_N is not None:
                # Finding the valid tokens would wait for the GPU, so here padding is computed, as zeros.
                valid_n = job.valid_N[tokens]
                hidden_nD = hidden_nD.masked_fill(~valid_n[:, None], 0.0)
            chunk_nR = logits_nR[: len(hidden_nD)]
            _logits_into(chunk_nR, hidden_nD, head_RD, bias_R)
            chunk = _Chunk(job, tokens, valid_n, with_gradient, _module_of(backend))
            sums += chunk.losses_(chunk_nR, teacher_logits_of)
            # From here on the chunk's logits are the gradient by the logits.
            if grad_hidden_ND is not None:
                grad_hidden_ND[tokens] = torch.mm(chunk_nR, head_RD).to(hidden_ND.dtype)
            if grad_head_VD is not None:
                _add_product_(grad_head_VD[real], chunk_nR, hidden_nD, PRODUCT_ELEMENTS[backend])
            if grad_bias_V is not None:
                grad_bias_V[real] += chunk_nR.sum(0, dtype=wide)
    kl_sum, ce_sum = sums.to(wide).unbind()
    return kl_sum, ce_sum


def _module_of(backend: str) -> ModuleType:
    if backend == "eager":
        return linear_kl_eager
    from capgap_kernels import linear_kl_triton

    return linear_kl_triton


def _chunks(valid_N: Tensor | None, num_tokens: int, size: int, backend: str) -> Iterator[Tensor | slice]:
    if valid_N is None or backend == "triton":
        yield from (slice(first, min(first + size, num_tokens)) for first in range(0, num_tokens, size))
    else:
        yield from (token_n for token_n in valid_N.nonzero().squeeze(1).split(size) if len(token_n))


def _logits_into(logits_nR: Tensor, hidden_nD: Tensor, head_RD: Tensor, bias_R: Tensor | None) -> None:
    if bias_R is None:
        torch.mm(hidden_nD, head_RD.t(), out=logits_nR)
    else:
        torch.addmm(bias_R, hidden_nD, head_RD.t(), out=logits_nR)


def _add_product_(grad_RD: Tensor, by_logits_nR: Tensor, hidden_nD: Tensor, elements: int) -> None:
    """Add by_logits.T @ hidden; a product in half precision has to exist before it can be added in float32."""
    if grad_RD.dtype == hidden_nD.dtype:
        grad_RD.addmm_(by_logits_nR.t(), hidden_nD)
        return
    size = max(1, elements // hidden_nD.shape[1])
    for grad_rD, by_logits_nr in zip(grad_RD.split(size), by_logits_nR.split(size, dim=1), strict=True):
        grad_rD.add_(torch.mm(by_logits_nr.t(), hidden_nD))


def _empty_logits(
    num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device, row_multiple: int
) -> Tensor:
    """[n, R] whose rows lie a multiple of `row_multiple` apart."""
    pitch = -(-vocab_size // row_multiple) * row_multiple
    return torch.empty(num_tokens, pitch, dtype=dtype, device=device)[:, :vocab_size]


def _teacher_logits_of(job: _Job, dtype: torch.dtype, num_tokens: int, row_multiple: int):
    """A function of the chunk's tokens to the teacher's logits; None where the teacher has no logits."""
    teacher = job.teacher
    if isinstance(teacher, TeacherLogits):
        return lambda tokens: teacher.logits_NV[tokens][:, : job.vocab_size]
    if not isinstance(teacher, TeacherHead):
        return None
    if not torch.is_autocast_enabled(teacher.hidden_ND.device.type):
        dtype = teacher.hidden_ND.dtype
    head_RD = teacher.head_VD[: job.vocab_size].to(dtype)
    bias_R = None if teacher.bias_V is None else teacher.bias_V[: job.vocab_size].to(dtype)
    logits_nR = _empty_logits(num_tokens, job.vocab_size, dtype, teacher.hidden_ND.device, row_multiple)

    def logits_of(tokens: Tensor | slice) -> Tensor:
        hidden_nD = teacher.hidden_ND[tokens].to(dtype)
        _logits_into(logits_nR[: len(hidden_nD)], hidden_nD, head_RD, bias_R)
        return logits_nR[: len(hidden_nD)]

    return logits_of


@dataclass(frozen=True)
class _Chunk:
    """The tokens of one chunk and what is to be computed of their logits."""

    job: _Job
    tokens: Tensor | slice
    valid_n: Tensor | None
    with_gradient: bool
    kernels: ModuleType  # linear_kl_eager or linear_kl_triton: the same three functions

    def losses_(self, logits_nR: Tensor, teacher_logits_of) -> Tensor:
        """[2]: divergence and cross-entropy, summed; `logits_nR` becomes the gradient of the weighted sum."""
        labels_n = None if self.job.labels_N is None else self.job.labels_N[self.tokens].long()
        if labels_n is not None and self.valid_n is not None:
            labels_n = labels_n.masked_fill(~self.valid_n, -1)
        if teacher_logits_of is not None:
            return self.kernels.dense_losses_(
                logits_nR,
                teacher_logits_of(self.tokens),
                labels_n,
                self.valid_n,
                mix=self.job.mix,
                with_gradient=self.with_gradient,
            )
        return self._sparse_losses_(logits_nR, labels_n)

    def _sparse_losses_(self, logits_nR: Tensor, labels_n: Tensor | None) -> Tensor:
        """As `losses_`, from K ids of the teacher (or none): two passes over the row, the rest on [n, K]."""
        job, mix, kernels = self.job, self.job.mix, self.kernels
        teacher, vocab_size = job.teacher, logits_nR.shape[1]
        wide = torch.float64 if logits_nR.dtype == torch.float64 else torch.float32
        valid_n1 = torch.ones_like(logits_nR[:, :1], dtype=wide) if self.valid_n is None else self.valid_n[:, None]
        valid_n1 = valid_n1.to(wide)
        label_logit_n1 = None if labels_n is None else logits_nR.gather(1, labels_n.clamp_min(0)[:, None]).to(wide)

        ids_nK = torch.empty(len(logits_nR), 0, dtype=torch.int64, device=logits_nR.device)
        if isinstance(teacher, TeacherTopK | TeacherSamples):
            ids_nK = teacher.ids_NK[self.tokens].long()
        kept_nK = logits_nR.gather(1, ids_nK).to(wide)
        # What the second pass writes, exp(logit / temperature - shift) * weight, is the divergence's gradient by every
        # logit that is no kept id; kept ids get theirs one by one.
        if isinstance(teacher, TeacherTopK):
            logits_nR.scatter_(1, ids_nK, -torch.inf)
            rest_n1 = kernels.row_logsumexp(logits_nR, mix.temperature)[:, None].clamp_min(-1e29)
            scaled_nK = kept_nK / mix.temperature
            lse_n1 = torch.logaddexp(rest_n1, scaled_nK.logsumexp(1, keepdim=True))
            log_rest_n1 = (rest_n1 - lse_n1).clamp_min(LOWEST_LOG_PROBABILITY)
            log_q_nB = torch.cat([scaled_nK - lse_n1, log_rest_n1], 1)
            log_p_nB = with_tail(_rows_of(teacher, self.tokens), vocab_size, wide)
            kl_n1, by_outcome_nB = linear_kl_eager.divergence(log_p_nB, log_q_nB, mix)
            shift_n1, weight_n1, by_kept_nK = rest_n1, by_outcome_nB[:, -1:], by_outcome_nB[:, :-1]
        elif isinstance(teacher, TeacherSamples):
            lse_n1 = shift_n1 = kernels.row_logsumexp(logits_nR, mix.temperature)[:, None]
            weights_nK = teacher.weights_NK[self.tokens].to(wide)
            kl_n1 = (weights_nK * (lse_n1 - kept_nK / mix.temperature)).sum(1, keepdim=True)
            if teacher.entropy_N is not None:
                kl_n1 = kl_n1 - teacher.entropy_N[self.tokens].to(wide)[:, None]
            weight_n1, by_kept_nK = weights_nK.sum(1, keepdim=True), -weights_nK
        else:
            kl_n1 = weight_n1 = torch.zeros_like(valid_n1)
            by_kept_nK = kept_nK
            shift_n1 = torch.zeros_like(valid_n1)
            lse_n1 = None
        ce_n1, label_n1 = torch.zeros_like(valid_n1), None
        full_lse_n1 = None
        if label_logit_n1 is not None and labels_n is not None:
            full_lse_n1 = lse_n1
            if full_lse_n1 is None or mix.temperature != 1:
                full_lse_n1 = kernels.row_logsumexp(logits_nR, 1.0)[:, None]
                if isinstance(teacher, TeacherTopK):
                    full_lse_n1 = torch.logaddexp(full_lse_n1, kept_nK.logsumexp(1, keepdim=True))
            label_n1 = (labels_n >= 0).to(wide)[:, None]
            ce_n1 = label_n1 * (full_lse_n1 - label_logit_n1)
        losses_n2 = torch.cat([kl_n1 * valid_n1, ce_n1], 1)
        if self.with_gradient:
            scale_n1 = valid_n1 * (mix.kl_weight / mix.temperature)
            ce_scale_n1 = None if label_n1 is None or not mix.ce_weight else label_n1 * mix.ce_weight
            kernels.write_exponentials_(
                logits_nR,
                shift_n1[:, 0],
                (weight_n1 * scale_n1)[:, 0],
                None if ce_scale_n1 is None or full_lse_n1 is None else full_lse_n1[:, 0],
                None if ce_scale_n1 is None else ce_scale_n1[:, 0],
                temperature=mix.temperature,
            )
            by_kept_nK = by_kept_nK * scale_n1
            if isinstance(teacher, TeacherTopK):
                if ce_scale_n1 is not None and full_lse_n1 is not None:
                    by_kept_nK = by_kept_nK + ce_scale_n1 * (kept_nK - full_lse_n1).exp()
                logits_nR.scatter_(1, ids_nK, by_kept_nK.to(logits_nR.dtype))
            elif isinstance(teacher, TeacherSamples):
                logits_nR.scatter_add_(1, ids_nK, by_kept_nK.to(logits_nR.dtype))
            if ce_scale_n1 is not None and labels_n is not None:
                logits_nR.scatter_add_(1, labels_n.clamp_min(0)[:, None], -ce_scale_n1.to(logits_nR.dtype))
        return losses_n2.sum(0, dtype=torch.float64)


def _rows_of(teacher: TeacherTopK, tokens: Tensor | slice) -> TeacherTopK:
    log_tail_N = teacher.log_tail_N
    return TeacherTopK(
        teacher.ids_NK[tokens],
        teacher.log_probs_NK[tokens],
        None if log_tail_N is None else log_tail_N[tokens],
    )
