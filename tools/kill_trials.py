# SPDX-License-Identifier: Apache-2.0
"""`python tools/kill_trials.py --kills 50 [generate precompute train export eval]`: kills each writer so many times.

Kills are spread over the moments at which the writer changes files, see tests/kills/trials.py. The counts are for
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kills"))
from trials import start

WRITERS = ["generate", "precompute", "train", "export", "eval"]


def main() -> int:
    """Print a line per writer, and every fault; the exit status is 1 where there is one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("writers", nargs="*", help=f"of {', '.join(WRITERS)} (default: all)")
    parser.add_argument("--kills", type=int, default=50, help="of each writer (default: 50)")
    options = parser.parse_args()
    faults = 0
    print("writer      moments  kills  completed  equal  seconds")
    for writer in options.writers or WRITERS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            (report,) = start([writer], options.kills, Path(folder), timeout=1e5)
        took = time.monotonic() - started
        counts = f"{report.moments:7}  {report.kills:5}  {report.completed:9}  {report.equal:5}  {took:7.0f}"
        print(f"{writer:<10}  {counts}", flush=True)
        for fault in report.faults:
            print(f"  {fault}", flush=True)
        faults += len(report.faults)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
