# SPDX-License-Identifier: Apache-2.0
"""The HunyuanVideo-Avatar transformer (arXiv:2505.20156): voices, a picture and words to video, by MM-DiT."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from talkingdit.checkpoints.adapters import refuse_adapters
from talkingdit.families.hunyuan_avatar.audio import AudioProjector, FaceAudioAdapter
from talkingdit.families.hunyuan_avatar.blocks import BlockInputs, DoubleBlock, FinalLayer, SingleBlock
from talkingdit.families.hunyuan_avatar.checks import check_config, check_latents
from talkingdit.families.hunyuan_avatar.conditions import AvatarConditions, AvatarInputs
from talkingdit.families.hunyuan_avatar.emotion import EmotionAdapter, EmotionEmbedder
from talkingdit.families.hunyuan_avatar.encode import encode, step_input
from talkingdit.families.hunyuan_avatar.hearing import hear
from talkingdit.families.hunyuan_avatar.injection import PatchEmbed, copy_bias, with_channels
from talkingdit.families.hunyuan_avatar.packed import PackedClip, encode_packed
from talkingdit.families.hunyuan_avatar.text_refiner import ScalarEmbedder, TextRefiner, VectorEmbedder
from talkingdit.families.hunyuan_avatar.units import ROOT, UNITS, hears
from talkingdit.nn.context_parallel import ContextParallel, gather
from talkingdit.nn.hooks import like_forward
from talkingdit.nn.layers import Float32Linear, wide
from talkingdit.nn.ranges import scatter_ranges, take_ranges

if TYPE_CHECKING:
    from talkingdit.families.hunyuan_avatar.step_cache import LastBlockCache


class HunyuanAvatarModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The HunyuanVideo-Avatar transformer. Parameter names are those of the released checkpoints.

    Args:
        hidden_size, num_heads, mlp_width_ratio: width, attention heads, inner width of feed-forwards over the width.
        depth_double_blocks, depth_single_blocks: blocks of each kind. Voices are added after every second double block.
        rope_dim_list, rope_theta: channels of a head that turn with time, height and width; base of the frequencies.
        text_states_dim, text_states_dim_2: width of the text features, and of the pooled ones.
        audio_channels, audio_blocks, audio_window: of the features of a voice: width, hidden states of the speech
            encoder, places in time around a video frame.
        audio_intermediate, audio_tokens: inner width of the projection of voices, and its tokens per video frame.
        adapter_dim: channels of the one head that faces hear voices with.
        in_channels, out_channels: latent channels in and out.
        patch_size: latent (frames, rows, columns) per token; only (1, 2, 2) exists.
        freq_dim: sinusoids of the timestep and of other numbers.
        refiner_depth: blocks of the text refiner.
        reference_tokens, reference_channels, reference_projection: how the picture reaches the model (section 3.2); see
            `talkingdit.families.hunyuan_avatar.injection`.
        reference_shift, reference_time: where its tokens stand: shifted by the size of the video (equation 2), when.
        emotion: with the module of section 3.4, which the released model does not have.
        zero_init: begin with no influence of the projected picture, voices and emotions, to train on from a video
            model. A model that is trained from nothing learns to listen sooner without.
        residual_dtype: "float32", or "compute" to keep the residual stream in the dtype of the linear layers.
        attention_backend: see `talkingdit.nn.attention.attention`.
        audio_absorb: "full" folds the projections of the video tokens into the voices, for inference: the same result
            with another rounding, see `talkingdit.families.hunyuan_avatar.audio`.

    Raises:
        ValueError: for settings that contradict each other.
    """

    if TYPE_CHECKING:
        config: Any
        ref_in: PatchEmbed | None
        before_proj: nn.Linear | None

    forward_methods: ClassVar = ("encode_conditions", "denoise_packed")  # for `register_fsdp_forward_method`
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DoubleBlock", "SingleBlock", "FaceAudioAdapter", "EmotionAdapter"]  # type: ignore[assignment]  # noqa: RUF012
    _repeated_blocks = ["DoubleBlock", "SingleBlock"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # type: ignore[assignment]  # noqa: RUF012
        "norm",
        *(unit.pattern for unit in UNITS if not unit.large),
        *ROOT,
    ]

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 3072,
        num_heads: int = 24,
        mlp_width_ratio: float = 4.0,
        depth_double_blocks: int = 20,
        depth_single_blocks: int = 40,
        rope_dim_list: Sequence[int] = (16, 56, 56),
        rope_theta: float = 256.0,
        text_states_dim: int = 4096,
        text_states_dim_2: int = 768,
        audio_channels: int = 384,
        audio_blocks: int = 5,
        audio_window: int = 10,
        audio_intermediate: int = 1024,
        audio_tokens: int = 4,
        adapter_dim: int = 1024,
        in_channels: int = 16,
        out_channels: int = 16,
        patch_size: Sequence[int] = (1, 2, 2),
        freq_dim: int = 256,
        refiner_depth: int = 2,
        reference_tokens: bool = True,
        reference_channels: bool = False,
        reference_projection: bool = True,
        reference_shift: bool = False,
        reference_time: float = -1.0,
        emotion: bool = False,
        zero_init: bool = True,
        residual_dtype: str = "float32",
        attention_backend: str = "auto",
        audio_absorb: str = "full",
    ):
        super().__init__()
        check_config(self.config)
        dim, mlp = hidden_size, int(hidden_size * mlp_width_ratio)
        self.img_in = PatchEmbed(in_channels * (1 + reference_channels), dim)
        self.ref_in = PatchEmbed(in_channels, dim) if reference_projection else None
        self.before_proj = nn.Linear(dim, dim) if reference_projection else None
        self.txt_in = TextRefiner(text_states_dim, dim, num_heads, refiner_depth, freq_dim)
        self.time_in = ScalarEmbedder(dim, freq_dim)
        self.vector_in = VectorEmbedder(text_states_dim_2, dim)
        self.motion_exp = ScalarEmbedder(dim // 4, freq_dim)
        self.motion_pose = ScalarEmbedder(dim // 4, freq_dim)
        self.fps_proj = ScalarEmbedder(dim, freq_dim)
        self.double_blocks = nn.ModuleList([DoubleBlock(dim, num_heads, mlp) for _ in range(depth_double_blocks)])
        self.single_blocks = nn.ModuleList([SingleBlock(dim, num_heads, mlp) for _ in range(depth_single_blocks)])
        self.final_layer = FinalLayer(dim, 4 * out_channels)
        self.audio_proj = AudioProjector(
            audio_channels, audio_blocks, audio_window, audio_intermediate, dim, audio_tokens
        )
        count = sum(hears(i) for i in range(depth_double_blocks))
        self.audio_adapter_blocks = nn.ModuleList([FaceAudioAdapter(dim, adapter_dim) for _ in range(count)])
        self.emotion_in = EmotionEmbedder(in_channels, dim) if emotion else None
        self.emotion_adapter_blocks = (
            nn.ModuleList([EmotionAdapter(dim, num_heads) for _ in range(count)]) if emotion else None
        )
        self.gradient_checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Random weights by the scheme of HunyuanVideo: modulations and output that begin at zero, `zero_init`."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                if isinstance(module, Float32Linear) and name.split(".")[0] != "final_layer":
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                silent = name.startswith("before_proj") or name.endswith("to_out")
                modulates = name.endswith("mod.linear") or ".modulation." in name or "adaLN_modulation" in name
                if modulates or name == "final_layer.linear" or (self.config.zero_init and silent):
                    nn.init.zeros_(module.weight)
        for adapter in self.emotion_adapter_blocks or ():
            cast(EmotionAdapter, adapter).look_at_own_place()
        if self.ref_in is not None:  # the picture's tokenizer begins as the video's
            with torch.no_grad():
                self.ref_in.proj.weight.copy_(self.img_in.proj.weight[:, : self.config.in_channels])
                copy_bias(self.img_in.proj, self.ref_in.proj)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As of diffusers; UserError for a model with adapters, which such a folder has no place for."""
        refuse_adapters(self, save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | AvatarConditions | AvatarInputs,
        text_mask: Tensor | None = None,
        pooled_text: Tensor | None = None,
        *,
        context: ContextParallel | None = None,
        cache: LastBlockCache | None = None,
        **given: Any,
    ) -> Tensor:
        """Velocity of the latents.

        Args:
            latents: [B, in_channels, T, H, W] noisy latents; H and W even.
            timestep: [B] in 0..1000.
            text, text_mask, pooled_text: see `AvatarInputs`. In the place of all inputs, text may be the conditions
                that `encode_conditions` made of them, or `AvatarInputs`.
            context: the processes that share the sequence, each computing a contiguous shard of it. All of them are
                given the same inputs, and get the whole velocity. The gradients of a parameter must be summed over
                them. With conditions it may be left out.
            cache: of this guidance branch: the step is computed and remembered, or only its last block is.
            **given: reference, audio, face_mask, strength, emotion, emotion_index, emotion_strength, motion_exp,
                motion_pose, fps: see `AvatarInputs`.

        Returns:
            [B, out_channels, T, H, W] float32 (float64 for a float64 model).

        Raises:
            TypeError: an input of another name.
            ValueError: for a shape that does not fit; the message names it.
        """
        check_latents(self.config, latents, timestep)
        if isinstance(text, AvatarConditions):
            if given or text_mask is not None or pooled_text is not None:
                raise ValueError("HunyuanAvatarModel: inputs cannot be given beside conditions that were made of them")
            if context is not None and context != text.shard.context:
                raise ValueError("HunyuanAvatarModel: conditions were made for another context, or without one")
            conditions = text
        else:
            inputs = text
            if not isinstance(inputs, AvatarInputs):
                inputs = AvatarInputs(inputs, text_mask, pooled_text, **given)
            size = (latents.shape[2], latents.shape[3], latents.shape[4])
            conditions = encode(self, inputs, size, precompute=False, context=context)
        frames, rows, columns = conditions.grid
        expected = [conditions.batch, frames, 2 * rows, 2 * columns]
        if [latents.shape[0], *latents.shape[2:]] != expected:
            raise ValueError(
                f"HunyuanAvatarModel: conditions were made for latents of [B, T, H, W] = {expected}, "
                f"got {[latents.shape[0], *latents.shape[2:]]}"
            )
        return self._denoise([latents], timestep, conditions, cache)[0]

    @like_forward
    def encode_conditions(
        self, inputs: AvatarInputs, *, precompute: bool = True, context: ContextParallel | None = None
    ) -> AvatarConditions:
        """Everything that does not depend on the timestep, once for all steps of a clip.

        Args:
            inputs: what the clip is made from.
            precompute: also make the keys and values of voices and emotions for every adapter. Leave it out where the
                result is used once, so that activation checkpointing and sharding see those layers. Adapters whose
                weights come and go (FSDP2, group offloading) make them in every step, whatever this says.
            context: as in `forward`, for conditions of this process's shard.

        Raises:
            ValueError: for a shape that does not fit; the message names it.
        """
        return encode(self, inputs, precompute=precompute, context=context)

    @like_forward
    def step_input(self, latents: Tensor, timestep: Tensor, inputs: AvatarInputs) -> Tensor:
        """What the first block is given of a step, modulated: what TeaCache looks at. The picture has no part in it.

        Args:
            latents: [B, in_channels, T, H, W]; H and W even.
            timestep: [B] in 0..1000.
            inputs: those of a step with as many samples; pooled_text, motions and fps count.

        Returns:
            [B, T * H * W / 4, hidden_size].
        """
        return step_input(self, latents, timestep, inputs)

    def denoise_packed(self, clips: Sequence[PackedClip], *, context: ContextParallel | None = None) -> list[Tensor]:
        """Velocities [out_channels, T, H, W] of clips of any sizes, which go through the model as one sequence.

        The result is that of each clip alone, without padding in between. It is meant for training; conditions are made
        for this call alone. Sharding needs every rank to pass some clips.

        Args:
            clips: the samples.
            context: as in `forward`: the sequence of all clips is cut into shards.

        Raises:
            ValueError: for no clip, too many, or one that does not fit; the message names it.
        """
        conditions = encode_packed(self, clips, context)
        timestep = torch.stack([clip.timestep for clip in clips])
        return [velocity[0] for velocity in self._denoise([clip.latents[None] for clip in clips], timestep, conditions)]

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """Arguments of one small forward that goes through every layer, zeros: hooks of offloading learn from it."""
        c = self.config

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(1, *shape)

        picture = zeros(c.in_channels, 1, 4, 4)
        given: dict[str, Any] = {
            "latents": picture,
            "timestep": zeros(),
            "text": zeros(1, c.text_states_dim),
            "pooled_text": zeros(c.text_states_dim_2),
            "reference": picture,
            "audio": zeros(1, c.audio_window, c.audio_blocks, c.audio_channels),
        }
        return given | ({"emotion": picture[:, None]} if c.emotion else {})

    def _denoise(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        conditions: AvatarConditions,
        cache: LastBlockCache | None = None,
    ) -> list[Tensor]:
        """Velocities [B, out_channels, T, H, W] of the clips of a sequence, from their latents.

        Args:
            timestep: [B], or of a packed sequence one per clip.
        """
        shard = conditions.shard
        with torch.autocast(timestep.device.type, enabled=False):
            vec = conditions.vec + self.time_in(timestep.float())
        vec = vec[None] if shard.packed else vec[:, None]
        dtype = self.img_in.proj.weight.dtype
        inputs = BlockInputs(
            layouts=conditions.layouts,
            shard=shard,
            dtype=dtype,
            lengths=conditions.lengths,
            key_mask=conditions.key_mask,
            backend=self.config.attention_backend,
            inplace=True,
        )
        active = F.silu(vec).to(dtype)
        if cache is not None and cache.skips:
            x = cache.take(shard)
        else:
            x = self._through_blocks(latents, timestep, active, inputs, conditions)
            if cache is not None:
                cache.keep(x, shard)
        x = self.run_layer(self.single_blocks[-1], x, active, inputs) if len(self.single_blocks) else x
        image, _ = shard.split(x)
        y = self.final_layer(take_ranges(image, shard.video_ranges), vec, shard.ends("video"), shard.offset("video"))
        return self._velocities(y, conditions)

    def _through_blocks(
        self,
        latents: Sequence[Tensor],
        timestep: Tensor,
        vec: Tensor,
        inputs: BlockInputs,
        conditions: AvatarConditions,
    ) -> Tensor:
        """The residual stream [B, n, dim] in front of the last block."""
        image, text = self._embed(latents, timestep, conditions)
        for i, block in enumerate(self.double_blocks):
            image, text = self.run_layer(block, image, text, vec, inputs)
            if hears(i):
                image = hear(self, i // 2, image, conditions)
        x = inputs.shard.join(image, text)
        del image, text
        for block in self.single_blocks[:-1]:
            x = self.run_layer(block, x, vec, inputs)
        return x

    def _embed(
        self, latents: Sequence[Tensor], timestep: Tensor, conditions: AvatarConditions
    ) -> tuple[Tensor, Tensor]:
        """The residual streams of image and text tokens in front of the first block, those of this process."""
        shard, dtype = conditions.shard, self.img_in.proj.weight.dtype
        parts = []
        clips = zip(
            latents, shard.video, conditions.reference, conditions.added, conditions.channels, strict=True
        )  # fmt: skip
        for x, tokens, reference, added, channels in clips:
            video = self.img_in(with_channels(self.config, x, channels), tokens)
            parts += [reference, video if added is None else video + added]
        text = self.txt_in(conditions.text, timestep, conditions.text_mask)
        if shard.packed:
            text = torch.cat([text[i : i + 1, first:last] for i, (first, last) in enumerate(shard.text)], dim=1)
        else:
            text = text[:, slice(*shard.text[0])]
        stream = wide(dtype) if self.config.residual_dtype == "float32" else dtype
        # Blocks write over what they are given, which must not be the conditions'.
        return torch.cat([part.to(stream) for part in parts], dim=1), text.to(stream).contiguous()

    def _velocities(self, y: Tensor, conditions: AvatarConditions) -> list[Tensor]:
        """Patches of the video tokens here [B, n, 4 * out_channels] -> latents of every clip."""
        shard = conditions.shard
        if shard.context is not None:
            image_like = scatter_ranges(y, shard.video_ranges, sum(n for image, n in shard.runs if image))
            whole = shard.join(
                image_like, y.new_zeros(y.shape[0], sum(n for image, n in shard.runs if not image), y.shape[2])
            )
            y = gather(whole, shard.context, shard.tokens)
            begins = [clip.begin + clip.reference for clip in shard.clips]
        else:
            begins = list(itertools.accumulate((clip.video for clip in shard.clips), initial=0))
        return [
            self._unpatchify(y[:, begin : begin + clip.video], clip.grid)
            for begin, clip in zip(begins, shard.clips, strict=False)
        ]

    def _unpatchify(self, y: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches [B, T*h*w, out_channels * 4] -> latents [B, out_channels, T, H, W]."""
        frames, rows, columns = grid
        y = y.reshape(y.shape[0], frames, rows, columns, self.config.out_channels, 2, 2)
        return y.permute(0, 4, 1, 2, 5, 3, 6).reshape(
            y.shape[0], self.config.out_channels, frames, 2 * rows, 2 * columns
        )

    def run_layer(self, module: nn.Module, *arguments: Any) -> Any:
        """A layer's result, through the checkpointing of activations where it is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            assert self._gradient_checkpointing_func is not None  # enable_gradient_checkpointing sets it
            return self._gradient_checkpointing_func(module, *arguments)
        return module(*arguments)
