# SPDX-License-Identifier: Apache-2.0
"""The Wan image-to-video transformer (arXiv:2503.20314, section 5.1), which Gloria and SkyReels-Audio build on.

The patch embedding takes more channels than the velocity has: noisy latents, a mask of what is known, and latents of
what is known. A picture's CLIP features are attended beside the text. What families add has its places here:

    extra tokens        clean frames of any size in self-attention, at places in time of their own (`ExtraTokens`)
    extra channels      `in_dim`; `condition` holds all of them behind those of the noisy latents
    audio               attention inside of the blocks `audio_inject_layers`, what `audio_attention` makes, to what
                        `encode_audio` makes of the features
    known frames        a timestep per latent frame, 0 for those that are given clean in front
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where diffusers finds a class, it looks for this
from torch import Tensor, nn

from talkingdit.families.wan_i2v.blocks import ImageEmbedding, WanI2VBlock
from talkingdit.families.wan_i2v.checks import check_config, check_latents
from talkingdit.families.wan_i2v.conditions import WanI2VConditions, WanI2VInputs
from talkingdit.families.wan_i2v.encode import encode
from talkingdit.families.wan_i2v.timesteps import packed_time
from talkingdit.families.wan_i2v.units import ROOT, UNITS
from talkingdit.families.wan_s2v.blocks import BlockInputs, Head
from talkingdit.families.wan_s2v.diffusers_model import WanDiffusersModel
from talkingdit.families.wan_s2v.timesteps import StepTime, clip_time
from talkingdit.nn.context_parallel import ContextParallel
from talkingdit.nn.hooks import like_forward
from talkingdit.nn.layers import Float32Linear, GeluTanh, PatchConv3d, wide

if TYPE_CHECKING:
    from talkingdit.pipelines.step_cache import BlockCache


class WanI2VModel(WanDiffusersModel):
    """The Wan I2V transformer. Parameter names are those of the released checkpoints.

    Args:
        dim, ffn_dim, num_heads, num_layers: width, feed-forward width, attention heads and blocks.
        in_dim: channels of the patch embedding: noisy latents, then those of `condition`.
        out_dim: latent channels.
        patch_size: latent (frames, rows, columns) per token; only (1, 2, 2) exists.
        freq_dim: sinusoids of the timestep.
        text_dim, text_len: width of text features, and the length that they are padded to with zeros. The padding is
            attended, as the official program does, unless a call gives a text mask.
        image_dim: width of a picture's features; 0 for a model without attention to them (Wan 2.2).
        audio_inject_layers: blocks that hear audio, ascending; for families whose models do.
        zero_timestep: extra tokens are modulated as at timestep 0, not at that of the noisy ones.
        residual_dtype: "float32", or "compute" to keep the residual stream in the dtype of the linear layers.
        attention_backend: see `talkingdit.nn.attention.attention`.
        eps: of all norms but those of the picture's features, which have 1e-5.

    Raises:
        ValueError: for settings that contradict each other.
    """

    forward_methods: ClassVar = ("encode_conditions", "denoise_packed")  # for `register_fsdp_forward_method`
    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanI2VBlock"]  # type: ignore[assignment]  # noqa: RUF012
    _repeated_blocks = ["WanI2VBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = ["time_embedding", "time_projection", "modulation"]  # type: ignore[assignment]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # type: ignore[assignment]  # noqa: RUF012
        *("norm", "modulation"),
        *(f"^{name}" for name in (*ROOT, *(unit.pattern for unit in UNITS if unit.float32))),
    ]

    @register_to_config
    def __init__(
        self,
        dim: int = 5120,
        ffn_dim: int = 13824,
        num_heads: int = 40,
        num_layers: int = 40,
        in_dim: int = 36,
        out_dim: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        image_dim: int = 1280,
        audio_inject_layers: Sequence[int] = (),
        zero_timestep: bool = True,
        residual_dtype: str = "float32",
        attention_backend: str = "auto",
        eps: float = 1e-6,
    ):
        super().__init__()
        check_config(type(self).__name__, self.config)
        self.patch_embedding = PatchConv3d(in_dim, dim, (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), GeluTanh(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Float32Linear(freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
        self.img_emb = ImageEmbedding(image_dim, dim) if image_dim else None
        hears = set(audio_inject_layers)
        self.blocks = nn.ModuleList(
            [
                WanI2VBlock(
                    dim, ffn_dim, num_heads, eps, bool(image_dim), self.audio_attention() if i in hears else None
                )
                for i in range(num_layers)
            ]
        )
        self.head = Head(dim, 4 * out_dim, eps)
        self.gradient_checkpointing = False
        self.init_weights()

    # ---- What families may have otherwise ----------------------------------------------------------------------------

    def audio_attention(self) -> nn.Module:
        """A new `talkingdit.families.wan_i2v.blocks.AudioAttention` for a block of `audio_inject_layers`.

        Raises:
            ValueError: this model does not hear.
        """
        raise ValueError(f"{type(self).__name__}: audio_inject_layers must be empty, this model takes no audio")

    def encode_audio(self, clips: Sequence[WanI2VInputs], frames: Sequence[int]) -> list[Tensor] | None:
        """What blocks hear of every clip: [B, F, ...] with an entry for each of its latent frames; None for nothing.

        Layers of the model must be called once in it, whatever the clips have.

        Args:
            clips: of a sequence.
            frames: their latent frames.

        Raises:
            ValueError: audio of a shape that does not fit, or a model that does not hear.
        """
        if any(clip.audio is not None for clip in clips):
            raise ValueError(f"{type(self).__name__}: takes no audio, got some")
        return None

    def known(self, latents: Tensor) -> Tensor:
        """Clean latents [B, out_dim, T, H, W] with all channels of the patch embedding: those of frames that are known.

        The mask is one, and the latents stand both where the noisy ones do and where the known ones do, so that the
        patch embedding sees what it sees of a given frame at the end of denoising.
        """
        mask = self.config.in_dim - 2 * self.config.out_dim
        if mask < 0:  # no place for known latents
            return torch.nn.functional.pad(latents, (0,) * 6 + (0, self.config.in_dim - self.config.out_dim))
        ones = latents.new_ones(len(latents), mask, *latents.shape[2:])
        return torch.cat([latents, ones, latents], dim=1)

    # ---- Forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: WanI2VConditions | WanI2VInputs,
        *,
        context: ContextParallel | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """Velocity of the latents.

        Args:
            latents: [B, out_dim, T, H, W] noisy latents; H and W even.
            timestep: [B] in 0..1000, or [B, T], one per latent frame.
            conditions: what `encode_conditions` made, or its inputs, of which conditions are made for this call alone.
            context: the processes that share the sequence, each computing a contiguous shard of it. All of them are
                given the same inputs, and get the whole velocity. The gradients of a parameter must be summed over
                them. With conditions it may be left out.
            cache: of this guidance branch: the blocks run and are remembered, or what they added before is added again.

        Returns:
            [B, out_dim, T, H, W] float32 (float64 for a float64 model).

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        name = type(self).__name__
        check_latents(self, latents, timestep)
        if isinstance(conditions, WanI2VInputs):
            size = (latents.shape[2], latents.shape[3], latents.shape[4])
            conditions = encode(self, [conditions], [size], precompute=False, context=context)
        elif not isinstance(conditions, WanI2VConditions):
            raise ValueError(
                f"{name}: conditions must be WanI2VConditions or WanI2VInputs, got {type(conditions).__name__}"
            )
        elif context is not None and context != conditions.shard.context:
            raise ValueError(f"{name}: conditions were made for another context, or without one")
        frames, rows, columns = conditions.grid
        made = [conditions.condition[0].shape[0], frames, 2 * rows, 2 * columns]
        if [latents.shape[0], *latents.shape[2:]] != made:
            raise ValueError(
                f"{name}: conditions were made for latents of [B, T, H, W] = {made}, "
                f"got {[latents.shape[0], *latents.shape[2:]]}"
            )
        time = clip_time(self, timestep, conditions.shard.clips[0])
        return self._denoise([latents], time, conditions, cache)[0]

    @like_forward
    def encode_conditions(
        self, inputs: WanI2VInputs, *, precompute: bool = True, context: ContextParallel | None = None
    ) -> WanI2VConditions:
        """Everything that does not depend on the timestep, once for all steps of a clip.

        Args:
            inputs: what the clip is made from.
            precompute: also make the keys and values of text and picture for every block. Leave it out where the result
                is used once, so that activation checkpointing and sharding see those layers. Blocks whose weights come
                and go with their forward (offloading, sharding) make their own in every step.
            context: the processes that will share the sequence; what is made is then for the tokens of this one.

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        return encode(self, [inputs], [None], precompute=precompute, context=context)

    @like_forward
    def denoise_packed(
        self,
        latents: Sequence[Tensor],
        timesteps: Sequence[Tensor],
        clips: Sequence[WanI2VInputs],
        *,
        held: Sequence[int] | None = None,
        context: ContextParallel | None = None,
    ) -> list[Tensor]:
        """Velocities of clips of any sizes, each a sample of its own, in one sequence without padding.

        Args:
            latents: [out_dim, T, H, W] of each clip, at least one.
            timesteps: [] of each in 0..1000, or [T], one per latent frame.
            clips: what they are made from, with a batch axis of one.
            held: latent frames at the beginning of each clip that are clean, at timestep 0; None: none.
            context: as in `forward`.

        Returns:
            [out_dim, T, H, W] of each clip, float32 (float64 for a float64 model).

        Raises:
            ValueError: for a clip that does not fit, or more clips than a sequence takes; the message names it.
        """
        if not len(latents) == len(timesteps) == len(clips) > 0:
            raise ValueError(
                f"{type(self).__name__}: latents, timesteps and clips must be as many, at least one, "
                f"got {len(latents)}, {len(timesteps)} and {len(clips)}"
            )
        for one, timestep in zip(latents, timesteps, strict=True):
            check_latents(self, one[None], timestep[None])
        sizes = [(one.shape[1], one.shape[2], one.shape[3]) for one in latents]
        conditions = encode(self, clips, sizes, precompute=False, context=context, packed=True)
        time = packed_time(self, timesteps, held or [0] * len(clips), conditions.shard.clips)
        return [velocity[0] for velocity in self._denoise([one[None] for one in latents], time, conditions)]

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """Arguments of one small forward that goes through every layer, zeros: hooks of offloading learn from it."""
        c = self.config
        inputs = WanI2VInputs(torch.zeros(1, 1, c.text_dim))
        return {"latents": torch.zeros(1, c.out_dim, 1, 4, 4), "timestep": torch.zeros(1), "conditions": inputs}

    def _through_blocks(self, x: Tensor, time: StepTime, conditions: WanI2VConditions) -> Tensor:
        shard = conditions.shard
        inputs = BlockInputs(
            groups=time.groups,
            layout=conditions.layout,
            text_mask=conditions.text_mask,
            key_mask=conditions.key_mask,
            backend=self.config.attention_backend,
            inplace=True,
            shard=shard,
        )
        text_kv, image_kv = conditions.text_kv, conditions.image_kv
        for i, block in enumerate(self.blocks):
            x = self._run(
                block,
                x,
                time.modulation,
                conditions.text,
                inputs,
                None if text_kv is None else text_kv[i],
                conditions.image,
                None if image_kv is None else image_kv[i],
                conditions.audio,
            )
        return x

    def _embed(self, latents: Sequence[Tensor], conditions: WanI2VConditions) -> Tensor:
        parts = []
        clips = zip(latents, conditions.condition, conditions.shard.clip_noisy, conditions.clean, strict=True)
        for x, condition, tokens, clean in clips:
            given = torch.cat([x, condition.to(x.dtype)], dim=1)
            parts += [self.patch_embedding(given, tokens).to(clean.dtype), clean]
        stream = torch.cat(parts, dim=1)
        dtype = conditions.text.dtype
        return stream.to(wide(dtype) if self.config.residual_dtype == "float32" else dtype)
