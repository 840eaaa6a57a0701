# SPDX-License-Identifier: Apache-2.0
"""Costs of the small networks that ship with the package, beside which transformers of the drawn world stand.

A transformer tells by the width of its text whether a released text encoder fits it. Where none does, as for drawn
characters and for presets of tests and trials, what stands beside it is this: the prompt encoder, the autoencoder, and
features of a voice that no network makes.
"""

from __future__ import annotations

from talkingdit.plan.clip import ClipShape
from talkingdit.plan.cost import AUTOENCODER, TEXT_ENCODER, FrozenParts

SIDE, LATENTS = 96, 8  # of a clip
TEXT_TOKENS = 36  # of a prompt
VAE_PARAMETERS = 3_016_636
TEXT_PARAMETERS = 19_648
# The autoencoder, counted while it runs: elements alive per pixel of a frame, by width of an element.
VAE_DECODE = {4: 249, 2: 265}  # while a latent frame goes through it
VAE_JOIN = {4: 100, 2: 101}  # its caches and the last frames, while the decoded frames are brought to -1..1
VAE_ENCODE = {4: 43, 2: 46}  # of one frame
VAE_ENCODE_VIDEO = {4: 146, 2: 150}  # of a latent's four frames with the caches behind those before, beside all frames


def frozen_parts(width: int = 4, text: int = 0, vae: int = 0) -> FrozenParts:
    """Sizes of the parts; the prompt encoder is float32.

    Args:
        width: bytes of the autoencoder's elements.
        text, vae: elements of the prompt encoder and the autoencoder, where a folder tells others than those that ship.
    """
    sizes = {TEXT_ENCODER: 4 * (text or TEXT_PARAMETERS), AUTOENCODER: width * (vae or VAE_PARAMETERS)}
    return FrozenParts(sizes, width)


def autoencoder(clip: ClipShape, width: int, video: bool = False) -> dict[str, float]:
    """Bytes of decoding the clip's frames and of encoding the portrait.

    Decoded frames are kept in the autoencoder's dtype until the last is there. Then there are two float32 copies of
    them, and a narrow one beside them where that is not their dtype.

    Args:
        video: a whole clip is encoded, not one picture.
    """
    per_latent = 3 * clip.frames / clip.latents  # elements per pixel
    through = VAE_DECODE[width] + per_latent * (clip.latents - 1)
    join = VAE_JOIN[width] + {4: 2, 2: 5}[width] * per_latent * clip.latents
    encode: float = VAE_ENCODE[width] * width
    if video:
        encode = VAE_ENCODE_VIDEO[width] * width + 3 * (4 + width) * clip.frames
    return {"decode": clip.pixels * width * max(through, join), "encode": clip.pixels * encode}
