# SPDX-License-Identifier: Apache-2.0
"""Drawn characters: the tiny model that ships with the package. Its transformer is that of Wan-S2V."""

from talkingdit.families.family import Family

FAMILY = Family("puppet", "drawn characters", __name__, base="wan_s2v", sources=("puppets",))
