# SPDX-License-Identifier: Apache-2.0
"""Weights that a user gives: named by their file, or as everybody names them, and versioned by their bytes."""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

from talkingdit.errors import UserError
from talkingdit.media.checks import digest_of

# Files whose digests everybody knows: SHA-256, or its beginning where the file's publisher names it so.
STANDARD = {
    "1a9a5a14": "inception-v3-tf",  # torchvision: inception_v3_google-1a9a5a14.pth
    "0cc3c7bd": "inception-v3",  # torchvision: inception_v3_google-0cc3c7bd.pth
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "clip-vit-l-14",  # OpenAI: ViT-L-14.pt
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "clip-vit-b-32",  # OpenAI: ViT-B-32.pt
    # The two files in the repository of Light-ASD.
    "efc375833887eefa9d209dc92810e18519b04c3c73ea35a549f2a7f40b7d94d5": "light-asd-talkset",
    "d44bc3ea7baa8e0946fa3921311714a630ed8b90a1928fab0dbe30d918909317": "light-asd-ava",
}
LONGEST = 160  # letters of what a library says
NAMED_DIGEST = re.compile(r"-([0-9a-f]{8})\.[a-z]+$")  # torch.hub's rule for names of files


@dataclass(frozen=True)
class GivenModel:
    """Which weights they are.

    Attributes:
        name: the standard one where the bytes are known, else of the file or folder with the beginning of its digest.
        version: changes with the bytes.
    """

    name: str
    version: str


def identify(path: Path, where: str, wanted: str) -> GivenModel:
    """Name and version of a file or folder.

    Args:
        path: what the user gives.
        where: and under which name, for messages.
        wanted: the line that says what to give, for messages.

    Raises:
        UserError: there is no such thing, or its name holds a digest that its bytes do not have.
    """
    if not path.exists():
        raise UserError(f"{where}: there is no such file or folder; {wanted}.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise UserError(f"{where}: the folder is empty; {wanted}.")
    if path.is_file():
        digest = digest_of(path)
    else:
        digest = hashlib.sha256("".join(digest_of(file) + file.name for file in files).encode()).hexdigest()
    named = NAMED_DIGEST.search(path.name)
    if path.is_file() and named and not digest.startswith(named[1]):
        raise UserError(
            f"{where}: the file's name says that its SHA-256 begins with {named[1]}, but it begins with {digest[:8]}: "
            "it was damaged or renamed."
        )
    known = STANDARD.get(digest) or STANDARD.get(digest[:8] if named else "")
    return GivenModel(known or f"{path.stem or path.name}-{digest[:8]}", digest[:16])


def why(error: BaseException) -> str:
    """Why `torch.load` or `load_state_dict` refuses a file, in a few words."""
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "a file that holds no weights"
    told = " ".join((str(error).strip() or type(error).__name__).split())
    return told if len(told) <= LONGEST else told[:LONGEST] + " ..."
