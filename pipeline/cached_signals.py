"""What a teacher said about shards, kept beside them: the folder that `capgap cache` writes and the trainer reads.

    signals-00000-of-000NN.arrow    some hundred rows of the shards, in their order, as an Arrow IPC stream
    signals-00000-of-000NN.json     its rows, bytes, hash and what it was made from: written when the file is complete
    manifest.json                   written last: teacher, shards, settings, and every file

Columns, T tokens of a row and K ids per token, as fixed-size lists:

    topk      ids [T*K], values [T*K] log-probabilities, rest [T] log of the mass of all other ids
    sampled   ids [T*K] drawn from the teacher (each weighs 1/K), rest [T] the teacher's entropy

Ids take the narrowest integer of the vocabulary; log-probabilities and entropies are 16-bit fixed point: minus the
value times 2048, so down to -32 with steps of 0.0005. A token takes 4 K + 2 bytes (topk) or 2 K + 2 (sampled) for
vocabularies up to 65,536 ids.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data_prep.errors import ConfigError, DataError
from data_prep.files import content_hash, file_hash, read_json, write_json
from data_prep.model_folders import check_weights
from data_prep.shards import ShardSet, id_dtype

SCHEMA_VERSION = 1
STEPS_PER_NAT = 2048
Signal = Literal["topk", "sampled"]
REMAKE = "remove that file, then run the capgap cache command of this folder again"


@dataclass(frozen=True)
class CacheManifest:
    """All that a reader needs to know before it opens a file."""

    schema_version: int
    signal: str
    k: int
    temperature: float
    num_ids: int
    length: int
    num_rows: int
    teacher: dict[str, Any]  # name, hash of its weights, precision it ran in
    tokenizer_hash: str
    shards_fingerprint: str
    bytes_per_token: float
    measured: dict[str, float] = field(default_factory=dict)  # tail_mass (topk), entropy (sampled): means over tokens
    files: list[dict[str, Any]] = field(default_factory=list)  # file, rows, rows_per_batch, bytes, hash


def pack_nats(values: np.ndarray) -> np.ndarray:
    """Magnitudes of log-probabilities or entropies as 16-bit fixed point; what is beyond 32 becomes 32."""
    return np.rint(np.minimum(np.abs(values) * STEPS_PER_NAT, 65535)).astype(np.uint16)


def bytes_per_token(signal: str, k: int, num_ids: int) -> int:
    """Bytes that a token takes on disk."""
    return k * id_dtype(num_ids).itemsize + (2 * k if signal == "topk" else 0) + 2


def signals_name(index: int, count: int) -> str:
    return f"signals-{index:05d}-of-{count:05d}.arrow"


def teacher_hash(folder: Path) -> str:
    """A hash of the content of config.json and all weights."""
    return content_hash("".join(file_hash(path) for path in [folder / "config.json", *check_weights(folder)]).encode())


class CachedSignals:
    """An opened cache: the packed columns of shard rows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_cache_manifest(folder)
        self._first_row = np.cumsum([0] + [entry["rows"] for entry in self.manifest.files])
        self._batches: dict[int, list[dict[str, np.ndarray]]] = {}

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Packed columns of the shard rows `indices`: ids [n, T, K], values [n, T, K] (topk), rest [n, T]."""
        parts: dict[str, list[np.ndarray]] = {}
        for index in np.asarray(indices, np.int64):
            number = int(np.searchsorted(self._first_row, index, side="right")) - 1
            row, per_batch = int(index - self._first_row[number]), self.manifest.files[number]["rows_per_batch"]
            for name, column in self._open(number)[row // per_batch].items():
                parts.setdefault(name, []).append(column[row % per_batch])
        shape = (len(indices), self.manifest.length)
        return {name: np.stack(rows).reshape(*shape, *([] if name == "rest" else [-1])) for name, rows in parts.items()}

    def _open(self, number: int) -> list[dict[str, np.ndarray]]:
        if number not in self._batches:
            entry = self.manifest.files[number]
            path = self.folder / entry["file"]
            if not path.is_file() or path.stat().st_size != entry["bytes"] or file_hash(path) != entry["hash"]:
                raise DataError(f"opening teacher signals {path}: missing or damaged - {REMAKE}")
            with pa.ipc.open_stream(pa.memory_map(str(path))) as stream:
                self._batches[number] = [
                    {
                        name: column.values.to_numpy().reshape(len(batch), -1)
                        for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    }
                    for batch in stream
                ]
        return self._batches[number]


def read_cache_manifest(folder: Path) -> CacheManifest:
    """The manifest of a cache folder; DataError when it is missing or not ours."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"opening teacher cache {folder}: no manifest.json - not finished - run its capgap cache command again"
        )
    values = read_json(path, "make the cache again with capgap cache")
    fingerprint = values.pop("fingerprint", None)
    try:
        manifest = CacheManifest(**values)
    except TypeError as error:
        raise DataError(f"opening teacher cache {path}: unexpected content ({error}) - make it again") from None
    if manifest.schema_version != SCHEMA_VERSION or fingerprint != cache_fingerprint(manifest):
        raise DataError(f"opening teacher cache {path}: damaged, or of another version - make it again")
    return manifest


def cache_fingerprint(manifest: CacheManifest) -> str:
    return content_hash(repr(sorted(asdict(manifest).items())).encode())


def write_cache_manifest(folder: Path, manifest: CacheManifest) -> None:
    """Writes manifest.json, which declares the cache finished."""
    write_json(folder / "manifest.json", {**asdict(manifest), "fingerprint": cache_fingerprint(manifest)})


def check_cache(
    folder: Path, shards: ShardSet, *, temperature: float, divergences: list[str], teacher_folder: Path | None
) -> CacheManifest:
    """The manifest of a cache that fits the run; otherwise an error that names both sides."""
    manifest = read_cache_manifest(folder)
    if manifest.shards_fingerprint != shards.manifest.fingerprint:
        raise DataError(
            f"teacher.cache: {folder} was made from other shards ({manifest.shards_fingerprint}) than {shards.folder} "
            f"({shards.manifest.fingerprint}) - its rows would be those of other text - make it again from these"
        )
    if manifest.temperature != temperature:
        raise ConfigError(
            f"teacher.cache: {folder} was made at temperature {manifest.temperature}, loss.temperature is "
            f"{temperature} - what is cached cannot be tempered afterwards - set one to the other"
        )
    if manifest.signal == "sampled" and any(name != "logit_kl" for name in divergences):
        raise ConfigError(
            f"teacher.cache: {folder} holds sampled ids, from which only loss.logit_kl can be estimated - "
            f"use it instead of loss.{divergences[0]}, or cache topk"
        )
    if teacher_folder is not None and (found := teacher_hash(teacher_folder)) != manifest.teacher["hash"]:
        raise DataError(
            f"teacher.cache: {folder} was made with {manifest.teacher['name']} ({manifest.teacher['hash']}), "
            f"teacher.model {teacher_folder} has other weights ({found}) - name the same, or set teacher.model null"
        )
    return manifest
