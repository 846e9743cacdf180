"""Fault campaigns of data preparation: each injects one fault many times and counts what came out wrong.

Crashes and full disks at every operation of data_prep.files, signals to real processes, flipped and cut bytes, mutated
dumps.
"""

import bz2
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import numpy as np

from data_prep.bz2_streams import decompress, find_streams
from data_prep.cleaning import clean_wikitext
from data_prep.errors import CapgapError, DataError
from data_prep.files import file_hash, watching_operations
from data_prep.parts import time_limit
from data_prep.prepare import PrepareConfig, prepare
from data_prep.shards import open_shards
from data_prep.sources import ReadOptions, open_source, read_source
from data_prep.wikipedia import PageReader, read_pages

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_prep/samples/wikipedia/enwiki-2016-sample.xml.bz2"


@dataclass
class Outcome:
    """What a campaign found: `wrong` counts silent losses, duplicates and wrong bytes; `uncaught` errors not ours."""

    tried: int = 0
    wrong: int = 0
    uncaught: int = 0
    note: str = ""


class Crash(BaseException):
    """Ends the code under test as a killed process would: no handler of Exception runs."""


def small_job(folder: Path) -> PrepareConfig:
    """12 parts of small documents in `folder`, with a vocabulary of their words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    rng = random.Random(0)
    rows = []
    for number in range(60):
        sentences = [" ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + "." for _ in range(8)]
        rows.append(json.dumps({"id": number, "text": " ".join(sentences)}))
    (folder / "documents.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return PrepareConfig(
        source=(str(folder / "documents.jsonl"),),
        out=folder / "out",
        tokenizer=str(folder),
        length=32,
        part_megabytes=0.0022,
    )


def contents(folder: Path) -> dict[str, str]:
    """name -> hash of every file but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(folder)): file_hash(path) for path in files}


def _quietly(config: PrepareConfig) -> None:
    # A crash inside this process loses nothing that was written, so waiting for the disk would only cost time.
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()), patch("os.fsync", lambda _: None):
        prepare(config)


def crash_at_every_operation(folder: Path, stride: int = 1) -> Outcome:
    """Stops at operation k, for every k, runs again, and compares all bytes with an unbroken run."""
    outcome = Outcome()
    config = small_job(folder)
    operations: list[str] = []
    with watching_operations(lambda operation, _: operations.append(operation)):
        _quietly(config)
    expected = contents(config.out)
    for crash_at in range(0, len(operations), stride):
        shutil.rmtree(config.out)
        count = iter(range(1 << 30))

        def crash(operation: str, path: Path, count=count, crash_at=crash_at) -> None:
            if next(count) == crash_at:
                raise Crash

        try:
            with watching_operations(crash):
                _quietly(config)
        except Crash:
            pass
        outcome.tried += 1
        try:
            _quietly(config)
        except Exception as error:
            outcome.uncaught += 1
            outcome.note = f"operation {crash_at} ({operations[crash_at]}): {error}"
            continue
        if contents(config.out) != expected:
            outcome.wrong += 1
            outcome.note = f"operation {crash_at} ({operations[crash_at]})"
    return outcome


def full_disk_at_every_operation(folder: Path, stride: int = 1) -> Outcome:
    """No space left at operation k, for every k: one error that names a path, and nothing half-written."""
    outcome = Outcome()
    config = small_job(folder)
    operations: list[str] = []
    with watching_operations(lambda operation, _: operations.append(operation)):
        _quietly(config)
    expected = contents(config.out)
    for full_at in range(0, len(operations), stride):
        if operations[full_at] not in ("open", "write", "fsync"):
            continue
        shutil.rmtree(config.out)
        count = iter(range(1 << 30))

        def fill(operation: str, path: Path, count=count, full_at=full_at) -> None:
            if next(count) >= full_at and operation in ("open", "write", "fsync"):
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        outcome.tried += 1
        try:
            with watching_operations(fill):
                _quietly(config)
            outcome.wrong += 1
        except DataError as error:
            outcome.wrong += "bytes free" not in str(error)
        except Exception as error:
            outcome.uncaught += 1
            outcome.note = f"operation {full_at}: {error!r}"
        outcome.wrong += any(".unfinished-" in name for name in contents(config.out))
        _quietly(config)
        outcome.wrong += contents(config.out) != expected
    return outcome


def kill_at_random_times(folder: Path, times: int) -> Outcome:
    """SIGKILL to the whole process group of a real command with 1 to 3 workers, then the same command again."""
    outcome = Outcome()
    config = small_job(folder)
    _quietly(config)
    expected = contents(config.out)
    rng = random.Random(0)
    for number in range(times):
        shutil.rmtree(config.out, ignore_errors=True)
        command = [sys.executable, "-m", "data_prep.prepare", "--source", *config.source, "--out", str(config.out)]
        command += ["--tokenizer", config.tokenizer, "--length", "32", "--part-megabytes", str(config.part_megabytes)]
        command += ["--workers", str(1 + number % 3)]
        silent = subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=ROOT, stdout=silent, stderr=silent, start_new_session=True)
        try:
            process.wait(timeout=rng.uniform(0.2, 3.0))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        outcome.tried += 1
        outcome.uncaught += subprocess.run(command, cwd=ROOT, stdout=silent, stderr=silent, check=False).returncode != 0
        outcome.wrong += contents(config.out) != expected
    return outcome


def flip_bits(folder: Path, times: int) -> Outcome:
    """One flipped bit in a shard is found before a row of it is returned."""
    outcome = Outcome()
    config = small_job(folder)
    _quietly(config)
    files = sorted(config.out.glob("data-*.arrow"))
    rng = random.Random(0)
    for _ in range(times):
        number = rng.randrange(len(files))
        content = files[number].read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        files[number].write_bytes(damaged)
        first = sum(shard.rows for shard in open_shards(config.out).manifest.shards[:number])
        outcome.tried += 1
        outcome.wrong += not _is_data_error(lambda: open_shards(config.out).read(np.array([first])))  # noqa: B023
        files[number].write_bytes(content)
    return outcome


def cut_shards(folder: Path, times: int) -> Outcome:
    """A shard cut anywhere, and at the end of its record batch, is refused."""
    outcome = Outcome()
    config = small_job(folder)
    _quietly(config)
    file = min(config.out.glob("data-*.arrow"))
    content = file.read_bytes()
    # The stream ends with 8 bytes that say so; without them Arrow itself reads all rows and does not complain.
    for cut in {*range(0, len(content), max(1, len(content) // times)), len(content) - 8, len(content) - 1}:
        file.write_bytes(content[:cut])
        outcome.tried += 1
        outcome.wrong += not _is_data_error(lambda: open_shards(config.out).read(np.array([0])))
    return outcome


def _is_data_error(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except DataError:
        return True
    return False


def cut_dumps(folder: Path, times: int) -> Outcome:
    """A dump cut at any byte, or with bytes between its streams, is an error; a partial read keeps a prefix."""
    outcome = Outcome()
    text = bz2.decompress(SAMPLE.read_bytes())
    pages = text[text.index(b"  <page>") :].split(b"</page>\n")
    streams = [text[: text.index(b"  <page>")], *(page + b"</page>\n" for page in pages[:30]), pages[-1]]
    path = folder / "dump.xml.bz2"
    folder.mkdir(parents=True, exist_ok=True)
    whole = b"".join(map(bz2.compress, streams))
    path.write_bytes(whole)
    starts = find_streams(path)
    complete = [document.id for document in _documents(path, False)]
    cuts = {*starts[1:], *range(1, len(whole), max(1, len(whole) // times))}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        outcome.tried += 1
        outcome.wrong += not _is_data_error(lambda: _documents(path, False))
        kept = [document.id for document in _documents(path, True)]
        outcome.wrong += kept != complete[: len(kept)]
    for start in starts[1:]:
        path.write_bytes(whole[:start] + b"garbage" + whole[start:])
        outcome.tried += 1
        outcome.wrong += not _is_data_error(lambda: _documents(path, False))
    return outcome


def _documents(path: Path, allow_partial: bool) -> list:
    source = open_source(0, str(path))
    return list(read_source(source, ReadOptions(allow_partial=allow_partial), range_bytes=None))


PATHOLOGICAL = {
    "5,000 open divs": "<div>" * 5_000 + "text",
    "100,000 open templates": "{{a|" * 100_000,
    "100,000 open links": "[[a|" * 100_000,
    "100,000 open refs": "<ref>" * 100_000,
    "100,000 open tables": "\n{|" * 100_000,
    "100,000 open comments": "<!--" * 100_000,
    "100,000 quotes": "'" * 100_000,
    "nested 50,000 deep": "{{" * 50_000 + "x" + "}}" * 50_000,
    "one word of 8 MB": "x" * 8_000_000,
    "8 MB of brackets": "[" * 8_000_000,
    "8 MB of quotes and spaces": "'' " * 2_600_000,
    "8 MB of entities": "&amp;" * 1_600_000,
    "8 MB of headings": "== a ==\n" * 1_000_000,
    "8 MB of links": "[[a|b]] " * 1_000_000,
    "8 MB of refs that never close": "<ref>a " * 1_100_000,
    "8 MB of html tags": "<b>a</b> " * 880_000,
    "8 MB of external links without end": "[http://a " * 800_000,
    "8 MB of open brackets in links": "[[a [b " * 1_100_000,
    "8 MB of open parentheses": "( , ; " * 1_300_000,
}


def pathological_pages() -> Outcome:
    """Generated pages up to the size cap, each within the time limit, memory within 1 GB."""
    outcome = Outcome()
    slowest = ("", 0.0)
    for name, text in PATHOLOGICAL.items():
        start = time.process_time()
        outcome.tried += 1
        try:
            with time_limit(20):
                clean_wikitext(text)
        except TimeoutError:
            pass  # rejected and counted as "time limit" by the job
        except Exception as error:
            outcome.uncaught += 1
            outcome.note = f"{name}: {error!r}"
        spent = time.process_time() - start
        outcome.wrong += spent > 21
        slowest = max(slowest, (name, spent), key=lambda pair: pair[1])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    outcome.wrong += memory > 1.0
    outcome.note = outcome.note or f"slowest {slowest[0]}: {slowest[1]:.1f} CPU s; peak memory {memory:.2f} GB"
    return outcome


def fuzz_dumps(times: int, seed: int = 0) -> Outcome:
    """Mutated XML and bz2 dumps give pages or our error; each page that comes out is cleaned."""
    outcome = Outcome()
    rng = random.Random(seed)
    text = bz2.decompress(SAMPLE.read_bytes())
    begin = text.index(b"  <page>")
    pages = text[begin:].split(b"</page>\n")
    short = sorted((page + b"</page>\n" for page in pages[:-1] if len(page) < 6000), key=len)[-12:]
    base = text[:begin] + b"".join(short) + pages[-1]
    packed = bz2.compress(base, 1)
    pieces = [
        b"<",
        b">",
        b"&",
        b"</page>",
        b"<page>",
        b"\0",
        b"\xff",
        b"]]>",
        b"<![CDATA[",
        b"<!--",
        b"{{",
        b"[[",
        b"|}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.bz2"
        for number in range(times):
            damaged = bytearray(base if number % 2 else packed)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(len(damaged))
                kind = rng.randrange(4)
                if kind == 0:
                    damaged[at] = rng.randrange(256)
                elif kind == 1:
                    del damaged[at : at + rng.randint(1, 200)]
                elif kind == 2:
                    damaged[at:at] = rng.choice(pieces)
                else:
                    damaged[at:at] = damaged[at // 2 : at // 2 + rng.randint(1, 200)]
            outcome.tried += 1
            try:
                if number % 2:
                    chunks = iter([bytes(damaged)])
                else:
                    path.write_bytes(damaged)
                    chunks = decompress(path)
                for page in read_pages(chunks, PageReader("mutant")):
                    clean_wikitext(page.text)
            except CapgapError:
                continue
            except Exception as error:
                outcome.uncaught += 1
                outcome.note = repr(error)
    return outcome
