"""Short forms of the campaigns of data_prep/benchmarks/faults.py, and the faults that need one try only."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.benchmarks import faults
from data_prep.errors import DataError
from data_prep.locks import folder_lock
from data_prep.prepare import prepare

ROOT = Path(__file__).parents[2]


def check(outcome: faults.Outcome, at_least: int) -> None:
    assert outcome.tried >= at_least
    assert outcome.wrong == 0 and outcome.uncaught == 0, outcome.note


def test_a_crash_at_any_operation_loses_and_doubles_nothing(tmp_path):
    check(faults.crash_at_every_operation(tmp_path, stride=9), 10)


def test_a_full_disk_at_any_operation_is_one_error_and_the_rerun_is_exact(tmp_path):
    check(faults.full_disk_at_every_operation(tmp_path, stride=11), 4)


def test_a_killed_command_goes_on_where_it_was(tmp_path):
    check(faults.kill_at_random_times(tmp_path, 2), 2)


def test_damaged_and_cut_shards_are_found(tmp_path):
    check(faults.flip_bits(tmp_path / "flip", 40), 40)
    check(faults.cut_shards(tmp_path / "cut", 30), 30)


def test_a_cut_or_spoilt_dump_is_never_taken_for_whole(tmp_path):
    check(faults.cut_dumps(tmp_path, 40), 90)


def test_a_size_limit_of_the_system_is_one_line(tmp_path):
    config = faults.small_job(tmp_path)
    command = f"ulimit -f 1; exec {sys.executable} -m data_prep.prepare --source {config.source[0]} --out {config.out}"
    command += f" --tokenizer {config.tokenizer} --length 512 --rows bert-pairs"
    finished = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert finished.returncode == 3 and len(errors) == 1 and "bytes free" in errors[0], finished.stderr
    assert "Traceback" not in finished.stderr


def test_neither_the_clock_nor_file_times_decide_anything(tmp_path, monkeypatch):
    config = faults.small_job(tmp_path)
    prepare(config)
    expected = faults.contents(config.out)
    for shift in (-86_400, 86_400):
        faults.shutil.rmtree(config.out)
        real = time.time
        monkeypatch.setattr(time, "time", lambda real=real, shift=shift: real() + shift)
        with pytest.raises(faults.Crash), faults.watching_operations(stop_after(60)):
            prepare(config)
        for number, path in enumerate(sorted(config.out.rglob("*"), reverse=True)):
            os.utime(path, (1_000_000 + number, 1_000_000 + number))
        prepare(config)
        monkeypatch.undo()
        assert faults.contents(config.out) == expected


def stop_after(operations: int):
    count = iter(range(1 << 30))

    def stop(operation, path):
        if next(count) == operations:
            raise faults.Crash

    return stop


def test_a_second_writer_of_the_same_folder_is_refused(tmp_path):
    config = faults.small_job(tmp_path)
    config.out.mkdir()
    with folder_lock(config.out), pytest.raises(DataError, match=rf"in use by process {os.getpid()}"):
        prepare(config)
    prepare(config)


def test_the_command_works_in_the_c_locale_in_a_folder_with_a_foreign_name(tmp_path):
    config = faults.small_job(tmp_path / "ü 日本")
    command = [sys.executable, "-m", "data_prep.prepare", "--source", *config.source, "--out", str(config.out)]
    command += ["--tokenizer", config.tokenizer, "--length", "32"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")


def test_a_page_that_takes_too_long_is_rejected_and_counted(tmp_path, monkeypatch):
    from data_prep.cleaning import CLEANERS

    text = f"<revision><text>{'Words of text. ' * 20}</text></revision>"
    xml = "".join(f"<page><title>T{n}</title><ns>0</ns><id>{n}</id>{text}</page>" for n in range(3))
    (tmp_path / "a.xml").write_text(f"<mediawiki>{xml}</mediawiki>")
    clean = CLEANERS["single-pass"]
    calls = iter(range(10))

    def slow(text, hidden):
        if next(calls) == 2:  # the first call is the sample for the tokenizer engine
            while True:
                pass
        return clean(text, hidden)

    monkeypatch.setitem(CLEANERS, "single-pass", slow)
    config = faults.PrepareConfig(
        source=(str(tmp_path / "a.xml"),), out=tmp_path / "out", rows="text", page_seconds=0.2
    )
    prepare(config)
    stats = faults.json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["rejected"] == {"time limit": 1} and stats["documents_out"] == 2


def test_an_empty_dataset_folder_gives_no_rows_and_says_so(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": []}, datasets.Features({"text": datasets.Value("string")})).save_to_disk(
        str(tmp_path / "empty")
    )
    config = faults.PrepareConfig(source=(str(tmp_path / "empty"),), out=tmp_path / "out", rows="text")
    with pytest.raises(DataError, match=r"no rows - 0 documents in = 0 out \+ 0 rejected"):
        prepare(config)
