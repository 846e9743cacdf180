"""`capgap cache`: runs a teacher over shards once and stores its next-token distributions for later students."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from data_prep.errors import ConfigError, DataError, reports_errors
from data_prep.files import file_hash, make_folder, read_json, replacing_file, require_free_space, write_json
from data_prep.locks import folder_lock
from data_prep.model_folders import find_model_folder, read_model_config
from data_prep.progress import Progress
from data_prep.shards import ShardSet, id_dtype, open_shards
from pipeline.cached_signals import (
    SCHEMA_VERSION,
    CacheManifest,
    Signal,
    bytes_per_token,
    pack_nats,
    signals_name,
    teacher_hash,
    write_cache_manifest,
)
from pipeline.preflight import check_head, check_vocabulary

REPORTED_K = (8, 16, 32, 64, 128, 256)
LOGIT_BYTES = 64 * 2**20  # float32 logits that are alive at a time
FILE_BYTES = 256 * 10**6


@dataclass(frozen=True)
class CacheConfig:
    """Stores what a teacher says about every token of lm-blocks shards."""

    teacher: str
    """Causal LM: folder or hub name."""
    shards: Path
    """lm-blocks shards."""
    out: Path
    """Folder of the cache. The same command goes on in it where an earlier one was stopped."""
    signal: Signal = "topk"
    """topk: the k most probable ids, and the mass of all others. sampled: k draws, unbiased (arXiv 2503.16870)."""
    k: int = 64
    """Ids per token."""
    temperature: float = 1.0
    """Temperature of the teacher; a run that reads the cache must have the same loss.temperature."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the teacher."""
    batch_rows: int = 8
    """Rows that go through the teacher together."""
    rows_per_file: int | None = None
    """Rows of one file, which is what a kill costs and what an array job deals out; default: about 256 MB of them."""
    seed: int = 0
    """Seed of the draws."""
    task_index: int | None = None
    """This task of an array job; default: SLURM_ARRAY_TASK_ID when --num-tasks is above 1."""
    num_tasks: int = 1
    """Tasks of the array job: file i belongs to task i modulo this. The last to finish writes the manifest."""
    dry_run: bool = False
    """Only report bytes and bias on the first rows."""

    def __post_init__(self) -> None:
        for name in ("k", "batch_rows", "rows_per_file", "num_tasks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} ({getattr(self, name)}) must be at least 1")
        if not self.temperature > 0:
            raise ConfigError(f"--temperature ({self.temperature}) must be more than 0")
        if self.task_index is not None and not 0 <= self.task_index < self.num_tasks:
            raise ConfigError(f"--task-index ({self.task_index}) must be 0 to {self.num_tasks - 1}")


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Prints the report, then writes what is missing of this task's files."""
    cache(tyro.cli(CacheConfig, args=argv, prog="capgap cache"))
    return 0


def cache(config: CacheConfig) -> None:
    """Runs the teacher over the rows of one task."""
    shards = open_shards(config.shards)
    if shards.manifest.rows != "lm-blocks":
        raise DataError(f"--shards: {config.shards} holds {shards.manifest.rows} - prepare it with --rows lm-blocks")
    folder = find_model_folder(config.teacher)
    check_vocabulary(shards, folder)
    check_head(shards, read_model_config(folder), f"--teacher {config.teacher}")
    num_ids = shards.manifest.tokenizer["vocab_size"]
    if config.signal == "topk" and config.k > num_ids:
        raise ConfigError(f"--k ({config.k}) is more than the vocabulary has ({num_ids}) - lower it")
    made_from = {
        "teacher": teacher_hash(folder),
        "shards": shards.manifest.fingerprint,
        **{name: getattr(config, name) for name in ("signal", "k", "temperature", "precision", "batch_rows", "seed")},
    }
    files = cut_into_files(config, shards, num_ids)
    count = len(files)
    made_from["rows_per_file"] = len(files[0])
    task = task_of(config)
    mine = range(task, count, config.num_tasks)
    make_folder(config.out)
    with folder_lock(config.out, "writer" if config.num_tasks == 1 else f"task-{task}-of-{config.num_tasks}"):
        missing = [index for index in mine if finished(config.out, index, count, made_from) is None]
        if missing or config.dry_run:
            teacher = TeacherRunner(folder, config, num_ids)
            report(config, shards, teacher)
            if config.dry_run:
                return
            rows = sum(len(files[index]) for index in missing)
            size = rows * shards.manifest.length * bytes_per_token(config.signal, config.k, num_ids)
            require_free_space(config.out, size)
            with Progress("cache", rows, unit="rows") as progress:
                for index in missing:
                    path = config.out / signals_name(index, count)
                    write_signals(path, shards, teacher, files[index], made_from, progress)
        finish(config, shards, count, made_from, num_ids)


def cut_into_files(config: CacheConfig, shards: ShardSet, num_ids: int) -> list[range]:
    """The rows of each file: whole batches, so that the draws do not depend on where files end."""
    per_row = shards.manifest.length * bytes_per_token(config.signal, config.k, num_ids)
    batches = (config.rows_per_file or FILE_BYTES // per_row) // config.batch_rows
    rows = max(1, batches) * config.batch_rows
    return [range(first, min(first + rows, len(shards))) for first in range(0, len(shards), rows)]


def task_of(config: CacheConfig) -> int:
    if config.num_tasks == 1:
        return 0
    if config.task_index is not None:
        return config.task_index
    slurm = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not slurm.isdigit() or not int(slurm) < config.num_tasks:
        raise ConfigError(
            f"--num-tasks ({config.num_tasks}) without --task-index, and SLURM_ARRAY_TASK_ID is ({slurm or 'not set'}) "
            f"- give --task-index 0 to {config.num_tasks - 1}"
        )
    return int(slurm)


def finished(out: Path, index: int, count: int, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a complete file, or None; ConfigError when it was made by another command."""
    path = out / signals_name(index, count)
    record_path = path.with_suffix(".json")
    if not record_path.exists():
        return None
    record = read_json(record_path, f"remove {record_path}")
    if record["made_from"] != made_from:
        differing = [name for name in made_from if record["made_from"].get(name) != made_from[name]]
        raise ConfigError(f"--out: {out} was begun with another {', '.join(differing)} - choose another --out")
    entry = record["entry"]
    is_whole = path.is_file() and path.stat().st_size == entry["bytes"] and file_hash(path) == entry["hash"]
    return record if is_whole else None


class TeacherRunner:
    """A frozen teacher that gives the packed columns of rows."""

    def __init__(self, folder: Path, config: CacheConfig, num_ids: int):
        import torch
        import transformers

        from pipeline.config import TeacherConfig
        from pipeline.models.decoders import load_causal_teacher

        transformers.utils.logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.teacher = load_causal_teacher(folder, TeacherConfig(model=config.teacher), dtype=dtype, device=self.device)
        self.config, self.num_ids = config, num_ids

    def log_probs(self, columns: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Log-probabilities [n, ids] of a few tokens at a time, float32, and which of them losses count [n]."""
        import torch

        from pipeline.batches import decoder_batch, to_device

        batch = to_device(decoder_batch(columns), self.device)
        said = self.teacher(batch).next_token
        num_tokens = max(1, LOGIT_BYTES // (4 * self.num_ids))
        with torch.inference_mode():
            for start in range(0, len(said.hidden_ND), num_tokens):
                logits = said.hidden_ND[start : start + num_tokens] @ said.head_VD[: self.num_ids].T
                if said.bias_V is not None:
                    logits = logits + said.bias_V[: self.num_ids]
                valid = batch.valid_BT.flatten()[start : start + num_tokens]
                yield (logits.float() / self.config.temperature).log_softmax(-1), valid

    def signals(self, columns: dict[str, Any], first_row: int) -> tuple[dict[str, Any], float, int]:
        """Packed columns of the rows, the summed tail mass or entropy of the tokens that count, and their number."""
        import numpy as np
        import torch

        config, parts, total, count = self.config, [], 0.0, 0
        generator = torch.Generator(self.device).manual_seed(config.seed * 1_000_003 + first_row)
        for log_p, valid in self.log_probs(columns):
            if config.signal == "topk":
                values, ids = log_p.topk(config.k, dim=-1)
                # The mass of the others summed up, not what the kept leave of 1: that is lost in rounding.
                rest = log_p.scatter(1, ids, -torch.inf).logsumexp(-1).clamp_min(-31.9)
                measure = rest.exp()
            else:
                ids = torch.multinomial(log_p.exp(), config.k, replacement=True, generator=generator)
                values, rest = None, -(log_p.exp() * log_p).sum(-1)
                measure = rest
            total, count = total + float(measure[valid].double().sum()), count + int(valid.sum())
            parts.append((ids.cpu().numpy(), None if values is None else values.cpu().numpy(), rest.cpu().numpy()))
        num_rows = len(columns["input_ids"])
        packed = {"ids": np.concatenate([ids for ids, _, _ in parts]).astype(id_dtype(self.num_ids))}
        if config.signal == "topk":
            packed["values"] = pack_nats(np.concatenate([values for _, values, _ in parts]))
        packed["rest"] = pack_nats(np.concatenate([rest for _, _, rest in parts]))
        return {name: column.reshape(num_rows, -1) for name, column in packed.items()}, total, count


def report(config: CacheConfig, shards: ShardSet, teacher: TeacherRunner) -> None:
    """Prints what the cache will take and what it will lose, measured on the first rows."""
    import numpy as np

    columns = shards.read(np.arange(min(config.batch_rows, len(shards))))
    num_tokens = len(shards) * shards.manifest.length
    masses: dict[int, float] = dict.fromkeys([k for k in {*REPORTED_K, config.k} if k <= teacher.num_ids], 0.0)
    entropy, count = 0.0, 0
    for log_p, valid in teacher.log_probs(columns):
        sorted_p = log_p[valid].exp().sort(-1, descending=True).values
        for k in masses:
            masses[k] += float(sorted_p[:, k:].sum())
        entropy -= float((log_p[valid].exp() * log_p[valid]).sum())
        count += int(valid.sum())
    count = max(1, count)
    chosen = bytes_per_token(config.signal, config.k, teacher.num_ids)
    print(f"cache: {config.signal}, k={config.k}: {chosen} bytes per token, {spoken(chosen * num_tokens)} in all")
    if config.signal == "topk":
        for k, mass in sorted(masses.items()):
            size = bytes_per_token("topk", k, teacher.num_ids)
            print(f"  k={k}: {spoken(size * num_tokens)}, tail mass {100 * mass / count:.2f} % (of {count} tokens)")
    else:
        print(f"  unbiased; entropy {entropy / count:.2f} nats per token, which {config.k} draws estimate")


def spoken(num_bytes: float) -> str:
    """1.9 TB"""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def write_signals(
    path: Path, shards: ShardSet, teacher: TeacherRunner, rows: range, made_from: dict[str, Any], progress: Progress
) -> None:
    """Writes the file of these rows, batch by batch, and then its record."""
    import numpy as np
    import pyarrow as pa

    batch_rows, total, count = teacher.config.batch_rows, 0.0, 0
    with replacing_file(path) as file:
        stream = None
        for start in range(rows.start, rows.stop, batch_rows):
            stop = min(start + batch_rows, rows.stop)
            packed, measured, counted = teacher.signals(shards.read(np.arange(start, stop)), start)
            total, count = total + measured, count + counted
            columns = {
                name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
                for name, values in packed.items()
            }
            batch = pa.record_batch(columns)
            if stream is None:
                stream = pa.ipc.new_stream(pa.PythonFile(file, mode="w"), batch.schema)
            stream.write_batch(batch)
            progress.advance(stop - start)
        assert stream is not None
        stream.close()
    entry = {"file": path.name, "rows": len(rows), "rows_per_batch": batch_rows, "bytes": file.num_bytes}
    record = {"made_from": made_from, "entry": {**entry, "hash": file.hexdigest()}, "total": total, "tokens": count}
    write_json(path.with_suffix(".json"), record)


def finish(config: CacheConfig, shards: ShardSet, count: int, made_from: dict[str, Any], num_ids: int) -> None:
    """Writes the manifest when the files of all tasks are there."""
    records = [finished(config.out, index, count, made_from) for index in range(count)]
    whole = [record for record in records if record is not None]
    if len(whole) < count:
        print(f"{config.out}: {count - len(whole)} of {count} files are left to other tasks")
        return
    measure = sum(record["total"] for record in whole) / max(1, sum(record["tokens"] for record in whole))
    stored = sum(record["entry"]["bytes"] for record in whole) / (len(shards) * shards.manifest.length)
    manifest = CacheManifest(
        schema_version=SCHEMA_VERSION,
        signal=config.signal,
        k=config.k,
        temperature=config.temperature,
        num_ids=num_ids,
        length=shards.manifest.length,
        num_rows=len(shards),
        teacher={"name": config.teacher, "hash": made_from["teacher"], "precision": config.precision},
        tokenizer_hash=shards.manifest.tokenizer["hash"],
        shards_fingerprint=shards.manifest.fingerprint,
        bytes_per_token=stored,
        measured={"tail_mass" if config.signal == "topk" else "entropy": measure},
        files=[record["entry"] for record in whole],
    )
    write_cache_manifest(config.out, manifest)
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in manifest.measured.items())
    print(f"{config.out}: {len(shards)} rows, {stored:.1f} bytes per token, {shown}")


if __name__ == "__main__":
    import sys

    sys.exit(main())
