"""Page ``DIR/index.html`` of ``htnet predict``: self-contained, a card per clip, filtered and ordered by its reader."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.report.pictures import PANELS, REGION_COLOURS, draw_wheel
from launch.tasks.prediction import Prediction, count_warnings, warning_kind

__all__ = ["write_predictions"]


def write_predictions(folder: Path, answers: Sequence[Prediction], classes: Sequence[str], model: str) -> None:
    """Write ``index.html``, the most confident answer first.

    Args:
        folder: holds the answers' pictures.
        answers: as given; those with an error come last on the page.
        model: name of the model, for people.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # names of clips and classes come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    wheel = io.BytesIO()
    draw_wheel(96).save(wheel, "PNG")
    # pictures are read one by one while the page is written: a thousand of them need not be held
    stream = environment.get_template("predictions.html.j2").stream(
        title=f"{len(answers)} predicted clip{'' if len(answers) == 1 else 's'}",
        model=model,
        classes=classes,
        failed=any(answer.error is not None for answer in answers),
        warnings=sorted(count_warnings(answers)),
        panels=PANELS,
        wheel=base64.b64encode(wheel.getvalue()).decode(),
        cards=_cards(folder, answers),
    )
    with (folder / "index.html").open("w", encoding="utf-8") as file:
        file.writelines(stream)


def _cards(folder: Path, answers: Sequence[Prediction]) -> Iterator[dict[str, Any]]:
    order = sorted(range(len(answers)), key=lambda place: (-answers[place].confidence, place))
    for place in order:
        answer = answers[place]
        card: dict[str, Any] = {
            "name": answer.input,
            "place": place,
            "error": answer.error,
            "confidence": round(answer.confidence, 6),
            "predicted": None,
            "kinds": list(Counter(map(warning_kind, answer.warnings))),
        }
        if answer.picture is not None:
            largest = max(*map(abs, answer.regions.values()), 1e-9)
            card |= {
                "predicted": answer.predicted,
                "onset": answer.onset,
                "apex": answer.apex,
                "probabilities": list(answer.probabilities.items()),
                "regions": [
                    (name.replace("_", " "), value, colour, abs(value) / largest)
                    for (name, value), colour in zip(answer.regions.items(), REGION_COLOURS, strict=True)
                ],
                "warnings": answer.warnings,
                "picture": base64.b64encode((folder / answer.picture).read_bytes()).decode(),
            }
        yield card
