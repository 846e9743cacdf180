"""The benchmarks without a GPU: every script runs, one failure costs its own figures alone, goals are judged."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "kernels/benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import measuring

    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(measuring, "copy_bytes_per_second", lambda device: 1e9)


def options(**changes):
    from measuring import Options

    return dataclasses.replace(Options(CPU, rounds=1, save=True, smoke=False, first=0, seconds=math.inf), **changes)


def squares(case, roof, seconds):
    """A stand-in for a benchmark: case 0 divides by zero."""
    return [{"case": str(case), "square": 1 / case}]


def saved(name):
    from measuring import results_path

    return json.loads(results_path(name, CPU).read_text())


@pytest.mark.parametrize("names", [["linear_kl"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"])
def test_the_command_for_a_gpu_runs_every_script_at_toy_size(names):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, BENCHMARKS / "bench_gpu.py", "--smoke", *(["--only", *names] if names else [])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in names or ["routing", "expert_mlp", "relation_kl", "linear_kl"]:
        assert f"## {name}" in ran.stdout
    assert "FAILED" not in ran.stdout and "| capgap" in ran.stdout


def test_a_case_that_fails_costs_its_own_figures_alone():
    from measuring import run_cases

    assert run_cases("toy", [2, 0, 4], squares, options(), dtypes=[]) == 1
    rows = saved("toy")["rows"]
    assert [row.get("square") for row in rows] == [0.5, None, 0.25]
    assert rows[1]["failed"].startswith("ZeroDivisionError")


def test_a_wrong_kernel_has_no_times():
    from measuring import within

    within(1e-6, 1e-5)
    for error in (1e-4, math.nan):
        with pytest.raises(ArithmeticError, match="no times"):
            within(error, 1e-5)


def test_a_variant_that_fails_leaves_the_others_their_figures():
    from measuring import interleaved

    measured, failed = interleaved({"zero": lambda: 1 / 0, "one": lambda: 1}, rounds=4, device=CPU)
    assert [row.name for row in measured] == ["one"] and list(failed) == ["zero"]
    assert math.isnan(measured[0].times_faster)


def test_cases_for_which_the_time_does_not_suffice_are_named():
    from measuring import run_cases

    assert run_cases("late", [1, 2], squares, options(seconds=0.0), dtypes=[]) == 1
    assert [row["failed"] for row in saved("late")["rows"]] == ["not measured: the time is over"] * 2


def test_behind_a_case_that_the_gpu_did_not_survive_a_fresh_process_goes_on(monkeypatch):
    import measuring

    monkeypatch.setattr(measuring, "answers", lambda device: False)
    assert measuring.run_cases("lost", [2, 0, 4], squares, options(), dtypes=[]) == measuring.GPU_IS_LOST
    assert [row["index"] for row in saved("lost")["rows"]] == [0, 1]
    assert measuring.run_cases("lost", [2, 0, 4], squares, options(first=2), dtypes=[]) == 0
    assert [row.get("square") for row in saved("lost")["rows"]] == [0.5, None, 0.25]


def test_results_name_device_versions_and_commit():
    from measuring import run_cases

    run_cases("named", [1], squares, options(), dtypes=[])
    record = saved("named")
    assert record["versions"]["torch"] == torch.__version__ and record["commit"] and record["device"]
    assert record["copy_bytes_per_second"] == 1e9


def names_of_gpu_cases() -> dict[str, list[str]]:
    import bench_expert_mlp
    import bench_linear_kl
    import bench_relation_kl
    import bench_routing

    def short(dtype):
        return str(dtype).removeprefix("torch.")

    return {
        "routing": [str(case) for case in bench_routing.GPU_CASES],
        "expert_mlp": [str(case) for case in bench_expert_mlp.GPU_CASES],
        "relation_kl": [f"{rows} x {length}, {short(dtype)}" for rows, length, dtype, _ in bench_relation_kl.GPU_CASES],
        "linear_kl": [f"{n}, {d}/{t}, {v}, {short(dtype)}" for n, d, t, v, dtype in bench_linear_kl.GPU_CASES],
    }


def made_up_records(milliseconds_of_ours: float) -> dict[str, dict]:
    """Every variant that a goal reads takes 12 ms and 1000 MiB, ours the given time and 10 MiB."""
    ours = ("capgap", "capgap, CUDA graph", "capgap, experts alone", "capgap, router included")
    others = (
        "deepspeed eager",
        "transformers grouped_mm",
        "liger",
        "dense of equal compute",
        "plain twin",
        "full logits",
        "matmuls alone",
        "liger fused linear jsd",
    )
    records = {}
    for benchmark, cases in names_of_gpu_cases().items():
        rows = [{"case": case, "launches": 5} for case in cases]
        for case in cases:
            for name in (*ours, *others):
                row = {"case": case, "name": name, "bytes": 9e5, "flop": 9e8, "peak_mib": 10 if name in ours else 1000}
                row["milliseconds"] = milliseconds_of_ours if name in ours else 12.0
                rows += [row | {"pass": run} for run in ("forward", "forward+backward")] + [row]
        rates = {"copy_bytes_per_second": 1e9, "matmul_flop_per_second": {"bfloat16": 1e12}}
        records[benchmark] = {"rows": rows, **rates}
    return records


def test_every_goal_is_met_missed_or_not_measured():
    from goals import GOALS, table, verdicts

    fast, slow = verdicts(made_up_records(0.7)), verdicts(made_up_records(700.0))
    assert {verdict.why for verdict in fast} == {"met"}
    missed = {verdict.goal.text for verdict in slow if verdict.why == "MISSED"}
    assert missed == {goal.text for goal in GOALS if "launches" not in goal.text and "memory" not in goal.text}
    assert {verdict.why for verdict in verdicts({})} == {"not measured"}
    assert len(table(fast).splitlines()) == 2 + len(fast)


def test_a_failed_variant_is_not_measured():
    from goals import verdicts

    records = made_up_records(0.7)
    for row in records["expert_mlp"]["rows"]:
        if row.get("name") == "liger":
            row["failed"] = "out of memory"
    unmeasured = {verdict.goal.text for verdict in verdicts(records) if verdict.value is None}
    assert unmeasured == {"times faster than Liger"}
