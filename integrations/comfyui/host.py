# SPDX-License-Identifier: Apache-2.0
"""What is asked of ComfyUI: folders, devices, progress, the wish to stop, and its VIDEO. Nothing else imports it.

Its modules are imported where they are used: this one can be read without them.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

FOLDER = "talkingdit"  # below ComfyUI's folder of models, and in extra_model_paths.yaml


def checkpoint_roots() -> list[Path]:
    """Folders that checkpoints lie in."""
    import folder_paths

    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return [Path(path) for path in folder_paths.get_folder_paths(FOLDER)]


def lora_names() -> list[str]:
    """Files of ComfyUI's folder of LoRAs."""
    import folder_paths

    return list(folder_paths.get_filename_list("loras"))


def lora_path(name: str) -> Path:
    """Of one of these files.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    import folder_paths

    return Path(folder_paths.get_full_path_or_raise("loras", name))


def input_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_input_directory())


def output_folder() -> Path:
    import folder_paths

    return Path(folder_paths.get_output_directory())


def scratch_folder() -> Path:
    """ComfyUI's folder for temporary files, which it clears when it starts and stops."""
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch_file(ending: str) -> Path:
    """A new, empty file there."""
    handle, name = tempfile.mkstemp(ending, "talkingdit_", scratch_folder())
    os.close(handle)
    return Path(name)


def device(name: str, small: bool) -> Any:
    """The torch device of a name.

    Args:
        name: "auto", or one of torch.
        small: of models that are quick enough on the host: no GPU is taken where none is asked for.
    """
    import torch
    from comfy import model_management

    if name != "auto":
        return torch.device(name)
    return torch.device("cpu") if small else model_management.get_torch_device()


def make_room(place: Any) -> None:
    """Take the models that ComfyUI holds off a device which is not the host."""
    from comfy import model_management

    if place.type != "cpu":
        model_management.unload_all_models()
        model_management.soft_empty_cache()


def empty_cache() -> None:
    from comfy import model_management

    model_management.soft_empty_cache()


def progress() -> Callable[[int, int], None]:
    """For the number of steps done and of all: moves the bar of the node, and stops where somebody has cancelled.

    What ComfyUI raises then goes through the work that calls this, which ends it.
    """
    from comfy import model_management
    from comfy.utils import ProgressBar

    bar = ProgressBar(1)

    def report(done: int, total: int) -> None:
        model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, max(total, 1))

    return report


def video_of_file(path: Path, owned: bool) -> Any:
    """A VIDEO that reads a file; one that is owned goes with it."""
    from comfy_api.latest import InputImpl

    video = InputImpl.VideoFromFile(str(path))
    if owned:
        weakref.finalize(video, path.unlink, missing_ok=True)
    return video


def outside_inference_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI runs nodes in torch's inference mode. What is loaded there could never again be used outside of it, nor
    changed in place; our models are loaded and run as elsewhere, without gradients."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run
