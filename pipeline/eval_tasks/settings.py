"""How an evaluation task is run: what a user may set, shared by all tasks."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.errors import ConfigError


@dataclass(frozen=True)
class EvalSettings:
    """Everything that changes a score; stored beside each result. None stands for the task's own default."""

    epochs: float | None = None
    """Passes over the training examples (3 for large GLUE tasks, 10 for small ones and NER)."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rate, or several to try: the best mean on the development set is kept. Default: the task's own."""
    learning_rate_of: dict[str, float] = field(default_factory=dict)
    """Peak learning rates of single tasks, as in `wikigold 3e-4 qnli 1e-4`; the other tasks take learning_rates."""
    batch_size: int = 32
    """Examples per optimizer step."""
    max_length: int | None = None
    """Word pieces per example; what is longer is cut (128 for GLUE and NER, 1024 for language models)."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0; afterwards it falls linearly to 0."""
    weight_decay: float = 0.01
    """AdamW weight decay; biases and normalisation weights have none."""
    dropout: float = 0.1
    """Dropout of the encoder while fine-tuning, the same for all models whatever their config says."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    max_train_examples: int | None = None
    """Train on a fixed random part of this many examples; the same part for every seed and model."""
    max_eval_examples: int | None = None
    """Score on a fixed random part of this many examples; the same part for every seed and model."""
    max_malformed: int = 0
    """Rows of a task file that may be skipped (they are counted and reported) before it is refused."""
    teacher: str | None = None
    """The model that the task `agreement` compares with (folder, hub name or package:NAME)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the forward and backward pass; weights, optimizer and metrics stay in fp32."""

    def __post_init__(self) -> None:
        at_least_one = ("batch_size", "max_length", "max_train_examples", "max_eval_examples")
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"cannot score: {name} ({value}) - must be at least 1 - give a positive number")
        if self.epochs is not None and self.epochs <= 0:
            raise ConfigError(f"cannot score: epochs ({self.epochs}) - must be above 0 - give a positive number")
        if any(rate <= 0 for rate in (*self.learning_rates, *self.learning_rate_of.values())):
            rates = " ".join(map(str, [*self.learning_rates, *self.learning_rate_of.values()]))
            raise ConfigError(f"cannot score: learning_rates ({rates}) - must be above 0 - 3e-5 is usual for BERT")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"cannot score: dropout ({self.dropout}) - is a probability - give 0 to below 1")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"cannot score: warmup ({self.warmup}) - is a share of the steps - give 0 to 1")
        if self.max_malformed < 0:
            raise ConfigError(f"cannot score: max_malformed ({self.max_malformed}) - is a count - give 0 or more")

    def finetuning(self, *, epochs: float, max_length: int = 128) -> dict[str, Any]:
        """What a fine-tuned task really uses, its defaults filled in; the learning rate belongs to the single run."""
        return {
            "epochs": self.epochs or epochs,
            "batch_size": self.batch_size,
            "max_length": self.max_length or max_length,
            "warmup": self.warmup,
            "weight_decay": self.weight_decay,
            "dropout": self.dropout,
            "max_grad_norm": self.max_grad_norm,
            "max_train_examples": self.max_train_examples,
            "max_eval_examples": self.max_eval_examples,
            "precision": self.precision,
        }
