"""Zero-shot evaluation of anything that clipkd can load: tasks, features, metrics, results, comparisons."""

from clipkd.evaluation.embed import Embedder, Precision
from clipkd.evaluation.measure import Measured, measure
from clipkd.evaluation.results import Results, describe_result, result_row
from clipkd.evaluation.tasks import METRICS, Subject, Task, as_tuple, load_task, open_subject, open_subjects

__all__ = [
    "METRICS",
    "Embedder",
    "Measured",
    "Precision",
    "Results",
    "Subject",
    "Task",
    "as_tuple",
    "describe_result",
    "load_task",
    "measure",
    "open_subject",
    "open_subjects",
    "result_row",
]
