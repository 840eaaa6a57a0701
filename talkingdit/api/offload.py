# SPDX-License-Identifier: Apache-2.0
"""Where the models of a pipeline wait and compute, spelled as in diffusers.

Groups of layers are moved by diffusers itself, as `Memory` does. What is of a pipeline is that whole models take turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from talkingdit.errors import UserError
from talkingdit.pipelines.tuning import open_device

if TYPE_CHECKING:
    import torch

GUESTS = ("text_encoder", "image_encoder")  # large, and needed before the first clip only
METHODS = ("encode", "features", "forward")  # by which pipelines call them


class OffloadMixin:
    """Offloading of a pipeline's models."""

    _checkpoint: Any
    _variant: str
    _offloaded = ""  # by which method

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Let the large models take turns on a device: while the encoders of words and pictures compute, the
        transformer waits on the host, and they wait there while it does. The autoencoder and the encoder of voices are
        small and stay on the device.

        Args:
            gpu_id: number of the device.
            device: where to compute; default: the accelerator.

        Raises:
            UserError: there is no accelerator and no device was named, the device cannot be used, or models are
                offloaded already.
        """
        place = self._begin("enable_model_cpu_offload", gpu_id, device)
        transformer = self._checkpoint.transformer.to(place)
        for name, part in self._modules():
            if name in GUESTS:
                _visits(part.to("cpu"), place, lambda home: transformer.to("cpu" if home else place))
            else:
                part.to(place)
        self._offloaded = "enable_model_cpu_offload"

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Least memory, most time: every layer of the transformer comes to the device when it computes and goes again;
        the encoders of words and pictures compute on the host.

        Args, Raises: as of `enable_model_cpu_offload`.
        """
        place = self._begin("enable_sequential_cpu_offload", gpu_id, device)
        self._checkpoint.transformer.to("cpu").enable_group_offload(place, offload_type="leaf_level")
        for name, part in self._modules():
            if name != "transformer":
                part.to("cpu" if name in GUESTS else place)
        self._offloaded = "enable_sequential_cpu_offload"

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = "cpu",
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | None = None,
        exclude_modules: str | Sequence[str] | None = None,
    ) -> None:
        """Let groups of the transformer's layers come to a device when they compute. The encoders of words and pictures
        come as a whole, the small models stay there.

        Args:
            onload_device: where to compute.
            exclude_modules: names of `components` that stay on the device.
            others: of diffusers' `ModelMixin.enable_group_offload`; one block is a group where nothing is said.

        Raises:
            UserError: models are offloaded already, a device cannot be used, there is no such component, or diffusers
                refuses.
        """
        stays = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        if unknown := sorted(set(stays) - set(vars(self._checkpoint))):
            raise UserError(f"enable_group_offload: exclude_modules: there is no component {unknown[0]!r}.")
        home = open_device(offload_device, "enable_group_offload")
        place = self._begin("enable_group_offload", None, onload_device)
        blocks = offload_type == "block_level" and num_blocks_per_group is None
        try:
            if "transformer" not in stays:
                self._checkpoint.transformer.enable_group_offload(
                    place,
                    home,
                    offload_type,
                    1 if blocks else num_blocks_per_group,
                    non_blocking,
                    use_stream,
                    record_stream,
                    low_cpu_mem_usage,
                    offload_to_disk_path,
                )
        except ValueError as error:
            raise UserError(f"enable_group_offload: {str(error).rstrip('.')}.") from error
        for name, part in self._modules():
            if name in GUESTS and name not in stays:
                _visits(part.to("cpu"), place)
            elif name != "transformer" or name in stays:
                part.to(place)
        self._offloaded = "enable_group_offload"

    def enable_vae_tiling(self) -> None:
        """Let the autoencoder work in tiles that overlap: less memory, other frames at their seams.

        Raises:
            UserError: it has none.
        """
        self._vae_switch("enable_tiling", "tiles")
        self._variant = self._variant if "tiled" in self._variant.split() else f"{self._variant} tiled".strip()

    def disable_vae_tiling(self) -> None:
        """Let the autoencoder work on whole frames."""
        self._vae_switch("disable_tiling", "tiles")
        self._variant = " ".join(word for word in self._variant.split() if word != "tiled")

    def enable_vae_slicing(self) -> None:
        """Nothing changes: videos are decoded one by one and part by part already.

        Raises:
            UserError: the autoencoder has no slices.
        """
        self._vae_switch("enable_slicing", "slices")

    def disable_vae_slicing(self) -> None:
        """See `enable_vae_slicing`."""
        self._vae_switch("disable_slicing", "slices")

    # ---- Within ------------------------------------------------------------------------------------------------------

    def _modules(self) -> list[tuple[str, Any]]:
        from torch import nn

        return [(name, part) for name, part in vars(self._checkpoint).items() if isinstance(part, nn.Module)]

    def _begin(self, how: str, gpu_id: int | None, device: torch.device | str | None) -> torch.device:
        """The device to compute on."""
        import torch

        self._check_still(how)
        if device is None and not torch.accelerator.is_available():
            raise UserError(f"{how}: expected an accelerator or a device, got neither.")
        accelerator = torch.accelerator.current_accelerator() if device is None else None
        place = open_device(device if device is not None else accelerator or "cpu", how)
        if gpu_id is not None:
            if place.index not in (None, gpu_id):
                raise UserError(f"{how}: expected one number of a device, got {gpu_id} and {place}.")
            place = torch.device(place.type, gpu_id)
        return open_device(place, how)  # before anything is moved

    def _check_still(self, how: str) -> None:
        """Raises: UserError: something moves or narrows the models already."""
        hooked = any(hasattr(module, "_diffusers_hook") for module in self._checkpoint.transformer.modules())
        if self._offloaded or hooked:
            by = self._offloaded or "memory="
            raise UserError(f"{how}: expected models that nothing moves, got some that {by} has offloaded.")

    def _vae_switch(self, method: str, what: str) -> None:
        switch = getattr(self._checkpoint.vae, method, None)
        if switch is None:
            raise UserError(f"{method}: {type(self._checkpoint.vae).__name__} has no {what}.")
        switch()


def _visits(guest: Any, place: torch.device, host: Callable[[bool], object] = lambda home: None) -> None:
    """Let a model come to a device when one of its methods is called from outside, and go home after it.

    Args:
        guest: the model, on the host.
        place: the device.
        host: called with True before it comes and with False after it has gone: whether another model must go home.
    """
    inside = False

    def visit(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return method(*args, **kwargs)
            inside = True
            try:
                host(True)
                guest.to(place)
                return method(*args, **kwargs)
            finally:
                inside = False
                guest.to("cpu")
                host(False)

        return run

    for name in METHODS:
        if callable(getattr(guest, name, None)):
            setattr(guest, name, visit(getattr(guest, name)))
