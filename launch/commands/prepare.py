"""Command ``htnet prepare``: raw dataset folders to a store, a Ray task per subject."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console

from htnet.config import Config, PrepareConfig
from htnet.config.plain import changed_keys
from htnet.data.entries import LeftOut
from htnet.data.plan import Plan, composite_lines, flow_device, make_plan
from htnet.data.store.reader import Store, open_store, read_left_out
from htnet.data.store.writer import Staging, remove_leftovers, staging
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from kernels.machine import package_version
from launch.cluster import ClusterGoneError, Needs, ray_cluster
from launch.pool import GivenUp, Pool
from launch.report.store import (
    print_landmarks,
    print_left_out,
    print_list,
    print_methods,
    print_read_otherwise,
    print_rules,
    print_store,
    print_times,
    write_report,
)
from launch.screen import RESUME, PrepareBoard, say
from launch.tasks.subject import SHARED, RefusedError, SubjectOutcome, SubjectTask, prepare_subject

Parts = Mapping[tuple[str, str], Mapping[str, Any]]
_TEXTS = ("clip", "rule", "reason", "place")


def prepare(config: Config, out: Path, console: Console, *, strict: bool = False, address: str | None = None) -> int:
    """Make the store that ``config.prepare`` describes, or keep one already made from it; return the exit code.

    Raises:
        RefusedError: the content of the sources cannot be used, or ``strict`` and a clip failed; nothing is left
            behind.
        InputError: an annotation, a place or a machine cannot be used. Finished subjects stay, as they do after an
            interruption, a full disk or a dead worker.
    """
    plan = make_plan(config.prepare)
    store = _made_before(out, plan.recipe)
    if store is not None:
        remove_leftovers(out)
        return _keep(store, console, strict=strict)
    for line in plan.remarks:
        say(console, line)
    start = time.monotonic()
    with staging(out, plan.recipe, _made_with(config.prepare)) as stage:
        if stage.unlocked is not None:
            say(console, f"{out}: no lock there ({stage.unlocked}): nothing keeps a second writer of this store away")
        if stage.replaced_partial:
            say(console, f"{stage.folder}: was made from other input, settings or versions: removed")
        try:
            if strict:
                _refuse_failures([*plan.left_out, *_left_out_of(stage.done())])
            failed = _make_subjects(config.prepare, plan, stage, console, strict=strict, address=address)
            if failed:
                _tell_failed(failed, console)
                return EXIT_PARTIAL
            parts = _whole(plan, stage)
            left_out = [*plan.left_out, *_left_out_of(parts)]
            if not any(part["rows"] for part in parts.values()):
                print_left_out(left_out, console)
                raise RefusedError(f"{out}: the sources hold no sample; a store needs at least one")
            # written before the store gets its name, for then the parts are removed
            report = write_report(out, parts, seconds=time.monotonic() - start)
            store = _finished(stage, left_out)
        except InputError as error:
            if isinstance(error, RefusedError) or not stage.done():
                stage.discard()
            raise
        except (KeyboardInterrupt, ClusterGoneError) as error:
            done = sum(len(plan.subjects[key]) for key in stage.done())
            reason = "Interrupted" if isinstance(error, KeyboardInterrupt) else f"Stopped: {error};"
            say(console, f"{reason} with {done} of {len(plan.entries)} clips done. {RESUME}")
            return EXIT_PARTIAL
    print_store(store, left_out, console)
    print_read_otherwise(plan.entries, console, each=False)
    for line in composite_lines(plan.scheme, [sample.id for sample in store.samples], left_out):
        say(console, line)
    print_rules(report, console)
    print_landmarks(report, console)
    print_times(report, console)
    return EXIT_PARTIAL if any(item.failed for item in left_out) else EXIT_DONE


def list_sources(config: Config, console: Console) -> int:
    """List the sources' clips, those left out with the reason (``--list``); decode no picture and write nothing."""
    plan = make_plan(config.prepare, only_list=True)
    print_list(plan.scheme, plan.entries, plan.left_out, console)
    for line in plan.remarks:
        say(console, line)
    print_methods(plan.landmarks(), console)
    for line in composite_lines(plan.scheme, [entry.id for entry in plan.entries], plan.left_out):
        say(console, line)
    return EXIT_DONE


def dry_run(config: Config, out: Path) -> list[str]:
    """Say in advance the effect of :func:`prepare`, a line per source and one for the store; decode no picture."""
    plan = make_plan(config.prepare)
    store = _made_before(out, plan.recipe)
    sources = [
        f"{source.adapter}: {source.root}: {json.dumps(facts)}"
        for source, facts in zip(config.prepare.sources, plan.recipe["sources"], strict=True)
    ]
    return [*sources, f"would write {out}: {len(plan.entries)} clips" if store is None else _up_to_date(store)]


def _made_before(out: Path, recipe: dict[str, Any]) -> Store | None:
    """Open the store at ``out``; return None if there is nothing, raise InputError if something else is there."""
    if not out.exists():
        return None
    store = open_store(out)
    changed = changed_keys(store.recipe, recipe)
    if changed:
        raise InputError(
            f"{out}: holds a store made from other input or settings ({', '.join(changed)} differ); "
            "remove it or choose another --out"
        )
    return store


def _up_to_date(store: Store) -> str:
    return f"{store.path} is up to date: {len(store.rows)} samples"


def _keep(store: Store, console: Console, *, strict: bool) -> int:
    """Keep a store of the same input, and report again the clips that failed when it was made."""
    rows = [row for row in read_left_out(store) if row.get("failed") == "true"]
    failed = [LeftOut(**{name: row[name] for name in _TEXTS}, failed=True) for row in rows]
    if strict:
        _refuse_failures(failed)
    say(console, _up_to_date(store))
    print_left_out(failed, console)
    return EXIT_PARTIAL if failed else EXIT_DONE


def _refuse_failures(left_out: Sequence[LeftOut]) -> None:
    for item in left_out:
        if item.failed:
            raise RefusedError(f"{item.place}: {item.clip}: {item.reason}")


def _tell_failed(failed: Sequence[tuple[SubjectTask, SubjectOutcome]], console: Console) -> None:
    for task, outcome in failed:
        say(console, f"{task.name}: not done: {outcome.error}")
        if outcome.traceback is not None:
            say(console, outcome.traceback)
    say(console, f"{len(failed)} subjects are not done, so there is no store. {RESUME}")


def _made_with(prepare: PrepareConfig) -> dict[str, object]:
    """Name everything that may change the last bits of a flow image: a store mixes no parts that differ in it."""
    versions = {name: package_version(name) for name in ("htnet", "torch", "numpy", "av")}
    return {**versions, "opencv": cv2.__version__, "device": flow_device(prepare), "threads": prepare.threads}


def _make_subjects(
    prepare: PrepareConfig, plan: Plan, stage: Staging, console: Console, *, strict: bool, address: str | None
) -> list[tuple[SubjectTask, SubjectOutcome]]:
    """Run the tasks of the subjects that are not done yet; return those that failed."""
    done = stage.done()
    tasks = [
        SubjectTask(
            dataset=dataset,
            subject=subject,
            entries=tuple(entry.absolute() for entry in entries),
            prepare=_absolute(prepare),
            device=flow_device(prepare),
            strict=strict,
            folder=stage.folder.resolve(),
        )
        for (dataset, subject), entries in plan.subjects.items()
        if (dataset, subject) not in done
    ]
    if not any(entry.has_frames for task in tasks for entry in task.entries):
        # flow pictures are decoded in a second; no cluster is started for them
        outcomes = [(task, _accepted(task, prepare_subject(task))) for task in tasks]
        return [(task, outcome) for task, outcome in outcomes if outcome.error is not None]
    failed = []
    before = {key: len(plan.subjects[key]) for key in done}
    with (
        ray_cluster(address, _needs(prepare)) as ray,
        PrepareBoard(console, clips=len(plan.entries), subjects=len(plan.subjects), before=before.values()) as board,
    ):
        pool = Pool[SubjectTask, SubjectOutcome](ray=ray, task=prepare_subject, retries=prepare.retries)
        for task, end in pool.run(tasks):
            outcome = _accepted(task, end)
            board.advance(task.name, outcome)
            if outcome.error is not None:
                failed.append((task, outcome))
    return failed


def _accepted(task: SubjectTask, end: SubjectOutcome | GivenUp) -> SubjectOutcome:
    """Return a task's outcome; refuse one that ends the run: bad content, or a task for which no node is fit."""
    if isinstance(end, GivenUp):
        if end.unfit:
            raise InputError(end.reason)
        return SubjectOutcome(clips=len(task.entries), error=end.reason)
    if end.bad_input is not None:
        raise RefusedError(end.bad_input)
    if end.bad_node is not None:
        raise InputError(end.bad_node)
    return end


def _absolute(prepare: PrepareConfig) -> PrepareConfig:
    """Make paths absolute, because workers may have another working directory."""
    model = prepare.detector_model
    return prepare if model is None else replace(prepare, detector_model=str(Path(model).absolute()))


def _needs(prepare: PrepareConfig) -> Needs:
    return Needs(
        task="task",
        cpus=prepare.threads,
        gpus=prepare.gpus_per_task,
        cpus_key="prepare.threads",
        gpus_key="prepare.gpus_per_task",
    )


def _whole(plan: Plan, stage: Staging) -> Parts:
    """Return the part records of all subjects; refuse if one is missing."""
    parts = stage.done()
    for dataset, subject in plan.subjects:
        if (dataset, subject) not in parts:
            raise InputError(
                f"{stage.folder}: {dataset}/{subject} is done, says its worker, but is not there; the store {SHARED}"
            )
    return parts


def _finished(stage: Staging, left_out: Sequence[LeftOut]) -> Store:
    try:
        return stage.finish([asdict(item) for item in left_out])
    except InputError as error:  # or the next run would find the same unusable records again
        raise RefusedError(str(error)) from None


def _left_out_of(parts: Parts) -> list[LeftOut]:
    return [LeftOut(**item) for part in parts.values() for item in part["left_out"]]
