# SPDX-License-Identifier: Apache-2.0
"""What travels along the wires of ComfyUI arrives at a family's options as it was meant; mistakes are one sentence."""

from __future__ import annotations

import dataclasses
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from contract import ModelPatcher, VideoFromComponents, VideoFromFile

sys.path.insert(0, str(Path(__file__).parents[1] / "nn"))  # the stand-in of ComfyUI's Wan model

from comfy_standin import WanModel
from tiny_diffusers import randomise

from talkingdit import families
from talkingdit.api.materials import Materials
from talkingdit.api.options import chosen
from talkingdit.errors import UserError
from talkingdit.families.fields import fields
from talkingdit.media.edited import open_edited
from talkingdit.media.files import VideoWriter
from talkingdit.media.image import read_image


def node(comfy, which, /, **given):
    kind = comfy.nodes[which]
    return getattr(kind(), kind.FUNCTION)(**given)


def picture(height=6, width=8, channels=3):
    return torch.randint(0, 256, (1, height, width, channels), generator=torch.Generator().manual_seed(0)) / 255


def sound(channels=2, rate=16000):
    return {"waveform": torch.rand(1, channels, 800, generator=torch.Generator().manual_seed(0)), "sample_rate": rate}


class Pipe:
    """Stands for a pipeline: what it is asked for becomes the options of its family, as in a real one."""

    def __init__(self, slot):
        self.family, self.asked, self.files = slot.family, {}, {}

    def __call__(self, image=None, audio=None, prompt="", progress=None, warn=None, **options):
        self.asked = dict(image=image, audio=audio, prompt=prompt)
        self.materials = Materials()
        self.options = chosen(self.family, options, self.materials)
        self.files = {name: path.read_bytes() for name, path in self.options.files().items()}
        raise StopAsking


class StopAsking(Exception):
    pass


@pytest.fixture
def asking(comfy, pack, monkeypatch):
    """Call a node with a model of a family that is not there; what its pipeline was asked for."""

    def ask(family, name, **given):
        slot = types.SimpleNamespace(family=families.get(family), check=lambda asked: None, leave=lambda: None)
        pipe = Pipe(slot)
        slot.ready = lambda loras: pipe
        usual = {"prompt": "words", "seed": 7, "steps": 3}
        with pytest.raises(StopAsking):
            node(comfy, name, model=pack("model").Model(slot), **usual, **given)
        return pipe

    return ask


# ---- Wires -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_keep_their_bytes(pack, channels):
    image = picture(channels=channels)
    taken = np.asarray(pack("sockets").picture_of(image))
    assert np.array_equal(taken.reshape(image.shape[1:]), (image[0] * 255).round().byte().numpy())
    beyond = pack("sockets").picture_of(torch.tensor([-1.0, 0.5, 2.0]).expand(1, 2, 2, 3))
    assert np.array_equal(np.asarray(beyond)[0, 0], [0, 128, 255])


def test_alpha_is_over_white_as_in_files(pack, tmp_path):
    image = picture(channels=4)
    pack("sockets").picture_of(image).save(tmp_path / "alpha.png")
    rgb, alpha = image[0, ..., :3].numpy() * 255, image[0, ..., 3:].numpy()
    assert np.abs(read_image(tmp_path / "alpha.png") - (rgb * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.rand(3, 4, 4, 3), "image: expected one, .* got a batch of 3"),
        (torch.rand(4, 4, 3), r"image: expected IMAGE \[1, H, W, C\], got shape \[4, 4, 3\]"),
        (torch.rand(1, 4, 4, 2), "image: expected an IMAGE of 1, 3 or 4 channels, got 2"),
        (torch.full((1, 4, 4, 3), float("nan")), "image: expected numbers from 0 to 1, got some that are none"),
        (None, "image: expected IMAGE .* got NoneType"),
    ],
)
def test_pictures_that_are_none(pack, image, sentence):
    with pytest.raises(UserError, match=sentence):
        pack("sockets").picture_of(image)


def test_sounds(pack):
    samples, rate = pack("sockets").sound_of(sound(3, 44100))
    assert samples.dtype == np.float32
    assert rate == 44100
    assert np.array_equal(samples, sound(3)["waveform"][0].T.numpy())
    whole = {"waveform": torch.tensor([[[-32768, 16384]]], dtype=torch.int16), "sample_rate": 8000}
    assert np.array_equal(pack("sockets").sound_of(whole)[0], [[-1], [0.5]])
    back = pack("sockets").audio_of(samples, rate)
    assert torch.equal(back["waveform"], sound(3)["waveform"])
    for wrong, sentence in (
        ({"waveform": torch.rand(2, 1, 8), "sample_rate": 8000}, "batch of 2"),
        ({"waveform": torch.rand(1, 1, 8)}, "expected an AUDIO"),
        ({"waveform": torch.rand(1, 1, 8), "sample_rate": 0}, "sample_rate in whole Hz, got 0"),
        ({"waveform": torch.rand(1, 1, 0), "sample_rate": 8000}, "AUDIO"),
    ):
        with pytest.raises(UserError, match=sentence):
            pack("sockets").sound_of(wrong)


def test_a_long_video_lies_on_the_disk(comfy, pack, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 3), dtype=np.uint8)
    before = sorted(comfy.temp.iterdir())
    in_memory = pack("sockets").image_of(frames)
    monkeypatch.setattr(pack("sockets"), "IN_MEMORY", 100)
    on_disk = pack("sockets").image_of(frames)
    assert torch.equal(in_memory, on_disk)
    assert torch.equal((on_disk * 255).round().byte(), torch.from_numpy(frames))
    assert sorted(comfy.temp.iterdir()) == before


# ---- Options ---------------------------------------------------------------------------------------------------------


def test_every_option_of_every_family_is_somewhere(comfy, pack):
    """A field that is added to a family needs a place in ComfyUI, too."""
    inputs = {name: kind.INPUT_TYPES() for name, kind in comfy.nodes.items() if name.startswith("TalkingDiT")}
    words = {
        name: {**kinds.get("required", {}), **kinds["optional"]}
        for name, kinds in inputs.items()
        if "optional" in kinds
    }
    several = {"speaker": "speakers", "emotion": "emotions", "anchor": "anchors"}
    everywhere = {**words["TalkingDiTLoad"], **words["TalkingDiTGenerate"], **words["TalkingDiTDub"]}
    for name in families.names():
        family = families.get(name)
        for one in fields(family.options):
            here = {**everywhere, **words[f"TalkingDiTOptions_{name}"]}
            assert several.get(one.name, one.name) in here, f"{name}: {one.name}"


@pytest.mark.parametrize("name", families.names())
def test_widgets_say_nothing_until_they_are_moved(comfy, pack, name):
    family = families.get(name)
    found = comfy.nodes[f"TalkingDiTOptions_{name}"].INPUT_TYPES()["optional"]
    given = {word: about["default"] for word, (_, about) in found.items() if "default" in about}
    assert node(comfy, f"TalkingDiTOptions_{name}", **given)[0].values == {}
    moved, helps = {}, {one.name: one.help for one in fields(family.options)}
    for word, (kind, about) in found.items():
        assert about["tooltip"].startswith(helps[word])
        if isinstance(kind, list):
            moved[word] = next(choice for choice in kind if choice not in (about["default"], "default"))
        elif kind == "INT":
            moved[word] = max(about["default"], 1) + 63
        elif kind == "FLOAT":
            moved[word] = about["default"] + 0.5 if 0 <= about["default"] < 1 else max(about["default"], 1) + 63
        elif kind == "BOOLEAN":
            moved[word] = not about["default"]
    video = {"video": Path("film.mp4")} if "video" in helps else {}  # some options need it
    for word, value in moved.items():
        values = node(comfy, f"TalkingDiTOptions_{name}", **{**given, word: value})[0].values
        assert values == {word: value}
        assert getattr(family.options(**values, **video), word) == value


def test_words_are_read_as_on_the_command_line(asking, comfy):
    chosen_ = node(
        comfy, "TalkingDiTOptions_wan_s2v", size="640x480", max_area="64x64", negative_prompt="", guidance=-1
    )
    pipe = asking("wan_s2v", "TalkingDiTGenerate", image=picture(), audio=sound(), options=chosen_[0])
    assert pipe.options == families.get("wan_s2v").options(seed=7, steps=3, size=(480, 640), max_area=4096)
    assert pipe.asked["prompt"] == "words"
    assert np.array_equal(np.asarray(pipe.asked["image"]), (picture()[0] * 255).round().byte().numpy())
    assert np.array_equal(pipe.asked["audio"][0], sound()["waveform"][0].T.numpy())


def test_files_among_options(asking, comfy, tmp_path):
    (comfy.input / "turns.rttm").write_text("SPEAKER x 1 0 1 <NA> <NA> left <NA> <NA>\n")
    kind = comfy.nodes["TalkingDiTOptions_hunyuan_avatar"]
    options = node(comfy, "TalkingDiTOptions_hunyuan_avatar", turns="turns.rttm")[0]
    assert options.values == {"turns": comfy.input / "turns.rttm"}
    before = kind.IS_CHANGED(turns="turns.rttm")
    (comfy.input / "turns.rttm").write_text("SPEAKER x 1 0 2 <NA> <NA> right <NA> <NA>\n")
    assert kind.IS_CHANGED(turns="turns.rttm") != before
    with pytest.raises(UserError, match=r"turns: expected a file in .* got 'none\.rttm'"):
        node(comfy, "TalkingDiTOptions_hunyuan_avatar", turns="none.rttm")
    # What is written goes into the folder of outputs, and nowhere else.
    figure = node(comfy, "TalkingDiTOptions_gloria", attention_figure="looks/figure.png")[0].values
    assert figure == {"attention_figure": comfy.output / "looks" / "figure.png"}
    for outside in ("../figure.png", str(tmp_path / "figure.png")):
        with pytest.raises(UserError, match="attention_figure: expected the name of a file to write in"):
            node(comfy, "TalkingDiTOptions_gloria", attention_figure=outside)


# ---- Speakers, emotions, anchors -------------------------------------------------------------------------------------


def test_speakers_and_emotions(asking, comfy):
    mask = torch.zeros(1, 6, 8)
    mask[:, 2:4, 3:5] = 1
    (one,) = node(comfy, "TalkingDiTSpeaker", name="left", audio=sound(1), box="1, 2, 3.5, 4")
    (two,) = node(comfy, "TalkingDiTSpeaker", name="right", audio=sound(2), mask=mask, strength=0.5, speakers=one)
    assert len(one) == 1
    (sad,) = node(comfy, "TalkingDiTEmotion", image=picture(), start=0.0, end=1.5)
    (both,) = node(comfy, "TalkingDiTEmotion", image=picture(3), start=1.0, end=0.0, emotions=sad)
    pipe = asking("hunyuan_avatar", "TalkingDiTGenerate", image=picture(), speakers=two, emotions=both)
    left, right = pipe.options.speaker
    assert (left.name, left.box, left.strength, left.mask) == ("left", (1, 2, 3.5, 4), 1, None)
    assert (right.name, right.box, right.strength) == ("right", None, 0.5)
    samples, rate = soundfile.read(right.voice, dtype="float32", always_2d=True)
    assert rate == 16000
    assert np.array_equal(samples, sound(2)["waveform"][0].T.numpy())
    assert np.array_equal(read_image(right.mask), np.repeat(mask[0].numpy()[..., None] * 255, 3, axis=2))
    spans = [(emotion.start, emotion.end) for emotion in pipe.options.emotion]
    assert spans == [(0, 1.5), (1, float("inf"))]
    assert read_image(pipe.options.emotion[1].picture).shape == (3, 8, 3)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"box": "1,2,3"}, "speaker left: expected a box x0,y0,x1,y1 in pixels, got '1,2,3'"),
        ({"box": "1,2,nan,4"}, "expected a box"),
        ({"mask": torch.zeros(1, 64, 64)}, "speaker left: expected a MASK that is white somewhere"),
        ({"mask": torch.ones(2, 64, 64)}, "batch of 2"),
    ],
)
def test_places_that_are_none(comfy, given, sentence):
    with pytest.raises(UserError, match=sentence):
        node(comfy, "TalkingDiTSpeaker", name="left", **given)


def test_anchors(asking, comfy):
    (one,) = node(comfy, "TalkingDiTAnchor", image=picture(), shows="view/left")
    (two,) = node(comfy, "TalkingDiTAnchor", image=picture(4), shows="expression/happy", anchors=one)
    pipe = asking("gloria", "TalkingDiTGenerate", image=picture(), audio=sound(), anchors=two)
    assert [anchor.name for anchor in pipe.options.anchor] == ["view/left", "expression/happy"]
    assert read_image(pipe.options.anchor[1].path).shape == (4, 8, 3)
    with pytest.raises(UserError, match="anchor view/left: expected one picture of each kind, got two"):
        node(comfy, "TalkingDiTAnchor", image=picture(), shows="view/left", anchors=one)


def test_what_is_wrong_is_told_before_models_are_loaded(comfy, pack):
    (speakers,) = node(comfy, "TalkingDiTSpeaker", name="left", audio=sound())
    (model,) = node(comfy, "TalkingDiTLoad", checkpoint="shipped: drawn characters")
    silent = {"waveform": torch.zeros(1, 1, 16000), "sample_rate": 16000}
    for given, sentence in (
        ({"speakers": speakers}, "drawn characters has no option 'speaker', only HunyuanVideo-Avatar"),
        ({"audio": silent}, "expected speech, got 1.0 s of silence"),
        ({}, "audio: expected a path or"),
    ):
        with pytest.raises(UserError, match=sentence):
            node(comfy, "TalkingDiTGenerate", model=model, image=picture(), prompt="", seed=0, steps=1, **given)
    assert model.slot._pipe is None


# ---- Videos in -------------------------------------------------------------------------------------------------------


@pytest.fixture
def film(comfy):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    path = comfy.input / "film.mp4"
    with VideoWriter(path, 12.5, (32, 48)) as writer:
        writer.write(frames)
    return path, frames


def test_a_file_is_dubbed_as_it_is(asking, comfy, film):
    pipe = asking("skyreels_audio", "TalkingDiTDub", video=VideoFromFile(str(film[0])), audio=sound(), box="1,2,9,10")
    assert pipe.options.video == film[0]
    assert pipe.options.mask == "1,2,9,10"
    assert film[0].exists()


def test_pictures_without_a_file_are_kept_without_loss(comfy, pack, film):
    images = torch.from_numpy(film[1]).float() / 255
    video = VideoFromComponents(types.SimpleNamespace(images=images, audio=None, frame_rate=Fraction(30000, 1001)))
    path, ours = pack("sockets").file_of_video(video)
    assert ours
    opened = open_edited(path)
    assert opened.rate == Fraction(30000, 1001)
    assert np.array_equal(np.stack(list(opened.read())), film[1])
    path.unlink()


def test_part_of_a_file_is_not_taken_for_all_of_it(pack, film):
    class Part(VideoFromFile):
        def __init__(self, file, seconds=None):
            super().__init__(file)
            self.seconds = seconds

        def get_duration(self):
            return self.seconds or super().get_duration()

        def get_components(self):
            found = super().get_components()
            found.images = found.images[:2]
            return found

    path, ours = pack("sockets").file_of_video(Part(str(film[0]), 0.16))
    assert ours
    assert open_edited(path).frames == 2
    path.unlink()
    assert pack("sockets").file_of_video(Part(str(film[0]))) == (film[0], False)


def test_a_mask_of_a_dub_and_what_is_left(asking, comfy, film):
    mask = torch.zeros(1, 32, 48)
    mask[:, 8:] = 1
    before = sorted(comfy.temp.iterdir())
    pipe = asking("skyreels_audio", "TalkingDiTDub", video=VideoFromFile(str(film[0])), audio=sound(), mask=mask)
    assert set(pipe.files) == {"video", "mask"}
    assert sorted(comfy.temp.iterdir()) == before
    usual = {"prompt": "", "seed": 0, "steps": 1}
    with pytest.raises(UserError, match="mask: expected a MASK or a box, got both"):
        node(comfy, "TalkingDiTDub", model=None, video=None, audio=sound(), mask=mask, box="1,2,3,4", **usual)
    with pytest.raises(UserError, match="video: expected a VIDEO, got str"):
        node(comfy, "TalkingDiTDub", model=None, video="film.mp4", audio=sound(), **usual)


def test_a_pose_comes_as_a_video(asking, comfy, film):
    (options,) = node(comfy, "TalkingDiTOptions_wan_s2v", pose=VideoFromFile(str(film[0])))
    pipe = asking("wan_s2v", "TalkingDiTGenerate", image=picture(), audio=sound(), options=options)
    assert pipe.options.pose == film[0]


# ---- Models ----------------------------------------------------------------------------------------------------------


def test_loras_go_on_and_off(comfy, pack, tmp_path):
    calls = []

    class Loaded:
        def unload_lora_weights(self):
            calls.append("off")

        def load_lora_weights(self, path, adapter_name):
            if path.name == "bad":
                raise UserError("bad")
            calls.append((path.name, adapter_name))

        def set_adapters(self, names, strengths):
            calls.append((names, strengths))

    (model,) = node(comfy, "TalkingDiTLoad", checkpoint="shipped: drawn characters")
    model.slot._pipe = Loaded()
    for name in ("a.safetensors", "b.safetensors"):
        (comfy.root / "models" / "loras" / name).write_bytes(b"1")
    (tmp_path / "bad").write_bytes(b"1")
    (one,) = node(comfy, "TalkingDiTLora", model=model, lora="a.safetensors", strength=0.5)
    (two,) = node(comfy, "TalkingDiTLora", model=one, lora="b.safetensors", strength=-1.0)
    (none,) = node(comfy, "TalkingDiTLora", model=model, lora="a.safetensors", strength=0.0)
    (bad,) = node(comfy, "TalkingDiTLora", model=one, lora="", path=str(tmp_path / "bad"), strength=1.0)
    assert model.loras == none.loras == ()
    assert two.slot is model.slot
    two.slot.ready(two.loras)
    assert calls[1:] == [
        ("a.safetensors", "lora_0"),
        ("b.safetensors", "lora_1"),
        (["lora_0", "lora_1"], [0.5, -1.0]),
    ]
    calls.clear()
    two.slot.ready(two.loras)
    assert calls == []
    with pytest.raises(UserError, match="bad"):
        bad.slot.ready(bad.loras)
    assert calls[-1] == "off"
    calls.clear()
    two.slot.ready(two.loras)
    assert len(calls) == 4
    kind = comfy.nodes["TalkingDiTLora"]
    before = kind.IS_CHANGED(lora="a.safetensors")
    (comfy.root / "models" / "loras" / "a.safetensors").write_bytes(b"22")
    assert kind.IS_CHANGED(lora="a.safetensors") != before
    (other,) = node(comfy, "TalkingDiTLora", model=model, lora="a.safetensors", strength=0.5)
    assert other.loras != one.loras
    with pytest.raises(UserError, match="lora: there is no file or folder"):
        node(comfy, "TalkingDiTLora", model=model, lora="", path=str(tmp_path / "none"), strength=1.0)


def test_accelerated_wan_models_of_comfyui(comfy):
    wan = randomise(WanModel(control=True))
    model = torch.nn.Module()
    model.diffusion_model = wan
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator) for shape in ((1, 12, 48), (1, 6, 48), (1, 5, 48))]
    patcher = ModelPatcher(model)
    with torch.inference_mode():
        expected = wan(*given)
        fast, report = node(comfy, "TalkingDiTAccelerate", model=patcher)
        assert "4 x block" in report
        assert patcher.object_patches == {}
        assert torch.equal(wan(*given), expected)
        fast.patch_model()
        ours = wan(*given)
        assert not torch.equal(ours, expected)
        assert float((ours - expected).norm() / expected.norm()) < 1e-5
        again, _ = node(comfy, "TalkingDiTAccelerate", model=fast)
        assert again.object_patches.keys() == fast.object_patches.keys()
        fast.unpatch_model()
        assert torch.equal(wan(*given), expected)
    other = patcher.clone()
    other.add_object_patch("diffusion_model.blocks.0.forward", lambda *_, **__: 0)
    fast, report = node(comfy, "TalkingDiTAccelerate", model=other)
    assert "left alone: 1 x block" in report
    assert fast.object_patches["diffusion_model.blocks.0.forward"]() == 0
    model.diffusion_model = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="must be a Wan transformer of ComfyUI, got Linear"):
        node(comfy, "TalkingDiTAccelerate", model=patcher)


def test_models_are_looked_for_where_comfyui_has_them(comfy, pack, tmp_path):
    root = comfy.root / "models" / "talkingdit" / "somebody" / "drawn"
    root.mkdir(parents=True)
    assert "somebody/drawn" not in pack("model").checkpoint_names()
    from talkingdit.models import default_checkpoint

    root.rmdir()
    root.symlink_to(default_checkpoint(), target_is_directory=True)
    assert "somebody/drawn" in pack("model").checkpoint_names()
    (model,) = node(comfy, "TalkingDiTLoad", checkpoint="somebody/drawn")
    assert model.family.name == "puppet"
    with pytest.raises(UserError, match=r"checkpoint: expected a folder below .* got 'nobody'"):
        node(comfy, "TalkingDiTLoad", checkpoint="nobody")
    assert dataclasses.asdict(model.slot.recipe)["precision"] is None


def test_words_that_were_taken_out_say_nothing(pack):
    family = families.get("hunyuan_avatar")
    assert pack("widgets").values(family, {"step_cache": "", "size": "", "guidance": -1}) == {}
    assert pack("widgets").values(family, {"step_cache": "0.1"}) == {"step_cache": "0.1"}
