# SPDX-License-Identifier: Apache-2.0
"""The text encoder of Wan: the encoder of UMT5-XXL (transformers), also from the official .pth, and its tokenizer."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.weights import Weights, open_weights, read_bounded
from talkingdit.encoders.text import TextFeatures
from talkingdit.errors import UserError
from talkingdit.nn.bfloat16 import fast_products

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

# Official name of a layer of a block, and that of transformers.
_LAYERS = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
_TOP = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
TEXT_LEN = 512  # tokens, the end included


def umt5_name(name: str) -> str:
    """Name in transformers of a weight with an official name; others stay as they are."""
    if match := _BLOCK.match(name):
        return f"encoder.block.{match[1]}.{_LAYERS.get(match[2], match[2])}"
    return _TOP.get(name, name)


def umt5_config(weights: Weights) -> dict[str, Any]:
    """Settings of `UMT5Config` from the shapes of official weights, which have no configuration beside them.

    Raises:
        UserError: these are not the weights of such an encoder.
    """
    shapes = weights.shapes
    try:
        vocabulary, dim = shapes["token_embedding.weight"]
        buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
        inner, _ = shapes["blocks.0.attn.q.weight"]
        hidden, _ = shapes["blocks.0.ffn.fc1.weight"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{weights.source}: not the weights of a UMT5 encoder (no usable {error}).") from error
    blocks = {int(match[1]) for match in map(_BLOCK.match, shapes) if match}
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": inner // heads,
        "d_ff": hidden,
        "num_layers": len(blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def load_umt5(source: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> UMT5EncoderModel:
    """The encoder from the official .pth file, or from a folder of transformers (config.json, *.safetensors).

    Raises:
        UserError: files that are missing or damaged, or weights that do not fit.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    if source.is_dir():
        weights = open_weights(source, stem="model")
        read_bounded(source / "config.json")
        try:
            config = UMT5Config.from_pretrained(source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{source}: no readable config.json of a UMT5 encoder ({str(error)[:160]}).") from error
    else:
        weights = open_weights(source)
        config = UMT5Config(**umt5_config(weights))
        weights = weights.renamed(umt5_name)
    model = build_empty(lambda: UMT5EncoderModel(config), source)
    # The last product of a block overflows in float16, in no other dtype.
    keep = ("wo",) if dtype == torch.float16 else ()
    return fill(model, weights, dtype, device, keep_float32=keep, what="the UMT5 encoder").requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, as its tokenizer.json says where it has one.

    `AutoTokenizer` would not do: from transformers 5 on the class for T5 keeps the vocabulary of that file and puts its
    own rules in place of the rest, which turns what is spelled in bytes (rare characters, Chinese ones among them) or
    needs the normaliser into unknown words.

    Raises:
        UserError: there is none, or it does not load.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not folder.is_dir():
        raise UserError(f"{folder}: the tokenizer is missing; the checkpoint is not complete.")
    kind: Any = PreTrainedTokenizerFast if (folder / "tokenizer.json").is_file() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer file has exceptions of its own
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: the tokenizer does not load ({reason[:160]}).") from error


def clean(prompt: str) -> str:
    """A prompt as the official program passes it on: repaired (ftfy), HTML entities replaced, white space single."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


# A word: what stands between white space, or a character of a script that has none.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


class UMT5Encoder(nn.Module):
    """Prompts to features.

    Args:
        model: the encoder.
        tokenizer: of the same vocabulary.
        text_len: most tokens of a prompt, the one for its end included; what is beyond is cut off.
    """

    def __init__(self, model: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, text_len: int = TEXT_LEN):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.text_dim = int(model.config.d_model)

    def unknown_words(self, prompt: str) -> list[str]:
        """None: the vocabulary has a piece for everything."""
        return []

    def left_out_words(self, prompt: str) -> list[str]:
        """Words at the end of a long prompt for which there is no room; one that is cut within counts."""
        text = clean(prompt)
        tokens = self.tokenizer(text)["input_ids"]
        if len(tokens) <= self.text_len:
            return []
        if self.tokenizer.is_fast:
            spans = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
            end = max(end for _, end in spans[: self.text_len - 1])
        else:
            end = len(self.tokenizer.decode(tokens[: self.text_len - 1]))
        return [match[0] for match in _WORD.finditer(text) if match.end() > end]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts; the empty prompt is its end alone.

        Returns:
            features [B, L, text_dim] with L the tokens of the longest prompt, in the dtype and on the device of the
            encoder, zero behind the end of each prompt; mask bool [B, L].

        Raises:
            TypeError: prompts is one string instead of a list of them.
        """
        if isinstance(prompts, str):
            raise TypeError("UMT5Encoder: prompts must be a list of strings, got one string")
        tokens = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=self.text_len,
            add_special_tokens=True,
            return_tensors="pt",
        )
        device = self.model.shared.weight.device
        mask = tokens["attention_mask"].to(device)
        with fast_products(device):
            features = self.model(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return TextFeatures(features * mask[..., None].to(features.dtype), mask.bool())
