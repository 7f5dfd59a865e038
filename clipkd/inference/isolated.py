"""Parts of clipkd in processes of their own, so that what crashes there is told here."""

import signal
import sys
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """Runs `main` of a module of this very package. Nothing is imported from the folder that one stands in (-P)."""
    root = str(Path(__file__).parents[1])
    code = f"""
import sys
sys.path.append({root!r})
try:
    from {module} import main
    main()
except KeyboardInterrupt:
    sys.exit(130)
"""
    return [sys.executable, "-P", "-c", code, *arguments]


def describe_end(code: int) -> str:
    """How a process ended that should have ended otherwise."""
    if code >= 0:
        return f"its process ended with status {code}"
    name = signal.Signals(-code).name
    return f"its process died of {name}" + (" (out of memory, most often)" if name == "SIGKILL" else "")
