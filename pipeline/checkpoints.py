"""The envelope around DeepSpeed's files: complete or absent, hashed, and enough to go on bit for bit.

    RUN/checkpoints/step-00000500/
        engine/           DeepSpeed's own files: weights, optimizer and master copies, one part per rank
        rank-00000.json   random state and running sums of each rank
        checkpoint.json   position, world size, ZeRO stage, precision, fingerprints, and the hash of every file above

It is written as `step-00000500.partial`, renamed when every file is on disk, and `checkpoint.json` comes last. A folder
without it, or with a file that does not match it, is never loaded.
"""

import base64
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import CheckpointError, DataError
from data_prep.files import file_hash, make_folder, read_json, remove_folder, rename, require_free_space, write_json
from pipeline.parallel import Ranks

RECORD = "checkpoint.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Position:
    """How far a run is: everything else about the data follows from it."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Valid tokens seen by the student."""


@dataclass(frozen=True)
class Topology:
    """What the optimizer's parts were cut for. A direct load into another cut would be silently wrong."""

    world_size: int
    zero_stage: int
    precision: str
    deepspeed: str


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    root: Path,
    engine: Any,
    ranks: Ranks,
    *,
    position: Position,
    topology: Topology,
    rank_state: dict[str, Any],
    fingerprints: dict[str, str],
) -> Path:
    """Writes the checkpoint of `position`; all ranks call it together. Returns the complete folder."""
    final = root / checkpoint_name(position.step)
    partial = final.with_name(final.name + PARTIAL)
    _on_first_rank(ranks, lambda: _make_room(root, partial))
    _on_every_rank(ranks, lambda: engine.save_checkpoint(str(partial), tag="engine", save_latest=False), partial)
    _on_every_rank(
        ranks,
        lambda: write_json(partial / f"rank-{ranks.rank:05d}.json", {"random": _random_state(), **rank_state}),
        partial,
    )
    ranks.barrier()
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    mine = files[ranks.rank :: ranks.world_size]
    hashes: dict[str, str] = {}
    for part in ranks.gather(
        _on_every_rank(ranks, lambda: {_relative(f, partial): _sync_and_hash(f) for f in mine}, partial)
    ):
        hashes |= part
    record = {
        "position": asdict(position),
        "topology": asdict(topology),
        "fingerprints": fingerprints,
        "files": dict(sorted(hashes.items())),
    }

    def complete() -> None:
        write_json(partial / RECORD, record)
        if final.exists():
            remove_folder(final)
        rename(partial, final)

    _on_first_rank(ranks, complete)
    return final


def keep_last(root: Path, count: int) -> None:
    """Removes all but the newest `count` complete checkpoints, and unfinished ones older than the newest."""
    complete = sorted(path for path in root.glob("step-*") if (path / RECORD).is_file() and path.suffix != PARTIAL)
    for path in complete[:-count]:
        remove_folder(path)
    for path in root.glob(f"step-*{PARTIAL}"):
        if complete and path.name < complete[-1].name:
            remove_folder(path)


def newest_valid(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files match its record, and the record; None when there is no checkpoint at all.

    Damaged ones are named on stderr and passed over. Raises CheckpointError when there are some and none is whole:
    starting over without a word would throw the run away.
    """
    if not root.is_dir():
        return None
    found = sorted((p for p in root.glob("step-*") if p.suffix != PARTIAL), reverse=True)
    for partial in root.glob(f"step-*{PARTIAL}"):
        print(f"checkpoint {partial.name}: was never completed, ignored", file=sys.stderr)
    for path in found:
        try:
            return path, verified_record(path)
        except CheckpointError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    if found:
        raise CheckpointError(
            f"no usable checkpoint in {root}: all {len(found)} are damaged - "
            "restore one from a copy, or choose another folder with --out to start again"
        )
    return None


def verified_record(path: Path) -> dict[str, Any]:
    """checkpoint.json of a folder whose files all match it. CheckpointError names the first file that does not."""
    mend = "the checkpoint is incomplete"
    try:
        record = read_json(path / RECORD, mend)
        files = record["files"]
        assert isinstance(files, dict) and files
        Position(**record["position"])
        Topology(**record["topology"])
    except (DataError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"checkpoint {path.name}: {RECORD} is missing or damaged ({error})") from error
    here = path.resolve()
    for name, expected in files.items():
        file = (path / name).resolve()
        if here not in file.parents:
            raise CheckpointError(f"checkpoint {path.name}: file {name} lies outside the folder")
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path.name}: file {name} is missing")
        if (actual := file_hash(file)) != expected:
            raise CheckpointError(f"checkpoint {path.name}: file {name} has hash {actual}, expected {expected}")
    return record


def load(path: Path, record: dict[str, Any], engine: Any, ranks: Ranks, topology: Topology) -> tuple[Position, dict]:
    """Fills the engine from a verified checkpoint; returns its position and this rank's saved state.

    Raises CheckpointError when the optimizer's parts were cut for another topology.
    """
    saved = Topology(**record["topology"])
    for name in ("world_size", "zero_stage", "precision"):
        before, now = getattr(saved, name), getattr(topology, name)
        if before != now:
            raise CheckpointError(
                f"checkpoint {path}: was written with {name} {before}, this run has {now} - the optimizer's parts "
                f"do not fit - resume with {name} {before}, or start a new folder with --out"
            )
    loaded, _ = engine.load_checkpoint(str(path), tag="engine", load_module_strict=True)
    if loaded is None:
        raise CheckpointError(f"checkpoint {path}: DeepSpeed did not load it - its files do not fit this run")
    state = read_json(path / f"rank-{ranks.rank:05d}.json", "restore the file from a copy")
    _restore_random_state(state["random"])
    return Position(**record["position"]), state


def _make_room(root: Path, partial: Path) -> None:
    make_folder(root)
    if partial.exists():
        remove_folder(partial)
    complete = sorted(path for path in root.glob("step-*") if (path / RECORD).is_file())
    if complete:
        size = sum(file.stat().st_size for file in complete[-1].rglob("*") if file.is_file())
        require_free_space(root, size)
    make_folder(partial)


def _on_first_rank(ranks: Ranks, action: Any) -> None:
    """Runs the action on rank 0; what it raises is raised on every rank, so that none waits for the others."""
    failure: str | None = None
    if ranks.rank == 0:
        try:
            action()
        except (OSError, DataError) as error:
            failure = str(error)
    failure = ranks.gather(failure)[0]
    if failure is not None:
        raise CheckpointError(f"writing a checkpoint: {failure}")


def _on_every_rank(ranks: Ranks, action: Any, partial: Path) -> Any:
    """Runs the action on every rank; if it fails on one, all raise together and the partial folder goes."""
    failure, result = None, None
    try:
        result = action()
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError, DataError) as error:
        failure = (str(error).splitlines() or [type(error).__name__])[0]
    failures = [f"rank {rank}: {text}" for rank, text in enumerate(ranks.gather(failure)) if text is not None]
    if failures:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        free = shutil.disk_usage(partial.parent).free
        raise CheckpointError(
            f"writing {partial}: {failures[0]} ({free} bytes free) - earlier checkpoints are kept - "
            "free space and run the same command again"
        )
    return result


def _relative(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _sync_and_hash(file: Path) -> str:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return file_hash(file)


def _random_state() -> dict[str, str]:
    state = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if torch.cuda.is_available():
        state["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return state


def _restore_random_state(state: dict[str, str]) -> None:
    def decoded(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(decoded(state["cpu"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(decoded(state["cuda"]))
