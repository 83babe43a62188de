"""Make the cases taken from public bug reports in a temporary folder, and check that each ends as it should.

    python scripts/try_cases.py checkpoints|data [CASE ...]

Each part is a module beside this file with ``check(folder, names)``, which yields (case, what was tried, fault or "").
The cases lie in shared/cases/PART beside the repository, or below $MIM_REFINER_SHARED; without them nothing is tried.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path

PARTS = {"checkpoints": "try_checkpoints", "data": "try_data"}


def main() -> int:
    """Print a line for every trial; exit code 1 if one went wrong."""
    parser = argparse.ArgumentParser(description="Try the cases of public bug reports.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", help="only cases whose name starts so, such as 07")
    chosen = parser.parse_args()
    here = Path(__file__).resolve()
    cases = Path(os.environ.get("MIM_REFINER_SHARED", here.parents[2] / "shared")) / "cases" / chosen.part
    if not cases.is_dir():
        print(f"skipped: the cases are not here ({cases})")
        return 0
    sys.path.insert(0, str(here.parent))
    tried = faults = 0
    for case, what, fault in importlib.import_module(PARTS[chosen.part]).check(cases, chosen.names):
        print(f"{'FAULT' if fault else 'ok   '} {case}: {what}{': ' if fault else ''}{fault}", flush=True)
        tried, faults = tried + 1, faults + bool(fault)
    print(f"{tried - faults} of {tried} as they should be")
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main())
