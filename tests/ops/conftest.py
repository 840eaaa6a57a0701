# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "simt"))

from emulated_device import device, emulated

__all__ = ["device", "emulated"]

collect_ignore = ["add_an_op"]  # a template, which test_add_an_op puts in its place
