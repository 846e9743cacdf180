"""The commands `capgap data verify DIR` and `capgap data show DIR`: is a shard folder whole, and what is in it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from data_prep.errors import DataError, reports_errors
from data_prep.files import read_json
from data_prep.progress import Progress
from data_prep.shards import ShardSet, open_shards, tokenizer_hash
from data_prep.tokenization import load_reference


@dataclass(frozen=True)
class Verify:
    """Checks size, row count and hash of every shard, and the tokenizer beside them."""

    folder: tyro.conf.Positional[Path]
    """A folder made by capgap prepare."""


@dataclass(frozen=True)
class Show:
    """Prints what a folder holds: counts, rejected documents, lengths, and some rows as text."""

    folder: tyro.conf.Positional[Path]
    """A folder made by capgap prepare."""
    rows: int = 3
    """Number of rows to print, spread over the folder."""


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Runs one of the two commands; 0 when the folder is whole."""
    command = tyro.cli(
        Annotated[Verify, tyro.conf.subcommand("verify")] | Annotated[Show, tyro.conf.subcommand("show")],  # type: ignore[arg-type]
        args=argv,
        prog="capgap data",
    )
    if isinstance(command, Verify):
        verify(command.folder)
    else:
        show(open_shards(command.folder), num_rows=command.rows)
    return 0


def verify(folder: Path) -> None:
    """Hashes every shard and reports all that are damaged, not only the first; DataError when there are any."""
    shards = open_shards(folder, verify=False)
    damaged: list[str] = []
    total = sum(shard.bytes for shard in shards.manifest.shards)
    with Progress("verify", total / 1e6, unit="MB") as progress:
        for number, shard in enumerate(shards.manifest.shards):
            try:
                shards.verify(number)
                shards.columns(number)
            except DataError as error:
                damaged.append(shard.file)
                print(f"damaged: {error}", file=sys.stderr)
            progress.advance(shard.bytes / 1e6)
    if damaged:
        raise DataError(
            f"verifying {folder}: {len(damaged)} of {len(shards.manifest.shards)} shards damaged "
            f"({', '.join(damaged)}) - see above - remove the folder and run its capgap prepare command again"
        )
    if shards.manifest.tokenizer:
        found, expected = tokenizer_hash(folder / "tokenizer"), shards.manifest.tokenizer["hash"]
        if found != expected:
            raise DataError(
                f"verifying {folder / 'tokenizer'}: vocabulary hash ({found}) - the manifest says {expected} - "
                f"copy the tokenizer {shards.manifest.tokenizer['name']} there again"
            )
    print(f"{folder}: {len(shards.manifest.shards)} shards, {shards.num_rows} rows: every hash agrees")


def show(shards: ShardSet, *, num_rows: int) -> None:
    """Prints the summary and `num_rows` rows that are spread evenly over the folder."""
    manifest = shards.manifest
    stats = read_json(shards.folder / "stats.json", "it is only missing from copies: copy the whole folder")
    size = sum(shard.bytes for shard in manifest.shards)
    files = f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB"
    print(f"{shards.folder}: {manifest.rows}, {manifest.num_rows} rows in {files}")
    if manifest.tokenizer:
        used = f"{100 * manifest.utilisation:.1f} %"
        print(f"row length {manifest.length}, {manifest.num_tokens} tokens, utilisation {used}")
        vocabulary = f"{manifest.tokenizer['vocab_size']} ids, hash {manifest.tokenizer['hash']}"
        print(f"tokenizer {manifest.tokenizer['name']} ({vocabulary})")
    rejected = sum(stats["rejected"].values())
    print(f"\ndocuments: {stats['documents_in']} in = {stats['documents_out']} out + {rejected} rejected")
    for reason, count in stats["rejected"].items():
        print(f"  {count:>10} {reason}")
    for source in manifest.sources:
        share = f", {100 * source['share_of_tokens']:.1f} % of tokens" if manifest.tokenizer else ""
        print(f"source {source['name']}: {source['documents_out']} documents, {source['characters']} characters{share}")
        for note in source.get("partial", []):
            print(f"  partial: {note}")
    if histogram := stats["row_length_tenths"]:
        print("\nrow lengths")
        for tenth, count in enumerate(histogram, 1):
            low, high = (tenth - 1) * manifest.length // 10 + 1, tenth * manifest.length // 10
            print(f"  {low:>6} to {high:>6}  {count:>10}  {'#' * round(50 * count / max(histogram))}")
    if num_rows and manifest.num_rows:
        chosen = np.unique(np.linspace(0, manifest.num_rows - 1, num_rows).astype(np.int64))
        rows = shards.read(chosen)
        tokenizer = load_reference(shards.folder / "tokenizer") if manifest.tokenizer else None
        for position, index in enumerate(chosen.tolist()):
            file, row = shards.locate(index)
            print(f"\nrow {index} ({file}, row {row})")
            if tokenizer is None:
                print(f"{rows['id'][position]} {rows['title'][position]}\n{rows['text'][position][:1000]}")
            else:
                valid = rows["input_ids"][position][: rows["length"][position]]
                print(tokenizer.decode(valid.tolist(), skip_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
