"""The packages of the project under their import names, two of which other projects use as well."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from htnet.errors import InputError

ROOMS = ("kernels", "htnet", "dali_pipelines", "launch")
_REMEDY = (
    "uninstall that package or take it off PYTHONPATH, then install htnet again, best into an environment of its own"
)


def check_rooms() -> None:
    """Make sure that Python finds our packages under their names; Hugging Face has a ``kernels``, ROS a ``launch``.

    Raises:
        InputError: another package is found in place of ours, or lies in the same folder; names both places.
    """
    for name in ROOMS:
        ours = Path(__file__).resolve().parents[1] / name
        found = _place(name)
        if found != ours:
            raise InputError(f"{name}: Python finds {found}, which is not htnet's own {ours}: {_REMEDY}")
        if (other := _installed(name)) is not None and Path(str(other.locate_file(name))).resolve() == ours:
            raise InputError(
                f"{name}: the package {name} {other.version} was installed over htnet's own files in {ours}: {_REMEDY}"
            )


def _place(name: str) -> Path | None:
    """Find the folder of a package without importing it; None where there is none."""
    spec = find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))).resolve() if places else None


def _installed(name: str) -> metadata.Distribution | None:
    """Find the distribution of this very name; ours is called htnet."""
    try:
        return metadata.distribution(name) if name != "htnet" else None
    except metadata.PackageNotFoundError:
        return None
