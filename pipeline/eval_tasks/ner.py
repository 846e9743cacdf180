"""Named-entity recognition from CoNLL-style files: one token and its tag per line, an empty line between sentences."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError
from pipeline.eval_tasks.settings import EvalSettings
from pipeline.eval_tasks.task import Headline, Measurement, Unit
from pipeline.eval_tasks.task_files import Malformed, find_files, fixed_part, read_lines

TAG = re.compile(r"O|[BIES]-\S+")
COLUMN_BREAK = re.compile(r"[ \t]+")
DOCUMENT_MARK = "-DOCSTART-"
SPLITS = ("train", "dev", "test")
FirstPieces = dict[int, int]  # word of a sentence -> position of its first word piece


@dataclass(frozen=True)
class Sentence:
    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class PreparedSentences:
    """Tokenised sentences, with what leads from word pieces back to tagged words."""

    prepared: Any
    tags: list[str]
    sentences: dict[str, list[Sentence]]
    first_pieces: dict[str, list[FirstPieces]]

    @property
    def sample_ids(self) -> np.ndarray:
        return self.prepared.sample_ids


@dataclass(frozen=True)
class TokenTask:
    """Entity tagging, one label per word on its first word piece; dev chooses the learning rate, test gives the score.

    Entities are counted by seqeval as the CoNLL script does, so IO, IOB1 and IOB2 tags all work.
    """

    folder: str
    file_choices: tuple[tuple[str, ...], ...]
    """Names of the train, dev and test file; or of a single file, which is then split by document, 3 : 1 : 1."""
    source: str
    headlines: tuple[Headline, ...]
    epochs: float = 10
    learning_rate: float = 5e-5
    seeded: bool = True

    def files(self, data: Path) -> list[Path]:
        # A single loose file lies directly in --data as often as in a folder of its own.
        folders = (self.folder, ".") if len(self.file_choices) == 1 else (self.folder,)
        return find_files(data, task=self.folder, folders=folders, names=self.file_choices, source=self.source)

    def resolved(self, settings: EvalSettings) -> dict[str, Any]:
        return settings.finetuning(epochs=self.epochs)

    def learning_rates(self, settings: EvalSettings) -> tuple[float | None, ...]:
        return settings.learning_rates or (self.learning_rate,)

    def prepare(self, data: Path, tokenizer: Any, settings: EvalSettings) -> Any:
        from pipeline.eval_tasks.finetuning import Prepared

        malformed = Malformed(settings.max_malformed)
        paths = self.files(data)
        if len(paths) == 1:
            sentences = split_by_document(read_documents(paths[0], malformed))
        else:
            sentences = {
                name: [sentence for document in read_documents(path, malformed) for sentence in document]
                for name, path in zip(SPLITS, paths, strict=True)
            }
        limits = {
            "train": settings.max_train_examples,
            "dev": settings.max_eval_examples,
            "test": settings.max_eval_examples,
        }
        tags = sorted({tag for part in sentences.values() for sentence in part for tag in sentence.tags})
        parts = {name: [part[i] for i in fixed_part(len(part), limits[name])] for name, part in sentences.items()}
        max_length = settings.max_length or 128
        encoded = {name: encode_words(part, tokenizer, tags, max_length) for name, part in parts.items()}
        return PreparedSentences(
            prepared=Prepared(
                train=encoded["train"][0],
                evals={name: encoded[name][0] for name in ("dev", "test")},
                pad_id=tokenizer.pad_token_id,
                num_malformed=malformed.count,
            ),
            tags=tags,
            sentences=parts,
            first_pieces={name: first_pieces for name, (_, first_pieces) in encoded.items()},
        )

    def work(self, prepared: Any, settings: EvalSettings) -> int:
        return prepared.prepared.work(settings, epochs=settings.epochs or self.epochs)

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
        from transformers import AutoModelForTokenClassification

        from pipeline.eval_tasks.finetuning import tune_and_predict

        tags = prepared.tags
        losses, logits_of = tune_and_predict(
            prepared.prepared,
            lambda: source.model(
                AutoModelForTokenClassification,
                device=device,
                num_labels=len(tags),
                **source.dropout(settings.dropout),
            ),
            settings=settings,
            epochs=settings.epochs or self.epochs,
            unit=unit,
            on_step=on_step,
        )
        metrics: dict[str, float] = {}
        for name, logits in logits_of.items():
            sentences = prepared.sentences[name]
            predicted = word_tags(logits, prepared.first_pieces[name], sentences, tags)
            gold = [list(sentence.tags) for sentence in sentences]
            suffix = "" if name == "test" else f"_{name}"
            metrics |= {metric + suffix: value for metric, value in entity_metrics(gold, predicted).items()}
        return Measurement(metrics=metrics, selection=metrics["f1_dev"], counts=prepared.prepared.counts, losses=losses)


def read_documents(path: Path, malformed: Malformed) -> list[list[Sentence]]:
    """Documents (ended by -DOCSTART- lines, or only one) of sentences; columns between token and tag are ignored."""
    documents: list[list[Sentence]] = [[]]
    words: list[str] = []
    tags: list[str] = []

    def end_sentence() -> None:
        if words:
            documents[-1].append(Sentence(words=tuple(words), tags=tuple(tags)))
            words.clear()
            tags.clear()

    for number, line in read_lines(path):
        columns = COLUMN_BREAK.split(line.strip(" \t"))
        if columns == [""]:
            end_sentence()
        elif columns[0] == DOCUMENT_MARK:
            end_sentence()
            if documents[-1]:
                documents.append([])
        elif len(columns) < 2:
            malformed.skip(path, number, f"one column instead of a token and its tag ({line[:40]!r})")
        elif not TAG.fullmatch(columns[-1]):
            malformed.skip(path, number, f"tag {columns[-1][:40]!r} is neither O nor like B-PER or I-PER")
        else:
            words.append(columns[0])
            tags.append(columns[-1])
    end_sentence()
    documents = [document for document in documents if document]
    if not documents:
        raise DataError(f"cannot read task data: {path} - it holds no sentences - put a CoNLL file (token, tag) there")
    return documents


def split_by_document(documents: list[list[Sentence]]) -> dict[str, list[Sentence]]:
    """Of every five documents three train, one develops, one tests: no document stands on both sides."""
    turn = ("train", "train", "train", "dev", "test")
    parts: dict[str, list[Sentence]] = {name: [] for name in SPLITS}
    for i, document in enumerate(documents):
        parts[turn[i % 5]] += document
    return parts


def encode_words(
    sentences: list[Sentence], tokenizer: Any, tags: list[str], max_length: int
) -> tuple[Any, list[FirstPieces]]:
    """Word pieces with the word's tag number on its first piece, -100 on all else, and where those first pieces are."""
    from pipeline.eval_tasks.finetuning import EncodedSplit

    # Byte-level vocabularies write the space before a word into its first piece; a word given alone would lose it.
    space = "" if tokenizer.tokenize("a a") == 2 * tokenizer.tokenize("a") else " "
    words = [[space + word for word in sentence.words] for sentence in sentences]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    tag_ids = {tag: i for i, tag in enumerate(tags)}
    labels, first_pieces = [], []
    for i, sentence in enumerate(sentences):
        word_of_piece = encoded.word_ids(i)
        first_piece: FirstPieces = {}
        for position, word in enumerate(word_of_piece):
            if word is not None:
                first_piece.setdefault(word, position)
        row = np.full(len(word_of_piece), -100, dtype=np.int64)
        for word, position in first_piece.items():
            row[position] = tag_ids[sentence.tags[word]]
        labels.append(row)
        first_pieces.append(first_piece)
    types = encoded.get("token_type_ids")
    split = EncodedSplit(
        input_ids=[np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]],
        token_type_ids=None if types is None else [np.asarray(ids, dtype=np.int8) for ids in types],
        labels=labels,
    )
    return split, first_pieces


def word_tags(
    logits: list[np.ndarray], first_pieces: list[FirstPieces], sentences: list[Sentence], tags: list[str]
) -> list[list[str]]:
    """A tag per word of every sentence. Words cut off, or without any piece, count as O: they stay in the score."""
    predicted = []
    for values, first_piece, sentence in zip(logits, first_pieces, sentences, strict=True):
        best = values.argmax(-1)
        predicted.append(
            [tags[best[first_piece[word]]] if word in first_piece else "O" for word in range(len(sentence.words))]
        )
    return predicted


def entity_metrics(gold: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    measures = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: float(measure(gold, predicted, zero_division=0)) for name, measure in measures.items()}


CONLL2003 = TokenTask(
    "conll2003",
    (("train.txt", "eng.train"), ("valid.txt", "dev.txt", "eng.testa"), ("test.txt", "eng.testb")),
    "get CoNLL-2003 from https://www.clips.uantwerpen.be/conll2003/ner/ (its text from NIST) and put it there",
    (Headline("CoNLL-2003 F1", "f1"),),
    epochs=5,
)
WNUT17 = TokenTask(
    "wnut17",
    (
        ("train.conll", "wnut17train.conll"),
        ("dev.conll", "emerging.dev.conll"),
        ("test.conll", "emerging.test.annotated"),
    ),
    "get WNUT 2017 from https://github.com/leondz/emerging_entities_17 and put it there",
    (Headline("WNUT17 F1", "f1"),),
)
WIKIGOLD = TokenTask(
    "wikigold",
    (("wikigold.conll.txt",),),
    "copy data_prep/samples/wikigold of capgap's repository there",
    (Headline("WikiGold F1", "f1"),),
)
