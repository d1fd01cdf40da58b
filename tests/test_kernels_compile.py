"""Every tile in use compiles ahead of time for the cards it is meant for, without spills, within their shared memory.

Compiled in subprocesses without TRITON_INTERPRET, as many as there are cores: one process has the kernels interpreted
or compiled, not both. Nothing is compiled twice: the tests share what they know of a shape, and Triton's cache keeps
the code, so that a second run takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)  # of a cold cache on a machine with other work
PINNED = version("triton").startswith("3.7.")  # what torch pins
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import json, multiprocessing, sys
from dataclasses import asdict
from kernels.local_attention.compile import Case, compile_case

def rows(task):
    case, arch = task
    return [asdict(row) for row in compile_case(Case(**case), [arch])]

with multiprocessing.get_context("fork").Pool(int(sys.argv[1])) as pool:
    for found in pool.imap(rows, json.load(sys.stdin)):
        print(json.dumps(found))
"""
KNOWN: dict = {}
"""Rows by (case, architecture)."""


def run_without_interpreter(command, text=""):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, *command], input=text, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def compile_all(wanted):
    """Rows of (case, architecture) pairs; what no test has asked for yet is compiled."""
    from kernels.local_attention.compile import Resources

    missing = [task for task in dict.fromkeys(wanted) if task not in KNOWN]
    # the longest first, so that no core ends with one: without matrix units every product is unrolled
    missing.sort(key=lambda task: (task[0].dtype != "fp32", -task[0].block_h * task[0].block_w))
    if missing:
        text = json.dumps([(asdict(case), arch) for case, arch in missing])
        lines = run_without_interpreter(["-c", SCRIPT, str(len(os.sched_getaffinity(0)))], text).splitlines()
        for task, line in zip(missing, lines, strict=True):
            KNOWN[task] = [Resources(**row) for row in json.loads(line)]
    return [row for task in wanted for row in KNOWN[task]]


def core(cases):
    from kernels.local_attention.compile import ARCHITECTURES

    return [(case, arch) for case in cases for arch in ARCHITECTURES]


def in_use():
    """Rows of the shapes that the model is run with, and of one whose rows are aligned."""
    from kernels.local_attention.compile import IN_USE, Case

    return compile_all([*core(IN_USE), (Case(block_h=4, block_w=4, head_dim=80), "sm_90")])


def assert_it_fits(rows):
    from kernels.local_attention.compile import ARCHITECTURES, SHARED_LIMIT

    for row in rows:
        # what ptxas makes of it differs from version to version; Triton 3.9 spills in two backwards
        assert not PINNED or (row.spilled == 0 and row.stack == 0), row
        # code for sm_80 runs on the consumer cards sm_86 and sm_89 too, which have the least
        assert row.shared <= SHARED_LIMIT["sm_86" if row.arch == "sm_80" else row.arch], row
    assert {row.arch for row in rows} == set(ARCHITECTURES)


@pytest.mark.slow
def test_no_tile_in_use_spills_or_exceeds_a_card():
    """No tile in use spills or exceeds the shared memory of a card."""
    assert_it_fits(in_use())


def every_tile():
    """A case for each tile that the rule can choose, of the widths that share one the largest.

    But for float32 with more than 32 tokens: 85, and none of over 96, which spills (kernels/README.md).
    """
    from kernels.local_attention.compile import Case

    shapes = [(block, width, "bf16") for block in ((2, 4), (4, 4), (4, 8), (8, 8), (16, 16)) for width in (96, 128)]
    shapes += [(block, width, "fp32") for block in ((2, 4), (4, 4)) for width in (48, 128)]
    shapes += [((4, 8), 48, "fp32"), ((4, 8), 96, "fp32"), ((4, 8), 128, "fp32")]
    shapes += [((16, 16), 85, "fp32")]
    return [Case(block_h=block[0], block_w=block[1], head_dim=width, dtype=dtype) for block, width, dtype in shapes]


def test_the_cases_reach_every_tile_of_the_rule():
    from kernels.local_attention.host import tiling

    def tiles(tokens, head_dim, size):
        for capability in (0, 80, 90, 100):
            for backward in (False, True):
                cut = tiling(tokens, head_dim, size, capability, backward=backward)
                blocks = min(cut.packed, 2)  # to a tile: none is another kernel, one is known to the compiler
                yield size, capability, backward, cut.tile, blocks, cut.warps, cut.registers, cut.late

    sizes = {"bf16": 2, "fp32": 4}
    reached = {
        tile for case in every_tile() for tile in tiles(case.block_h * case.block_w, case.head_dim, sizes[case.dtype])
    }
    shapes = ((tokens, width) for tokens in (*range(2, 80), 256, 1024) for width in range(1, 129))
    missing = {tile for shape in shapes for size in (2, 4) for tile in tiles(*shape, size)} - reached
    # float32 with D over 96 and more than 32 tokens, 8 warps
    assert {(size, slots, warps) for size, _, _, slots, _, warps, _, _ in missing} == {(4, 32, 8), (4, 16, 8)}


def tiles_to_compile():
    """The cases of every tile; two thirds of the time go into the dear ones, each left to one architecture by default.

    float32 has the least room on sm_80, whose code runs on cards with 99 kB of shared memory.
    """
    tasks = core(every_tile())
    if os.environ.get("HTNET_EVERY_TILE") == "1":
        return tasks
    one = {"fp32": "sm_80", "bf16": "sm_90"}
    return [(case, arch) for case, arch in tasks if not dear(case) or arch == one[case.dtype]]


def dear(case):
    tokens = case.block_h * case.block_w
    return tokens >= 64 or (case.dtype == "fp32" and (tokens, case.head_dim) > (8, 48))


@pytest.mark.slow
def test_no_tile_of_the_rule_spills_or_exceeds_a_card():
    """No tile of the rule spills or exceeds the shared memory of a card."""
    assert_it_fits(compile_all(tiles_to_compile()))


@pytest.mark.slow
def test_kernels_use_matrix_units_and_wide_loads():
    """Products of 16 bits run on matrix units, and aligned rows load 16 bytes at once."""
    for row in in_use():
        if row.arch.startswith("sm"):
            assert (row.matrix == "none") == (row.dtype == "fp32"), row
        if row.head_dim == 80:
            assert row.loads.endswith("x128") and " " not in row.loads, row
            assert row.stores.endswith("x128") and " " not in row.stores, row


@pytest.mark.slow
def test_no_access_is_wider_than_the_rows_alignment():
    """One head in blocks of 1 x 2 was read and written two elements at once, from odd places: a GPU refuses that."""
    from kernels.local_attention.compile import Case

    sizes = {"bf16": 16, "fp32": 32}
    cases = [
        Case(block_h=height, block_w=width, head_dim=85, dtype=dtype, num_heads=1, blocks_per_side=2, batch=3)
        for height, width, dtype in ((1, 2, "fp32"), (2, 2, "bf16"), (2, 8, "bf16"))
    ]
    for row in compile_all([(case, "sm_90") for case in cases]):
        widths = [int(part.partition("x")[2]) for part in (*row.loads.split(), *row.stores.split())]
        assert set(widths) == {sizes[row.dtype]}, row


@pytest.mark.slow
@pytest.mark.skipif(not PINNED, reason="the tables are of the Triton that torch pins")
def test_the_table_of_the_readme_is_what_the_command_prints(monkeypatch):
    """With the rows that are known already: of compiling them anew only the time would differ."""
    from kernels.local_attention import compile as command

    compile_all(core(command.IN_USE))
    monkeypatch.setattr(command, "compile_case", lambda case, archs: iter(KNOWN[case, *archs]))
    assert command.readme_table() in (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"), (
        "paste the output of python -m kernels.local_attention.compile into kernels/README.md"
    )


ALONE = """
import json
from kernels.local_attention.compile import ARCHITECTURES, compile_adam, compile_pointwise

print(json.dumps({arch: {"adam fp32": compile_adam(arch, narrow=False, decoupled=False),
                         "adam bf16": compile_adam(arch, narrow=True, decoupled=True),
                         **compile_pointwise(arch, 1024)} for arch in ARCHITECTURES}))
"""


@pytest.mark.slow
def test_optimizer_and_layer_kernels_spill_nowhere():
    """At the widest level of the paper's network; what they read and write is read and written in wide pieces."""
    for arch, needs in json.loads(run_without_interpreter(["-c", ALONE])).items():
        assert len(needs) == 2 + 8
        assert {name: need for name, need in needs.items() if need["stack"] or need["spilled"]} == {}
        wide = {name: need for name, need in needs.items() if name.startswith(("adam", "norm", "add_bias 1"))}
        assert len(wide) == 5
        assert all("x128" in need["stores"] for need in wide.values() if arch.startswith("sm_"))
