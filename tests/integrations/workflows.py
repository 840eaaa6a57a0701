# SPDX-License-Identifier: Apache-2.0
"""A workflow as ComfyUI's frontend saves it, as the prompt that its server takes."""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
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
    values = list(node["widgets_values"])
    inputs = _widgets(info[node["type"]], values, node["type"])
    if values and values != [None]:
        raise ValueError(f"{node['type']}: more values than widgets: {values}")
    for slot in node["inputs"]:
        if slot["link"] is not None:
            inputs[slot["name"]] = sources[slot["link"]]
    return {"class_type": node["type"], "inputs": inputs}


def _widgets(types: dict[str, Any], values: list[Any], where: str) -> dict[str, Any]:
    """Values by the names of widgets, taken off the front of the list.

    A graph may be older than its node: an optional widget for which there is no value has its default, as on the page.
    """
    inputs = {}
    for name, (kind, *about) in {**types.get("required", {}), **types.get("optional", {})}.items():
        if not isinstance(kind, list) and kind not in (*WIDGETS, DYNAMIC):
            continue
        more = about[0] if about else {}
        if not values and name not in types.get("optional", {}):
            raise ValueError(f"{where}: no value for {name}")
        if kind == DYNAMIC:  # a choice that brings widgets of its own
            chosen = inputs[name] = values.pop(0) if values else more["options"][0]["key"]
            brought = next(option["inputs"] for option in more["options"] if option["key"] == chosen)
            below = _widgets(brought, values, f"{where} {name}")
            inputs |= {f"{name}.{inner}": value for inner, value in below.items()}
            continue
        inputs[name] = values.pop(0) if values else more["default"]
        if more.get("control_after_generate"):
            values.pop(0)
        if any(word.endswith("_upload") for word in more):
            values.clear()  # its buttons
    return inputs
