# SPDX-License-Identifier: Apache-2.0
"""What a family of models gives. Everything that is not of a family asks for it here and imports none.

A family is a folder, and its files have the same names in every family. A file is loaded when it is first asked for, so
naming families, reading options and checking arguments need neither torch nor diffusers. Protocols say what
the files hold, below or where it is used (plan/cost.py, data/encoding.py, nn/units.py, training.py here); a module that
has the names fulfils its protocol. A family in one file, as a test or another package may have it, holds them all.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from talkingdit.errors import UserError
from talkingdit.families.flag import GenerationOptions

if TYPE_CHECKING:
    import torch

    from talkingdit.data.encoding import Clips
    from talkingdit.distributed.layout import Parallel
    from talkingdit.families.training import Train
    from talkingdit.nn.units import Units
    from talkingdit.pipelines.inputs import Inputs, Outline
    from talkingdit.pipelines.long_video import ClipPipeline
    from talkingdit.pipelines.write import PreviewCurves
    from talkingdit.plan.cost import Cost


class Presets(Protocol):
    """presets.py"""

    PRESETS: dict[str, dict[str, Any]]  # arguments of the transformer, by name


class Options(Protocol):
    """options.py: imports neither torch nor diffusers."""

    Options: type[GenerationOptions]


class Checkpoint(Protocol):
    """checkpoint.py: folders with everything that generation needs.

    A family of small models may have a function load_bare as well, called as `load_checkpoint`: networks that compute
    the same and can do nothing else, without importing diffusers.
    """

    def owns(self, folder: Path) -> bool:
        """Is this folder a checkpoint of the family? By names of files and config.json alone."""

    def read_settings(self, folder: Path) -> Any:
        """How the checkpoint is used (pipeline.json, or what the family has built in)."""

    def load_checkpoint(self, folder: Path, dtype: torch.dtype, device: torch.device | str) -> Any:
        """All models, with `transformer`, `vae`, `settings` and `folder`; UserError for what is missing."""


class Load(Protocol):
    """load.py: transformers alone."""

    def load(
        self,
        source: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
        **options: Any,
    ) -> Any:
        """A transformer from a folder, a file, or with random weights from a preset."""

    def loads(self, source: Path) -> bool:
        """Is this a folder or file with a transformer of the family? No tensor is read."""

    def read_config(self, source: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Arguments of the transformer that `load` would load from there; no tensor is read."""

    def empty(self, source: str | Path) -> Any:
        """The transformer that `load` would load from there, without memory (on meta)."""


class OutlinePart(Protocol):
    """outline.py: what is known of a video without any model; imports no diffusers."""

    def outline(self, inputs: Inputs, settings: Any, options: Any) -> Outline:
        """What video will be made; UserError for what is impossible."""


class Pipeline(Protocol):
    """pipeline.py: see `talkingdit.pipelines.job` for the road that a video takes."""

    def open_pipeline(self, checkpoint: Any, parallel: Parallel | None = None) -> ClipPipeline:
        """What makes the clips of videos with a checkpoint."""


class Preview(Protocol):
    """preview.py, where a family has one: what its preview shows besides frames and sound."""

    Curves: type[PreviewCurves]


P = TypeVar("P")


class FamilyFile(Generic[P]):
    """A file of a family, loaded when it is first asked for."""

    def __set_name__(self, owner: type[Family], name: str) -> None:
        self.name = name

    def __get__(self, family: Family, owner: type[Family]) -> P:
        return cast(P, family.part(self.name))


@dataclass(frozen=True)
class Family:
    """A family by its folder.

    Args:
        name: of the family, as `--family` and configurations say it.
        title: what messages call its models.
        package: of its modules, "talkingdit.families.<name>"; or one module that holds all.
        base: name of the family whose files it uses where it has none of its own.
        sources: kinds of training data that are its own, see `Train.open_source`.
    """

    name: str
    title: str
    package: str
    base: str = ""
    sources: tuple[str, ...] = ()

    def part(self, name: str) -> Any:
        """One of its files.

        Raises:
            UserError: neither the family nor its base has it.
        """
        home = importlib.import_module(self.package)
        if not hasattr(home, "__path__"):
            return home
        if importlib.util.find_spec(f"{self.package}.{name}") is not None:
            return importlib.import_module(f"{self.package}.{name}")
        if self.base:
            from talkingdit import families

            return families.get(self.base).part(name)
        raise UserError(f"{self.title}: there is no {name} for this family.")

    checkpoint, load, outline, pipeline = (
        FamilyFile[Checkpoint](),
        FamilyFile[Load](),
        FamilyFile[OutlinePart](),
        FamilyFile[Pipeline](),
    )
    units, cost = cast("FamilyFile[Units]", FamilyFile()), cast("FamilyFile[Cost]", FamilyFile())
    clips, train = cast("FamilyFile[Clips]", FamilyFile()), cast("FamilyFile[Train]", FamilyFile())

    @property
    def presets(self) -> Mapping[str, dict[str, Any]]:
        return cast(Presets, self.part("presets")).PRESETS

    @property
    def options(self) -> type[GenerationOptions]:
        return cast(Options, self.part("options")).Options

    @property
    def preview(self) -> Preview | None:
        """None where the family has none."""
        home = importlib.import_module(self.package)
        own = hasattr(home, "__path__") and importlib.util.find_spec(f"{self.package}.preview") is not None
        return cast(Preview, self.part("preview")) if own else None
