"""``python -m mim_refiner`` is the command ``mim-refiner``."""

from __future__ import annotations

import sys

from mim_refiner.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
