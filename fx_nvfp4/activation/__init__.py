"""Activation functions of experts as text: one small language that graphs carry, PyTorch evaluates and Triton compiles.

``silu(g) * u`` is the gated SiLU of most models: g are the gate's outputs, u the other half; where there is no gate, u
is all there is. Allowed are g and u, numbers, + - * / and unary -, one comparison as the first argument of where(), and
the functions in FUNCTIONS. Everything is computed in fp32. Nothing is ever executed but this language.
"""

from .functions import FUNCTIONS
from .language import Expression, parse
from .names import describe, simplify

__all__ = ["FUNCTIONS", "Expression", "describe", "parse", "simplify"]
