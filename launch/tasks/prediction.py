"""Predictions on clips that nobody has labelled, by trained models; knows nothing of Ray.

A clip takes the way of training: the same extraction, the same DALI graph to its mosaic. Logits are computed in batches
of one size, the last filled up with zeros, so that a clip's bits do not depend on the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from dali_pipelines import load_set
from dali_pipelines.resident import Resident
from htnet.config import DataConfig, PrepareConfig
from htnet.data.entries import Clip
from htnet.data.extraction import EXTRACTION_VERSION, extract
from htnet.data.faces.finder import SEVERAL_FACES
from htnet.data.flow.apex import APEX_FOUND
from htnet.data.flow.methods import flow_parameters
from htnet.data.inputs import NamedClip
from htnet.data.regions import MOSAIC_REGIONS
from htnet.data.samples import LANDMARK_NAMES
from htnet.data.store.held import HeldStore, hold
from htnet.data.store.writer import PreparedSample
from htnet.errors import InputError
from htnet.model_folder import TrainedModel, mean_motion

__all__ = [
    "REGIONS",
    "Prediction",
    "Predictor",
    "check_models",
    "count_warnings",
    "rebuild_preparation",
    "warning_kind",
]

REGIONS: Final = tuple(LANDMARK_NAMES[index] for index in MOSAIC_REGIONS)
"""Names of the mosaic's quarters, row by row."""
_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer to one clip: probabilities, or the ``error`` for which there are none."""

    input: str
    error: str | None = None
    onset: int | None = None
    apex: int | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Probability by class."""
    regions: Mapping[str, float] = field(default_factory=dict)
    """Contribution of a region: the fall of the predicted class's logit when it shows the training mean."""
    warnings: tuple[str, ...] = ()
    picture: str | None = None
    """File of its picture beside ``predictions.jsonl``."""
    sample: PreparedSample | None = field(default=None, repr=False)
    """The clip's flow image and the crops of onset and apex, until its picture is drawn."""

    @property
    def predicted(self) -> str:
        """Name of the class with the largest probability."""
        return max(self.probabilities, key=lambda name: self.probabilities[name])

    @property
    def confidence(self) -> float:
        """The largest probability; -1 where there is no answer."""
        return max(self.probabilities.values(), default=-1.0)

    def plain(self) -> dict[str, Any]:
        """Return the content of a line of ``predictions.jsonl``."""
        if self.error is not None:
            return {"input": self.input, "error": self.error}
        return {
            "input": self.input,
            "onset": self.onset,
            "apex": self.apex,
            "predicted": self.predicted,
            "probabilities": dict(self.probabilities),
            "regions": dict(self.regions),
            "warnings": list(self.warnings),
            "picture": self.picture,
        }


def warning_kind(warning: str) -> str:
    """Return a warning without the figures of its clip, which stand in brackets at its end."""
    return warning.partition(" (")[0]


def count_warnings(answers: Iterable[Prediction]) -> Counter[str]:
    """Count the clips by the kinds of their warnings."""
    return Counter(kind for answer in answers for kind in map(warning_kind, answer.warnings))


def check_models(models: Sequence[TrainedModel]) -> None:
    """Make sure that the answers of several models can be averaged.

    Raises:
        InputError: they have other classes or other ways from frames to flow images.
    """
    first = models[0]
    for model in models[1:]:
        for name in ("classes", "recipe", "crop"):
            if getattr(model.facts, name) != getattr(first.facts, name):
                raise InputError(f"{model.path}: another {name} than {first.path}: their answers cannot be averaged")


def rebuild_preparation(model: TrainedModel, changes: Mapping[str, Any]) -> PrepareConfig:
    """Return the settings of the way from frames to flow images that the model was trained on.

    Args:
        changes: what else the caller sets: detector, device, threads.

    Raises:
        InputError: this version of htnet computes flow in another way.
    """
    path, recipe = model.path / "model.json", model.facts.recipe
    flow = dict(recipe.get("flow", {}))
    names = {"flow_size": "size", "working_size": "working_size", "strain": "strain", "head_motion": "head_motion"}
    try:
        settings = {name: flow.pop(key) for name, key in names.items() if key in flow}
        known = flow_parameters(flow["method"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: the recipe of the flow cannot be read: {error}") from None
    differs = sorted(key for key in known.keys() | flow.keys() if known.get(key) != flow.get(key))
    if differs:
        raise InputError(
            f"{path}: trained on flow with {differs[0]}={flow.get(differs[0])}; this htnet has {known.get(differs[0])}"
        )
    version = recipe.get("extraction_version", EXTRACTION_VERSION)
    if version != EXTRACTION_VERSION:
        raise InputError(f"{path}: trained on extraction version {version}; this htnet has {EXTRACTION_VERSION}")
    return PrepareConfig(flow_method=flow["method"], keep_frames=True, **settings, **changes)


class Predictor:
    """Models that answer together.

    Args:
        models: at least one, of the same classes and recipe.
        prepare: from :func:`rebuild_preparation`.
        device: of networks and flow, ``cpu`` or ``cuda``.
    """

    def __init__(self, models: Sequence[TrainedModel], prepare: PrepareConfig, *, device: str) -> None:
        check_models(models)
        self._models, self._prepare, self._device = tuple(models), prepare, torch.device(device)
        self.classes, self.crop = models[0].facts.classes, models[0].facts.crop

    def predict(self, inputs: Sequence[NamedClip]) -> Iterator[Prediction]:
        """Yield the answers in the order of the inputs."""
        for start in range(0, len(inputs), _BATCH):
            yield from self._answer(inputs[start : start + _BATCH])

    def _answer(self, inputs: Sequence[NamedClip]) -> Iterator[Prediction]:
        clips = [item.clip for item in inputs if item.clip is not None]
        found = extract(clips, self._prepare, device=self._device.type)
        reasons = {item.clip: item.reason for item in found.left_out}
        store = hold(found.samples, self._models[0].facts.recipe)
        rows = {sample.id: row for row, sample in enumerate(store.samples)}
        answers = self._probabilities(store) if found.samples else None
        for item in inputs:
            if item.clip is None:
                yield Prediction(input=item.name, error=item.problem)
            elif item.clip.id not in rows or answers is None:
                yield Prediction(input=item.name, error=reasons[str(item.clip.id)])
            else:
                row = rows[item.clip.id]
                probabilities, regions = (part[row].tolist() for part in answers)
                sample = found.samples[row]
                yield Prediction(
                    input=item.name,
                    onset=sample.sample.onset,
                    apex=sample.sample.apex,
                    probabilities=dict(zip(self.classes, probabilities, strict=True)),
                    regions=dict(zip(REGIONS, regions, strict=True)),
                    warnings=tuple(self._warnings(item.clip, sample)),
                    sample=sample,
                )

    def _probabilities(self, store: HeldStore) -> tuple[Tensor, Tensor]:
        """Return probabilities (n, classes) and contributions of the regions (n, 4), means over the models that count.

        A model counts for a clip whose subject it has not seen; where all have seen it, all count.
        """
        answers = [self._logits(model, store) for model in self._models]
        seen = torch.tensor([[s.subject in m.facts.trained_on.subjects for s in store.samples] for m in self._models])
        counts = (~seen | seen.all(dim=0)).double()  # (models, n)
        counts /= counts.sum(dim=0)
        logits = torch.stack(answers)  # (models, 5, n, classes): whole, then without each region
        probabilities = (logits[:, 0].softmax(dim=-1) * counts[..., None]).sum(dim=0)
        chosen = probabilities.argmax(dim=-1)[None, None, :, None].expand(*logits.shape[:3], 1)
        of_chosen = logits.gather(-1, chosen)[..., 0]  # (models, 5, n)
        falls = (of_chosen[:, :1] - of_chosen[:, 1:]) * counts[:, None]
        return probabilities, falls.sum(dim=0).T

    def _logits(self, model: TrainedModel, store: HeldStore) -> Tensor:
        """Return logits (5, n, classes), float64 on the CPU: of the whole mosaics, then without each region."""
        facts = model.facts
        data = DataConfig(crop=facts.crop, scaling="minmax" if facts.transform.minmax else "stored")
        rows = range(len(store.rows))
        resident = Resident(
            store, rows, data=data, mosaic_size=facts.transform.mosaic_size, device=self._device, threads=1
        )
        mosaics = load_set(resident, rows, facts.transform).images
        half = facts.transform.mosaic_size // 2
        parts = [mosaics]
        for top in (0, half):
            for left in (0, half):
                without = mosaics.clone()
                without[:, :, top : top + half, left : left + half] = 0  # the mean, after normalisation
                parts.append(without)
        return torch.stack([_in_batches(partial(TrainedModel.logits, model), part) for part in parts])

    def _warnings(self, clip: Clip, sample: PreparedSample) -> Iterator[str]:
        """Yield what a reader of the answer should know."""
        trained = [model.facts.trained_on for model in self._models]
        if all(sample.sample.subject in one.subjects for one in trained):
            yield "the person was seen in training"
        if APEX_FOUND in sample.notes:
            yield "the apex was found, not given"
        if SEVERAL_FACES in sample.notes:
            yield "several faces: a large one near the middle was taken"
        motion = mean_motion(sample.flow_image)
        ranges = [one.motion for one in trained if one.motion is not None]
        if not ranges:
            yield "trained on published flow pictures, whose flow was computed by others"
        elif motion < min(low for low, _ in ranges):
            yield f"less motion than in training ({motion:.3f} pixels)"
        elif motion > max(high for _, high in ranges):
            yield f"more motion than in training ({motion:.3f} pixels)"
        rates = [one.fps for one in trained if one.fps is not None]
        if clip.fps is None:
            yield "the frame rate is not known"
        elif rates and not min(low for low, _ in rates) <= clip.fps <= max(high for _, high in rates):
            yield f"a frame rate that was not in training ({clip.fps:g})"


def _in_batches(compute: Any, images: Tensor) -> Tensor:
    """Compute logits of (n, 3, S, S) in batches of one size; (n, classes) float64 on the CPU."""
    logits = []
    for part in images.split(_BATCH):
        filled = torch.cat([part, part.new_zeros(_BATCH - len(part), *part.shape[1:])])
        logits.append(compute(filled)[: len(part)].cpu().double())
    return torch.cat(logits)
