"""Makes one part of the output from the documents of one part of the input; parts know nothing of each other.

Where a part begins and ends depends on the sources and --part-megabytes only, and its rows on its documents only: so
the bytes are the same for any number of workers and array tasks.
"""

import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from data_prep.cleaning import CLEANERS, tidy_plain
from data_prep.files import write_json
from data_prep.packing import Pairing, fill_blocks, fill_pairs, plan_blocks, plan_pairs
from data_prep.sentences import split_sentences
from data_prep.shards import Rows, write_shard
from data_prep.sources import Document, DumpRange, ReadOptions, Source, read_range
from data_prep.tokenization import Engine, EngineName, Tokens, make_engine

Packing = Literal["back-to-back", "best-fit"]
DISAMBIGUATION = re.compile(
    r"\{\{\s*(?:disambig\w*|dab|hndis|geodis|hospitaldis|schooldis|mil-unit-dis|numberdis|letter[ -]?disambig\w*|"
    r"begriffsklärung|homonymie|desambiguación|desambiguação|disambigua|doorverwijspagina|ujednoznacznienie|"
    r"неоднозначность|пояснение|曖昧さ回避|aimai|消歧义|消歧義)\s*[|}]",
    re.IGNORECASE,
)
ENCODE_CHARACTERS = 2_000_000  # handed to the tokenizer at once, so that memory does not grow with the part


@dataclass(frozen=True)
class PartOptions:
    """What decides a part's rows, beside its documents."""

    rows: Rows = "text"
    length: int = 0
    seed: int = 0
    pairing: Pairing = "consecutive"
    short_row_probability: float = 0.1
    packing: Packing = "back-to-back"
    cleaner: str = "single-pass"
    drop_disambiguation: bool = True
    drop_duplicate_paragraphs: bool = False
    min_characters: int = 100
    page_seconds: float = 20.0
    read: ReadOptions = field(default_factory=ReadOptions)


@dataclass
class Part:
    """Documents in hand, or the place in a dump where they stand."""

    number: int
    documents: list[Document] = field(default_factory=list)
    place: DumpRange | None = None
    source_bytes: int = 0  # read for it, for the progress line


@dataclass
class Accounts:
    """Documents in = out + rejected, per source, and what was seen on the way."""

    documents_in: Counter[int] = field(default_factory=Counter)
    documents_out: Counter[int] = field(default_factory=Counter)
    rejected: Counter[tuple[int, str]] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    rows: Counter[int] = field(default_factory=Counter)
    replaced: int = 0
    duplicate_paragraphs: int = 0

    def to_json(self, num_sources: int) -> dict[str, Any]:
        per_source = [
            {
                "documents_in": self.documents_in[s],
                "documents_out": self.documents_out[s],
                "rejected": {reason: n for (source, reason), n in sorted(self.rejected.items()) if source == s},
                "characters": self.characters[s],
                "tokens": self.tokens[s],
            }
            for s in range(num_sources)
        ]
        return {
            "sources": per_source,
            "replaced_characters": self.replaced,
            "duplicate_paragraphs": self.duplicate_paragraphs,
        }


class PartMaker:
    """Holds what is loaded once per process: the engine and the cleaner."""

    def __init__(
        self,
        folder: Path,
        options: PartOptions,
        tokenizer: dict[str, Any],
        engine: Engine | EngineName | None,
        num_sources: int,
    ):
        self._folder, self._options, self._tokenizer, self._num_sources = folder, options, tokenizer, num_sources
        # A name comes from the parent process, which has verified that engine on the first documents.
        self._engine = make_engine(engine, folder / "tokenizer", [])[0] if isinstance(engine, str) else engine
        self._clean = CLEANERS[options.cleaner]

    def make(self, part: Part) -> dict[str, Any]:
        """Writes parts/NNNNNN.arrow, unless no row came out, and then its record NNNNNN.json, which it returns."""
        accounts = Accounts()
        partial: list[str] = []
        documents: Any = part.documents
        if part.place is not None:
            source = Source(part.place.source, str(part.place.path), [part.place.path], "files", partial=partial)
            documents = read_range(part.place, self._options.read, source)
        kept = list(self.clean_documents(documents, accounts))
        columns, valid_tokens, lengths = self._rows(kept, accounts)
        num_rows = len(next(iter(columns.values())))
        record: dict[str, Any] = {"part": part.number, "rows": num_rows, "tokens": valid_tokens, "bytes": 0, "hash": ""}
        if num_rows:
            path = self._folder / "parts" / f"{part.number:06d}.arrow"
            record["bytes"], record["hash"] = write_shard(path, columns)
        record |= {"partial": partial, "lengths": lengths, **accounts.to_json(self._num_sources)}
        write_json(self._folder / "parts" / f"{part.number:06d}.json", record)
        return record

    def clean_documents(self, documents: Iterator[Document], accounts: Accounts) -> Iterator[tuple[Document, str]]:
        """The documents that are kept, with their clean text; every other one is counted under its reason."""
        seen: set[int] = set()
        for document in documents:
            accounts.documents_in[document.source] += 1
            accounts.replaced += document.replaced
            rejected, text = document.rejected, document.text
            if not rejected:
                rejected, text = self._clean_document(document)
            if not rejected and self._options.drop_duplicate_paragraphs:
                text, dropped = drop_seen_paragraphs(text, seen)
                accounts.duplicate_paragraphs += dropped
                if not text:
                    rejected = "duplicate"
            if not rejected and len(text) < self._options.min_characters:
                rejected = "too short" if text else "empty"
            if rejected:
                accounts.rejected[document.source, rejected] += 1
                continue
            accounts.documents_out[document.source] += 1
            accounts.characters[document.source] += len(text)
            yield document, text

    def _clean_document(self, document: Document) -> tuple[str, str]:
        if len(document.text) > self._options.read.max_page_bytes:
            return "too large", ""
        if document.hidden is None:
            return "", tidy_plain(document.text)
        if self._options.drop_disambiguation and (
            document.title.endswith("(disambiguation)") or DISAMBIGUATION.search(document.text)
        ):
            return "disambiguation", ""
        try:
            with time_limit(self._options.page_seconds):
                return "", self._clean(document.text, document.hidden)
        except TimeoutError:
            return "time limit", ""
        except RecursionError:
            return "nested too deep", ""

    def _rows(self, kept: list[tuple[Document, str]], accounts: Accounts) -> tuple[dict[str, Any], int, list[int]]:
        """The columns, the number of valid tokens, and the histogram of row lengths in tenths of `length`."""
        options = self._options
        if options.rows == "text":
            documents = [document for document, _ in kept]
            columns: dict[str, Any] = {
                "id": [document.id for document in documents],
                "title": [document.title for document in documents],
                "text": [text for _, text in kept],
            }
            return columns, 0, []
        ids = self._tokenizer
        if options.rows == "bert-pairs":
            sentences = [split_sentences(text) for _, text in kept]
            tokens = self._encode([sentence for split in sentences for sentence in split])
            counts = tokens.counts.tolist()
            per_document, start = [], 0
            for split in sentences:
                per_document.append(counts[start : start + len(split)])
                start += len(split)
            seeds = [row_seed(options.seed, document) for document, _ in kept]
            plan = plan_pairs(
                per_document,
                seeds,
                length=options.length,
                short_row_probability=options.short_row_probability,
                pairing=options.pairing,
            )
            columns = fill_pairs(
                plan,
                tokens.ids,
                length=options.length,
                cls_id=ids["cls_id"],
                sep_id=ids["sep_id"],
                pad_id=ids["pad_id"],
            )
            if options.pairing == "consecutive":
                del columns["segments_in_order"]
            document_counts = [sum(counts) for counts in per_document]
        else:
            tokens = close_documents(self._encode([text for _, text in kept]), ids["bos_id"], ids["eos_id"])
            document_counts = tokens.counts.tolist()
            spans = plan_blocks(document_counts, length=options.length, best_fit=options.packing == "best-fit")
            pad = ids["pad_id"] if ids["pad_id"] is not None else ids["eos_id"]
            columns = fill_blocks(spans, tokens.ids, length=options.length, pad_id=pad)
        for (document, _), count in zip(kept, document_counts, strict=True):
            accounts.tokens[document.source] += count
        tenths = np.ceil(columns["length"].astype(np.int64) * 10 / options.length).astype(np.int64)
        histogram = np.bincount(tenths, minlength=11)[1:].tolist()
        return columns, int(columns["length"].sum(dtype=np.int64)), histogram

    def _encode(self, texts: list[str]) -> Tokens:
        assert self._engine is not None
        pieces: list[Tokens] = []
        start = characters = 0
        for end, text in enumerate(texts, 1):
            characters += len(text)
            if characters >= ENCODE_CHARACTERS or end == len(texts):
                pieces.append(self._engine.encode(texts[start:end]))
                start, characters = end, 0
        if not pieces:
            return self._engine.encode([])
        shifts = np.cumsum([0] + [len(piece.ids) for piece in pieces])
        offsets = [piece.offsets[1:] + shift for piece, shift in zip(pieces, shifts[:-1], strict=True)]
        return Tokens(np.concatenate([piece.ids for piece in pieces]), np.concatenate([[0], *offsets]))


def row_seed(seed: int, document: Document) -> int:
    """A seed of the document's own: the same rows come out wherever the document stands."""
    return xxhash.xxh3_64_intdigest(f"{seed}\t{document.source}\t{document.id}\t{document.title}".encode())


def close_documents(tokens: Tokens, bos_id: int | None, eos_id: int) -> Tokens:
    """Every document with BOS (when the tokenizer has one that is not EOS) before it and EOS behind it."""
    opens = bos_id is not None and bos_id != eos_id
    counts = tokens.counts
    extra = 1 + opens
    offsets = tokens.offsets + extra * np.arange(len(tokens.offsets))
    ids = np.empty(offsets[-1], tokens.ids.dtype)
    ids[offsets[1:] - 1] = eos_id
    if opens:
        ids[offsets[:-1]] = bos_id
    target = np.arange(len(tokens.ids)) + np.repeat(extra * np.arange(len(counts)) + opens, counts)
    ids[target] = tokens.ids
    return Tokens(ids, offsets)


def drop_seen_paragraphs(text: str, seen: set[int]) -> tuple[str, int]:
    """The text without paragraphs of 40 characters or more that are in `seen`, and how many went; adds to `seen`."""
    kept = []
    paragraphs = text.split("\n")
    for paragraph in paragraphs:
        if len(paragraph) >= 40:
            key = xxhash.xxh3_64_intdigest(paragraph.encode())
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n".join(kept), len(paragraphs) - len(kept)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block after `seconds` of computing (a busy machine rejects no more pages than an idle
    one); only the main thread of a process can be limited."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(*_) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGVTALRM, expire)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
