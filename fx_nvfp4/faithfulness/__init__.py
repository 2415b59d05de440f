"""How far ways to compute an NVFP4 product are from the exact sum; ``python -m fx_nvfp4 faithfulness`` prints it.

Every way gets the same numbers: codes, block scales, global scales and activations. What differs is where it rounds,
and which of the scales it looks at. docs/numerics.md has the argument.
"""

from .cases import Case, LinearCase, MoECase, random_cases
from .measure import Row, Study, measure
from .stored import checkpoint_cases

__all__ = ["Case", "LinearCase", "MoECase", "Row", "Study", "checkpoint_cases", "measure", "random_cases"]
