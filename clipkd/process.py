"""What a command sets up in its process before torch is loaded: the launcher's variables, the allocator."""

import ctypes
import os
import re
import sys


def read_launcher() -> int:
    """Number of processes that a launcher started; srun's variables are taken over under torchrun's names.

    Raises: ValueError if the processes could not find each other, so that each would run as if it were the only one.
    """
    given = os.environ
    if "WORLD_SIZE" not in given and int(given.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        head, first = re.match(r"([^,\[]*)\[?(\d*)", given["SLURM_STEP_NODELIST"]).groups()  # type: ignore[union-attr]
        given |= {"WORLD_SIZE": given["SLURM_STEP_NUM_TASKS"], "RANK": given["SLURM_PROCID"]}
        given |= {"LOCAL_RANK": given["SLURM_LOCALID"], "MASTER_ADDR": given.get("MASTER_ADDR", head + first)}
        given.setdefault("MASTER_PORT", str(20_000 + int(given["SLURM_JOB_ID"]) % 20_000))
        given.setdefault("OMP_NUM_THREADS", given.get("SLURM_CPUS_PER_TASK", "1"))
    if "WORLD_SIZE" not in given and "MASTER_PORT" in given and "ACCELERATE_DYNAMO_MODE" in given:
        raise ValueError(
            "accelerate launch starts one process on CPUs, whatever num_processes says; use torchrun --nproc_per_node N"
        )
    number = int(given.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if number > 1 and missing:
        raise ValueError(f"WORLD_SIZE is {number}, but {', '.join(missing)} missing; start with torchrun, or set all")
    return number


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a process frees: else towers on CPUs spend up to half their time on page faults.

    MALLOC_MMAP_THRESHOLD_ and the like in the environment take precedence. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        trim_threshold, mmap_max = -1, -4  # <malloc.h>
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
