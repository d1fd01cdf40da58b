"""Compile the kernels of a shape ahead of time, without a GPU, and say what each needs of one.

This stands in for a GPU where there is none: a tile that spills, that needs more shared memory than a card has, or that
the compiler refuses, shows here. Triton's interpreter must be off (it checks no shape of a product). ``python -m
kernels.local_attention.compile`` prints the table of kernels/README.md, for the shapes ``IN_USE``; ``htnet profile
attention`` prints any shape for any card.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import pointwise
from kernels.adam import AdamBuffers, AdamLaunch, adam_launch
from kernels.local_attention import host, kernels

__all__ = [
    "ARCHITECTURES",
    "DTYPES",
    "IN_USE",
    "SHARED_LIMIT",
    "Case",
    "Resources",
    "compile_adam",
    "compile_case",
    "compile_pointwise",
    "launches",
]

ARCHITECTURES: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT: Final = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
"""Largest shared memory of one program, bytes. Code for sm_80 runs on sm_86 and sm_89 too, which have less."""

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_BINARIES: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape to compile for: blocks of ``block_h`` x ``block_w`` tokens, A heads of D channels."""

    block_h: int
    block_w: int
    head_dim: int
    dtype: str = "bf16"
    num_heads: int = 3
    blocks_per_side: int = 4
    batch: int = 16


IN_USE: Final = (
    *(Case(block_h=side, block_w=side, head_dim=85) for side in (2, 3, 4, 5, 7, 8, 16)),
    *(Case(block_h=side, block_w=side, head_dim=85, dtype="fp32") for side in (4, 5, 16)),
)
"""Shapes that the model is run with: held to no spill, and shown in kernels/README.md."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Needs of one compiled kernel: ``spilled`` in instructions, ``stack`` in bytes a thread, ``shared`` in bytes."""

    kernel: str
    arch: str
    dtype: str
    tokens: int
    head_dim: int
    tile: int
    packed: int
    warps: int
    registers: int
    stack: int
    spilled: int
    shared: int
    instructions: int
    matrix: str
    loads: str
    stores: str


def launches(case: Case, arch: str) -> tuple[host.Launch, host.Launch]:
    """Forward and backward as the host code would start them, on tensors without memory."""
    side, inner = case.blocks_per_side, case.num_heads * case.head_dim
    shape = (case.batch, case.block_h * side, case.block_w * side)
    qkv = torch.empty(*shape, 3 * inner, dtype=DTYPES[case.dtype], device="meta")
    out, grad_qkv = qkv.new_empty(*shape, inner), torch.empty_like(qkv)
    log_sums = qkv.new_empty(1, dtype=torch.float32)
    capability = int(arch[3:]) if arch.startswith("sm_") else 0
    settings = (case.num_heads, side, case.head_dim**-0.5, capability)
    return (
        host.forward_launch(qkv, out, log_sums, *settings),
        host.backward_launch(out, qkv, out, log_sums, grad_qkv, *settings),
    )


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A kernel that is compiled alone: arguments on the meta device, constants, warps."""

    kernel: Any
    arguments: dict[str, torch.Tensor | int | float]
    constants: dict[str, int]
    warps: int = 4

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "enable_fp_fusion": True}


def _compile(launch: host.Launch | AdamLaunch | _Call, arch: str) -> Any:
    """Triton's compiled kernel; arguments are specialised as at a launch (pointers aligned to 16 bytes)."""
    if kernels.INTERPRETED:
        raise RuntimeError("the kernels were imported for Triton's interpreter; unset TRITON_INTERPRET to compile them")
    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    names |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature: dict[str, str] = {}
    constants: dict[str, int] = dict(launch.constants)
    aligned = []
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor):
            signature[name] = names[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [name] * (value % 16 == 0)
    signature |= dict.fromkeys(launch.constants, "constexpr")
    order = list(launch.kernel.arg_names)
    source = ASTSource(
        fn=launch.kernel,
        signature={name: signature[name] for name in order},
        constexprs={(order.index(name),): value for name, value in constants.items()},
        attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=ARCHITECTURES[arch], options=launch.options())


def compile_case(case: Case, archs: Iterable[str] = ("sm_80", "sm_90", "sm_100")) -> Iterator[Resources]:
    """Compile forward and backward of a shape for each architecture."""
    for arch in archs:
        for launch in launches(case, arch):
            yield _resources(launch, case, arch)


def compile_adam(arch: str, *, narrow: bool, decoupled: bool) -> dict[str, Any]:
    """Compile a step of :mod:`kernels.adam`; return what it needs, by the names of :class:`Resources`."""
    buffers = AdamBuffers.of([1000], [0.1], narrow=narrow, device=torch.device("meta"))
    number = torch.empty(1, dtype=torch.int64, device="meta")
    rates, clip = (torch.empty(size, device="meta") for size in (4, 1))
    settings: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "decoupled": decoupled}
    compiled = _compile(adam_launch(buffers, number, rates, clip, **settings), arch)
    return _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)


def compile_pointwise(arch: str, channels: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Any]]:
    """Compile the kernels of :mod:`kernels.pointwise` for maps of C channels; needs as of :func:`compile_adam`."""
    x, bias = (torch.empty(size, dtype=dtype, device="meta") for size in (256 * channels, channels))
    single, places = (torch.empty(256, dtype=kind, device="meta") for kind in (torch.float32, torch.int64))
    rows: dict[str, torch.Tensor | int | float] = {"rows": 256, "columns": channels}
    tile = {"TILE": 8, "COLUMNS": pointwise.WIDTH}
    forward = {"x": x, "delta": x, "bias": bias}
    norm = {"gain": bias, "means": single, "scales": single, "total": x}
    half = {"out_height": 2, "out_width": 2, "channels": channels}
    calls = [
        _Call(
            kernel=pointwise.norm_forward,
            arguments={**forward, **norm, "shift": bias, "normed": x, **rows, "eps": 1e-5},
            constants=pointwise.row_tile(channels, 1024),
        ),
        _Call(
            kernel=pointwise.norm_backward,
            arguments={"grad_total": x, "grad_normed": x, **norm, "grad": x, "sums": single, **rows, "tiles": 2},
            constants=pointwise.row_tile(channels, 2048),
        ),
        _Call(
            kernel=pointwise.sum_programs,
            arguments={"sums": single, "out": bias, "programs": 128, "columns": channels},
            constants={"TILE": 32, "COLUMNS": 64},
        ),
        _Call(
            kernel=pointwise.pool_backward,
            arguments={"grad_out": x, "places": places, "grad": x, "height": 4, "width": 4, **half},
            constants={"COLUMNS": pointwise.WIDTH},
            warps=2,
        ),
    ]
    for gelu in (0, 1):
        calls.append(
            _Call(kernel=pointwise.add_bias, arguments={**forward, "out": x, **rows}, constants={"GELU": gelu, **tile})
        )
        gradient = {"grad_out": x, "delta": x, "bias": bias, "grad": x, "sums": single, **rows}
        constants = {"GELU": gelu, **tile, "TILE": pointwise.ROWS}
        calls.append(_Call(kernel=pointwise.add_bias_backward, arguments=gradient, constants=constants, warps=8))
    read = _amd if arch.startswith("gfx") else _nvidia
    return {
        f"{call.kernel.__name__} {call.constants.get('GELU', '')}".strip(): read(_compile(call, arch)) for call in calls
    }


def _resources(launch: host.Launch, case: Case, arch: str) -> Resources:
    """Compile one launch of a shape and read off what it needs."""
    compiled = _compile(launch, arch)
    return Resources(
        kernel=launch.kernel.__name__,
        arch=arch,
        dtype=case.dtype,
        tokens=case.block_h * case.block_w,
        head_dim=case.head_dim,
        tile=launch.tiling.tile,
        packed=launch.tiling.packed,
        warps=launch.tiling.warps,
        shared=compiled.metadata.shared,
        **(_amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)),
    )


def _nvidia(compiled: Any) -> dict[str, Any]:
    """Registers, stack and spills as ptxas reports them, and counts from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin)
        code = _tool("nvdisasm", "-c", cubin)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    operations = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE))
    spills = sum(count for name, count in operations.items() if name.split(".")[0] in ("LDL", "STL"))
    kinds = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "QGMMA")
    matrix = {kind: sum(n for name, n in operations.items() if name.split(".")[0] == kind) for kind in kinds}
    return {
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "spilled": spills,
        "instructions": sum(operations.values()),
        "matrix": " ".join(f"{count} {kind}" for kind, count in matrix.items() if count) or "none",
        "loads": _widths(operations, "LDG"),
        "stores": _widths(operations, "STG"),
    }


def _widths(operations: Counter[str], prefix: str) -> str:
    widths: Counter[int] = Counter()
    for name, count in operations.items():
        parts = name.split(".")
        if parts[0] == prefix:
            width = next((w for w in (128, 64, 16, 8) if any(p in (str(w), f"U{w}", f"S{w}") for p in parts)), 32)
            widths[width] += count
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items()))


def _amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"{re.escape(key)}:\s+(\d+)", code)
        return int(found[1]) if found else 0

    return {
        "registers": number(".vgpr_count"),
        "stack": number("ScratchSize"),
        "spilled": number(".vgpr_spill_count") + number(".sgpr_spill_count"),
        "instructions": len(re.findall(r"^\t[vs]_|^\tglobal_|^\tds_|^\tbuffer_", code, re.MULTILINE)),
        "matrix": str(len(re.findall(r"^\tv_mfma", code, re.MULTILINE))) + " MFMA",
        "loads": "",
        "stores": "",
    }


def _tool(name: str, *arguments: object) -> str:
    command = [str(_BINARIES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def readme_table() -> str:
    """Return the table of kernels/README.md: a line per shape and pass, a column per architecture."""
    lines = [("dtype, N, pass", "blocks", *ARCHITECTURES), ("---",) * (2 + len(ARCHITECTURES))]
    for case in IN_USE:
        rows = {arch: list(compile_case(case, (arch,))) for arch in ARCHITECTURES}
        for number, way in enumerate(("forward", "backward")):
            passes = [rows[arch][number] for arch in ARCHITECTURES]
            name = f"{case.dtype} {passes[0].tokens} {way}"
            lines.append((name, str(passes[0].packed or "-"), *map(_needs, passes)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _needs(row: Resources) -> str:
    spills = f", stack {row.stack}" if row.stack or row.spilled else ""
    return f"{row.tile} x {row.warps}: {row.registers} / {row.shared:,}{spills}"


if __name__ == "__main__":
    print(readme_table())
