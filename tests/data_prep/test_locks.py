import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.locks import folder_lock

HOLD = """
import sys, time
from pathlib import Path
from data_prep.errors import DataError
from data_prep.locks import folder_lock
try:
    with folder_lock(Path(sys.argv[1])):
        print("won", flush=True)
        time.sleep(float(sys.argv[2]))
except DataError as error:
    print(f"lost {error}", flush=True)
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.fault(21)
def test_of_20_simultaneous_starts_exactly_one_wins_and_the_others_name_it(tmp_path, injected):
    injected(20)
    started = [start(tmp_path, 4) for _ in range(20)]
    said = [process.communicate()[0].strip() for process in started]
    assert said.count("won") == 1
    winner = started[said.index("won")].pid
    assert all(f"process {winner} " in line or "another process" in line for line in said if line != "won")


@pytest.mark.fault(21)
def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path):
    holder = start(tmp_path, 60)
    assert holder.stdout is not None and holder.stdout.readline().strip() == "won"
    with pytest.raises(DataError, match=rf"in use by process {holder.pid} on \S+ since 20"), folder_lock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    time.sleep(0.1)
    with folder_lock(tmp_path):
        pass


def test_a_lock_can_be_waited_for(tmp_path):
    holder = start(tmp_path, 1)
    assert holder.stdout is not None and holder.stdout.readline().strip() == "won"
    with folder_lock(tmp_path, wait=True):
        assert holder.wait(timeout=5) == 0


def test_tasks_with_different_names_do_not_hinder_each_other(tmp_path):
    with folder_lock(tmp_path, "task-0-of-2"), folder_lock(tmp_path, "task-1-of-2"):
        pass
