"""Which process this is and where it meets the others, from the launcher's environment, without importing torch."""

import errno
import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Rank, rank on its node, number of ranks, and who started them."""

    rank: int
    local_rank: int
    world_size: int
    launcher: str


def place_from_environment() -> Place:
    """The place that `deepspeed`, `torchrun` or `srun` gave this process; alone if none did."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Place(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"]), "environment")
    # SLURM_PROCID is also set in a batch script that calls python directly: only a step started by srun has tasks.
    if under_srun() and int(env.get("SLURM_NTASKS", env.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        return Place(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), size, "slurm")
    return Place(0, 0, 1, "none")


def under_srun() -> bool:
    """Whether srun started this process, which kills all ranks of a step as soon as one exits with a code."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ


def port_of_launcher() -> int | None:
    """The port at which the launcher told the ranks to meet; None under torchrun, which listens there for its ranks."""
    port = os.environ.get("MASTER_PORT")
    return None if port is None or "TORCHELASTIC_RUN_ID" in os.environ else int(port)


def is_taken(port: int) -> bool:
    """Whether somebody on this machine listens at the port already."""
    with socket.socket() as probe:
        # What a run before left in TIME_WAIT is no obstacle, neither here nor to the ranks.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
