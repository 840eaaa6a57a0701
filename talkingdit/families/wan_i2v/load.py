# SPDX-License-Identifier: Apache-2.0
"""Transformers from every kind of file that holds one, for Wan I2V and for families that build on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from talkingdit.checkpoints.fill import build_empty, fill
from talkingdit.checkpoints.folder import check_class
from talkingdit.checkpoints.weights import Weights, open_weights, read_bounded, read_json, stored_config
from talkingdit.errors import UserError
from talkingdit.families.wan_i2v import config as configs
from talkingdit.families.wan_i2v.presets import CLASSES, names_model


def _model() -> Any:
    from talkingdit.families.wan_i2v.model import WanI2VModel

    return WanI2VModel


@dataclass(frozen=True)
class Loader:
    """The functions of a load.py, for a model of one class.

    Args:
        model: gives the class; called when a model is made.
        classes: names of it in config.json.
        complete: see `talkingdit.families.wan_i2v.config.complete`.
        mark: how the name of a weight begins that a single file must hold to be of this family.
        never: how names begin that such a file has none of.
    """

    model: Callable[[], Any]
    classes: tuple[str, ...]
    complete: Callable[[Mapping[str, Any], Weights, object], dict[str, Any]]
    mark: str
    never: str = "casual_audio_encoder."

    def load(
        self,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        *,
        config: Mapping[str, Any] | None = None,
        init_from: str | Path | None = None,
    ) -> Any:
        """A transformer from a checkpoint, or with random weights from a preset.

        Weights go to the device one tensor at a time; host memory holds no second copy of the model.

        Args:
            source: a folder with config.json and *.safetensors (official names, or those of diffusers), one that has
                such a folder as its transformer/, a single .safetensors or .gguf file, or the name of a preset.
            dtype: of the weights; None is float32. Time embedding and modulation stay float32 in any case.
            device: where the model goes.
            seed: of the random weights of a preset; the global generator is left as it was.
            config: settings that go before those of the checkpoint or preset.
            init_from: only with a preset: a Wan T2V or I2V checkpoint to begin from, see `initialise_from_video_model`.

        Returns:
            The model in evaluation mode.

        Raises:
            UserError: no such source, another class, a file that is missing or damaged, or weights that are missing,
                left over or of another shape.
        """
        path, dtype = Path(source), torch.float32 if dtype is None else dtype
        if not path.exists():
            model = self._random(self.read_config(source, config), dtype, torch.device(device), seed)
            if init_from is not None:
                from talkingdit.families.wan_i2v.initialise import initialise_from_video_model

                initialise_from_video_model(model, init_from)
            return model
        if init_from is not None:
            raise UserError(f"{source}: init_from goes with a preset, this is a checkpoint with weights of its own.")
        weights, values = self.open_transformer(path)
        arguments = self.complete({**values, **(config or {})}, weights, weights.source)
        model = build_empty(lambda: self.model()(**arguments), weights.source)
        return fill(model, weights, dtype, device, keep_float32=tuple(model._keep_in_fp32_modules or ()))

    def read_config(self, source: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Arguments of the model that `load` would load from there, without reading or making a tensor.

        Raises:
            UserError: see `load`.
        """
        from talkingdit.families import preset, presets

        path = Path(source)
        if not path.exists():
            if str(source) not in presets():
                raise UserError(f"{source}: neither a folder nor a preset ({', '.join(sorted(presets()))}).")
            return preset(str(source), **(config or {}))
        weights, values = self.open_transformer(path)
        return self.complete({**values, **(config or {})}, weights, weights.source)

    def empty(self, source: str | Path, config: Mapping[str, Any] | None = None) -> Any:
        """The model that `load` would load from there, without memory: its parameters are on meta.

        Raises:
            UserError: see `load`.
        """
        arguments = self.read_config(source, config)
        return build_empty(lambda: self.model()(**arguments), source)

    def loads(self, source: Path) -> bool:
        """Is this a folder or a file with a transformer of this family? Tensors are not read."""
        try:
            if source.is_dir():
                found = [
                    file for file in (source / "config.json", source / "transformer" / "config.json") if file.is_file()
                ]
                return bool(found) and names_model(read_json(found[0]), self.classes)
            shapes = configs.native(open_weights(source)).shapes
            if any(name.startswith(self.never) for name in shapes):
                return False
            return any(name.startswith(self.mark) for name in shapes) and self._wider(shapes)
        except UserError:
            return False

    def open_transformer(self, path: Path) -> tuple[Weights, dict[str, Any]]:
        """Weights of a transformer under native names, and what its configuration says, without reading a tensor.

        Raises:
            UserError: see `load`.
        """
        if path.is_dir():
            if not (path / "config.json").exists() and (path / "transformer").is_dir():
                path = path / "transformer"
            files = [*path.glob("*.safetensors")] or [*path.glob("*.gguf")]
            if not (path / "config.json").exists() and len(files) == 1:
                path = files[0]
        if path.is_dir():
            values = read_bounded(path / "config.json")
            check_class(path, self.classes)
            weights = open_weights(path)
        else:
            weights = open_weights(path)
            values = stored_config(weights)
        return configs.native(weights), values

    def _wider(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Has the patch embedding channels for what is known?"""
        return shapes["patch_embedding.weight"][1] > shapes["head.head.weight"][0] // 4

    def _random(self, arguments: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int) -> Any:
        """Random weights, made on the device in the dtype that they have: a large preset does not fit host memory."""
        default = torch.get_default_dtype()
        on_host = device.type in ("cpu", "meta")
        with torch.random.fork_rng([] if on_host else [device], device_type="cuda" if on_host else device.type):
            torch.manual_seed(seed)
            torch.set_default_dtype(dtype)
            try:
                with device:
                    model = self.model()(**arguments)
            finally:
                torch.set_default_dtype(default)
        keep = tuple(model._keep_in_fp32_modules or ())
        for path, parameter in model.named_parameters():
            if dtype.itemsize < 4 and any(part in keep for part in path.split(".")):
                parameter.data = parameter.data.float()
        return model.eval()


LOADER = Loader(_model, CLASSES, configs.complete, mark="patch_embedding.", never="audio_proj.")
load, read_config, empty, loads = LOADER.load, LOADER.read_config, LOADER.empty, LOADER.loads
