"""`clipkd report`: draw a run and results of `clipkd eval` as one HTML page that loads nothing."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from clipkd import files
from clipkd.report import evaluation, page, training


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    run: str
    """A run folder of clipkd train, finished or not, or a results folder of clipkd eval."""
    results: str | None = None
    """Results folder of clipkd eval to show beside the run: cost, calibration, comparison with the teacher."""
    output: str | None = None
    """HTML file to write; null writes report.html into the folder."""


def write_report(config: ReportConfig) -> Path:
    """Write the HTML file, complete or not at all; the same input gives the same bytes.

    Raises: ValueError if there is no such run, nothing is logged yet, or matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("clipkd report needs matplotlib: pip install 'clipkd[report]'") from None
    folder, number = Path(config.run), itertools.count(1)
    found = evaluation.read_results(folder if config.results is None else Path(config.results))
    if config.results is not None and not found:
        raise ValueError(f"{config.results} holds no results (eval_results.jsonl); make them with clipkd eval --output")
    run = None if found and config.results is None else training.read_run(folder)
    output = folder / "report.html" if config.output is None else Path(config.output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name an HTML file with --output")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's style
        # SVG text in the page's font; the salt makes ids depend on the drawing only.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "clipkd", "font.size": 9})
        body = "" if run is None else training.render_run(run, number)
        body += evaluation.render_results(found, number) if found else ""
    files.write_text(output, page.render(folder, body))
    return output
