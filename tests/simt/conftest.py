# SPDX-License-Identifier: Apache-2.0
from emulated_device import device, emulated

__all__ = ["device", "emulated"]
