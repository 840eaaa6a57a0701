# SPDX-License-Identifier: Apache-2.0
"""What may be said about a video of a Gloria checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from talkingdit.families.flag import INTERVAL, Flag
from talkingdit.families.gloria.anchors import AnchorFile, read_anchor
from talkingdit.families.wan_i2v.options import WanI2VOptions


@dataclass(frozen=True, kw_only=True)
class Options(WanI2VOptions):
    """None takes what the checkpoint suggests."""

    anchor: Annotated[tuple[AnchorFile, ...], Flag("TYPE[/KIND]=FILE", read_anchor, many=True)] = ()
    """a frame that shows the character: global=FILE (default: the picture), view/front, view/back, view/left,
    view/right, expression/happy and so on; may be given again"""
    no_global_anchor: bool = False
    """leave the global anchor out; a long video drifts then"""
    audio_guidance: Annotated[float | None, Flag("G")] = None
    """how strongly to follow the voice (default: of the checkpoint, 4.5)"""
    attention_figure: Annotated[Path | None, Flag("PNG")] = None
    """a figure to write: how much the video looks at each anchor, over time"""
    guidance_interval: Annotated[str, INTERVAL] = "0-1"
    """shares of the steps that guidance is taken in, such as 0.2-0.8; the others make one prediction, in less time"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_guidance("audio_guidance")
        if self.attention_figure is not None and self.attention_figure.suffix.lower() != ".png":
            raise ValueError(
                f"generate: attention_figure must be a name that ends in .png, got {str(self.attention_figure)!r}"
            )

    def files(self) -> dict[str, Path]:
        """The anchors, which are read; the figure is written."""
        return {f"anchor {anchor.name}": anchor.path for anchor in self.anchor}
