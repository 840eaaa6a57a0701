# SPDX-License-Identifier: Apache-2.0
"""`--lora` on the command line: the effect is in the frames; and sentences for what has none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from official import make_official
from safetensors.torch import load_file, save_file

from talkingdit.cli.main import main
from talkingdit.families.lora_options import LoraChoice, read_choice
from talkingdit.media.files import read_video

LAYERS = ("blocks.0.self_attn.v", "blocks.1.ffn.2", "audio_injector.injector.0.o", "head.head")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, a portrait, a voice and a LoRA."""
    root = tmp_path_factory.mktemp("lora")
    make_official(root / "Wan2.2-S2V-tiny", vae_dim=4, dtype=torch.float32, shards=1)
    import cv2

    image = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(root / "face.png"), cv2.GaussianBlur(image, (9, 9), 3))
    soundfile.write(root / "voice.wav", 0.2 * np.sin(np.arange(8000) * 0.08), 16000)
    weights = load_file(root / "Wan2.2-S2V-tiny" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(1)
    state = {}
    for module in LAYERS:
        rows, columns = weights[f"{module}.weight"].shape
        down, up = torch.randn(4, columns), torch.randn(rows, 4)
        state |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
    save_file(state, root / "style.safetensors")
    return root


def frames(folder: Path, work: Path, *more: str, checkpoint: str = "Wan2.2-S2V-tiny") -> np.ndarray:
    """The frames of a video of one short clip."""
    assert main(arguments(folder, work, *more, checkpoint=checkpoint)) == 0
    return read_video(work / "out.mp4")[0].astype(int)


def arguments(folder: Path, work: Path, *more: str, checkpoint: str = "Wan2.2-S2V-tiny") -> list[str]:
    files = ["--image", str(folder / "face.png"), "--audio", str(folder / "voice.wav"), "-o", str(work / "out.mp4")]
    small = ["--max-area", "64x64", "--clip-frames", "8", "--steps", "2", "--prompt", "a person talking"]
    return ["generate", *files, "--checkpoint", str(folder / checkpoint), *small, *more]


@pytest.fixture(scope="module")
def merged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The frames of a checkpoint into which the LoRA was added by hand, at 0.05 and once more at 0.02."""
    shutil.copytree(folder / "Wan2.2-S2V-tiny", folder / "by-hand")
    file = folder / "by-hand" / "diffusion_pytorch_model.safetensors"
    weights, lora = load_file(file), load_file(folder / "style.safetensors")
    for module in LAYERS:
        down, up = (lora[f"diffusion_model.{module}.lora_{letter}.weight"].double() for letter in "AB")
        weights[f"{module}.weight"] = (weights[f"{module}.weight"].double() + 0.07 * up @ down).float()
    save_file(weights, file)
    return frames(folder, tmp_path_factory.mktemp("merged"), checkpoint="by-hand")


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return frames(folder, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("memory", ["", "offload=block", "offload=leaf"])
def test_strengths_are_seen_in_the_frames(
    folder: Path, merged: np.ndarray, plain: np.ndarray, tmp_path: Path, memory: str
) -> None:
    assert np.abs(plain - merged).mean() > 10
    style = str(folder / "style.safetensors")
    more = ["--memory", memory] if memory else []
    found = frames(folder, tmp_path, "--lora", f"{style}:0.05", "--lora", f"{style}:0.02", *more)
    assert np.abs(found - merged).mean() < 0.3  # a hundredth of the strength more or less would be 2.7


def test_beside_weights_of_8_bits(folder: Path, merged: np.ndarray, plain: np.ndarray, tmp_path: Path) -> None:
    style = str(folder / "style.safetensors")
    found = frames(folder, tmp_path, "--lora", f"{style}:0.07", "--memory", "weights=cast_fp8,offload=leaf")
    assert np.abs(found - merged).mean() < 0.5 * np.abs(plain - merged).mean()


def test_a_part_that_fits_nothing_is_named_before_a_model_is_loaded(
    folder: Path, plain: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = load_file(folder / "style.safetensors")
    other = {"diffusion_model.blocks.9.self_attn.q.lora_A.weight": torch.zeros(4, 48)}
    other["diffusion_model.blocks.9.self_attn.q.lora_B.weight"] = torch.zeros(48, 4)
    save_file(state | other, tmp_path / "other.safetensors")
    from talkingdit.families.wan_s2v import checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load_checkpoint", None)
        assert main(arguments(folder, tmp_path, "--lora", str(tmp_path / "other.safetensors"))) == 2
    said = capsys.readouterr().err
    assert "has parts for layers that the model does not have: diffusion_model.blocks.9.self_attn.q.lora_A" in said
    assert "`--lora-partial`" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.mp4").exists()
    found = frames(folder, tmp_path, "--lora", f"{tmp_path / 'other.safetensors'}:0.07", "--lora-partial")
    said = capsys.readouterr().err
    assert said.count("blocks.9.self_attn.q") == 2
    assert said.count("left out") == 1
    assert np.abs(found - plain).mean() > 2


def test_another_lora_does_not_go_on_from_the_clips_of_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from talkingdit.pipelines import job

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    style = str(folder / "style.safetensors")
    for first, then in (
        (["--lora", style], []),
        (["--lora", style], ["--lora", f"{style}:0.5"]),
        ([], ["--lora", style]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(job.VideoSink, "finish", stop)
            assert main(arguments(folder, tmp_path, "--steps", "1", *first)) == 130
        capsys.readouterr()
        assert main(arguments(folder, tmp_path, "--steps", "1", *then)) == 0
        assert "was made with another choice of LoRAs; starting over." in capsys.readouterr().err


def test_what_has_no_effect_is_said_once(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = [
        {  # sentences by what brings them up, of one video
            "`--negative-prompt` has no effect at guidance 1.": ["--negative-prompt", "x", "--guidance", "1"],
            "`--sequential` has no effect at guidance 1": ["--sequential"],
            "`--max-area` has no effect beside `--size`.": ["--size", "64x64"],
            "`--opening` has no effect with `--official-timing`.": ["--opening", "cut", "--official-timing"],
            "`--match-colour` has no effect on a video of one clip.": ["--match-colour"],
            "`--lora-partial` has no effect without `--lora`.": ["--lora-partial"],
            "`--parallel vae=` has no effect on one process.": ["--parallel", "vae=one"],
            "the prompt is too long for this model: its last": ["--prompt", "a person " * 300],
        },
        {
            "`--opening` has no effect: the first clip drops no frames.": ["--opening", "cut", "--start-from-ref"],
            "style.safetensors has no effect at strength 0.": ["--lora", f"{folder / 'style.safetensors'}:0"],
            "the negative prompt is too long for this model: its last": ["--negative-prompt", "red " * 600],
        },
    ]
    for sentences in videos:
        more = [word for words in sentences.values() for word in words]
        assert main(arguments(folder, tmp_path, "--steps", "1", *more)) == 0
        said = capsys.readouterr().err
        assert {sentence: said.count(sentence) for sentence in sentences} == dict.fromkeys(sentences, 1)
        assert said.count("no effect") + said.count("too long") == len(sentences)
    assert main(arguments(folder, tmp_path, "--steps", "1")) == 0
    assert "no effect" not in capsys.readouterr().err


def test_a_prompt_that_is_cut_says_how_many_words(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token per word and one for the end: 512 leave room for 511 words."""
    words = ["person"] * 511
    assert main(arguments(folder, tmp_path, "--steps", "1", "--prompt", " ".join(words))) == 0
    assert "too long" not in capsys.readouterr().err
    assert (
        main(arguments(folder, tmp_path, "--steps", "1", "--prompt", " ".join([*words, "woman", "talks", "red"]))) == 0
    )
    said = capsys.readouterr().err
    assert "the prompt is too long for this model: its last 3 words are cut off, from 'woman' on." in said


def test_strengths_and_names_with_colons(tmp_path: Path) -> None:
    (tmp_path / "a:2").touch()
    assert read_choice("a.safetensors") == LoraChoice(Path("a.safetensors"))
    assert read_choice("a.safetensors:-0.5") == LoraChoice(Path("a.safetensors"), -0.5)
    assert read_choice("2025:12:01.safetensors:2") == LoraChoice(Path("2025:12:01.safetensors"), 2.0)
    assert read_choice("2025:a.safetensors") == LoraChoice(Path("2025:a.safetensors"))
    assert read_choice(f"{tmp_path}/a:2") == LoraChoice(tmp_path / "a:2")
    for wrong in ("a:inf", "a:nan", ":1", ""):
        with pytest.raises(ValueError, match="must be FILE or FILE:STRENGTH"):
            read_choice(wrong)
