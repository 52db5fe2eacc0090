"""A process's place in its job, from the variables of torchrun, srun, mpirun or a script.

The variables of torchrun and of scripts take precedence over all others, since srun may have
started torchrun; those of mpirun over those of srun, with which mpirun starts its daemons.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

# Variables of torchrun and of scripts.
PLAIN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Variables with a task's number, the number of tasks, and the task's number on its host.
# SLURM_NTASKS is not used: the script of sbatch has it too, and is not one of the tasks.
TASKS = {
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
# Variables that have the same value in all tasks of a job, and another value in other jobs.
JOBS = {"mpirun": ("PMIX_NAMESPACE",), "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID")}
# Variables with the number of tasks of launchers that are refused -> variable that only tasks have.
OTHER_TASKS = {
    "SLURM_NTASKS": "SLURM_PROCID",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_SIZE",
    "PMI_SIZE": "PMI_SIZE",
}
PORTS = range(61440, 65536)  # above those that Linux assigns by itself
HOW_TO_START = (
    "start one torchrun on each host, or srun, or mpirun of Open MPI, or let your launcher set "
    "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process (docs/scaling.md); "
    "for a single process set WORLD_SIZE=1"
)


@dataclass(frozen=True)
class Launch:
    """How this process was started; by default alone, without a launcher.

    Attributes:
        launcher: "torchrun", "srun", "mpirun", or "script" for one that sets `PLAIN`; "": none.
        rank: number of this process, from 0.
        world: number of processes.
        local_rank: number of this process among those of its host.
        address: host where the processes meet; except with torchrun, the host of rank 0.
        port: TCP port there.
    """

    launcher: str = ""
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


def read(environment: Mapping[str, str]) -> Launch:
    """The launch that the variables of `environment` describe.

    Raises ValueError, which says how to start, where the variables contradict each other, or where
    several tasks are not told where they meet: each would take itself for the only process, and all
    would write the same run.
    """
    values = {name: value for name, value in environment.items() if value}
    if values.keys() & {"RANK", "WORLD_SIZE"}:
        launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in values else "script"
        if values.get("WORLD_SIZE") == "1" and values.get("RANK", "0") == "0":
            return Launch("torchrun" if launcher == "torchrun" else "")
        return _checked(launcher, {name: values.get(name, "") for name in PLAIN})
    for launcher, names in TASKS.items():
        if values.get(names[1], "1") == "1":
            continue
        where = {"MASTER_ADDR": _address(launcher, values), "MASTER_PORT": _port(launcher, values)}
        stated = {name: values[name] for name in where if name in values}
        return _checked(launcher, {name: values.get(name, "") for name in names} | where | stated)
    for name, only_of_tasks in OTHER_TASKS.items():
        number = values.get(name, "1") if only_of_tasks in values else "1"
        if number != "1":
            raise ValueError(
                f"{name}={number}, but RANK and WORLD_SIZE are not set, so that each of {number} "
                f"tasks would take itself for the only process: {HOW_TO_START}"
            )
    return Launch()


def rank() -> int:
    """Number of this process; also 0 where the variables are wrong, which `read` reports."""
    try:
        return read(os.environ).rank
    except ValueError:
        return 0


def _checked(launcher: str, values: dict[str, str]) -> Launch:
    """The launch with the `values` of rank, world, local rank, address and port, in this order."""
    words = ", ".join(f"{name}={value}" for name, value in values.items() if value)
    if missing := [name for name, value in values.items() if not value]:
        raise ValueError(f"{words} without {', '.join(missing)}: {HOW_TO_START}")
    *numbers, address, port = values.values()
    if all(map(str.isdecimal, (*numbers, port))):
        rank, world, local_rank = map(int, numbers)
        if max(rank, local_rank) < world and 0 < int(port) < 2**16:
            return Launch(launcher, rank, world, local_rank, address, int(port))
    raise ValueError(f"{words} contradict each other: {HOW_TO_START}")


def _address(launcher: str, values: Mapping[str, str]) -> str:
    """Host of rank 0; '' where the launcher does not tell it."""
    if launcher == "srun":
        nodes = values.get("SLURM_STEP_NODELIST") or values.get("SLURM_JOB_NODELIST", "")
        return _first_host(nodes)
    sizes = values.get("OMPI_COMM_WORLD_LOCAL_SIZE"), values.get("OMPI_COMM_WORLD_SIZE")
    return "127.0.0.1" if sizes[0] == sizes[1] else ""


def _first_host(nodes: str) -> str:
    """The first host in a list of Slurm, such as 'gpu[07-09,12],login'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _port(launcher: str, values: Mapping[str, str]) -> str:
    """A port on which all tasks of a job agree, and which another job is unlikely to have."""
    job = ".".join(values.get(name, "") for name in JOBS[launcher])
    return str(PORTS[zlib.crc32(job.encode()) % len(PORTS)])
