"""Trained models for other programs: ONNX, torch.export, and the public code's weights.

The first two hold the normalisation too: they take mosaics (B, 3, S, S) float32 as they are cut, before mean and
standard deviation, in batches of any size, and return logits (B, num_classes). Each is compared with the model before
it is kept.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor, nn

from htnet.checkpoint import to_upstream
from htnet.data.transform import FlowTransform
from htnet.errors import InputError
from htnet.files import whole_folder
from htnet.model import HTNet
from htnet.model_folder import TrainedModel

__all__ = ["FORMATS", "ExportFormat", "export_model"]

ExportFormat = Literal["onnx", "torch", "upstream"]
FORMATS: Final[Mapping[ExportFormat, str]] = {"onnx": "model.onnx", "torch": "model.pt2", "upstream": "HTNet.pth"}
"""Name of the file by format."""
_TOLERANCE: Final = 1e-5
"""Largest difference of a logit, relative to the largest one, float32."""


class _Deployed(nn.Module):
    """The network with the normalisation of its input."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        # plain operations: a kernel of this project is none of another program's
        self.network = HTNet(replace(model.config.model, attention_backend="reference"))
        self.network.load_state_dict(model.network.state_dict())
        self.mean, std = _channels(model.facts.transform)
        self.inverse = 1.0 / std
        self.eval().requires_grad_(False)

    def forward(self, mosaics: Tensor) -> Tensor:
        logits: Tensor = self.network((mosaics - self.mean) * self.inverse)
        return logits


def export_model(model: TrainedModel, kind: ExportFormat, out: Path) -> Path:
    """Write a model on the CPU into the new folder ``out``, in one format; returns the file.

    Raises:
        InputError: a package of the format is not installed, the network has no such form, or ``out`` is taken.
    """
    with whole_folder(out) as folder:
        path = folder / FORMATS[kind]
        _WRITERS[kind](model, path)
    return out / path.name


def _write_upstream(model: TrainedModel, path: Path) -> None:
    torch.save(to_upstream(model.network.state_dict()), path)


def _write_torch(model: TrainedModel, path: Path) -> None:
    program = _exported(model)
    torch.export.save(program, path)
    _compare(model, torch.export.load(path).module(), path.name)


def _write_onnx(model: TrainedModel, path: Path) -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise InputError(f"--format onnx needs the package {error.name}: pip install 'htnet[onnx]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _exported(model), dynamo=True, input_names=["mosaics"], output_names=["logits"], verbose=False
        )
    assert program is not None  # only the older exporter returns nothing
    program.save(path)
    written = onnx.load(path)
    facts = model.facts
    onnx.helper.set_model_props(
        written,
        {"classes": json.dumps(facts.classes), "minmax": json.dumps(facts.transform.minmax), "crop": facts.crop},
    )
    onnx.save(written, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    _compare(model, lambda mosaics: torch.from_numpy(session.run(None, {"mosaics": mosaics.numpy()})[0]), path.name)


def _exported(model: TrainedModel) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(_Deployed(model), (_mosaics(model, 2),), dynamic_shapes=({0: batch},))


def _mosaics(model: TrainedModel, count: int) -> Tensor:
    """Return random mosaics with the mean and deviation of the training's."""
    mean, std = _channels(model.facts.transform)
    size = model.facts.transform.mosaic_size
    noise = np.random.default_rng(0).standard_normal((count, 3, size, size)).astype(np.float32)
    return torch.from_numpy(noise) * std + mean


def _channels(transform: FlowTransform) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, (1, 3, 1, 1) each."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (transform.mean, transform.std))
    return mean, std


def _compare(model: TrainedModel, exported: Callable[[Tensor], Tensor], name: str) -> None:
    """Raise AssertionError where the exported program computes something else, for batches of one and several."""
    deployed = _Deployed(model)
    for count in (1, 5):
        mosaics = _mosaics(model, count)
        expected = deployed(mosaics)
        error = float((exported(mosaics) - expected).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            raise AssertionError(f"{name}: logits of a batch of {count} differ by {error:.1e} of the largest")


_WRITERS: Final[Mapping[ExportFormat, Callable[[TrainedModel, Path], Any]]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
    "upstream": _write_upstream,
}
