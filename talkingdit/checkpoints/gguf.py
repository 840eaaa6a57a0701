# SPDX-License-Identifier: Apache-2.0
"""Weight files of llama.cpp's format, as ComfyUI's users have them: quantised in blocks, read as what they stand for.

The package `gguf` reads the file, diffusers' functions widen the blocks on the device where there are such, and gguf's
own do on the host for the rest. Shapes are stored in reverse. A tensor that its converter flattened carries its true
shape in a field of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from talkingdit.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

SUFFIX = ".gguf"
SHAPE = "comfy.gguf.orig_shape."  # and the name of a tensor: its true shape
PLAIN = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64} | {
    f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)
}


def table(file: Path) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, str]]:
    """Shape and dtype, as `opener` gives them, of every tensor of a file; and its text fields. No tensor is read.

    Raises:
        UserError: gguf is not installed, or the file is damaged.
    """
    reader = _reader(file)
    tensors = {tensor.name: (_shape(reader, tensor, file), _dtype(tensor)) for tensor in reader.tensors}
    architecture = reader.get_field("general.architecture")
    return tensors, {} if architecture is None else {"architecture": str(architecture.contents())}


def opener(file: Path, device: str) -> Callable[[str], Tensor]:
    """A function from the name of a tensor to its values on a device: quantised ones in float32, others as stored.

    Raises:
        UserError: as `table`.
    """
    reader = _reader(file)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return _values(tensor, device).reshape(_shape(reader, tensor, file))

    return read


def _reader(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f"{file}: a GGUF file of quantised weights; reading it needs gguf, which is not installed: "
            "pip install 'talkingdit[gguf]'."
        ) from error
    try:
        return GGUFReader(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; the checkpoint is not complete.") from error
    except Exception as error:  # its reader raises whatever comes of reading on in a damaged file
        reason = " ".join(str(error).split())
        raise UserError(
            f"{file}: damaged or cut off, or no GGUF file ({reason[:160]}); copy or download this file again."
        ) from error


def _shape(reader: GGUFReader, tensor: ReaderTensor, file: Path) -> tuple[int, ...]:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    field = reader.get_field(SHAPE + tensor.name)
    if field is None:
        return shape
    true = tuple(int(size) for size in field.contents())
    if _count(true) != _count(shape):
        raise UserError(f"{file}: {tensor.name} must have {_count(true)} values by its field, got {list(shape)}.")
    return true


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _dtype(tensor: ReaderTensor) -> torch.dtype:
    kind = tensor.tensor_type.name
    return torch.bfloat16 if kind == "BF16" else PLAIN.get(kind, torch.float32)


def _values(tensor: ReaderTensor, device: str) -> Tensor:
    import numpy as np
    from diffusers.quantizers.gguf.utils import dequantize_functions
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    if kind.name in PLAIN:
        return torch.from_numpy(np.array(tensor.data)).to(device)
    if kind.name == "BF16":
        return torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16).to(device)
    widen: Any = dequantize_functions.get(kind)
    if widen is None:
        try:
            return torch.from_numpy(dequantize(tensor.data, kind)).to(device)
        except (NotImplementedError, KeyError) as error:
            raise UserError(f"{tensor.name} is quantised as {kind.name}, which gguf cannot read.") from error
    block, size = GGML_QUANT_SIZES[kind]
    blocks = torch.from_numpy(np.array(tensor.data).view(np.uint8)).to(device).reshape(-1, size)
    widened: Tensor = widen(blocks, block, size, dtype=torch.float32)
    return widened
