# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder in the exact layout of the released Wan2.2-S2V-14B, tiny and with random weights.

Every file has the name, format, tensor names and settings of the released one, so that what loads this folder loads
that one. Nothing here uses the code that reads checkpoints, except the model classes for the names of their weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from talkingdit.models import WanS2VModel, preset

WORDS = ("a", "an", "the", "person", "woman", "man", "talks", "talking", "singing", "to", "camera", "smiles", "red")
STEM = "diffusion_pytorch_model"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
WAV2VEC = "wav2vec2-large-xlsr-53-english"


def make_official(
    folder: Path,
    *,
    dim: int = 48,
    num_heads: int = 2,
    num_layers: int = 3,
    ffn_dim: int = 64,
    audio_inject_layers: tuple[int, ...] = (0, 2),
    text_dim: int = 32,
    audio_dim: int = 16,
    audio_encoder_layers: int = 24,
    vae_dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 3,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write the folder; returns it.

    Args:
        dtype: of the transformer's weights; the text encoder is bfloat16 and the rest float32, as released.
        shards: files that the transformer is split into.
        settings: what pipeline.json says; None writes no such file, as released.
        config: further settings of the transformer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers, "ffn_dim": ffn_dim, "freq_dim": 32}
        model = random_transformer(
            **shape, audio_inject_layers=audio_inject_layers, text_dim=text_dim, audio_dim=audio_dim,
            audio_layers=audio_encoder_layers + 1, **config,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_transformer(folder, model, dtype, shards)
        torch.save({k: v.bfloat16() for k, v in t5_state(text_dim, vocabulary=len(pieces())).items()}, folder / T5_FILE)
        write_tokenizer(folder / "google" / "umt5-xxl")
        torch.save(vae_state(vae_dim), folder / VAE_FILE)
        write_wav2vec(folder / WAV2VEC, audio_dim, audio_encoder_layers)
    if settings is not None:
        (folder / "pipeline.json").write_text(json.dumps(settings))
    return folder


def random_transformer(**changes: Any) -> WanS2VModel:
    """A model of which every weight matters: a fresh one has zeros that hide what is behind them."""
    model = WanS2VModel(**preset("wan_s2v_14b", **changes))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.02)
    return model.eval()


def official_config(model: WanS2VModel) -> dict[str, Any]:
    """config.json as the official program writes it: its own settings, some without effect, some left out."""
    names = (
        *("cond_dim", "audio_dim", "num_audio_token", "enable_adain", "adain_mode", "audio_inject_layers"),
        *("zero_init", "zero_timestep", "add_last_motion", "enable_framepack", "framepack_drop_mode", "text_len"),
        *("in_dim", "dim", "ffn_dim", "freq_dim", "out_dim", "num_heads", "num_layers", "eps"),
    )
    values = {name: model.config[name] for name in names}
    unused = {"enable_motioner": False, "enable_tsm": False, "motion_token_num": 1024, "trainable_token_pos_emb": False}
    return {"_class_name": "WanModel_S2V", "_diffusers_version": "0.34.0", "model_type": "s2v", **values, **unused}


def write_transformer(folder: Path, model: WanS2VModel, dtype: torch.dtype, shards: int) -> None:
    """config.json and numbered shards with an index (or one file without)."""
    (folder / "config.json").write_text(json.dumps(official_config(model), indent=2))
    state = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        return
    names = sorted(state)
    size = -(-len(names) // shards)
    where = {}
    for i in range(shards):
        file = f"{STEM}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * size : (i + 1) * size]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(value.numel() * value.element_size() for value in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def t5_state(dim: int, vocabulary: int, layers: int = 2, heads: int = 4, hidden: int = 48) -> dict[str, Tensor]:
    """Weights of the text encoder under their official names."""

    def linear(out: int, width: int) -> Tensor:
        return torch.randn(out, width) / math.sqrt(width)

    state = {"token_embedding.weight": torch.randn(vocabulary, dim), "norm.weight": 1 + 0.1 * torch.randn(dim)}
    for i in range(layers):
        block = {f"attn.{name}.weight": linear(dim, dim) for name in "qkvo"}
        block |= {"ffn.gate.0.weight": linear(hidden, dim), "ffn.fc1.weight": linear(hidden, dim)}
        block |= {"ffn.fc2.weight": linear(dim, hidden), "pos_embedding.embedding.weight": torch.randn(32, heads)}
        block |= {f"norm{n}.weight": 1 + 0.1 * torch.randn(dim) for n in (1, 2)}
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return state


def pieces() -> list[tuple[str, float]]:
    """The vocabulary of the tokenizer: markers, words, letters."""
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,-'"
    words = [("▁" + word, -4.0) for word in WORDS]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *((letter, -8.0) for letter in letters)]


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and its companions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(pieces(), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    markers = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    more = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [], "sp_model_kwargs": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(markers | more))
    (folder / "special_tokens_map.json").write_text(json.dumps(markers))


def vae_state(
    dim: int = 8, z_dim: int = 16, multiples: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2
) -> dict[str, Tensor]:
    """Weights of the autoencoder under their official names."""
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, width: int, *kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(out, width, *kernel) / math.sqrt(width * math.prod(kernel))
        state[f"{name}.bias"] = 0.02 * torch.randn(out)

    def residual(name: str, width: int, out: int) -> None:
        state[f"{name}.residual.0.gamma"] = 1 + 0.1 * torch.randn(width, 1, 1, 1)
        conv(f"{name}.residual.2", out, width, 3, 3, 3)
        state[f"{name}.residual.3.gamma"] = 1 + 0.1 * torch.randn(out, 1, 1, 1)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if width != out:
            conv(f"{name}.shortcut", out, width, 1, 1, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.0", width, width)
        state[f"{name}.1.norm.gamma"] = 1 + 0.1 * torch.randn(width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{name}.1.proj", width, width, 1, 1)
        residual(f"{name}.2", width, width)

    def head(name: str, width: int, out: int) -> None:
        state[f"{name}.0.gamma"] = 1 + 0.1 * torch.randn(width, 1, 1, 1)
        conv(f"{name}.2", out, width, 3, 3, 3)

    in_time = (False, True, True)  # which changes of size halve time too, in the encoder
    widths = [dim * m for m in multiples]
    conv("encoder.conv1", dim, 3, 3, 3, 3)
    step, width = 0, dim
    for level, out in enumerate(widths):
        for _ in range(blocks):
            residual(f"encoder.downsamples.{step}", width, out)
            step, width = step + 1, out
        if level < len(in_time):
            conv(f"encoder.downsamples.{step}.resample.1", out, out, 3, 3)
            if in_time[level]:
                conv(f"encoder.downsamples.{step}.time_conv", out, out, 3, 1, 1)
            step += 1
    middle("encoder.middle", width)
    head("encoder.head", width, 2 * z_dim)
    conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1)
    conv("conv2", z_dim, z_dim, 1, 1, 1)
    conv("decoder.conv1", width, z_dim, 3, 3, 3)
    middle("decoder.middle", width)
    step = 0
    for level, out in enumerate(reversed(widths)):
        for _ in range(blocks + 1):
            residual(f"decoder.upsamples.{step}", width, out)
            step, width = step + 1, out
        if level < len(in_time):
            conv(f"decoder.upsamples.{step}.resample.1", out // 2, out, 3, 3)
            if in_time[-1 - level]:
                conv(f"decoder.upsamples.{step}.time_conv", 2 * out, out, 3, 1, 1)
            step, width = step + 1, out // 2
    head("decoder.head", width, 3)
    return state


def write_wav2vec(folder: Path, dim: int, layers: int) -> None:
    """The speech encoder with the output layer of speech recognition, as released."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=8,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        conv_dim=[8] * 7,
        conv_bias=True,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
