"""The README's table from the demo's results: python scripts/results_table.py eval/results/demo.jsonl"""

import json
import sys
from pathlib import Path

STYLES = ("noto", "fluent")


def table(path: Path) -> str:
    """Markdown, one line per trained model, in the order of the file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    trained = {(row["model"], row["dataset"]): row for row in rows if "training_seconds" in row}
    headings = ["model", "image MACs", "text params", *(f"{style} top-{k}" for style in STYLES for k in (1, 5))]
    headings += ["n", "steps", "seconds"]
    lines = ["| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1)]
    for model in dict.fromkeys(model for model, _ in trained):
        row = trained[model, STYLES[0]]
        cells = [model, f"{row['cost']['macs']['image'] / 1e6:.0f}M", f"{row['parameters']['text'] / 1e6:.1f}M"]
        cells += [f"{100 * trained[model, style]['metrics'][key]:.1f}" for style in STYLES for key in ("acc1", "acc5")]
        cells += [str(row["n"]), str(row["step"]), f"{row['training_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(table(Path(sys.argv[1])))
