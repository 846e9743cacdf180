"""Finds the files of an evaluation task and reads their lines, with errors that name file and line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from data_prep.errors import DataError

# Data folders are met in several layouts: tasks side by side, GLUE's own download, collections of several sets.
COLLECTIONS = ("", "glue_data", "ner_open", "llm_eval")


@dataclass
class Malformed:
    """Counts the rows of one file that were skipped, and refuses the file when there are more than allowed."""

    allowed: int
    count: int = 0

    def skip(self, path: Path, line_number: int, why: str) -> None:
        """Counts one bad row; raises DataError with file and line once too many were met."""
        self.count += 1
        if self.count > self.allowed:
            refuse_line(
                path, line_number, why, f"mend the line, or skip up to N such rows with --max-malformed {self.count}"
            )


def refuse_line(path: Path, line_number: int, why: str, mend: str) -> NoReturn:
    raise DataError(f"cannot read task data: {path}:{line_number} - {why} - {mend}")


def find_files(
    data: Path, *, task: str, folders: Sequence[str], names: Sequence[Sequence[str]], source: str
) -> list[Path]:
    """One existing path per entry of `names` (the names that a file goes by), all from one folder under `data`.

    Raises DataError that says what is missing and where the data set can be had (`source`): nothing is downloaded.
    """
    candidates = [data / collection / folder for collection in COLLECTIONS for folder in folders]
    for folder in candidates:
        if not folder.is_dir():
            continue
        found = [next((folder / name for name in choices if (folder / name).is_file()), None) for choices in names]
        missing = [choices[0] for choices, path in zip(names, found, strict=True) if path is None]
        if not missing:
            return [path for path in found if path is not None]
        if any(found):
            raise DataError(f"cannot score {task}: {folder / missing[0]} - file is missing - {source}")
    first = data / folders[0]
    files = " and ".join(choices[0] for choices in names)
    why = "no such folder" if data.is_dir() else f"the --data folder {data} does not exist"
    raise DataError(f"cannot score {task}: {first} - {why} - {source}, so that it holds {files}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their end; only a line feed ends a line (texts hold other separators).

    Raises DataError with the line number where the bytes are not UTF-8.
    """
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            refuse_line(path, number, f"not UTF-8 at byte {error.start} of the line", "convert the file to UTF-8")
        yield number, line.removeprefix("\ufeff").removesuffix("\r")


def fixed_part(count: int, limit: int | None) -> list[int]:
    """At most `limit` of `count` indices, in order; a function of the two numbers only, so all models see the same."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(20121).permutation(count)[:limit].tolist())
