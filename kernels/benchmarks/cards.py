"""Published rates of cards: what a floor is predicted from where nothing has been measured.

These are data-sheet figures, dense and without sparsity. No program reaches them: a copy moves some 90 % of the
bandwidth, a large matrix product does some 80 % of the rate. A run measures both on its own card and compares with
those; the two kinds of figure are never mixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["CARDS", "Card", "find_card"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card by its data sheet."""

    name: str
    arch: str
    """The architecture that its kernels are compiled for."""
    bandwidth: float
    """Device memory, bytes a second."""
    matrix_rate: float
    """Dense bf16 and fp16 products with fp32 accumulation, FLOP a second."""
    float_rate: float
    """Plain fp32 arithmetic, FLOP a second; TF32 is not used by anything here."""

    def rate(self, dtype: str) -> float:
        """FLOP a second of products in ``dtype`` (bf16, fp16 or fp32)."""
        return self.float_rate if dtype == "fp32" else self.matrix_rate


CARDS: Final = {
    # NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM
    "a100": Card(name="A100 SXM 80 GB", arch="sm_80", bandwidth=2.039e12, matrix_rate=312e12, float_rate=19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM; its matrix figures are with sparsity, halved here
    "h100": Card(name="H100 SXM", arch="sm_90", bandwidth=3.35e12, matrix_rate=989e12, float_rate=67e12),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM; likewise
    "h200": Card(name="H200 SXM", arch="sm_90", bandwidth=4.8e12, matrix_rate=989e12, float_rate=67e12),
    # NVIDIA HGX B200 data sheet, an eighth of the board's figures; likewise
    "b200": Card(name="B200 SXM", arch="sm_100", bandwidth=7.7e12, matrix_rate=2250e12, float_rate=75e12),
}


def find_card(name: str) -> Card | None:
    """Return the card whose model is part of a device's name ("NVIDIA H100 80GB HBM3"); None for an unknown one."""
    return next((card for model, card in CARDS.items() if model.upper() in name.upper()), None)
