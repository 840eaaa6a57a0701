# SPDX-License-Identifier: Apache-2.0
"""What is asked of a speech encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class SpeechEncoder(Protocol):
    """What pipelines and training ask of a speech encoder: `wav2vec.Wav2VecEncoder`, `log_mel.SpeechFeatures`."""

    def features(self, waveform: np.ndarray | Tensor, frames: int) -> Tensor:
        """Features of the first video frames; those past the end of the sound are silence.

        Args:
            waveform: float [samples], 16 kHz mono, of any loudness; the whole of a recording, as an encoder may look at
                all of it.
            frames: number of columns, at the frame rate that the encoder was made for.

        Returns:
            [layers, audio_dim, frames].

        Raises:
            ValueError: the waveform is not [samples], not finite or too short, or frames < 1.
            UserError: an encoder that needs a loudness finds none.
        """
