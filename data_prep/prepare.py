"""The job `capgap prepare`: sources -> clean text -> tokens -> Arrow shards with a manifest.

The main process cuts the sources into parts and hands them to workers; each part is written on its own, so a rerun
makes only what is missing. When all parts are there they get their final names and the manifest is written last.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import tyro

from data_prep.cleaning import clean_wikitext
from data_prep.errors import ConfigError, DataError, reports_errors
from data_prep.files import (
    make_folder,
    portable_name,
    read_json,
    remove_folder,
    remove_leftovers,
    rename,
    replacing_folder,
    require_free_space,
    wait_for_size,
    write_json,
)
from data_prep.locks import folder_lock
from data_prep.packing import Pairing
from data_prep.parts import Packing, Part, PartMaker, PartOptions
from data_prep.progress import Progress
from data_prep.shards import (
    SCHEMA_VERSION,
    Manifest,
    Rows,
    Shard,
    folder_metadata,
    mapped,
    open_shards,
    shard_name,
    tokenizer_hash,
    write_manifest,
)
from data_prep.sources import (
    Document,
    DumpRange,
    ReadOptions,
    Source,
    TxtDocuments,
    blend,
    fingerprint,
    open_source,
    read_range,
    read_source,
)
from data_prep.tokenization import (
    SAMPLE_CHARACTERS,
    Engine,
    EngineName,
    describe_tokenizer,
    make_engine,
    save_tokenizer,
)

TEXT_PER_COMPRESSED_BYTE = 4  # of a bz2 dump, roughly: turns --part-megabytes into a length of compressed file


@dataclass(frozen=True)
class PrepareConfig:
    """Turns Wikipedia dumps, text files or datasets into tokenised Arrow shards."""

    source: tuple[str, ...]
    """Dumps (.xml, .bz2), .txt, .jsonl, .parquet (also .gz, .zst), folders of them, or NAME[:CONFIG[:SPLIT]]."""
    out: Path
    """Output folder. The same command continues in it what an earlier one left."""
    tokenizer: str = ""
    """Tokenizer folder, tokenizer.json, sentencepiece .model, or hub name; not needed for --rows text."""
    rows: Rows = "bert-pairs"
    """bert-pairs: [CLS] A [SEP] B [SEP]; lm-blocks: documents with EOS, back to back; text: one document per row."""
    length: int = 128
    """Tokens of a row."""
    workers: int = 1
    """Processes on this machine; the output does not depend on it."""
    seed: int = 0
    """Of row lengths, cuts and pairings; every document has its own."""
    pairing: Pairing = "consecutive"
    """Segment B: what follows A; sentence-order swaps half the pairs; random-next takes half from other documents."""
    short_row_probability: float = 0.1
    """Share of bert-pairs rows that aim at a random shorter length."""
    packing: Packing = "back-to-back"
    """lm-blocks: cut documents at the end of a row, or place whole ones where they fit best."""
    weights: tuple[float, ...] = ()
    """Shares, in characters, of several sources; ends when the first of them ends. Empty: all, one after another."""
    cleaner: Literal["single-pass", "mwparserfromhell"] = "single-pass"
    """Wikitext cleaner: our own, or the slow oracle it is tested against."""
    drop_disambiguation: bool = True
    """Drop pages that only list meanings of a title."""
    drop_duplicate_paragraphs: bool = False
    """Drop paragraphs (40 characters or more) seen before in the same part."""
    min_characters: int = 100
    """Shorter documents are rejected."""
    text_field: str = "text"
    """The field of .jsonl, .parquet and datasets that holds the text."""
    txt_documents: TxtDocuments = "blank-lines"
    """Documents of a .txt file: between blank lines, or the whole file."""
    max_page_megabytes: float = 8.0
    """Longer pages are rejected."""
    page_seconds: float = 20.0
    """Pages that take more computing time to clean are rejected."""
    part_megabytes: float = 32.0
    """Source text per part, which becomes one shard. More: fewer files and more memory per worker."""
    tokenizer_engine: EngineName = "memo"
    """huggingface, or the same ids faster: memo (exact or not used), nanotoken, gigatoken (optional packages)."""
    allow_partial: bool = False
    """Keep the complete pages of a damaged dump, and say so in the manifest."""
    task_index: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Makes every n-th part only, beginning with part I; default: $SLURM_ARRAY_TASK_ID when --num-tasks is given."""
    num_tasks: int = 1
    """Number of array tasks that share the work; run --finish when all are done."""
    finish: bool = False
    """Only check that all parts are there, and write the manifest."""

    def __post_init__(self) -> None:
        def refuse(flag: str, value: object, why: str, mend: str) -> None:
            raise ConfigError(f"capgap prepare: --{flag} ({value}) - {why} - {mend}")

        if not self.source:
            refuse("source", "", "nothing to read", "give at least one file, folder or dataset name")
        if self.rows != "text" and not self.tokenizer:
            refuse("tokenizer", "", f"--rows {self.rows} needs one", "give a tokenizer folder or hub name")
        if self.rows == "bert-pairs" and self.length < 8:
            refuse("length", self.length, "no room for [CLS] A [SEP] B [SEP]", "give 8 or more")
        if self.rows == "lm-blocks" and self.length < 2:
            refuse("length", self.length, "a block holds at least a token and EOS", "give 2 or more")
        if not 0 <= self.short_row_probability <= 1:
            refuse("short-row-probability", self.short_row_probability, "not a probability", "give 0 to 1")
        for flag in ("workers", "num_tasks", "part_megabytes", "max_page_megabytes", "page_seconds"):
            if getattr(self, flag) <= 0:
                refuse(flag.replace("_", "-"), getattr(self, flag), "not positive", "give 1 or more")
        if self.weights and (len(self.weights) != len(self.source) or min(self.weights) <= 0):
            refuse("weights", self.weights, f"{len(self.source)} sources", "give one positive number per source")
        if self.task_index is not None and not 0 <= self.task_index < self.num_tasks:
            refuse("task-index", self.task_index, f"--num-tasks is {self.num_tasks}", f"give 0 to {self.num_tasks - 1}")

    def part_options(self) -> PartOptions:
        return PartOptions(
            rows=self.rows,
            length=self.length,
            seed=self.seed,
            pairing=self.pairing,
            short_row_probability=self.short_row_probability,
            packing=self.packing,
            cleaner=self.cleaner,
            drop_disambiguation=self.drop_disambiguation,
            drop_duplicate_paragraphs=self.drop_duplicate_paragraphs,
            min_characters=self.min_characters,
            page_seconds=self.page_seconds,
            read=self.read_options(),
        )

    def read_options(self) -> ReadOptions:
        return ReadOptions(
            text_field=self.text_field,
            txt_documents=self.txt_documents,
            max_page_bytes=round(self.max_page_megabytes * 1e6),
            allow_partial=self.allow_partial,
        )


# What may differ between two commands that work on the same output: none of it changes a byte of a finished part.
FREE_KEYS = {"out", "workers", "allow_partial", "task_index", "num_tasks", "finish", "tokenizer_engine"}
COMPARED_BY_HASH = {"source", "tokenizer"}


def recorded_config(config: PrepareConfig, sources: list[Source], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Everything that the bytes depend on, as it is written to config.json and compared by the next command."""
    values = {key: value for key, value in asdict(config).items() if key not in FREE_KEYS | COMPARED_BY_HASH}
    values["weights"] = list(config.weights)
    values["tokenizer"] = tokenizer.get("hash", "")
    values["source"] = [fingerprint(source) for source in sources]
    values["schema_version"] = SCHEMA_VERSION
    return values


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Prepares shards; prints what was kept and what was rejected; returns 0 when the folder is finished."""
    config = tyro.cli(PrepareConfig, args=argv, prog="capgap prepare")
    prepare(config)
    return 0


def prepare(config: PrepareConfig) -> None:
    """Does the work of one command: a whole run, one array task, or the finish."""
    task_index, num_tasks = _task(config)
    sources = [open_source(number, name) for number, name in enumerate(config.source)]
    make_folder(config.out)
    with ExitStack() as held:
        whole = num_tasks == 1 or config.finish
        held.enter_context(folder_lock(config.out, "writer" if whole else f"task-{task_index}-of-{num_tasks}"))
        with folder_lock(config.out, "setup", wait=True):  # array tasks start together
            tokenizer = _place_tokenizer(config)
            recorded = recorded_config(config, sources, tokenizer)
            _check_same_config(config.out, recorded)
            if not (config.out / "config.json").exists():
                write_json(config.out / "config.json", recorded)
        if (config.out / "manifest.json").exists():
            manifest = open_shards(config.out).manifest
            remove_folder(config.out / "parts")  # the last thing that a finish does, which may have been cut off
            _say(f"{config.out} is complete already: nothing to do ({manifest.num_rows} rows)")
            return
        if whole:
            remove_leftovers(config.out)
        make_folder(config.out / "parts")
        if not config.finish:
            _make_parts(config, sources, tokenizer, task_index, num_tasks)
        if whole:
            _finish(config, recorded, tokenizer)
        else:
            _say(f"task {task_index} of {num_tasks} is done; when all are: the same command with --finish")


def _task(config: PrepareConfig) -> tuple[int, int]:
    if config.finish or config.num_tasks == 1:
        return 0, 1
    if config.task_index is not None:
        return config.task_index, config.num_tasks
    slurm = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not slurm.isdigit() or not int(slurm) < config.num_tasks:
        raise ConfigError(
            f"capgap prepare: --num-tasks ({config.num_tasks}) - no --task-index, and SLURM_ARRAY_TASK_ID is "
            f"({slurm or 'not set'}) - give --task-index 0 to {config.num_tasks - 1}"
        )
    return int(slurm), config.num_tasks


def _place_tokenizer(config: PrepareConfig) -> dict[str, Any]:
    """Puts the tokenizer into OUT/tokenizer, unless it is there, and describes it."""
    if config.rows == "text":
        return {}
    folder = config.out / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        with replacing_folder(folder) as fresh:
            save_tokenizer(config.tokenizer, fresh)
        tokenizer = describe_tokenizer(portable_name(config.tokenizer), folder)
    else:
        tokenizer = describe_tokenizer(portable_name(config.tokenizer), folder)
        tokenizer["hash"] = _hash_of_named(config.tokenizer, folder, tokenizer["hash"])
    required = ("cls_id", "sep_id", "pad_id") if config.rows == "bert-pairs" else ("eos_id",)
    if missing := [key for key in required if tokenizer[key] is None]:
        raise DataError(
            f"loading tokenizer {config.tokenizer}: no {missing[0].removesuffix('_id')} token - --rows {config.rows} "
            "needs one - give a tokenizer of the model family that the rows are for"
        )
    return tokenizer


def _hash_of_named(name: str, placed: Path, placed_hash: str) -> str:
    """The hash of the tokenizer that the command names now, where that is a folder: it may have changed since."""
    return tokenizer_hash(Path(name)) if Path(name).is_dir() else placed_hash


def _check_same_config(out: Path, recorded: dict[str, Any]) -> None:
    path = out / "config.json"
    if not path.exists():
        return
    earlier = read_json(path, "choose another --out")
    different = sorted(key for key in {*earlier, *recorded} if earlier.get(key) != recorded.get(key))
    if different:
        changes = ", ".join(f"{key} ({_brief(earlier.get(key))}, now {_brief(recorded.get(key))})" for key in different)
        raise ConfigError(
            f"output folder {out}: made with another config: {changes} - its parts would not fit together - "
            "choose another --out, or remove the folder"
        )


def _brief(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return " ".join(f"{entry.get('name')}:{str(entry.get('hash'))[:8]}" for entry in value)
    return str(value)


def plan_parts(config: PrepareConfig, sources: list[Source]) -> Iterator[Part]:
    """Cuts the sources into parts, the same for every worker and task: by streams of a dump, else by text read."""
    options = config.read_options()
    part_characters = round(config.part_megabytes * 1e6)
    range_bytes = None if config.weights else max(1, part_characters // TEXT_PER_COMPRESSED_BYTE)
    number = 0
    part = Part(0)
    characters = 0
    read_before = 0

    def close() -> Part:
        nonlocal number, characters, read_before
        read = sum(source.meter.num_bytes for source in sources)
        part.source_bytes += read - read_before
        read_before, characters, number = read, 0, number + 1
        return part

    for item in _items(config, sources, options, range_bytes):
        if isinstance(item, DumpRange):
            if part.documents:
                yield close()
            part = Part(number, place=item, source_bytes=item.num_bytes)
            yield close()
            part = Part(number)
            continue
        part.documents.append(item)
        characters += len(item.text)
        if characters >= part_characters:
            yield close()
            part = Part(number)
    if part.documents:
        yield close()


def _items(
    config: PrepareConfig, sources: list[Source], options: ReadOptions, range_bytes: int | None
) -> Iterator[Document | DumpRange]:
    if config.weights:
        streams: list[Any] = [read_source(source, options, range_bytes=None) for source in sources]
        yield from blend(streams, list(config.weights))
        return
    for source in sources:
        yield from read_source(source, options, range_bytes=range_bytes)


def _make_parts(
    config: PrepareConfig, sources: list[Source], tokenizer: dict[str, Any], task_index: int, num_tasks: int
) -> None:
    sizes = [source.num_bytes for source in sources]
    known = [size for size in sizes if size is not None]
    total = sum(known) if len(known) == len(sizes) and not config.weights else None
    if total is not None:
        # Rows take about half of the source's bytes (4 characters give a token, which takes 2); twice that, to be sure.
        require_free_space(config.out, total // num_tasks)
    parts = plan_parts(config, sources)
    skipped = made = num_parts = 0
    with ExitStack() as held:
        progress = held.enter_context(Progress("prepare", total and total / 1e6, unit="MB"))
        pool: Pool | None = None
        for part in parts:
            num_parts += 1
            if part.number % num_tasks != task_index:
                progress.advance(part.source_bytes / 1e6)
                continue
            if (config.out / "parts" / f"{part.number:06d}.json").exists():
                skipped += 1
                progress.advance(part.source_bytes / 1e6)
                continue
            if pool is None:
                engine = _choose_engine(config, part)
                name = engine if engine is None or config.workers == 1 else engine.name
                maker = (config.out, config.part_options(), tokenizer, name, len(sources))
                pool = held.enter_context(Pool(maker, config.workers, progress))
            pool.submit(part)
            made += 1
        if pool is not None:
            pool.drain()
    partial = {str(source.number): source.partial for source in sources if source.partial}
    write_json(config.out / "parts" / "total.json", {"num_parts": num_parts, "partial": partial})
    if skipped:
        _say(f"{skipped} parts were complete already, {made} made now")


def _choose_engine(config: PrepareConfig, part: Part) -> Engine | None:
    """The wanted engine, or the reference when it does not give the same ids on the first documents; says so."""
    if config.rows == "text":
        return None
    documents: Any = part.documents
    if part.place is not None:
        quiet = Source(part.place.source, "", [part.place.path], "files")
        documents = read_range(part.place, config.read_options(), quiet)
    lines: list[str] = []
    total = 0
    for document in documents:
        if document.rejected:
            continue
        text = document.text[:SAMPLE_CHARACTERS]
        text = clean_wikitext(text, document.hidden) if document.hidden is not None else text
        lines += text.split("\n")
        total += len(text)
        if total > SAMPLE_CHARACTERS:
            break
    engine, why = make_engine(config.tokenizer_engine, config.out / "tokenizer", lines)
    if why:
        _say(f"warning: {why}")
    return engine


_maker: PartMaker | None = None


def _start_worker(*arguments: Any) -> None:
    global _maker  # noqa: PLW0603
    _maker = PartMaker(*arguments)


def _make_part(part: Part) -> dict[str, Any]:
    assert _maker is not None
    return _maker.make(part)


class Pool:
    """Makes parts in worker processes, holding at most two parts per worker in memory; with one worker, right here."""

    def __init__(self, maker: tuple, num_workers: int, progress: Progress):
        self._progress = progress
        self._limit = 2 * num_workers
        self._pending: dict[Future, Part] = {}
        self._maker = PartMaker(*maker) if num_workers == 1 else None
        self._executor = None
        if num_workers > 1:
            # spawn: a fork would copy locks that threads of pyarrow and tokenizers hold
            self._executor = ProcessPoolExecutor(num_workers, get_context("spawn"), _start_worker, maker)

    def __enter__(self) -> "Pool":
        return self

    def submit(self, part: Part) -> None:
        if self._maker is not None:
            self._maker.make(part)
            self._progress.advance(part.source_bytes / 1e6)
            return
        assert self._executor is not None
        while len(self._pending) >= self._limit:
            self._collect()
        self._pending[self._executor.submit(_make_part, part)] = Part(part.number, source_bytes=part.source_bytes)

    def drain(self) -> None:
        while self._pending:
            self._collect()

    def _collect(self) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            part = self._pending.pop(future)
            try:
                future.result()
            except BrokenProcessPool:
                raise DataError(
                    f"making part {part.number}: a worker process died - killed, most often for memory - "
                    "give fewer --workers or smaller --part-megabytes, then run the same command: it goes on"
                ) from None
            self._progress.advance(part.source_bytes / 1e6)

    def __exit__(self, *_) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)


def _finish(config: PrepareConfig, recorded: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    """Gives the parts their final names and writes stats, metadata and, last, the manifest."""
    folder = config.out / "parts"
    mend = "run the tasks that are missing, then --finish again"
    total = read_json(folder / "total.json", "no task has come to the end of the sources yet - " + mend)
    num_parts = total["num_parts"]
    missing = [number for number in range(num_parts) if not (folder / f"{number:06d}.json").exists()]
    if missing:
        named = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise DataError(
            f"finishing {config.out}: {len(missing)} of {num_parts} parts ({named}) - not made yet - {mend}"
        )
    records = [read_json(folder / f"{number:06d}.json", mend) for number in range(num_parts)]
    stats = _statistics(config, records, total)
    filled = [record for record in records if record["rows"]]
    if not filled:
        raise DataError(
            f"preparing {config.out}: no rows - {_account_line(stats)} - check --source and --min-characters"
        )
    shards = []
    for index, record in enumerate(filled):
        name = shard_name(index, len(filled))
        part_file, shard_file = folder / f"{record['part']:06d}.arrow", config.out / name
        if part_file.exists():
            rename(part_file, shard_file)
        if not shard_file.exists():
            (folder / f"{record['part']:06d}.json").unlink()
            raise DataError(
                f"finishing {config.out}: part {record['part']} - its rows are gone - run the same command again"
            )
        wait_for_size(shard_file, record["bytes"])
        shards.append(Shard(name, record["rows"], record["tokens"], record["bytes"], record["hash"]))
    num_rows, num_tokens = sum(s.rows for s in shards), sum(s.tokens for s in shards)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        rows=config.rows,
        length=0 if config.rows == "text" else config.length,
        num_rows=num_rows,
        num_tokens=num_tokens,
        tokenizer=tokenizer,
        sources=_source_entries(recorded, stats),
        shards=shards,
        config={key: value for key, value in recorded.items() if key not in ("source", "tokenizer")},
        documents={key: stats[key] for key in ("documents_in", "documents_out", "rejected")},
        utilisation=1.0 if config.rows == "text" else round(num_tokens / (num_rows * config.length), 6),
    )
    stats |= {"num_rows": num_rows, "num_tokens": num_tokens, "utilisation": manifest.utilisation}
    write_json(config.out / "stats.json", stats)
    schema = pa.ipc.open_stream(mapped(config.out / shards[0].file)).schema
    state, info = folder_metadata(manifest, schema)
    write_json(config.out / "state.json", state)
    write_json(config.out / "dataset_info.json", info)
    write_manifest(config.out, manifest)
    remove_folder(folder)
    _say(_account_line(stats))
    for entry in manifest.sources:
        for note in entry.get("partial", []):
            _say(f"warning: partial source: {note}")
    size = sum(s.bytes for s in shards)
    per_token = f", {size / (num_rows * config.length):.3f} bytes per token" if config.rows != "text" else ""
    _say(
        f"{config.out}: {num_rows} rows, {num_tokens} tokens in {len(shards)} shards, {size / 1e6:.1f} MB{per_token}, "
        f"utilisation {100 * manifest.utilisation:.1f} %"
    )


COUNTS = ("documents_in", "documents_out", "characters", "tokens")


def _statistics(config: PrepareConfig, records: list[dict[str, Any]], total: dict[str, Any]) -> dict[str, Any]:
    """Sums the accounts of all parts, and checks that no document is missing from them."""
    rejected: Counter[str] = Counter()
    sources = []
    for number, name in enumerate(config.source):
        entries = [record["sources"][number] for record in records]
        per_reason: Counter[str] = Counter()
        for entry in entries:
            per_reason.update(entry["rejected"])
        rejected.update(per_reason)
        partial = total["partial"].get(str(number), [])
        if any(entry["documents_in"] for entry in entries):
            partial = partial + [
                n for r, e in zip(records, entries, strict=True) if e["documents_in"] for n in r["partial"]
            ]
        sources.append(
            {
                "name": portable_name(name),
                **{key: sum(entry[key] for entry in entries) for key in COUNTS},
                "rejected": dict(sorted(per_reason.items())),
                "partial": partial,
            }
        )
    histogram = [sum(column) for column in zip(*(r["lengths"] for r in records if r["lengths"]), strict=True)]
    stats = {
        "documents_in": sum(source["documents_in"] for source in sources),
        "documents_out": sum(source["documents_out"] for source in sources),
        "rejected": dict(sorted(rejected.items())),
        "replaced_characters": sum(record["replaced_characters"] for record in records),
        "duplicate_paragraphs": sum(record["duplicate_paragraphs"] for record in records),
        "sources": sources,
        "row_length_tenths": histogram,
    }
    assert stats["documents_in"] == stats["documents_out"] + sum(rejected.values())
    return stats


def _source_entries(recorded: dict[str, Any], stats: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifest's sources: fingerprint and what came out, with the realised mix in characters and tokens."""
    characters = sum(source["characters"] for source in stats["sources"]) or 1
    tokens = sum(source["tokens"] for source in stats["sources"]) or 1
    entries = []
    for prints, source in zip(recorded["source"], stats["sources"], strict=True):
        entry = {**prints, **{key: source[key] for key in COUNTS}}
        entry["share_of_characters"] = round(source["characters"] / characters, 6)
        entry["share_of_tokens"] = round(source["tokens"] / tokens, 6)
        if source["partial"]:
            entry["partial"] = source["partial"]
        entries.append(entry)
    return entries


def _account_line(stats: dict[str, Any]) -> str:
    """206 documents in = 105 out + 101 rejected (1 other namespace, 100 redirect)"""
    rejected = sum(stats["rejected"].values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in stats["rejected"].items())
    return f"{stats['documents_in']} documents in = {stats['documents_out']} out + {rejected} rejected" + (
        f" ({reasons})" if reasons else ""
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr if line.startswith("warning") else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
