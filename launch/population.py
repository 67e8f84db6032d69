"""A population of members that copy each other's checkpoints and perturb hyperparameters.

See `launch.pbt`, which runs the members, for the algorithm.
"""

import contextlib
import itertools
import json
import math
import pathlib
import random
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

from launch import records, state
from launch.members import Member
from mi.config import Rule, UserError, find_violation, flatten
from mi.fit import factory as fit
from mi.lm import config as lm
from mi.rl import config as rl
from mi.training import checkpoint
from mi.training.io import read_json, write_json

FACTOR, PERTURB_PROBABILITY = 1.2, 1 / 3
SCHEMAS = {'lm': lm.SCHEMA, 'rl': rl.SCHEMA, 'fit': fit.SCHEMA}  # task of a config → its rules
COPY_ATTEMPTS = 10  # tries to copy a checkpoint from a run that deletes old ones meanwhile


def exploit(
    fitness: Mapping[str, float], member: str, margin: float, rng: random.Random
) -> str | None:
    """Return the member to copy, or None if `member` should continue unchanged.

    Args:
      fitness: member → fitness, where larger is better. Members without records are absent.
      member: the member to compare.
      margin: minimum lead in fitness of the member to copy.
      rng: random generator that draws the other member.
    """
    candidates = sorted(fitness.keys() - {member})
    if member not in fitness or not candidates:
        return None
    candidate = rng.choice(candidates)
    return candidate if fitness[candidate] - fitness[member] > margin else None


def explore(hyperparameters: Mapping[str, float], rng: random.Random) -> dict[str, float]:
    """Return new values, each multiplied by 1.2 or 1/1.2 with probability 1/3."""
    perturbed = dict(hyperparameters)
    for key in hyperparameters:
        if rng.random() < PERTURB_PROBABILITY:
            perturbed[key] *= FACTOR if rng.random() < 0.5 else 1 / FACTOR
    return perturbed


def is_scalable(value: Any) -> bool:
    """Return whether a hyperparameter can be scaled, which excludes integers (sizes) and 0."""
    return isinstance(value, float) and math.isfinite(value) and value != 0


class Population:
    """The run directories of the members, and the decisions about them.

    The sweep directory stores both, so that a new launcher can continue.

    Args:
      workdir: directory of the sweep.
      members: the members of the sweep, which are the first generation.
      margin, perturb, seed: values of these flags of `launch.pbt`.
      split: split of the fitness, or '' for SPLIT.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        members: Iterable[Member],
        margin: float,
        perturb: Iterable[str],
        seed: int,
        split: str = '',
    ):
        # Read what is compared.
        fields = {'metric': str, 'split': str, 'lower_is_better': bool}
        sweep_file = state.read_sweep_file(workdir, fields)
        self._metric, self._split = sweep_file['metric'], split or sweep_file['split']
        self._sign = -1 if sweep_file['lower_is_better'] else 1
        self._workdir = workdir
        self._members = {member.name: member for member in members}
        self._margin, self._perturb, self._seed = margin, list(perturb), seed

        # Read earlier decisions, and carry out the last one if its launcher was killed before.
        self._file = workdir / 'pbt.jsonl'
        fields = {'member': str, 'from': str, 'to': str, 'step': int, 'overrides': dict}
        self._decisions = records.read_records(self._file, fields, tail=records.WHOLE_FILE)
        for decision in self._decisions:
            self._fork(decision)

    def names(self) -> list[str]:
        """Return the names of the members, in the order of the sweep."""
        return list(self._members)

    def run_dir(self, member: str) -> pathlib.Path:
        """Return the current run directory of a member."""
        children = [decision['to'] for decision in self._decisions if decision['member'] == member]
        return self._workdir / (children[-1] if children else member)

    def is_due(self, member: str, interval: int) -> bool:
        """Return whether a member has saved at its next comparison, before its last step."""
        steps = [decision['step'] for decision in self._decisions if decision['member'] == member]
        due_step = (steps[-1] // interval + 1) * interval if steps else interval
        run_dir = self.run_dir(member)
        return due_step <= last_saved_step(run_dir) < state.read_member_state(run_dir).num_steps

    def command(self, member: str) -> list[str]:
        """Return the command that runs a member in its current run directory."""
        run_dir = self.run_dir(member)
        command = [
            argument
            for argument in self._members[member].command
            if not argument.startswith('--workdir=')
        ]
        if (run_dir / 'fork.json').exists():
            overrides = _override_flags(read_json(run_dir / 'fork.json')['overrides'])
            command = [arg for arg in command if arg.partition('=')[0] not in overrides]
            command += [f'{flag}={value}' for flag, value in overrides.items()]
        return [*command, f'--workdir={run_dir}']

    def decide(self, member: str) -> None:
        """Decide how a member that has saved continues, and fork its run directory if needed."""
        # Compare with a member drawn at random; the draw depends only on seed, member and step.
        run_dir = self.run_dir(member)
        rng = random.Random(f'{self._seed} {member} {last_saved_step(run_dir)}')
        fitness = self._measure_fitness()
        copied_member = exploit(fitness, member, self._margin, rng)
        parent = self.run_dir(copied_member) if copied_member else run_dir

        # Perturb the hyperparameters of the parent.
        hyperparameters = self._read_hyperparameters(parent)
        new_hyperparameters = self._drop_refused(
            parent, hyperparameters, explore(hyperparameters, rng)
        )
        is_forked = copied_member or new_hyperparameters != hyperparameters
        decision = {
            'member': member,
            'step': last_saved_step(parent),
            'copied': copied_member,
            'fitness': fitness.get(member),
            'from': parent.name,
            'to': self._next_name(member) if is_forked else run_dir.name,
            'overrides': new_hyperparameters,
        }

        # Note the decision before carrying it out: the launcher may be killed in between.
        records.append_record(self._file, decision)
        self._decisions.append(decision)
        self._fork(decision)

    def summary(self) -> str:
        """Summarize the decisions in one line, even if no member was compared."""
        comparisons = [
            decision
            for decision in self._decisions
            if isinstance(decision.get('fitness'), records.NUMBER)
        ]
        if not comparisons:
            return (
                f'pbt: no member was compared, because none recorded {self._metric} of the '
                f'{self._split} split before its first comparison'
            )
        copies = sum(bool(decision.get('copied')) for decision in comparisons)
        return f'pbt: {len(comparisons)} comparisons, {copies} copies'

    def _measure_fitness(self) -> dict[str, float]:
        """Return the fitness of each member with a value and a checkpoint. Larger is better."""
        fitness = {}
        for member in self._members:
            curve = records.read_curve(self.run_dir(member), self._metric, self._split)
            if curve and last_saved_step(self.run_dir(member)):
                value = curve[max(curve)]
                fitness[member] = -math.inf if math.isnan(value) else self._sign * value
        return fitness

    def _next_name(self, member: str) -> str:
        """Return NAME.1, NAME.2, …, with more zeros if another member already has the name."""
        generation = 1 + sum(decision['member'] == member for decision in self._decisions)
        used_names = {*self._members, *(decision['to'] for decision in self._decisions)}
        names = (f'{member}.{"0" * zeros}{generation}' for zeros in itertools.count())
        return next(name for name in names if name not in used_names)

    def _read_hyperparameters(self, run_dir: pathlib.Path) -> dict[str, float]:
        """Return the hyperparameters of a run that may be perturbed.

        Raises:
          UserError: if one is missing from the config or is not a nonzero float.
        """
        config = read_flat_config(run_dir)
        for key in self._perturb:
            if key not in config or not is_scalable(config[key]):
                raise UserError(
                    f'--perturb={key}: expected a key whose value is a nonzero float, such as 0.1, '
                    f'in the config of {run_dir}'
                )
        return {key: config[key] for key in self._perturb}

    def _drop_refused(
        self,
        run_dir: pathlib.Path,
        hyperparameters: Mapping[str, float],
        new_hyperparameters: Mapping[str, float],
    ) -> dict[str, float]:
        """Return the new values, but the old ones where the new ones are invalid."""
        rules = find_rules(read_flat_config(run_dir))
        refused_keys = [
            key
            for key, new_value in new_hyperparameters.items()
            if key in rules and find_violation(rules[key], new_value)
        ]
        return {**new_hyperparameters, **{key: hyperparameters[key] for key in refused_keys}}

    def _fork(self, decision: Mapping[str, Any]) -> None:
        """Make the run directory of a decision if it does not exist."""
        parent, child = (self._workdir / decision[key] for key in ('from', 'to'))
        if child.exists():
            return
        temporary = child.with_name(f'.{child.name}')
        checkpoint_dir = self._copy_checkpoint(parent, temporary)
        meta = json.loads((checkpoint_dir / 'meta.json').read_text())
        history = (parent / 'metrics.jsonl').read_bytes()[: meta['metrics']]
        (temporary / 'metrics.jsonl').write_bytes(history)
        write_json(temporary / 'fork.json', {'parent': parent.name, **decision})
        temporary.rename(child)

    def _copy_checkpoint(self, parent: pathlib.Path, child: pathlib.Path) -> pathlib.Path:
        """Copy the newest complete checkpoint of a run, and return the directory of the copy.

        The run may delete old checkpoints meanwhile.

        Raises:
          UserError: if there is no complete checkpoint.
        """
        for _ in range(COPY_ATTEMPTS):
            for step in list_saved_steps(parent):
                shutil.rmtree(child, ignore_errors=True)
                checkpoint_dir = child / 'checkpoints' / f'{step:08d}'
                with contextlib.suppress(FileNotFoundError, shutil.Error):
                    shutil.copytree(parent / 'checkpoints' / checkpoint_dir.name, checkpoint_dir)
                if not checkpoint.find_damage(checkpoint_dir):
                    return checkpoint_dir
        raise UserError(
            f'{parent}: found no intact checkpoint to copy. Remove the last line of {self._file}, '
            f'which records the decision to copy it, and run the command again'
        )


def list_saved_steps(run_dir: pathlib.Path) -> list[int]:
    """Return the steps of a run's checkpoints, newest first."""
    checkpoints = (run_dir / 'checkpoints').glob('*')
    return sorted((int(path.name) for path in checkpoints if path.name.isdigit()), reverse=True)


def last_saved_step(run_dir: pathlib.Path) -> int:
    """Return the step of a run's newest checkpoint, or 0 if it has none."""
    return next(iter(list_saved_steps(run_dir)), 0)


def read_flat_config(run_dir: pathlib.Path) -> dict[str, Any]:
    """Return the flat config of a run, even if the run is a copy that has not begun."""
    if (run_dir / 'config.json').exists():
        return flatten(read_json(run_dir / 'config.json'))
    fork = read_json(run_dir / 'fork.json')
    return {**read_flat_config(run_dir.with_name(fork['parent'])), **fork['overrides']}


def find_rules(config: Mapping[str, Any]) -> Mapping[str, Rule]:
    """Return the rules for the keys of a flat config."""
    rules = SCHEMAS[config['task']]
    if config['task'] == 'fit':
        rules = {**rules, **fit.import_problem(config['problem.name']).SCHEMA}
    return rules


def _override_flags(overrides: Mapping[str, Any]) -> dict[str, str]:
    return {f'--config.{key}': str(value) for key, value in overrides.items()}
