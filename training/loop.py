# SPDX-License-Identifier: Apache-2.0
"""The training loop: through the stages of a run, from wherever the last checkpoint left it.

A step takes `batch.count` micro-batches over all ranks together. Everything random about a sample follows from the seed
and the sample's number in the run, so losses do not depend on how many ranks there are, nor on where a run was stopped.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from talkingdit.distributed.team import from_rank_0
from talkingdit.plan.transformer import Transformer
from training.build import sharded_networks
from training.checkpoint import Checkpoints, restoring
from training.checkpoint_files import CONFIG
from training.config import Config, read_json, write_json
from training.differences import differences, in_words
from training.ema import Ema
from training.export import check_export, export
from training.guard import Guard
from training.held_out import HeldOut, held_items
from training.loader import Loader, check_share
from training.metrics import Means, Meter, Writer, stated_speed, sum_over_ranks, work_of
from training.model_state import ModelState, OptimizerState
from training.objective import losses
from training.optim import LearningRate, build_optimizers
from training.parallel import (
    ProcessMesh,
    clip_gradients,
    computes_in,
    last_micro_batch,
    reshard,
    slow_in_bfloat16,
    trainable_changed,
)
from training.profiling import Profile
from training.signals import Stop
from training.sources import open_sources
from training.stages import Progress, averaged_names, select_parameters, trained_names, zero_parameters
from training.validate import validate, validator_for


class Trainer:
    """State of a run. `run()` trains until the stages are done, or until somebody asks to stop."""

    def __init__(self, config: Config, mesh: ProcessMesh) -> None:
        self.config, self.mesh = config, mesh
        # What is wrong with data or later stages shows before a large model is read.
        for stage in config.stages:
            check_share(stage, mesh.data_size)
        check_export(config)
        self.sources = open_sources(config)
        save = config.checkpoint
        self.checkpoints = Checkpoints(
            config.run.out / "checkpoints", save.keep, save.asynchronous, lambda file: write_json(config, file)
        )
        self.held = held_items(self.sources, config.held_out)
        saved = self.checkpoints.peek()
        self.networks = sharded_networks(config, mesh, resumes=saved is not None)
        self.say_dtype()
        self.trained = trained_names(config, self.networks)
        kept = set() if saved is None else set(saved.get("averages") or ())  # also where none are asked for any more
        self.ema = Ema(self.networks, 0.0, averaged_names(config, self.trained) | kept)
        self.validator = validator_for(config, mesh)
        self.held_out = HeldOut(self.sources, self.held, config.held_out, config.model.clip_latents)
        self.guard = Guard()
        self.latest: dict[str, str] = {}  # of the last validation
        self.means = Means()
        self.meter = Meter(mesh.device, mesh.world, stated_speed(mesh.device))
        self.progress = Progress(config.stages)
        if saved is not None:
            with restoring(self.checkpoints.folder, "progress"):
                self.progress.load_state_dict(saved["progress"])
        self.begin_stage(None if saved is None else saved.get("data"))
        if saved is not None:
            self.checkpoints.load(self.state())
            with restoring(self.checkpoints.folder, "guard"):
                self.guard.load_state_dict(saved["guard"])
            self.say(f"{'was done' if self.progress.done else 'goes on'} after step {self.progress.total}")
            self.say_differences()

    # ---- A stage -----------------------------------------------------------------------------------------------------

    def begin_stage(self, data: dict[str, Any] | None) -> None:
        """What trains, on what and how fast; `data`: where the loader before, or that of a checkpoint, had come to."""
        stage = self.stage = self.progress.stage
        reshard(self.networks)  # units without gradients may still be gathered, and what is gathered is a copy
        trained = select_parameters(self.networks, stage)
        trainable_changed(self.networks)
        if self.progress.enter():
            zero_parameters(self.networks, stage)
            self.say(f"stage {stage.name}: {trained}")
        self.optimizers = build_optimizers(self.networks, stage.optim)
        self.learning_rate = LearningRate(self.optimizers, stage.optim)
        self.optimizer_state = OptimizerState(self.networks, self.optimizers)
        self.guard.factor, self.ema.decay = stage.optim.spike, stage.optim.ema
        settings, family, context = self.networks.transformer.config, self.networks.family.train, self.mesh.context
        self.loader = Loader(
            self.sources,
            stage,
            self.config.run.seed,
            self.mesh.data_rank,
            self.mesh.data_size,
            peers=None if context is None else context.group,
            device=self.mesh.device,
            workers=self.config.data.workers,
            prefetch=self.config.data.prefetch,
            clip_latents=self.config.model.clip_latents,
            count_tokens=partial(family.count_tokens, settings),
            attention_tokens=family.attention_tokens(settings),
            max_groups=family.MAX_GROUPS,
            pin_memory=self.mesh.device.type == "cuda",
            held=self.held,
        )
        if data is not None:
            with restoring(self.checkpoints.folder, "data"):
                self.loader.load_state_dict(data)

    def train_step(self) -> None:
        """One step of the optimisers."""
        config, stage, mesh, progress = self.config, self.stage, self.mesh, self.progress
        batches = next(self.loader)
        transformer = Transformer.of(self.networks.family, self.networks.transformer.config)
        work = [work_of(batch, transformer) for batch in batches]
        # Peers in context parallelism hold the same samples; the count is of each sample once.
        weight = sum(sum(batch.weights) for batch in batches)
        sums = {"weight": weight, **{name: sum(w[name] for w in work) for name in work[0]}}
        sums = sum_over_ranks(sums, mesh.world // mesh.data_size)
        total = torch.zeros((), device=mesh.device)
        each: list[tuple[list[str], Tensor]] = []
        for i, batch in enumerate(batches):
            last_micro_batch(self.networks, i + 1 == len(batches))
            found = losses(self.networks, batch, stage, config.run.seed, progress.fraction, mesh)
            # Gradients are averaged over all ranks: see training/parallel.py.
            loss = found.total / max(1.0, sums["weight"])
            (loss * mesh.world).backward()
            total += loss.detach()
            self.means.add(found.parts)
            each.append((found.keys, found.each.detach()))
        norm = clip_gradients(self.networks, stage.optim.clip_norm)
        factor = self.learning_rate.set(progress.step, progress.fraction)
        if self.guard.allows(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            self.ema.update(progress.total)
        elif not math.isfinite(norm):
            self.guard.accuse(each, progress.total + 1)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        one = torch.ones((), device=mesh.device)
        self.means.add({"loss": (total * mesh.data_size, 1.0), "gradient_norm": (one * norm, 1.0)})
        self.means.add({"learning_rate_factor": (one * factor, 1.0)})
        self.meter.add(steps=1, samples=sums.pop("weight"), **sums)

    # ---- The run -----------------------------------------------------------------------------------------------------

    def run(self, stop: Stop | None = None) -> None:
        """Train to the end of the last stage, or until a stop is asked for; both leave a checkpoint."""
        config, progress, first = self.config, self.progress, self.mesh.rank == 0
        writer = Writer(config.run.out, progress.total, config.log, asdict(config)) if first else None
        bar = tqdm(
            total=100, disable=None if first else True, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}"
        )
        if progress.total == 0:
            self.measure(writer)
        with Profile(config.log, config.run.out, progress.total) as profile:
            while not progress.done and not (stop is not None and stop.agree()):
                started = time.perf_counter()
                self.train_step()
                profile.step()
                took = time.perf_counter() - started
                stage_ended = progress.advance(from_rank_0(partial(float, took)))
                if stage_ended or progress.total % config.log.every == 0:
                    self.report(writer, bar)
                if config.held_out.every and progress.total % config.held_out.every == 0 and not progress.done:
                    self.measure(writer)
                if config.sample.every and progress.total % config.sample.every == 0 and not progress.done:
                    self.validate(writer)
                data = self.loader.state_dict()
                if stage_ended and not progress.done:
                    self.loader.close()
                    self.begin_stage(data)
                if stage_ended or progress.total % config.checkpoint.every == 0:
                    self.save()
        self.save()
        self.checkpoints.wait()
        self.loader.close()
        if progress.done:
            self.measure(writer)
            self.validate(writer)
            with self.ema.swapped():
                export(self.networks, config, config.run.out / "model")
        bar.close()
        if writer is not None:
            writer.close()
        self.checkpoints.close()

    def report(self, writer: Writer | None, bar: tqdm[Any]) -> None:
        """Means and rates since the last report; every rank takes part, rank 0 writes."""
        values = self.means.collect() | self.meter.report()
        progress = self.progress
        values |= {"skipped/spikes": self.guard.spikes, "skipped/not_finite": self.guard.not_finite}
        values |= {f"data/{name}": value for name, value in self.loader.figures.items()}
        if writer is not None:
            writer.scalars(values, progress.total)
        bar.n = round(100 * progress.overall, 1)
        bar.set_postfix(stage=self.stage.name, step=progress.total, loss=f"{values['loss']:.4f}", **self.latest)

    def validate(self, writer: Writer | None) -> None:
        """Generate with the averaged weights and measure."""
        if self.validator is None:
            return
        paused = self.meter.pause()
        self.networks.eval()
        with self.ema.swapped():
            results = validate(self.validator, self.networks, writer, self.progress.total)
        self.networks.train()
        self.latest = {name: f"{value:.2f}" for name, value in results.items()}
        self.meter.go_on(paused)

    def measure(self, writer: Writer | None) -> None:
        """The loss of the averaged weights on clips that are held out, if the run has some."""
        if not self.config.held_out.every:
            return
        paused = self.meter.pause()
        self.networks.eval()
        with self.ema.swapped():
            losses = self.held_out.measure(self.networks, self.stage, self.mesh)
        self.networks.train()
        if writer is not None:
            writer.scalars(losses, self.progress.total)
        self.meter.go_on(paused)

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a checkpoint holds."""
        # What adapters are put on is read again from where it came, if nothing of it trains.
        select = self.trained.__contains__ if self.config.lora.rank > 0 else None
        return {
            "networks": ModelState(self.networks, select),
            "averages": self.ema,
            "optimizers": self.optimizer_state,
            "progress": self.progress.state_dict(),
            "data": self.loader.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def say_differences(self) -> None:
        """What is not as it was when the newest checkpoint was written."""
        newest = self.checkpoints.latest()
        if newest is None or self.mesh.rank != 0:
            return
        found = [*differences(read_json(newest / CONFIG), self.config), *self.loader.changed]
        if found:
            self.say(f"what trains is not as it was at {newest.name}: {in_words(found)}")

    def save(self) -> None:
        self.checkpoints.save(self.progress.total, self.state())

    def say_dtype(self) -> None:
        """Say what blocks compute in, where that is not bfloat16 by itself or takes much longer than it has to."""
        precision = self.config.parallel.precision
        dtype = computes_in(precision, self.mesh)
        if precision == "auto" and dtype == torch.float32:
            self.say("computes in float32, which is faster than bfloat16 on a processor without instructions for it")
        elif dtype == torch.bfloat16 and slow_in_bfloat16(self.mesh):
            self.say(
                "computes in bfloat16, for which this processor has no instructions: "
                'parallel.precision = "auto" takes float32, which is several times faster here'
            )

    def say(self, text: str) -> None:
        """Print a line, once and not through the progress bar."""
        if self.mesh.rank == 0:
            tqdm.write(f"training: {text}")
