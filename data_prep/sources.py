"""Documents from dumps, WikiExtractor folders, text, JSON lines, parquet and Hugging Face datasets, one at a time.

A source is opened by what it is, not by a flag:

    *.xml, *.bz2            MediaWiki dump; a multistream .bz2 is read in parallel (an index beside it is used)
    wiki_00, *.txt          WikiExtractor output (<doc ...>) or plain text
    *.jsonl, *.parquet      one document per row, text in `text_field`; jsonl and txt may be .gz, .zst or .bz2
    a folder                what save_to_disk wrote, or all the files in it, sorted by path
    anything else           the name of a Hugging Face dataset, NAME[:CONFIG[:SPLIT]], streamed
"""

import bz2
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from data_prep.bz2_streams import Meter, decompress, find_streams, read_index
from data_prep.errors import ConfigError, DataError
from data_prep.files import content_hash, portable_name
from data_prep.shards import mapped
from data_prep.wikipedia import PageReader, SiteNames, read_pages

TxtDocuments = Literal["blank-lines", "file"]
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
KNOWN = re.compile(r"(?P<kind>\.xml|\.txt|\.jsonl|\.json|\.parquet)?(?P<packed>\.bz2|\.gz|\.zst)?$", re.IGNORECASE)
DOC_TAG = re.compile(r"<doc\s(.*)>\s*$")
DOC_ATTRIBUTE = re.compile(r'(\w+)="(.*?)"(?=\s+\w+=|\s*$)')
FINGERPRINT_BYTES = 1 << 20


class Document(NamedTuple):
    """One document as it comes from a source. `hidden` is None for plain text; for wikitext the link prefixes that show
    nothing. `rejected` is the reason when the source already knows one."""

    source: int
    id: str
    title: str
    text: str
    hidden: frozenset[str] | None = None
    rejected: str = ""
    replaced: int = 0  # bytes or control characters that were not text


@dataclass(frozen=True)
class ReadOptions:
    """How sources are read."""

    text_field: str = "text"
    txt_documents: TxtDocuments = "blank-lines"
    max_page_bytes: int = 8 << 20
    allow_partial: bool = False


@dataclass(frozen=True)
class DumpRange:
    """Whole streams of a multistream dump, which any process can read on its own."""

    source: int
    path: Path
    start: int
    end: int
    last: bool
    names: SiteNames

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


@dataclass
class Source:
    """A source given by the user: its name, its files ([] for a dataset name), and what went wrong while reading."""

    number: int
    name: str
    files: list[Path]
    kind: Literal["files", "saved-dataset", "dataset-name"]
    meter: Meter = field(default_factory=Meter)
    partial: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int | None:
        return sum(file.stat().st_size for file in self.files) if self.files else None


def open_source(number: int, name: str) -> Source:
    """Finds out what `name` is; DataError when it is nothing that can be read."""
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
            raise DataError(
                f"opening source {name}: a folder of splits ({', '.join(splits)}) - one split is read at a time - "
                f"give {path / (splits or ['train'])[0]}"
            )
        if (path / "state.json").is_file():
            return Source(number, name, [path / entry for entry in _saved_files(path)], "saved-dataset")
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        files = [file for file in files if "-index.txt" not in file.name and file.name != "README.md"]
        if not files:
            raise DataError(f"opening source {name}: the folder has no files - give a dump, text files or a dataset")
        return Source(number, name, files, "files")
    if path.is_file():
        return Source(number, name, [path], "files")
    looks_like_file = KNOWN.search(path.name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or (looks_like_file and looks_like_file.group()):
        raise DataError(f"opening source {name}: no such file or folder - {_nearest(path)} - check the path")
    return Source(number, name, [], "dataset-name")


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = get_close_matches(path.name, names, n=3) or names[:5]
    return f"the folder {path.parent} has {', '.join(near) or 'no files'}"


def _saved_files(folder: Path) -> list[str]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [entry["filename"] for entry in state["_data_files"]]


def fingerprint(source: Source) -> dict[str, Any]:
    """Name, size and a hash over sizes, first and last MiB of every file: tells sources apart without reading them."""
    if not source.files:
        return {"name": portable_name(source.name), "files": 0, "bytes": 0, "hash": content_hash(source.name.encode())}
    parts = []
    for file in source.files:
        size = file.stat().st_size
        with open(file, "rb") as content:
            head = content.read(FINGERPRINT_BYTES)
            content.seek(max(0, size - FINGERPRINT_BYTES))
            tail = content.read(FINGERPRINT_BYTES)
        parts.append(f"{portable_name(file.name)} {size} {content_hash(head)} {content_hash(tail)}")
    return {
        "name": portable_name(Path(source.name).name),
        "files": len(source.files),
        "bytes": source.num_bytes,
        "hash": content_hash("\n".join(parts).encode()),
    }


def read_source(source: Source, options: ReadOptions, *, range_bytes: int | None) -> Iterator[Document | DumpRange]:
    """The documents of a source in order; where a dump can be cut at streams, ranges of about `range_bytes` compressed
    bytes instead (None: documents only)."""
    if source.kind == "dataset-name":
        yield from _read_dataset_name(source, options)
    elif source.kind == "saved-dataset":
        yield from _read_rows(source, _saved_dataset_rows(source), options)
    for file in source.files if source.kind == "files" else []:
        yield from _read_file(source, file, options, range_bytes)


def _read_file(
    source: Source, file: Path, options: ReadOptions, range_bytes: int | None
) -> Iterator[Document | DumpRange]:
    if file.stat().st_size == 0:
        raise DataError(f"reading {file}: empty file - an interrupted download or copy - get it again or leave it out")
    match = KNOWN.search(file.name)
    kind = (match["kind"] or "").lower() if match else ""
    packed = (match["packed"] or "").lower() if match else ""
    if kind == ".parquet":
        yield from _read_rows(source, _parquet_rows(source, file, options), options)
        return
    if kind in (".jsonl", ".json"):
        yield from _read_rows(source, _json_rows(source, file, packed), options, file=file)
        return
    if kind == ".txt":
        yield from _read_text(source, file, packed, options)
        return
    if kind != ".xml" and packed in ("", ".gz", ".zst"):
        yield from _read_text(source, file, packed, options)
        return
    if packed == ".bz2":
        if kind != ".xml" and not _begins_with_xml(file):
            yield from _read_text(source, file, packed, options)
            return
        ranges = _dump_ranges(source, file, range_bytes) if range_bytes else []
        if ranges:
            yield from ranges
            return
        chunks = decompress(file, meter=source.meter)
    elif packed:
        chunks = _unpacked_chunks(source, file, packed)
    else:
        chunks = _file_chunks(source, file)
    reader = PageReader(str(file), max_page_bytes=options.max_page_bytes)
    pages = read_pages(chunks, reader)
    for page in _until_damage(pages, source, options, reader):
        yield Document(source.number, page.id, page.title, page.text, reader.names.hidden(), page.rejected)


def _until_damage(pages: Iterable, source: Source, options: ReadOptions, reader: PageReader) -> Iterator:
    """The pages up to the first damage, which is an error unless the user allows a partial source."""
    try:
        yield from pages
    except DataError as error:
        message = str(error)
        if "page id" not in message:
            message = message.replace(" - ", f", last complete page id ({reader.last_page or 'none'}) - ", 1)
        if not options.allow_partial:
            mend = "" if "--allow-partial" in message else ", or keep the complete pages with --allow-partial"
            raise DataError(message + mend) from None
        source.partial.append(message.split(" - ")[0])


def _begins_with_xml(file: Path) -> bool:
    with bz2.open(file, "rb") as content:
        try:
            head = content.read(200)
        except (OSError, EOFError):
            return True  # the dump reader says where it is damaged
    return b"<\0m\0e" in head or b"\0<\0m" in head or b"<mediawiki" in head or b"<?xml" in head


def _dump_ranges(source: Source, file: Path, range_bytes: int) -> list[DumpRange]:
    """Ranges of whole streams when the dump is a multistream one (each stream after the first begins with a page)."""
    index = find_index(file)
    size = file.stat().st_size
    offsets = read_index(index) if index else find_streams(file)[1:]
    offsets = [offset for offset in offsets if 0 < offset < size]
    if len(offsets) < 2 or not all(begins_with_page(file, offset) for offset in offsets[:3]):
        return []
    header = PageReader(str(file))
    for chunk in decompress(file, 0, offsets[0]):
        header.feed(chunk)
    cuts = [offsets[0]]
    for offset in offsets:
        if offset - cuts[-1] >= range_bytes:
            cuts.append(offset)
    # The last stream of a dump holds only </mediawiki>; an index does not list it, so it never begins a range.
    while len(cuts) > 1 and not begins_with_page(file, cuts[-1]):
        cuts.pop()
    ends = [*cuts[1:], size]
    return [
        DumpRange(source.number, file, start, end, end == size, header.names)
        for start, end in zip(cuts, ends, strict=True)
    ]


def find_index(dump: Path) -> Path | None:
    """The multistream index beside a dump: NAME-multistream-index.txt[.bz2] for NAME-multistream.xml.bz2."""
    stem = dump.name.removesuffix(".bz2")
    candidates = [
        stem.replace(".xml", "-index.txt"),
        stem.replace("multistream", "multistream-index").replace(".xml", ".txt"),
    ]
    for name in candidates:
        for suffix in (".bz2", ""):
            path = dump.with_name(name + suffix)
            if path != dump and path.is_file():
                return path
    return None


def begins_with_page(file: Path, offset: int) -> bool:
    """Whether a bz2 stream at this offset begins with a page, so that it can be read on its own."""
    with open(file, "rb") as content:
        content.seek(offset)
        head = content.read(1 << 20)
    try:
        return bz2.BZ2Decompressor().decompress(head, 100).lstrip().startswith(b"<page>")
    except (OSError, ValueError):
        return False


def read_range(part: DumpRange, options: ReadOptions, source: Source) -> Iterator[Document]:
    """The documents of some streams of a dump."""
    label = f"{part.path} (bytes {part.start} to {part.end})"
    reader = PageReader(label, max_page_bytes=options.max_page_bytes, names=part.names)

    def chunks() -> Iterator[bytes]:
        yield b"<mediawiki>"
        yield from decompress(part.path, part.start, part.end)
        if not part.last:
            yield b"</mediawiki>"

    for page in _until_damage(read_pages(chunks(), reader), source, options, reader):
        yield Document(part.source, page.id, page.title, page.text, part.names.hidden(), page.rejected)


def _file_chunks(source: Source, file: Path) -> Iterator[bytes]:
    with open(file, "rb") as content:
        while chunk := content.read(1 << 20):
            source.meter.num_bytes += len(chunk)
            yield chunk


def _unpacked_chunks(source: Source, file: Path, packed: str) -> Iterator[bytes]:
    if packed == ".bz2":
        yield from decompress(file, meter=source.meter)
        return
    import zlib

    size, before = file.stat().st_size, source.meter.num_bytes
    try:
        if packed == ".gz":
            yield from _gunzip(source, file, zlib.decompressobj)
        else:
            with open(file, "rb") as raw, pa.input_stream(raw, compression="zstd") as content:
                while chunk := content.read(1 << 20):
                    yield chunk
            source.meter.num_bytes = before + size
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"reading {file}: {error} - cut short or damaged - get the file again") from None


def _gunzip(source: Source, file: Path, new_decompressor: Any) -> Iterator[bytes]:
    """The content of a gzip file of one or many members; EOFError when the last one is cut."""
    decompressor = new_decompressor(wbits=31)
    started = False
    for piece in _file_chunks(source, file):
        data = piece
        while data:
            started = True
            if chunk := decompressor.decompress(data, 1 << 20):
                yield chunk
            data = decompressor.unconsumed_tail
            if decompressor.eof:
                data = decompressor.unused_data.lstrip(b"\0")
                decompressor = new_decompressor(wbits=31)
                started = bool(data)
    if started:
        raise EOFError("the compressed stream ends too early")


def _lines(source: Source, file: Path, packed: str) -> Iterator[tuple[str, int]]:
    """The lines of a text file with how many bytes or control characters in each were not text (replaced by U+FFFD)."""
    chunks = _unpacked_chunks(source, file, packed) if packed else _file_chunks(source, file)
    rest = b""
    encoding = ""
    for chunk in chunks:
        if not encoding:
            encoding = "utf-16" if chunk[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            if encoding == "utf-16":
                yield from _utf16_lines(chunk, chunks)
                return
            rest = chunk.removeprefix(b"\xef\xbb\xbf")
        else:
            rest += chunk
        *complete, rest = rest.split(b"\n")
        for line in complete:
            yield _decoded(line)
    if rest:
        yield _decoded(rest)


def _utf16_lines(first: bytes, chunks: Iterator[bytes]) -> Iterator[tuple[str, int]]:
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    import codecs

    utf16 = codecs.getincrementaldecoder("utf-16")("replace")
    rest = decoder.decode(utf16.decode(first))
    for chunk in chunks:
        *complete, rest = rest.split("\n")
        for line in complete:
            yield _without_controls(line)
        rest += decoder.decode(utf16.decode(chunk))
    for line in rest.split("\n"):
        yield _without_controls(line)


def _decoded(line: bytes) -> tuple[str, int]:
    try:
        text = line.decode()
        bad = 0
    except UnicodeDecodeError:
        text = line.decode(errors="replace")
        bad = text.count("\ufffd")
    cleaned, controls = _without_controls(text.rstrip("\r"))
    return cleaned, bad + controls


def _without_controls(text: str) -> tuple[str, int]:
    if CONTROL.search(text) is None:
        return text, 0
    return CONTROL.subn("\ufffd", text)


def _read_text(source: Source, file: Path, packed: str, options: ReadOptions) -> Iterator[Document]:
    """Documents of a .txt file or of WikiExtractor output, told by its first line."""
    lines = _lines(source, file, packed)
    first = next(lines, ("", 0))
    if DOC_TAG.match(first[0]):
        yield from _read_wikiextractor(source, file, first, lines)
        return

    def document(number: int, held: list[str], bad: int) -> Document:
        return Document(source.number, f"{file.name}:{number}", held[0][:80], "\n".join(held), replaced=bad)

    held: list[str] = []
    bad = start = 0
    number = 0
    for number, (line, replaced) in enumerate(_chain(first, lines), 1):
        blank = not line.strip()
        if blank and options.txt_documents == "blank-lines":
            if held:
                yield document(start, held, bad)
            held, bad = [], 0
        elif not blank:
            if not held:
                start = number
            held.append(line)
            bad += replaced
    if held:
        yield document(start, held, bad)


def _chain(first: tuple[str, int], rest: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    yield first
    yield from rest


def _read_wikiextractor(
    source: Source, file: Path, first: tuple[str, int], lines: Iterator[tuple[str, int]]
) -> Iterator[Document]:
    attributes: dict[str, str] | None = None
    held: list[str] = []
    bad = 0
    for number, (line, replaced) in enumerate(_chain(first, lines), 1):
        if (match := DOC_TAG.match(line)) and attributes is None:
            attributes, held, bad = dict(DOC_ATTRIBUTE.findall(match[1])), [], 0
        elif attributes is not None and line.strip() == "</doc>":
            title = attributes.get("title", "")
            if held and held[0].strip() == title:  # the extractor repeats the title as the first line
                held = held[1:]
            yield Document(
                source.number, attributes.get("id", f"{file.name}:{number}"), title, "\n".join(held), replaced=bad
            )
            attributes = None
        elif attributes is not None:
            held.append(line)
            bad += replaced
    if attributes is not None:
        raise DataError(
            f"reading {file}: document id ({attributes.get('id')}) has no </doc> - the file was cut short - "
            "run the extractor again for this file"
        )


def _json_rows(source: Source, file: Path, packed: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    for number, (line, replaced) in enumerate(_lines(source, file, packed), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"reading {file}: line {number} ({line[:40]!r}) - not JSON: {error} - write one object per line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"reading {file}: line {number} ({line[:40]!r}) - not a JSON object - write one per line")
        yield f"{file.name}:{number}", row, replaced


def _parquet_rows(source: Source, file: Path, options: ReadOptions) -> Iterator[tuple[str, dict[str, Any], int]]:
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if options.text_field not in names:
            raise _no_field(str(file), options.text_field, names)
        wanted = [name for name in ("id", "title", options.text_field) if name in names]
        number = 0
        for batch in parquet.iter_batches(batch_size=256, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}:{number}", row, 0
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"reading {file}: {_first_line(error)} - damaged or not parquet - get the file again") from None
    source.meter.num_bytes += file.stat().st_size


def _saved_dataset_rows(source: Source) -> Iterator[tuple[str, dict[str, Any], int]]:
    number = 0
    for file in source.files:
        try:
            for batch in pa.ipc.open_stream(mapped(file)):
                for start in range(0, batch.num_rows, 256):
                    for row in batch.slice(start, 256).to_pylist():
                        number += 1
                        yield f"row {number}", row, 0
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"reading {file}: {_first_line(error)} - damaged - save the dataset again") from None
        source.meter.num_bytes += file.stat().st_size


def _read_dataset_name(source: Source, options: ReadOptions) -> Iterator[Document]:
    import datasets

    name, _, rest = source.name.removeprefix("hf://").partition(":")
    config, _, split = rest.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises many kinds
        raise DataError(
            f"opening source {source.name}: no such file, and no such dataset: {_first_line(error)} - "
            "give a file, a folder, or NAME[:CONFIG[:SPLIT]] of a Hugging Face dataset"
        ) from None
    rows = ((f"row {number}", row, 0) for number, row in enumerate(stream, 1))
    yield from _read_rows(source, rows, options)


def _read_rows(
    source: Source,
    rows: Iterator[tuple[str, dict[str, Any], int]],
    options: ReadOptions,
    *,
    file: Path | None = None,
) -> Iterator[Document]:
    for position, row, replaced in rows:
        text = row.get(options.text_field)
        if not isinstance(text, str):
            raise _no_field(f"{file or source.name}, {position}", options.text_field, list(row))
        text, controls = _without_controls(text)
        identity = row.get("id")
        yield Document(
            source.number,
            str(identity) if identity is not None else position,
            str(row.get("title") or ""),
            text,
            replaced=replaced + controls,
        )


def _no_field(where: str, wanted: str, present: list[str]) -> DataError:
    return DataError(
        f"reading {where}: no text in field ({wanted}) - the fields are {', '.join(present)} - "
        "name the right one with --text-field"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def blend(streams: list[Iterator[Document]], weights: list[float]) -> Iterator[Document]:
    """Interleaves documents so that the characters taken from each stream keep the ratio of `weights` at every moment.

    The next document comes from the stream that is furthest behind its share. Ends with the first stream that ends: to
    go on without it would change the mix.
    """
    if len(streams) != len(weights) or min(weights) <= 0:
        raise ConfigError(
            f"blending: weights ({', '.join(map(str, weights))}) for {len(streams)} sources - one positive number per "
            "source is needed - give as many --weights as --source"
        )
    taken = [0.0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda k: (taken[k] / weights[k], k))
        document = next(streams[behind], None)
        if document is None:
            return
        taken[behind] += len(document.text) + 1
        yield document
