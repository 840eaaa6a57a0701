# SPDX-License-Identifier: Apache-2.0
"""HunyuanVideo-Avatar (arXiv:2505.20156): an image, voices and words to a video of several speakers."""

from talkingdit.families.family import Family

FAMILY = Family("hunyuan_avatar", "HunyuanVideo-Avatar", __name__, sources=("scenes",))
