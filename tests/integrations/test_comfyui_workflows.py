# SPDX-License-Identifier: Apache-2.0
"""The example workflows fit the nodes, and say what families take."""

from __future__ import annotations

import json
import re

import pytest
from contract import PACK
from workflows import NOTES, to_prompt

from talkingdit import families
from talkingdit.api.materials import Materials
from talkingdit.api.options import chosen


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_example_workflows_fit_the_nodes(comfy, path):
    """Names, widgets and links of all our nodes in them; only files may be missing. ComfyUI takes a value of another
    kind than the widget's for words, which the family then refuses when the video is asked for."""
    graph = json.loads(path.read_text())
    ours = {node["id"] for node in graph["nodes"] if node["type"] in comfy.nodes}
    kinds = {"STRING": (str,), "BOOLEAN": (bool,), "INT": (int,), "FLOAT": (int, float)}
    own = {**graph, "nodes": [node for node in graph["nodes"] if node["type"].startswith("TalkingDiT")]}
    info = comfy.object_info()
    for node in to_prompt(own, info).values():
        types = {**info[node["class_type"]].get("required", {}), **info[node["class_type"]].get("optional", {})}
        for name, value in node["inputs"].items():
            kind = types[name][0]
            if isinstance(kind, str) and kind in kinds:
                assert isinstance(value, kinds[kind]), (node["class_type"], name)
                assert kind == "BOOLEAN" or not isinstance(value, bool), (node["class_type"], name)
    assert {node["type"] for node in graph["nodes"] if node["type"].startswith("TalkingDiT")} <= set(comfy.nodes)
    if path.stem == "accelerate_wan":  # the rest of it are nodes of ComfyUI
        assert len(ours) == 2
        return
    assert len(ours) == len([node for node in graph["nodes"] if node["type"] not in NOTES])
    prompt = to_prompt(graph, info)
    for name in prompt:
        try:
            comfy._validate(prompt, name)
        except ValueError as error:
            assert re.search(r"(image|audio|file|checkpoint) must be one of", str(error)), error  # noqa: PT017


@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda path: path.stem)
def test_the_families_take_what_example_workflows_say(comfy, pack, path):
    """ComfyUI checks kinds alone: words that a family refuses end the run when the video is asked for."""
    graph = json.loads(path.read_text())
    graph["nodes"] = [node for node in graph["nodes"] if node["type"].startswith("TalkingDiTOptions_")]
    for node in to_prompt(graph, comfy.object_info()).values():
        family = families.get(node["class_type"].removeprefix("TalkingDiTOptions_"))
        said = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
        chosen(family, pack("widgets").values(family, said), Materials())


def test_a_graph_that_is_older_than_its_nodes():
    """A choice of a node may since have brought further widgets, and a node may have got an optional one: the prompt is
    that of ComfyUI's own page (comfyui-frontend-package 1.49.6)."""
    codec = {"options": [{"key": "auto", "inputs": {"required": {}}}]}
    containers = {"options": [{"key": "auto", "inputs": {"required": {"codec": ["COMFY_DYNAMICCOMBO_V3", codec]}}}]}
    info = {
        "SaveVideo": {
            "required": {
                "video": ["VIDEO", {}],
                "filename_prefix": ["STRING", {}],
                "format": ["COMFY_DYNAMICCOMBO_V3", containers],
            },
            "optional": {"codec": ["COMFY_DYNAMICCOMBO_V3", codec], "bit_depth": ["INT", {"default": 8}]},
        }
    }
    node = {"id": 1, "type": "SaveVideo", "widgets_values": ["talk", "auto", "auto"], "inputs": []}
    (made,) = to_prompt({"nodes": [node], "links": []}, info).values()
    said = {"filename_prefix": "talk", "format": "auto", "format.codec": "auto", "codec": "auto", "bit_depth": 8}
    assert made["inputs"] == said
    with pytest.raises(ValueError, match="more values than widgets"):
        to_prompt({"nodes": [{**node, "widgets_values": ["talk", "auto", "auto", "auto", 8, 9]}], "links": []}, info)
