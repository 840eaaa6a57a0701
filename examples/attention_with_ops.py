# SPDX-License-Identifier: Apache-2.0
"""The ops in an attention block of your own: rotation by position in a video, and sound that each frame attends to.

    python examples/attention_with_ops.py [--device cuda] [--dtype bfloat16]

Runs the block forward and backward, and compares it with the ops' references in plain PyTorch.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from talkingdit import ops

FRAMES, HEIGHT, WIDTH = 5, 12, 20  # of the latent video, in tokens
AUDIO_TOKENS = 4  # per latent frame


def layout() -> ops.RopeLayout:
    """A video, and behind it a reference image that stands at time 30, far from every frame."""
    video = ops.Segment(range(FRAMES), range(HEIGHT), range(WIDTH))
    reference = ops.Segment([30], range(HEIGHT), range(WIDTH))
    return ops.RopeLayout([video, reference], split=(24, 20, 20))  # channels of a head that turn with t, h, w


class Block(nn.Module):
    """Self-attention over video and reference, then attention of each frame to its own sound."""

    def __init__(self, heads: int = 4, dim: int = 64, reference_ops: bool = False):
        super().__init__()
        self.heads, self.width = heads, heads * dim
        self.qkv = nn.Linear(self.width, 3 * self.width)
        self.audio_q = nn.Linear(self.width, self.width)
        self.audio_kv = nn.Linear(self.width, 2 * self.width)
        self.q_norm, self.k_norm = nn.Parameter(torch.ones(self.width)), nn.Parameter(torch.ones(self.width))
        self.normalise_and_rotate = ops.qk_norm_rope3d_reference if reference_ops else ops.qk_norm_rope3d
        self.attend_to_audio = ops.audio_attention_reference if reference_ops else ops.audio_attention

    def forward(self, x: Tensor, audio: Tensor, rotations: ops.RopeLayout) -> Tensor:
        """x [B, N, C], audio [B, F, A, C] -> [B, N, C]."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(x).chunk(3, -1))
        q, k = self.normalise_and_rotate(q, k, self.q_norm, self.k_norm, rotations)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        video = FRAMES * HEIGHT * WIDTH
        q = self.audio_q(x[:, :video]).unflatten(-1, (self.heads, -1))
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.audio_kv(audio).chunk(2, -1))
        heard = self.attend_to_audio(q, k, v, tokens_per_frame=HEIGHT * WIDTH).flatten(2)
        return torch.cat([x[:, :video] + heard, x[:, video:]], 1)


def main(arguments: list[str] | None = None) -> float:
    """Returns the relative difference to the references, of the result and the gradient of x together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args(arguments)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    ours, plain = (Block(reference_ops=slow).to(args.device, dtype) for slow in (False, True))
    plain.load_state_dict(ours.state_dict())
    rotations = layout()
    x = torch.randn(1, len(rotations), ours.width, device=args.device, dtype=dtype)
    audio = torch.randn(1, FRAMES, AUDIO_TOKENS, ours.width, device=args.device, dtype=dtype)
    results = []
    for block in (ours, plain):
        tokens = x.clone().requires_grad_()
        result = block(tokens, audio, rotations)
        result.float().square().mean().backward()
        assert tokens.grad is not None
        results.append(torch.cat([result.detach().float(), tokens.grad.float() * result.numel()]))
    difference = float((results[0] - results[1]).norm() / results[1].norm())
    print(f"{len(rotations)} tokens, relative difference to plain PyTorch: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
