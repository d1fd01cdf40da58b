"""Program ``htnet``: checks that the project's own packages are found, then hands over to :mod:`launch.cli`.

The check cannot be in ``launch``, because another package of that name may be in its place.
"""

from __future__ import annotations

import sys
from importlib import import_module

from htnet.errors import EXIT_BAD_INPUT, InputError
from htnet.rooms import check_rooms


def main() -> int:
    """Run the command line; return the exit code."""
    try:
        check_rooms()
    except InputError as error:
        print(f"htnet: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return int(import_module("launch.cli").main())


if __name__ == "__main__":
    sys.exit(main())
