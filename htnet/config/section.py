"""Sections: frozen keyword-only dataclasses that pydantic checks, whichever way they are made.

The bounds of a value are in its type, and the string under a field is its documentation.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Final, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_Kind = TypeVar("_Kind")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

Positive = Annotated[int, Field(ge=1)]
"""A whole number from 1 on."""
Count = Annotated[int, Field(ge=0)]
"""A whole number from 0 on."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number in [0, 1]."""
NotNegative = Annotated[float, Field(ge=0)]
"""A number from 0 on."""
Above0 = Annotated[float, Field(gt=0)]
"""A number above 0."""
Device = Literal["auto", "cpu", "cuda"]
"""Device that computes; auto takes the GPU that it was given."""


class _NotIdentity:
    """The type of :data:`NOT_IDENTITY`."""


NOT_IDENTITY: Final = _NotIdentity()
"""Marks, in ``Annotated[...]``, a key or a section that changes no prediction. All others are a run's identity."""


def takes_gpu(device: Device, gpus: float) -> bool:
    """Tell if work computes on a GPU: it asks for one, or takes the share ``gpus`` that it was given."""
    return device == "cuda" or (device == "auto" and gpus > 0)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(kind: type[_Kind]) -> type[_Kind]:
    """Make a class a section of the configuration; :class:`pydantic.ValidationError` where a value breaks its type."""
    made: Any = dataclass(frozen=True, kw_only=True, config=_STRICT)(kind)
    return made  # type: ignore[no-any-return] # pydantic names a type of its own
