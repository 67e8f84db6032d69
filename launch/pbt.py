"""Population based training, on this machine: the members of a sweep learn from each other.

    python -m launch.pbt --sweep=… --workdir=runs/population --interval=2000 --parallel=8 --gpus=1

Every `--interval` steps a member saves and stops. It looks at one other, drawn at random; if that
one's fitness is more than `--margin` better, it goes on from that one's newest checkpoint and with
its hyperparameters. Then each of `--perturb` is, with probability 1/3, multiplied by 1.2 or divided
by it, unless the config refuses what comes out. Nobody waits for anybody. The fitness is the newest
value of the sweep's METRIC, in its SPLIT; in its CURVES, where SPLIT is evaluated only at the end.

Where anything has changed it goes on in a run directory of its own, NAME.1, NAME.2, …, which begins
as a copy of where it comes from; `fork.json` in it has its parent and what differs. So every run
directory is still that of one config, and any of them can be looked at. What was decided stands in
WORKDIR/pbt.jsonl; the same command, given again, goes on from there.

Source: Espeholt et al., *IMPALA* (ICML 2018): the fitness is the mean capped score, the margin 5 %
absolute, and learning rate, entropy cost and RMSProp's ε are perturbed, whether a copy was made or
not. Recalled, as are the defaults.
"""

import contextlib
import itertools
import json
import math
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags

from launch import engine, local, metric_names, process, state, sweep
from launch.engine import Resources
from mi.config import Rule, UserError, flatten, suggest
from mi.fit import factory as fit
from mi.lm import config as lm
from mi.rl import config as rl
from mi.training import checkpoint
from mi.training.io import read_json, write_json
from mi.training.lock import is_locked

INTERVAL = flags.DEFINE_integer('interval', 0, 'Steps between two looks at another.', lower_bound=0)
MARGIN = flags.DEFINE_float('margin', 0.05, 'By how much another has to be better, absolute.')
PERTURB = flags.DEFINE_list(
    'perturb',
    None,
    'Hyperparameters that change, as keys of the config. Left out: learning rate, entropy cost and '
    'epsilon of agents, learning rate and weight decay of other models, those that are not 0.',
)
SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn at random.')

FACTOR, CHANCE = 1.2, 1 / 3
DEFAULTS = {  # task of a config → what --perturb is if left out
    'rl': ('optim.learning_rate', 'loss.entropy_cost', 'optim.eps'),
    'lm': ('optim.learning_rate', 'optim.weight_decay'),
    'fit': ('optim.learning_rate', 'optim.weight_decay'),
}
TRIES = 10  # looks at the checkpoints of a run that clears old ones away at the same time


def exploit(
    fitness: Mapping[str, float], member: str, margin: float, draw: random.Random
) -> str | None:
    """The other that a member copies; None if it goes on as it is.

    Args:
      fitness: of those that have one; larger is better.
      member: who looks.
      margin: by how much another has to be better.
      draw: where the other comes from.
    """
    others = sorted(fitness.keys() - {member})
    if member not in fitness or not others:
        return None
    other = draw.choice(others)
    return other if fitness[other] - fitness[member] > margin else None


def explore(values: Mapping[str, float], draw: random.Random) -> dict[str, float]:
    """The values, each changed with probability 1/3, as often upward as downward."""
    changed = dict(values)
    for key in values:
        if draw.random() < CHANCE:
            changed[key] *= FACTOR if draw.random() < 0.5 else 1 / FACTOR
    return changed


Configs = Mapping[str, ml_collections.ConfigDict]  # name of a member → its config


def hyperparameters(configs: Configs, keys: Sequence[str] | None) -> list[str]:
    """The keys that change: those that are given, or the defaults that all configs have.

    Raises:
      UserError: if a member cannot be trained in intervals, or a key of its config is none that a
        factor changes.
    """
    for name, config in configs.items():
        if config.task not in DEFAULTS:
            raise UserError(
                f'config.task = {config.task!r} of {name}: expected one of '
                f'{", ".join(DEFAULTS)}, which save checkpoints that others can go on from'
            )
    values = {name: flatten(config.to_dict()) for name, config in configs.items()}
    if keys is None:
        defaults = dict.fromkeys(
            key for config in configs.values() for key in DEFAULTS[config.task]
        )
        return [k for k in defaults if all(_is_scalable(of.get(k)) for of in values.values())]
    for key in keys:
        for name, of in values.items():
            if not _is_scalable(of.get(key)):
                known = [k for k, value in of.items() if _is_scalable(value)]
                value = f'{of[key]!r}' if key in of else 'no such key'
                raise UserError(
                    f'--perturb={key}: expected a number with a decimal point, other than 0, in '
                    f'the config of {name}: {value}; {suggest(key, known)}'
                )
    return list(keys)


def _is_scalable(value: Any) -> bool:
    """Whether a hyperparameter may be multiplied: an integer is a size, and 0 stays what it is."""
    return isinstance(value, float) and math.isfinite(value) and value != 0


def fitness_split(configs: Configs, metric: str, splits: Sequence[str], interval: int) -> str:
    """The first of the splits in which all members record the metric on their way.

    Args:
      configs: of the members.
      metric: METRIC.
      splits: SPLIT and CURVES.
      interval: steps between two looks at another.

    Raises:
      UserError: if there is none, or no member would ever look at another.
    """
    finder = metric_names.Finder(metric)
    found = {name: finder.splits(config) for name, config in configs.items()}
    for name, config in configs.items():
        steps, every = metric_names.steps(config), config.train.save_every
        look = -(-interval // every) * every
        if look >= steps:
            raise UserError(
                f'--interval={interval}: expected a look at another before the last step; {name} '
                f'has {steps} and saves every config.train.save_every = {every}. Try smaller ones'
            )
    for split in splits:
        recorded = [of[split] for of in found.values() if split in of]
        if len(recorded) == len(found) and all(of.every and of.has(metric) for of in recorded):
            last = min(map(metric_names.steps, configs.values()))
            if max(of.every for of in recorded) >= last:
                continue
            return split
    raise UserError(
        f'METRIC = {metric!r}: expected a number that is recorded before the last step, in SPLIT '
        f'or CURVES ({", ".join(dict.fromkeys(splits))}), as else no member has a fitness. Try a '
        f'smaller config.train.eval_every'
    )


class Population:
    """Where each member is, and what was decided; all of it in the sweep directory.

    Args:
      workdir: of the sweep.
      members: of the sweep; they are the first generation.
      margin, perturb, seed: see the flags.
      split: of the fitness; SPLIT if left out.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        members: Iterable[sweep.Member],
        margin: float,
        perturb: Iterable[str],
        seed: int,
        split: str = '',
    ):
        described = state.described(workdir, {'metric': str, 'split': str, 'lower_is_better': bool})
        self._metric, self._split = described['metric'], split or described['split']
        self._sign = -1 if described['lower_is_better'] else 1
        self._workdir, self._members = workdir, {m.name: m for m in members}
        self._margin, self._perturb, self._seed = margin, list(perturb), seed
        self._file = workdir / 'pbt.jsonl'
        names = dict.fromkeys(('member', 'from', 'to'), str)
        needs: state.Needs = {**names, 'step': int, 'overrides': dict}
        self._decisions = state.records(self._file, needs, most=2**62)
        for decision in self._decisions:  # one that was written down and not carried out
            self._fork(decision)

    def path(self, member: str) -> pathlib.Path:
        """The run directory that a member is in."""
        mine = [d['to'] for d in self._decisions if d['member'] == member]
        return self._workdir / (mine[-1] if mine else member)

    def looks(self, member: str, interval: int) -> bool:
        """Whether it has saved where it is to look at another, and has not come to its end."""
        mine = [d['step'] for d in self._decisions if d['member'] == member]
        at = (mine[-1] // interval + 1) * interval if mine else interval
        path = self.path(member)
        return at <= saved(path) < state.read(path).steps

    def command(self, member: str) -> list[str]:
        """What runs it where it is."""
        path = self.path(member)
        command = [a for a in self._members[member].command if not a.startswith('--workdir=')]
        if (path / 'fork.json').exists():
            changed = read_json(path / 'fork.json')['overrides']
            command = [a for a in command if a.partition('=')[0] not in _flags(changed)]
            command += [f'{flag}={value}' for flag, value in _flags(changed).items()]
        return [*command, f'--workdir={path}']

    def decide(self, member: str) -> None:
        """What a member that has saved does next."""
        path = self.path(member)
        draw = random.Random(f'{self._seed} {member} {saved(path)}')
        fitness = {}
        for name in self._members:
            scores = state.curve(self.path(name), self._metric, self._split)
            if scores and saved(self.path(name)):
                fitness[name] = self._sign * scores[max(scores)]
        other = exploit(fitness, member, self._margin, draw)
        parent = self.path(other) if other else path
        values = self._hyperparameters(parent)
        now = self._accepted(parent, values, explore(values, draw))
        decision = {
            'member': member,
            'step': saved(parent),
            'copied': other,
            'fitness': fitness.get(member),
            'from': parent.name,
            'to': self._next_name(member) if other or now != values else path.name,
            'overrides': now,
        }
        state.append(self._file, decision)
        self._decisions.append(decision)
        self._fork(decision)

    def summary(self) -> str:
        """What was decided, in a line: that nobody was compared is to be seen."""
        looks = [d for d in self._decisions if isinstance(d.get('fitness'), state.NUMBER)]
        if not looks:
            return (
                f'pbt: no member was compared, as none recorded {self._metric} of the '
                f'{self._split} split before it looked at another'
            )
        copies = sum(bool(d.get('copied')) for d in looks)
        return f'pbt: {len(looks)} looks at another, {copies} copies'

    def _next_name(self, member: str) -> str:
        """NAME.1, NAME.2, …, but for those of others, as x=0.1 is where x is 0 and 0.1."""
        generation = 1 + sum(d['member'] == member for d in self._decisions)
        taken = {*self._members, *(d['to'] for d in self._decisions)}
        names = (f'{member}.{"0" * zeros}{generation}' for zeros in itertools.count())
        return next(name for name in names if name not in taken)

    def _hyperparameters(self, path: pathlib.Path) -> dict[str, float]:
        config = _config(path)
        unknown = [key for key in self._perturb if not _is_scalable(config.get(key))]
        if unknown:
            raise UserError(f'--perturb={unknown[0]}: the config of {path} has no such number')
        return {key: config[key] for key in self._perturb}

    def _accepted(
        self, path: pathlib.Path, values: Mapping[str, float], now: Mapping[str, float]
    ) -> dict[str, float]:
        """The changed values, but for those that the config refuses, as a rate above 1."""
        rules = _rules(_config(path))
        return {
            key: values[key] if key in rules and rules[key](value) else value
            for key, value in now.items()
        }

    def _fork(self, decision: Mapping[str, Any]) -> None:
        """Makes the run directory of a decision, if it is not there."""
        parent, child = (self._workdir / decision[end] for end in ('from', 'to'))
        if child.exists():
            return
        beside = child.with_name(f'.{child.name}')
        copy = self._copied(parent, beside)
        meta = json.loads((copy / 'meta.json').read_text())
        history = (parent / 'metrics.jsonl').read_bytes()[: meta['metrics']]
        (beside / 'metrics.jsonl').write_bytes(history)
        write_json(beside / 'fork.json', {'parent': parent.name, **decision})
        beside.rename(child)

    def _copied(self, parent: pathlib.Path, beside: pathlib.Path) -> pathlib.Path:
        """The parent's newest checkpoint that is whole, copied; it may be clearing old ones away.

        Raises:
          UserError: if it has none.
        """
        for _ in range(TRIES):
            for step in steps_saved(parent):
                shutil.rmtree(beside, ignore_errors=True)
                copy = beside / 'checkpoints' / f'{step:08d}'
                with contextlib.suppress(FileNotFoundError, shutil.Error):
                    shutil.copytree(parent / 'checkpoints' / copy.name, copy)
                if not checkpoint.find_damage(copy):
                    return copy
        raise UserError(
            f'{parent} has no checkpoint that is whole; take the last line away from {self._file} '
            f'to decide again'
        )


def steps_saved(path: pathlib.Path) -> list[int]:
    """The steps of the checkpoints of a run, newest first."""
    found = (int(p.name) for p in (path / 'checkpoints').glob('*') if p.name.isdigit())
    return sorted(found, reverse=True)


def saved(path: pathlib.Path) -> int:
    """The step of the newest checkpoint of a run; 0 if it has none."""
    return next(iter(steps_saved(path)), 0)


def _config(path: pathlib.Path) -> dict[str, Any]:
    """The flat config of a run; of a copy that has not begun, the one that it will have."""
    if (path / 'config.json').exists():
        return flatten(read_json(path / 'config.json'))
    fork = read_json(path / 'fork.json')
    return {**_config(path.with_name(fork['parent'])), **fork['overrides']}


def _rules(config: Mapping[str, Any]) -> Mapping[str, Rule]:
    """Of the keys of a flat config."""
    schemas = {'lm': lm.SCHEMA, 'rl': rl.SCHEMA, 'fit': fit.SCHEMA}
    problem = fit.problem_module(config['problem.name']) if config['task'] == 'fit' else None
    return schemas.get(config.get('task', ''), {}) | (problem.SCHEMA if problem else {})


def _flags(overrides: Mapping[str, Any]) -> dict[str, str]:
    return {f'--config.{key}': str(value) for key, value in overrides.items()}


def train(
    population: Population, names: list[str], interval: int, resources: Resources
) -> dict[str, str]:
    """Runs all members to their last step; how each of them ended."""
    slots, attempts = local.Slots(resources), engine.Attempts(resources.retries)
    waiting, states = list(names), dict[str, str]()
    running: dict[str, process.Process | process.Elsewhere] = {}
    taken: dict[str, int] = {}
    watch = local.Watch([population.path(name) for name in names])
    for name in names:  # what a launcher that was killed has left
        path = population.path(name)
        if is_locked(path / 'launched'):
            running[name] = process.Elsewhere(path / 'launched')
            taken[name] = process.slot_of(path)
            waiting.remove(name)
    with local.supervising(watch, lambda: local.stop_all(running.values())) as heed:
        while waiting or running:
            heed()
            while waiting and (slot := slots.free(taken.values())) is not None:
                heed()
                name = waiting.pop(0)
                path = population.path(name)
                if state.done(path):
                    states[name] = 'done'
                    continue
                if population.looks(name, interval):  # and the launcher was killed
                    population.decide(name)
                    path = population.path(name)
                running[name] = slots.start(slot, path, population.command(name))
                taken[name] = slot
            time.sleep(local.TICK)
            for name, member in list(running.items()):
                path = population.path(name)
                looks = population.looks(name, interval)
                if looks:
                    member.stop()
                if (code := member.poll()) is None:
                    continue
                del running[name], taken[name]
                states[name], again, said = attempts.ended(path, code)
                if said:
                    watch.say(said)
                if states[name] == 'preempted' and looks:
                    population.decide(name)
                    watch.follow([population.path(each) for each in names])
                if again:
                    waiting.append(name)
            watch.update()
    return states


def run() -> None:
    """What `python -m launch.pbt` does; it ends with where each member has come to."""
    from launch import cli

    if not INTERVAL.value:
        raise UserError('--interval=STEPS is needed: how often a member looks at another')
    file, workdir = cli.arguments()
    members = sweep.load(file, workdir, 'pbt', dry=cli.DRY_RUN.value)
    configs = {m.name: sweep.parsed(m.command) for m in members}
    perturb = hyperparameters(configs, PERTURB.value)
    if cli.DRY_RUN.value:
        cli.dry_run(members, workdir, local.find_devices(cli.resources()))
        return
    sweep_file = state.described(workdir, {'metric': str, 'split': str, 'curves': str})
    metric, splits = sweep_file['metric'], [sweep_file['split'], sweep_file['curves']]
    split = fitness_split(configs, metric, splits, INTERVAL.value)
    names = [m.name for m in members]
    with cli.alone(workdir):
        population = Population(workdir, members, MARGIN.value, perturb, SEED.value, split)
        states = train(population, names, INTERVAL.value, cli.resources())
    print(population.summary(), file=sys.stderr)
    for name in names:
        path = population.path(name)
        print(f'{name}: {states[name]} in {path}, {state.read(path, metric).metric}')
    failed = [name for name, word in states.items() if word != 'done']
    if failed:
        sys.exit(f'error: {len(failed)} of {len(names)} members failed: {", ".join(failed)}')


if __name__ == '__main__':
    from launch import cli

    cli.start(run)
