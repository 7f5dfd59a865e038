"""The training loop: Accelerate for devices and processes, everything else in plain sight."""

from pathlib import Path

from clipkd.config.train import TrainConfig
from clipkd.errors import deferred_signals
from clipkd.training.run import open_run


def train(config: TrainConfig) -> Path:
    """Train as configured, on every process that was launched; returns the run folder.

    Raises: ValueError or FileNotFoundError if the configuration cannot work, before anything is written where that is known
        by then; FloatingPointError before the update if loss or gradient is not finite; RunStopped if too much of the data
        is damaged or a loader process dies; Interrupted after SIGINT or SIGTERM, once the current step is saved.
    """
    run = open_run(config)
    with run.lock, deferred_signals() as signals, run.feed, run.recorder:
        if run.due("evaluate"):  # a kill came between this step's checkpoint and its evaluation
            run.evaluate(signals)
        for batch in run.batches():
            metrics = run.step(batch)
            run.record(metrics)
            ending = run.agree(signals)
            if ending or run.due("save"):
                run.save()
            if ending:
                raise ending
            if run.due("evaluate"):
                run.evaluate(signals)
    run.learner.accelerator.end_training()
    return run.folder
