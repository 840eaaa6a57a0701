# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a pipeline, spelled as in diffusers. The work is done by `talkingdit.checkpoints.lora`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from talkingdit.checkpoints.lora_choice import digest_of, told_apart
from talkingdit.errors import UserError

if TYPE_CHECKING:
    from talkingdit.checkpoints.lora import LoraReport, Loras


class LoraMixin:
    """LoRAs on the transformer of a pipeline. Files of every trainer are read, see docs/lora.md."""

    _checkpoint: Any
    _loras: Loras | None = None
    _digests: dict[str, str]  # of files by name of the adapter
    _weights: dict[str, float]  # of adapters, whether they are active or not
    _active: tuple[str, ...] = ()
    _lora_scale = 1.0

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | PathLike[str] | Mapping[str, Any],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        partial: bool = False,
        **unsupported: Any,
    ) -> LoraReport:
        """Put a LoRA on the transformer, beside its weights, and make it active at strength 1.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder with one, or tensors by name.
            adapter_name: for later calls; default: "default_0", "default_1", ...
            weight_name: of the file in a folder.
            partial: leave out what fits nothing in the model, instead of refusing the file.

        Returns:
            What it has changed.

        Raises:
            UserError: not such a file, or one that does not fit the model; the name is taken.
        """
        if unsupported:
            raise UserError(f"load_lora_weights: {next(iter(unsupported))!r} is unknown here.")
        source = pretrained_model_name_or_path_or_dict
        name = adapter_name if adapter_name is not None else f"default_{len(self._known())}"
        if isinstance(source, Mapping):
            with tempfile.TemporaryDirectory(prefix="talkingdit-") as folder:
                return self._load_lora(_saved(source, Path(folder)), name, partial)
        if not isinstance(source, str | PathLike):
            raise UserError(
                f"load_lora_weights: expected a file, a folder or tensors by name, got {type(source).__name__}."
            )
        path = Path(source).expanduser()
        return self._load_lora(path if weight_name is None else path / weight_name, name, partial)

    def set_adapters(
        self, adapter_names: Sequence[str] | str, adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Make these LoRAs the active ones; others stay loaded and do nothing.

        Args:
            adapter_names: one or several.
            adapter_weights: their strengths, or one for all; None is 1.

        Raises:
            UserError: there is no LoRA of a name, or as many names as strengths are not given.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if adapter_weights is None or isinstance(adapter_weights, int | float):
            weights: list[Any] = [adapter_weights] * len(names)
        else:
            weights = list(adapter_weights)
        if len(weights) != len(names):
            raise UserError(f"set_adapters: expected {len(names)} weights for {len(names)} names, got {len(weights)}.")
        for name, weight in zip(names, weights, strict=True):
            self._check_name(name)
            if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float)):
                raise UserError(f"set_adapters: the weight of {name!r} must be a number, got {type(weight).__name__}.")
        for name, weight in zip(names, weights, strict=True):
            self._weights[name] = 1.0 if weight is None else float(weight)
        self._activate(names)

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that do something."""
        return list(self._active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all LoRAs by the model that they are on."""
        return {"transformer": list(self._known())} if self._known() else {}

    def disable_lora(self) -> None:
        """Make all LoRAs do nothing."""
        self._activate([])

    def enable_lora(self) -> None:
        """Make all LoRAs active, at the strengths that they had."""
        self._activate(list(self._known()))

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Take LoRAs off the model.

        Raises:
            UserError: there is no LoRA of a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_name(name)
        for name in names:
            assert self._loras is not None
            self._loras.unload(name)
            del self._digests[name], self._weights[name]
        self._active = tuple(name for name in self._active if name not in names)

    def fuse_lora(
        self,
        components: Sequence[str] = ("transformer",),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add active LoRAs to the weights, which is faster to run; the weights are copied, for `unfuse_lora`.

        Args:
            components: the transformer is the only one that has LoRAs.
            lora_scale: factor of all strengths.
            safe_fusing: check what comes out for NaN and infinity.
            adapter_names: LoRAs to fuse; None: those that are active.

        Raises:
            UserError: there is none, its weights are kept in eight bits, or what comes out is not finite.
        """
        if list(components) != ["transformer"]:
            raise UserError(f"fuse_lora: expected the component 'transformer' alone, got {list(components)}.")
        names = list(self._active if adapter_names is None else adapter_names)
        for name in names:
            self._check_name(name)
        if self._loras is None or not names:
            raise UserError("fuse_lora: expected LoRAs that are active, got none.")
        self._lora_scale = float(lora_scale)
        self._activate(names)
        self._loras.merge()
        if safe_fusing and not all(p.isfinite().all() for p in self._checkpoint.transformer.parameters()):
            self.unfuse_lora()
            raise UserError("fuse_lora: the fused weights are not finite; the LoRAs are beside the weights again.")

    def unfuse_lora(self, components: Sequence[str] = ("transformer",)) -> None:
        """Put LoRAs beside the weights again, which are then bit for bit what they were."""
        if self._loras is not None:
            self._loras.unmerge()
            self._lora_scale = 1.0
            self._activate(list(self._active))

    def unload_lora_weights(self) -> None:
        """Take all LoRAs off; the weights are then bit for bit what they were."""
        if self._loras is not None:
            self._loras.unmerge()
            self._loras.unload()
        self._loras, self._active, self._lora_scale = None, (), 1.0
        self._digests, self._weights = {}, {}

    # ---- Within ------------------------------------------------------------------------------------------------------

    def _load_lora(self, path: Path, name: str, partial: bool) -> LoraReport:
        from talkingdit.checkpoints.lora import Loras

        if self._loras is None:
            self._digests, self._weights = {}, {}
        loras = self._loras or Loras(self._checkpoint.transformer)
        try:
            report = loras.load(path, name, partial=partial)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"load_lora_weights: {str(error).removeprefix('Loras: ')}.") from error
        self._loras = loras
        self._digests[name] = f"{digest_of(path)}{' partial' * partial}"
        self._weights[name] = 1.0
        self._activate([*self._active, name])
        return report

    def _activate(self, names: Sequence[str]) -> None:
        self._active = tuple(name for name in self._known() if name in names)
        for name in self._known():
            assert self._loras is not None
            self._loras.set_strength(name, self._lora_scale * self._weights[name] if name in self._active else 0.0)

    def _known(self) -> tuple[str, ...]:
        return () if self._loras is None else tuple(self._loras.strengths)

    def _check_name(self, name: str) -> None:
        if name not in self._known():
            known = ", ".join(self._known()) or "none, as none is loaded"
            raise UserError(f"adapter: expected one of {known}, got {name!r}.")

    def _adapters(self) -> list[str]:
        """What videos depend on, see `told_apart`."""
        if self._loras is None:
            return []
        found = self._loras.strengths
        beside = not self._loras.merged
        return [told_apart(found[name], self._digests[name], beside=beside) for name in self._active]


def _saved(tensors: Mapping[str, Any], folder: Path) -> Path:
    from safetensors.torch import save_file

    path = folder / "lora.safetensors"
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"load_lora_weights: expected tensors by name ({error}).") from error
    return path
