# SPDX-License-Identifier: Apache-2.0
"""The parts of a HunyuanVideo-Avatar checkpoint with random weights, in the files and by the names of the release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT_DIM, POOLED_DIM, AUDIO_DIM, AUDIO_LAYERS = 24, 12, 16, 2
TRANSFORMER: dict[str, Any] = {
    "hidden_size": 48,
    "num_heads": 2,
    "mlp_width_ratio": 2.0,
    "depth_double_blocks": 2,
    "depth_single_blocks": 2,
    "rope_dim_list": (8, 8, 8),
    "text_states_dim": TEXT_DIM,
    "text_states_dim_2": POOLED_DIM,
    "audio_channels": AUDIO_DIM,
    "audio_blocks": AUDIO_LAYERS + 1,
    "audio_intermediate": 32,
    "adapter_dim": 16,
    "freq_dim": 32,
}
VAE: dict[str, Any] = {"block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4}
WORDS = [
    "a",
    "person",
    "man",
    "woman",
    "talking",
    "smiling",
    "in",
    "the",
    "of",
    "and",
    "red",
    "blue",
    "house",
    "Describe",
    "video",
    "by",
    "detailing",
    "looks",
    "like",
]


def make_transformer(seed: int = 0, **changes: Any) -> Any:
    """No weight is zero that would hide a condition."""
    from talkingdit.families.hunyuan_avatar.model import HunyuanAvatarModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HunyuanAvatarModel(**TRANSFORMER | {"zero_init": False} | changes).eval()
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_hunyuan_vae(seed: int = 0) -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLHunyuanVideo(latent_channels=16, scaling_factor=0.476986, **VAE).eval()
        torch.nn.init.normal_(vae.decoder.conv_out.conv.weight, std=0.2)
    return vae


def make_llava(seed: int = 0) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=TEXT_DIM, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, vocab_size=64
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, image_seq_length=4)
        ).eval()


def make_clip(seed: int = 0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=POOLED_DIM, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=77, eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPTextModel(config).eval()


def make_whisper(seed: int = 0) -> Any:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        d_model=AUDIO_DIM, encoder_layers=AUDIO_LAYERS, encoder_attention_heads=2, decoder_layers=1,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=50, num_mel_bins=80,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return WhisperModel(config).eval()


def make_tokenizer() -> Any:
    """Words and marks, each a token; what it does not know is one of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<image>", "<s>", "</s>", "<unk>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        padding_side="right", additional_special_tokens=["<image>"],
    )  # fmt: skip


def save_encoders(root: Path) -> None:
    """llava_llama_image/, text_encoder_2/ and whisper-tiny/ of the release."""
    from transformers import WhisperFeatureExtractor

    make_llava().save_pretrained(root / "llava_llama_image")
    make_clip().save_pretrained(root / "text_encoder_2")
    for name in ("llava_llama_image", "text_encoder_2"):
        make_tokenizer().save_pretrained(root / name)
    make_whisper().save_pretrained(root / "whisper-tiny")
    WhisperFeatureExtractor().save_pretrained(root / "whisper-tiny")


def save_vae(folder: Path) -> None:
    """vae/ of the release: config.json and pytorch_model.pt under its names."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "_class_name": "AutoencoderKLCausal3D", "latent_channels": 16, "scaling_factor": 0.476986,
        "time_compression_ratio": 4, "spatial_compression_ratio": 8, "sample_size": 256, "sample_tsize": 64, **VAE,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(
        {f"vae.{name}": value for name, value in make_hunyuan_vae().state_dict().items()}, folder / "pytorch_model.pt"
    )


def save_released(root: Path, **changes: Any) -> Path:
    """A whole folder in the released layout; returns it."""
    ckpts = root / "ckpts"
    save_encoders(ckpts)
    video = ckpts / "hunyuan-video-t2v-720p"
    save_vae(video / "vae")
    (video / "transformers").mkdir(parents=True)
    model = make_transformer(**changes)
    torch.save({"module": model.state_dict()}, video / "transformers" / "mp_rank_00_model_states.pt")
    said = {
        name: model.config[name] for name in ("rope_dim_list", "audio_blocks", "audio_channels")
    }  # shapes do not tell
    (video / "transformers" / "config.json").write_text(json.dumps(said))
    return root
