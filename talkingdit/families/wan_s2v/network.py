# SPDX-License-Identifier: Apache-2.0
"""The network of the Wan-S2V transformer (arXiv:2508.18621): speech and a reference image to video, in the latents of
the Wan VAE. It needs torch alone; model.py makes it a model of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from talkingdit.families.wan_s2v.audio import AudioInjector, CausalAudioEncoder, Injection
from talkingdit.families.wan_s2v.blocks import BlockInputs, Head, WanBlock
from talkingdit.families.wan_s2v.checks import check_config, check_latents
from talkingdit.families.wan_s2v.conditions import WanConditions, WanInputs
from talkingdit.families.wan_s2v.encode import encode
from talkingdit.families.wan_s2v.packed import PackedClip, encode_packed
from talkingdit.families.wan_s2v.sequence import NOISY
from talkingdit.families.wan_s2v.timesteps import StepTime, clip_time, packed_time
from talkingdit.families.wan_s2v.trunk import WanTrunk
from talkingdit.nn.configured import BareModel, configured
from talkingdit.nn.context_parallel import ContextParallel
from talkingdit.nn.framepack import FramePacker
from talkingdit.nn.hooks import like_forward
from talkingdit.nn.layers import Float32Linear, GeluTanh, PatchConv3d, wide
from talkingdit.nn.ranges import scatter_ranges, take_ranges

if TYPE_CHECKING:
    from talkingdit.pipelines.step_cache import BlockCache


class WanS2VNetwork(WanTrunk):
    """The network of `WanS2VModel`. Parameter names are those of the released checkpoints.

    Args:
        dim, ffn_dim, num_heads, num_layers: width, feed-forward width, attention heads and blocks.
        in_dim, out_dim: latent channels in and out.
        cond_dim: latent channels of a pose video; 0 for a model without one.
        patch_size: latent (frames, rows, columns) per token; only (1, 2, 2) exists.
        freq_dim: sinusoids of the timestep.
        text_dim, text_len: width of text features, and the length that they are padded to with zeros. The padding is
            attended, as the official program does, unless a call gives a text mask.
        audio_dim, audio_layers: width and number of layers of the speech features.
        num_audio_token: audio tokens per latent frame; one learned token is added to them.
        audio_inject_layers: blocks after which audio is added, ascending.
        enable_adain: adaptive layer norm, driven by a global audio vector per frame, before audio attention.
        adain_mode: "attn_norm"; with any other name the checkpoint has layers for it but the plain norm is used.
        zero_init: begin with no influence of pose, token kind and audio, to train on from a video model. A model that
            is trained from nothing learns to listen sooner without.
        audio_layer_init: first value of the weights of the audio layers. The official 0.01 lets one large step of an
            optimiser drive their sum, by which they are divided, through zero; train with 1 from nothing.
        zero_timestep: reference and history tokens are modulated as at timestep 0, not at that of the noisy ones.
        enable_framepack, framepack_drop_mode, zip_frame_buckets, framepack_padding: history packing, see `FramePacker`.
            Without it the history is patchified like the video.
        add_last_motion: False keeps the newest two history buckets out, whatever a call says.
        motion_frames: pixel and latent frames of the history that generation keeps, (4 n - 3, n).
        reference_time: place in time of the reference.
        residual_dtype: "float32", or "compute" to keep the residual stream in the dtype of the linear layers.
        attention_backend: see `talkingdit.nn.attention.attention`.
        audio_absorb: "value" folds the output projection of audio attention into the values, once per clip: the same
            result with another rounding, see `talkingdit.nn.audio_cross_attention`.
        eps: of all norms but the one before audio attention (1e-5 with AdaIN, 1e-6 without).

    Raises:
        ValueError: for settings that contradict each other.
    """

    # Weights that must be float32 on disk and in memory; other units that are precise only compute in it.
    _keep_in_fp32_modules: Any = ["time_embedding", "time_projection", "modulation"]  # noqa: RUF012

    if TYPE_CHECKING:
        config: Any  # a frozen dictionary with attribute access

    @configured
    def __init__(
        self,
        dim: int = 5120,
        ffn_dim: int = 13824,
        num_heads: int = 40,
        num_layers: int = 40,
        in_dim: int = 16,
        out_dim: int = 16,
        cond_dim: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        text_dim: int = 4096,
        text_len: int = 512,
        audio_dim: int = 1024,
        audio_layers: int = 25,
        num_audio_token: int = 4,
        audio_inject_layers: Sequence[int] = (0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39),
        enable_adain: bool = True,
        adain_mode: str = "attn_norm",
        zero_init: bool = True,
        audio_layer_init: float = 0.01,
        zero_timestep: bool = True,
        enable_framepack: bool = True,
        framepack_drop_mode: str = "padd",
        zip_frame_buckets: Sequence[int] = (1, 2, 16),
        framepack_padding: str = "none",
        add_last_motion: bool = True,
        motion_frames: Sequence[int] = (73, 19),
        reference_time: float = 30,
        residual_dtype: str = "float32",
        attention_backend: str = "auto",
        audio_absorb: str = "none",
        eps: float = 1e-6,
    ):
        super().__init__()
        check_config(self.config)
        self.patch_embedding = PatchConv3d(in_dim, dim, (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), GeluTanh(), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(Float32Linear(freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([WanBlock(dim, ffn_dim, num_heads, eps) for _ in range(num_layers)])
        self.head = Head(dim, 4 * out_dim, eps)
        self.cond_encoder = PatchConv3d(cond_dim, dim, (1, 2, 2)) if cond_dim > 0 else None
        self.casual_audio_encoder = CausalAudioEncoder(audio_dim, dim, audio_layers, num_audio_token, enable_adain)
        self.audio_injector = AudioInjector(dim, num_heads, audio_inject_layers, enable_adain, adain_mode)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.frame_packer = (
            FramePacker(in_dim, dim, zip_frame_buckets, framepack_drop_mode, framepack_padding)
            if enable_framepack
            else None
        )
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights by the official scheme: a head that gives zero; with `zero_init` conditions have no effect."""
        super().init_weights()
        nn.init.constant_(self.casual_audio_encoder.weights, self.config.audio_layer_init)
        if self.config.enable_adain:
            # Without its bias a projection that begins at zero would still shift every frame.
            for parameter in self.audio_injector.injector_adain_layers.parameters():
                nn.init.zeros_(parameter)
        if self.config.zero_init:
            for name, parameter in self.named_parameters():
                silent = name.startswith(("trainable_cond_mask.", "cond_encoder."))
                if silent or (name.startswith("audio_injector.injector.") and ".o." in name):
                    nn.init.zeros_(parameter)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: WanConditions | WanInputs,
        *,
        context: ContextParallel | None = None,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """Velocity of the latents.

        Args:
            latents: [B, in_dim, T, H, W] noisy latents; H and W even.
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
        check_latents(self.config, latents, timestep)
        if isinstance(conditions, WanInputs):
            size = (latents.shape[2], latents.shape[3], latents.shape[4])
            conditions = encode(self, conditions, size, precompute=False, context=context)
        elif not isinstance(conditions, WanConditions):
            raise ValueError(
                f"WanS2VModel: conditions must be WanConditions or WanInputs, got {type(conditions).__name__}"
            )
        elif context is not None and context != conditions.shard.context:
            raise ValueError("WanS2VModel: conditions were made for another context, or without one")
        frames, rows, columns = conditions.grid
        if latents.shape[2:] != (frames, 2 * rows, 2 * columns) or latents.shape[0] != conditions.text.shape[0]:
            raise ValueError(
                f"WanS2VModel: conditions were made for latents of [B, T, H, W] = "
                f"{[conditions.text.shape[0], frames, 2 * rows, 2 * columns]}, "
                f"got {[latents.shape[0], *latents.shape[2:]]}"
            )
        time = clip_time(self, timestep, conditions.shard.clips[0])
        return self._denoise([latents], time, conditions, cache)[0]

    @like_forward
    def encode_conditions(
        self, inputs: WanInputs, *, precompute: bool = True, context: ContextParallel | None = None
    ) -> WanConditions:
        """Everything that does not depend on the timestep, once for all steps of a clip.

        Args:
            inputs: what the clip is made from.
            precompute: also make the keys and values of text and audio for every block. Leave it out where the result
                is used once, so that activation checkpointing and sharding see those layers. Blocks whose weights come
                and go with their forward (offloading, sharding) make their own in every step.
            context: the processes that will share the sequence; what is made is then for the tokens of this one.

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        return encode(self, inputs, precompute=precompute, context=context)

    @like_forward
    def denoise_packed(self, clips: Sequence[PackedClip], *, context: ContextParallel | None = None) -> list[Tensor]:
        """Velocities of clips of any sizes, each a sample of its own, in one sequence without padding.

        Args:
            clips: at least one.
            context: as in `forward`.

        Returns:
            [out_dim, T, H, W] of each clip, float32 (float64 for a float64 model).

        Raises:
            ValueError: for a clip that does not fit, or more clips than a sequence takes; the message names it.
        """
        conditions = encode_packed(self, clips, context)
        time = packed_time(self, [clip.timestep for clip in clips], conditions.shard.clips)
        return [velocity[0] for velocity in self._denoise([clip.latents[None] for clip in clips], time, conditions)]

    def _through_blocks(self, x: Tensor, time: StepTime, conditions: WanConditions) -> Tensor:
        """The residual stream [B, N, dim] behind the last block; without gradients x is written over."""
        shard, text = conditions.shard, conditions.text
        inputs = BlockInputs(
            groups=time.groups,
            layout=conditions.layout,
            text_mask=conditions.text_mask,
            key_mask=conditions.key_mask,
            backend=self.config.attention_backend,
            inplace=True,
            shard=None if shard.context is None and not shard.packed else shard,
        )
        for i, block in enumerate(self.blocks):
            text_kv = None if conditions.text_kv is None else conditions.text_kv[i]
            x = self._run(block, x, time.modulation, text, inputs, text_kv)
            index = self.audio_injector.index.get(i)
            if index is not None:
                x = self._inject(x, index, conditions)
        return x

    def _embed(self, latents: Sequence[Tensor], conditions: WanConditions) -> Tensor:
        """The residual stream [B, N, dim] in front of the first block: noisy and clean tokens of this process."""
        kind = self.embed_kind(NOISY)
        parts = []
        clips = zip(latents, conditions.shard.clip_noisy, conditions.pose, conditions.clean, strict=True)
        for x, tokens, pose, clean in clips:
            noisy = self.patch_embedding(x, tokens) + kind
            parts += [(noisy if pose is None else noisy + pose).to(clean.dtype), clean]
        del noisy, pose, clean  # before the stream is made wider
        stream = torch.cat(parts, dim=1)
        del parts
        dtype = conditions.text.dtype
        return stream.to(wide(dtype) if self.config.residual_dtype == "float32" else dtype)

    def _inject(self, x: Tensor, index: int, conditions: WanConditions) -> Tensor:
        """The residual stream x [B, N, dim] with what an injection of audio adds to it; without gradients in place."""
        ranges, trains = conditions.shard.noisy_ranges, torch.is_grad_enabled()
        noisy = take_ranges(x, ranges)
        injection = Injection(
            index, conditions.shard.frame_spans, conditions.text.dtype, self.config.audio_absorb, inplace=not trains
        )
        memory = None if conditions.audio_kv is None else conditions.audio_kv[index]
        result = self._run(
            self.audio_injector, noisy, injection, conditions.audio, conditions.audio_modulation[index], memory
        )
        if trains:
            return x + scatter_ranges(result, ranges, x.shape[1])
        if len(ranges) > 1:
            for (begin, end), part in zip(ranges, result.split([b - a for a, b in ranges], 1), strict=True):
                x[:, begin:end] = part
        elif result is not noisy:  # hooks may have moved it to another device
            noisy.copy_(result)
        return x

    def embed_kind(self, kind: int) -> Tensor:
        """Embedding [dim] of NOISY, REFERENCE or HISTORY tokens."""
        mask = self.trainable_cond_mask
        return mask(torch.full((), kind, dtype=torch.long, device=mask.weight.device))


class BareWanS2V(WanS2VNetwork, BareModel):
    """The network with nothing around it: to generate with a small model, see `talkingdit.nn.configured`."""
