"""Draw the README's picture from a run of the quickstart.

    python -m benchmarks.figures.quickstart quickstart/plain-rebalanced benchmarks/results/DATE-quickstart.png

The folder is the one that `launch/quickstart.sh` writes for the rebalanced run of the plain router.
"""

from __future__ import annotations

import argparse

from distplb.report.figures import imbalance_over_time
from distplb.report.run import Run

WIDTH, DPI = 5.6, 200  # inches; text stays readable when a phone shows the picture at 360 pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="of the rebalanced run, with its trace and events")
    parser.add_argument("picture", help="the PNG to write")
    args = parser.parse_args()
    imbalance_over_time(Run.read(args.folder), WIDTH).savefig(args.picture, dpi=DPI)


if __name__ == "__main__":
    main()
