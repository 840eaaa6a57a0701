# SPDX-License-Identifier: Apache-2.0
"""What training samples of this family call things; see `train.py`."""

from __future__ import annotations

FACE, STILL, EMOTION = "face", "still", "emotion"  # in `Sample.regions` and `Sample.outside`
NOT_OF_THE_CLIP = 3  # columns of features in front of the first video frame
