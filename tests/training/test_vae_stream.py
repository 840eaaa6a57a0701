# SPDX-License-Identifier: Apache-2.0
"""The decoder's second stage sees what generation will ask of it: one long stream, window by window."""

import numpy as np
import torch

from talkingdit.autoencoders.streaming import StreamingDecoder
from talkingdit.nn.bfloat16 import bfloat16_products
from training.vae import Mouths, make_vae
from training.vae import VaeConfig as FirstStage
from training.vae_stream import DecodingStream, StreamConfig


def test_windows_join_to_the_whole_stream_with_every_frame_as_its_target():
    torch.manual_seed(0)
    vae = make_vae(FirstStage(base_dim=4, dim_mult=(1, 1, 1))).eval()
    stream = DecodingStream(vae, np.random.default_rng(0), StreamConfig(latent_noise=0.0), Mouths([]))
    outputs, targets = [], []
    while not stream.ended:
        output, target = stream.decode(vae)
        assert output.requires_grad
        outputs.append(output.detach())
        targets.append(target)
    assert torch.equal(torch.cat(targets, 2), stream.video)
    with bfloat16_products():
        whole = StreamingDecoder(vae)(stream.latents)
    torch.testing.assert_close(torch.cat(outputs, 2).clamp(-1, 1), whole, atol=0.02, rtol=0)
