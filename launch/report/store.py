"""Output of ``htnet prepare``: counts, clips that are left out and the reason, times."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from htnet.data.datasets.labels import LabelScheme
from htnet.data.entries import Entry, LeftOut
from htnet.data.extraction import NO_LANDMARKS
from htnet.data.faces.finder import MEAN_SHAPE
from htnet.data.store.reader import Store
from htnet.files import write_json
from launch.run.environment import driver_environment
from launch.screen import say

_SHOWN_SUBJECTS = 3


def print_store(store: Store, left_out: Sequence[LeftOut], console: Console) -> None:
    """Print the counts of a finished store, and every clip that is not in it."""
    pairs = [(sample.id.dataset, sample.subject, sample.label) for sample in store.samples]
    console.print(_counts(str(store.path), pairs, store.classes))
    print_left_out(left_out, console)


def print_list(scheme: LabelScheme, entries: Sequence[Entry], left_out: Sequence[LeftOut], console: Console) -> None:
    """Print the counts of the sources, the ways annotations were read, and every clip that is left out."""
    pairs = [(entry.id.dataset, f"{entry.id.dataset}/{entry.id.subject}", entry.label) for entry in entries]
    console.print(_counts(f"label scheme {scheme.name}", pairs, scheme.classes, by_subject=True))
    print_read_otherwise(entries, console, each=True)
    print_left_out(left_out, console)


def print_read_otherwise(entries: Sequence[Entry], console: Console, *, each: bool) -> None:
    """Print the number of annotations that each rule read differently; ``each``: every value, with its cell."""
    notes = Counter(note for entry in entries for note in entry.notes)
    for rule, count in sorted(notes.items()):
        say(console, f"read by rule: {rule}: {count} clips")
    remarks = [f"{entry.id}: {remark}" for entry in entries for remark in entry.remarks]
    for line in remarks if each else ():
        say(console, f"read otherwise: {line}")
    if remarks and not each:
        say(console, f"read otherwise: {len(remarks)} values of the annotation; htnet prepare --list names each")


def _counts(
    title: str, pairs: Iterable[tuple[str, str, int | None]], classes: Sequence[str], *, by_subject: bool = False
) -> Table:
    """Make a table of (dataset, subject, label): a row per subject if asked for, one per dataset, and one for all."""
    pairs = list(pairs)
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("dataset", "subjects", "samples", *classes):
        table.add_column(column, justify="left" if column == "dataset" else "right")
    for name in dict.fromkeys(subject for _, subject, _ in pairs) if by_subject else ():
        labels = Counter(label for _, subject, label in pairs if subject == name)
        table.add_row(Text(name), "", str(labels.total()), *(str(labels[index]) for index in range(len(classes))))
    table.add_section()
    for name in (*dict.fromkeys(dataset for dataset, _, _ in pairs), "all"):
        chosen = [pair for pair in pairs if name in (pair[0], "all")]
        labels = Counter(label for _, _, label in chosen)
        subjects = len({subject for _, subject, _ in chosen})
        table.add_row(
            Text(name), str(subjects), str(len(chosen)), *(str(labels[index]) for index in range(len(classes)))
        )
    return table


def print_left_out(left_out: Sequence[LeftOut], console: Console) -> None:
    """Print the number of clips that each rule left out, and each clip with its reason."""
    for rule, count in sorted(Counter(item.rule for item in left_out).items()):
        say(console, f"left out by rule: {rule}: {count} clips")
    for item in left_out:
        say(console, f"{'FAILED' if item.failed else 'left out'}: {item.clip}: {item.reason} ({item.place})")


def write_report(out: Path, parts: Mapping[tuple[str, str], Mapping[str, Any]], *, seconds: float) -> Path:
    """Write the times of the work and its machine beside the store, whose content never differs from run to run.

    Seconds of subjects and stages are those of their tasks, which run side by side; they include interrupted runs.
    ``run`` is the last run alone, up to the moment when the store is put together. Slowest subjects come first. Returns
    the file's path.
    """
    path = out.with_name(f"{out.name}.prepare.json")
    stages: Counter[str] = Counter()
    subjects = []
    for (dataset, subject), part in parts.items():
        stages.update(part["seconds"])
        clips = len(part["rows"]) + len(part["left_out"])
        whole = round(sum(part["seconds"].values()), 3)
        subjects.append(
            {
                "subject": f"{dataset}/{subject}",
                "clips": clips,
                "left_out": len(part["left_out"]),
                "seconds": whole,
                "seconds_per_clip": round(whole / max(1, clips), 3),
                "stages": part["seconds"],
            }
        )
    report = {
        "run": {"wall_seconds": round(seconds, 3), "store": str(out.resolve()), **driver_environment()},
        "read_by_rule": _by_rule(parts),
        "landmarks": _landmarks(parts),
        "seconds_by_stage": {name: round(value, 3) for name, value in stages.most_common()},
        "subjects": sorted(subjects, key=lambda item: (-item["seconds"], item["subject"])),
    }
    write_json(path, report)
    return path


def _by_rule(parts: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return clips whose frames call for another reading than the annotation's, by rule."""
    clips: dict[str, list[str]] = defaultdict(list)
    for part in parts.values():
        for rule, found in part["notes"]["by_rule"].items():
            clips[rule] += found
    return clips


def _landmarks(parts: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[str, Any]:
    """Count the clips of each dataset by the method of their landmarks, and list those without any."""
    methods: dict[str, Counter[str]] = defaultdict(Counter)
    mean_shape: dict[str, str] = {}
    for (dataset, _), part in parts.items():
        methods[dataset].update(part["notes"]["methods"].values())
        methods[dataset].update(item["rule"] for item in part["left_out"] if item["rule"] == NO_LANDMARKS)
        mean_shape |= part["notes"]["mean_shape"]
    return {"clips_by_method": methods, MEAN_SHAPE: dict(sorted(mean_shape.items()))}


def print_methods(counts: Mapping[str, Mapping[str, int]], console: Console) -> None:
    """Print the number of clips by the origin of their landmarks, a line per dataset."""
    for dataset, methods in sorted(counts.items()):
        say(console, f"landmarks: {dataset}: {', '.join(f'{name} {n}' for name, n in sorted(methods.items()))}")


def print_rules(path: Path, console: Console) -> None:
    """Print the clips that are read by a rule because of their frames, from a report of :func:`write_report`."""
    rules = json.loads(path.read_text(encoding="utf-8"))["read_by_rule"]
    for rule, clips in sorted(rules.items()):
        say(console, f"read by rule: {rule}: {len(clips)} clips: {', '.join(sorted(clips))}")


def print_landmarks(path: Path, console: Console) -> None:
    """Print the methods of landmarks in a report of :func:`write_report`, and each clip that has the mean of others."""
    landmarks = json.loads(path.read_text(encoding="utf-8"))["landmarks"]
    print_methods(landmarks["clips_by_method"], console)
    for clip, reason in landmarks[MEAN_SHAPE].items():
        say(console, f"mean shape: {clip}: {reason}")


def print_times(path: Path, console: Console) -> None:
    """Print the stages and the slowest subjects of a report of :func:`write_report`."""
    report = json.loads(path.read_text(encoding="utf-8"))
    table = Table(title="seconds of all tasks together", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "seconds", "share"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    total = sum(report["seconds_by_stage"].values())
    for name, value in report["seconds_by_stage"].items():
        table.add_row(Text(name), f"{value:.1f}", f"{value / max(total, 1e-9):.0%}")
    console.print(table)
    for item in report["subjects"][:_SHOWN_SUBJECTS]:
        say(
            console,
            f"slowest: {item['subject']}: {item['seconds']:.1f} s for {item['clips']} clips, "
            f"{item['seconds_per_clip']:.2f} s each",
        )
    say(console, f"took {report['run']['wall_seconds']:.1f} s; times by subject and stage: {path}")
