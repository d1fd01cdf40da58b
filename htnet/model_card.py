"""The card of a trained model: its data, scores, limits and intended use, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htnet.model_folder import ModelFacts

__all__ = ["write_card"]

_SELECTIONS = {
    "final": "the last epoch; no choice was made",
    "validated": "the epoch that was best on held-out subjects",
}


def write_card(facts: ModelFacts, *, parameters: int) -> str:
    """Return the card as Markdown."""
    samples = facts.trained_on.samples
    flow = facts.recipe.get("flow", {})
    return "\n".join(
        [
            "# A micro-expression model",
            "",
            f"HTNet (Wang et al., Neurocomputing 602, 2024), {parameters:,} parameters, trained by htnet "
            f"{facts.versions.get('htnet', 'of an unknown version')}. It tells {len(facts.classes)} classes apart: "
            f"{', '.join(facts.classes)}.",
            "",
            "## Data",
            "",
            f"{sum(samples.values()):,} clips of {len(facts.trained_on.subjects)} people: "
            f"{', '.join(f'{count:,} {name}' for name, count in samples.items())}. Input is optical flow between onset "
            f"and apex ({flow.get('method', 'unknown')}, {flow.get('size', '?')} pixels, strain {flow.get('strain')}).",
            *_range("Mean length of the flow", facts.trained_on.motion, "pixels of the flow image, 98 % of the clips"),
            *_range("Frame rate", facts.trained_on.fps, "frames a second"),
            "",
            "<details><summary>People whose clips the weights have seen</summary>",
            "",
            ", ".join(facts.trained_on.subjects),
            "",
            "</details>",
            "",
            "A score on any of them says nothing about new people.",
            "",
            "## Scores",
            "",
            *_scores(facts.scores),
            "",
            f"Epoch {facts.epoch}: {_SELECTIONS.get(facts.selection, facts.selection)}.",
            "",
            "## Intended use",
            "",
            "Research on spontaneous micro-expressions in frontal faces, filmed at a high frame rate in a laboratory. "
            "Predictions are statements about motion in a clip, to be read with their probabilities and warnings.",
            "",
            "## Limits",
            "",
            "- It is not a lie detector, and it does not know what a person feels. Expressions and emotions are not "
            "the same, and the annotations that it learned from are judgements of few annotators.",
            "- The datasets of the field are small and of few countries and ages. Accuracy on other people, cameras, "
            "light and head motion is not known from the scores above.",
            "- It expects that an expression happens between onset and apex. A clip without one gets a class, too.",
            "- Do not use it to judge people: in hiring, education, policing, at borders or in court.",
            "",
        ]
    )


def _range(name: str, found: tuple[float, float] | None, unit: str) -> list[str]:
    return [] if found is None else [f"{name} in training: {found[0]:.3g} to {found[1]:.3g} {unit}."]


def _scores(scores: Mapping[str, Any]) -> list[str]:
    """Return a table of UF1 and UAR with their intervals, a row per dataset."""
    if not scores:
        return ["None are recorded here; `htnet sweep` measures its recipe on people that it has not seen."]
    rows = ["| held-out clips | UF1 | UAR | samples |", "|---|---|---|---|"]
    for name, row in scores.items():
        cells = (f"{row[key]:.3f}{_interval(row, key)}" for key in ("uf1", "uar"))
        rows.append(f"| {name} | {' | '.join(cells)} | {row['samples']} |")
    return rows


def _interval(row: Mapping[str, Any], key: str) -> str:
    interval = row.get("interval")
    return "" if not interval else " ({:.2f} to {:.2f})".format(*interval[key])
