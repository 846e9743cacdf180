"""The border between text and training: the shard schema, the manifest, writing, opening, reading and verifying.

A shard folder holds

    data-00000-of-000NN.arrow    Arrow IPC *stream* files, read memory-mapped
    manifest.json                written last: without it the folder is not finished
    stats.json                   pages in = pages out + rejects by reason
    state.json, dataset_info.json    so that datasets.load_from_disk works
    tokenizer/                   the tokenizer of the rows

Rows (`manifest.rows`):

    bert-pairs   [CLS] A [SEP] B [SEP], padded.  input_ids, length (valid tokens), segment_boundary (first index of
                 segment B, or length when there is none), and is_next_true where the pairing makes it a question
    lm-blocks    documents, each closed by EOS, back to back.  input_ids, length
    text         one document per row.  id, title, text
"""

import json
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_prep.errors import DataError
from data_prep.files import content_hash, file_hash, read_json, replacing_file, write_json

SCHEMA_VERSION = 1
ROWS = ("bert-pairs", "lm-blocks", "text")
Rows = Literal["bert-pairs", "lm-blocks", "text"]
SHARD_NAME = re.compile(r"data-\d{5,}-of-\d{5,}\.arrow")


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest: `bytes` and `hash` (xxh3_128) are those of the whole file."""

    file: str
    rows: int
    tokens: int
    bytes: int
    hash: str


@dataclass(frozen=True)
class Manifest:
    """All that a reader needs to know before it opens a shard."""

    schema_version: int
    rows: str
    length: int  # tokens of a row; 0 for text
    num_rows: int
    num_tokens: int  # valid tokens, padding not counted
    tokenizer: dict[str, Any]  # name, hash, vocab_size, pad_id, cls_id, sep_id, bos_id, eos_id; {} for text
    sources: list[dict[str, Any]]
    shards: list[Shard]
    config: dict[str, Any] = field(default_factory=dict)
    documents: dict[str, Any] = field(default_factory=dict)  # pages in, out and rejected by reason
    utilisation: float = 1.0  # valid tokens / tokens of the rows

    @property
    def fingerprint(self) -> str:
        """A hash over everything above: two folders with the same fingerprint hold the same rows in the same order."""
        return content_hash(json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes manifest.json, which declares the folder finished: call it last."""
    write_json(folder / "manifest.json", {**asdict(manifest), "fingerprint": manifest.fingerprint})


def shard_name(index: int, count: int) -> str:
    """data-00003-of-00012.arrow"""
    return f"data-{index:05d}-of-{count:05d}.arrow"


def narrowest_unsigned(largest: int) -> np.dtype:
    """The smallest unsigned integer type that holds `largest`."""
    return np.min_scalar_type(largest)


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 for vocabularies up to 65,536 entries, uint32 above. (uint8 would not be worth a third case.)"""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def write_shard(path: Path, columns: Mapping[str, np.ndarray | Sequence[str]]) -> tuple[int, str]:
    """Writes one record batch of equally long columns as an Arrow stream; returns (bytes, hash) of the file.

    A 2-d array becomes a fixed-size list, a bool array is bit-packed, a sequence of str becomes a string column.
    """
    batch = pa.record_batch({name: _to_arrow(column) for name, column in columns.items()})
    with replacing_file(path) as file, pa.ipc.new_stream(pa.PythonFile(file, mode="w"), batch.schema) as stream:
        stream.write_batch(batch)
    return file.num_bytes, file.hexdigest()


def _to_arrow(column: np.ndarray | Sequence[str]) -> pa.Array:
    # From buffers: pa.array(ndarray) would import pandas, which costs more than a small shard.
    if not isinstance(column, np.ndarray):
        return pa.array(column, pa.string())
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(_to_arrow(column.reshape(-1)), column.shape[1])
    if column.dtype == bool:
        return pa.Array.from_buffers(
            pa.bool_(), len(column), [None, pa.py_buffer(np.packbits(column, bitorder="little"))]
        )
    column = np.ascontiguousarray(column)
    return pa.Array.from_buffers(pa.from_numpy_dtype(column.dtype), len(column), [None, pa.py_buffer(column)])


def folder_metadata(manifest: Manifest, schema: pa.Schema) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of state.json and dataset_info.json, as datasets.load_from_disk reads them."""
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file} for shard in manifest.shards],
        "_fingerprint": manifest.fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    features = {name: _feature(schema.field(name).type) for name in schema.names}
    info = {
        "citation": "",
        "description": f"{manifest.rows} rows made by capgap prepare; see manifest.json",
        "features": features,
        "homepage": "",
        "license": "",
        "splits": {"train": {"name": "train", "num_examples": manifest.num_rows}},
    }
    return state, info


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "List"}
    return {"dtype": {"bool": "bool", "string": "string"}.get(str(kind), str(kind)), "_type": "Value"}


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of the vocabulary (token -> id, in the order of ids): equal for tokenizers that give the same meaning to
    every id. Takes a tokenizer folder, or an object with get_vocab() (tokenizers, transformers)."""
    if isinstance(tokenizer, str | os.PathLike):
        vocabulary = folder_vocabulary(Path(tokenizer))
    else:
        vocabulary = tokenizer.get_vocab()
    entries = sorted((index, token) for token, index in vocabulary.items())
    return content_hash(json.dumps(entries, ensure_ascii=True, separators=(",", ":")).encode())


def folder_vocabulary(folder: Path) -> dict[str, int]:
    """token -> id of a folder: from tokenizer.json, else vocab.txt (BERT), else tokenizer.model (sentencepiece)."""
    try:
        if (folder / "tokenizer.json").is_file():
            import tokenizers

            return tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8")).get_vocab()
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
            return {token.rstrip("\r"): index for index, token in enumerate(lines) if token or index < len(lines) - 1}
        if (folder / "tokenizer.model").is_file():
            import sentencepiece

            model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            return {model.id_to_piece(index): index for index in range(len(model))}
    except DataError:
        raise
    except Exception as error:  # tokenizers and sentencepiece raise bare Exception and RuntimeError for a damaged file
        raise DataError(f"reading tokenizer {folder}: {error} - damaged file - copy the tokenizer again") from None
    raise DataError(
        f"reading tokenizer {folder}: no tokenizer.json, vocab.txt or tokenizer.model in it - "
        "give a folder made by save_pretrained"
    )


def open_shards(folder: str | os.PathLike, *, verify: bool = True) -> "ShardSet":
    """Opens a finished shard folder, checking names, sizes and counts of the manifest; nothing is mapped yet.

    With `verify`, each shard is hashed before its first row is read (about 1 ms per 10 MB), so that no damaged row is
    ever returned. DataError names the entry, what was expected, what was found, and the mend.
    """
    return ShardSet(Path(folder), verify=verify)


class ShardSet:
    """An opened shard folder: `manifest`, `num_rows`, and rows by global index."""

    def __init__(self, folder: Path, *, verify: bool = True):
        self.folder = folder
        self.manifest = read_manifest(folder)
        for shard in self.manifest.shards:
            self._check_entry(shard)
        self.num_rows = self.manifest.num_rows
        self._first_row = np.cumsum([0] + [shard.rows for shard in self.manifest.shards])
        self._columns: dict[int, dict[str, np.ndarray]] = {}
        self._verify = verify

    def __len__(self) -> int:
        return self.num_rows

    def locate(self, index: int) -> tuple[str, int]:
        """The shard file that holds global row `index`, and the row's number in it."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        number = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return self.manifest.shards[number].file, int(index - self._first_row[number])

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of the rows `indices` (int64, any order), one array per column, in the order asked for.

        bert-pairs: input_ids [n, length], length [n], segment_boundary [n].
        lm-blocks: input_ids [n, length], length [n], document_index [n, length] (0, 0, .., 1, 1, ..: restarts per row).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self.num_rows):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self.num_rows}")
        shard_numbers = np.searchsorted(self._first_row, indices, side="right") - 1
        rows = indices - self._first_row[shard_numbers]
        touched = np.unique(shard_numbers).tolist()
        if len(touched) == 1:
            gathered = {name: column[rows] for name, column in self.columns(touched[0]).items()}
        else:
            gathered = {
                name: np.empty((len(indices), *column.shape[1:]), column.dtype)
                for name, column in self.columns(touched[0] if touched else 0).items()
            }
            for number in touched:
                chosen = np.flatnonzero(shard_numbers == number)
                for name, column in self.columns(number).items():
                    gathered[name][chosen] = column[rows[chosen]]
        if self.manifest.rows == "lm-blocks":
            ends = gathered["input_ids"] == self.manifest.tokenizer["eos_id"]
            document_index = np.zeros(ends.shape, np.uint16)
            document_index[:, 1:] = np.cumsum(ends[:, :-1], axis=1)
            gathered["document_index"] = document_index
        return gathered

    def columns(self, number: int) -> dict[str, np.ndarray]:
        """The columns of shard `number` as views of the mapped file (strings: arrays of objects)."""
        if number not in self._columns:
            if self._verify:
                self.verify(number)
            shard = self.manifest.shards[number]
            try:
                table = pa.ipc.open_stream(mapped(self.folder / shard.file)).read_all()
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"opening shard {self.folder / shard.file}: {error} - {REMAKE}") from None
            if table.num_rows != shard.rows:
                raise DataError(
                    f"opening shard {self.folder / shard.file}: {table.num_rows} rows, expected {shard.rows} - {REMAKE}"
                )
            self._columns[number] = {
                name: _to_numpy(column) for name, column in zip(table.column_names, table.columns, strict=True)
            }
        return self._columns[number]

    def verify(self, number: int | None = None) -> None:
        """Compares the hash of shard `number` (None: of every shard) with the manifest; DataError when they differ."""
        for shard in self.manifest.shards if number is None else [self.manifest.shards[number]]:
            self._check_entry(shard)
            if (actual := file_hash(self.folder / shard.file)) != shard.hash:
                raise DataError(
                    f"verifying shard {self.folder / shard.file}: hash {actual}, expected {shard.hash} - "
                    f"the file was damaged after it was written - {REMAKE}"
                )

    def _check_entry(self, shard: Shard) -> None:
        path = self.folder / shard.file
        if not path.is_file():
            raise DataError(f"opening shard {path}: no such file, but the manifest lists it - {REMAKE}")
        if path.resolve().parent != self.folder.resolve():
            raise DataError(f"opening shard {path}: it is a link out of the folder ({path.resolve()}) - {REMAKE}")
        if (size := path.stat().st_size) != shard.bytes:
            raise DataError(
                f"opening shard {path}: {size} bytes, expected {shard.bytes} - cut or overwritten - {REMAKE}"
            )


REMAKE = "remove that file and manifest.json, then run the capgap prepare command of this folder again"


def mapped(path: Path) -> pa.Buffer:
    """A file as memory, read when touched; by Python's mmap: pyarrow's refuses names that the locale cannot spell."""
    with open(path, "rb") as file:
        return pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard folder; DataError when it is missing, not ours, of another version, or not consistent."""
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise DataError(f"opening shards {folder}: no such folder - make it with capgap prepare --out {folder}")
    if not path.exists():
        raise DataError(
            f"opening shards {folder}: no manifest.json - preparation is not finished - "
            "run the same capgap prepare command again (after array tasks: with --finish)"
        )
    values = read_json(path, "make the folder again with capgap prepare")
    try:
        if values["schema_version"] != SCHEMA_VERSION:
            raise DataError(
                f"opening shards {path}: schema_version ({values['schema_version']}) - this capgap reads "
                f"{SCHEMA_VERSION} - make the folder again with capgap prepare"
            )
        fingerprint = values.pop("fingerprint")
        shards = [Shard(**entry) for entry in values.pop("shards")]
        manifest = Manifest(shards=shards, **values)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"opening shards {path}: unexpected content ({error}) - make the folder again") from None
    _check_manifest(manifest, path)
    if fingerprint != manifest.fingerprint:
        raise DataError(
            f"opening shards {path}: fingerprint ({fingerprint}) - the content gives {manifest.fingerprint}: it was "
            "changed by hand or damaged - make the folder again"
        )
    return manifest


def _check_manifest(manifest: Manifest, path: Path) -> None:
    mend = "make the folder again"
    if manifest.rows not in ROWS:
        raise DataError(f"opening shards {path}: rows ({manifest.rows!r}) - not one of {', '.join(ROWS)} - {mend}")
    seen: set[str] = set()
    for shard in manifest.shards:
        if not isinstance(shard.file, str) or not SHARD_NAME.fullmatch(shard.file):
            raise DataError(
                f"opening shards {path}: shard name ({shard.file!r}) - only data-00000-of-00001.arrow beside the "
                "manifest is allowed - {mend}"
            )
        if shard.file in seen:
            raise DataError(f"opening shards {path}: shard ({shard.file}) - listed twice - {mend}")
        if not all(isinstance(n, int) and n >= 0 for n in (shard.rows, shard.tokens, shard.bytes)):
            raise DataError(f"opening shards {path}: counts of ({shard.file}) - not whole numbers - {mend}")
        seen.add(shard.file)
    if (rows := sum(shard.rows for shard in manifest.shards)) != manifest.num_rows:
        raise DataError(f"opening shards {path}: num_rows ({manifest.num_rows}) - the shards add up to {rows} - {mend}")


def _to_numpy(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=True).reshape(len(array), array.type.list_size)
    if pa.types.is_boolean(array.type) or pa.types.is_string(array.type):
        return array.to_numpy(zero_copy_only=False)
    return array.to_numpy(zero_copy_only=True)
