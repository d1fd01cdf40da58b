"""Program ``htnet``: one sub-command per job, no flag per configuration field.

Exit codes: 0 done; 1 some of the work failed, or it was interrupted by Ctrl-C or SIGTERM; 2 bad input (one line per
error, no traceback).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from htnet import __version__
from htnet.config import Config
from htnet.config.load import load_config
from htnet.config.plain import dump_config
from htnet.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_PARTIAL, InputError, StartError
from kernels.backends import BACKENDS
from launch.cluster import terminable
from launch.commands.profiling import add_arguments as add_profile_arguments
from launch.commands.profiling import profile


@dataclass(frozen=True)
class Command:
    """A sub-command. ``run`` imports its work, so that the parser stays fast."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], int]


_DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT}
_MENDABLE = {
    getattr(errno, name) for name in ("EACCES", "EPERM", "EROFS", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "EEXIST")
} | _DISK_IS_FULL
"""Errors that a user can mend: rights, space, names. Any other OSError is a defect of htnet and keeps its traceback."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        with terminable():
            command: Command = options.command
            return command.run(options, Console())
    except InputError as error:
        for line in str(error).splitlines():
            print(f"htnet {options.name}: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except StartError as error:
        print(f"htnet {options.name}: {error}", file=sys.stderr)
        return EXIT_PARTIAL
    except OSError as error:
        # an error of open() names its file; one of write() does not, and counts only if it says that the disk is full
        if error.errno not in (_MENDABLE if error.filename is not None else _DISK_IS_FULL):
            raise
        place = "a file could not be written to its end" if error.filename is None else error.filename
        print(f"htnet {options.name}: {place}: {error.strerror}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print(f"htnet {options.name}: interrupted", file=sys.stderr)
        return EXIT_PARTIAL


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="htnet", description="LOSO training of HTNet for micro-expression recognition."
    )
    parser.add_argument("--version", action="version", version=f"htnet {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(command.name, help=command.help)
        own.set_defaults(command=command)
        command.add_arguments(own)
    return parser


def _add_config(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    help_text = "YAML file; configs/README.md names every key"
    if several:
        parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help=help_text)
    else:
        parser.add_argument("config", type=Path, metavar="CONFIG", help=help_text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        dest="overrides",
        help="override a key; may be repeated",
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and stop")


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="a Ray cluster's address; without it, this machine")


def _load(path: Path, options: argparse.Namespace) -> Config:
    overrides = list(options.overrides)
    # taken into the configuration, so that workers on other machines use it and the run's identity holds it
    if backend := os.environ.get("HTNET_ATTENTION"):
        if backend not in BACKENDS:
            raise InputError(f"HTNET_ATTENTION={backend}: must be one of {', '.join(BACKENDS)}")
        overrides.append(f"model.attention_backend={backend}")
    return load_config(path, overrides)


def _configured(options: argparse.Namespace) -> Config | None:
    """Return the configuration, or print it and return None for --print-config, before anything heavy is imported."""
    config = _load(options.config, options)
    if options.print_config:
        print(dump_config(config), end="")
        return None
    return config


def _say_plan(lines: Iterable[str], console: Console) -> int:
    """Print the lines of a dry run."""
    from launch.screen import say

    for line in lines:
        say(console, line)
    return EXIT_DONE


def _add_synth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder to create")
    add("--datasets", metavar="A,B,...", help="layouts, as the adapters are named (default casme2,samm,smic)")
    add("--subjects", type=int, metavar="N", help="people per dataset (default 4)")
    add("--clips", type=int, metavar="N", help="clips per person (default 5)")
    add(
        "--like", type=Path, metavar="FILE",
        help="CSV (dataset, subject, clip, label): these clips instead; or a dataset's annotation workbook: a copy of "
        "it and frames for every row (--datasets NAME where the owners named the file otherwise)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="seed of faces and motion (default 0)")
    add("--image-size", type=int, metavar="PX", help="side of the frames (default 160; 64 for a workbook)")
    add("--difficulty", default="easy", help="easy (default) or realistic: weak, lopsided motion in a swaying head")
    add("--traps", action="store_true", help="plant the datasets' known traps, listed in traps.json")
    add("--damaged", type=float, default=0.0, metavar="SHARE", help="share of clips with a damaged frame (default 0)")
    add("--video", action="store_true", help="videos instead of pictures where a layout may have them")
    add("--xls", action="store_true", help="the older workbook where a layout has one")


def _synth(options: argparse.Namespace, console: Console) -> int:
    from htnet.data.synth.generate import generate
    from launch.screen import say

    names = ("subjects", "clips", "like", "seed", "image_size", "difficulty", "traps", "damaged", "video", "xls")
    chosen = None if options.datasets is None else [name.strip() for name in options.datasets.split(",")]
    summary = generate(options.out, datasets=chosen, **{name: getattr(options, name) for name in names})
    say(console, str(summary))
    return EXIT_DONE


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--out", type=Path, help="the store to write (default: data.store of the configuration)")
    parser.add_argument("--list", action="store_true", help="print what the sources hold, and what is left out why")
    parser.add_argument("--strict", action="store_true", help="stop at the first clip that cannot be used")
    _add_address(parser)


def _prepare(options: argparse.Namespace, console: Console) -> int:
    if (config := _configured(options)) is None:
        return EXIT_DONE
    from launch.commands import prepare

    if options.list:
        return prepare.list_sources(config, console)
    if not (options.out or isinstance(config.data.store, str)):
        raise InputError("data.store names several stores: --out says which one to write")
    out = Path(options.out or str(config.data.store))
    if options.dry_run:
        return _say_plan(prepare.dry_run(config, out), console)
    return prepare.prepare(config, out, console, strict=options.strict, address=options.address)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="folder that htnet prepare wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the pictures")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="samples, even over classes (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of choice and augmentation (default 0)")


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.inspect_store import inspect_store

    return inspect_store(options.store, options.out, console, samples=options.samples, seed=options.seed)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_config(parser, several=True)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, or of a grid the folder of its runs")
    parser.add_argument("--seeds", metavar="N..M", help="seeds of a grid, 0..4 or 1,5,9: a run for each configuration")
    _add_address(parser)


def _sweep(options: argparse.Namespace, console: Console) -> int:
    configs = _named_configs(options)
    if options.print_config:
        for name, config in configs.items():
            if len(configs) > 1:
                print(f"--- # {name}")
            print(dump_config(config), end="")
        return EXIT_DONE
    from launch.commands.grid import parse_seeds, plan_grid, sweep_grid
    from launch.commands.sweep import plan, sweep

    if len(configs) == 1 and options.seeds is None:
        [config] = configs.values()
        if options.dry_run:
            return _say_plan(plan(config, options.out), console)
        return sweep(config, options.out, options.address, console)
    seeds = () if options.seeds is None else parse_seeds(options.seeds)
    if options.dry_run:
        runs = plan_grid(configs, seeds, options.out)
        return _say_plan((f"{run.label}: {line}" for run in runs for line in plan(run.config, run.out)), console)
    return sweep_grid(configs, seeds, options.out, options.address, console)


def _named_configs(options: argparse.Namespace) -> dict[str, Config]:
    """Return the configurations by the names of their files."""
    configs: dict[str, Config] = {}
    for path in options.configs:
        if path.stem in configs:
            raise InputError(f"{path}: another configuration of the grid is called {path.stem}, too; rename one")
        configs[path.stem] = _load(path, options)
    return configs


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="MODEL", help="the model's folder")
    _add_address(parser)


def _train(options: argparse.Namespace, console: Console) -> int:
    if (config := _configured(options)) is None:
        return EXIT_DONE
    from launch.commands.train import plan, train

    if options.dry_run:
        return _say_plan(plan(config, options.out), console)
    return train(config, options.out, options.address, console)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a grid's")


def _report(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.grid import SUMMARY, rescore_grid
    from launch.commands.report import rescore

    (rescore_grid if (options.run / SUMMARY).is_file() else rescore)(options.run, console)
    return EXIT_DONE


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders; the others against the first")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the clips that differ and a picture")
    parser.add_argument(
        "--selection",
        default="final",
        choices=("final", "validated", "test_selected"),
        help="the epoch that counts (final)",
    )


def _compare(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.compare import compare

    compare(options.runs, options.out, console, selection=options.selection)
    return EXIT_DONE


def _add_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a model's folder, or a folder of them, whose answers are averaged")
    add(
        "inputs", nargs="+", metavar="INPUT",
        help="a folder of frames, a video, two pictures (onset, apex), a table of many, or - for JSON lines",
    )  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the predictions")
    add("--landmarks", type=Path, metavar="TABLE", help="landmarks of clips that the inputs name")
    add("--detector", default="mtcnn", choices=("none", "mtcnn", "yunet"), help="what finds the other faces (mtcnn)")
    add("--detector-model", metavar="FILE", help="the model file of detector yunet")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes a GPU where there is one")


def _predict(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.predict import predict

    names = ("landmarks", "detector", "detector_model", "device")
    chosen = {name: getattr(options, name) for name in names}
    return predict(options.model, options.inputs, options.out, console, **chosen)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model's folder")
    parser.add_argument(
        "--format",
        required=True,
        choices=("onnx", "torch", "upstream"),
        help="ONNX, torch.export, or the public code's weights",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the file")


def _export(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.export import export

    return export(options.model, options.format, options.out, console)


def _doctor(options: argparse.Namespace, console: Console) -> int:
    from launch.commands.doctor import doctor

    return doctor(console)


COMMANDS = (
    Command("synth", "synthetic raw datasets in the real datasets' layouts", _add_synth, _synth),
    Command("prepare", "raw dataset folders to a store", _add_prepare, _prepare),
    Command("inspect", "pictures of a store's samples and of what training makes of them", _add_inspect, _inspect),
    Command("sweep", "LOSO: train and score a fold per subject; run again to go on", _add_sweep, _sweep),
    Command("train", "one model on everything, by several processes; run again to go on", _add_train, _train),
    Command(
        "profile",
        "throughput on this machine: local attention, input, training; needs no data",
        add_profile_arguments,
        profile,
    ),
    Command("report", "score a run's records again and rewrite its report", _add_report, _report),
    Command("compare", "differences of runs over the same clips, paired by subject", _add_compare, _compare),
    Command("predict", "classes of one's own clips by a trained model", _add_predict, _predict),
    Command("export", "a trained model for other programs", _add_export, _export),
    Command("doctor", "say what this machine has and whether the parts work here", lambda parser: None, _doctor),
)


if __name__ == "__main__":
    sys.exit(main())
