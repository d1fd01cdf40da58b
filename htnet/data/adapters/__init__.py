"""Datasets as their owners ship them, one file per layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from htnet.config import PrepareConfig, SourceConfig
from htnet.data.adapters.htnet_release import HTNetRelease
from htnet.data.prepared import Adapter


def build_adapter(source: SourceConfig, prepare: PrepareConfig) -> Adapter:
    """The adapter that a source names."""
    root = Path(source.root)
    landmarks = None if source.landmarks is None else Path(source.landmarks)
    if source.adapter == "htnet_release":
        return HTNetRelease(root=root, landmarks=landmarks)
    from htnet.data.adapters.casme2 import Casme2
    from htnet.data.adapters.clips import FlowOptions
    from htnet.data.adapters.samm import Samm
    from htnet.data.adapters.smic import Smic

    kinds: dict[str, Any] = {"casme2": Casme2, "samm": Samm, "smic": Smic}
    adapter: Adapter = kinds[source.adapter](
        root=root,
        landmarks=landmarks,
        flow=FlowOptions(
            method=prepare.flow_method,
            size=prepare.flow_size,
            working_size=prepare.working_size,
            strain=prepare.strain,
            keep_frames=prepare.keep_frames,
        ),
    )
    return adapter
