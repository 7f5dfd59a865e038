"""How a subprocess ended."""

import signal
import sys
from pathlib import Path

import pytest

from clipkd.inference import bench
from clipkd.inference.isolated import run_module


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -KILL $$", "its process died of SIGKILL (usually out of memory)"),
        ("kill -SEGV $$", "its process died of SIGSEGV"),
        ("exit 3", "its process ended with status 3"),
        ("echo one >&2; echo ValueError: two >&2; exit 1", "ValueError: two"),
    ],
)
def test_the_end_of_a_subprocess_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{script}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    assert bench.measure_isolated({}) == reason
    interpreter.write_text(f"#!/bin/sh\nkill -{int(signal.SIGINT)} $$\n")
    with pytest.raises(KeyboardInterrupt):
        run_module("clipkd.inference.measure")
