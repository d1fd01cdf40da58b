"""Page ``RUN/report.html``: self-contained, made from the files of the run's folder.

It has no scripts and fetches nothing, so it can be mailed, printed and opened in ten years.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from htnet.data.samples import COMPOSITE, Emotion
from htnet.errors import InputError
from htnet.files import write_whole
from htnet.scoring.record import FoldRecord, read_records
from htnet.scoring.selection import Selection, chosen_epoch, selected_predictions, selections_of
from htnet.scoring.summary import Chance, Summary, rates_by_epoch
from launch.report.terminal import EXPLAINED
from launch.run.environment import RunEnvironment, read_environment
from launch.run.folder import RunFolder

# distinguishable without colour (by dashes) and with colour blindness (Okabe & Ito 2008)
_STROKES = (("#004c7f", ""), ("#b34700", "7 3"), ("#00785a", "2 3"), ("#8f4a78", "9 3 2 3"), ("#555555", "4 6"))


@dataclass(frozen=True)
class _Run:
    """Content of a run's folder."""

    name: str
    config: str
    environment: RunEnvironment
    summary: Summary
    predictions_sha256: str
    records: Sequence[FoldRecord]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); a report needs the folder of a run") from error


def _load(folder: RunFolder) -> _Run:
    return _Run(
        name=folder.path.resolve().name,
        config=_text(folder.config),
        environment=read_environment(folder.environment),
        summary=Summary.read(folder.summary),
        predictions_sha256=hashlib.sha256(_text(folder.predictions).encode()).hexdigest(),
        records=read_records(folder.folds),
    )


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Flatten nested mappings, and lists of them, to (dotted key, value) pairs."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value = {str(number): item for number, item in enumerate(value, start=1)}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _fold_environments(records: Sequence[FoldRecord]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Return each environment key of the folds with its values and how many folds have them."""
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for key, value in _flatten(record.environment):
            counts.setdefault(key, Counter())[value] += 1
    return [(key, sorted(values.items())) for key, values in counts.items()]


def _class_names(num_classes: int, environment: RunEnvironment) -> list[str]:
    """Return the class names of the store's label scheme, if the run records them."""
    names = environment.get("store_recipe", {}).get("classes", [])
    if len(names) == num_classes:
        return names
    if num_classes == len(Emotion):
        return [emotion.name.lower() for emotion in Emotion]
    return [f"class {index}" for index in range(num_classes)]


def _subject_rows(records: Sequence[FoldRecord], selections: Sequence[Selection]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        hits = {}
        for selection in selections:
            guesses = selected_predictions(record, selection)
            right = sum(guess == label for guess, label in zip(guesses, record.labels, strict=True))
            hits[selection] = {
                "accuracy": right / len(guesses),
                "epoch": chosen_epoch(record, selection) + 1,
            }
        rows.append(
            {
                "fold": record.fold,
                "samples": len(record.samples),
                "hits": hits,
                "seconds": record.seconds,
                "attempts": record.attempts,
            }
        )
    return rows


def _ticks(epochs: int) -> list[int]:
    """Return about five round epoch numbers, including the last one."""
    step = next(s for s in (n * 10**p for p in range(9) for n in (1, 2, 5)) if epochs / s <= 5)
    inner = [tick for tick in range(step, epochs, step) if epochs - tick > step / 2]
    return sorted({1, *inner, epochs})


def _curve(records: Sequence[FoldRecord], chance: Chance | None) -> dict[str, Any] | None:
    """Return the geometry of the chart of pooled UF1 over epochs; the template draws it."""
    rates = rates_by_epoch(records)
    if not rates:
        return None
    left, right, top, bottom = 44.0, 706.0, 14.0, 262.0
    epochs = len(rates[COMPOSITE]["uf1"])

    def x(epoch: int) -> float:
        return round(left + (right - left) * (epoch - 1) / max(epochs - 1, 1), 1)

    def y(rate: float) -> float:
        return round(bottom - (bottom - top) * rate, 1)

    lines = []
    for index, name in enumerate(sorted(rates, key=lambda name: (name != COMPOSITE, name))):
        colour, dashes = _STROKES[index % len(_STROKES)]
        heights = [y(rate) for rate in rates[name]["uf1"].tolist()]
        points = " ".join(f"{x(epoch)},{height}" for epoch, height in enumerate(heights, start=1))
        last = float(rates[name]["uf1"][-1])
        lines.append(
            {"name": name, "colour": colour, "dashes": dashes, "points": points, "last": last, "end": heights[-1]}
        )
    # lines of the datasets first: the composite is drawn on top
    levels = []
    for selection, rows in chance.selections.items() if chance else ():
        if chance and selection != "validated":
            uf1 = rows[COMPOSITE].uf1
            levels.append({"y": y(uf1), "tries": chance.tries[selection], "uf1": uf1})
    return {
        "epochs": epochs,
        "lines": lines,
        "levels": levels,
        "x_ticks": [(x(epoch), epoch) for epoch in _ticks(epochs)],
        "y_ticks": [(y(tick / 5), f"{tick / 5:.1f}") for tick in range(6)],
        "box": {"left": left, "right": right, "top": top, "bottom": bottom},
    }


def _reproduce(run: _Run) -> list[str]:
    """Return shell commands that reproduce the run's predictions, from the folder that holds the run's."""
    commit, store = run.environment.get("commit"), run.environment.get("store")
    lines = []
    if commit:
        note = "  # and changes that were not committed" if run.environment.get("modified") else ""
        lines.append(f"git checkout {shlex.quote(commit)}{note}")
    elif version := run.environment.get("versions", {}).get("htnet"):
        lines.append(f"htnet --version  # was {version}")
    command = ["htnet", "sweep", f"{run.name}/config.yaml"]
    if store:  # the configuration may name it relative to a working directory; --set reads YAML, which JSON is
        plain = isinstance(store, str) and re.fullmatch(r"[\w./-]+", store) is not None
        command += ["--set", f"data.store={store if plain else json.dumps(store)}"]
    return [
        *lines,
        shlex.join([*command, "--out", f"{run.name}-again"]),
        shlex.join(["sha256sum", f"{run.name}-again/predictions.csv"]),
    ]


def _view(run: _Run) -> dict[str, Any]:
    """Return everything that the template prints."""
    selections = selections_of(run.records)
    final = run.summary.selections.get("final", {}).get(COMPOSITE)
    config_hashes = sorted({record.config_hash for record in run.records})
    return {
        "run": run,
        "summary": run.summary,
        "explained": EXPLAINED,
        "classes": _class_names(len(final.confusion), run.environment) if final else [],
        "subjects": _subject_rows(run.records, selections),
        "selections": selections,
        "curve": _curve(run.records, run.summary.chance),
        "environment": list(_flatten(run.environment)),
        "fold_environments": _fold_environments(run.records),
        "config_hash": ", ".join(config_hashes),
        "compute_seconds": sum(record.seconds for record in run.records),
        "reproduce": _reproduce(run),
        "stale": len(run.records) != run.summary.folds_done,
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` into a run's folder, whole or not at all.

    Args:
        folder: a run with ``config.yaml``, ``environment.json``, ``summary.json``, ``predictions.csv`` and
            ``folds/*.json``. ``commit``, ``store`` and ``command`` of the environment go into "How to reproduce".

    Returns:
        The report's path.

    Raises:
        InputError: one of the files is missing or damaged; names it.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of datasets, subjects and clips come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = _duration
    page = environment.get_template("report.html.j2").render(_view(_load(folder)))
    write_whole(folder.report, page)
    return folder.report
