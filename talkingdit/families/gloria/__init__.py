# SPDX-License-Identifier: Apache-2.0
"""Gloria (arXiv:2603.29931): a character from a few anchor frames, a voice and words to long video."""

from talkingdit.families.family import Family

FAMILY = Family("gloria", "Gloria", "talkingdit.families.gloria", base="wan_i2v")
