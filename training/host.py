# SPDX-License-Identifier: Apache-2.0
"""Where tensors wait that a card has no room for."""

from __future__ import annotations

import torch

HOST = torch.device("cpu")  # compared whole and not by its type: a count of a card's bytes has a card of that type
