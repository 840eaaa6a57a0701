# SPDX-License-Identifier: Apache-2.0
"""talkingdit's nodes for ComfyUI. This folder goes into `custom_nodes`; ComfyUI reads the two dictionaries below."""

try:
    import talkingdit  # noqa: F401
except ImportError as error:
    raise ImportError(
        "The talkingdit nodes need the package talkingdit in the Python of ComfyUI, and it is not there "
        f"({error}); install it with `python -m pip install talkingdit`."
    ) from error

from .nodes import CLASSES, TITLES

NODE_CLASS_MAPPINGS = CLASSES
NODE_DISPLAY_NAME_MAPPINGS = TITLES

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
