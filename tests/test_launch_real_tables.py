"""The owners' annotation tables and inputs of real users through the command line; skipped where they are absent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from htnet.data.datasets import ADAPTERS
from htnet.data.datasets.schemes import load_scheme
from launch import cli

OFFICIAL = "megc2019/combined_3class_gt.csv"
WORKBOOKS = {
    "CASME2-coding-20140508.xlsx": ("casme2", ["24", "145", "88", "32", "25"], 2),
    "CASME2-coding-20190701.xlsx": ("casme2", ["24", "145", "88", "32", "25"], 5),
    "SAMM_Micro_FACS_Codes_v2.xlsx": ("samm", ["28", "133", "92", "26", "15"], 0),
    "samm_semicolon.csv": ("samm", ["28", "133", "92", "26", "15"], 0),
}


def listed(capsys, *arguments: object) -> list[str]:
    """Lines of ``htnet prepare --list``."""
    capsys.readouterr()
    assert cli.main(["prepare", *map(str, arguments), "--list"]) == 0
    return capsys.readouterr().out.splitlines()


def totals(lines: list[str]) -> list[str]:
    """Subjects, samples and samples of each class, of all datasets together."""
    [line] = [line for line in lines if line.split()[:1] == ["all"]]
    return line.split()[1:]


def with_placeholders(root: Path, adapter: str, workbook: Path) -> Path:
    """A dataset folder of a workbook, each clip's folder with one file; the configuration of it."""
    root.mkdir()
    shutil.copy(workbook, root)
    dataset = ADAPTERS[adapter](root=root, annotations=Path(workbook.name), scheme=load_scheme("7class", []))
    for row in dataset.rows():
        folder = next(iter(dataset.frames_of(row, dataset.sample_of(row))))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.jpg").touch()
    config = root / "c.yaml"
    source = {"adapter": adapter, "root": str(root), "annotations": workbook.name}
    config.write_text(yaml.safe_dump({"prepare": {"sources": [source]}}))
    return config


@pytest.mark.parametrize("name", WORKBOOKS)
def test_the_official_list_gives_the_composite(tmp_path, capsys, shared_data, name):
    adapter, expected, dropped = WORKBOOKS[name]
    workbook, official = shared_data / "annotations" / name, shared_data / OFFICIAL
    if not (workbook.is_file() and official.is_file()):
        pytest.skip(f"{workbook} or {official} not found")
    config = with_placeholders(tmp_path / "raw", adapter, workbook)
    lines = listed(capsys, config, "--set", f"prepare.official_list={official}")
    assert totals(lines) == expected
    assert "official list: agrees" in lines
    assert (f"left out by rule: official_list: {dropped} clips" in lines) == bool(dropped)
    assert not any(line.startswith(("FAILED", "not the composite")) for line in lines)


def test_without_the_list_a_wrong_composite_is_said_aloud(tmp_path, capsys, shared_data):
    workbook = shared_data / "annotations" / "CASME2-coding-20140508.xlsx"
    if not workbook.is_file():
        pytest.skip(f"{workbook} not found")
    lines = listed(capsys, with_placeholders(tmp_path / "raw", "casme2", workbook))
    said = "not the composite of MEGC2019: casme2 147 of 145; only its list says which clips belong to it: "
    assert f"{said}prepare.official_list" in lines
    # every apex that cannot be used is named with its cell
    otherwise = [line for line in lines if line.startswith("read otherwise: ")]
    cell = r"casme2/sub04/EP12_01f: apex_not_coded: apex '/', .*, sheet 'Sheet1', row \d+, column ApexFrame\)"
    assert len(otherwise) == 2
    assert re.search(cell, otherwise[0])
    assert "casme2/sub05/EP09_05f: apex_at_onset: apex '69', onset 69, offset 123" in otherwise[1]
