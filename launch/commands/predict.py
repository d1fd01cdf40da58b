"""``htnet predict``: classes of one's own clips by trained models."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from htnet.config.data import CropRule
from htnet.config.prepare import DetectorName
from htnet.data.inputs import add_landmarks, read_inputs
from htnet.errors import EXIT_DONE, EXIT_PARTIAL, InputError
from htnet.files import whole_folder
from htnet.model_folder import TrainedModel, is_model_folder, load_model
from launch.report.pictures import draw_prediction
from launch.report.predictions import write_predictions
from launch.screen import say
from launch.tasks.prediction import Prediction, Predictor, count_warnings, rebuild_preparation

__all__ = ["predict"]

_NAMED = 3
_SHOWN = 32
"""Letters of a clip's name on the terminal; its end tells more than its beginning."""


def predict(
    model: Path,
    inputs: Sequence[str],
    out: Path,
    console: Console,
    *,
    landmarks: Path | None,
    detector: DetectorName,
    detector_model: str | None,
    device: str,
) -> int:
    """Predict the inputs into the new folder ``out``; returns the exit code, 1 where a clip has no answer."""
    device = _resolve(device)
    models = open_models(model, device)
    settings = {"detector": detector, "detector_model": detector_model}
    predictor = Predictor(models, rebuild_preparation(models[0], settings), device=device)
    clips = add_landmarks(read_inputs(inputs, sys.stdin), landmarks)
    answers: list[Prediction] = []
    with whole_folder(out) as folder:
        (folder / "pictures").mkdir()
        for answer in predictor.predict(clips):
            answers.append(_with_picture(answer, folder, len(answers) + 1, predictor.crop))
            if answer.error is not None:
                named = answer.error.startswith(answer.input)
                print(f"htnet predict: {answer.error if named else f'{answer.input}: {answer.error}'}", file=sys.stderr)
        write_predictions(folder, answers, predictor.classes, _named(models))
        lines = (json.dumps(answer.plain(), ensure_ascii=False) + "\n" for answer in answers)
        (folder / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    console.print(_table(answers, predictor.classes))
    _say_warnings(answers, console)
    failed = sum(answer.error is not None for answer in answers)
    say(console, f"{len(answers) - failed} of {len(answers)} clips: {out / 'index.html'}")
    return EXIT_PARTIAL if failed else EXIT_DONE


def open_models(path: Path, device: str) -> list[TrainedModel]:
    """Load a model folder, or all model folders in a folder.

    Raises:
        InputError: there is none.
    """
    if is_model_folder(path) or not path.is_dir():
        return [load_model(path, device)]
    folders = [folder for folder in sorted(path.iterdir()) if is_model_folder(folder)]
    return [load_model(folder, device) for folder in folders] or [load_model(path, device)]


def _resolve(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _with_picture(answer: Prediction, folder: Path, number: int, crop: CropRule) -> Prediction:
    """Draw the picture of an answer and let go of its pixels."""
    if answer.sample is None:
        return answer
    name = f"pictures/{number:04d}.jpg"
    picture = draw_prediction(answer.sample, answer.probabilities, answer.regions, crop=crop)
    picture.save(folder / name, quality=90)
    return replace(answer, picture=name, sample=None)


def _named(models: Sequence[TrainedModel]) -> str:
    names = ", ".join(model.path.resolve().name for model in models[:_NAMED])
    return names if len(models) <= _NAMED else f"{names} and {len(models) - _NAMED} more, averaged"


def _table(answers: Sequence[Prediction], classes: Sequence[str]) -> Table:
    table = Table(Column("clip", overflow="fold"), "class", *classes, "apex", "warnings")
    above = _folder_of_all(answers)
    for answer in answers:
        name = answer.input.removeprefix(above)
        name = name if len(name) <= _SHOWN else f"...{name[3 - _SHOWN :]}"
        if answer.error is None:
            shown = (f"{answer.probabilities[label]:.2f}" for label in classes)
            table.add_row(name, answer.predicted, *shown, str(answer.apex), str(len(answer.warnings) or ""))
        else:
            table.add_row(name, "none", *("" for _ in classes), "", "", style="red")
    return table


def _folder_of_all(answers: Sequence[Prediction]) -> str:
    """Return the folder in which all the clips lie, with a slash at its end; empty where there is none."""
    try:
        folder = os.path.commonpath([str(Path(answer.input).parent) for answer in answers])
    except ValueError:  # some are absolute, some are not
        return ""
    return f"{folder}/" if folder else ""


def _say_warnings(answers: Sequence[Prediction], console: Console) -> None:
    """Print each warning once, with the number of clips that have it; numbers in it are left out."""
    for warning, count in count_warnings(answers).most_common():
        say(console, f"{count} of {len(answers)}: {warning}")
