"""Population based training, on this machine: the members of a sweep learn from each other.

    python -m launch.pbt --sweep=… --workdir=runs/population --interval=2000 --parallel=8 --gpus=1

Every `--interval` steps a member saves and stops. It looks at one other, drawn at random; if that
one's fitness, the newest value of the sweep's METRIC in its SPLIT, is more than `--margin` better,
it goes on from that one's newest checkpoint and with its hyperparameters. Then each of `--perturb`
is, with probability 1/3, multiplied by 1.2 or divided by it. Nobody waits for anybody.

Where anything has changed it goes on in a run directory of its own, NAME.1, NAME.2, …, which begins
as a copy of where it comes from; `fork.json` in it has its parent and what differs. So every run
directory is still that of one config, and any of them can be looked at. What was decided stands in
WORKDIR/pbt.jsonl; the same command, given again, goes on from there.

Source: Espeholt et al., *IMPALA* (ICML 2018): the fitness is the mean capped score, the margin 5 %
absolute, and learning rate, entropy cost and RMSProp's ε are perturbed, whether a copy was made or
not. Recalled, as are the defaults.
"""

import contextlib
import json
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from launch import engine, local, plan, process, state, sweep
from launch.engine import Resources
from mi import checkpoint
from mi.config import UserError, flat
from mi.files import held, read_json
from mi.run import write_json

INTERVAL = flags.DEFINE_integer('interval', 0, 'Steps between two looks at another.', lower_bound=0)
MARGIN = flags.DEFINE_float('margin', 0.05, 'By how much another has to be better, absolute.')
PERTURB = flags.DEFINE_list(
    'perturb',
    ['optim.learning_rate', 'loss.entropy_cost', 'optim.eps'],
    'Hyperparameters that change, as keys of the config.',
)
SEED = flags.DEFINE_integer('seed', 0, 'Of what is drawn at random.')

FACTOR, CHANCE = 1.2, 1 / 3
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


class Population:
    """Where each member is, and what was decided; all of it in the sweep directory.

    Args:
      workdir: of the sweep.
      members: of the sweep; they are the first generation.
      margin, perturb, seed: see the flags.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        members: Iterable[sweep.Member],
        margin: float,
        perturb: Iterable[str],
        seed: int,
    ):
        described = state.described(workdir, {'metric': str, 'split': str, 'lower_is_better': bool})
        self._metric, self._split = described['metric'], described['split']
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
        now = explore(values, draw)
        generation = 1 + sum(d['member'] == member for d in self._decisions)
        decision = {
            'member': member,
            'step': saved(parent),
            'copied': other,
            'fitness': fitness.get(member),
            'from': parent.name,
            'to': f'{member}.{generation}' if other or now != values else path.name,
            'overrides': now,
        }
        state.append(self._file, decision)
        self._decisions.append(decision)
        self._fork(decision)

    def _hyperparameters(self, path: pathlib.Path) -> dict[str, float]:
        config = _config(path)
        unknown = [key for key in self._perturb if not isinstance(config.get(key), int | float)]
        if unknown:
            raise UserError(f'--perturb={unknown[0]}: the config of {path} has no such number')
        return {key: config[key] for key in self._perturb}

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
                if not checkpoint.damage(copy):
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
        return flat(read_json(path / 'config.json'))
    fork = read_json(path / 'fork.json')
    return {**_config(path.with_name(fork['parent'])), **fork['overrides']}


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
        if held(path / 'launched'):
            running[name] = process.Elsewhere(path / 'launched')
            taken[name] = process.slot_of(path)
            waiting.remove(name)
    try:
        with watch, local.heeding_signals() as heed:
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
    except local.Stop:
        local.end(watch, running.values())
    return states


def run() -> None:
    """What `python -m launch.pbt` does; it ends with where each member has come to."""
    from launch import cli

    if not INTERVAL.value:
        raise UserError('--interval=STEPS is needed: how often a member looks at another')
    file, workdir = cli.arguments()
    members = sweep.load(file, workdir, 'pbt', dry=cli.DRY_RUN.value)
    if cli.DRY_RUN.value:
        plan.show(members, workdir, cli.FLOPS_PER_SECOND.value)
        return
    metric = state.described(workdir, {'metric': str})['metric']
    names = [m.name for m in members]
    with cli.alone(workdir):
        population = Population(workdir, members, MARGIN.value, PERTURB.value, SEED.value)
        states = train(population, names, INTERVAL.value, cli.resources())
    for name in names:
        path = population.path(name)
        print(f'{name}: {states[name]} in {path}, {state.read(path, metric).metric}')
    failed = [name for name, word in states.items() if word != 'done']
    if failed:
        sys.exit(f'error: {len(failed)} of {len(names)} members failed: {", ".join(failed)}')


if __name__ == '__main__':
    from launch import cli

    cli.start(run)
