"""``htnet prepare``: raw dataset folders to a store, a Ray task per subject."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from htnet.config import Config, PrepareConfig, ResourcesConfig, SourceConfig
from htnet.config_io import changed_keys, to_plain
from htnet.data.adapters import DATASETS, build_adapter
from htnet.data.adapters.base import Clip, FlowPicture, LeftOut
from htnet.data.adapters.htnet_release import LANDMARKS as RELEASE_LANDMARKS
from htnet.data.extraction import ExtractionSettings, check_landmarks, subject_table
from htnet.data.labels import LabelScheme, check_official_list, load_scheme
from htnet.data.landmarks import LandmarkTable, read_landmarks
from htnet.data.store import Staging, Store, open_store, remove_leftovers, staging
from htnet.data.types import SampleId
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, HTNetError, InputError
from launch.prepare_report import Progress, print_list, print_store, say, write_report
from launch.prepare_task import SubjectOutcome, SubjectTask, prepare_subject
from launch.scheduler import ray_cluster

LANDMARKS_FILE = "landmarks.csv"
"""Landmark table of a dataset folder where none is named."""
_SHOWN_DIFFERENCES = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the sources hold, before any picture is decoded."""

    scheme: LabelScheme
    subjects: dict[tuple[str, str], list[Clip | FlowPicture]]
    tables: dict[SampleId, LandmarkTable]
    left_out: tuple[LeftOut, ...]
    recipe: dict[str, Any]

    @property
    def clips(self) -> int:
        """Clips that are to become samples."""
        return sum(len(entries) for entries in self.subjects.values())


def prepare(config: Config, out: Path, console: Console, *, strict: bool = False, address: str | None = None) -> int:
    """Make the store that ``config.prepare`` describes, or keep the one that was made so already; the exit code."""
    plan = make_plan(config.prepare)
    store = _made_before(out, plan.recipe)
    if store is not None:
        remove_leftovers(out)
        say(console, _up_to_date(store))
        return EXIT_DONE
    failed = next((item for item in plan.left_out if item.failed), None)
    if strict and failed is not None:
        raise InputError(f"{failed.place}: {failed.reason}")
    start = time.monotonic()
    with staging(out, plan.recipe) as stage:
        try:
            _make_subjects(config.prepare, plan, stage, console, strict=strict, address=address)
        except InputError:
            stage.discard()  # an interruption leaves what is done, bad input leaves nothing
            raise
        parts = stage.done()
        left_out = [*plan.left_out, *_left_out_of(parts)]
        store = stage.finish([(item.clip, item.rule, item.reason, item.place) for item in left_out])
    report = write_report(out, parts, seconds=time.monotonic() - start)
    print_store(store, left_out, console)
    say(console, f"how long it took: {report}")
    return EXIT_PARTIAL if any(item.failed for item in left_out) else EXIT_DONE


def list_sources(config: Config, console: Console) -> int:
    """``--list``: what the sources hold and what is left out why; no picture is decoded and nothing written."""
    plan = make_plan(config.prepare, check_list=False)
    entries = [entry for entries in plan.subjects.values() for entry in entries]
    print_list(plan.scheme, entries, plan.left_out, console)
    if config.prepare.official_list is not None:
        differences = _differences(Path(config.prepare.official_list), plan)
        for line in differences:
            say(console, f"official list: {line}")
        say(console, f"official list: {len(differences)} differences" if differences else "official list: agrees")
    return EXIT_DONE


def dry_run(config: Config, out: Path) -> list[str]:
    """What :func:`prepare` would do, a line per source and one for the store; no picture is decoded."""
    plan = make_plan(config.prepare)
    store = _made_before(out, plan.recipe)
    sources = [
        f"{source.adapter}: {source.root}: {json.dumps(facts)}"
        for source, facts in zip(config.prepare.sources, plan.recipe["sources"], strict=True)
    ]
    return [*sources, f"would write {out}: {plan.clips} clips" if store is None else _up_to_date(store)]


def make_plan(prepare: PrepareConfig, *, check_list: bool = True) -> Plan:
    """Read every annotation; :class:`InputError` for what is wrong with one, or for a clip in two sources."""
    if not prepare.sources:
        raise InputError("prepare.sources: at least one source is needed, got none")
    scheme = load_scheme(
        prepare.label_scheme, [name for source in prepare.sources for name in DATASETS[source.adapter]]
    )
    subjects: dict[tuple[str, str], list[Clip | FlowPicture]] = defaultdict(list)
    tables: dict[SampleId, LandmarkTable] = {}
    places: dict[SampleId, str] = {}
    left_out: list[LeftOut] = []
    facts = []
    for source in prepare.sources:
        adapter = build_adapter(source, scheme)
        described = adapter.describe()
        table = _landmarks(source)
        taken: list[Clip | FlowPicture] = []
        for entry in adapter.entries():
            if isinstance(entry, LeftOut):
                left_out.append(entry)
                continue
            if entry.id in places:
                raise InputError(f"{entry.place}: clip {entry.id} is in two sources: also {places[entry.id]}")
            places[entry.id], tables[entry.id] = entry.place, table
            subjects[entry.id.dataset, entry.id.subject].append(entry)
            taken.append(entry)
        check_landmarks(table, taken)
        facts.append({**described, "landmarks_sha256": table.sha256, "frames_sha256": _listing(taken)})
    settings = extraction_settings(prepare, strict=False).recipe()
    recipe = {"sources": facts, "label_scheme": scheme.name, "classes": list(scheme.classes), **settings}
    plan = Plan(
        scheme=scheme,
        subjects=dict(sorted(subjects.items())),
        tables=tables,
        left_out=tuple(left_out),
        recipe=json.loads(json.dumps(recipe, default=str)),
    )
    if check_list and prepare.official_list is not None:
        _refuse_differences(Path(prepare.official_list), plan)
    return plan


def _listing(entries: Sequence[Clip | FlowPicture]) -> str:
    """What tells frames that were added or exchanged: names and sizes; to read them all would be the work itself."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(str(entry.id).encode())
        if isinstance(entry, Clip):
            files = sorted(entry.frames.iterdir()) if entry.frames.is_dir() else [entry.frames]
            digest.update(repr([(file.name, file.stat().st_size) for file in files]).encode())
    return digest.hexdigest()


def _landmarks(source: SourceConfig) -> LandmarkTable:
    usual = RELEASE_LANDMARKS if source.adapter == "htnet_release" else LANDMARKS_FILE
    return read_landmarks(Path(source.root) / usual if source.landmarks is None else Path(source.landmarks))


def extraction_settings(prepare: PrepareConfig, *, strict: bool) -> ExtractionSettings:
    """The part of the configuration that a task needs."""
    plain = to_plain(prepare)
    names = {field.name for field in dataclasses.fields(ExtractionSettings)}
    values = {name: value for name, value in plain.items() if name in names and name != "device"}
    on_gpu = prepare.device == "cuda" or (prepare.device == "auto" and prepare.gpus_per_task > 0)
    return ExtractionSettings(**values, device="cuda" if on_gpu else "cpu", strict=strict)


def _differences(path: Path, plan: Plan) -> list[str]:
    return check_official_list(path, {e.id: e.label for entries in plan.subjects.values() for e in entries})


def _refuse_differences(path: Path, plan: Plan) -> None:
    lines = _differences(path, plan)
    if lines:
        shown = "; ".join(lines[:_SHOWN_DIFFERENCES])
        raise InputError(f"{path}: {len(lines)} differences between the official list and the sources: {shown}")


def _made_before(out: Path, recipe: dict[str, Any]) -> Store | None:
    """The store at ``out``, None where there is nothing; InputError when it is something else."""
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


def _make_subjects(
    prepare: PrepareConfig, plan: Plan, stage: Staging, console: Console, *, strict: bool, address: str | None
) -> None:
    """Run the tasks of the subjects that are not done yet."""
    done = stage.done()
    tasks = [
        SubjectTask(
            dataset=dataset,
            subject=subject,
            entries=tuple(entries),
            landmarks=subject_table({entry.id: plan.tables[entry.id] for entry in entries}),
            settings=extraction_settings(prepare, strict=strict),
            folder=stage.folder.resolve(),
        )
        for (dataset, subject), entries in plan.subjects.items()
        if (dataset, subject) not in done
    ]
    if not tasks:
        return
    resources = ResourcesConfig(cpus_per_fold=float(prepare.threads), gpus_per_fold=prepare.gpus_per_task)
    finished = plan.clips - sum(len(task.entries) for task in tasks)
    if not any(isinstance(entry, Clip) for task in tasks for entry in task.entries):
        for task in tasks:  # flow pictures are decoded in a second; no cluster is started for them
            _check(task, prepare_subject(task))
        return
    with ray_cluster(address, resources) as ray, Progress(console, total=plan.clips, done=finished) as progress:
        for task, outcome in _run(ray, tasks, resources):
            progress.advance(f"{task.dataset}/{task.subject}", _check(task, outcome))


def _check(task: SubjectTask, outcome: SubjectOutcome) -> SubjectOutcome:
    """The outcome of a task that did its work; an error where it could not."""
    if outcome.refused is not None:
        raise InputError(outcome.refused)
    if outcome.broken is not None:
        raise HTNetError(f"{task.dataset}/{task.subject}: {outcome.broken}")
    return outcome


def _run(
    ray: Any, tasks: Sequence[SubjectTask], resources: ResourcesConfig
) -> Iterator[tuple[SubjectTask, SubjectOutcome]]:
    """Outcomes as they come. Ray starts a task again whose worker died; its shard is written whole or not at all."""
    remote = ray.remote(
        num_cpus=resources.cpus_per_fold, num_gpus=resources.gpus_per_fold, max_retries=resources.retries, max_calls=0
    )(prepare_subject)
    flights = {remote.remote(task): task for task in tasks}
    while flights:
        ready, _ = ray.wait(list(flights), num_returns=1)
        for reference in ready:
            task = flights.pop(reference)
            try:
                yield task, ray.get(reference)
            except ray.exceptions.RayError as error:
                reason = " ".join(str(error).split())
                raise HTNetError(f"{task.dataset}/{task.subject}: its worker died again and again: {reason}") from None


def _left_out_of(parts: dict[tuple[str, str], dict[str, Any]]) -> list[LeftOut]:
    return [LeftOut(**item) for _, part in sorted(parts.items()) for item in part["left_out"]]
