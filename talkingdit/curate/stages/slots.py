# SPDX-License-Identifier: Apache-2.0
"""Places for models that no package carries: give a folder, and libraries' own classes load it.

[watch.models]
language = "whisper-base"           # a folder of transformers' Whisper, of many languages
caption = "Qwen2.5-VL-7B-Instruct"  # a folder of a vision-language model
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from talkingdit.curate.look import Look
from talkingdit.curate.settings import Watch
from talkingdit.curate.slots import SLOTS, missing_line, path_of
from talkingdit.curate.stages import ClipFindings, Figures
from talkingdit.detect.packages import NotInstalledError
from talkingdit.errors import UserError
from talkingdit.media.sound import SPEECH_RATE

# The three aspects of Wan-S2V, section 2, "dense video caption".
PROMPT = (
    "Describe this video of a person in one paragraph. Say (1) where the camera is: straight-on, overhead, low-angle, "
    "wide, medium or close-up; (2) how the person looks, clothing and accessories included, and what the person does, "
    "movement by movement; (3) the background: architecture, colours, plants. State only what is to be seen: no "
    "judgement, no mood, no guess about feelings."
)
CAPTION_PICTURES, CAPTION_TOKENS = 8, 220


def _folder(watch: Watch, slot: str) -> Path:
    if not watch.models.get(slot):
        raise NotInstalledError(missing_line(SLOTS[slot]) + ".")
    folder = path_of(watch, slot)
    if not (folder / "config.json").is_file():
        raise UserError(f"curate: {slot}: expected {SLOTS[slot].give} with a config.json, got {str(folder)!r}.")
    return folder


@contextlib.contextmanager
def _loading(slot: str, folder: Path) -> Iterator[None]:
    """What a library says of a folder that it cannot use, in one sentence."""
    try:
        yield
    except NotInstalledError:
        raise
    except Exception as error:
        told = " ".join((str(error).strip() or type(error).__name__).split())[:200]
        raise UserError(f"curate: {slot}: expected {SLOTS[slot].give}, got {str(folder)!r} ({told}).") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class LanguageStage:
    """The language that is spoken, as Whisper hears it in the first half minute of the clip."""

    gpu, slot, backbone = True, "language", ""

    def __init__(self, watch: Watch) -> None:
        folder = _folder(watch, self.slot)
        with _loading(self.slot, folder):
            from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

            self._model: Any = WhisperForConditionalGeneration.from_pretrained(folder).eval().to(_device())
            self._features = WhisperFeatureExtractor(feature_size=self._model.config.num_mel_bins)
            codes = self._model.generation_config.lang_to_id
            self._names = {token: name.strip("<|>") for name, token in codes.items()}

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        import torch

        if not found.spoken:
            return {}
        features = self._features(look.samples, sampling_rate=SPEECH_RATE, return_tensors="pt").input_features
        start = torch.tensor([[self._model.config.decoder_start_token_id]], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(features.to(self._model.device), decoder_input_ids=start).logits[0, -1]
        tokens = list(self._names)
        probabilities = logits[tokens].float().softmax(0).cpu()
        best = int(probabilities.argmax())
        score = round(float(probabilities[best]), 3)
        return {
            "language.name": self._names[tokens[best]],
            "language.score": score,
            "language.backbone": self.backbone,
        }


class CaptionStage:
    """A caption by a vision-language model that transformers loads, from eight pictures of the clip."""

    gpu, slot, backbone = True, "caption", ""

    def __init__(self, watch: Watch) -> None:
        folder = _folder(watch, self.slot)
        with _loading(self.slot, folder):
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor

            kind = torch.bfloat16 if _device() == "cuda" else torch.float32
            self._processor: Any = AutoProcessor.from_pretrained(folder)
            self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=kind).eval().to(_device())

    def measure(self, look: Look, found: ClipFindings) -> Figures:
        import torch
        from PIL import Image

        at = np.linspace(0, len(look.pictures) - 1, CAPTION_PICTURES).round().astype(int)
        images = [Image.fromarray(look.pictures[i]) for i in at]
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": PROMPT}]
        asked = [{"role": "user", "content": content}]
        text = self._processor.apply_chat_template(asked, add_generation_prompt=True)
        inputs = self._processor(text=text, images=images, return_tensors="pt").to(self._model.device)
        with torch.inference_mode():
            made = self._model.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        words = self._processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return {"caption.text": " ".join(words.split()), "caption.backbone": self.backbone}
