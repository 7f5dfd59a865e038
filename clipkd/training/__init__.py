"""One training run: parts, loop, checkpoints, resume."""
