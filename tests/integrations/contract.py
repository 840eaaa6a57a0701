# SPDX-License-Identifier: Apache-2.0
"""A small stand-in for ComfyUI, written from its documented contract: what nodes see of it, and how it runs a workflow.

Nodes are classes with INPUT_TYPES, RETURN_TYPES and FUNCTION; a prompt is {id: {"class_type", "inputs"}}, an input is a
value or a link [id, number of an output]. Values are checked against INPUT_TYPES before anything runs. A node runs in
torch's inference mode, and again only where its class, its values, what its IS_CHANGED says, or any of this of a node
before it is another one. IS_CHANGED is told values only: None stands for what comes along a link.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image

from talkingdit.media.reader import all_pictures
from talkingdit.puppets.scenes import portrait_of
from talkingdit.puppets.world import Scene

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"


class InterruptProcessingException(Exception):
    """What ComfyUI throws through a node that somebody cancels."""


class VideoInput:
    """VIDEO. `VideoFromFile` reads a file, `VideoFromComponents` has pictures [n, H, W, 3] and a rate."""


class VideoFromFile(VideoInput):
    def __init__(self, file: str) -> None:
        self.file = file

    def get_stream_source(self) -> str:
        return self.file

    def get_duration(self) -> float:
        with av.open(self.file) as container:
            return container.duration / av.time_base

    def get_components(self) -> Any:
        with av.open(self.file) as container:
            rate = Fraction(container.streams.video[0].average_rate)
        frames = torch.from_numpy(np.stack(list(all_pictures(self.file)))).float() / 255
        return types.SimpleNamespace(images=frames, audio=None, frame_rate=rate)


class VideoFromComponents(VideoInput):
    def __init__(self, components: Any) -> None:
        self.components = components

    def get_components(self) -> Any:
        return self.components


class ModelPatcher:
    """MODEL: a module shared by its clones, and code that is put into it while one of them uses it."""

    def __init__(self, model: Any) -> None:
        self.model, self.object_patches, self.backup = model, {}, {}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.object_patches, other.backup = dict(self.object_patches), self.backup
        return other

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def _set(self, name: str, value: Any) -> Any:
        place, _, attribute = name.rpartition(".")
        owner = self.model.get_submodule(place)
        before = getattr(owner, attribute)
        setattr(owner, attribute, value)
        return before

    def patch_model(self) -> None:
        for name, value in self.object_patches.items():
            before = self._set(name, value)
            self.backup.setdefault(name, before)

    def unpatch_model(self) -> None:
        for name, value in self.backup.items():
            self._set(name, value)
        self.backup.clear()


# ---- Nodes of ComfyUI that workflows use -----------------------------------------------------------------------------


class Core:
    """What the nodes below share; `host` is set for each ComfyUI."""

    host: Any = None


class LoadImage(Core):
    RETURN_TYPES, FUNCTION = ("IMAGE", "MASK"), "load"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"image": (cls.host.inputs(), {"image_upload": True})}}

    def load(self, image: str) -> Any:
        picture = np.asarray(Image.open(self.host.input / image).convert("RGBA"), np.float32) / 255
        return torch.from_numpy(picture[None, ..., :3].copy()), torch.from_numpy(1 - picture[None, ..., 3])


class LoadAudio(Core):
    RETURN_TYPES, FUNCTION = ("AUDIO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"audio": (cls.host.inputs(), {"audio_upload": True})}}

    def load(self, audio: str) -> Any:
        samples, rate = soundfile.read(self.host.input / audio, dtype="float32", always_2d=True)
        return ({"waveform": torch.from_numpy(samples.T.copy())[None], "sample_rate": rate},)


class LoadVideo(Core):
    RETURN_TYPES, FUNCTION = ("VIDEO",), "load"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"file": (cls.host.inputs(), {"video_upload": True})}}

    def load(self, file: str) -> Any:
        return (VideoFromFile(str(self.host.input / file)),)


class SaveVideo(Core):
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "save", True

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        words = {"filename_prefix": ("STRING", {}), "format": (["auto", "mp4"], {}), "codec": (["auto", "h264"], {})}
        return {"required": {"video": ("VIDEO",), **words}}

    def save(self, video: Any, filename_prefix: str, **_: Any) -> Any:
        target = self.host.output / f"{filename_prefix}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(video.get_stream_source()).read_bytes())
        return {"ui": {"images": [target.name]}}


class PreviewImage(Core):
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "show", True

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"images": ("IMAGE",)}}

    def show(self, images: Any) -> Any:
        return {"ui": {"images": list(images.shape)}}


CORE = (LoadImage, LoadAudio, LoadVideo, SaveVideo, PreviewImage)


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------


@dataclass
class ComfyUI:
    """Folders, the modules that nodes import, the nodes, and what was kept of them.

    Attributes:
        progress: (done, of all) as told by nodes.
        on_progress: called with them; may call `interrupt`.
        executed: ids of the nodes that ran in the last run.
    """

    root: Path
    progress: list[tuple[int, int]] = field(default_factory=list)
    on_progress: Callable[[int, int], None] | None = None
    executed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("input", "output", "temp", "models"):
            (self.root / name).mkdir(parents=True)
            setattr(self, name, self.root / name)
        self.nodes: dict[str, Any] = {kind.__name__: type(kind.__name__, (kind,), {"host": self}) for kind in CORE}
        self._kept: dict[Any, Any] = {}
        self._stop = False

    def inputs(self) -> list[str]:
        return sorted(os.listdir(self.input))  # type: ignore[attr-defined]

    def interrupt(self) -> None:
        self._stop = True

    def _throw(self) -> None:
        if self._stop:
            self._stop = False
            raise InterruptProcessingException

    def modules(self) -> dict[str, types.ModuleType]:
        """By name, as nodes import them."""
        host, folders = self, {}

        class ProgressBar:
            def __init__(self, total: int) -> None:
                self.total = total

            def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
                host.progress.append((value, total or self.total))
                if host.on_progress is not None:
                    host.on_progress(value, total or self.total)

        def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
            if path not in folders.setdefault(name, []):
                folders[name].append(path)

        def get_full_path_or_raise(name: str, file: str) -> str:
            path = host.root / "models" / name / file
            if not path.is_file():
                raise FileNotFoundError(file)
            return str(path)

        made: dict[str, types.ModuleType] = {}

        def module(name: str, **names: Any) -> None:
            made[name] = types.ModuleType(name)
            vars(made[name]).update(names)

        module("comfy", __path__=[])
        module("comfy.utils", ProgressBar=ProgressBar)
        module(
            "comfy.model_management",
            InterruptProcessingException=InterruptProcessingException,
            throw_exception_if_processing_interrupted=self._throw,
            get_torch_device=lambda: torch.device("cpu"),
            unload_all_models=lambda: None,
            soft_empty_cache=lambda: None,
        )
        vars(made["comfy"]).update(utils=made["comfy.utils"], model_management=made["comfy.model_management"])
        module(
            "folder_paths",
            models_dir=str(self.root / "models"),
            add_model_folder_path=add_model_folder_path,
            get_folder_paths=lambda name: list(folders[name]),
            get_filename_list=lambda name: sorted(os.listdir(self.root / "models" / name)),
            get_full_path_or_raise=get_full_path_or_raise,
            get_input_directory=lambda: str(self.root / "input"),
            get_output_directory=lambda: str(self.root / "output"),
            get_temp_directory=lambda: str(self.root / "temp"),
        )
        impl = types.SimpleNamespace(VideoFromFile=VideoFromFile, VideoFromComponents=VideoFromComponents)
        module("comfy_api", __path__=[])
        module("comfy_api.latest", InputImpl=impl)
        return made

    def load_pack(self, folder: Path = PACK) -> types.ModuleType:
        """A folder of `custom_nodes`, by its path: neither on the search path nor under its own name."""
        name = str(folder).replace(".", "_x_")
        for old in [known for known in sys.modules if known.split(".")[0] == name]:
            del sys.modules[old]
        spec: Any = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        pack = importlib.util.module_from_spec(spec)
        sys.modules[name] = pack
        spec.loader.exec_module(pack)
        self.nodes.update(pack.NODE_CLASS_MAPPINGS)
        return pack

    def object_info(self) -> dict[str, Any]:
        """As its server tells it, the part that says what inputs there are."""
        return {name: kind.INPUT_TYPES() for name, kind in self.nodes.items()}

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Run a workflow.

        Returns:
            Outputs of all nodes by their ids; "ui" of output nodes.

        Raises:
            ValueError: the prompt does not keep the contract.
        """
        for name in prompt:
            self._validate(prompt, name)
        self.executed = []
        outputs: dict[str, Any] = {}
        with torch.inference_mode():
            for name in prompt:
                self._outputs(prompt, name, outputs)
        self._kept = {key: value for key, value in self._kept.items() if key in {self._key(prompt, n) for n in prompt}}
        return outputs

    def _outputs(self, prompt: dict[str, Any], name: str, outputs: dict[str, Any]) -> Any:
        if name in outputs:
            return outputs[name]
        node, key = prompt[name], self._key(prompt, name)
        given = {
            word: self._outputs(prompt, value[0], outputs)[value[1]] if _is_link(value) else value
            for word, value in node["inputs"].items()
        }
        if key not in self._kept:
            kind = self.nodes[node["class_type"]]
            self.executed.append(name)
            self._kept[key] = getattr(kind(), kind.FUNCTION)(**given)
            if isinstance(self._kept[key], tuple) and len(self._kept[key]) != len(kind.RETURN_TYPES):
                raise ValueError(f"{node['class_type']}: {len(self._kept[key])} outputs, not as RETURN_TYPES")
        outputs[name] = self._kept[key]
        return outputs[name]

    def _key(self, prompt: dict[str, Any], name: str) -> Any:
        node = prompt[name]
        kind, inputs = self.nodes[node["class_type"]], node["inputs"]
        changed = None
        if hasattr(kind, "IS_CHANGED"):
            changed = kind.IS_CHANGED(**{word: None if _is_link(value) else value for word, value in inputs.items()})
        links = [(word, self._key(prompt, v[0]), v[1]) for word, v in sorted(inputs.items()) if _is_link(v)]
        values = [(word, v) for word, v in sorted(inputs.items()) if not _is_link(v)]
        return node["class_type"], changed, tuple(links), tuple(values)

    def _validate(self, prompt: dict[str, Any], name: str) -> None:
        node = prompt[name]
        where = f"{node['class_type']} ({name})"
        types_ = self.nodes[node["class_type"]].INPUT_TYPES()
        known = {**types_.get("required", {}), **types_.get("optional", {})}
        for word in types_.get("required", {}):
            if word not in node["inputs"]:
                raise ValueError(f"{where}: required input is missing: {word}")
        for word, value in node["inputs"].items():
            kind, about = known[word][0], known[word][1] if len(known[word]) > 1 else {}
            if _is_link(value):
                source = self.nodes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                if source != kind:
                    raise ValueError(f"{where}: {word} takes {kind}, not {source}")
            elif isinstance(kind, list):
                if value not in kind:
                    raise ValueError(f"{where}: {word} must be one of {kind}, not {value!r}")
            elif kind in ("INT", "FLOAT"):
                number = {"INT": int, "FLOAT": float}[kind](value)
                if not about.get("min", number) <= number <= about.get("max", number):
                    raise ValueError(f"{where}: {word} is out of bounds: {value!r}")
            elif kind not in ("STRING", "BOOLEAN"):
                raise ValueError(f"{where}: {word} takes a link of {kind}, not {value!r}")


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def fill(folder: Path) -> None:
    """A drawn portrait, and a second of a voice in two channels."""
    rng = np.random.default_rng(0)
    Image.fromarray(portrait_of(Scene.random(rng), 128)).save(folder / "portrait.png")
    time = np.arange(24000) / 24000
    voice = 0.3 * np.sin(2 * np.pi * 160 * time) * (np.sin(2 * np.pi * 4 * time) > 0)
    soundfile.write(folder / "voice.wav", np.stack([voice, 0.5 * voice], axis=1), 24000, subtype="FLOAT")
