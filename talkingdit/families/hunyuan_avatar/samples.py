# SPDX-License-Identifier: Apache-2.0
"""How clips of HunyuanVideo-Avatar lie in training samples.

A sample brings its voice in `audio` with the face in the region "face", or several in `voices` with faces in regions of
the same names; a picture in `reference`, with what the autoencoder makes of it as a still video in `outside["still"]`;
and in `outside["emotion"]` the picture whose expression the clip shows, or several, where the regions "emotion 0",
"emotion 1" and so on are bright in the latent frames that show each. Of text features the first row holds the pooled
ones, with zeros behind, where these have another width; otherwise they are the mean of the rows. Rows of zeros are
padding.

The four columns of features of a latent frame are the four video frames that it ends with; the first latent frame is
one video frame, so that the first three columns are not of the clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FACE, STILL, EMOTION = "face", "still", "emotion"  # names in `Sample.regions` and `Sample.outside`
NOT_OF_THE_CLIP = 3  # columns of features in front of the first video frame


def emotion_track(regions: Mapping[str, Tensor], pictures: int, frames: int) -> Tensor:
    """The picture that each of the latent frames shows, int64 [frames], -1 for none."""
    found = torch.full((frames,), -1)
    named = [regions.get(f"{EMOTION} {i}") for i in range(pictures)]
    if all(region is None for region in named):
        return found + 1
    for i, region in enumerate(named):
        if region is not None:
            found[region.flatten(1).amax(1) > 0.5] = i
    return found


def split_text(config: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [L, text_states_dim] of a sample as tokens, their mask [L], and the pooled features."""
    width = config.text_states_dim_2
    tokens = text if width == config.text_states_dim else text[1:]
    if len(tokens) == 0:
        tokens = text.new_zeros(1, text.shape[1])
    mask = tokens.any(-1)
    if width == config.text_states_dim:
        return tokens, mask, tokens.sum(0) / mask.sum().clamp(min=1)
    return tokens, mask, text[0, :width]


def voice_features(config: Any, columns: Tensor) -> Tensor:
    """Columns [blocks, window * channels, 4 T] of a sample -> features [4 T - 3, window, blocks, channels]."""
    columns = columns[..., NOT_OF_THE_CLIP:]
    return columns.unflatten(1, (config.audio_window, config.audio_channels)).permute(3, 1, 0, 2)


def sample_columns(features: Tensor) -> Tensor:
    """Features of video frames [n, window, blocks, channels] -> columns [blocks, window * channels, n] of a sample."""
    return features.permute(2, 1, 3, 0).flatten(1, 2)
