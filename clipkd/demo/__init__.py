"""The demo: real pairs from pip packages, a teacher, students, evaluation and export, without hub or GPU."""

from clipkd.demo.pipeline import DemoConfig, run

__all__ = ["DemoConfig", "run"]
