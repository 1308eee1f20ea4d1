"""The report as one HTML page that needs nothing else: no script, no font, no image, no network."""

from __future__ import annotations

import collections
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from symmpatterns.report import Record, Report

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; --good: #1a7f37; --left: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --left: #d4a72c; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.numbers { display: flex; gap: 2.5rem; } .numbers b { display: block; font-size: 2rem; line-height: 1.2; }
.good b { color: var(--good); } .left b { color: var(--left); }
.note { border-left: 4px solid var(--left); background: var(--soft); padding: .5rem .8rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td.n, th.n { text-align: right; }
td:not(.reason, .detail) { white-space: nowrap; } td.reason { min-width: 18rem; }
code { font: .92em ui-monospace, monospace; } footer { margin-top: 2rem; opacity: .7; font-size: .85rem; }
""".strip()

_REWRITTEN = (
    ("strategy", "strategy"),
    ("producer", "producer"),
    ("now in the graph", "replacement"),
    ("detail", "detail"),
)
_DECLINED = (("producer", "producer"), ("code", "code"), ("reason", "reason"))


def render(report: Report) -> str:
    """The page as text. Equal records are one row with their count; everything from a program is escaped."""
    rewrites, declined = report.rewrites, report.declined
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>symmpatterns: {len(rewrites)} rewritten, {len(declined)} declined</title>",
        f"<style>\n{_STYLE}\n</style></head><body>",
        "<h1>symmpatterns report</h1>",
        '<div class="numbers">',
        f'<div class="good"><b>{len(rewrites)}</b>rewritten</div>',
        f'<div class="left"><b>{len(declined)}</b>left as they were</div>',
        "</div>",
        *(f'<p class="note">{escape(note)}</p>' for note in report.notes),
        *_section("Rewritten collectives", rewrites, _REWRITTEN),
        *_section("Declined collectives", declined, _DECLINED),
    ]
    if not report.records:
        parts.append("<p>No graph with a collective has been compiled in this process.</p>")
    parts.append(f"<footer>torch {escape(torch.__version__)}</footer></body></html>")
    return "\n".join(parts) + "\n"


def _section(title: str, records: list[Record], columns: tuple[tuple[str, str], ...]) -> list[str]:
    if not records:
        return []
    shown = [(head, name) for head, name in columns if any(getattr(record, name) for record in records)]
    heads = ["collective", "shape", "dtype", "group", "ranks", *(head for head, _ in shown)]
    lines = [f"<h2>{escape(title)}</h2>", '<div class="wide"><table>']
    lines.append(
        '<thead><tr><th class="n">count</th>' + "".join(f"<th>{escape(h)}</th>" for h in heads) + "</tr></thead>"
    )
    lines.append("<tbody>")
    # A graph from the cache is the same to the reader as one that was compiled here.
    for record, count in collections.Counter(replace(r, from_cache=False) for r in records).items():
        collective = f"{record.collective} {record.op}" if record.op else record.collective
        dtype = str(record.dtype).removeprefix("torch.")
        shape = " × ".join(map(str, record.shape)) or "scalar"
        cells = [f'<td class="n">{count}</td>']
        cells += [f"<td>{escape(str(text))}</td>" for text in (collective, shape, dtype)]
        cells += [f"<td>{escape(str(text))}</td>" for text in (record.group_name, record.world_size)]
        for _, name in shown:
            text = escape(str(getattr(record, name) or "–"))
            is_name = name in ("producer", "replacement", "code")
            cells.append(f'<td class="{name}">{f"<code>{text}</code>" if is_name else text}</td>')
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return [*lines, "</tbody></table></div>"]
