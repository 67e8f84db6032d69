"""Experiment trackers (`config.tracker`), which receive a copy of the metrics.

Reports do not need a tracker, because they read the JSONL files that every run writes (see
mi.training.logger). A tracker receives the project, the name of the run directory, and an id, which
tracker.json stores so that a resumed run continues in the tracker. Two trackers work without a
network: wandb with WANDB_MODE=offline, and trackio, which uses a local database unless
TRACKIO_SPACE_ID names a Space.
"""

import importlib
import importlib.util
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Protocol

from mi.config import UserError, suggest, suggest_install
from mi.registry import Registry, is_reference
from mi.training.io import read_json, write_json

PROJECT = 'mi'  # unless WANDB_PROJECT names another


class Wandb:
    """A tracker for Weights & Biases, which plots metrics over the step of the run."""

    def __init__(self, path: pathlib.Path, id: str, config: dict[str, object], continued: bool):
        self.continued = continued
        wandb = importlib.import_module('wandb')
        try:
            self._run = wandb.init(
                project=os.environ.get('WANDB_PROJECT', PROJECT),
                dir=path,
                name=path.name,
                group=path.parent.name,
                id=id,
                resume='allow',
                config=config,
                settings=wandb.Settings(console='off'),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"config.tracker = 'wandb': {' '.join(str(error).split())}. Run `wandb login`, "
                f'or set WANDB_MODE=offline'
            ) from error
        self._run.define_metric('*', step_metric='step')

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({'step': step, **scalars})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A tracker for Hugging Face's trackio, with a local database or a Space."""

    def __init__(self, path: pathlib.Path, id: str, config: dict[str, object], continued: bool):
        self.continued = continued
        trackio = importlib.import_module('trackio')
        run_name, group = f'{path.name}-{id}', path.parent.name
        self._run = trackio.init(
            PROJECT, name=run_name, group=group, config=config, resume='allow', embed=False
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class Tracker(Protocol):
    """A tracker, which receives a copy of the metrics.

    Attributes:
      continued: whether the tracker already has the previous metrics of the run. If so, records
        that a killed run wrote after its last checkpoint are not sent again, because trackers
        cannot remove records.
    """

    continued: bool

    def write(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


TrackerMaker = Callable[[pathlib.Path, str, dict[str, object], bool], Tracker]
TRACKERS: Registry[TrackerMaker | None] = Registry(none=None, wandb=Wandb, trackio=Trackio)
"""Name, or 'package.module:Class' → constructor (run directory, id, config, continued)."""


def check_tracker(value: object) -> str:
    """Return a description of valid values of config.tracker, or '' if the value is valid."""
    if not isinstance(value, str) or value not in TRACKERS:
        return f'one of the known trackers; {suggest(str(value), TRACKERS)}'
    is_package = value != 'none' and not is_reference(value)
    if is_package and importlib.util.find_spec(value) is None:
        return f"an installed tracker. Try {suggest_install(value)}, or config.tracker = 'none'"
    return ''


def start_tracker(
    tracker_name: str, path: pathlib.Path, config: dict[str, object]
) -> Tracker | None:
    """Start the tracker of a new or resumed run, or return None for the tracker 'none'."""
    make_tracker = TRACKERS[tracker_name]
    if make_tracker is None:
        return None
    id_file = path / 'tracker.json'
    record = read_json(id_file, missing={})
    continued = bool(record) and record.get('name', tracker_name) == tracker_name
    tracker_id = record.get('id') or secrets.token_hex(4)
    tracker = make_tracker(path.resolve(), tracker_id, config, continued)
    # Write this last: a tracker that failed to start has not got any records.
    write_json(id_file, {'id': tracker_id, 'name': tracker_name})
    return tracker
