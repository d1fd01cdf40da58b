"""The house: layers, generated documentation, a README per folder, no machine paths."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from htnet import config_io

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("configs", "dali_pipelines", "docs", "docs/adr", "docs/benchmarks", "htnet", "kernels", "launch", "tests")


def test_rooms_import_only_to_the_right():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_configuration_reference_is_current():
    command = [sys.executable, "-m", "htnet.config_io"]
    generated = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "configs" / "README.md").read_text(encoding="utf-8") == generated


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_shipped_configuration_loads_and_is_listed(name):
    config_io.load_config(ROOT / "configs" / name)
    assert f"`{name}`" in (ROOT / "configs" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_readme_that_names_its_files(room):
    text = (ROOT / room / "README.md").read_text(encoding="utf-8")
    if room in ("dali_pipelines", "launch"):
        for path in (ROOT / room).glob("*.py"):
            assert path.name.startswith("__") or f"`{path.name}`" in text, path


def test_relative_links_in_the_documentation_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *(ROOT / room / "README.md" for room in ROOMS)]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_commands_of_the_readme_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", readme)) <= set(targets)
    from launch.cli import build_parser

    known = build_parser().format_help()
    for command in set(re.findall(r"(?:/|`)htnet ([a-z]+) ", readme)):
        assert command in known, command
