# SPDX-License-Identifier: Apache-2.0
"""The Wan-S2V transformer (arXiv:2508.18621): speech and a reference image to video, in the latents of the Wan VAE."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from typing_extensions import Unpack

from talkingdit.families.wan_s2v.audio import AudioInjector, CausalAudioEncoder
from talkingdit.families.wan_s2v.blocks import Groups, Head, WanBlock
from talkingdit.families.wan_s2v.conditions import WanConditions, WanInputs, check_config, check_latents
from talkingdit.families.wan_s2v.encode import encode
from talkingdit.families.wan_s2v.packed import PackedClip, encode_packed, packed_time
from talkingdit.families.wan_s2v.sequence import spread, take
from talkingdit.nn.context_parallel import ContextParallel, gather
from talkingdit.nn.framepack import FramePacker
from talkingdit.nn.layers import Float32Linear, PatchConv3d, timestep_embedding, wide


class WanS2VModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The Wan-S2V transformer. Parameter names are those of the released checkpoints.

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

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanBlock", "AudioCrossAttention"]  # type: ignore[assignment]  # noqa: RUF012
    _repeated_blocks = ["WanBlock"]  # noqa: RUF012
    _group_offload_block_modules = ["audio_injector"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # type: ignore[assignment]  # noqa: RUF012
        *("patch_embedding", "time_", "norm", "modulation", "^head", "casual_audio_encoder"),
        *("trainable_cond_mask", "cond_encoder", "frame_packer"),
    ]
    _keep_in_fp32_modules = ["time_embedding", "time_projection", "modulation"]  # type: ignore[assignment]  # noqa: RUF012
    if TYPE_CHECKING:
        config: Any  # a frozen dictionary with attribute access

    @register_to_config
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
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
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
        for module in (self.blocks, self.text_embedding, self.time_embedding, self.time_projection):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.xavier_uniform_(linear.weight)
                    nn.init.zeros_(linear.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (self.text_embedding, self.time_embedding):
            for linear in module.modules():
                if isinstance(linear, nn.Linear):
                    nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        nn.init.zeros_(self.head.head.bias)
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
        latents: Tensor | None = None,
        timestep: Tensor | None = None,
        text: Tensor | None = None,
        *,
        conditions: WanConditions | None = None,
        encode_only: bool = False,
        packed: Sequence[PackedClip] | None = None,
        context: ContextParallel | None = None,
        **given: Unpack[WanInputs],
    ) -> Tensor | list[Tensor]:
        """Velocity of the latents.

        Args:
            latents: [B, in_dim, T, H, W] noisy latents; H and W even.
            timestep: [B] in 0..1000, or [B, T], one per latent frame.
            text: see `encode_conditions`.
            conditions: what `encode_conditions` made; its arguments are then left out.
            encode_only: return the conditions instead. `encode_conditions` calls this, so that hooks around a forward
                (sharding, offloading) hold for it too.
            packed: clips of any sizes, each a sample of its own, in one sequence without padding. All other arguments
                but `context` are then left out.
            context: the processes that share the sequence, each computing a contiguous part of it. All of them are
                given the same inputs, and get the whole velocity. The gradients of a parameter must be summed over
                them. With `conditions` it may be left out.
            **given: reference, history, drop_history, drop_reference, add_last_motion, pose, audio, audio_history,
                text_mask, lengths, history_lengths: see `encode_conditions`.

        Returns:
            [B, out_dim, T, H, W] float32 (float64 for a float64 model); for packed clips a list of [out_dim, T, H, W].

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        if packed is not None:
            if any(value is not None for value in (latents, timestep, text, conditions, *given.values())):
                raise ValueError("WanS2VModel: packed clips stand for all other inputs; give one or the other")
            conditions = encode_packed(self, packed, context)
            times = packed_time(self, packed, conditions.share)
            velocities = self._denoise([clip.latents[None] for clip in packed], *times, conditions)
            return [velocity[0] for velocity in velocities]
        if encode_only:
            return encode(self, text, context=context, **given)  # type: ignore[return-value, arg-type]
        if latents is None or timestep is None:
            raise ValueError("WanS2VModel: latents and timestep must be given")
        check_latents(self.config, latents, timestep)
        if conditions is None:
            if text is None:
                raise ValueError("WanS2VModel: text must be given, or conditions, got neither")
            given.setdefault("size", (latents.shape[2], latents.shape[3], latents.shape[4]))
            given.setdefault("precompute", False)
            conditions = encode(self, text, context=context, **given)
        elif text is not None or any(value is not None for value in given.values()):
            raise ValueError(
                "WanS2VModel: conditions stand for text, reference, history, pose and audio; give one or the other"
            )
        elif context is not None and context != conditions.share.context:
            raise ValueError("WanS2VModel: conditions were made for another context, or without one")
        frames, rows, columns = conditions.grid
        if latents.shape[2:] != (frames, 2 * rows, 2 * columns) or latents.shape[0] != conditions.text.shape[0]:
            raise ValueError(
                f"WanS2VModel: conditions were made for latents of [B, T, H, W] = "
                f"{[conditions.text.shape[0], frames, 2 * rows, 2 * columns]}, "
                f"got {[latents.shape[0], *latents.shape[2:]]}"
            )
        clip = conditions.share.clips[0]
        time, time6, groups = self._time(timestep, clip.per_frame, clip.noisy, clip.tokens)
        parts = 1 if timestep.dim() == 1 else frames
        velocities = self._denoise([latents], time6, groups, time[:, :parts], clip.noisy // parts, conditions)
        return velocities[0]

    def _denoise(
        self,
        latents: Sequence[Tensor],
        time6: Tensor,
        groups: Groups,
        head_time: Tensor,
        head_groups: Groups,
        conditions: WanConditions,
    ) -> list[Tensor]:
        """Velocities [B, out_dim, T, H, W] of the clips of a sequence.

        Args:
            latents: [B, in_dim, T, H, W] of each clip.
            time6, groups: modulation of the blocks for groups of tokens of the sequence.
            head_time, head_groups: time embedding for groups of the noisy tokens alone, of all clips.
        """
        share, text = conditions.share, conditions.text
        kind = self.embed_kind(0)
        parts = []
        for x, here, pose, clean in zip(latents, share.noisy, conditions.pose, conditions.clean, strict=True):
            noisy = self.patch_embedding(x, here) + kind
            parts += [(noisy if pose is None else noisy + pose).to(clean.dtype), clean]
        del noisy, pose, clean
        x = torch.cat(parts, dim=1)
        del parts
        x = x.to(wide(text.dtype) if self.config.residual_dtype == "float32" else text.dtype)

        injector = self.audio_injector
        plain = share.context is None and not share.packed
        for i, block in enumerate(self.blocks):
            x = self._run(
                block,
                x,
                time6,
                groups,
                conditions.layout,
                text,
                conditions.text_mask,
                conditions.key_mask,
                None if conditions.text_kv is None else conditions.text_kv[i],
                self.config.attention_backend,
                # Hooks around a block, such as caches of steps, may look at what it was given.
                not hasattr(block, "_diffusers_hook"),
                None if plain else share,
            )
            index = injector.index.get(i)
            if index is None:
                continue
            stream, trains = take(x, share.runs), torch.is_grad_enabled()
            heard = self._run(
                injector,
                stream,
                index,
                share.spans,
                text.dtype,
                conditions.audio,
                conditions.audio_modulation[index],
                None if conditions.audio_kv is None else conditions.audio_kv[index],
                self.config.audio_absorb,
                not trains,
            )
            if trains:
                x = x + spread(heard, share.runs, x.shape[1])
            elif len(share.runs) > 1:
                for (begin, end), part in zip(share.runs, heard.split([b - a for a, b in share.runs], 1), strict=True):
                    x[:, begin:end] = part
            elif heard is not stream:  # hooks may have moved it to another device
                stream.copy_(heard)
            del heard, stream

        y = self.head(take(x, share.runs), head_time, head_groups, share.before)
        begins = [clip.begin for clip in share.clips]
        if share.context is not None:
            y = gather(spread(y, share.runs, x.shape[1]), share.context, share.tokens)
        elif share.packed:
            begins = list(itertools.accumulate((clip.noisy for clip in share.clips), initial=0))
        return [
            self._unpatchify(y[:, begin : begin + clip.noisy], clip.grid)
            for begin, clip in zip(begins, share.clips, strict=False)
        ]

    def _unpatchify(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [B, F*S, 4 * out_dim] -> latents [B, out_dim, T, H, W]."""
        frames, rows, columns = grid
        y = y.reshape(y.shape[0], frames, rows, columns, 2, 2, self.config.out_dim)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(y.shape[0], self.config.out_dim, frames, 2 * rows, 2 * columns)

    def _run(self, module: nn.Module, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            assert self._gradient_checkpointing_func is not None  # enable_gradient_checkpointing sets it
            return self._gradient_checkpointing_func(module, *arguments)
        return module(*arguments)

    def embed_kind(self, kind: int) -> Tensor:
        """Embedding of a kind of token: 0 noisy, 1 reference, 2 history."""
        mask = self.trainable_cond_mask
        return mask(torch.full((), kind, dtype=torch.long, device=mask.weight.device))

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding [B, G, dim] of timesteps [B, G], and its six projections [B, G, 6, dim]."""
        with torch.autocast(timestep.device.type, enabled=False):
            time = self.time_embedding(timestep_embedding(timestep, self.config.freq_dim))
            return time, self.time_projection(time).unflatten(-1, (6, self.config.dim))

    def _time(self, timestep: Tensor, per_frame: int, noisy: int, total: int) -> tuple[Tensor, Tensor, Groups]:
        """Time embedding [B, G, dim] and its six projections [B, G, 6, dim], by groups of tokens.

        The groups are the noisy tokens and, at timestep 0, the rest; with a timestep per latent frame every
        `per_frame` tokens are a group, and as many groups at 0 follow as the rest needs.
        """
        per_sample = timestep.dim() == 1
        groups = timestep[:, None] if per_sample else timestep
        with_zero = total > noisy and self.config.zero_timestep
        if total > noisy and not with_zero and not per_sample:
            raise ValueError("WanS2VModel: a timestep per latent frame needs zero_timestep, got a model without it")
        if with_zero:
            groups = torch.cat([groups, torch.zeros_like(groups[:, :1])], dim=1)
        time, time6 = self.embed_time(groups)
        if per_sample:
            return time, time6, [noisy, total] if with_zero else [total]
        if with_zero:
            more = -(-(total - noisy) // per_frame) - 1
            time6 = torch.cat([time6, time6[:, -1:].expand(-1, more, -1, -1)], dim=1)
        return time, time6, per_frame

    def encode_conditions(
        self, text: Tensor, *, context: ContextParallel | None = None, **given: Unpack[WanInputs]
    ) -> WanConditions:
        """Everything that does not depend on the timestep, once for all steps of a clip.

        Args:
            text: [B, L, text_dim] with L <= text_len, padded with zeros to text_len.
            reference: [B, in_dim, 1, H, W] latent of the reference image, or None for no reference tokens.
            history: [B, in_dim, Th, H, W] latents that precede the clip, the newest last, or None. Packed history uses
                the last sum(zip_frame_buckets) frames; fewer are continued to the past by zeros.
            drop_history: True takes the history tokens away; per sample as a list or a bool tensor [B] it hides
                them from attention, which gives the same result.
            drop_reference: the same for the reference.
            add_last_motion: 2 uses all of the packed history, 1 not its newest bucket, 0 not its newest two; what that
                means is up to framepack_drop_mode.
            pose: [B, cond_dim, T, H, W] latents of a pose video, or None.
            audio: [B, audio_layers, audio_dim, 4 T] speech features, four per latent frame; None is silence (zeros).
            audio_history: [B, audio_layers, audio_dim, n] features just before the clip. Without them the first
                feature is taken to have lasted, as the official program does.
            text_mask: bool [B, L], true for real tokens, to leave padding out; None attends all text_len tokens.
            lengths: latent frames of each sample, a list or a tensor [B]; frames behind are padding that no other
                token sees, and what comes out there means nothing. None: all have T.
            history_lengths: latent frames of history of each sample, likewise, the newest last; frames in front are
                padding. A packed history is continued by zeros from there.
            size: (T, H, W) of the latents. Needed only where neither reference, history nor pose tells H and W or
                neither audio nor pose tells T.
            precompute: (default True) also make the keys and values of text and audio for every block. Leave it out
                where the result is used once (training), so that activation checkpointing and sharding see those
                layers. Blocks whose weights come and go with their forward (offloading, sharding) make their own in
                every step.
            context: the processes that will share the sequence; what is made is then for the tokens of this one.

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        conditions: Any = self(text=text, encode_only=True, context=context, **given)
        return conditions
