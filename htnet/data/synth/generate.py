"""Synthetic raw datasets in the layouts of the real ones, with known motion and known traps.

For demonstrations and tests of the whole chain: the faces are drawn (:mod:`htnet.data.synth.faces`),
the motion of each class is known (:mod:`htnet.data.synth.motion`), files and annotations stand where
the owners of the real datasets put them (:mod:`htnet.data.synth.layouts`). Nothing about
micro-expressions of people can be learned from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from htnet.data.synth.clips import DEFAULTS, Difficulty, SynthClip, plan_clips, render_frame, true_flow
from htnet.data.synth.layouts import LAYOUTS
from htnet.data.synth.layouts.base import ClipFiles, Form, Layout, Marks
from htnet.data.synth.layouts.files import write_frames, write_landmarks
from htnet.data.synth.like import ClipList, read_like
from htnet.errors import InputError
from htnet.files import whole_folder

DATASETS = tuple(LAYOUTS)
"""Names of the layouts that can be written, in their order; those of the adapters."""
COMPOSITE = DATASETS[:3]
"""CASME II, SAMM and SMIC: what is written where nothing else is asked for."""
UNREADABLE = "unreadable_frames"
"""The rule by which a clip with a damaged frame is left out."""
_FORMAT = 3
_PARAMETERS = "synth.json"
_LIMITS = {"subjects": (1, 90), "clips": (2, 60), "seed": (0, 2**31 - 1), "image_size": (64, 1024)}


@dataclass(frozen=True, kw_only=True)
class SynthSummary:
    """Data that :func:`generate` left on disk. ``created`` is False where the same data lay there already.

    ``table``: name of the annotation that the data were built to.
    """

    out: Path
    clips: dict[str, int]
    frames: int
    created: bool
    table: str | None = None

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {number} clips" for name, number in self.clips.items())
        state = "written" if self.created else "there already, made from the same parameters: nothing done"
        said = f"{self.out}: {counts}, {self.frames} frames; {state}"
        if self.table is None:
            return said
        [name] = self.clips
        source = {"adapter": name, "root": str(self.out / name), "annotations": self.table}
        return f"{said}\na configuration for htnet prepare: {json.dumps({'prepare': {'sources': [source]}})}"


def generate(
    out: Path,
    *,
    datasets: Sequence[str] | None = None,
    subjects: int | None = None,
    clips: int | None = None,
    seed: int = 0,
    image_size: int | None = None,
    difficulty: Difficulty = "easy",
    traps: bool = False,
    damaged: float = 0.0,
    video: bool = False,
    xls: bool = False,
    like: Path | None = None,
) -> SynthSummary:
    """Write synthetic datasets to ``out/<dataset>``.

    The same parameters give the same bytes with the same library versions. Everything is written under a
    temporary name beside ``out`` and renamed when whole; into the current folder its parts are moved, ``synth.json``
    last.

    Args:
        out: folder to make; it may be absent, empty, or hold what the same parameters made.
        datasets: which of :data:`DATASETS`; None: :data:`COMPOSITE`, or those of ``like``.
        subjects: subjects per dataset, 1 to 90; None: 4.
        clips: clips per subject, 2 to 60; labels rotate, so each subject shows at least two classes. None: 5.
        seed: seed of looks, motion and noise.
        image_size: side of the square frames in pixels, 64 to 1024; None: 160, or 64 for an annotation.
        difficulty: ``easy``: strong motion in every part; ``realistic``: weaker, lopsided, in a swaying head, and
            hardly any motion in some clips.
        traps: plant every known trap of the datasets, each as one more clip, and list them in ``traps.json``.
        damaged: share of the clips (without traps) whose onset or apex frame is damaged; listed there as well.
        video: casme3_a and csv get video files instead of folders of pictures.
        xls: casme2, casme and casme3_a get their older workbook; needs the package xlwt.
        like: a list such as the MEGC2019 composite's (:mod:`htnet.data.synth.like`): exactly its subjects, clips and
            classes. Or the annotation of a dataset's owners: a copy of it, and for every row a few frames of its
            numbers where the adapter looks for them; the one name in ``datasets`` says whose it is where the file's
            does not.

    Returns:
        What lies there, and whether this call made it.

    Raises:
        InputError: a parameter out of range or at odds with another, a list that cannot be used, or ``out`` holds
            something else.
    """
    options: dict[str, Any] = {"difficulty": difficulty, "traps": traps, "damaged": damaged, "xls": xls}
    counts = {"subjects": subjects, "clips": clips}
    listed = None if like is None else _read_like(like, datasets, counts, {**options, "video": video})
    table = None if listed is None else listed.table
    if image_size is None:
        image_size = 160 if table is None else 64
    sizes = {"seed": seed, "image_size": image_size} | ({} if listed is not None else _or_defaults(counts))
    chosen = _check(datasets, sizes, difficulty, damaged, listed)
    parameters: dict[str, object] = {"format": _FORMAT, "datasets": list(chosen), **sizes, **options, "video": video}
    parameters |= {} if listed is None else {"like_sha256": listed.sha256}
    parameters |= {} if table is None else {"annotation": table.name}
    options |= sizes
    plans = {name: plan_clips(name, **options, like=None if listed is None else listed.clips[name]) for name in chosen}
    created = not _is_there(out, parameters)
    if created:
        _write(out, plans, parameters, Form(xls=xls, video=video), table)
    numbers = {name: len(plan) for name, plan in plans.items()}
    frames = sum(len(_files(clip).numbers) for plan in plans.values() for clip in plan)
    name = None if table is None else table.name
    return SynthSummary(out=out, clips=numbers, frames=frames, created=created, table=name)


def _or_defaults(counts: Mapping[str, int | None]) -> dict[str, int]:
    """Return counts, with the defaults where there are none."""
    return {name: DEFAULTS[name] if value is None else value for name, value in counts.items()}


def planted(clips: Sequence[SynthClip]) -> list[dict[str, object]]:
    """List what is wrong with clips on purpose, and what a right reader must conclude.

    Returns:
        For every clip with a trap or a damaged frame: its identity, ``kind``, ``expected`` (kept or left_out), ``rule``
        (the adapters' name for it; None where there is nothing to remark), ``failed`` (left out, and the work is not
        complete) and the true ``onset``, ``apex``, ``offset``, numbered as in the annotation (a video counts from 1).
    """
    listed: list[dict[str, object]] = []
    for clip in clips:
        if clip.trap is not None:
            found = {"kind": clip.trap.kind, "rule": clip.trap.rule, "failed": clip.trap.failed}
            found["expected"] = "kept" if clip.trap.kept else "left_out"
        elif clip.damage is not None:
            kind = f"{clip.damage.how}_frame_{clip.damage.frame}"
            found = {"kind": kind, "rule": UNREADABLE, "failed": True, "expected": "left_out"}
        else:
            continue
        identity = {name: getattr(clip, name) for name in ("dataset", "subject", "clip")}
        listed.append({**identity, **found, **{name: getattr(clip, name) for name in ("onset", "apex", "offset")}})
    return listed


def _read_like(
    path: Path, datasets: Sequence[str] | None, counts: Mapping[str, int | None], options: Mapping[str, Any]
) -> ClipList:
    """Read the list or annotation, after a look at what it decides alone."""
    for name, value in counts.items():
        if value is not None:
            raise InputError(f"{name} must not be given with like, whose list decides it, got {value}")
    if options["traps"]:
        raise InputError("traps must not be asked for with like, whose list has no such clips")
    listed = read_like(path, datasets)
    for name in ("damaged", "xls", "video"):
        if listed.table is not None and options[name]:
            raise InputError(f"{name} must not be asked for with like, whose annotation is taken as it is")
    return listed


def _check(
    datasets: Sequence[str] | None, sizes: dict[str, int], difficulty: str, damaged: float, listed: ClipList | None
) -> tuple[str, ...]:
    """Return the datasets to write, in their order."""
    known = DATASETS if listed is None else tuple(listed.clips)
    if datasets is None:
        datasets = COMPOSITE if listed is None else known
    for name in datasets:
        if name not in known:
            where = "" if listed is None else " in the list of like"
            raise InputError(f"dataset must be one of {', '.join(known)}{where}, got {name!r}")
    if not datasets or len(set(datasets)) != len(datasets):
        raise InputError(f"datasets must be one or more different names, got {list(datasets)}")
    for name, value in sizes.items():
        low, high = _LIMITS[name]
        if not low <= value <= high:
            raise InputError(f"{name} must be in {low}..{high}, got {value}")
    if difficulty not in get_args(Difficulty):
        raise InputError(f"difficulty must be one of {', '.join(get_args(Difficulty))}, got {difficulty!r}")
    if not 0.0 <= damaged <= 1.0:
        raise InputError(f"damaged must be in [0, 1], got {damaged}")
    return tuple(name for name in DATASETS if name in datasets)


def _is_there(out: Path, parameters: dict[str, object]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / _PARAMETERS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{out}: exists and was not made by htnet synth (no readable synth.json); name another folder"
        raise InputError(message) from error
    if found != parameters:
        raise InputError(f"{out}: holds synthetic data of other parameters ({found}, asked for {parameters})")
    return True


def _write(
    out: Path,
    plans: dict[str, tuple[SynthClip, ...]],
    parameters: dict[str, object],
    form: Form,
    table: Path | None,
) -> None:
    with whole_folder(out, last=_PARAMETERS) as partial:
        for name, plan in plans.items():
            if table is None:
                LAYOUTS[name].write(partial / name, [_files(clip) for clip in plan], form)
            else:
                _write_to_table(partial / name, LAYOUTS[name], plan, table)
        listed = [item for plan in plans.values() for item in planted(plan)]
        if listed:
            _write_json(partial / "traps.json", listed)
        _write_json(partial / _PARAMETERS, parameters)


def _write_to_table(root: Path, layout: Layout, plan: Sequence[SynthClip], table: Path) -> None:
    """Write a copy of an annotation, its clips' frames and their landmarks."""
    root.mkdir()
    shutil.copyfile(table, root / table.name)
    clips = [(clip.folder, _files(clip)) for clip in plan]
    for folder, files in clips:
        assert folder is not None  # an annotation says it of every clip
        write_frames(root / folder, files, layout.frame, grey=layout.grey)
    write_landmarks(root, [files for _, files in clips])


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _files(clip: SynthClip) -> ClipFiles:
    fields = ("dataset", "subject", "clip", "label", "numbers", "onset", "apex", "offset", "landmarks", "damage")
    files = ClipFiles(
        marks=Marks(onset=clip.onset, apex=clip.apex, offset=clip.offset, emotion=clip.emotion),
        render=lambda frame: render_frame(clip, frame),
        flow=lambda: true_flow(clip, clip.apex),
        trap=None if clip.trap is None else clip.trap.kind,
        **{name: getattr(clip, name) for name in fields},
    )
    return files if clip.trap is None else clip.trap.change(files)
