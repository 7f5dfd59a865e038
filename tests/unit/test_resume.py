"""A run folder belongs to one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipkd.resume import claim

HOLDER = """
import sys, time
from pathlib import Path
from clipkd.resume import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match=rf"is being written by process {holder.pid} on \S+; wait for it"):
            claim(tmp_path)
        holder.kill()
        holder.wait()
        with claim(tmp_path) as held:
            assert Path(held.name) == tmp_path / ".lock"
    claim(tmp_path).close()
