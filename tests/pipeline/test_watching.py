"""What is noticed while a run goes on, and what a user reads when it breaks."""

import pytest
import torch

from pipeline.config import load_run_config
from pipeline.failures import explain
from pipeline.watching import COLLAPSED_LOGS, Alarms, HangWatch, router_health
from tiny_runs import RECIPE


def test_the_health_of_an_even_a_skewed_and_a_collapsed_router():
    even, skewed, collapsed = (router_health(load) for load in ([0.25] * 4, [0.4, 0.3, 0.29, 0.01], [1.0, 0, 0, 0]))
    assert even["max_violation"] == 0 and even["dead_share"] == 0 and abs(even["effective_share"] - 1) < 1e-12
    assert abs(skewed["max_violation"] - 0.6) < 1e-12 and skewed["dead_share"] == 0.25
    assert collapsed == {"max_violation": 3.0, "dead_share": 0.75, "effective_share": 0.25}


@pytest.mark.fault(25)
def test_a_collapse_is_told_once_and_a_healthy_router_never():
    alarms = Alarms()
    told = []
    for step in range(50):
        shares = {"router/layers.0.moe/effective_share": 0.3, "router/layers.1.moe/effective_share": 0.9}
        values = {"train/loss": 1.0, **shares}
        told += alarms.notices(step, values)
    assert len(told) == 1 and "layers.0.moe is collapsing" in told[0] and f"step {COLLAPSED_LOGS - 1}" in told[0]
    assert alarms.collapsed == ["router/layers.0.moe"]


def test_a_loss_that_jumps_is_told_and_a_noisy_one_is_not():
    alarms = Alarms()
    generator = torch.Generator().manual_seed(0)
    for step in range(100):
        noise = 0.1 * float(torch.randn((), generator=generator))
        assert alarms.notices(step, {"train/loss": 1.0 + noise}) == []
    assert "2 times the median" in alarms.notices(100, {"train/loss": 2.5})[0]


@pytest.mark.fault(32)
def test_a_hang_names_the_rank_that_did_not_arrive(capfd):
    import threading

    from torch.distributed import HashStore

    store, hung = HashStore(), threading.Event()
    store.set("arrived/1", "4")
    watch = HangWatch(store, rank=0, world_size=2, timeout=0.2, on_hang=hung.set)
    watch.arrive(5)
    assert hung.wait(10)
    watch.close()
    told = capfd.readouterr().err
    assert "at step 5: rank 1 did not arrive" in told
    assert "Current thread" in told or "Thread 0x" in told, "no stacks"


@pytest.mark.fault(23)
def test_out_of_memory_names_the_batch_and_three_mends_in_order(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path / "run", shards="s", teacher="t"))
    config = load_run_config(recipe, [])
    error = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), config)
    text = str(error)
    assert "batch.micro_size 4" in text and "\n" not in text
    assert text.index("halve batch.micro_size") < text.index("activation_checkpointing") < text.index("zero2.json")
    assert "OutOfMemoryError" in (tmp_path / "run" / "errors" / "rank-0.txt").read_text()
