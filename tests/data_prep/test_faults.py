"""The fault campaigns of data preparation, and the faults that need one try only."""

import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import campaigns
import pytest

from data_prep.errors import DataError
from data_prep.locks import folder_lock
from data_prep.prepare import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(injected):
    def check(outcome: campaigns.Outcome, at_least: int) -> None:
        injected(outcome.tried, outcome.tried - min(outcome.tried, outcome.wrong + outcome.uncaught), outcome.note)
        assert outcome.tried >= at_least
        assert outcome.wrong == 0 and outcome.uncaught == 0, outcome.note

    return check


# The short form is one of every push, the long one of `make faults`.
SHORT, LONG = {"id": "short"}, {"id": "long", "marks": pytest.mark.slow}


@pytest.mark.fault(4)
@pytest.mark.parametrize(("stride", "at_least"), [pytest.param(9, 10, **SHORT), pytest.param(1, 150, **LONG)])
def test_a_crash_at_any_operation_loses_and_doubles_nothing(tmp_path, check, stride, at_least):
    check(campaigns.crash_at_every_operation(tmp_path, stride), at_least)


@pytest.mark.fault(6)
@pytest.mark.parametrize(("stride", "at_least"), [pytest.param(11, 4, **SHORT), pytest.param(1, 150, **LONG)])
def test_a_full_disk_at_any_operation_is_one_error_and_the_rerun_is_exact(tmp_path, check, stride, at_least):
    check(campaigns.full_disk_at_every_operation(tmp_path, stride), at_least)


@pytest.mark.fault(4)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [pytest.param(2, **SHORT), pytest.param(50, **LONG)])
def test_a_killed_command_goes_on_where_it_was(tmp_path, check, kills):
    check(campaigns.kill_at_random_times(tmp_path, kills), kills)


@pytest.mark.fault(7)
@pytest.mark.parametrize("flips", [pytest.param(40, **SHORT), pytest.param(200, **LONG)])
def test_a_flipped_bit_in_a_shard_is_found(tmp_path, check, flips):
    check(campaigns.flip_bits(tmp_path, flips), flips)


@pytest.mark.fault(8)
@pytest.mark.parametrize("cuts", [pytest.param(30, **SHORT), pytest.param(100, **LONG)])
def test_a_cut_shard_is_found(tmp_path, check, cuts):
    check(campaigns.cut_shards(tmp_path, cuts), cuts)


@pytest.mark.fault(10)
@pytest.mark.parametrize(("cuts", "at_least"), [pytest.param(40, 90, **SHORT), pytest.param(200, 250, **LONG)])
def test_a_cut_or_spoilt_dump_is_never_taken_for_whole(tmp_path, check, cuts, at_least):
    check(campaigns.cut_dumps(tmp_path, cuts), at_least)


@pytest.mark.slow
@pytest.mark.fault(12)
def test_pathological_pages_of_8_megabytes_stay_within_20_seconds_and_1_gigabyte(check):
    # In a process of its own, whose memory holds nothing else.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        outcome = alone.submit(campaigns.pathological_pages).result()
    check(outcome, 19)


@pytest.mark.fault(13)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutants", [pytest.param(300, **SHORT), pytest.param(10_000, **LONG)])
def test_mutated_dumps_give_pages_or_our_error(check, mutants):
    check(campaigns.fuzz_dumps(mutants, seed=1), mutants)


@pytest.mark.fault(6)
def test_a_size_limit_of_the_system_is_one_line(tmp_path):
    config = campaigns.small_job(tmp_path)
    command = f"ulimit -f 1; exec {sys.executable} -m data_prep.prepare --source {config.source[0]} --out {config.out}"
    command += f" --tokenizer {config.tokenizer} --length 512 --rows bert-pairs"
    finished = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error")]
    assert finished.returncode == 3 and len(errors) == 1 and "bytes free" in errors[0], finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.fault(20)
def test_neither_the_clock_nor_file_times_decide_anything(tmp_path, monkeypatch):
    config = campaigns.small_job(tmp_path)
    prepare(config)
    expected = campaigns.contents(config.out)
    for shift in (-86_400, 86_400):
        campaigns.shutil.rmtree(config.out)
        real = time.time
        monkeypatch.setattr(time, "time", lambda real=real, shift=shift: real() + shift)
        with pytest.raises(campaigns.Crash), campaigns.watching_operations(stop_after(60)):
            prepare(config)
        for number, path in enumerate(sorted(config.out.rglob("*"), reverse=True)):
            os.utime(path, (1_000_000 + number, 1_000_000 + number))
        prepare(config)
        monkeypatch.undo()
        assert campaigns.contents(config.out) == expected


def stop_after(operations: int):
    count = iter(range(1 << 30))

    def stop(operation, path):
        if next(count) == operations:
            raise campaigns.Crash

    return stop


@pytest.mark.fault(21)
def test_a_second_writer_of_the_same_folder_is_refused(tmp_path):
    config = campaigns.small_job(tmp_path)
    config.out.mkdir()
    with folder_lock(config.out), pytest.raises(DataError, match=rf"in use by process {os.getpid()}"):
        prepare(config)
    prepare(config)


@pytest.mark.fault(28)
def test_the_command_works_in_the_c_locale_in_a_folder_with_a_foreign_name(tmp_path):
    config = campaigns.small_job(tmp_path / "ü 日本")
    command = [sys.executable, "-m", "data_prep.prepare", "--source", *config.source, "--out", str(config.out)]
    command += ["--tokenizer", config.tokenizer, "--length", "32"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert finished.returncode == 0, finished.stderr.decode(errors="replace")


@pytest.mark.fault(12)
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
    config = campaigns.PrepareConfig(
        source=(str(tmp_path / "a.xml"),), out=tmp_path / "out", rows="text", page_seconds=0.2
    )
    prepare(config)
    stats = campaigns.json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["rejected"] == {"time limit": 1} and stats["documents_out"] == 2


@pytest.mark.fault(24)
def test_an_empty_dataset_folder_gives_no_rows_and_says_so(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": []}, datasets.Features({"text": datasets.Value("string")})).save_to_disk(
        str(tmp_path / "empty")
    )
    config = campaigns.PrepareConfig(source=(str(tmp_path / "empty"),), out=tmp_path / "out", rows="text")
    with pytest.raises(DataError, match=r"no rows - 0 documents in = 0 out \+ 0 rejected"):
        prepare(config)
