"""What a model says about a batch, in the one form that every loss reads."""

from dataclasses import dataclass, field

from torch import Tensor

from capgap_kernels import TeacherHead, TeacherLogits, TeacherSamples, TeacherTopK

# B rows, T tokens of a row, D hidden width, V vocabulary, E experts


@dataclass(frozen=True)
class Batch:
    """One micro-batch of token rows, padded at the end."""

    input_ids: Tensor
    """[B, T] int64."""
    valid_BT: Tensor
    """[B, T] bool, the tokens that losses count: all but padding, or for decoders those with a label."""
    token_type_ids: Tensor | None = None
    """[B, T] int64, 1 on segment B. Encoders only."""
    position_ids: Tensor | None = None
    """[B, T] int64, from 0 in each document of a packed row: attention stays inside a document. Decoders only."""
    labels_BT: Tensor | None = None
    """[B, T] int64, the next token of the same document, -1 where there is none. Decoders only."""
    cached_signals: dict[str, Tensor] | None = None
    """[B, T, ...] each, what a teacher-signal cache holds about these rows."""


@dataclass(frozen=True)
class RouterSignals:
    """Statistics of one router over the valid tokens of a micro-batch; all are sums, so that they can be added up."""

    gate_sum_E: Tensor
    """[E] sum of the router's scores, with gradient."""
    tokens_per_expert_E: Tensor
    """[E] tokens sent to each expert, without gradient."""
    z_loss_sum: Tensor
    """Scalar sum of squared logsumexp of the router logits, with gradient."""
    entropy_sum: Tensor
    """Scalar sum of the entropy of the scores in nats, without gradient."""
    load_share_E: Tensor | None = None
    """[E] share of the tokens of the *global* batch that each expert got; filled in by the training step."""


@dataclass(frozen=True)
class Signals:
    """The parts of a forward pass that losses read; a model fills in what it can offer."""

    valid_BT: Tensor
    """[B, T] bool, the tokens that losses count."""
    hidden_states_BTD: Tensor | None = None
    """Last hidden states."""
    compared_states: tuple[Tensor, ...] = ()
    """Hidden states [B, T, D] in the teacher's width that are compared one by one; the student's are mapped to it."""
    head_VD: Tensor | None = None
    """Weight of the language-model head. The logits are never held: losses compute them chunk by chunk."""
    head_bias_V: Tensor | None = None
    """Bias of the head, where it has one."""
    num_ids: int | None = None
    """Ids that stand for a token; what the head holds beyond them is padding."""
    labels_BT: Tensor | None = None
    """[B, T] int64, the next token, -1 where there is none."""
    next_token: TeacherHead | TeacherLogits | TeacherTopK | TeacherSamples | None = None
    """What a teacher says about the next token of each of the B * T tokens."""
    relations: tuple[Tensor, Tensor, Tensor] | None = None
    """Queries, keys and values [B, T, D] that are related to themselves."""
    routers: dict[str, RouterSignals] = field(default_factory=dict)
    """Statistics of each router, by the name of its module."""
