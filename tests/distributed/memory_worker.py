"""Runs a distillation and writes by how much its memory grew at most, beside the estimate of the preflight.

python memory_worker.py OUT.json --config RECIPE ...
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch.utils.tensorboard
import transformers

from pipeline import distill
from pipeline.building import build_models
from pipeline.config import load_run_config
from pipeline.models.sizes import estimate_memory
from pipeline.preflight import check_run


def held(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (at most) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> int:
    # The classes, which transformers imports on first use.
    for name in ("AutoModel", "BertModel", "LlamaForCausalLM", "MixtralForCausalLM", "AutoModelForCausalLM"):
        getattr(transformers, name)
    assert deepspeed and torch.utils.tensorboard
    imported = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark so far is forgotten
    code = distill.main(sys.argv[2:])
    peak = held("VmHWM") - imported
    config = load_run_config(sys.argv[3], sys.argv[4:])
    checked = check_run(config, 1)
    estimate = estimate_memory(
        *build_models(config, checked), config,
        zero_stage=checked.zero_stage, world_size=1, length=checked.shards.manifest.length,
    )  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps({"peak": peak, "estimate": estimate.total, "parts": str(estimate)}))
    return code


if __name__ == "__main__":
    sys.exit(main())
