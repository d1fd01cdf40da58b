"""htnet: distributed LOSO training of HTNet for micro-expression recognition."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from htnet.config import HTNetConfig
    from htnet.model import HTNet
    from htnet.model_folder import load_model as load

__all__ = ["HTNet", "HTNetConfig", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # torch takes seconds to import; the command line and Ray's driver do without it, and benchmarks without pydantic
    if name == "HTNet":
        from htnet.model import HTNet

        return HTNet
    if name == "HTNetConfig":
        from htnet.config import HTNetConfig

        return HTNetConfig
    if name == "load":
        from htnet.model_folder import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
