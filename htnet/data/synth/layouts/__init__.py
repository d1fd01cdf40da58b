"""Synthetic clips on disk as the datasets' owners ship theirs, one file per layout.

File names, columns and folder layouts follow what the owners ship or, where that has not been seen, what public readers
expect. Traps of the annotations that cost nothing are always there (subjects as numbers that lost their zeros, SAMM's
header in row 14, SMIC's ``s1`` beside ``s01``); the others are planted on request, each as a clip of its own. The
landmarks of the onset frames go into ``landmarks.csv``.
"""

from __future__ import annotations

from htnet.data.synth.layouts.base import Layout
from htnet.data.synth.layouts.casme import CasmeLayout
from htnet.data.synth.layouts.casme2 import Casme2Layout
from htnet.data.synth.layouts.casme3 import Casme3ALayout, Casme3CLayout
from htnet.data.synth.layouts.fourdme import FourDMELayout
from htnet.data.synth.layouts.generic_csv import CsvLayout
from htnet.data.synth.layouts.htnet_release import HTNetReleaseLayout
from htnet.data.synth.layouts.mmew import MmewLayout
from htnet.data.synth.layouts.samm import SammLayout
from htnet.data.synth.layouts.smic import SmicLayout

_ALL: tuple[Layout, ...] = (
    *(Casme2Layout(), SammLayout(), SmicLayout(), CasmeLayout(), Casme3ALayout(), Casme3CLayout(), MmewLayout()),
    *(FourDMELayout(), CsvLayout(), HTNetReleaseLayout()),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ALL}
"""The layouts by the name of their adapter, those of the MEGC2019 composite first; the order takes part in the seed."""
