"""The errors that a user can cause or mend: one line each, with an exit code that a scheduler can read."""

import sys
from collections.abc import Callable
from functools import wraps


class CapgapError(Exception):
    """A fault with a known mend. The message reads `what failed: file or key (value) - why - how to mend`."""

    exit_code = 1


class ConfigError(CapgapError):
    """A recipe, flag or ds_config that cannot be run as written."""

    exit_code = 2


class DataError(CapgapError):
    """A source, shard, tokenizer or task file that is missing, damaged or does not fit."""

    exit_code = 3


class CheckpointError(CapgapError):
    """A checkpoint that is missing, damaged or belongs to another run."""

    exit_code = 4


class NumericsError(CapgapError):
    """Losses or gradients that stayed non-finite."""

    exit_code = 5


def reports_errors(job: Callable[..., int]) -> Callable[..., int]:
    """Wraps a job's `main` so that a user's mistake prints one line and returns its exit code, without a traceback."""

    @wraps(job)
    def main(argv: list[str] | None = None) -> int:
        try:
            return job(argv)
        except CapgapError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code

    return main
