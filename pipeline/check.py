"""`capgap check --config RECIPE`: everything that would stop a run, all at once, before it holds a GPU."""

import argparse

from data_prep.errors import reports_errors
from pipeline.building import build_models, print_plan, require_resources
from pipeline.config import load_run_config
from pipeline.preflight import check_run


@reports_errors
def main(argv: list[str] | None = None) -> int:
    """Checks a recipe as `--ranks` ranks would start it, and prints its plan."""
    parser = argparse.ArgumentParser(prog="capgap check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the recipe; its fields are flags too")
    parser.add_argument("--ranks", type=int, default=1, help="number of processes that the run will have")
    parser.add_argument("--port", type=int, default=29500, help="port that the launcher will use (--master_port)")
    flags, overrides = parser.parse_known_args(argv)
    config = load_run_config(flags.config, overrides)
    checked = check_run(config, flags.ranks, port=flags.port)
    student, teacher = build_models(config, checked)
    require_resources(config, checked, student, teacher, flags.ranks)
    print_plan(config, checked, flags.ranks)
    print("ok: nothing found that would stop this run")
    return 0
