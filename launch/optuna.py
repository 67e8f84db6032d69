"""Search the space of a sweep with Optuna on this machine, with one run per trial.

    python -m launch.optuna --sweep=my_search.py --workdir=runs/search --parallel=2
    python -m launch.optuna --sweep=… --workdir=… --sampler=CmaEsSampler --gpus=1 --retries=1

Install the extra `optuna` first. The sweep file has SPACE and COUNT, as for a random search.
Whenever a slot is free, the launcher asks Optuna for the next trial, which becomes the member
trial=0000, trial=0001, …. When a member is done, it tells Optuna the last METRIC of SPLIT, averaged
over seeds. A trial without a finite value counts as failed, and Optuna ignores it.

WORKDIR/optuna.jsonl is Optuna's journal. If a search was killed, the same command continues it:
trials keep their values, unfinished members resume, and Optuna is told any missing results. To
continue a finished search, raise COUNT. The values of a trial depend on SEED, its index and the
results so far. With `--parallel=1`, a search that was killed and continued therefore has the same
trials as one that was never killed.

Source: Akiba et al., *Optuna* (KDD 2019).
"""

import importlib
import json
import math
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import local, records, search_space, state, sweep, sweep_file
from launch.members import Member, Overrides, make_command
from launch.search_space import Choice, Distribution, Integer, Space, Uniform
from launch.supervision import supervise
from mi.config import (
    UserError,
    describe_difference,
    find_added,
    flatten,
    format_error,
    suggest,
    suggest_install,
)
from mi.registry import import_object, is_reference
from mi.training.io import write_json
from mi.training.run_metric import MetricAppender
from mi.training.run_state import STOP_MARK

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SAMPLER = flags.DEFINE_string(
    'sampler',
    'TPESampler',
    'TPESampler, RandomSampler, CmaEsSampler, GPSampler, or package.module:Class; it gets a seed.',
)
SAMPLERS = ('TPESampler', 'RandomSampler', 'CmaEsSampler', 'GPSampler')  # one per trial is enough
JOURNAL = 'optuna.jsonl'
MEMBER = 'member'  # the user attribute of a trial with the name of its member


def import_optuna() -> types.ModuleType:
    """Import Optuna.

    Raises:
      UserError: if Optuna is not installed.
    """
    try:
        return importlib.import_module('optuna')
    except ImportError as error:
        raise UserError(
            f'launch.optuna needs Optuna, which is not installed. Try {suggest_install("optuna")}'
        ) from error


def make_sampler(name: str, seed: int) -> 'BaseSampler':
    """Make a sampler by the name of its class.

    Raises:
      UserError: if there is no such class, or its constructor needs more than a seed.
    """
    samplers = import_optuna().samplers
    if is_reference(name):
        try:
            constructor = import_object(name)
        except ValueError as error:
            raise UserError(f'--sampler={error}') from error
    elif name in SAMPLERS:
        constructor = getattr(samplers, name)
    else:
        raise UserError(f'--sampler={name}: {suggest(name, SAMPLERS)}')
    try:
        sampler: BaseSampler = constructor(seed=seed)
    except (ImportError, TypeError) as error:
        raise UserError(
            f'--sampler={name}: expected a class that needs only a seed ({format_error(error)})'
        ) from error
    return sampler


def make_distributions(space: Space) -> 'dict[str, BaseDistribution]':
    """Convert the distributions of a space to Optuna's, where a choice becomes `repr(value)`."""
    distributions = import_optuna().distributions

    def convert(entry: Distribution) -> 'BaseDistribution':
        if isinstance(entry, Choice):
            return distributions.CategoricalDistribution([repr(value) for value in entry.values])
        if isinstance(entry, Integer):
            return distributions.IntDistribution(entry.low, entry.high, log=entry.log)
        if isinstance(entry, Uniform):
            return distributions.FloatDistribution(entry.low, entry.high, log=entry.log)
        raise UserError(f'SPACE: {entry!r}: expected uniform, log_uniform, integer or choice')

    return {key: convert(space[key]) for key in search_space.list_searched_keys(space)}


def make_overrides(space: Space, params: Mapping[str, Any]) -> Overrides:
    """Return the overrides of a trial, which are its values and the constants of the space."""
    overrides = {}
    for key, entry in space.items():
        if isinstance(entry, Choice):
            overrides[key] = next(v for v in entry.values if repr(v) == params[key])
        elif isinstance(entry, Uniform):
            overrides[key] = search_space.round_float(params[key], entry)
        else:
            overrides[key] = params[key] if isinstance(entry, Distribution) else entry
    return sweep_file.to_plain(overrides)


def read_objective(run_dir: pathlib.Path, metric: str, split: str) -> float:
    """Return the last metric of a run, averaged over seeds. NaN if a seed has none or diverged."""
    file = run_dir / 'metrics.jsonl'
    rows = records.read_records(file, records.METRICS, tail=records.WHOLE_FILE)
    finals: dict[Any, Any] = {}  # seed → its last value, or None
    for row in MetricAppender(metric, {split}).append(rows):
        if row['split'] == split:
            seed = row.get('seed')
            finals[seed] = row.get(metric, finals.get(seed))
    values = [math.nan if value is None else float(value) for value in finals.values()]
    return sum(values) / len(values) if values else math.nan


class Search:
    """The trials of a search, which `supervise` runs as the members of a sweep.

    Args:
      workdir: directory of the sweep.
      description: content of sweep.json without members.
      space: SPACE of the sweep file.
      seed: SEED of the sweep file.
      count: COUNT of the sweep file.
      sampler: class name of the sampler.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        description: Mapping[str, Any],
        space: Space,
        seed: int,
        count: int,
        sampler: str,
    ):
        self._workdir, self._description, self._space = workdir, description, space
        self._seed, self._sampler = seed, sampler
        self._distributions = make_distributions(space)
        self._names = [f'trial={index:04d}' for index in range(count)]
        self._study = open_study(workdir, description['lower_is_better'])
        self._trials: dict[str, FrozenTrial] = {}  # member → trial that was asked
        self._close_unnamed_trials()
        self._refresh()

    def names(self) -> list[str]:
        return self._names

    def run_dir(self, name: str) -> pathlib.Path:
        return self._workdir / name

    def command(self, name: str) -> list[str]:
        return self._make_member(name).command

    def prepare(self, name: str) -> None:
        """Ask Optuna for the trial of a member, unless an earlier launcher already did."""
        self.tell_results()
        if name in self._trials:
            return
        trial_seed = search_space.derive_seed(self._seed, name)
        self._study.sampler = make_sampler(self._sampler, trial_seed)
        try:
            trial = self._study.ask(self._distributions)
        except ImportError as error:  # of packages that only some samplers need
            raise UserError(f'--sampler={self._sampler}: {format_error(error)}') from error
        trial.set_user_attr(MEMBER, name)  # from here on the trial has a member
        self._refresh()
        self.write_sweep()

    def should_stop(self, name: str) -> bool:
        return (self.run_dir(name) / STOP_MARK).exists()

    def handle_exit(self, name: str, phase: str, had_to_stop: bool) -> None:
        self.tell_results()

    def tell_results(self) -> None:
        """Tell Optuna the results of members that are done, except for those it already knows."""
        metric, split = self._description['metric'], self._description['split']
        for name, trial in self._trials.items():
            is_done = state.read_status(self.run_dir(name)).get('state') == 'done'
            if trial.state.is_finished() or not is_done:
                continue
            objective = read_objective(self.run_dir(name), metric, split)
            if math.isfinite(objective):
                self._study.tell(trial.number, objective)
            else:
                self._study.tell(trial.number, state=import_optuna().trial.TrialState.FAIL)
        self._refresh()

    def write_sweep(self) -> None:
        """Write the members so far to sweep.json, which the report reads."""
        members = [sweep.describe_member(self._make_member(name), None) for name in self._trials]
        write_json(self._workdir / 'sweep.json', {**self._description, 'members': members})

    def summary(self) -> str:
        """Summarize the number of trials with a result and the best trial in one line."""
        results = {
            name: trial.value
            for name, trial in self._trials.items()
            if trial.state.is_finished() and trial.value is not None
        }
        if not results:
            return 'optuna: no trial has a result'
        choose = min if self._description['lower_is_better'] else max
        best = choose(results, key=lambda name: results[name])
        overrides = make_overrides(self._space, self._trials[best].params)
        values = ', '.join(f'{key}={overrides[key]}' for key in self._distributions)
        value = f'{self._description["metric"]} {results[best]:.6g}'
        return f'optuna: {len(results)} trials, the best is {best} with {values}: {value}'

    def _make_member(self, name: str) -> Member:
        overrides = make_overrides(self._space, self._trials[name].params)
        values = ', '.join(str(overrides[key]) for key in self._distributions)
        command = make_command(self._description['config'], overrides, self.run_dir(name))
        return Member(name, f'{name.partition("=")[2]}: {values}', command, overrides)

    def _refresh(self) -> None:
        """Read the trials that have a member, in the order in which Optuna made them."""
        trials = self._study.get_trials(deepcopy=False)
        self._trials = {t.user_attrs[MEMBER]: t for t in trials if MEMBER in t.user_attrs}

    def _close_unnamed_trials(self) -> None:
        """Close trials that a killed launcher has left without a member."""
        for trial in self._study.get_trials(deepcopy=False):
            if MEMBER not in trial.user_attrs and not trial.state.is_finished():
                self._study.tell(trial.number, state=import_optuna().trial.TrialState.FAIL)


def open_study(workdir: pathlib.Path, lower_is_better: bool) -> 'Study':
    """Open the study in the journal of a sweep directory, or create it."""
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = optuna.storages.journal.JournalFileBackend(str(workdir / JOURNAL))
    study: Study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
        study_name='search',
        direction='minimize' if lower_is_better else 'maximize',
        load_if_exists=True,
    )
    return study


def describe_search(file: str, workdir: pathlib.Path, module: types.ModuleType) -> dict[str, Any]:
    """Check the sweep file of a search, and return the content of sweep.json without members.

    Raises:
      UserError: if the file lacks SPACE or COUNT or defines sweep(), if the runs will not record
        METRIC, or if the directory holds a different sweep.
    """
    if hasattr(module, 'sweep') or not hasattr(module, 'SPACE') or not hasattr(module, 'COUNT'):
        raise UserError(f'--sweep={file}: expected SPACE and COUNT without sweep(), for a search')
    if module.BASELINE is not None:
        raise UserError(
            f'--sweep={file}: BASELINE = {module.BASELINE!r}: expected None, because the arms of a '
            f'search are not known before it runs'
        )
    members = draw_members(workdir, module)[:1]
    configs = {member.name: member.config for member in members}
    description = sweep.describe(file, module, members, configs)
    description |= sweep.describe_command(file, workdir, 'optuna')
    del description['members']

    # Continue only the search that the directory holds.
    if (workdir / 'sweep.json').exists():
        sweep_file = state.read_sweep_file(workdir, {'name': str, 'members': list})
        comparable = json.loads(json.dumps(description))
        for key in ('engine', 'config', 'metric', 'split', 'lower_is_better', 'space'):
            if sweep_file.get(key) != comparable[key]:
                raise UserError(
                    f'--workdir={workdir} holds a different sweep or search: its {key} differs '
                    f'from that in {file}. Use another --workdir'
                )
        base = flatten(sweep_file.get('base', {}))
        base |= find_added(base, comparable['base'])
        if change := describe_difference(base, comparable['base']):
            raise UserError(
                f'--workdir={workdir} holds a search with a different config: {change}. Use '
                f'another --workdir'
            )
    return description


def draw_members(workdir: pathlib.Path, module: types.ModuleType) -> Sequence[Member]:
    """Draw as many random members as there will be trials, for a dry run."""
    drawn = search_space.sample(module.SPACE, module.COUNT, getattr(module, 'SEED', 0))
    members = []
    for index, changes in enumerate(map(sweep_file.to_plain, drawn)):
        name = f'trial={index:04d}'
        command = make_command(module.CONFIG, changes, workdir / name)
        members.append(Member(name, name, command, changes))
    return members


def run() -> None:
    """Run `python -m launch.optuna`, which ends with the best trial and the report."""
    from launch import cli

    # Check the flags and the sweep.
    import_optuna()
    if cli.ASHA.value:
        raise UserError(
            '--asha: launch.optuna compares trials only when they are done. Try launch.local, '
            'which draws random members from SPACE'
        )
    file, workdir = cli.get_paths()
    module = sweep_file.load_module(file)
    description = describe_search(file, workdir, module)
    seed = getattr(module, 'SEED', 0)
    make_sampler(SAMPLER.value, seed)
    if cli.DRY_RUN.value:
        print('random members, in place of trials, which depend on results')
        members = draw_members(workdir, module)
        cli.dry_run(members, workdir, local.find_devices(cli.get_resources()))
        return

    # Run the trials.
    workdir.mkdir(parents=True, exist_ok=True)
    resources = cli.get_resources()
    with cli.lock_sweep(workdir):
        search = Search(workdir, description, module.SPACE, seed, module.COUNT, SAMPLER.value)
        search.tell_results()
        search.write_sweep()
        phases = supervise(search, local.Slots(resources), resources.retries)
        search.write_sweep()

    print(search.summary(), file=sys.stderr)
    states = {search.run_dir(name): phase for name, phase in phases.items()}
    cli.finish(file, workdir, states, len(phases))


if __name__ == '__main__':
    from launch import cli

    cli.start(run)
