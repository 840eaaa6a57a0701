# SPDX-License-Identifier: Apache-2.0
"""The text encoders of HunyuanVideo-Avatar: LLaVA, which reads the prompt and looks at the character, and CLIP.

LLaVA's language model is given an instruction, the prompt, and "The person looks like" with the picture in the place of
576 tokens; its hidden states before the last two layers are the features, without those of the instruction. CLIP's
pooled output of the prompt alone goes into the modulation.

The released program puts the mask of the 576 tokens behind that of the padded text, not in its middle where the tokens
are. So of the padding as many are read as picture tokens are not. The model was released with that, and it is done
the same way here; `released_mask=False` gives the mask of the tokens that there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from talkingdit.checkpoints.weights import check_index, read_bounded, some
from talkingdit.encoders.text import TextFeatures
from talkingdit.errors import UserError
from talkingdit.nn.bfloat16 import fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_LEN, POOLED_LEN = 256, 77  # most tokens of a prompt, for either encoder
SKIPPED_LAYERS = 2  # at the end of the language model
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
INSTRUCTION = 95  # tokens of it in front of the prompt
LOOKS_LIKE = "\nThe person looks like<image>"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.4082107), (0.26862954, 0.26130258, 0.27577711)


class LlavaEncoder(nn.Module):
    """Prompts with a picture to features.

    Args:
        model: a `LlavaForConditionalGeneration`, any size.
        tokenizer: of its vocabulary; the padding is at the right.
        text_len: most tokens of a prompt, its picture's place included.
        instruction: tokens of the template in front of the prompt, whose features are left out.
        released_mask: as the released program masks, see above.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        text_len: int = TEXT_LEN,
        instruction: int = INSTRUCTION,
        released_mask: bool = True,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.text_len, self.instruction, self.released_mask = text_len, instruction, released_mask
        self.text_dim = int(model.config.text_config.hidden_size)
        vision = model.config.vision_config
        self.image_size, self.image_tokens = int(vision.image_size), (vision.image_size // vision.patch_size) ** 2

    def left_out_words(self, prompt: str) -> list[str]:
        """Words at the end of a long prompt for which there is no room."""
        return prompt.split()[len(self._fitting(prompt).split()) :]

    @torch.no_grad()
    def encode(self, prompt: str, image: NDArray[np.uint8]) -> TextFeatures:
        """Features of a prompt with the picture of the character.

        Args:
            prompt: what to show.
            image: uint8 [H, W, 3].

        Returns:
            features [1, L, text_dim] with L = text_len + picture tokens - 1, and the mask bool [1, L].
        """
        ids, mask = self._tokens(prompt)
        device, dtype = self.model.device, self.model.dtype
        place = ids.index(self.model.config.image_token_id)
        pictures = [self.model.config.image_token_id] * self.image_tokens
        merged = torch.tensor([*ids[:place], *pictures, *ids[place + 1 :]], device=device)[None]
        seen = torch.tensor([*mask[:place], *[1] * self.image_tokens, *mask[place + 1 :]], device=device)[None]
        with fast_products(device):
            output = self.model.model(
                input_ids=merged,
                attention_mask=seen,
                pixel_values=llava_pixels(image, self.image_size).to(device, dtype),
                output_hidden_states=True,
            )
        features = output.hidden_states[-(SKIPPED_LAYERS + 1)][:, self.instruction :]
        if self.released_mask:
            seen = torch.tensor([*mask, *[1] * (self.image_tokens - 1)], device=device)[None]
        return TextFeatures(features, seen[:, self.instruction :].bool())

    def _tokens(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token numbers, padded at the right, and which are real; there is one of a picture among them."""
        tokens = self.tokenizer(
            TEMPLATE.format(self._fitting(prompt)) + LOOKS_LIKE,
            truncation=True,
            max_length=self.text_len + self.instruction,
            padding="max_length",
        )
        return list(tokens["input_ids"]), list(tokens["attention_mask"])

    def _fitting(self, prompt: str) -> str:
        """As many words of a prompt from its beginning as there is room for, with the picture's place behind them."""
        room = self.text_len + self.instruction
        words = prompt.split()

        def fits(count: int) -> bool:
            text = TEMPLATE.format(prompt if count == len(words) else " ".join(words[:count])) + LOOKS_LIKE
            return len(self.tokenizer(text)["input_ids"]) <= room

        if fits(len(words)):
            return prompt
        low, high = 0, len(words)  # what fits, what does not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return " ".join(words[:low])


class ClipPooled(nn.Module):
    """Prompts to CLIP's pooled features [1, dim]."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, text_len: int = POOLED_LEN):
        super().__init__()
        self.model, self.tokenizer, self.text_len = model, tokenizer, text_len
        self.text_dim = int(model.config.hidden_size)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(
            prompt, truncation=True, max_length=self.text_len, padding="max_length", return_tensors="pt"
        )
        device = self.model.device
        ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        with fast_products(device):
            return self.model(input_ids=ids, attention_mask=mask).pooler_output


def llava_pixels(image: NDArray[np.uint8], side: int = 336) -> Tensor:
    """A picture [H, W, 3] as LLaVA's vision model takes it: [1, 3, side, side], squeezed to a square."""
    from PIL import Image

    resized = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (CLIP_MEAN, CLIP_STD))
    return ((values - mean) / std)[None]


def load_llava(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu", **options: Any) -> LlavaEncoder:
    """The LLaVA model and its tokenizer in a folder of transformers.

    Args:
        options: of `LlavaEncoder`.

    Raises:
        UserError: files are missing or do not load.
    """
    from transformers import LlavaForConditionalGeneration

    model = _load(LlavaForConditionalGeneration, folder, dtype, "the LLaVA text encoder", unused=("lm_head",))
    return LlavaEncoder(model.to(device), _load_tokenizer(folder), **options).eval()


def load_clip(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> ClipPooled:
    """The CLIP text model and its tokenizer in a folder of transformers.

    Raises:
        UserError: files are missing or do not load.
    """
    from transformers import CLIPTextModel

    model = _load(CLIPTextModel, folder, dtype, "the CLIP text encoder", unused=("position_ids",))
    return ClipPooled(model.to(device), _load_tokenizer(folder)).eval()


def _load(cls: Any, folder: Path, dtype: torch.dtype, what: str, unused: tuple[str, ...]) -> Any:
    from talkingdit.encoders.wav2vec import quiet

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: {what} is missing; the checkpoint is not complete.")
    read_bounded(folder / "config.json")
    check_index(folder)
    try:
        with quiet():
            model, report = cls.from_pretrained(folder, local_files_only=True, dtype=dtype, output_loading_info=True)
    except Exception as error:  # damaged files raise whatever their reader does
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: {what} does not load ({reason[:200]}).") from error
    lost = sorted(name for name in report["missing_keys"] if not any(part in name for part in unused))
    if lost:
        raise UserError(f"{folder}: {what} lacks {len(lost)} weights: {some(lost)}.")
    return model.requires_grad_(False).eval()


def _load_tokenizer(folder: Path) -> Any:
    from talkingdit.encoders.umt5 import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
