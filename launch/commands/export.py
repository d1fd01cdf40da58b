"""``htnet export``: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from htnet.errors import EXIT_DONE
from htnet.export import ExportFormat, export_model
from htnet.model_folder import load_model
from launch.screen import say

__all__ = ["export"]


def export(model: Path, kind: ExportFormat, out: Path, console: Console) -> int:
    """Write the model in a format of other programs; returns the exit code."""
    path = export_model(load_model(model), kind, out)
    say(console, f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return EXIT_DONE
