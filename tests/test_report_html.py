"""The report as a page: complete, self-contained, and safe whatever names a program uses."""

from __future__ import annotations

import html.parser
import tempfile
import unittest
from pathlib import Path

import torch

import symmpatterns
from symmpatterns.report import Record, Report
from symmpatterns.report_html import render

_VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Page(html.parser.HTMLParser):
    """The texts of a page; fails when tags do not nest or something would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe"), tag
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs), attrs
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data


def _record(**changes: object) -> Record:
    fields: dict = {
        "family": "matmul_all_reduce",
        "collective": "all_reduce",
        "strategy": "template",
        "op": "sum",
        "shape": (64, "s0"),
        "dtype": torch.bfloat16,
        "group_name": "tp",
        "world_size": 2,
        "producer": "aten.mm",
        "replacement": "symmpatterns.matmul_all_reduce",
    }
    return Record(**{**fields, **changes})


class ReportHtmlTest(unittest.TestCase):
    def test_rows_and_counts(self) -> None:
        declined = _record(
            strategy=None, replacement=None, code="several_hosts", reason="its group spans several hosts"
        )
        page = _Page(render(Report([_record(), _record(from_cache=True), declined])))
        expected = ["2", "all_reduce sum", "64 × s0", "bfloat16", "tp", "2", "template", "aten.mm"]
        self.assertEqual(page.cells[:9], [*expected, "symmpatterns.matmul_all_reduce"])
        self.assertEqual(page.cells[-2:], ["several_hosts", "its group spans several hosts"])
        self.assertIn("symmpatterns: 2 rewritten, 1 declined", page.texts)

    def test_text_of_the_program_is_escaped(self) -> None:
        nasty = '<script>alert("x")</script>&amp;'
        report = Report([_record(group_name=nasty, producer=nasty)], notes=[nasty])
        page = _Page(render(report))  # would fail on a script tag
        self.assertEqual(page.cells.count(nasty), 2)
        self.assertIn(nasty, page.texts)

    def test_empty(self) -> None:
        page = _Page(render(Report()))
        self.assertIn("No graph with a collective has been compiled in this process.", page.texts)

    def test_save(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "report.html"
            symmpatterns.report().save(str(path))
            self.assertTrue(path.read_text(encoding="utf-8").startswith("<!doctype html>"))
