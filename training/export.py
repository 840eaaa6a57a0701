# SPDX-License-Identifier: Apache-2.0
"""Trained weights as folders that others read; `python -m training.export RUN --out DIR` makes one of a checkpoint.

The family decides on the layout. Drawn characters: the folder that `talkingdit generate --checkpoint` loads. Wan-S2V:
that of the released checkpoints, config.json and safetensors. Adapters (LoRA): one safetensors file that PEFT,
diffusers and ComfyUI read; where other weights were trained beside them, all is merged into the model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from talkingdit.atomic import whole_folder
from talkingdit.checkpoints.bounds import check_bounds
from talkingdit.checkpoints.fill import build_empty
from talkingdit.checkpoints.saving import save_tensors
from talkingdit.errors import UserError
from training import parallel
from training.build import new_networks, sharded_networks
from training.checkpoint import Checkpoints, check_shapes, newest_complete
from training.checkpoint_files import CONFIG
from training.config import Config, read_json
from training.ema import Ema
from training.family import family_of, settings_of, train_run
from training.frozen import check_frozen
from training.lora import adapter_tensors
from training.model_state import ModelState, gather_state
from training.networks import Networks
from training.objective import empty_text
from training.one_run import written
from training.signals import run_guarded
from training.stages import trained_names

ADAPTER_FILE = "adapter.safetensors"


def check_export(config: Config) -> None:
    """Whether what the run makes can be written at its end. Before the run: weeks later is too late to hear of it.

    Also, because the networks are made for it (without weights): whether the patterns of all stages fit them, and
    whether the features of the empty prompt do.

    Raises:
        UserError, ValueError: it cannot, or they do not.
    """
    networks = new_networks(config, "meta")
    names = trained_names(config, networks)
    only_adapters = config.lora.rank > 0 and all(".lora_" in name for name in names)
    check_frozen(config.model, config.lora.rank, names)
    if networks.text_encoder is None:
        for stage in config.stages:
            empty_text(stage.conditions.empty_text, networks.transformer.config.text_dim)
    if not only_adapters:
        check: Any = getattr(family_of(config).train, "check_export", None)  # families of other packages may lack it
        if check is not None:
            check(settings_of(config), config.model.text_encoder, train_run(config))


def export(networks: Networks, config: Config, folder: Path) -> None:
    """Write the weights as they are now, in bfloat16, whole or not at all. Every rank calls it, rank 0 writes."""
    state = gather_state(networks, None if config.lora.rank > 0 else torch.bfloat16)

    def write_whole() -> None:
        with whole_folder(folder) as temporary:
            write(state, config, temporary)

    written(folder, write_whole, "export")


def write(state: Mapping[str, Tensor], config: Config, folder: Path) -> None:
    """Write whole weights, by their names in `Networks`, into a folder."""
    networks = new_networks(config, "meta")
    if config.lora.rank > 0:
        if all(".lora_" in name for name in trained_names(config, networks)):
            prefix = "transformer."
            values = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            tensors = adapter_tensors(networks.transformer, config.lora, values)
            tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
            save_tensors(tensors, folder / ADAPTER_FILE, {"format": "pt"})
            return
        networks.load_state_dict(dict(state), assign=True)
        networks.transformer.fuse_lora()
        networks.transformer.unload_lora()
    else:
        networks.load_state_dict(dict(state), assign=True)
    networks.to(torch.bfloat16).eval()
    networks.family.train.save(folder, networks.transformer, networks.text_encoder, train_run(config))


@dataclass
class ExportFlags:
    """Write the weights of a run's newest checkpoint for others to read."""

    run: Annotated[Path, tyro.conf.Positional]  # folder of the run, the one with checkpoints/ in it
    out: Path = Path("model")  # folder to write
    averages: bool = True  # the running averages of the weights, or the weights themselves


def main(options: ExportFlags) -> None:
    """Read the newest checkpoint on any number of processes and write it.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    _check_target(options.out)
    checkpoints = options.run / "checkpoints"
    newest = newest_complete(checkpoints)
    if newest is None:
        raise UserError(f"{checkpoints}: holds no complete checkpoint.")
    config = _read_config(newest, options.run)
    mesh = parallel.start(config.parallel, "auto")
    networks = sharded_networks(config, mesh, resumes=True)
    trained = trained_names(config, networks)
    reader = Checkpoints(checkpoints, keep=0, read_only=True)
    saved = reader.peek()
    assert saved is not None
    ema = Ema(networks, 0.0, saved.get("averages") or ())
    model = ModelState(networks, trained.__contains__ if config.lora.rank > 0 else None)
    step = reader.load({"networks": model, "averages": ema}, partly=True)
    if options.averages:
        with ema.swapped():
            export(networks, config, options.out)
    else:
        export(networks, config, options.out)
    if mesh.rank == 0:
        print(f"{options.out}: {'averaged ' if options.averages else ''}weights after step {step}")
    reader.close()
    parallel.stop()


def _check_target(out: Path) -> None:
    """Before weights are read: whether something else than a model is where one is to be written."""
    if out.is_dir():
        found = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if found and not any(path.suffix in (".json", ".safetensors") for path in out.rglob("*")):
            raise UserError(f"{out}: expected a new folder or one with an earlier model, got one with {found[0]!r}.")
    elif os.path.lexists(out):
        raise UserError(f"{out}: expected a new folder, got a file.")


def _read_config(checkpoint: Path, run: Path) -> Config:
    """The configuration of a checkpoint, which may come from anyone: nothing is written where it says, and the networks
    are those that the checkpoint holds before there is memory for them."""
    try:
        config = read_json(checkpoint / CONFIG)
        check_bounds({"model": asdict(config.model), "rank": config.lora.rank}, checkpoint / CONFIG)
        config.run.out = run
        config.parallel = type(config.parallel)(precision="fp32")  # all processes share the parameters
        networks = build_empty(lambda: new_networks(config, "meta"), checkpoint / CONFIG)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{error}") from error
    except RecursionError as error:
        raise UserError(f"{checkpoint / CONFIG}: nested too deeply to be a configuration.") from error
    select = trained_names(config, networks).__contains__ if config.lora.rank > 0 else None
    check_shapes(checkpoint, "networks", ModelState(networks, select).state_dict())
    return config


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(tyro.cli(ExportFlags))))
