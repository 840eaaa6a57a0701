# SPDX-License-Identifier: Apache-2.0
"""One configuration for a run: dataclasses, read from a TOML file, overridden by options like `--optim.lr 1e-3`.

The sections are the defaults of every stage. A `[[stages]]` table of the file changes what is different in a stage;
`Config.stages` are the stages with everything filled in. docs/stages.md explains them.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from training.checks import (
    check_finite,
    check_held_out,
    check_model,
    check_not_held_out,
    check_parallel,
    check_run,
    check_sample,
    check_sources,
    check_stage,
)
from training.sections import (
    BatchConfig,
    CheckpointConfig,
    ConditionsConfig,
    DataConfig,
    HeldOutConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    Ramp,
    RunConfig,
    SampleConfig,
    StageConfig,
)
from training.tables import changes, fill

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    held_out: HeldOutConfig = field(default_factory=HeldOutConfig)
    log: LogConfig = field(default_factory=LogConfig)
    stage_tables: Annotated[list[dict[str, Any]], tyro.conf.Suppress] = field(default_factory=list)  # `[[stages]]`

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """The stages, made anew from the sections and `stage_tables`: change those, not what this returns.

        Raises:
            ValueError: a table has an unknown key, a wrong type or a value that makes no sense.
        """
        values = asdict(self)
        values["stages"] = values.pop("stage_tables")
        check_finite(values)
        check_model(self.model)
        check_parallel(self.parallel)
        check_run(self.run, self.checkpoint, self.log)
        check_sample(self.sample)
        check_sources(self.data.sources)
        check_held_out(self.held_out, self.data.sources)
        stages = tuple(self._stage(i, table) for i, table in enumerate(self.stage_tables or [{}]))
        for i, stage in enumerate(stages):
            if stage.name in [other.name for other in stages[:i]]:
                raise ValueError(f"stages.{i}.name must differ from the other stages', got {stage.name!r} twice")
        return stages

    def _stage(self, index: int, table: dict[str, Any]) -> StageConfig:
        name = table.get("name", "train" if len(self.stage_tables) < 2 else f"stage{index}")
        timed = "steps" in table or "minutes" in table
        stage = _Draft(
            name=name,
            steps=0 if timed else self.run.steps,
            minutes=0.0 if timed else self.run.minutes,
            train=["*lora_*"] if self.lora.rank > 0 else ["*"],
            mix=copy.copy(self.data.mix)
            or {name: 1.0 for name in self.data.sources if name not in self.held_out.sources},
            batch=copy.deepcopy(self.batch),
            optim=copy.deepcopy(self.optim),
            conditions=copy.deepcopy(self.conditions),
            objective=copy.deepcopy(self.objective),
        )
        where = f"stages.{name}."
        fill(stage, table, where)
        made = StageConfig(**vars(stage))
        check_stage(made, self.data.sources, where)
        check_not_held_out(made, self.held_out, where)
        return made


@dataclass
class _Draft:
    """A stage being filled in: the fields of StageConfig, not frozen."""

    name: str
    steps: int
    minutes: float
    train: list[str]
    mix: dict[str, Ramp]
    batch: BatchConfig
    optim: OptimConfig
    conditions: ConditionsConfig
    objective: ObjectiveConfig
    freeze: list[str] = field(default_factory=list)
    zero: list[str] = field(default_factory=list)


def read_toml(file: Path) -> Config:
    """Read a configuration; keys left out keep their defaults.

    Raises:
        ValueError: the file cannot be read, or has a key that no dataclass has, a value of the wrong type, or one that
            makes no sense; the message names file, table and key.
    """
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"configuration {file} cannot be read: {error}") from error
    return _from_values(values, file)


def read_json(file: Path) -> Config:
    """Read what `write_json` wrote; raises as `read_toml`."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"configuration {file} cannot be read: {error}") from error
    return _from_values(_without_none(values), file)


def _without_none(values: Any) -> Any:
    """Tables without the keys that have no value: a key that is left out has its default, which is None there."""
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return values


def _from_values(values: dict[str, Any], file: Path) -> Config:
    tables = values.pop("stages", [])
    config = Config()
    try:
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise ValueError("stages must be [[stages]] tables")
        if "stage_tables" in values:
            raise ValueError("unknown key stage_tables; stages are [[stages]] tables")
        fill(config, values)
        config.stage_tables = tables
        _ = config.stages
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def _stage_options(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split off `--stages.WHICH.key values`: the rest, and per WHICH the options without that prefix."""
    rest: list[str] = []
    stages: dict[str, list[str]] = {}
    into = rest
    for argument in arguments:
        match = re.match(r"--stages\.([\w-]+)\.(.+)", argument)
        if match:
            into = stages.setdefault(match[1], [])
            argument = f"--{match[2]}"
        elif argument.startswith("--"):
            into = rest
        into.append(argument)
    return rest, stages


def _override_stage(config: Config, which: str, arguments: list[str]) -> None:
    """Change a stage, given by number or name, by options; they land in its table."""
    stages = config.stages
    names = [stage.name for stage in stages]
    if which not in names and not (which.isdecimal() and int(which) < len(names)):
        raise ValueError(f"--stages.{which}: there is no such stage; stages: {', '.join(names)}")
    index = names.index(which) if which in names else int(which)
    changed = _tidy(tyro.cli(StageConfig, prog=f"--stages.{which}", args=arguments, default=stages[index]))
    config.stage_tables = config.stage_tables or [{}]
    config.stage_tables[index] = _merged(config.stage_tables[index], changes(stages[index], changed))


def _tidy(section: Any) -> Any:
    """Undo tyro's reading of one number for a dictionary's ramp: it takes the type of the old value, a tuple."""
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            _tidy(value)
        elif isinstance(value, dict):
            value.update({key: v[0] for key, v in value.items() if isinstance(v, tuple) and len(v) == 1})
    return section


def _merged(table: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    sections = ("batch", "optim", "conditions", "objective", "anchors")
    inner = {key: _merged(table.get(key, {}), value) for key, value in more.items() if key in sections}
    return {**table, **more, **inner}


def parse(arguments: list[str] | None = None) -> Config:
    """`--config file.toml` (or the .json beside a checkpoint) first, then dotted overrides.

    `--optim.lr 1e-3` changes the section, so every stage that does not set the key itself; `--stages.0.steps 10` or
    `--stages.speech.optim.lr 1e-4` changes one stage.

    Raises:
        ValueError: the file or the result makes no sense.
        SystemExit: of tyro, for an option that does not exist and for --help.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    base = Config()
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise ValueError("--config needs a file name")
        file = Path(arguments[at + 1])
        base = read_json(file) if file.suffix == ".json" else read_toml(file)
        del arguments[at : at + 2]
    general, of_stages = _stage_options(arguments)
    note = (
        "Also --stages.WHICH.KEY for one stage, by number or name: --stages.0.steps 10, --stages.speech.optim.lr 1e-5"
    )
    config = _tidy(tyro.cli(Config, args=general, default=base, description=note))
    for which, options in of_stages.items():
        _override_stage(config, which, options)
    _ = config.stages
    return config


def write_json(config: Config, file: Path) -> None:
    """The configuration as it ran, with its stages filled in, beside every checkpoint."""
    values = asdict(config)
    del values["stage_tables"]
    values["stages"] = [asdict(stage) for stage in config.stages]
    file.write_text(json.dumps(values, indent=1, default=str, allow_nan=False) + "\n")
