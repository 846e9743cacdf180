"""Runs a distillation and writes, per step, where the host asked for a value that a GPU would have to compute first.

    python count_waits.py OUT.json --config RECIPE ...

On a CPU nothing waits, but the questions are the same: `.item()`, `.tolist()`, `.cpu()`, `.numpy()`, `bool(tensor)`,
`float(tensor)`, and operators whose result has a size that depends on values. The threads that read data are not
counted: they have CPU tensors by design.
"""

import json
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import distill, tracking

ASKS = {
    "_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "equal",
    "is_same_size", "bincount",
}  # fmt: skip
STEPS: list[Counter[str]] = [Counter()]


def note(what: str) -> None:
    """Counts it for the innermost function of ours, of DeepSpeed or of torch's optimizers."""
    if threading.current_thread() is not threading.main_thread():
        return
    frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
    ours = [f for f in frames if any(part in f.filename for part in ("/pipeline/", "capgap_kernels", "deepspeed/"))]
    where = ours[-1] if ours else frames[-1]
    file = Path(where.filename)
    STEPS[-1][f"{file.parent.name}/{file.stem}.{where.name}: {what}"] += 1


class Questions(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in ASKS or has_mask or (name == "repeat_interleave" and not (kwargs or {}).get("output_size")):
            note(name)
        return func(*args, **(kwargs or {}))


def noting(original: Any, what: str) -> Any:
    def asked(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        note(what)
        return original(self, *args, **kwargs)

    return asked


def main() -> int:
    for name in ("tolist", "cpu", "numpy"):
        setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name), name))
    write = tracking.JsonLines.write

    def at_the_end_of_a_step(self: Any, values: dict[str, Any]) -> None:
        if "digest" in values:  # The ledger has a line per step.
            STEPS.append(Counter())
        write(self, values)

    tracking.JsonLines.write = at_the_end_of_a_step  # type: ignore[method-assign]
    with Questions():
        code = distill.main(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(STEPS))
    return code


if __name__ == "__main__":
    sys.exit(main())
