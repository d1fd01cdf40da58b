"""The one reader of the machine: commit, versions, processor and card, none of which may be there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kernels import machine
from kernels.machine import card_facts, checkout, commit, emulates_bf16, package_version, package_versions


def test_the_commit_is_that_of_a_checkout(tmp_path, monkeypatch):
    def git(*command):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "kernels" / "machine.py"))
    assert (checkout(), commit()) == ({}, "unknown")
    git("init")
    (tmp_path / "file").write_text("1")
    assert checkout() == {}  # no commit yet
    git("add", "file")
    git("commit", "-m", "why")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert (checkout(), commit()) == ({"commit": head, "modified": False}, head[:7])
    (tmp_path / "file").write_text("2")
    assert (checkout(), commit()) == ({"commit": head, "modified": True}, f"{head[:7]}-dirty")
    monkeypatch.setenv("PATH", "")
    assert checkout() == {}


def test_an_absent_package_has_no_version_and_raises_nothing():
    assert package_version("no-such-package-of-anybody") is None
    assert package_version("torch") == torch.__version__
    assert package_versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("facts", "emulated"),
    [
        ({"flags": "fpu avx512f avx512_bf16"}, False),
        ({"flags": "fpu amx_bf16"}, False),
        ({"Features": "fp asimd bf16"}, False),
        ({"flags": "fpu avx512f avx512bw"}, True),
        ({}, True),
    ],
)
def test_bf16_is_emulated_without_its_instructions(monkeypatch, facts, emulated):
    monkeypatch.setattr(machine, "cpu_facts", lambda: facts)
    assert emulates_bf16() is emulated


def test_a_processor_is_no_card():
    assert card_facts(torch.device("cpu")) == {}


@pytest.mark.gpu
def test_a_card_says_its_name_and_the_versions_of_its_libraries():
    assert {"name", "capability", "uuid", "driver", "cuda", "cudnn"} <= set(card_facts(torch.device("cuda")))


def test_facts_are_read_without_torch():
    """The driver of a sweep reads them, and starts in a fraction of the time that torch takes to be imported."""
    script = "import sys, kernels.machine as m; m.package_versions(), m.cpu_name(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("first", ["kernels.local_attention.checks", "kernels.machine", "htnet.model"])
def test_public_functions_are_there_after_any_first_import(first):
    """The function ``local_attention`` has the name of the sub-package that holds it."""
    script = (
        f"import {first}; from kernels import local_attention as a, local_attention_block as b; a.__call__, b.__call__"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
