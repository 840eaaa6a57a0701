# SPDX-License-Identifier: Apache-2.0
"""Text features of HunyuanVideo-Avatar: what of LLaVA's states is taken, and masked as released."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_avatar import POOLED_DIM, TEXT_DIM, make_clip, make_llava, make_tokenizer, save_encoders
from torch import Tensor

from talkingdit.encoders.llava import ClipPooled, LlavaEncoder, llava_pixels, load_clip, load_llava
from talkingdit.errors import UserError
from talkingdit.nn import bfloat16


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_features_are_states_before_the_last_two_layers() -> None:
    """The picture's tokens stand where the prompt has <image>; the instruction is left out; padding sees nothing."""
    model, tokenizer = make_llava(), make_tokenizer()
    encoder = LlavaEncoder(model, tokenizer, text_len=80, instruction=20, released_mask=False)
    found = encoder.encode("a red woman talking", picture())
    assert found.features.shape == (1, 80 + 4 - 1, TEXT_DIM)
    ids, mask = encoder._tokens("a red woman talking")
    assert len(ids) == 100
    place, real = ids.index(1), sum(mask)
    assert place == real - 1  # the last that is real
    short = torch.tensor([[*ids[:place], 1, 1, 1, 1]])  # without padding
    with torch.no_grad():
        states = model(
            input_ids=short, pixel_values=llava_pixels(picture(), 28), attention_mask=torch.ones_like(short),
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    assert len(states) == 5
    expected = states[2][:, 20:]
    assert torch.allclose(found.features[found.mask], expected[0], atol=1e-5)
    assert found.mask.sum() == real + 3 - 20

    released = LlavaEncoder(model, tokenizer, text_len=80, instruction=20).encode("a red woman talking", picture())
    assert torch.equal(released.features, found.features)
    assert released.mask[0, : real - 20].all()
    assert not released.mask[0, real - 20 : 80].any()
    assert released.mask[0, 80:].all()
    assert released.mask.shape == found.mask.shape


def test_the_picture_and_the_words_both_count() -> None:
    encoder = LlavaEncoder(make_llava(), make_tokenizer(), text_len=80, instruction=20)
    first = encoder.encode("a man", picture()).features
    for words, image in (("a woman", picture()), ("a man", 255 - picture())):
        assert not torch.allclose(encoder.encode(words, image).features[:, :-1], first[:, :-1], atol=1e-4)


def test_pixels_are_those_of_clip() -> None:
    image = picture()
    found = llava_pixels(image, 28)
    resized = np.asarray(Image.fromarray(image).resize((28, 28), Image.Resampling.BILINEAR)).astype(np.float64) / 255
    expected = (resized - (0.48145466, 0.4578275, 0.4082107)) / (0.26862954, 0.26130258, 0.27577711)
    assert np.allclose(found[0].permute(1, 2, 0), expected, atol=1e-6)


def test_too_long_a_prompt_loses_its_end_and_keeps_the_picture() -> None:
    encoder = LlavaEncoder(make_llava(), make_tokenizer(), text_len=40, instruction=75)
    prompt = " ".join(["man", "woman"] * 30)
    ids, _ = encoder._tokens(prompt)
    assert ids.count(1) == 1
    left_out = encoder.left_out_words(prompt)
    assert 0 < len(left_out) < 60
    assert encoder._tokens(" ".join(prompt.split()[: 60 - len(left_out)])) == encoder._tokens(prompt)
    assert encoder.left_out_words("a man") == []


def test_pooled_features_are_those_of_transformers() -> None:
    model, tokenizer = make_clip(), make_tokenizer()
    tokens = tokenizer("a man", padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    found = ClipPooled(model, tokenizer).encode("a man")
    assert found.shape == (1, POOLED_DIM)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["llava", "pooled"])
def test_prompts_in_bfloat16_are_multiplied_in_what_is_fast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(dtype: torch.dtype) -> Tensor:
        if kind == "pooled":
            return ClipPooled(make_clip().to(dtype), make_tokenizer()).encode("a man")
        encoder = LlavaEncoder(make_llava().to(dtype), make_tokenizer(), text_len=80, instruction=20)
        return encoder.encode("a man", picture()).features

    truth = encode(torch.float32)
    widened: list[Tensor] = []
    widen = bfloat16._widen
    monkeypatch.setattr(bfloat16, "_widen", lambda value: (widened.append(value), widen(value))[1])
    for instructions in ("avx512_bf16", "avx2"):
        monkeypatch.setattr(bfloat16, "_instructions", lambda found=instructions: found)
        found = encode(torch.bfloat16)
        assert bool(widened) == (instructions == "avx2")
        assert found.dtype == torch.bfloat16
        assert (found - truth).norm() < 0.05 * truth.norm()


def test_folders_load_and_what_is_wrong_is_one_sentence(tmp_path: Path) -> None:
    save_encoders(tmp_path)
    llava = load_llava(tmp_path / "llava_llama_image", torch.float32, text_len=80, instruction=20)
    expected = LlavaEncoder(make_llava(), make_tokenizer(), text_len=80, instruction=20).encode("a man", picture())
    assert torch.allclose(llava.encode("a man", picture()).features, expected.features, atol=1e-6)
    clip = load_clip(tmp_path / "text_encoder_2", torch.float32)
    assert torch.allclose(clip.encode("a man"), ClipPooled(make_clip(), make_tokenizer()).encode("a man"), atol=1e-6)
    with pytest.raises(UserError, match="the CLIP text encoder is missing"):
        load_clip(tmp_path / "nothing", torch.float32)
    (tmp_path / "llava_llama_image" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="the LLaVA text encoder does not load"):
        load_llava(tmp_path / "llava_llama_image", torch.float32)
