"""Run a clipkd module in a subprocess and describe how it ended."""

import signal
import subprocess
import sys
from pathlib import Path


def run_module(
    module: str, *arguments: str, environment: dict[str, str] | None = None, capture: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `main` of a module of this package; -P keeps it from importing anything from the current folder.

    environment: in place of this process's. capture: return stdout and stderr instead of passing them on.
    Raises: KeyboardInterrupt if SIGINT ended the subprocess.
    """
    root = str(Path(__file__).parents[2])
    code = f"""
import sys
sys.path.append({root!r})
try:
    from {module} import main
    main()
except KeyboardInterrupt:
    sys.exit(130)
"""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=capture, text=True, errors="replace")
    if done.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    return done


def describe_exit(code: int) -> str:
    """The exit status or the signal that ended a subprocess."""
    if code >= 0:
        return f"its process ended with status {code}"
    name = signal.Signals(-code).name
    return f"its process died of {name}" + (" (usually out of memory)" if name == "SIGKILL" else "")
