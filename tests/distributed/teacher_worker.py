"""One rank that loads a sharded teacher, and says what it took and whether it says what the whole one does."""

import json
import sys
from pathlib import Path

import torch

from pipeline.config import TeacherConfig
from pipeline.models.decoders import load_causal_teacher
from pipeline.models.sharded_teacher import load_sharded_teacher
from pipeline.parallel import join
from pipeline.ranks import place_from_environment
from pipeline.signals import Batch


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since forget_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    ranks = join(place_from_environment(), 2)
    ids = torch.arange(4, 36).view(2, 16) + ranks.rank
    batch = Batch(ids, torch.ones(2, 16, dtype=torch.bool), position_ids=torch.arange(16).expand(2, 16))
    found = {}
    for folder in folders:
        config = TeacherConfig(model=str(folder), micro_size=1)
        before = memory("VmRSS")
        forget_peak()
        teacher = load_sharded_teacher(folder, config, dtype=torch.float32, attention="sdpa", device=ranks.device)
        loading = memory("VmHWM") - before
        teacher.compared_layers = (1,)
        seen = teacher(batch)
        said = seen.next_token
        logits = said.hidden_ND @ said.head_VD.T
        running = memory("VmHWM") - before
        held = sum(parameter.ds_tensor.numel() for parameter in teacher.body.parameters()) * 4
        del teacher
        whole = load_causal_teacher(folder, config, dtype=torch.float32)
        whole.compared_layers = (1,)
        expected = whole(batch)
        assert seen.compared_states[0].equal(expected.compared_states[0])
        assert not seen.compared_states[0].equal(seen.hidden_states_BTD)
        whole = expected.next_token
        difference = float((logits - whole.hidden_ND @ whole.head_VD.T).abs().max())
        found[folder.name] = {"loading": loading, "running": running, "held": held, "difference": difference}
    (out / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()


if __name__ == "__main__":
    main()
