# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 and 2.2 image-to-video: a picture, words and further conditions to video. Other families build on it."""

from talkingdit.families.family import Family

FAMILY = Family("wan_i2v", "Wan I2V", "talkingdit.families.wan_i2v")
