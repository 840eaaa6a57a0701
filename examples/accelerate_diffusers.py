# SPDX-License-Identifier: Apache-2.0
"""The kernels inside a diffusers model, in place, and out again.

    python examples/accelerate_diffusers.py
    python examples/accelerate_diffusers.py --model Wan2.2-T2V-A14B-Diffusers/transformer --device cuda

A whole pipeline needs one line, before offloading is enabled: `talkingdit.accelerate(pipe.transformer)`. Without
--model a tiny transformer with random weights shows the same.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import talkingdit

TINY = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 2, "text_dim": 16}


def predict(model: Any) -> Tensor:
    """One denoising step of a small video."""
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, model.config.in_channels, 4, 16, 16, generator=generator)
    text = torch.randn(1, 8, model.config.text_dim, generator=generator)
    place = {"device": model.device, "dtype": model.dtype}
    with torch.no_grad():
        step = torch.tensor([500.0], device=model.device)
        return model(video.to(**place), step, text.to(**place), return_dict=False)[0].float()


def main(arguments: list[str] | None = None) -> tuple[float, bool]:
    """Returns the relative difference that the kernels make, and whether it is gone after `restore`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Wan transformer of diffusers (default: a tiny random one)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    model: Any
    if args.model is None:
        model = WanTransformer3DModel(**TINY)
    else:
        model = WanTransformer3DModel.from_pretrained(args.model, torch_dtype=torch.bfloat16)
    model = model.to(args.device).eval()

    before = predict(model)
    print(talkingdit.accelerate(model))
    with_kernels = predict(model)
    talkingdit.restore(model)
    difference = float((with_kernels - before).norm() / before.norm())
    print(f"relative difference: {difference:.1e}")
    return difference, torch.equal(predict(model), before)


if __name__ == "__main__":
    main()
