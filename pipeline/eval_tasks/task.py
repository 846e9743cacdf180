"""What an evaluation task offers to `capgap score`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pipeline.eval_tasks.settings import EvalSettings


@dataclass(frozen=True)
class Headline:
    """A number of a task that tables show: its label, which metric it is, and how to print it."""

    label: str
    metric: str
    percent: bool = True
    higher_is_better: bool = True
    floor_metric: str | None = None
    """What guessing gives (the metric of always naming the most frequent class)."""


@dataclass(frozen=True)
class Unit:
    """One measurement: a seed and learning rate of a fine-tuned task, or the only one of a task without training."""

    task: str
    seed: int | None = None
    learning_rate: float | None = None

    @property
    def file_name(self) -> str:
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.task}{rate}{seed}.json"


@dataclass(frozen=True)
class Measurement:
    """Metrics as fractions (0.91, not 91) or in their own unit; the rate with the highest `selection` is kept."""

    metrics: dict[str, float]
    selection: float
    counts: dict[str, int]
    losses: list[float] = field(default_factory=list)


class Task(Protocol):
    """Each task is one frozen dataclass value in `TASKS`; nothing is read before `files` and `prepare`."""

    @property
    def headlines(self) -> tuple[Headline, ...]: ...

    @property
    def seeded(self) -> bool: ...

    def files(self, data: Path) -> list[Path]:
        """The task's files under the --data folder; DataError with the mend when one is missing."""

    def resolved(self, settings: EvalSettings) -> dict[str, Any]:
        """The settings this task really uses, without the learning rate."""

    def learning_rates(self, settings: EvalSettings) -> tuple[float | None, ...]:
        """Learning rates to try; (None,) for a task without training."""

    def prepare(self, data: Path, tokenizer: Any, settings: EvalSettings) -> Any:
        """Examples, parsed and tokenised once for all seeds; DataError with file and line when malformed."""

    def work(self, prepared: Any, settings: EvalSettings) -> int:
        """Examples that `measure` will report through `on_step`, for the time left."""

    def measure(
        self,
        prepared: Any,
        *,
        source: Any,
        settings: EvalSettings,
        unit: Unit,
        device: Any,
        on_step: Callable[[int], None],
    ) -> Measurement: ...
