"""`make fuzz`: seeded cases through the command line in this process; what goes wrong is counted and shown.

python tests/fuzz                          3,000 mutated configurations and the hostile ones
python tests/fuzz --seed 7 --only 1234     one mutated configuration again, with all that it said
python tests/fuzz --hostile --only 17      one hostile case again
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

from configurations import bases, mutated
from running import ENGINE, make_models, run_all, settled


def main() -> int:
    """Run the cases; exit 1 where anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="mutated configurations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hostile", action="store_true", help="the hostile cases alone")
    parser.add_argument("--mutated", action="store_true", help="the mutated configurations alone")
    parser.add_argument("--start", type=int, default=0, help="leave out the cases before")
    parser.add_argument("--only", type=int, help="one case, with all that it says")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="harness-fuzz-") as scratch:
        root = Path(scratch)
        models = make_models(root / "models")
        known = bases(models, ENGINE)
        bad = 0
        if not asked.hostile:
            numbers = range(asked.start, asked.count) if asked.only is None else [asked.only]
            plain = {one.name: settled(one, root) for one in known}
            mutate = lambda n: mutated(n, asked.seed, known)  # noqa: E731
            bad += run_all("mutated configurations", mutate, numbers, models, root, plain)
        if not asked.mutated and not (asked.only is not None and not asked.hostile):
            from hostile import hostile_cases

            with hostile_cases(models, ENGINE) as cases:
                numbers = range(asked.start, len(cases)) if asked.only is None else [asked.only]
                bad += run_all("hostile cases", lambda n: cases[n], numbers, models, root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
