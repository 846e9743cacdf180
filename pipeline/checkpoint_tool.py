"""Looks at checkpoints from outside of a run: `capgap checkpoint show|verify|convert DIR`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data_prep.errors import CheckpointError, ConfigError, DataError, reports_errors
from data_prep.files import read_json


@dataclass(frozen=True)
class CheckpointCommand:
    """What to do with a checkpoint, or with all checkpoints of a run."""

    action: tyro.conf.Positional[Literal["show", "verify", "convert"]]
    """show: what is in it; verify: check every file against its hash; convert: merge the pieces of all ranks."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """One checkpoint (`RUN/checkpoints/step-00000500`), or a run, or its folder of checkpoints: all of them."""
    out: Path | None = None
    """convert: folder that receives the merged checkpoint under its own name."""


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done and every checkpoint whole, 2 config, 4 a checkpoint is damaged."""
    command = tyro.cli(CheckpointCommand, args=argv, prog="capgap checkpoint")
    paths = checkpoints_in(command.folder)
    if command.action == "show":
        for path in paths:
            print(shown(path))
        return 0
    if command.action == "verify":
        return verify(paths)
    if command.out is None:
        raise ConfigError("convert: --out is missing - name the folder that receives the merged checkpoint")
    if len(paths) != 1:
        raise ConfigError(f"convert: {command.folder} holds {len(paths)} checkpoints - name one of them")
    from pipeline.checkpoints import merge

    print(f"written: {merge(paths[0], command.out)}")
    return 0


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint itself, or those of a run, the oldest first; ConfigError when there is none."""
    if folder.name.startswith("step-"):
        found = [folder] if folder.is_dir() else []
    else:
        inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
        found = sorted(path for path in inside.glob("step-*") if path.is_dir())
    if not found:
        raise ConfigError(f"{folder}: no checkpoint there - give RUN, RUN/checkpoints or one step-... folder of it")
    return found


def shown(path: Path) -> str:
    """What one checkpoint says of itself, on one line; its files are not read."""
    if path.suffix == ".partial":
        return f"{path.name}: was never completed"
    try:
        record: dict[str, Any] = read_json(path / "checkpoint.json", "the checkpoint is incomplete")
        cut, position = record["topology"], record["position"]
        size = sum(file.stat().st_size for file in path.iterdir())
        return (
            f"{path.name}: step {position['step']}, {position['tokens']:,} tokens, {record['updates']} updates; "
            f"{cut['world_size']} ranks, ZeRO {cut['zero_stage']}, expert_parallel_size "
            f"{cut['expert_parallel_size']}, {cut['precision']}; {len(record['files'])} files, {size / 2**20:.1f} MiB"
        )
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path}: checkpoint.json is damaged ({error}) - restore a copy") from error


def verify(paths: list[Path]) -> int:
    """Prints a line per checkpoint; the exit code says whether all are whole."""
    from pipeline.checkpoints import verified_record

    damaged = 0
    for path in paths:
        if path.suffix == ".partial":
            print(f"{path.name}: was never completed, a run ignores it")
            continue
        try:
            record = verified_record(path)
            print(f"{path.name}: whole, {len(record['files'])} files match their hashes")
        except CheckpointError as error:
            print(f"{path.name}: damaged - {error}")
            damaged += 1
    return CheckpointError.exit_code if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
