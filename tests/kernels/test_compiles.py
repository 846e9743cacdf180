"""Every Triton kernel compiles for Ampere and Hopper on a machine without either, its values in registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
REPORT = REPOSITORY / "kernels/benchmarks/compile_report.py"
PACKAGE = REPOSITORY / "kernels/capgap_kernels"
HALF_PRECISION = ["encoder_experts", "routers", "permute_and_combine", "relation_losses", "vocabulary_losses"]


def compiled(path: Path, names: list[str], *options: str) -> list[dict]:
    # A process of its own: in this one Triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, REPORT, *names, "--json", path, *options],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": str(PACKAGE.parent)},
    )
    return json.loads(path.read_text())


def kernels_of_the_package() -> set[str]:
    sources = "".join(path.read_text() for path in PACKAGE.glob("*_triton.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


def test_every_kernel_compiles_for_both_architectures_without_spilling_on_hopper(tmp_path):
    rows = compiled(tmp_path / "both.json", HALF_PRECISION)
    rows += compiled(tmp_path / "hopper.json", ["decoder_experts"], "--architectures", "90")
    for architecture in (80, 90):
        assert {row["kernel"] for row in rows if row["architecture"] == architecture} == kernels_of_the_package()
    spilled = {(row["kernel"], row["config"]): row["spilled"] for row in rows if row["architecture"] == 90}
    assert max(spilled.values()) <= 16, spilled
    for row in rows:
        if row["kernel"] in ("expand_kernel", "contract_kernel", "expand_backward_kernel", "weight_gradient_kernel"):
            assert row["matrix_instruction"] == {80: "mma", 90: "wgmma"}[row["architecture"]], row


@pytest.mark.slow
def test_every_tuning_configuration_compiles(tmp_path):
    launches = {"encoder_experts": 2 * 11, "decoder_experts": 2 * 15, "float32_experts": 2 * 11}
    for call, at_least in launches.items():
        assert len(compiled(tmp_path / f"{call}.json", [call], "--every-config")) >= at_least
