"""The GLUE tasks: one table entry each, read from the tab-separated files that GLUE distributes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.task import Headline, Measurement, Unit
from pipeline.eval_tasks.task_files import Malformed, find_files, fixed_part, read_lines

HOMEPAGE = "get GLUE from https://gluebenchmark.com/tasks and unpack the folder {folder} into --data"


@dataclass(frozen=True)
class Row:
    texts: tuple[str, ...]
    label: int | float


@dataclass(frozen=True)
class SentenceTask:
    """A classification or regression of sentences or pairs, scored on dev.tsv (GLUE hides its test labels)."""

    folder: str
    text_columns: tuple[str, ...]
    label_column: str
    headlines: tuple[Headline, ...]
    labels: tuple[str, ...] | None = None
    """Class names in the order of their numbers; None for a score from 0 to 5."""
    dev_files: tuple[str, ...] = ("dev.tsv",)
    header: tuple[str, ...] | None = None
    """Column names of a file that has no header line (CoLA)."""
    epochs: float = 3
    learning_rate: float = 3e-5
    seeded: bool = True

    def files(self, data: Path) -> list[Path]:
        names = [("train.tsv",), *((name,) for name in self.dev_files)]
        folders = (self.folder, self.folder.lower())
        source = HOMEPAGE.format(folder=self.folder)
        return find_files(data, task=self.folder, folders=folders, names=names, source=source)

    def resolved(self, settings: EvalSettings) -> dict[str, Any]:
        return settings.finetuning(epochs=self.epochs)

    def learning_rates(self, settings: EvalSettings) -> tuple[float | None, ...]:
        return settings.learning_rates or (self.learning_rate,)

    def prepare(self, data: Path, tokenizer: Any, settings: EvalSettings) -> Any:
        from pipeline.eval_tasks.finetuning import EncodedSplit, Prepared

        malformed = Malformed(settings.max_malformed)
        train_path, *dev_paths = self.files(data)
        max_length = settings.max_length or 128

        def encode(path: Path, limit: int | None) -> EncodedSplit:
            rows = read_rows(path, self, malformed)
            rows = [rows[i] for i in fixed_part(len(rows), limit)]
            texts = [[row.texts[i] for row in rows] for i in range(len(self.text_columns))]
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
            types = encoded.get("token_type_ids")
            return EncodedSplit(
                input_ids=[np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]],
                token_type_ids=None if types is None else [np.asarray(ids, dtype=np.int8) for ids in types],
                labels=[row.label for row in rows],
            )

        train = encode(train_path, settings.max_train_examples)
        evals = {path.stem: encode(path, settings.max_eval_examples) for path in dev_paths}
        return Prepared(train=train, evals=evals, pad_id=tokenizer.pad_token_id, num_malformed=malformed.count)

    def work(self, prepared: Any, settings: EvalSettings) -> int:
        return prepared.work(settings, epochs=settings.epochs or self.epochs)

    def measure(
        self,
        prepared: Any,
        *,
        source: Any,
        settings: EvalSettings,
        unit: Unit,
        device: Any,
        on_step: Callable[[int], None],
    ) -> Measurement:
        from transformers import AutoModelForSequenceClassification

        from pipeline.eval_tasks.finetuning import tune_and_predict

        num_labels = 1 if self.labels is None else len(self.labels)
        losses, logits_of = tune_and_predict(
            prepared,
            lambda: source.model(
                AutoModelForSequenceClassification,
                device=device,
                num_labels=num_labels,
                **source.dropout(settings.dropout),
            ),
            settings=settings,
            epochs=settings.epochs or self.epochs,
            unit=unit,
            on_step=on_step,
        )
        metrics: dict[str, float] = {}
        for name, logits in logits_of.items():
            suffix = name.removeprefix("dev")
            gold = np.asarray(prepared.evals[name].labels)
            scores = regression_metrics(logits, gold) if self.labels is None else classification_metrics(logits, gold)
            metrics |= {metric + suffix: value for metric, value in scores.items()}
        selection = float(np.mean([metrics[headline.metric] for headline in self.headlines]))
        return Measurement(metrics=metrics, selection=selection, counts=prepared.counts, losses=losses)


def read_rows(path: Path, task: SentenceTask, malformed: Malformed) -> list[Row]:
    """The labelled rows of one GLUE file. Quotes are plain characters there, and only tabs and line feeds separate."""
    rows: list[Row] = []
    header = task.header
    wanted: list[int] = []
    label_ids = {name: i for i, name in enumerate(task.labels or ())} | {
        str(i): i for i in range(len(task.labels or ()))
    }
    for number, line in read_lines(path):
        if not line:
            continue
        fields = line.split("\t")
        if not wanted:
            columns = header or fields
            missing = [name for name in (*task.text_columns, task.label_column) if name not in columns]
            if missing:
                raise DataError(
                    f"cannot read task data: {path}:{number} - the header has no column {missing[0]!r} "
                    f"(it has {', '.join(columns)[:80]}) - "
                    f"put GLUE's own {path.name} there"
                )
            wanted = [columns.index(name) for name in (*task.text_columns, task.label_column)]
            width = len(columns)
            if header is None:
                continue
        if len(fields) != width:
            malformed.skip(path, number, f"{len(fields)} columns instead of {width}")
            continue
        *texts, label = (fields[i] for i in wanted)
        try:
            value: int | float = label_ids[label] if task.labels else float(label)
        except (KeyError, ValueError):
            allowed = " or ".join(task.labels) if task.labels else "a number"
            malformed.skip(path, number, f"label {label[:40]!r} is not {allowed}")
            continue
        rows.append(Row(texts=tuple(texts), label=value))
    if not rows:
        raise DataError(f"cannot read task data: {path} - it holds no labelled rows - put GLUE's own {path.name} there")
    return rows


def classification_metrics(logits: list[np.ndarray], gold: np.ndarray) -> dict[str, float]:
    """Accuracy, that of always naming the most frequent class, Matthews correlation; F1 of class 1 of two."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = np.stack(logits).argmax(-1)
    metrics = {"accuracy": accuracy_score(gold, predicted), "matthews": matthews_corrcoef(gold, predicted)}
    metrics["majority"] = np.bincount(gold).max() / len(gold)
    if logits[0].shape[-1] == 2:
        metrics["f1"] = f1_score(gold, predicted, zero_division=0.0)
    return {name: float(value) for name, value in metrics.items()}


def regression_metrics(logits: list[np.ndarray], gold: np.ndarray) -> dict[str, float]:
    """Pearson and Spearman correlation; 0 for predictions that are all alike, where they are undefined."""
    from scipy.stats import pearsonr, spearmanr

    predicted = np.stack(logits).squeeze(-1)
    if np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": float(pearsonr(gold, predicted)[0]), "spearman": float(spearmanr(gold, predicted)[0])}


YES_NO = ("0", "1")
ENTAILED = ("entailment", "not_entailment")

COLA = SentenceTask(
    "CoLA",
    ("sentence",),
    "label",
    (Headline("CoLA Matthews", "matthews"),),
    YES_NO,
    header=("source", "label", "star", "sentence"),
    epochs=10,
)
SST2 = SentenceTask(
    "SST-2", ("sentence",), "label", (Headline("SST-2 acc", "accuracy", floor_metric="majority"),), YES_NO
)
MRPC = SentenceTask("MRPC", ("#1 String", "#2 String"), "Quality", (Headline("MRPC F1", "f1"),), YES_NO, epochs=10)
STSB = SentenceTask("STS-B", ("sentence1", "sentence2"), "score", (Headline("STS-B Spearman", "spearman"),), epochs=10)
QQP = SentenceTask("QQP", ("question1", "question2"), "is_duplicate", (Headline("QQP F1", "f1"),), YES_NO)
MNLI = SentenceTask(
    "MNLI",
    ("sentence1", "sentence2"),
    "gold_label",
    (
        Headline("MNLI-m acc", "accuracy_matched", floor_metric="majority_matched"),
        Headline("MNLI-mm acc", "accuracy_mismatched", floor_metric="majority_mismatched"),
    ),
    ("contradiction", "entailment", "neutral"),
    dev_files=("dev_matched.tsv", "dev_mismatched.tsv"),
)
QNLI = SentenceTask(
    "QNLI", ("question", "sentence"), "label", (Headline("QNLI acc", "accuracy", floor_metric="majority"),), ENTAILED
)
RTE = SentenceTask(
    "RTE",
    ("sentence1", "sentence2"),
    "label",
    (Headline("RTE acc", "accuracy", floor_metric="majority"),),
    ENTAILED,
    epochs=10,
)
WNLI = SentenceTask(
    "WNLI",
    ("sentence1", "sentence2"),
    "label",
    (Headline("WNLI acc", "accuracy", floor_metric="majority"),),
    YES_NO,
    epochs=10,
)
