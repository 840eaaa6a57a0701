# SPDX-License-Identifier: Apache-2.0
"""The nodes and the example workflows in a real ComfyUI: its server is started with the pack in `custom_nodes`.

It is not on any package index, so this runs by hand: TALKINGDIT_COMFYUI is the command that starts it, with what this
machine needs, such as "python /path/to/ComfyUI/main.py --cpu". docs/comfyui.md says which version was run.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import PACK, fill
from safetensors.torch import save_file
from workflows import to_prompt

from talkingdit.media.files import read_video

COMMAND = os.environ.get("TALKINGDIT_COMFYUI", "")
pytestmark = [
    pytest.mark.skipif(not COMMAND, reason="TALKINGDIT_COMFYUI does not say how to start ComfyUI"),
    pytest.mark.slow,
]
# Nodes for this test: a conditioning without a text encoder, how far two latents are apart, and a latent that is given
# on once another one is there.
HELPERS = """
import torch

class Words:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {})}}

    def make(self, seed):
        return ([[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(seed)), {}]],)

class Apart:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "measure", "test", True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"one": ("LATENT",), "other": ("LATENT",)}}

    def measure(self, one, other):
        one, other = one["samples"].double(), other["samples"].double()
        return {"ui": {"apart": [float((one - other).norm() / one.norm())], "size": [float(one.std())]}}

class After:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "hand_on", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent": ("LATENT",), "other": ("LATENT",)}}

    def hand_on(self, latent, other):
        return (latent,)

NODE_CLASS_MAPPINGS = {"Words": Words, "Apart": Apart, "After": After}
"""
EXAMPLES = {path.stem: json.loads(path.read_text()) for path in (PACK / "example_workflows").glob("*.json")}


def tiny_wan() -> dict[str, torch.Tensor]:
    """A Wan transformer of two blocks in the layout of released ones, with random weights."""
    dim, shapes = 128, {"patch_embedding.weight": (128, 16, 1, 2, 2), "patch_embedding.bias": (128,)}
    layers = {"text_embedding.0": (dim, 4096), "text_embedding.2": (dim, dim), "time_embedding.0": (dim, 256)}
    layers |= {"time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim), "head.head": (64, dim)}
    for block in ("blocks.0", "blocks.1"):
        for attention in ("self_attn", "cross_attn"):
            layers |= {f"{block}.{attention}.{name}": (dim, dim) for name in "qkvo"}
            shapes |= {f"{block}.{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        layers |= {f"{block}.ffn.0": (256, dim), f"{block}.ffn.2": (dim, 256)}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,), f"{block}.modulation": (1, 6, dim)}
    shapes["head.modulation"] = (1, 2, dim)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)
        + float("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


class Server:
    """A running ComfyUI and its folders."""

    def __init__(self, root: Path) -> None:
        for name in ("custom_nodes", "input", "output", "temp", "models", "user"):
            (root / name).mkdir(parents=True)
        (root / "custom_nodes" / "talkingdit").symlink_to(PACK)
        (root / "custom_nodes" / "helpers.py").write_text(HELPERS)
        (root / "models" / "diffusion_models").mkdir()
        save_file(tiny_wan(), root / "models" / "diffusion_models" / "wan.safetensors")
        fill(root / "input")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.root, self.log = root, root / "log.txt"
        words = [*shlex.split(COMMAND), "--port", str(self.port), "--base-directory", str(root)]
        environment = {**os.environ, "PYTHONPATH": str(PACK.parents[1])}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def ask(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", body, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def wait(self, seconds: float = 400) -> Any:
        """What its nodes are, once it answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                return self.ask("/object_info")
            except OSError:
                time.sleep(1)
        raise AssertionError(self.log.read_text()[-3000:])

    def run(self, prompt: Any, stop_after: float | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Outputs of a prompt, and the messages about it by their names.

        Args:
            stop_after: cancel it after so many seconds.
        """
        number, begin = self.ask("/prompt", {"prompt": prompt})["prompt_id"], time.monotonic()
        while True:
            history = self.ask(f"/history/{number}")
            if history:
                status = history[number]["status"]
                return history[number]["outputs"], {name: about for name, about in status["messages"]}
            if stop_after is not None and time.monotonic() - begin > stop_after:
                self.ask("/interrupt", {})
            time.sleep(0.5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("real") / "comfyui")
    try:
        yield found
    finally:
        found.process.terminate()
        found.process.wait(60)


@pytest.fixture(scope="module")
def info(server: Server) -> dict[str, Any]:
    return {name: about["input"] for name, about in server.wait().items()}


def test_all_nodes_are_there(server: Server, info: dict[str, Any]) -> None:
    used = {node["type"] for graph in EXAMPLES.values() for node in graph["nodes"]} - {"MarkdownNote"}
    assert used <= set(info)
    assert "IMPORT FAILED" not in server.log.read_text()


@pytest.mark.parametrize("name", EXAMPLES)
def test_workflows_lack_nothing_but_files(server: Server, info: dict[str, Any], name: str) -> None:
    try:
        server.ask("/prompt", {"prompt": to_prompt(EXAMPLES[name], info)})
    except urllib.error.HTTPError as refused:
        answer = json.loads(refused.read())
        errors = [error for node in answer["node_errors"].values() for error in node["errors"]]
        kinds = {error["type"] for error in errors} - {"custom_validation_failed"}
        assert kinds == {"value_not_in_list"}, answer
        assert name != "talk"
    else:
        assert name == "talk"


def test_the_first_workflow_makes_a_video_and_makes_it_once(server: Server, info: dict[str, Any]) -> None:
    prompt = to_prompt(EXAMPLES["talk"], info)
    outputs, messages = server.run(prompt)
    assert "execution_success" in messages, (messages, server.log.read_text()[-3000:])
    frames, sound, fps, rate = read_video(next((server.root / "output").rglob("*.mp4")))
    assert len(frames) == round(fps)
    assert sound is not None
    assert abs(sound.shape[-1] / rate - 1) < 0.2
    assert any("images" in shown for shown in outputs.values())
    _, again = server.run(prompt)
    assert set(again["execution_cached"]["nodes"]) >= set(prompt) - {"6"}


def test_cancel(server: Server, info: dict[str, Any]) -> None:
    prompt = to_prompt(EXAMPLES["talk"], info)
    maker = next(node for node in prompt.values() if node["class_type"] == "TalkingDiTGenerate")
    maker["inputs"] |= {"seed": 7, "steps": 2000}  # minutes
    begin = time.monotonic()
    _, messages = server.run(prompt, stop_after=6)
    assert messages["execution_interrupted"]["node_type"] == "TalkingDiTGenerate"
    assert time.monotonic() - begin < 60


def test_a_mistake_is_one_sentence(server: Server, info: dict[str, Any]) -> None:
    prompt = to_prompt(EXAMPLES["talk"], info)
    options = next(name for name, node in prompt.items() if node["class_type"] == "TalkingDiTOptions_puppet")
    prompt[options] = {"class_type": "TalkingDiTOptions_wan_s2v", "inputs": {}}
    _, messages = server.run(prompt)
    said = messages["execution_error"]["exception_message"].strip()
    assert said.startswith("options: expected those of")


def test_an_accelerated_model_samples_the_same(server: Server, info: dict[str, Any]) -> None:
    """In float32; and who has the model without the node gets its own numbers, bit for bit, also afterwards."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    def sample(model: str, start: str) -> dict[str, Any]:
        settings = dict(seed=5, steps=3, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)
        ends = dict(positive=["good", 0], negative=["bad", 0], latent_image=[start, 0])
        return node("KSampler", model=[model, 0], **ends, **settings)

    prompt = {
        "load": node("UNETLoader", unet_name="wan.safetensors", weight_dtype="default"),
        "fast": node("TalkingDiTAccelerate", model=["load", 0]),
        "good": node("Words", seed=1),
        "bad": node("Words", seed=2),
        "empty": node("EmptyHunyuanLatentVideo", width=64, height=48, length=9, batch_size=1),
        "before": sample("load", "empty"),
        "then": node("After", latent=["empty", 0], other=["before", 0]),
        "ours": sample("fast", "then"),
        "at_last": node("After", latent=["empty", 0], other=["ours", 0]),
        "after": sample("load", "at_last"),
        "apart": node("Apart", one=["before", 0], other=["ours", 0]),
        "same": node("Apart", one=["before", 0], other=["after", 0]),
        "report": node("PreviewAny", source=["fast", 1]),
    }
    outputs, messages = server.run(prompt)
    assert "execution_success" in messages, (messages, server.log.read_text()[-3000:])
    assert 0 < outputs["apart"]["apart"][0] < 1e-5
    assert outputs["apart"]["size"][0] > 0.1
    assert outputs["same"]["apart"][0] == 0
    assert "2 x block" in outputs["report"]["text"][0]
