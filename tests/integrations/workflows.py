# SPDX-License-Identifier: Apache-2.0
"""A workflow as ComfyUI's frontend saves it, as the prompt that its server takes."""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def to_prompt(graph: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a workflow.

    Args:
        graph: with `nodes`, whose widgets have values in their order, and `links`.
        info: inputs of nodes by their class, `{"required": {name: (type, about)}, "optional": ...}`.

    Raises:
        ValueError: values and widgets of a node do not fit.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    return {str(node["id"]): _node(node, info, sources) for node in graph["nodes"] if node["type"] not in NOTES}


def _node(node: dict[str, Any], info: dict[str, Any], sources: dict[int, Any]) -> dict[str, Any]:
    values, inputs = list(node["widgets_values"]), {}
    types = info[node["type"]]
    for name, (kind, *about) in {**types.get("required", {}), **types.get("optional", {})}.items():
        if not isinstance(kind, list) and kind not in WIDGETS:
            continue
        if not values:
            raise ValueError(f"{node['type']}: no value for {name}")
        inputs[name] = values.pop(0)
        if about and about[0].get("control_after_generate"):
            values.pop(0)
        if about and any(word.endswith("_upload") for word in about[0]):
            values.clear()  # its buttons
    if values and values != [None]:
        raise ValueError(f"{node['type']}: more values than widgets: {values}")
    for slot in node["inputs"]:
        if slot["link"] is not None:
            inputs[slot["name"]] = sources[slot["link"]]
    return {"class_type": node["type"], "inputs": inputs}
