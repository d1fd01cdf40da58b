"""Published figures on the MEGC2019 composite, each with the way its epoch was chosen.

They are context for a run's own scores, never a target that the code uses. ``selection`` follows the published code or
log, not the text of a paper; "not stated" if no code was found. Only figures in a public table, figure, notebook or log
are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

MEGC2019: Final[Mapping[str, tuple[int, int]]] = {"casme2": (145, 24), "samm": (133, 28), "smic": (164, 16)}
"""Samples and subjects of the composite's three datasets (MEGC2019 official list, 442 samples, 68 subjects)."""

FIXED: Final = "last epoch"
LEAKED: Final = "best epoch on each test subject"


@dataclass(frozen=True, kw_only=True)
class PublishedFigure:
    """UF1 and UAR of one method under LOSO, three classes; None if not published."""

    method: str
    uf1: float | None
    uar: float | None
    casme2_uf1: float | None = None
    samm_uf1: float | None = None
    smic_uf1: float | None = None
    selection: str
    source: str


FIGURES: Final[tuple[PublishedFigure, ...]] = (
    PublishedFigure(
        method="LBP-TOP baseline",
        uf1=0.5882,
        uar=0.5785,
        casme2_uf1=0.7026,
        samm_uf1=0.3954,
        smic_uf1=0.2000,
        selection="nothing to choose",
        source="MEGC2019 challenge description",
    ),
    PublishedFigure(
        method="STSTNet, official PyTorch code",
        uf1=0.7209,
        uar=0.7250,
        selection=FIXED,
        source="STSTNet repository, README and log",
    ),
    PublishedFigure(
        method="STSTNet, paper",
        uf1=0.7353,
        uar=0.7605,
        casme2_uf1=0.8382,
        samm_uf1=0.6588,
        smic_uf1=0.6801,
        selection="not stated",
        source="arXiv 1902.03634",
    ),
    PublishedFigure(
        method="STSTNet in MEB, fixed epochs",
        uf1=0.7127,
        uar=None,
        casme2_uf1=0.7036,
        samm_uf1=0.6619,
        smic_uf1=0.7139,
        selection=FIXED,
        source="MEB repository, Table 3 notebook",
    ),
    PublishedFigure(
        method="STSTNet in MEB, best epoch",
        uf1=0.7740,
        uar=None,
        casme2_uf1=0.8692,
        samm_uf1=0.7040,
        smic_uf1=0.7214,
        selection=LEAKED,
        source="MEB repository, Table 3 notebook",
    ),
    PublishedFigure(
        method="OffApexNet in MEB, fixed epochs",
        uf1=0.7032,
        uar=None,
        casme2_uf1=0.774,
        samm_uf1=0.605,
        smic_uf1=0.683,
        selection=FIXED,
        source="MEB repository, Table 3 notebook",
    ),
    PublishedFigure(
        method="OffApexNet in MEB, best epoch",
        uf1=0.8390,
        uar=None,
        casme2_uf1=0.928,
        samm_uf1=0.790,
        smic_uf1=0.782,
        selection=LEAKED,
        source="MEB repository, Table 3 notebook",
    ),
    PublishedFigure(
        method="HTNet, paper",
        uf1=0.8603,
        uar=0.8475,
        casme2_uf1=0.9532,
        samm_uf1=0.8131,
        smic_uf1=0.8049,
        selection=LEAKED,
        source="Wang et al., Neurocomputing 602, 2024, Table 2; selection from main_HTNet.py",
    ),
    PublishedFigure(
        method="CausalNet",
        uf1=0.8976,
        uar=0.9020,
        casme2_uf1=0.9811,
        samm_uf1=0.8780,
        smic_uf1=0.8390,
        selection=f"{LEAKED}; depth and gamma chosen there too",
        source="CausalNet repository, README; selection from its code",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Context:
    """Published figures beside a run's scores."""

    comparable: bool
    """True only if the run scored exactly as many samples and subjects of the same datasets."""
    protocol: str
    figures: tuple[PublishedFigure, ...]


def context(counts: Mapping[str, tuple[int, int]]) -> Context:
    """Return the published figures; say if they are about the same samples as ``counts``.

    ``counts`` are the (samples, subjects) scored, by dataset.
    """
    return Context(
        comparable=dict(counts) == dict(MEGC2019),
        protocol="MEGC2019 composite, LOSO, 3 classes, 442 samples of 68 subjects",
        figures=FIGURES,
    )
