"""A trained model on disk: a folder with everything that a prediction needs.

Content::

    MODEL/model.safetensors   weights of HTNet, float32
    MODEL/config.yaml         the configuration that trained them
    MODEL/model.json          ModelFacts; written last, so that a folder with it is whole
    MODEL/card.md             the facts for people, by htnet.model_card

Loading reads tensors and plain values; no code in the folder is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from htnet.config import Config
from htnet.config.data import CropRule
from htnet.config.load import load_config
from htnet.config.plain import dump_config
from htnet.data.store.reader import Store
from htnet.data.transform import FlowTransform
from htnet.errors import InputError
from htnet.files import read_json, write_json, write_whole
from htnet.model import HTNet
from htnet.model_card import write_card

__all__ = [
    "ModelFacts",
    "TrainedModel",
    "TrainedOn",
    "fill_network",
    "is_model_folder",
    "load_model",
    "mean_motion",
    "read_facts",
    "save_model",
    "seen_samples",
]

FORMAT = 1
_WEIGHTS, _CONFIG, _FACTS, _CARD = "model.safetensors", "config.yaml", "model.json", "card.md"
_MOTION_SAMPLES = 2000
"""Samples of which the range of motion is taken, at least; fewer where there are fewer."""
_STRICT = {"extra": "forbid", "allow_inf_nan": False}


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The samples that weights have seen."""

    stores: tuple[str, ...]
    """Digests of the stores."""
    subjects: tuple[str, ...]
    """Subjects keyed by their dataset, ``casme2/sub01``, those of the initial weights included."""
    samples: Mapping[str, int]
    """Samples by class."""
    motion: tuple[float, float] | None = None
    """1 % and 99 % quantiles of the mean length of the flow, in pixels of a flow image; None of published pictures."""
    fps: tuple[float, float] | None = None
    """Lowest and highest frame rate; None where no dataset gives one."""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Content of ``model.json``."""

    format: int = FORMAT
    classes: tuple[str, ...]
    """Names of the classes in the order of the logits."""
    recipe: Mapping[str, Any]
    """The way from frames to flow images, as ``store.json`` has it."""
    transform: FlowTransform
    """The way from a flow image to the network's input."""
    crop: CropRule
    """The rule by which regions are cut."""
    trained_on: TrainedOn
    selection: str
    """The choice of the epoch: ``final`` or ``validated``."""
    epoch: int
    """Finished epochs of the weights."""
    weights_sha256: str = ""
    """SHA-256 of ``model.safetensors``; set when the folder is written."""
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Scores on samples that the weights have not seen, as a run's summary has them; empty where none were held out."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package versions that trained it."""

    __pydantic_config__ = _STRICT


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A network with the facts of its training, ready to predict."""

    path: Path
    network: HTNet
    """In evaluation mode, float32, without gradients."""
    config: Config
    facts: ModelFacts

    def logits(self, mosaics: Tensor) -> Tensor:
        """Return (B, num_classes) float32 of normalised mosaics (B, 3, S, S) float32 on the network's device."""
        with torch.no_grad():
            logits: Tensor = self.network(mosaics)
        return logits


def seen_samples(store: Store, rows: Sequence[int], init: str = "") -> TrainedOn:
    """Describe the samples that weights have seen: rows of a store, and what the model folder ``init`` had seen."""
    samples = [store.samples[row] for row in rows]
    labels = [sample.label for sample in samples]
    rates = [sample.fps for sample in samples if sample.fps is not None]
    pixels = [row for row in rows if store.samples[row].onset is not None]
    some = pixels[:: max(1, len(pixels) // _MOTION_SAMPLES)]
    lengths = [mean_motion(store.read_flow(row)) for row in some]
    low, high = np.quantile(lengths, (0.01, 0.99)).tolist() if lengths else (0.0, 0.0)
    seen = TrainedOn(
        stores=(store.digest,),
        subjects=tuple(sorted({sample.subject for sample in samples})),
        samples={name: labels.count(label) for label, name in enumerate(store.classes)},
        motion=(low, high) if lengths else None,
        fps=(min(rates), max(rates)) if rates else None,
    )
    return _joined(seen, read_facts(Path(init)).trained_on) if init else seen


def _joined(one: TrainedOn, other: TrainedOn) -> TrainedOn:
    names = dict.fromkeys((*one.samples, *other.samples))
    return TrainedOn(
        stores=tuple(dict.fromkeys((*one.stores, *other.stores))),
        subjects=tuple(sorted({*one.subjects, *other.subjects})),
        samples={name: one.samples.get(name, 0) + other.samples.get(name, 0) for name in names},
        motion=_hull(one.motion, other.motion),
        fps=_hull(one.fps, other.fps),
    )


def _hull(one: tuple[float, float] | None, other: tuple[float, float] | None) -> tuple[float, float] | None:
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def mean_motion(flow_image: NDArray[np.floating[Any]]) -> float:
    """Return the mean length of the flow in pixels of an (F, F, 3) flow image, channels (flow_u, flow_v, strain)."""
    flow = flow_image.astype(np.float64)
    return float(np.hypot(flow[..., 0], flow[..., 1]).mean())


def is_model_folder(path: Path) -> bool:
    """Tell if a finished model lies in the folder."""
    return (path / _FACTS).is_file()


def save_model(place: Path, weights: Mapping[str, Tensor], config: Config, facts: ModelFacts) -> None:
    """Write a model into the folder ``place``, which may exist; weights of any dtype become float32.

    A model that lay there before is none until the new one is whole.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / _FACTS).unlink(missing_ok=True)
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in weights.items()}
    content = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_whole(place / _WEIGHTS, content)
    write_whole(place / _CONFIG, dump_config(config))
    write_whole(place / _CARD, write_card(facts, parameters=sum(tensor.numel() for tensor in tensors.values())))
    write_json(place / _FACTS, asdict(facts) | {"weights_sha256": hashlib.sha256(content).hexdigest()})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> TrainedModel:
    """Load a model folder onto a device.

    Raises:
        InputError: it is no model folder, of another format, or its weights do not fit its configuration; names the
            file and the rule.
    """
    folder = Path(path)
    facts = read_facts(folder)
    config = load_config(folder / _CONFIG)
    if len(facts.classes) != config.model.num_classes:
        raise InputError(
            f"{folder / _FACTS}: names {len(facts.classes)} classes; model.num_classes is {config.model.num_classes}"
        )
    network = HTNet(config.model)
    fill_network(network, folder)
    network.to(device).eval().requires_grad_(False)
    return TrainedModel(path=folder, network=network, config=config, facts=facts)


@cache
def _adapter() -> TypeAdapter[ModelFacts]:
    return TypeAdapter(ModelFacts)


def read_facts(folder: Path) -> ModelFacts:
    """Read the facts of a model folder; errors as of :func:`load_model`."""
    path = folder / _FACTS
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder")
    if not path.is_file():
        raise InputError(f"{path}: not found; {folder} is no model folder, or its training has not ended")
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as the facts of a model: {error!r}") from None
    if version != FORMAT:
        raise InputError(f"{path}: model format {version!r}; this htnet reads format {FORMAT}")
    return read_json(path, _adapter(), "model")


def fill_network(network: HTNet, folder: Path) -> None:
    """Put the weights of a model folder into the network; InputError names the keys that do not fit."""
    path = folder / _WEIGHTS
    try:
        weights = safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; the model folder is not whole") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: no weights can be read: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise InputError(f"{path}: the weights do not fit the configured network: {'; '.join(wrong[:3])}{more}")
    network.load_state_dict(weights)
