"""Checkpoints: complete or absent, hashed, and enough to go on bit for bit, or on another number of ranks.

    RUN/checkpoints/step-00000500/
        state-00000.safetensors   what rank 0 holds of weights and Adam's moments, as pieces of whole tensors
        rank-00000.json           random state and running sums of each rank
        checkpoint.json           position, how the work was cut, fingerprints, and the hash of every file above

It is written as `step-00000500.partial`, renamed when every file is on disk, and `checkpoint.json` comes last. A folder
without it, or with a file that does not match it, is never loaded.

DeepSpeed's own checkpoint files are not used: they are pickles, they fit only the cut that wrote them, and at another
expert-parallel size they load without a word into the wrong optimizer state.
"""

import base64
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import CheckpointError, DataError
from data_prep.files import (
    content_hash,
    file_hash,
    make_folder,
    read_json,
    remove_folder,
    rename,
    replacing_folder,
    require_free_space,
    stored_hash,
    write_bytes,
    write_json,
)
from pipeline.parallel import Ranks
from pipeline.state_files import fill_pieces, read_weights, whole_pieces, write_pieces
from pipeline.state_pieces import finish_filling, held_pieces, updates_taken, whole_shapes

RECORD = "checkpoint.json"
PARTIAL = ".partial"
FORMAT = 2


@dataclass(frozen=True)
class Position:
    """How far a run is: everything else about the data follows from it."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Valid tokens seen by the student."""


@dataclass(frozen=True)
class Topology:
    """How the work was cut when the checkpoint was written."""

    world_size: int
    zero_stage: int
    precision: str
    expert_parallel_size: int


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
    """Writes the checkpoint of `position` and reads it back from disk; all ranks call it together.

    Returns the complete folder. Raises CheckpointError when a file cannot be written or reads back as something else;
    what was complete before is kept.
    """
    final = root / checkpoint_name(position.step)
    partial = final.with_name(final.name + PARTIAL)
    _on_first_rank(ranks, lambda: _make_room(root, partial))

    def write() -> dict[str, str]:
        state, rank = f"state-{ranks.rank:05d}.safetensors", f"rank-{ranks.rank:05d}.json"
        return {
            state: write_pieces(partial / state, held_pieces(engine)),
            rank: write_json(partial / rank, {"random": _random_state(), **rank_state}),
        }

    written = ranks.gather(_on_every_rank(ranks, write, partial))
    # Each rank reads back what its neighbour wrote: on another node, if there are several.
    _on_every_rank(ranks, lambda: _read_back(partial, written[(ranks.rank + 1) % ranks.world_size]), partial)
    hashes = {name: digest for part in written for name, digest in part.items()}
    record = {
        "format": FORMAT,
        "position": asdict(position),
        "topology": asdict(topology),
        "updates": updates_taken(engine),
        "fingerprints": fingerprints,
        "files": dict(sorted(hashes.items())),
    }

    def complete() -> None:
        write_json(partial / RECORD, record | {"hash": _record_hash(record)})
        if final.exists():
            remove_folder(final)
        rename(partial, final)

    _on_first_rank(ranks, complete)
    return final


def keep_last(newest: Path, count: int, *, spare: Path | None = None) -> None:
    """Removes all but the last `count` checkpoints up to `newest` (`spare` too is kept), and unfinished ones before it.

    Those after it are damaged: the run went back behind them. They do not count, and stay for whoever wants to look.
    """
    root = newest.parent
    complete = sorted(path for path in root.glob("step-*") if (path / RECORD).is_file() and path.suffix != PARTIAL)
    complete = [path for path in complete if path.name <= newest.name]
    for path in complete[:-count]:
        if path != spare:
            remove_folder(path)
    for path in root.glob(f"step-*{PARTIAL}"):
        if complete and path.name < complete[-1].name:
            remove_folder(path)


def newest_valid(root: Path, copies: Path | None = None) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose files match its record, and the record; None when there is no checkpoint at all.

    A second place with copies is searched too; of the same step its own folder comes first. Damaged ones are named on
    stderr and passed over. Raises CheckpointError when there are some and none is whole: starting over without a word
    would throw the run away.
    """
    folders = [folder for folder in (root, copies) if folder is not None and folder.is_dir()]
    found = [path for folder in folders for path in folder.glob("step-*") if path.suffix != PARTIAL]
    found.sort(key=lambda path: (path.name, path.parent == root), reverse=True)
    for partial in (path for folder in folders for path in folder.glob(f"step-*{PARTIAL}")):
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
        if record["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {path.name}: has format {record['format']}, this version of capgap reads {FORMAT} - "
                "resume with the version that wrote it"
            )
        Position(**record["position"])
        Topology(**record["topology"])
        assert record["hash"] == _record_hash(record), "it was changed"
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


def load(
    path: Path, record: dict[str, Any], engine: Any, ranks: Ranks, topology: Topology, *, seed: int
) -> tuple[Position, list[dict[str, Any]]]:
    """Fills the engine from a verified checkpoint; returns its position and the saved state of every rank of then.

    Weights and moments fit any number of ranks, ZeRO stage, offload and expert-parallel size. On the same number of
    ranks the random state goes on where it was; on another it is drawn anew from (seed, step, rank).

    Raises CheckpointError for another precision and for another student.
    """
    saved = Topology(**record["topology"])
    if saved.precision != topology.precision:
        raise CheckpointError(
            f"checkpoint {path}: was written with precision {saved.precision}, this run has {topology.precision} - "
            f"going on in another is unproven - set engine.precision {saved.precision}"
        )
    position = Position(**record["position"])
    files = sorted(path / name for name in record["files"] if name.endswith(".safetensors"))
    fill_pieces(files, held_pieces(engine), set(whole_shapes(engine)))
    finish_filling(engine, record["updates"])
    mend = "restore the file from a copy"
    states = [read_json(path / f"rank-{rank:05d}.json", mend) for rank in range(saved.world_size)]
    if saved.world_size == ranks.world_size:
        _restore_random_state(states[ranks.rank]["random"])
    else:
        # Reseeding is one number for CPU and GPU alike.
        torch.manual_seed(((seed * 1_000_003 + position.step) * 1_000_003 + ranks.rank) % 2**63)
        if ranks.rank == 0:
            print(
                f"checkpoint {path.name}: from {saved.world_size} ranks, now {ranks.world_size}: dropout and jitter "
                "are drawn anew from seed, step and rank",
                flush=True,
            )
    return position, states


def trained_weights(path: Path) -> dict[str, torch.Tensor]:
    """The whole weights of a checkpoint under the student's names, on the CPU, float32 where they are not integers."""
    weights = read_weights(sorted(path.glob("state-*.safetensors")))
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def merge(path: Path, out: Path) -> Path:
    """Writes the checkpoint as OUT/step-... with whole tensors instead of the pieces of each rank.

    A run goes on from it as from the other, also bit for bit. CheckpointError when the checkpoint is damaged.
    """
    record = verified_record(path)
    target = out / path.name
    if target.exists():
        raise CheckpointError(f"convert: {target} exists already - choose another --out")
    make_folder(out)
    hashes = {}
    with replacing_folder(target) as written:
        for number, pieces in enumerate(whole_pieces(sorted(path.glob("state-*.safetensors")))):
            name = f"state-{number:05d}.safetensors"
            hashes[name] = write_pieces(written / name, pieces)
        for name in record["files"]:
            if name.startswith("rank-"):
                hashes[name] = write_bytes(written / name, (path / name).read_bytes())
        record = {**record, "files": dict(sorted(hashes.items()))}
        write_json(written / RECORD, record | {"hash": _record_hash(record)})
    return target


def _record_hash(record: dict[str, Any]) -> str:
    """Hash of the record itself: a flipped bit in its step would resume at the wrong place."""
    content = {name: value for name, value in record.items() if name != "hash"}
    return content_hash(json.dumps(content, sort_keys=True).encode())


def _read_back(folder: Path, written: dict[str, str]) -> None:
    for name, expected in written.items():
        if (actual := stored_hash(folder / name)) != expected:
            raise DataError(
                f"{name} reads back with hash {actual}, written was {expected}: the disk is not to be trusted"
            )


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
