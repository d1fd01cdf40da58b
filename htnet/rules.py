"""Rules that join sections of a configuration, or a section and a store or a machine; each stands here once.

A rule within one section stands in the section (:mod:`htnet.config`), which cannot be made against it. A rule of a
store concerns the samples that are used; the store may hold others. Every error names key, value and rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from htnet.config import Config, DataConfig, EngineConfig, PrepareConfig
from htnet.config.section import Device, takes_gpu
from htnet.errors import InputError

if TYPE_CHECKING:
    from htnet.data.store.frames import FramesRecipe
    from htnet.data.store.reader import Store


def check_samples(config: Config, store: Store, rows: Iterable[int]) -> None:
    """Refuse rows of a store on which the configured network cannot train.

    Raises:
        InputError: names the store, the key, its value, a sample and the rule.
    """
    rows, data, model = sorted(set(rows)), config.data, config.model
    if data.input == "frames":
        check_frames(store, rows, jitter=data.augment.time_jitter.frames)
    else:  # flow that is computed anew is in pixels
        _check_published(store, rows, data)
    for sample in (store.samples[row] for row in rows):
        if not 0 <= sample.label < model.num_classes:
            raise InputError(
                f"{store.path}: {sample.id} has label {sample.label}; model.num_classes={model.num_classes}"
            )
    if model.in_channels != 3:
        raise InputError(
            f"model.in_channels: flow input has 3 channels (flow_u, flow_v, strain), got {model.in_channels}"
        )


def check_frames(store: Store, rows: Iterable[int], *, jitter: int) -> FramesRecipe:
    """Return the recipe by which flow is computed from the rows' frames, before any is decoded.

    Raises:
        InputError: a sample without frames, a store that does not say how its flow was made, a time jitter beyond the
            frames that the store keeps.
    """
    # Imported here: a rule of a machine serves `htnet profile` where the packages of a store are absent.
    from htnet.data.store.frames import PARTS, FramesRecipe, frame_member

    recipe = FramesRecipe.of(store)
    for row in sorted(set(rows)):
        for part in PARTS:
            if frame_member(part) not in store.rows[row].members:
                raise InputError(
                    f"{store.path}: sample {store.rows[row].sample.id} has no {frame_member(part)}: data.input=frames "
                    "needs prepare.keep_frames=true"
                )
    if jitter > recipe.neighbours:
        raise InputError(
            f"{store.path}: data.augment.time_jitter.frames={jitter} needs prepare.keep_neighbours of at least "
            f"{jitter}, this store has {recipe.neighbours}"
        )
    return recipe


def check_one_flow_size(store: Store, rows: Iterable[int]) -> None:
    """Refuse to change samples whose flow images differ in size: they are changed together."""
    sizes = {store.samples[row].flow_size: row for row in sorted(set(rows))}
    if len(sizes) > 1:
        named = ", ".join(f"{store.samples[row].id} has {size}" for size, row in sorted(sizes.items()))
        raise InputError(f"{store.path}: data.augment needs flow images of one size: {named}")


def _check_published(store: Store, rows: list[int], data: DataConfig) -> None:
    """Refuse changes that mean nothing on published pictures, and a scale that they do not share with other rows.

    Rest is a value of its own in each of their channels, about 128, and u and v have units of their own. A mirrored u
    is 255 - u, which the minmax scaling makes of -u and ``stored`` does not; nothing gives back what turns a vector.
    """
    published = [row for row in rows if store.is_published_picture(row)]
    if not published:
        return
    name = store.samples[published[0]].id
    if data.scaling == "stored" and len(published) < len(rows):
        other = store.samples[next(row for row in rows if row not in published)].id
        raise InputError(
            f"{store.path}: data.scaling=stored: {name} is a published picture of 0..255 and {other} is flow in "
            "pixels; set minmax, or choose data.datasets of one kind"
        )
    for key, value, rule in _wrong_on_pictures(data):
        raise InputError(f"{store.path}: data.augment.{key}={value:g}: {name} is a published picture, {rule}")


def _wrong_on_pictures(data: DataConfig) -> Iterable[tuple[str, float, str]]:
    """Yield key, value and rule of what training must not do with published pictures."""
    augment, stored = data.augment, data.scaling == "stored"
    if augment.rotate.degrees:
        yield "rotate.degrees", augment.rotate.degrees, "whose u and v were stretched one by one: no angle turns them"
    if stored and augment.flip.probability:
        yield "flip.probability", augment.flip.probability, "where rest is not 0: to mirror u needs data.scaling=minmax"
    for bound in ("low", "high"):
        if stored and (value := getattr(augment.magnify, bound)) != 1.0:
            yield f"magnify.{bound}", value, "where rest is not 0 and the amplitude is gone: no factor magnifies it"
    if stored and not data.standardise and augment.drop_region.probability:
        yield (
            "drop_region.probability",
            augment.drop_region.probability,
            "where 0 is not rest but the strongest motion one way: needs data.standardise=true",
        )


def check_sweep_keys(config: Config) -> None:
    """Refuse keys that only ``htnet train`` reads, where a sweep would pass over them without a word."""
    for key, value in (
        ("data.validation_datasets", list(config.data.validation_datasets)),
        ("train.ema", config.train.ema),
        ("train.patience", config.train.patience),
    ):
        if value:
            raise InputError(f"{key}={value}: a key of htnet train; a sweep has no use for it")


def check_initial_weights(config: Config, judged: Iterable[str]) -> None:
    """Refuse to test or validate on people, ``casme2/sub01``, whom the initial weights have seen.

    Raises:
        InputError: names the model and the people; ``train.init`` is no model folder.
    """
    if not (init := config.train.init):
        return
    # Imported here: it imports torch, which a driver without initial weights does not need.
    from htnet.model_folder import read_facts

    try:
        facts = read_facts(Path(init))
    except InputError as error:
        raise InputError(f"train.init: {error}") from None
    both = sorted(set(facts.trained_on.subjects) & set(judged))
    if both:
        more = f" and {len(both) - 3} more" if len(both) > 3 else ""
        raise InputError(
            f"train.init={init}: these weights have seen {', '.join(both[:3])}{more}: a score on them would say "
            "nothing; set data.subjects to others, or begin with weights that have not seen them"
        )


def check_scale(config: Config, samples: int) -> None:
    """Refuse a training by several workers that cannot be.

    Args:
        samples: number of training samples.

    Raises:
        InputError: names keys, values and the rule.
    """
    scale, batch_size = config.scale, config.train.batch_size
    check_precision(config.engine, scale.gpus_per_worker)
    _check_share("engine.device", config.engine.device, "scale.gpus_per_worker", scale.gpus_per_worker, "workers")
    if config.engine.name != "deepspeed":
        raise InputError(
            f"engine.name={config.engine.name}: htnet train trains by DeepSpeed; set engine.name=deepspeed"
        )
    if config.engine.precision == "fp16" and scale.zero:
        raise InputError(f"scale.zero={scale.zero} with engine.precision=fp16: set bf16, or scale.zero=0")
    if samples < scale.workers:
        raise InputError(f"scale.workers={scale.workers}: only {samples} samples to train on: each worker needs one")
    smallest = (samples - 1) % batch_size + 1
    if smallest < scale.workers:
        raise InputError(
            f"train.batch_size={batch_size}: {samples} samples leave a last batch of {smallest}, too few for "
            f"scale.workers={scale.workers}; set another batch size"
        )


def check_fold_device(config: Config) -> None:
    """Refuse a fold on several devices, on a GPU of which it is given nothing, and on a CPU in half precision."""
    gpus = config.resources.gpus_per_fold
    if gpus > 1:
        raise InputError(
            f"resources.gpus_per_fold={gpus:g}: a fold trains on one device; set 1, or 1/k for k folds on a GPU"
        )
    _check_share("engine.device", config.engine.device, "resources.gpus_per_fold", gpus, "folds")
    check_precision(config.engine, gpus)


def check_precision(engine: EngineConfig, gpus_per_fold: float) -> None:
    """Refuse half precision where a fold runs on a CPU."""
    if engine.precision == "fp16" and not takes_gpu(engine.device, gpus_per_fold):
        raise InputError("engine.precision=fp16 needs a GPU: set resources.gpus_per_fold, or use bf16 or fp32")


def check_task_device(prepare: PrepareConfig) -> None:
    """Refuse a task of ``htnet prepare`` on a GPU of which it is given nothing."""
    _check_share("prepare.device", prepare.device, "prepare.gpus_per_task", prepare.gpus_per_task, "tasks")


def _check_share(key: str, device: Device, gpus_key: str, gpus: float, work: str) -> None:
    if device == "cuda" and gpus == 0:
        raise InputError(f"{key}=cuda needs {gpus_key} > 0 (1, or 1/k for k {work} on a GPU)")


def check_gpu(asked: str, *, visible: bool, instead: str) -> None:
    """Refuse a machine where no GPU is visible; ``asked`` and ``instead`` are keys with their values."""
    if not visible:
        raise InputError(f"{asked}: no CUDA device is visible; set {instead} to run on the CPU")
