"""Prefill and decoding of a whole model, packed beside 16-bit weights; ``python -m fx_nvfp4 bench`` prints it."""

from .measure import Row, Settings, Study, measure
from .source import opened

__all__ = ["Row", "Settings", "Study", "measure", "opened"]
