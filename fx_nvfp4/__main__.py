"""``python -m fx_nvfp4``, see :mod:`fx_nvfp4.cli`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
