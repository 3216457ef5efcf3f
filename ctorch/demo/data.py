"""The Hudson Bay record: pelts of snowshoe hare and Canada lynx, in thousands, 1900-1920.

Source: returns of the Hudson's Bay Company, as compiled by C. Elton and M. Nicholson (1942), "The
ten-year cycle in numbers of the lynx in Canada", Journal of Animal Ecology 11, 215-244, and D. A.
MacLulich (1937); the yearly table is the one that textbooks and case studies use after E. P. Odum
(1953), Fundamentals of Ecology: J. M. Mahaffy's course notes (2010) and B. Carpenter's Stan case
study (2018), which agree in every number.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_YEAR = 1900

HARE = (
    30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
    40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7,
)  # fmt: skip

LYNX = (
    4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
    8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6,
)  # fmt: skip

HELD_OUT = 5  # years at the end that no fit sees


def record() -> tuple[Tensor, Tensor]:
    """Years since 1900 [21] and pelts [21, 2] (hare, lynx; thousands), float64."""
    pelts = torch.tensor([HARE, LYNX], dtype=torch.float64).T.contiguous()
    return torch.arange(len(HARE), dtype=torch.float64), pelts
