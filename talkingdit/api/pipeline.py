# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of any family as a pipeline: load it, call it, get a video."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from talkingdit import families
from talkingdit.api.asking import CheckedCall, PipelineCall, ask, refuse_loading
from talkingdit.api.loras import LoraMixin
from talkingdit.api.offload import OffloadMixin
from talkingdit.api.output import TalkingOutput
from talkingdit.api.source import find_folder
from talkingdit.api.spans import FrameSpan
from talkingdit.api.steps import Callback, StepWatch
from talkingdit.api.video import Loaded, collected, streamed, written
from talkingdit.errors import UserError
from talkingdit.families import Family, GenerationOptions
from talkingdit.models import load_checkpoint
from talkingdit.pipelines.tuning import Tuning, check_dtype, load_tuned, open_device

if TYPE_CHECKING:
    import torch

    from talkingdit.pipelines.job import Talk

Progress = Callable[[int, int], None]
Warn = Callable[[str], None]


class TalkingPipeline(LoraMixin, OffloadMixin):
    """A checkpoint that makes talking videos. Made by `from_pretrained`.

        pipe = talkingdit.TalkingPipeline.from_pretrained()
        pipe(image="face.png", audio="voice.wav", prompt="a person talking, happy").save("out.mp4")

    Args:
        checkpoint: from `talkingdit.models.load_checkpoint`.
        variant: how the models were changed after loading; an unfinished video of another one is not gone on from.

    Attributes:
        family: of the checkpoint.
        folder: of the checkpoint.
    """

    _callback_tensor_inputs: Sequence[str] = ("latents",)

    def __init__(self, checkpoint: Any, variant: str = "") -> None:
        self.folder = Path(checkpoint.folder)
        self.family: Family = families.of_folder(self.folder)
        self._checkpoint, self._variant = checkpoint, variant
        self._interrupt = False
        self._from_files = False  # by `from_pretrained`

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: str | PathLike[str] | None = None,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        precision: Literal["fp8", "int8"] | None = None,
        attention: str = "auto",
        memory: str = "",
        compile: bool = False,
        **download: Any,
    ) -> TalkingPipeline:
        """Load a checkpoint of any family.

        Args:
            folder_or_name: a folder, or a name on the Hugging Face hub; None is the model that ships with the package.
            torch_dtype: of the large models; None is float32. Small ones stay float32.
            dtype: the same, as newer versions of diffusers call it.
            device: where the models go; None is the host. `to` moves them later.
            precision: let large layers compute in eight bits.
            attention: kernel of attention, one of `talkingdit.nn.attention_backends`; "auto" is the fastest exact one.
            memory: what to trade for memory, in the words of `talkingdit plan`: "offload=block,text_encoder=cpu".
            compile: compile the blocks of the model, where it can.
            download: of `huggingface_hub.snapshot_download`, such as `revision`, `cache_dir` or `token`.

        Raises:
            UserError: no such checkpoint, something in it is missing, the model has no such switch, or the dtype or the
                device cannot be used.
        """
        folder = find_folder(folder_or_name, download)
        family = families.of_folder(folder)
        tuning = Tuning.of(str(memory), precision, attention)
        place = open_device("cpu" if device is None else device, "from_pretrained")
        wanted = torch_dtype if dtype is None else dtype
        if wanted is not None:
            check_dtype(wanted, "from_pretrained")
        checkpoint = load_tuned(lambda place: load_checkpoint(folder, wanted, place), tuning, place, family.units)
        pipe = cls(checkpoint, tuning.variant)
        pipe._from_files = True
        if compile:
            pipe._compile()
        return pipe

    # ---- What it is --------------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The models by name; None where the checkpoint has none of a kind."""
        return {name: part for name, part in vars(self._checkpoint).items() if name not in ("settings", "folder")}

    @property
    def options(self) -> type[GenerationOptions]:
        """The dataclass of what may be said about a video, the keyword arguments of a call."""
        return self.family.options

    @property
    def device(self) -> torch.device:
        """Where the transformer computes."""
        return self._checkpoint.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer."""
        return self._checkpoint.transformer.dtype

    def to(self, *args: Any, **kwargs: Any) -> TalkingPipeline:
        """Move the models to a device, or take them in another dtype, as `torch.nn.Module.to` is told.

        A dtype is that of `from_pretrained`: the files are read again, so that it makes no difference in which dtype
        they were loaded before.

        Raises:
            UserError: another dtype, and the models were changed after loading; they are offloaded; or the device or
                the dtype cannot be used.
        """
        import torch

        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise UserError(f"to: expected a device, a floating-point dtype of torch, or both ({reason}).") from error
        self._check_still("to")
        if device is not None:
            open_device(device, "to")
        if dtype is not None:
            check_dtype(dtype, "to")
        if dtype is not None and dtype != self.dtype:
            self._reload(dtype, self.device if device is None else device)
        elif device is not None:
            for _, part in self._modules():
                part.to(device)
        return self

    def _reload(self, dtype: torch.dtype, device: torch.device | str) -> None:
        if self._variant or self._loras is not None or not self._from_files:
            raise UserError(
                f"to: expected models as from_pretrained loads them, got changed ones; load with torch_dtype={dtype}."
            )
        self._checkpoint = load_checkpoint(self.folder, dtype, device)

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__.get("_checkpoint")
        if parts is not None and name in vars(parts) and name not in ("settings", "folder"):
            return getattr(parts, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}({self.family.name}, {str(self.folder)!r}: {parts})"

    # ---- Videos ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        image: Any = None,
        audio: Any = None,
        prompt: str = "",
        *,
        output: str | PathLike[str] | None = None,
        sheet: str | PathLike[str] | None = None,
        upscale: int = 1,
        live: bool = False,
        resume: bool = False,
        audio_rate: int | None = None,
        progress: Progress | None = None,
        warn: Warn | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> TalkingOutput:
        """Make a video.

        Args:
            image: the portrait: a path, a PIL image, or uint8 [H, W, 3] RGB. May be left out beside a video to dub.
            audio: the voice: a path, or (samples, rate) with float32 [n] or [n, channels]. Left out where speakers
                bring theirs.
            prompt: what to show.
            output: an .mp4 to write. The work is then done as by `talkingdit generate`: finished clips are kept beside
                the file until it is complete, and the same call goes on after them.
            sheet: a .png with a preview to write beside an `output`; see also `TalkingOutput.sheet`.
            upscale: enlarge the frames of the `output` so many times.
            live: let the `output` be watched while it is made.
            resume: refuse to start over where an interrupted call has left clips of other settings beside the `output`,
                instead of throwing them away.
            audio_rate: of raw 16-bit mono sound on standard input (audio "-"), in Hz; None for sound in a container.
            progress: called with the number of denoising steps done and of all of them.
            warn: called with a sentence about what was done differently from what may be expected.
            callback_on_step_end: called as by diffusers after every denoising step, `callback(pipe, step, timestep,
                {"latents": tensor})`; latents [1, C, n, H, W] in the dictionary that it returns take their place. Every
                clip counts its steps anew. Where it sets `pipe._interrupt = True`, the work stops after the step.
            callback_on_step_end_tensor_inputs: which tensors the dictionary holds; "latents" is the one that there is.
            options: of the family, such as `seed`, `steps` or `guidance`: see `options`.

        Returns:
            Frames, sound, and methods that write files of them.

        Raises:
            UserError: a file or an option is not good, memory runs out, or the video cannot be written.
        """
        if output is None and (sheet is not None or upscale != 1 or live or resume):
            raise UserError(
                "generate: sheet, upscale, live and resume go with an output; without one use save() and sheet()."
            )
        wish = PipelineCall(
            image=image,
            audio=audio,
            prompt=prompt,
            output=output,
            sheet=sheet,
            upscale=upscale,
            live=live,
            resume=resume,
            audio_rate=audio_rate,
        )
        talk = self._talk(progress, warn, callback_on_step_end, callback_on_step_end_tensor_inputs)
        asked = self._ask(wish, options)
        if output is None:
            return collected(self._loaded, asked, talk, lambda: self._interrupt)
        return written(self._loaded, asked, talk)

    def stream(
        self,
        image: Any = None,
        audio: Any = None,
        prompt: str = "",
        *,
        audio_rate: int | None = None,
        progress: Progress | None = None,
        warn: Warn | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> Iterator[FrameSpan]:
        """The frames of a video as they become final, down to what the decoder makes at once. Arguments are checked at
        the call; see `__call__`.

        Closing the iterator stops the work; nothing is left on the disk. So does an interruption, behind the last
        finished clip.

        Yields:
            Spans of frames, uint8 [n, H, W, 3], with their place in the video and what is heard meanwhile; together the
            frames of a call. A span is an array where one is expected.

        Raises:
            UserError: as a call.
        """
        talk = self._talk(progress, warn, callback_on_step_end, callback_on_step_end_tensor_inputs)
        asked = self._ask(PipelineCall(image=image, audio=audio, prompt=prompt, audio_rate=audio_rate), options)
        return streamed(self._loaded, asked, talk)

    def interrupt(self) -> None:
        """Stop the video that is being made after the denoising step at hand, from a callback or another thread."""
        self._interrupt = True

    def _ask(self, wish: PipelineCall, options: Mapping[str, Any]) -> CheckedCall:
        """Read what is asked for, and check everything that can be wrong with it."""
        asked = ask(self.family, self.folder, wish, options, self._adapters())
        refuse_loading(asked.options)
        return asked

    def _talk(
        self, progress: Progress | None, warn: Warn | None, callback: Callback | None, tensors: Sequence[str]
    ) -> Talk:
        from talkingdit.pipelines.job import Talk

        for name, listener in (("progress", progress), ("warn", warn)):
            if listener is not None and not callable(listener):
                raise UserError(f"{name}: expected a function, got {type(listener).__name__}.")
        return Talk(progress=progress, warn=warn, step=StepWatch(self, callback, tensors))

    @property
    def _loaded(self) -> Loaded:
        return Loaded(self.family, self._checkpoint, self._variant)

    def _compile(self) -> None:
        compile_blocks = getattr(self._checkpoint.transformer, "compile_repeated_blocks", None)
        if compile_blocks is None:
            raise UserError(f"from_pretrained: {self.family.title} has no blocks to compile.")
        compile_blocks(fullgraph=True)
