"""The HTML page around the figures, with its style; it loads nothing."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from clipkd.report.figures import escape

STYLE = """
:root { color-scheme: light; } dd, td { white-space: pre-line; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d232b; background: #fafaf8;
  max-width: 1100px; margin: 0 auto; padding: 24px 20px 60px; overflow-wrap: anywhere; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 19px; margin: 38px 0 8px; border-bottom: 1px solid #dcdcd6; }
h3 { font-size: 15px; margin: 0; } p { margin: 4px 0 12px; } .quiet { color: #5f6670; font-size: 13px; }
.banner { border-left: 5px solid #b5433d; background: #fbeceb; padding: 10px 16px; margin: 16px 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 12px 24px; }
.facts div { border-top: 2px solid #dcdcd6; padding-top: 4px; } dt { color: #5f6670; font-size: 13px; } dd { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 18px; margin: 12px 0; }
figure { margin: 0; padding: 12px 14px; background: #fff; border: 1px solid #e4e4de; border-radius: 6px; display: flex;
  flex-direction: column; break-inside: avoid; } figure .quiet { margin: 4px 0 0; }
figure svg { width: 100%; height: auto; overflow: visible; } svg text { font-family: inherit !important; }
figcaption ul { list-style: none; margin: 2px 0 6px; padding: 0; display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 13px; }
figcaption i { display: inline-block; width: 20px; margin-right: 6px; vertical-align: middle; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; background: #fff; min-width: 60%; }
th, td { text-align: left; padding: 5px 12px; border: 1px solid #e4e4de; vertical-align: top; }
th { background: #f1f1ec; white-space: nowrap; } .words td { min-width: 7em; }
.words td:first-child { overflow-wrap: normal; } .words td:last-child:nth-child(4) { min-width: 18em; }
.numbers td:first-child { overflow-wrap: normal; }
.numbers th + th, .numbers td + td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { font-size: 12.5px; line-height: 1.4; background: #fff; border: 1px solid #e4e4de; padding: 12px; white-space: pre-wrap; }
summary { cursor: pointer; margin: 12px 0 8px; } tr { break-inside: avoid; }
@media print { body { background: #fff; max-width: none; padding: 0; } .grid { grid-template-columns: 1fr 1fr; } }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin: 12px 0; }
.thumbs figure { padding: 8px; font-size: 12.5px; }
.thumbs img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f1f1ec; }
.bar { background: linear-gradient(#dfe8f2 0 0) 0 / var(--share) 100% no-repeat; padding: 0 3px; }
.right { color: #147a3d; } .wrong { color: #b3261e; }
"""


def render(folder: Path, body: str) -> str:
    name = escape(folder.resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:"/>
<title>clipkd report: {name}</title><style>{STYLE}</style></head>
<body><h1>{name}</h1><p class="quiet">{escape(folder)}</p>
{body}</body></html>
"""


def section(title: str, text: str, figures: str = "") -> str:
    return f'<h2>{title}</h2>\n{text}<div class="grid">{figures}</div>\n'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "words") -> str:
    lines = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in header)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def plain(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, default=str, ensure_ascii=False)
