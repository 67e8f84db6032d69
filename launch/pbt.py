"""Run population based training on this machine, with the members of a sweep as the population.

    python -m launch.pbt --sweep=… --workdir=runs/population --interval=2000 --parallel=8 --gpus=1

Every `--interval` steps, a member saves, stops, and is compared with another member drawn at
random. If the other's fitness is better by more than `--margin`, the member continues from the
other's newest checkpoint and hyperparameters. Then each hyperparameter in `--perturb` is multiplied
or divided by 1.2 with probability 1/3, unless the new value is invalid. No member waits for
another. The fitness is the newest value of METRIC in SPLIT, or in CURVES if SPLIT is evaluated only
at the end.

A member that changes continues in a new run directory, NAME.1, NAME.2, …, which starts as a copy of
its parent and contains `fork.json` with the parent and the changes. Every run directory thus has
only one config. Decisions are recorded in WORKDIR/pbt.jsonl, from which the same command continues.

Source: Espeholt et al., *IMPALA* (ICML 2018). There, the fitness is the mean capped score, the
margin is 5 % absolute, and learning rate, entropy cost and RMSProp's ε are perturbed, whether or
not a copy was made. These values and the defaults are recalled.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags

from launch import local, metric_names, state, sweep
from launch.engine import Resources
from launch.population import Population, is_scalable
from launch.supervision import supervise
from mi.config import UserError, flatten, suggest

INTERVAL = flags.DEFINE_integer('interval', 0, 'Steps between two comparisons.', lower_bound=0)
MARGIN = flags.DEFINE_float('margin', 0.05, 'Minimum absolute lead in fitness of a member to copy.')
PERTURB = flags.DEFINE_list(
    'perturb',
    None,
    'Hyperparameters that change, as keys of the config. By default learning rate, entropy cost '
    'and epsilon of agents, and learning rate and weight decay of other models, if they are not 0.',
)
SEED = flags.DEFINE_integer('seed', 0, 'Seed of the random draws.')

DEFAULT_PERTURB = {  # task of a config → default of --perturb
    'rl': ('optim.learning_rate', 'loss.entropy_cost', 'optim.eps'),
    'lm': ('optim.learning_rate', 'optim.weight_decay'),
    'fit': ('optim.learning_rate', 'optim.weight_decay'),
}
Configs = Mapping[str, ml_collections.ConfigDict]  # name of a member → its config


def choose_hyperparameters(configs: Configs, keys: Sequence[str] | None) -> list[str]:
    """Return the config keys to perturb: `keys`, or the defaults that all configs have.

    Raises:
      UserError: if a member cannot be trained in intervals, or one of the keys cannot be multiplied
        by a factor in its config.
    """
    for member_name, config in configs.items():
        if config.task not in DEFAULT_PERTURB:
            raise UserError(
                f'config.task = {config.task!r} of {member_name}: expected one of '
                f'{", ".join(DEFAULT_PERTURB)}, whose checkpoints other members can resume from'
            )
    flat_configs = {
        member_name: flatten(config.to_dict()) for member_name, config in configs.items()
    }

    # Use the defaults that can change in all configs; some exist only for some optimizers.
    if keys is None:
        defaults = dict.fromkeys(
            key for config in configs.values() for key in DEFAULT_PERTURB[config.task]
        )
        return [
            key
            for key in defaults
            if all(
                key in flat_config and is_scalable(flat_config[key])
                for flat_config in flat_configs.values()
            )
        ]

    # Refuse keys that cannot change.
    for key in keys:
        for member_name, flat_config in flat_configs.items():
            if key in flat_config and is_scalable(flat_config[key]):
                continue
            known_keys = [known for known, value in flat_config.items() if is_scalable(value)]
            setting = f'{key} = {flat_config[key]!r}' if key in flat_config else 'no such key'
            raise UserError(
                f'--perturb={key}: expected a config key whose value is a nonzero float, such as '
                f'0.1, but {member_name} has {setting}; {suggest(key, known_keys)}'
            )
    return list(keys)


def choose_fitness_split(
    configs: Configs, metric: str, splits: Sequence[str], interval: int
) -> str:
    """Return the first split in which all members record the metric before their last step.

    Args:
      configs: name → config of each member.
      metric: METRIC of the sweep.
      splits: SPLIT and CURVES of the sweep.
      interval: number of steps between two comparisons.

    Raises:
      UserError: if there is no such split, or a member would never be compared.
    """
    # Refuse members whose first comparison is not before their last step.
    finder = metric_names.Finder(metric)
    member_splits = {name: finder.find(config) for name, config in configs.items()}
    for name, config in configs.items():
        num_steps, save_interval = metric_names.count_steps(config), config.train.save_every
        first_comparison = -(-interval // save_interval) * save_interval
        if first_comparison >= num_steps:
            raise UserError(
                f'--interval={interval}: expected a comparison before the last step, but {name} '
                f'has {num_steps} steps and config.train.save_every = {save_interval}. Try '
                f'smaller values'
            )

    # Find a split that all members record often enough.
    for split in splits:
        recorded = [known[split] for known in member_splits.values() if split in known]
        if len(recorded) == len(member_splits) and all(
            record.interval and record.has(metric) for record in recorded
        ):
            num_steps = min(map(metric_names.count_steps, configs.values()))
            if max(record.interval for record in recorded) >= num_steps:
                continue
            return split
    raise UserError(
        f'METRIC = {metric!r}: expected a metric that SPLIT or CURVES '
        f'({", ".join(dict.fromkeys(splits))}) records before the last step, because it is the '
        f'fitness. Try a smaller config.train.eval_every'
    )


class _PopulationMembers:
    """The members of a population, for `supervise`.

    A member stops when its next comparison is due, and restarts after the decision.
    """

    def __init__(self, population: Population, interval: int):
        self._population, self._interval = population, interval

    def names(self) -> list[str]:
        return self._population.names()

    def run_dir(self, name: str) -> pathlib.Path:
        return self._population.run_dir(name)

    def command(self, name: str) -> list[str]:
        return self._population.command(name)

    def prepare(self, name: str) -> None:
        if self.should_stop(name):  # an earlier launcher was killed before the decision
            self._population.decide(name)

    def should_stop(self, name: str) -> bool:
        return self._population.is_due(name, self._interval)

    def handle_exit(self, name: str, phase: str, had_to_stop: bool) -> None:
        if phase == 'preempted' and had_to_stop:
            self._population.decide(name)


def train(population: Population, interval: int, resources: Resources) -> dict[str, str]:
    """Train all members to their last step and return the phase of each."""
    members = _PopulationMembers(population, interval)
    return supervise(members, local.Slots(resources), resources.retries)


def run() -> None:
    """Run `python -m launch.pbt`, which prints the final run directory of each member."""
    from launch import cli

    # Check the flags and the sweep.
    if not INTERVAL.value:
        raise UserError(
            '--interval=STEPS is required: expected the number of steps between comparisons'
        )
    file, workdir = cli.get_paths()
    members = sweep.load(file, workdir, 'pbt', dry=cli.DRY_RUN.value)
    configs = {member.name: member.config for member in members}
    perturb = choose_hyperparameters(configs, PERTURB.value)
    if cli.DRY_RUN.value:
        cli.dry_run(members, workdir, local.find_devices(cli.get_resources()))
        return
    sweep_file = state.read_sweep_file(workdir, {'metric': str, 'split': str, 'curves': str})
    metric, splits = sweep_file['metric'], [sweep_file['split'], sweep_file['curves']]
    split = choose_fitness_split(configs, metric, splits, INTERVAL.value)

    # Train the population.
    with cli.lock_sweep(workdir):
        population = Population(workdir, members, MARGIN.value, perturb, SEED.value, split)
        phases = train(population, INTERVAL.value, cli.get_resources())

    # Report what became of each member.
    print(population.summary(), file=sys.stderr)
    for name in population.names():
        run_dir = population.run_dir(name)
        value = state.read_member_state(run_dir, metric).metric
        print(f'{name}: {phases[name]} in {run_dir}, {value}')
    failed = [name for name, phase in phases.items() if phase not in ('done', 'stopped')]
    if failed:
        sys.exit(f'error: {len(failed)} of {len(members)} members failed: {", ".join(failed)}')


if __name__ == '__main__':
    from launch import cli

    cli.start(run)
