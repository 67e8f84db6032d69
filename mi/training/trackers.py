"""Where else the metrics of a run are shown, by the word config.tracker.

JSONL and TensorBoard are always there (mi.training.logger) and are what reports read; a tracker
gets a copy. It is told the project, the run directory's name, and an id that tracker.json keeps, so
that a continued run goes on where it is. Whether it is online is its own affair:
WANDB_MODE=offline, and trackio, which keeps a local database unless TRACKIO_SPACE_ID names a Space,
need no network.
"""

import importlib
import importlib.util
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from mi.config import UserError, suggest, suggest_install

PROJECT = 'mi'  # where WANDB_PROJECT names no other


class Wandb:
    """Weights & Biases: metrics over their step; wandb's own step only counts records."""

    def __init__(self, path: pathlib.Path, id: str, config: dict[str, Any], continued: bool):
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
                f"config.tracker = 'wandb': {' '.join(str(error).split())}; run wandb login, or "
                f'set WANDB_MODE=offline'
            ) from error
        self._run.define_metric('*', step_metric='step')

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({'step': step, **values})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Hugging Face's trackio: a local database, or a Space."""

    def __init__(self, path: pathlib.Path, id: str, config: dict[str, Any], continued: bool):
        self.continued = continued
        trackio = importlib.import_module('trackio')
        name, group = f'{path.name}-{id}', path.parent.name
        self._run = trackio.init(
            PROJECT, name=name, group=group, config=config, resume='allow', embed=False
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Tracker(Protocol):
    """What gets a copy of the metrics.

    Attributes:
      continued: whether it was told what the run measured before. It is not told again what a
        killed run wrote after its last checkpoint: neither of the two can take a record back.
    """

    continued: bool

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


TRACKERS: dict[str, Callable[[pathlib.Path, str, dict[str, Any], bool], Tracker] | None] = {
    'none': None,
    'wandb': Wandb,
    'trackio': Trackio,
}


def check_tracker(value: Any) -> str:
    """A rule: one of TRACKERS, whose package is there."""
    if not isinstance(value, str) or value not in TRACKERS:
        return f'one of the known words; {suggest(str(value), TRACKERS)}'
    if value != 'none' and importlib.util.find_spec(value) is None:
        return f"its package, which is not installed. Try {suggest_install(value)}, or take 'none'"
    return ''


def start_tracker(word: str, path: pathlib.Path, config: dict[str, Any]) -> Tracker | None:
    """The tracker of a run directory, new or continued; None for 'none'."""
    make = TRACKERS[word]
    if make is None:
        return None
    file = path / 'tracker.json'
    told = json.loads(file.read_text()) if file.exists() else {'id': secrets.token_hex(4)}
    continued = file.exists() and told.get('name', word) == word
    file.write_text(json.dumps({'id': told['id'], 'name': word}) + '\n')
    return make(path.resolve(), told['id'], config, continued)
