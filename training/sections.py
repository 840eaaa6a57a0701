# SPDX-License-Identifier: Apache-2.0
"""The sections of a configuration, one dataclass each, with their defaults; and a stage, which has some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

Ramp = float | tuple[float, float]  # a number, or (from, to) for one that changes over a stage in a straight line
Table = Annotated[dict[str, Any], tyro.conf.Suppress]  # free keys; the command line does not offer them


def at(value: Ramp, progress: float) -> float:
    """A ramp where `progress` (0..1) of the stage is done."""
    return value[0] + (value[1] - value[0]) * progress if isinstance(value, tuple) else value


@dataclass
class RunConfig:
    out: Path = Path("runs/puppets")  # checkpoints, logs and the exported model go here
    seed: int = 0
    device: str = "auto"  # "cpu", "cuda", or whichever there is
    threads: int = 2  # of each process, on the CPU
    steps: int = 6000  # of a stage that says neither `steps` nor `minutes`
    minutes: float = 0.0  # wall-clock budget of such a stage, which its schedules then follow; 0: they follow `steps`


@dataclass
class ModelConfig:
    family: str = ""  # of models, by name; empty: the one of the preset
    preset: str = "puppet_tiny"
    settings: Table = field(default_factory=dict)  # changes to the preset
    start: Path | None = None  # weights to begin with, such as a Wan-S2V folder, or a Wan T2V or I2V one; None: random
    frozen: Literal["float32", "bf16", "int8", "fp8"] = "float32"  # how weights that never train are stored
    swap: int = 0  # blocks, the first ones, whose eight-bit weights wait on the host and come when they are used
    text_encoder: str = "prompt"  # "prompt": a small one, trained along; "none": features come with the data
    clip_latents: int = 8  # of a clip of generation and validation
    audio_context: int = 8  # feature frames before the clip that the audio encoder sees


@dataclass
class LoraConfig:
    """PEFT adapters on linear layers; with a rank, stages train these alone unless they say otherwise."""

    rank: int = 0  # 0: no adapters
    alpha: float = 0.0  # 0: the rank
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "o", "ffn.0", "ffn.2"])  # ends of module names
    dropout: float = 0.0


@dataclass
class ParallelConfig:
    replicate: int = 1  # copies of the sharded model (HSDP); 0: what is left
    shard: int = 0  # ranks that share the parameters; 0: what is left
    ulysses: int = 1  # context parallelism by all-to-all over heads
    ring: int = 1  # context parallelism over the sequence
    ring_mode: Literal["gather", "ring"] = "gather"
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16, but fp32 on processors that would be slower in it
    float8: Literal["off", "forward", "rowwise"] = (
        "off"  # products of large layers: of the forward, of inputs' gradients too
    )
    activation_checkpointing: Literal["full", "selective", "off"] = "off"
    inputs: Literal["float32", "bf16", "host", "host_bf16"] = "float32"  # of checkpointed blocks, where they wait
    offload: bool = False  # shards of parameters, gradients and optimiser states on the host
    compile: bool = False
    timeout_seconds: int = 600  # of a collective


@dataclass
class CheckpointConfig:
    every: int = 500  # steps
    keep: int = 3
    asynchronous: bool = True


@dataclass
class SourceConfig:
    """Where clips come from. Keys that are not fields go to `options`, for the source to read."""

    REST: ClassVar[str] = "options"
    kind: str = "puppets"  # of a family, or "manifest", "shards", "precomputed"
    path: Path | None = None
    options: Table = field(default_factory=dict)


@dataclass
class DataConfig:
    sources: dict[str, SourceConfig] = field(default_factory=lambda: {"puppets": SourceConfig()})
    mix: dict[str, Ramp] = field(default_factory=dict)  # share of samples of each source; empty: all alike
    workers: int = 0  # processes that read ahead; 0: none
    prefetch: int = 2  # steps that each of them reads ahead
    # Of the drawn world:
    voices: Path = Path("data/voices")  # made by `python -m training.voices`
    vae: Path = Path("runs/vae/vae")  # made by `python -m training.vae`
    shipped_vae: Path | None = None  # exported in its place: the same encoder, `training.vae_stream`'s decoder
    cache: Path = Path("data/puppets")  # latents and features of the drawn videos, made on first use
    long_videos: int = 240  # 169 frames each: clips deep inside a long video, with a full history
    short_videos: int = 480  # 49 frames each: more characters
    size: int = 96
    fps: int = 16


@dataclass
class BatchConfig:
    count: int = 2  # micro-batches per step, over all ranks together
    mode: Literal["stack", "pack"] = "stack"  # equal shapes stacked, or clips of any shapes in one sequence
    size: int = 6  # samples of a stacked micro-batch
    tokens: int = 0  # most tokens of a clip, and of a packed micro-batch; 0: no limit (stacked only)
    kinds: Literal["any", "single"] = "any"  # single: all samples of a step are of one `Sample.kind`
    kind_shares: dict[str, float] = field(default_factory=dict)  # kind: share within its source; empty: by their number
    frames: list[int] = field(default_factory=list)  # latent frames that clips are cut to; empty: model.clip_latents
    resolutions: list[tuple[int, int]] = field(default_factory=list)  # pixel rows, columns; empty: the data's own
    fit: Literal["resize", "crop"] = "resize"  # what makes a clip with too many tokens smaller


@dataclass
class OptimConfig:
    name: str = "muon"  # "adamw", "adamw8bit", "muon" (matrices of the blocks; AdamW for the rest), "module.Class"
    options: Table = field(default_factory=dict)  # further arguments of "module.Class"
    lr: float = 2e-3
    muon_lr: float = 2e-3  # of Muon's matrices; 0 trains them with AdamW too
    lr_scale: dict[str, float] = field(default_factory=dict)  # name pattern: factor of the learning rate
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay: Literal["matrices", "all"] = "matrices"  # what it works on; without biases, norms, modulation, embeddings
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = 100  # of each stage
    final: float = 0.01  # share of the learning rate where cosine and linear end
    clip_norm: float = 1.0
    spike: float = 0.0  # a gradient norm this many times the recent median skips the step; 0: only what is not finite
    ema: float = 0.998


@dataclass
class JointDrop:
    """Conditions that go together, besides each on its own."""

    conditions: list[Literal["text", "audio", "reference", "history", "pose"]] = field(default_factory=list)
    probability: Ramp = 0.0


@dataclass
class AnchorsConfig:
    """Frames from all over the video (Gloria, section 4.1), drawn from `Sample.outside`; none without `types`."""

    types: dict[str, list[str]] = field(default_factory=dict)  # type: the kinds in `Sample.outside` that belong to it
    always: list[str] = field(default_factory=list)  # types that every sample gets if it has them
    probability: Ramp = 1.0  # that a sample gets one or more of the other types
    single: Ramp = 1.0  # share of those that get one type only, drawn evenly from what the sample has
    most: dict[str, int] = field(default_factory=dict)  # type: most anchors of a sample; 1 to this many are drawn
    weights: dict[str, float] = field(default_factory=dict)  # kind: weight in the draw, to balance rare kinds; or 1
    of: Literal["video", "clip"] = "video"  # where frames may be from: all of the video, or the clip alone (ablation)


@dataclass
class ConditionsConfig:
    drop_text: Ramp = 0.1
    drop_audio: Ramp = 0.12
    drop_reference: Ramp = 0.05
    drop_history: Ramp = 0.1
    drop_pose: Ramp = 0.0
    joint: list[JointDrop] = field(default_factory=list)
    first_clip: Ramp = 0.3  # share of samples that start a video, and so have no history
    audio_past: bool = True  # a clip hears the sound before it; False: its first sound instead, as in Wan-S2V
    history_noise: Ramp = 0.15  # largest standard deviation of noise added to the history, against drift
    prefix: Ramp = 0.0  # share of samples that are given their first latents clean, at timestep 0 and without loss
    prefix_latents: int = 4
    tasks: dict[str, Ramp] = field(default_factory=dict)  # shares of what a sample asks for; empty: "generate" alone
    anchors: AnchorsConfig = field(default_factory=AnchorsConfig)
    empty_text: Path | None = None  # features of the empty prompt (.safetensors), for data with features; None: zeros


@dataclass
class ObjectiveConfig:
    levels: Literal["logit_normal", "uniform", "mode"] = "logit_normal"  # how noise levels are drawn
    mean: float = 0.0  # of the normal in logit_normal
    std: float = 1.0
    mode_scale: float = 1.29  # of mode; Stable Diffusion 3, equation 20
    shift: float = 2.0  # moves them towards noise: sigma' = shift sigma / (1 + (shift - 1) sigma)
    regions: dict[str, Ramp] = field(default_factory=dict)  # weight of latent cells of a region, painted in this order
    background: Ramp = 1.0  # weight of all other cells; the mean over a clip is kept at one
    weighting: Literal["none", "bell", "half_bell", "logit_normal", "cosmap", "sigma_sqrt", "min_snr"] = "none"
    weighting_mean: float = 0.0  # of logit_normal, whose density at the noise level is then the weight of the loss
    weighting_std: float = 1.0
    snr_gamma: float = 5.0  # of min_snr: the most that the ratio of signal to noise counts
    region_share: Ramp = 1.0  # of samples whose loss is weighted by region; the others' is plain
    gate_region: str = ""  # of a gated loss: the region that alone counts where the gate is closed
    gate: Ramp = 0.0  # share of samples for which it is


@dataclass
class SampleConfig:
    """Validation: drawn characters with held-out voices, or for Wan-S2V the cases of a manifest, are generated."""

    every: int = 1000  # steps; 0: never
    steps: int = 8
    text_guidance: float = 1.0
    audio_guidance: float = 2.0
    clips: int = 3  # held-out voices generated at each validation
    seconds: float = 6.0  # of each
    cases: Path | None = None  # for Wan-S2V, .jsonl of image, audio, prompt; every one is generated
    encoders: Path | None = None  # whole Wan-S2V checkpoint, whose other parts than the transformer are used for that
    max_area: int = 448 * 832  # most pixels of their frames


@dataclass
class HeldOutConfig:
    """The loss on clips that are never trained on, with fixed noise, so that runs compare."""

    every: int = 0  # steps; 0: never
    share: float = 0.0  # of the videos of every source, chosen by their names; one or more
    sources: list[str] = field(default_factory=list)  # names of [data.sources] that are held out as a whole
    clips: int = 16  # that are measured, at most
    levels: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])  # of noise, 0..1


@dataclass
class LogConfig:
    every: int = 1  # steps between two reports
    tensorboard: bool = True
    wandb: str = ""  # project; "": no Weights & Biases
    profile_at: int = 0  # first step of a Kineto profile
    profile_steps: int = 0  # 0: no profile
    memory_snapshot: bool = False  # of CUDA memory, beside the profile


@dataclass(frozen=True)
class StageConfig:
    """A stage with everything filled in. Patterns are those of `fnmatch` on parameter names, see `training.stages`."""

    name: str = "train"
    steps: int = 0
    minutes: float = 0.0  # over 0: the stage lasts this long, whatever `steps`
    train: list[str] = field(default_factory=lambda: ["*"])
    freeze: list[str] = field(default_factory=list)  # taken away from `train`
    zero: list[str] = field(default_factory=list)  # set to zero when the stage begins for the first time
    mix: dict[str, Ramp] = field(default_factory=dict)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
