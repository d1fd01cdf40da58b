"""Everything that needs a GPU, in one run of under nine minutes: ``make gpu-check``.

Runs from a plain checkout with whatever Python has torch and Triton; nothing is installed. Each step is a process of
its own with a time limit, adds to the output folder as it goes, and cannot keep a later one from running: a whole fold
through ``htnet synth``, ``prepare`` and ``sweep``, four more that share the GPU, eight as graphs in slots, GPU tests,
epochs of training, the kernel benchmarks and the input of folds. What is left out is said with its reason. ``--steps``
chooses some of them. With ``--quick`` the same steps run small and on the CPU, to try this program.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Step", "main", "run_steps"]

ROOT: Final = Path(__file__).resolve().parents[2]
TOTAL_SECONDS: Final = 530.0
PROFILE_NEEDS: Final = ("einops", "rich")
INPUT_NEEDS: Final = ("pydantic", "nvidia.dali", "cv2", "openpyxl", "xlrd", "pyarrow", "matplotlib")
FOLD_NEEDS: Final = (*INPUT_NEEDS[:-1], "av", "einops", "jinja2", "numba", "ray", "rich", "yaml")
FAILED_LAST: Final = ("test_htnet_slots.py", "test_kernels_triton.py", "test_dali_pipelines_frame_flow.py")
"""Tests that come first: they failed on the last GPU, or it never came to them."""
FACTS: Final = """
import platform, shutil, subprocess, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda, platform.platform())
try:
    import triton
    print("triton", triton.__version__)
except ImportError as error:
    print("triton is absent:", error)
found = torch.cuda.is_available()
print("GPU:", torch.cuda.get_device_properties(0) if found else "none")
if shutil.which("nvidia-smi"):
    facts = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    subprocess.run(["nvidia-smi", "--query-gpu=" + facts, "--format=csv"])
sys.exit(0 if found or sys.argv[1:] == ["quick"] else 3)
"""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process: arguments of this Python, seconds it may take, and why it is left out (empty: it runs)."""

    name: str
    arguments: Sequence[str]
    seconds: float
    left_out: str = ""


def run_steps(steps: Sequence[Step], out: Path, *, total: float, say: Callable[[str], None] = print) -> list[str]:
    """Run the steps one after the other within ``total`` seconds; each leaves a log and a line in summary.txt.

    Returns how each ended: ``ok``, ``exit 1``, ``time limit of 2 s``, ``left out: why``.
    """
    end = time.monotonic() + total
    ends = []
    for step in steps:
        begin = time.monotonic()
        allowed = min(step.seconds, end - begin)
        reason = step.left_out or ("the time for all steps is over" if allowed < 1 else "")
        ends.append(f"left out: {reason}" if reason else _run(step, out / f"{step.name}.log", allowed, say))
        line = f"{step.name:<18} {time.monotonic() - begin:6.1f} s  {ends[-1]}"
        say(f"=== {line}")
        with (out / "summary.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return ends


def _run(step: Step, log: Path, seconds: float, say: Callable[[str], None]) -> str:
    """Run one step, its output into ``log``; the end of the log is shown."""
    say(f"=== {step.name}: at most {seconds:.0f} s, output in {log}")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *step.arguments]
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        # a session of its own: at the limit everything that the step has started ends with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            how = {0: "ok"}.get(code := process.wait(timeout=seconds), f"exit {code}")
        except subprocess.TimeoutExpired:
            how = f"time limit of {seconds:.0f} s"
        finally:
            _end(process)
    say(log.read_text(encoding="utf-8", errors="replace")[-4000:])
    return how


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a step's session, politely first."""
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def make_steps(out: Path, *, quick: bool) -> list[Step]:
    """Return the steps in order of worth: a run that is cut short has lost the least."""
    facts = ("-c", FACTS, *(["quick"] if quick else []))
    if quick:
        tests = ("-m", "pytest", "-o", "addopts=", "-q", "tests/test_kernels_reference.py")
        tiny = "--tokens 4 --head-dim 5 --heads 2 --blocks-per-side 2 --batch 2 --rounds 2"
        sizes = "--samples 12 --batch 8 --steps 1 --rounds 1 --train-step"
        return [
            Step(name="machine", arguments=facts, seconds=60),
            Step(name="tests", arguments=tests, seconds=120),
            _profile(out, "kernels", 95, f"attention {tiny} --providers triton,reference,sdpa"),
            _profile(out, "training", 95, "training --tiny --rounds 1", "pydantic"),
            _profile(out, "input", 95, f"input {sizes} --cases plain,augmented,streamed,pictures", *INPUT_NEEDS),
            _profile(out, "input-frames", 95, f"input {sizes} --cases own-flow", *INPUT_NEEDS, "numba"),
            *_fold(out, quick=True),
        ]
    ours, stored = "--providers triton,sdpa", "plain,augmented,streamed,pictures"
    # rivals compute flow of frames on the CPU: a batch of 16 bounds their time, and OpenCV's flow, at half a second a
    # pair, is left to htnet profile input; a process of its own, so that it costs the others nothing
    frames = "--cases own-flow --samples 32 --batch 16 --steps 10"
    return [
        Step(name="machine", arguments=facts, seconds=60),
        *_fold(out, quick=False),
        _gpu_tests(out),
        _profile(out, "training", 40, "training", "pydantic"),
        _profile(out, "kernels-level-0", 80, "attention --cases fine/0,hd/0"),
        # the network pads its heads of 85 to 88 in 16 bits: these are the shapes that it pays for
        _profile(out, "kernels-16x88", 15, f"attention --tokens 16 --head-dim 88 {ours}"),
        _profile(out, "kernels-64x88", 15, f"attention --tokens 64 --head-dim 88 --batch 64 {ours}"),
        _profile(out, "kernels-4-tokens", 15, f"attention --tokens 4 --blocks-per-side 8 {ours}"),
        _profile(out, "kernels-49-tokens", 15, f"attention --tokens 49 --batch 84 {ours}"),
        _profile(out, "input", 50, f"input --cases {stored} --rounds 3 --train-step", *INPUT_NEEDS),
        _profile(out, "kernels-rest", 35, "attention --cases fine/1,fine/2,hd/1,hd/2,paper"),
        _profile(out, "input-frames", 25, f"input {frames} --rounds 3 --train-step", *INPUT_NEEDS, "numba"),
        Step(name="machine-after", arguments=facts, seconds=60),
    ]


def _profile(out: Path, name: str, limit: int, command: str, *needs: str) -> Step:
    """Return a step of ``htnet profile``, whose results go to ``out``."""
    arguments = ("-m", "launch.commands.profiling", *command.split(), "--out", str(out), "--time-limit", str(limit))
    # what has begun at the limit may still be compiled and timed
    return Step(name=name, arguments=arguments, seconds=limit + 25, left_out=_missing((*PROFILE_NEEDS, *needs)))


def _gpu_tests(out: Path) -> Step:
    """Run ``pytest -m gpu`` on the files that know the marker: others may need packages that are not here.

    A failure is in tests-failed.txt as soon as it happened: pytest itself prints the messages at its end.
    """
    marker = re.compile(r"mark\.gpu\b|triton_device")
    files = [path for path in (ROOT / "tests").glob("test_*.py") if marker.search(path.read_text("utf-8"))]
    # some compare with the CPU's flow, which needs Numba; the steps of the input say what is missing
    if _missing((*INPUT_NEEDS, "numba")):
        files = [path for path in files if not path.name.startswith(("test_dali_pipelines", "test_launch"))]
    files.sort(key=lambda path: (path.name not in FAILED_LAST, path.name))
    # the project's own options hold --strict-config, which refuses a machine without pytest-timeout
    arguments = ["-m", "pytest", "-o", "addopts=", "-v", "-m", "gpu", "--continue-on-collection-errors", "--tb=short"]
    arguments += [f"--failures={out / 'tests-failed.txt'}", *(str(path.relative_to(ROOT)) for path in files)]
    if _installed("xdist"):
        # most of the time goes into compiling kernels; a file stays together, and with it the module's fixtures
        workers = str(max(2, min(8, (os.cpu_count() or 2) // 2)))
        arguments += ["-n", workers, "--dist", "loadfile", "--no-loadscope-reorder"]
    return Step(name="tests", arguments=arguments, seconds=240, left_out=_missing(["pytest"]))


def _fold(out: Path, *, quick: bool) -> list[Step]:
    """Synthetic data, a store, and folds through Ray at the paper's size: 440 samples to train on, 10 to test.

    The first has the GPU to itself; then the same run goes on with four folds that share it. Another run takes eight
    folds as graphs in slots.
    """
    left_out = _missing(FOLD_NEEDS)
    engine = "deepspeed" if _installed("deepspeed") else "torch"
    raw, store, run = (out / "fold" / name for name in ("raw", "store", "run"))
    people, clips = (2, 2) if quick else (15, 10)
    sources = ", ".join(f"{{adapter: {name}, root: {raw / name}}}" for name in ("casme2", "samm", "smic"))
    settings = [f"prepare.sources=[{sources}]", f"data.store={store}", "data.subjects=[casme2/sub01]"]
    settings += [f"engine.name={engine}", "engine.precision=bf16", f"train.epochs={1 if quick else 800}"]
    settings += ["resources.checkpoint_minutes=0", "score.bootstrap=10", "score.chance_trials=10"]
    if quick:
        settings += ["resources.gpus_per_fold=0", "model.dim=8", "model.heads=1", "model.depths=[1, 1, 1]"]
    configured = ["configs/paper.yaml", *(part for setting in settings for part in ("--set", setting))]
    program = ("-m", "launch.cli")
    synth = (*program, "synth", str(raw), "--subjects", str(people), "--clips", str(clips))
    sweep = (*program, "sweep", *configured, "--out", str(run))
    five = ", ".join(f"casme2/sub{number:02d}" for number in range(1, 3 if quick else 6))
    shared = (*sweep, "--set", f"data.subjects=[{five}]")
    if not quick:
        shared += ("--set", "resources.gpus_per_fold=0.25")
    eight = ", ".join(f"casme2/sub{number:02d}" for number in range(1, 3 if quick else 9))
    slots = ("engine.name=graphs", f"data.subjects=[{eight}]", f"resources.slots_per_gpu={2 if quick else 8}")
    graphs = (*program, "sweep", *configured, "--out", str(out / "fold" / "graphs"))
    graphs += tuple(part for setting in slots for part in ("--set", setting))
    return [
        Step(name="fold-synth", arguments=synth, seconds=60, left_out=left_out),
        Step(name="fold-prepare", arguments=(*program, "prepare", *configured), seconds=60, left_out=left_out),
        Step(name=f"fold-sweep-{engine}", arguments=sweep, seconds=120, left_out=left_out),
        Step(name="folds-shared", arguments=shared, seconds=120, left_out=left_out),
        Step(name="folds-graphs", arguments=graphs, seconds=120, left_out=left_out),
    ]


def _missing(needs: Sequence[str]) -> str:
    """Return why a step is left out; empty where all of its packages are installed."""
    missing = [name for name in needs if not _installed(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package around it is absent
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when every step that ran ended well, 1 otherwise, 2 where there is no GPU to check."""
    parser = argparse.ArgumentParser(description="Everything that needs a GPU, in one run of under nine minutes.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="the same steps small and on the CPU")
    parser.add_argument("--steps", metavar="NAMES", help="only these, by the start of their names: fold,tests")
    options = parser.parse_args(arguments)
    chosen = [name for name in (options.steps or "").split(",") if name]
    # a new folder each time: results are added to, never mixed with those of another day
    out: Path = options.out.resolve() / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(text, flush=True)

    if not _installed("deepspeed"):
        say("deepspeed is not installed: the fold runs on the torch engine")
    machine, *steps = make_steps(out, quick=options.quick)
    begin = time.monotonic()
    [first] = run_steps([machine], out, total=60, say=say)
    if first == "exit 3":
        say("no CUDA device is visible: nothing to check here; --quick runs the same steps small on the CPU")
        return 2
    steps = [step for step in steps if not chosen or step.name.startswith(tuple(chosen))]
    ends = [first, *run_steps(steps, out, total=TOTAL_SECONDS - (time.monotonic() - begin), say=say)]
    say(f"\nresults in {out}\n" + (out / "summary.txt").read_text(encoding="utf-8"))
    return int(not all(how == "ok" or how.startswith("left out") for how in ends))


if __name__ == "__main__":
    sys.exit(main())
