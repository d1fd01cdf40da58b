"""Command ``htnet profile``: the speed that this machine reaches, a sub-command per benchmark. Needs no data.

``python -m launch.commands.profiling`` also runs without the packages for data and clusters.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from htnet.errors import EXIT_BAD_INPUT, InputError

__all__ = ["BENCHMARKS", "add_arguments", "main", "profile"]


@dataclass(frozen=True)
class Benchmark:
    """Sub-command; ``launch.benchmarks.<module>`` is imported when it runs, so that the parser stays fast."""

    module: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a sub-command per benchmark, each with its own options."""
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        own = commands.add_parser(name, help=benchmark.help, description=benchmark.help)
        own.add_argument("--out", type=Path, metavar="DIR", help="append results there (default: print)")
        own.add_argument("--time-limit", type=float, metavar="SECONDS", help="begin nothing more after so long")
        own.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
        benchmark.add_arguments(own)


def profile(options: argparse.Namespace, console: Console) -> int:
    """Run the benchmark that the options ask for; return the exit code.

    Raises:
        InputError: an option has an impossible value, or results cannot be written to the place asked for.
    """
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0 and name != "seed":
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value:g}")
    module = importlib.import_module(f"launch.benchmarks.{BENCHMARKS[options.benchmark].module}")
    code: int = module.run(options, console)
    return code


def _add_attention(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", metavar="A,B", help="paper, fine, hd, or one level as fine/0 (default: all)")
    add("--providers", metavar="A,B", help="ways to compute it; --dry-run lists them (default: all)")
    add("--modes", metavar="A,B", help="forward, backward, both (default: all)")
    add("--rounds", type=int, help="samples per timing (default: 50 on a GPU, 5 on a CPU)")
    add("--card", default="h200", help="whose floors are shown: a100, h100, h200, b200 (default h200)")
    add("--batch", type=int, metavar="N", help="samples (default: 256 on a GPU, 2 on a CPU)")
    add("--dtype", help="bf16, fp16 or fp32 (default: bf16 on a GPU, fp32 on a CPU)")
    shape = parser.add_argument_group("a shape of its own, in place of cases")
    shape.add_argument("--tokens", metavar="N", help="of a block: 16, or 2x8 for one that is not square")
    for name in ("heads", "head-dim", "blocks-per-side", "dim"):
        shape.add_argument(f"--{name}", type=int, metavar="N")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="epochs timed (default: 20 on a GPU, 3 on a CPU)")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand weights, to try the program")


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", metavar="A,B", help="ways to feed a fold; --dry-run lists them (default: all)")
    add("--rounds", type=int, default=10, help="timings of each provider (default 10)")
    add("--samples", type=int, default=442, help="samples of the set (default 442)")
    add("--size", type=int, default=28, metavar="PX", help="side of the flow images (default 28)")
    add("--batch", type=int, default=256, help="samples of a batch (default 256)")
    add("--steps", type=int, default=20, help="batches of a timing, at least (default 20)")
    add("--train-step", action="store_true", help="measure the share of waiting in a step, too")


def _add_end_to_end(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--providers", metavar="A;B", help="ways beside upstream's, separated by semicolons; --dry-run lists them")
    add("--rounds", type=int, default=5, help="epochs timed of each (default 5)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")


def _add_flow(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="rounds of each provider (default 5)")
    add("--pairs", type=int, default=64, help="pairs of a round for ours (default 64)")
    add("--side", type=int, default=128, metavar="PX", help="side of the crops (default 128)")
    add("--threads", type=int, default=2, help="CPU threads (default 2)")


def _add_sizes(parser: argparse.ArgumentParser, *, subjects: int, clips: int) -> None:
    """Add the sizes of ``htnet synth``."""
    add = parser.add_argument
    add("--subjects", type=int, default=subjects, help=f"subjects of each layout (default {subjects})")
    add("--clips", type=int, default=clips, help=f"clips of a subject (default {clips})")
    add("--image-size", type=int, default=160, metavar="PX", help="side of the frames (default 160)")


def _add_apex(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, subjects=5, clips=4)
    parser.add_argument("--seed", type=int, default=0, help="seed of faces and motion (default 0)")


def _add_head_motion(parser: argparse.ArgumentParser) -> None:
    _add_sizes(parser, subjects=3, clips=6)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of faces, motion and weights (default 5)")
    parser.add_argument(
        "--config", type=Path, default=Path("configs/demo.yaml"), help="preparation and training (configs/demo.yaml)"
    )


def _add_scale(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", metavar="A,B", help="paper, fine, composite (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one CPU each (default 2)")
    parser.add_argument("--rounds", type=int, help="steps timed, after one that is not (default 3)")


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subjects", type=int, default=20, help="people in the clips (default 20)")
    parser.add_argument("--clips", type=int, default=50, help="clips of each (default 50)")
    parser.add_argument("--rounds", type=int, default=3, help="times that all are answered (default 3)")


BENCHMARKS = {
    "attention": Benchmark(
        "attention", "kernels of local attention against the alternatives and the hardware's limits", _add_attention
    ),
    "training": Benchmark("training", "epochs at the paper's size without input, by engine", _add_training),
    "input": Benchmark("input", "the training stream against a plain DataLoader", _add_input),
    "end-to-end": Benchmark("end_to_end", "fold training against the public code's way, on CPUs", _add_end_to_end),
    "flow": Benchmark("flow", "TV-L1 flow against scikit-image's and OpenCV's", _add_flow),
    "apex": Benchmark("apex", "finding apexes by flow and by grey differences", _add_apex),
    "head-motion": Benchmark("head_motion", "scores with and without the head's motion in the flow", _add_head_motion),
    "predict": Benchmark("prediction", "answers for many pairs beside the floor of their parts", _add_predict),
    "scale": Benchmark("scale", "training by several processes: steps, memory, snapshots, a killed worker", _add_scale),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark without the other sub-commands of htnet, and so without their dependencies."""
    parser = argparse.ArgumentParser(prog="python -m launch.commands.profiling", description=__doc__)
    add_arguments(parser)
    try:
        return profile(parser.parse_args(arguments), Console())
    except InputError as error:
        print(f"profile: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
