"""What a command sets up in its process."""

import os
import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys
import numpy as np
from clipkd import process
if sys.argv[1] == "keep":
    process.keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(200):
    np.ones(1 << 17)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_large_blocks_are_faulted_in_once() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def num_faults(mode: str, **more: str) -> int:
        run = [sys.executable, "-c", ALLOCATE, mode]
        return int(subprocess.run(run, env=environment | more, check=True, capture_output=True, text=True).stdout)

    usual = num_faults("usual", MALLOC_MMAP_THRESHOLD_="131072")
    assert num_faults("keep") < usual / 5
    assert num_faults("keep", MALLOC_MMAP_THRESHOLD_="131072") > usual / 2  # the user's own setting stays
