"""What a teacher can hand to `linear_kl` about its next-token distribution: states, logits, best ids or samples."""

from dataclasses import dataclass

from torch import Tensor

# N tokens, D hidden (each side its own), V vocabulary, K kept ids per token


@dataclass(frozen=True)
class TeacherHead:
    """Hidden states and output head: the logits are computed chunk by chunk and never exist as a whole."""

    hidden_ND: Tensor
    head_VD: Tensor
    bias_V: Tensor | None = None


@dataclass(frozen=True)
class TeacherLogits:
    """The logits themselves. They are read, never written."""

    logits_NV: Tensor


@dataclass(frozen=True)
class TeacherTopK:
    """The K most probable ids of each token; what is left of the probability is one further outcome, "any other id".

    KL over these K + 1 outcomes is a lower bound of the full KL and equals it for K = V. The log-probabilities must
    have been taken at the temperature of the call: a tail cannot be tempered afterwards.
    """

    ids_NK: Tensor  # any integer dtype; distinct within a token, below vocab_size
    log_probs_NK: Tensor  # normalised over the whole vocabulary
    log_tail_N: Tensor | None = None  # log of the mass of all other ids; None: what the K leave over


@dataclass(frozen=True)
class TeacherSamples:
    """Ids drawn from the teacher with their weights (count / number of draws): unbiased, arXiv 2503.16870.

    Only forward KL can be estimated so. The sum is sum_k w_k (-log q(id_k)) minus the teacher's entropy where that was
    kept, and a cross-entropy where it was not: the same gradient, another constant.
    """

    ids_NK: Tensor  # any integer dtype, below vocab_size; an id may come twice
    weights_NK: Tensor
    entropy_N: Tensor | None = None  # in nats, of the distribution at the temperature of the call


Teacher = TeacherHead | TeacherLogits | TeacherTopK | TeacherSamples


@dataclass(frozen=True)
class DistillationSums:
    """Sums over tokens: one scalar to train on and its two parts to log."""

    loss_sum: Tensor  # differentiable: kl_weight * kl_sum + ce_weight * ce_sum
    kl_sum: Tensor  # no gradient; over valid tokens
    ce_sum: Tensor  # no gradient; over valid tokens with a label
