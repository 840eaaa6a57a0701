# SPDX-License-Identifier: Apache-2.0
"""Transformers from every kind of file that holds one: the functions of a load.py, for a model of one class."""

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

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TransformerLoader:
    """What `talkingdit.families.family.Load` asks for.

    Args:
        model: gives the class; called when a model is made.
        classes: names of it in config.json, and of others of which it reads the weights.
        native: gives weights their native names.
        complete: settings that are known and weights -> arguments of the model; `complete(values, weights, source)`.
        has_shapes: are these the weights of such a model, by names and shapes?
        initialise: fills a new model with what fits of a video model's checkpoint.
        says: is this the config.json of such a model? Default: by its class.
        released: the file in a folder of the released layout, if it is one.
    """

    model: Callable[[], Any]
    classes: tuple[str, ...]
    native: Callable[[Weights], Weights]
    complete: Callable[[Mapping[str, Any], Weights, object], dict[str, Any]]
    has_shapes: Callable[[Shapes], bool]
    initialise: Callable[[Any, str | Path], object]
    says: Callable[[Mapping[str, Any]], bool] | None = None
    released: Callable[[Path], Path | None] = lambda folder: None

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

        Weights go to the device one tensor at a time; host memory holds no second copy of the model. No file runs code.

        Args:
            source: one of

                - a folder with config.json and *.safetensors, in one file or sharded with an index, of official names
                  or those of diffusers: what is released, what `save_pretrained` writes; or a folder that has such a
                  folder as its transformer/;
                - a folder of the released layout of the family, or the file in it (.pt, also of 8 bits with its map); a
                  config.json beside it may say what shapes do not tell;
                - a single .safetensors, .gguf or .pt file, also with scaled float8 weights and name prefixes as ComfyUI
                  writes them, or a folder with a .gguf file in the place of the others. Settings are taken from
                  shapes, and where those do not tell, from the released model;
                - the name of a preset for random weights.
            dtype: of the weights; None is float32. What the model keeps in float32 stays so.
            device: where the model goes.
            seed: of the random weights of a preset; the global generator is left as it was.
            config: settings that go before those of the checkpoint or preset.
            init_from: only with a preset: a video model's checkpoint to begin from, see the family's initialise.py.

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
                self.initialise(model, init_from)
            return model
        if init_from is not None:
            raise UserError(f"{source}: init_from goes with a preset, this is a checkpoint with weights of its own.")
        weights, values = self.open_transformer(path)
        arguments = self.complete({**values, **(config or {})}, weights, weights.source)
        model = build_empty(lambda: self.model()(**arguments), weights.source)
        return fill(model, weights, dtype, device, keep_float32=_kept_wide(model), what=self.classes[0])

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
            if not source.is_dir():
                return self.has_shapes(self.native(open_weights(source)).shapes)
            if self.released(source) is not None:
                return True
            files = [file for file in (source / "config.json", source / "transformer/config.json") if file.is_file()]
            values = read_json(files[0]) if files else {}
            return values.get("_class_name") in self.classes if self.says is None else self.says(values)
        except UserError:
            return False

    def open_transformer(self, path: Path) -> tuple[Weights, dict[str, Any]]:
        """Weights of a transformer under native names, and what its configuration says, without reading a tensor.

        Raises:
            UserError: see `load`.
        """
        if path.is_dir():
            path = self._place(path)
        if path.is_dir():
            values = read_bounded(path / "config.json")
            check_class(path, self.classes)
            weights = open_weights(path)
        else:
            weights = open_weights(path)
            values = stored_config(weights)
            beside = path.with_name("config.json")
            if not values and path.suffix == ".pt" and beside.is_file():
                values = read_bounded(beside)
        return self.native(weights), values

    def _place(self, folder: Path) -> Path:
        """The file, or the folder with config.json, that holds the transformer of a folder."""
        released = self.released(folder)
        if released is not None:
            return released
        if not (folder / "config.json").exists() and (folder / "transformer").is_dir():
            folder = folder / "transformer"
        files = [*folder.glob("*.safetensors")] or [*folder.glob("*.gguf")]
        return files[0] if not (folder / "config.json").exists() and len(files) == 1 else folder

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
        keep = _kept_wide(model)
        for path, parameter in model.named_parameters():
            if dtype.itemsize < 4 and any(part in keep for part in path.split(".")):
                parameter.data = parameter.data.float()
        return model.eval()


def _kept_wide(model: Any) -> tuple[str, ...]:
    """Parts of a model's names whose parameters are never narrower than float32."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
