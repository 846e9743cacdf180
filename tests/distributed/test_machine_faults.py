"""Faults of the machine around a run: memory, disk, clock, port, folders. Each run goes on as if nothing had been."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.files import free_bytes
from launching import (
    BIN,
    PROJECT,
    distill,
    distill_after,
    distill_command,
    environment,
    free_port,
    numbers_of,
    started,
)
from pipeline.doctor import compare
from tiny_runs import RECIPE, VOCABULARY

# Raises when the loss of step 4 is to be computed; the recipe has one micro-batch a step then, and saves at step 2.
AT_STEP_4 = """
import pipeline.losses as losses
compute, calls = losses.compute_losses, iter(range(1, 99))
def failing(*arguments):
    if next(calls) == 4:
        fail()
    return compute(*arguments)
losses.compute_losses = failing
"""
FAILURES = {
    "the GPU's": """
def fail():
    import torch
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7 GiB")
""",
    "the machine's": """
def fail():
    import os, resource, torch
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + (64 << 20),) * 2)
    torch.empty(1 << 30)
""",
    "the power": "import os\nfail = lambda: os._exit(137)",
}
WHOLE_BATCH = ("--batch.micro_size", "16")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, teacher_folder, shards_folder) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(out=folder / "run", shards=shards_folder, teacher=teacher_folder))
    code, output = distill("--config", str(path), *WHOLE_BATCH)
    assert code == 0, output
    return folder / "run"


def check_goes_on(recipe: Path, unbroken: Path, *flags: str) -> str:
    code, output = distill("--config", str(recipe), *WHOLE_BATCH, *flags)
    assert code == 0, output
    assert "resumed from" in output
    assert compare(unbroken, recipe.parent / "run") == []
    return output


@pytest.mark.fault(23)
@pytest.mark.parametrize("memory", ["the GPU's", pytest.param("the machine's", marks=pytest.mark.slow)])
def test_a_run_that_is_out_of_memory_names_three_mends_and_goes_on(recipe, unbroken, memory):
    code, output = distill_after(FAILURES[memory] + AT_STEP_4, "--config", str(recipe), *WHOLE_BATCH)
    assert code == 1, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    mends = ("halve batch.micro_size", "engine.activation_checkpointing", "ds_configs/zero2.json")
    places = [line.index(mend) for mend in mends]
    assert places == sorted(places) and "batch.micro_size 16" in line
    assert "Traceback" not in output
    check_goes_on(recipe, unbroken)


SHIFTED_CLOCK = """
import os, time
real, shift = time.time, float(os.environ["SHIFT"])
time.time = lambda: real() + shift
"""


@pytest.mark.slow
@pytest.mark.fault(20)
def test_a_clock_that_goes_back_two_days_and_file_times_in_disorder_change_nothing(recipe, unbroken):
    run = recipe.parent / "run"
    crash = SHIFTED_CLOCK + FAILURES["the power"] + AT_STEP_4
    flags = ["--config", str(recipe), *WHOLE_BATCH]
    code, output = distill_after(crash, *flags, SHIFT="86400")
    assert code == 137, output
    # The older, the newer.
    for number, path in enumerate(sorted(run.rglob("*"), reverse=True)):
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    code, output = distill_after(SHIFTED_CLOCK, *flags, SHIFT="-86400")
    assert code == 0, output
    assert "resumed from" in output and "step 2 of 6" in output
    assert compare(unbroken, run) == []


@pytest.mark.slow
@pytest.mark.fault(6)
def test_a_limit_on_file_sizes_in_the_middle_of_a_run_keeps_what_was_complete(recipe, unbroken):
    code, output = distill_after(FAILURES["the power"] + AT_STEP_4, "--config", str(recipe), *WHOLE_BATCH)
    assert code == 137, output
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))"
    code, output = distill_after(limit, "--config", str(recipe), *WHOLE_BATCH)
    assert code == 4, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert "step-00000004" in line and "bytes free" in line and "Traceback" not in output
    check_goes_on(recipe, unbroken)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.mark.slow
@pytest.mark.fault(6)
def test_a_disk_without_room_for_two_checkpoints_is_refused_before_the_first_step(recipe, small_disk):
    code, output = distill("--config", str(recipe), "--out", str(small_disk / "run"))
    assert code == 3, output
    assert "bytes needed" in output and f"{free_bytes(small_disk)} free" in output and "Traceback" not in output
    assert not list(small_disk.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.fault(26)
def test_a_run_goes_on_without_tensorboard(recipe, unbroken):
    run = recipe.parent / "run"
    run.mkdir()
    (run / "tensorboard").write_text("in the way")
    code, output = distill("--config", str(recipe), *WHOLE_BATCH)
    assert code == 0, output
    assert output.count("warning: TensorBoard is off") == 1
    assert numbers_of(run) == numbers_of(unbroken)


@pytest.mark.fault(31)
def test_a_port_that_is_taken_is_named_with_the_flag_that_mends_it(recipe):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        command = distill_command("--config", str(recipe), ranks=2)
        command[command.index("--master_port") + 1] = str(port)
        with started(command) as process:
            # The launcher waits 30 s for a rank that does not go by itself.
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 2, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert f"port {port} is in use" in line and "--master_port" in line and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.fault(31)
@pytest.mark.parametrize("ranks", [None, "torchrun"])
def test_who_names_no_port_needs_none(recipe, ranks):
    """29500, the port that everybody takes by default, is taken."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("", 29500))
            other.listen()
        except OSError:
            pass  # Somebody else has taken it already.
        command = distill_command("--config", str(recipe), "--steps", "2", ranks=None)
        if ranks:
            command[:1] = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
        with started(command) as process:
            output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


@pytest.fixture
def road(tmp_path, teacher_folder) -> dict[str, str]:
    """What the commands of a small whole road read."""
    text = tmp_path / "ü 日本" / "ein tëxt.jsonl"
    text.parent.mkdir()
    sentences = [" ".join(VOCABULARY[5 + (7 * line + word) % 195] for word in range(9)) + "." for line in range(60)]
    rows = ({"id": number, "text": " ".join(sentences[number:] + sentences[:number])} for number in range(12))
    text.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "link").symlink_to(teacher_folder)
    recipe = text.with_name("rezept ñ.yaml")
    recipe.write_text(RECIPE.format(out="überall", shards="none", teacher=tmp_path / "link"), encoding="utf-8")
    return {"text": str(text), "teacher": str(tmp_path / "link"), "recipe": str(recipe)}


def whole_road(road: dict[str, str], shards: str, run: str, scores: str, report: str) -> list[list[str]]:
    capgap = [sys.executable, "-m", "pipeline.cli"]
    deepspeed = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--module"]
    score = ["--tasks", "qnli", "--data", str(PROJECT / "data_prep/samples"), "--seeds", "1", "--epochs", "1"]
    score += ["--max-train-examples", "8", "--max-eval-examples", "8", "--throughput-batch-size", "0"]
    score += ["--max-length", "32", "--trust-remote-code"]
    prepare = ["prepare", "--source", road["text"], "--tokenizer", road["teacher"], "--rows", "bert-pairs"]
    return [
        [*capgap, *prepare, "--length", "32", "--out", shards],
        [*deepspeed, "pipeline.distill", "--config", road["recipe"], "--data.shards", shards, "--out", run],
        [*capgap, "score", "--model", f"{run}/export", "--out", scores, *score],
        [*capgap, "report", scores, "--out", report],
    ]


def check_road(commands: list[list[str]], *, home: Path, cwd: Path, before: tuple[str, ...] = (), **env: str) -> None:
    """Runs the commands and finds nothing in the home or the working folder that they were not told to write."""
    env |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join((str(PROJECT), str(PROJECT / "kernels")))}
    kept = {key: value for key, value in environment(**env).items() if not key.startswith(("HF_H", "XDG_", "TRITON"))}
    kept["HF_HUB_OFFLINE"] = "1"
    for command in commands:
        done = subprocess.run([*before, *command], cwd=cwd, env=kept, capture_output=True, timeout=280, check=False)
        written = (done.stdout + done.stderr).decode("utf-8", "replace")
        assert done.returncode == 0, written[-4000:]
    assert list(home.iterdir()) == []


@pytest.mark.slow
@pytest.mark.fault(28)
def test_the_whole_road_in_folders_of_any_name_in_the_c_locale(road, tmp_path):
    """Relative paths, spaces, letters of any script, and a link to the teacher.

    Python reads and writes UTF-8 then. Where that is switched off, too, torch 2.13 cannot read its own files.
    """
    home, cwd = tmp_path / "home", tmp_path / "ü 日本"
    home.mkdir()
    there = {name: Path(path).name if name != "teacher" else "../link" for name, path in road.items()}
    before = {path.name for path in cwd.iterdir()}
    check_road(whole_road(there, "shards ñ", "läufe/日", "punkte", "bericht"), home=home, cwd=cwd, LC_ALL="C")
    assert {path.name for path in cwd.iterdir()} - before == {"shards ñ", "läufe", "punkte", "bericht"}
    assert "QNLI" in (cwd / "bericht" / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.fault(27)
def test_the_whole_road_from_a_working_folder_and_a_home_that_are_read_only(road, tmp_path):
    home, cwd, out = tmp_path / "home", tmp_path / "work", tmp_path / "out"
    for folder in (home, cwd, out):
        folder.mkdir()
    for folder in (home, cwd):
        folder.chmod(0o555)
    # Root may write everywhere, unless this is taken from it.
    plain = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override") if os.geteuid() == 0 else ()
    refused = subprocess.run([*plain, "touch", str(cwd / "x")], capture_output=True, check=False)
    assert refused.returncode != 0, "the folder is not read-only"
    names = (str(out / name) for name in ("shards", "run", "scores", "report"))
    check_road(whole_road(road, *names), home=home, cwd=cwd, before=plain)
    assert list(cwd.iterdir()) == []
