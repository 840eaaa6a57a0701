# SPDX-License-Identifier: Apache-2.0
"""Weights that are no numbers end in a sentence, for every family, and not in a video of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_checkpoint
from tiny_families import avatar, gloria, s2v, skyreels

import talkingdit
from talkingdit.cli.main import main
from talkingdit.errors import UserError
from talkingdit.pipelines.finite import check_finite
from talkingdit.pipelines.long_video import DenoisedClip, generate_clips, generate_denoised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_no_number_is_told_with_its_place(dtype: torch.dtype) -> None:
    video = torch.randn(1, 2, 9, 4, 4).to(dtype)
    check_finite(video, "latents", "clip 1", "model")
    video[0, 1, 3, 2, 2] = torch.nan
    with pytest.raises(UserError, match=r"^model: expected finite latents, got NaN in clip 1, latent frame 3; a "):
        check_finite(video, "latents", "clip 1", "model")
    video[0, 1, 3, 2, 2] = torch.inf
    video[0, 0, 5, 0, 0] = -torch.inf
    with pytest.raises(UserError, match="expected finite frames, got infinity in clip 1, frames 3 to 5;"):
        check_finite(video, "frames", "clip 1", "model")


def test_numbers_of_any_size_bytes_and_no_frames_are_fine() -> None:
    check_finite(torch.full((1, 2, 2, 4, 4), 3e38), "latents", "clip 1", "model")
    check_finite(torch.full((1, 2, 2, 4, 4), 6e4).half(), "latents", "clip 1", "model")
    check_finite(torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8), "frames", "clip 1", "model")
    check_finite(torch.zeros(1, 3, 0, 1, 1), "frames", "clip 1", "model")


class Clips:
    """A pipeline whose second clip is broken at one place."""

    checkpoint = SimpleNamespace(folder=Path("model"))
    decodes_later = True

    def __init__(self, broken: str) -> None:
        self.broken, self.steps = broken, 0

    def denoised(self, conditions: Any, index: int, carry: Any, *, last: bool, progress: Any) -> DenoisedClip:
        wrong = self.broken if index == 1 else ""
        for step in range(2):
            x = torch.full((1, 4, 3, 2, 2), torch.nan if (wrong, step) == ("latents", 0) else 0.0)
            progress(step, 0.0, x)
            self.steps += 1
        frames = torch.zeros(1, 3, 8, 2, 2)
        if wrong == "frames":
            frames[:, :, 6] = torch.nan
        return DenoisedClip(index, iter(frames.split(4, dim=2)), None if last else {"x": frames})


def test_clips_are_told_up_to_the_broken_one_and_no_step_is_made_in_vain() -> None:
    clips: Any = Clips("latents")
    made = generate_clips(clips, None, 3)
    assert next(made).index == 0
    with pytest.raises(UserError, match="got NaN in clip 2 after step 1, latent frames 0 to 2"):
        next(made)
    assert clips.steps == 2


def test_pieces_are_told_up_to_the_broken_one() -> None:
    clips: Any = Clips("frames")
    made = generate_denoised(clips, None, 3)
    assert len(list(next(made).pieces)) == 2
    pieces = next(made).pieces
    next(pieces)
    with pytest.raises(UserError, match="expected finite frames, got NaN in clip 2, frame 2;"):
        next(pieces)


def spoil(parameter: torch.Tensor) -> None:
    parameter.detach().view(-1)[0] = torch.nan


@pytest.mark.parametrize("make", [s2v, avatar, gloria, skyreels])
def test_no_family_makes_a_video_of_what_is_no_number(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    given = make(tmp_path)
    pipe = talkingdit.TalkingPipeline.from_pretrained(tmp_path / "model")
    decoder = next(value for name, value in pipe.vae.named_parameters() if name.startswith("decoder.conv_out"))
    before = decoder.detach().clone()
    spoil(decoder)
    with pytest.raises(UserError, match="model: expected finite frames, got NaN in clip "):
        pipe(**given)
    decoder.detach().copy_(before)
    spoil(next(pipe.transformer.parameters()))
    with pytest.raises(UserError, match="model: expected finite latents, got NaN in clip 1 after step 1, latent frame"):
        pipe(**given)


@pytest.mark.parametrize("live", [(), ("--live",)])
@pytest.mark.parametrize(("part", "what"), [("transformer", "latents"), ("vae", "frames")])
def test_a_checkpoint_with_nan_leaves_no_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, what: str, live: tuple[str, ...]
) -> None:
    folder, work = make_checkpoint(tmp_path / "model"), tmp_path / "work"
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    spoil(next(state[name] for name in state if name.startswith(("patch_embedding", "decoder.conv_out"))))
    save_file(state, file)
    work.mkdir()
    cv2.imwrite(str(work / "face.png"), np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    soundfile.write(work / "voice.wav", 0.1 * np.random.default_rng(1).normal(size=16000), 16000)
    (work / "out.mp4").write_bytes(b"precious")
    files = ["--image", str(work / "face.png"), "--audio", str(work / "voice.wav"), "-o", str(work / "out.mp4")]
    assert main(["generate", *files, "--checkpoint", str(folder), *live]) == 2
    said = capsys.readouterr()
    assert f"{folder}: expected finite {what}, got NaN in clip 1" in said.err
    assert "Traceback" not in said.err
    assert {path.name for path in work.iterdir()} == {"face.png", "voice.wav", "out.mp4"}
    assert (work / "out.mp4").read_bytes() == b"precious"
