"""Datasets as their owners ship them, one file per layout."""

from __future__ import annotations

from pathlib import Path

from htnet.config import SourceConfig
from htnet.data.datasets.base import WorkbookDataset
from htnet.data.datasets.casme import Casme
from htnet.data.datasets.casme2 import Casme2
from htnet.data.datasets.casme3 import Casme3A, Casme3C
from htnet.data.datasets.fourdme import FourDME
from htnet.data.datasets.generic_csv import GenericCsv
from htnet.data.datasets.htnet_release import HTNetRelease
from htnet.data.datasets.labels import LabelScheme
from htnet.data.datasets.mmew import Mmew
from htnet.data.datasets.samm import Samm
from htnet.data.datasets.smic import Smic
from htnet.errors import InputError

Adapter = WorkbookDataset | HTNetRelease
"""A dataset as its owners ship it."""
_KINDS: tuple[type[WorkbookDataset], ...] = (Casme2, Samm, Smic, Casme, Casme3A, Casme3C, Mmew, FourDME, GenericCsv)
WORKBOOKS = {kind.adapter: kind for kind in _KINDS}
"""Adapters of datasets with an annotation table, by name."""
ADAPTERS: dict[str, type[Adapter]] = {**WORKBOOKS, HTNetRelease.adapter: HTNetRelease}
"""Adapters by the name that ``prepare.sources.N.adapter`` takes."""
DATASETS = {name: (kind.dataset,) for name, kind in WORKBOOKS.items()} | {HTNetRelease.adapter: HTNetRelease.datasets}
"""Datasets of an adapter, as its samples name them; the list of one's own (csv) names them in its rows."""


def build_adapter(source: SourceConfig, scheme: LabelScheme) -> Adapter:
    """Return the adapter that a source names; :class:`InputError` where its folder is missing."""
    root = Path(source.root)
    if not root.is_dir():
        raise InputError(f"prepare.sources: {root}: no such folder (adapter {source.adapter})")
    annotations = None if source.annotations is None else Path(source.annotations)
    return ADAPTERS[source.adapter](root=root, annotations=annotations, scheme=scheme)
