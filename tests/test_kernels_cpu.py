"""Compiled loops give the same bits whatever was compiled when, and from whatever is left of the kept machine code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels.cpu import compiled as settings
from kernels.cpu.compiled import cache_folder, compiled

ROOT = Path(__file__).resolve().parents[1]

GOLDEN = {
    "refine": "c75b611cb91c6f9c4ec9b0bf3c31b09393b982c79eac39043dd3f841d2cbdaea",
}
"""Of any processor: each operation is IEEE 754's, in the order of the source."""

_PROBE = """
import hashlib, json, re, sys
import numpy as np
from kernels.cpu import tvl1

F, rng = np.float32, np.random.default_rng(0)

def inner():
    plane, (u, v, w, x, y) = np.ones((9, 7), F), np.ones((5, 90), F)
    tvl1._padded(plane, 2), tvl1._taps(F(0.5), 7), tvl1._repeat_border(u, 8, 9), tvl1._median_of_nine(plane)
    tvl1._project(u, v, w, x, y, F(0.8)), tvl1._advance(u, v, w, (x, x), (y, y), F(0.3))

def refine():
    for height, width, median in ((64, 64, 3), (41, 50, 5)):
        onset = np.random.default_rng(height).uniform(0, 255, (height, width)).astype(F)
        apex, flow = np.roll(onset, 1, 1) + np.sqrt(onset), np.zeros((2, height, width), F)
        tvl1.refine(onset, apex, flow, 5, 60, 5, F(0.01), F(0.25), F(0.15), F(0.3), median)
        digest.update(flow)

digests, code = {}, ""
for name in sys.argv[1:]:
    digest = hashlib.sha256()
    globals()[name]()
    digests[name] = digest.hexdigest()
for loop in (tvl1.refine,):
    if loop.stats.cache_misses:
        code += "".join(loop.inspect_llvm().values()) + "".join(loop.inspect_asm().values())
loose = re.findall(r"\\b(?:fast|reassoc|contract|arcp|afn|nnan|ninf|nsz|llvm\\.fm\\w+|vfn?m(?:add|sub)\\w*)\\b", code)
print(json.dumps({"digests": digests, "compiled": bool(code), "loose": sorted(set(loose))}))
"""


def probe(folder: Path, *steps: str, **environment: str) -> dict:
    """The digests of what a new process computes with machine code in ``folder``."""
    steps = steps or ("refine",)
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, *steps],
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder)} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def left(folder: Path, copy: Path, lost: str) -> Path:
    """Copy the folder without the file that ends in ``lost``, of which a part lies there under another name."""
    shutil.copytree(folder, copy)
    [path] = copy.rglob(f"tvl1.refine*{lost}")
    path.with_name(f"{path.name}.tmp.0123").write_bytes(path.read_bytes()[:999])
    path.unlink()
    return copy


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    """Digests of processes by what they found; computed together, for to compile takes ten seconds of a core."""
    folder, elsewhere = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("elsewhere")
    plain = {"NUMBA_OPT": "0", "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(probe, [folder, folder])
        other = pool.submit(probe, elsewhere / "plain", "inner", "refine", **plain)
        lost = pool.map(probe, [left(folder, elsewhere / end, end) for end in (".nbi", ".nbc")])
        processes = {"first": first, "second": second, "whole": probe(folder), "other": other.result()}
        return processes | dict(zip(("no index", "no code"), lost, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "process",
    [
        pytest.param("first", id="one of two that compile at once"),
        pytest.param("second", id="the other"),
        pytest.param("whole", id="all is kept"),
        pytest.param("no index", id="code is kept without its index"),
        pytest.param("no code", id="an index is kept without its code"),
        pytest.param("other", id="inner functions first, not optimised, any processor"),
    ],
)
def test_every_process_computes_the_same_bits(found, process):
    assert GOLDEN.items() <= found[process]["digests"].items()
    wanted = {"whole": False, "no index": True, "no code": True, "other": True}  # one of the first two is enough
    assert found[process]["compiled"] is wanted.get(process, found[process]["compiled"])


@pytest.mark.slow
def test_no_operation_may_be_fused_or_reordered(found):
    assert not [process["loose"] for process in found.values() if process["loose"]]


def test_other_code_lies_in_another_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folders = {cache_folder("source"), cache_folder("other source")}
    monkeypatch.setitem(settings.SETTINGS, "fastmath", True)
    folders.add(cache_folder("source"))
    monkeypatch.setattr(settings.numba, "__version__", "0.1")
    folders.add(cache_folder("source"))
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path}


def test_without_a_place_loops_are_compiled_and_logged(monkeypatch, caplog, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))

    @compiled
    def tripled(value):
        return 3 * value

    assert tripled(14) == 42
    assert "tripled is compiled anew in every process" in caplog.text


def test_without_a_home_loops_are_compiled_and_logged(monkeypatch, caplog):
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    @compiled
    def doubled(value):
        return 2 * value

    assert doubled(21) == 42
    assert "doubled is compiled anew in every process: no home" in caplog.text
