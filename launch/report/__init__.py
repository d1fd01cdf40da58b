"""Reports for people: ``report.html`` in a run's folder and a table on the terminal."""

from __future__ import annotations

from launch.report.page import write_report
from launch.report.terminal import summary_table

__all__ = ["summary_table", "write_report"]
