# SPDX-License-Identifier: Apache-2.0
"""SkyReels-Audio (arXiv:2506.00830): portraits that speak, and videos whose mouths are made to follow another voice."""

from talkingdit.families.family import Family

FAMILY = Family("skyreels_audio", "SkyReels-Audio", "talkingdit.families.skyreels_audio", base="wan_i2v")
