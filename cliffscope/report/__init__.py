"""Stored results in, one offline HTML page out."""

from cliffscope.report.page import write_report

__all__ = ["write_report"]
