# SPDX-License-Identifier: Apache-2.0
"""Names of Wan weights in the libraries that renamed them, to the native names of the released checkpoints and back.

The diffusers names of the S2V transformer are those of `WanS2VTransformer3DModel` (diffusers pull request 12258), which
extend those of `WanTransformer3DModel`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Native and diffusers name of a module outside the blocks. A name may stand for a whole subtree; longer ones first.
_TOP = (
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("casual_audio_encoder.encoder.conv2.conv", "condition_embedder.causal_audio_encoder.encoder.conv2.conv.conv"),
    ("casual_audio_encoder.encoder.conv3.conv", "condition_embedder.causal_audio_encoder.encoder.conv3.conv.conv"),
    ("casual_audio_encoder.encoder", "condition_embedder.causal_audio_encoder.encoder"),
    ("casual_audio_encoder.weights", "condition_embedder.causal_audio_encoder.weighted_avg.weights"),
    ("cond_encoder", "condition_embedder.pose_embedder"),
    ("trainable_cond_mask", "trainable_condition_mask"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    # The image branch of I2V models.
    ("img_emb.proj.0", "condition_embedder.image_embedder.norm1"),
    ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    ("img_emb.proj.4", "condition_embedder.image_embedder.norm2"),
    ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
)
# Inside blocks.<i>; norm3 is the norm before text attention, which diffusers counts as the second.
_ATTENTION = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
_IMAGE = (("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k"))
_NORMS = (("norm_q", "norm_q"), ("norm_k", "norm_k"))
_BLOCK = (
    *((f"self_attn.{a}", f"attn1.{b}") for a, b in _ATTENTION + _NORMS),
    *((f"cross_attn.{a}", f"attn2.{b}") for a, b in _ATTENTION + _NORMS + _IMAGE),
    ("norm3", "norm2"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    ("modulation", "scale_shift_table"),
)
_IN_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)$")
_IN_INJECTOR = re.compile(r"(audio_injector\.injector\.\d+)\.(.+)$")


def _swap(name: str, pairs: tuple[tuple[str, str], ...], back: bool) -> str:
    for native, other in pairs:
        old, new = (other, native) if back else (native, other)
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def _translate(name: str, back: bool) -> str:
    for pattern, pairs in ((_IN_BLOCK, _BLOCK), (_IN_INJECTOR, _ATTENTION)):
        if match := pattern.match(name):
            return f"{match[1]}.{_swap(match[2], pairs, back)}"
    return _swap(name, _TOP, back)


def to_native(name: str) -> str:
    """Native name of a weight or module that has a diffusers name; other names stay as they are."""
    if name.startswith("motion_in.patch_embedding."):
        # The conversion script of the pull request files the patch embedding here for models with packed history.
        name = name.removeprefix("motion_in.")
    return _translate(name, back=True)


def to_diffusers(name: str) -> str:
    """Diffusers name of a weight or module that has a native name; other names stay as they are."""
    return _translate(name, back=False)


def has_diffusers_names(names: Iterable[str]) -> bool:
    """Are these the names of a diffusers checkpoint of the Wan family?"""
    return any(".attn1.to_q." in name or name.startswith("condition_embedder.") for name in names)


def without_prefix(name: str) -> str:
    """A native name without the prefixes that other programs put in front of it."""
    for prefix in ("model.diffusion_model.", "diffusion_model.", "model."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
