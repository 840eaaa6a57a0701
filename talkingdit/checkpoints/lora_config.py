# SPDX-License-Identifier: Apache-2.0
"""What a PEFT configuration says of the scale of a LoRA file that holds no alpha: adapter_config.json, or metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from talkingdit.checkpoints.names import to_diffusers
from talkingdit.checkpoints.weights import Weights, read_json
from talkingdit.errors import UserError

NAME = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin")
METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration in the file itself
KINDS = ("LORA", "LOHA", "LOKR")
# Ways to begin that change the base weights, which the file does not hold.
CHANGED_BASE = re.compile(r"pissa|olora|corda|loftq", re.IGNORECASE)
LARGEST = 1_000_000  # alpha or rank
# Patterns may come from anyone, and repeated repetitions take forever.
ENDLESS, REPEATED, MOST_REPEATED = re.compile(r"\)[*+{]"), re.compile(r"(?<![\\(])[*+{?]"), 4


@dataclass(frozen=True)
class PeftConfig:
    """Ranks and alphas as PEFT says them; empty where a file has no configuration.

    Args:
        source: what messages call it.
        values: of the configuration.
    """

    source: object = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def scale(self, module: str, rank: int) -> float:
        """The factor of a module's matrices: alpha / rank, or alpha / sqrt(rank) for rsLoRA; 1 where nothing is said.

        Args:
            module: native name.
            rank: of its matrices.

        Raises:
            UserError: the configuration is for another rank, so for another file.
        """
        said = self._of(module, "rank_pattern", "r")
        if said is not None and said != rank:
            raise UserError(
                f"{self.source}: is for rank {said} of {module}, and the file has rank {rank}; it belongs to another "
                "file and must not lie beside this one."
            )
        alpha = self._of(module, "alpha_pattern", "lora_alpha")
        if alpha is None:
            alpha = self.values.get("alpha")  # LoHa and LoKr
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    @property
    def rank(self) -> int | None:
        """Of all modules without one of their own."""
        return self.values.get("r")

    def _of(self, module: str, patterns: str, default: str) -> Any:
        """As PEFT chooses: a pattern is the end of a module's name, or a regular expression for it."""
        names = (module, to_diffusers(module))
        for pattern, value in (self.values.get(patterns) or {}).items():
            if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names):
                return value
        return self.values.get(default)


def weights_of(path: Path) -> Path:
    """The file of weights in a folder of PEFT or diffusers; the folder itself where it has none of their names."""
    if path.is_dir():
        return next((path / name for name in WEIGHTS if (path / name).is_file()), path)
    return path


def read_config(path: Path, weights: Weights) -> PeftConfig:
    """The configuration of a LoRA: in the file's metadata, in its folder, or beside the file.

    Args:
        path: of the file or folder.
        weights: of it, opened.

    Raises:
        UserError: it is not readable, or of an adapter that is no sum of matrices.
    """
    config = PeftConfig()
    beside = (path if path.is_dir() else path.parent) / NAME
    if (text := weights.metadata.get(METADATA)) is not None:
        config = PeftConfig(f"{path}, its metadata", _in_metadata(path, text))
    elif beside.is_file():
        config = PeftConfig(beside, read_json(beside))
    _check(config)
    return config


def _in_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        return {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its adapter configuration is not readable ({error}).") from error


def _check(config: PeftConfig) -> None:
    values = config.values
    kind = str(values.get("peft_type") or "LORA").upper()
    if kind not in KINDS:
        raise UserError(f"{config.source}: an adapter of kind {kind}, only {', '.join(KINDS)} are supported.")
    if values.get("use_dora"):
        raise UserError(f"{config.source}: a DoRA adapter, which is not supported.")
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and CHANGED_BASE.match(begun):
        raise UserError(
            f"{config.source}: the adapter was begun with {begun}, which changes the base weights; save it again with "
            "PEFT's path_initial_model_for_weight_conversion."
        )
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(name) or {}
        if not isinstance(patterns, dict) or not all(_is_pattern(key) for key in patterns):
            raise UserError(f"{config.source}: {name} must map names of modules to numbers.")
        for key, value in patterns.items():
            if not _is_number(value):
                raise UserError(f"{config.source}: {name} must map names of modules to numbers, got {value!r:.80}.")
            if ENDLESS.search(key) or len(REPEATED.findall(key)) > MOST_REPEATED:
                raise UserError(f"{config.source}: {name} has a pattern that takes too long to search ({key!r:.80}).")
    for name in ("r", "lora_alpha", "alpha"):
        value = values.get(name)
        if value is not None and not _is_number(value):
            raise UserError(f"{config.source}: {name} must be a positive number, got {value!r:.80}.")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
