"""Which numbers a run of a config will write to metrics.jsonl, and how often, before it is run.

So that a sweep whose METRIC has a typo is refused before its first member starts. The names of a
language model are declared here, those of an agent too, but for the names of its tasks, which a JAX
environment tells and one on the host does not before it is made; those of a problem of `mi.fit` are
traced.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from mi.config import UserError, flatten, suggest
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.rl import config as rl_config
from mi.rl import envs

LM = {'nats_per_token', 'perplexity'}  # of every evaluation
EPISODES = {'env_steps', 'return', 'success', 'length'}  # of every record of an agent
UPDATES = {
    *('loss', 'policy', 'baseline', 'entropy', 'kl', 'rho_clipped', 'advantage', 'gradient_norm'),
    'episodes',
}
QUEUED = {'lag', 'lag_max', 'dropped'}  # of topologies with actors
EVALUATIONS = {'episodes_per_task'}
PLAYED = {'cut', 'steps_needed', 'steps_taken'}  # of evaluations on the host
CAPPED = {'capped_mean', 'capped_median'}  # of tasks with scores
OF_TASK = ('return/', 'success/')
OF_UPDATES = ('popart_mu/', 'popart_sigma/')
# Suites on the host whose episodes have no goal, and those whose best scores nobody knows.
NO_SUCCESS = ('atari', 'procgen', 'gymnasium', 'vizdoom', 'dmlab30')
NO_SCORES = ('gymnasium', 'vizdoom')


class Split(NamedTuple):
    """The records of a split.

    Attributes:
      names: of its numbers.
      every: steps of the run between two records; 0 where there is one, at the end.
      prefixes: of more names, which are known only when the run has begun.
    """

    names: Collection[str]
    every: int
    prefixes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a number of that name is recorded."""
        return name in self.names or name.startswith(self.prefixes)


Splits = dict[str, Split]


def splits(config: ml_collections.ConfigDict) -> Splits:
    """What a run of a config records.

    Raises:
      UserError: on a config that cannot work.
    """
    if config.task not in TASKS:
        raise UserError(f'config.task = {config.task!r}: {suggest(str(config.task), TASKS)}')
    return TASKS[config.task](config)


def steps(config: ml_collections.ConfigDict) -> int:
    """How many steps a run of a config has, as its records count them."""
    if config.task == 'search':
        return len(config.search.at)
    return rl_config.count_updates(config) if config.task == 'rl' else int(config.train.steps)


def _lm(config: ml_collections.ConfigDict) -> Splits:
    names = LM | ({'bits_per_byte'} if config.data.level != 'word' else set())
    return {
        'train': Split({'nats_per_token'}, config.train.log_every),
        'valid': Split(names, config.train.eval_every),
        'valid_whole': Split(names, 0),
        'test': Split(names, 0),
    }


def _rl(config: ml_collections.ConfigDict) -> Splits:
    names = UPDATES | (QUEUED if config.train.topology != 'fused' else set())
    environment = _environment(config.env.name)
    prefixes: tuple[str, ...] = OF_UPDATES
    if environment.tasks is None or len(environment.tasks) > 1:
        prefixes += OF_TASK
    found = {'train': environment.split(names, prefixes, config.train.log_every)}
    evaluated = {'eval': config.env.name, 'held_out': config.eval.held_out}
    for split, name in evaluated.items():
        if not name:
            continue
        names = EVALUATIONS | (PLAYED if envs.is_on_host(name) else set())
        environment = _environment(name)
        names |= CAPPED if environment.has_scores else set()
        records = environment.split(names, (*OF_TASK, 'stderr/'), config.train.eval_every)
        for policy in ('', '_greedy') if config.eval.greedy else ('',):
            found[split + policy] = records
    return found


class Environment(NamedTuple):
    """What is known of an environment without one of the host being made.

    Attributes:
      tasks: their names; None where they are not known.
      has_success: whether its episodes have a goal; True if that is not known.
      has_scores: whether the best and the random score are known; True if that is not known.
    """

    tasks: tuple[str, ...] | None
    has_success: bool
    has_scores: bool

    def split(self, names: set[str], prefixes: tuple[str, ...], every: int) -> Split:
        """The records of a split: these names, and those of its episodes and its tasks."""
        names = names | EPISODES
        if not self.has_success:
            names -= {'success'}
            prefixes = tuple(prefix for prefix in prefixes if prefix != 'success/')
        if self.tasks is None:
            return Split(names, every, prefixes)
        return Split(names | {p + task for p in prefixes for task in self.tasks}, every)


def _environment(name: str) -> Environment:
    if envs.is_on_host(name):
        suite = name.partition('/')[0]
        return Environment(None, suite not in NO_SUCCESS, suite not in NO_SCORES)
    spec = envs.make(name).spec
    has_scores = spec.random is not None and spec.reference is not None
    return Environment(spec.tasks, spec.has_success, has_scores)


def _fit(config: ml_collections.ConfigDict) -> Splits:
    config = config.copy_and_resolve_references()
    config.model.parameters = 0  # at any size the same names, and found without looking for it
    problem = fit.problem(config)
    seed = jax.ShapeDtypeStruct((), jax.numpy.int32)

    def everything(seed: jax.Array) -> dict[str, dict[str, jax.Array]]:
        world, init, batch, _ = train_fit.keys(seed)
        of_world = problem.draw_world(world)
        params = problem.init_params(init, of_world)
        loss, measured = problem.loss(params, of_world, batch)
        evaluated = train_fit.evaluate(problem, params, seed)
        return {'train': {'loss': loss, **measured}, **evaluated}

    return {
        split: Split(
            set(named), config.train.log_every if split == 'train' else config.train.eval_every
        )
        for split, named in jax.eval_shape(everything, seed).items()
    }


def _search(config: ml_collections.ConfigDict) -> Splits:
    of_value = ('parameters', 'width', 'mse', 'learning_rate')
    at = {f'{name}/{value}' for name in of_value for value in config.search.at}
    return {'probe': Split({'value', *of_value}, 1), 'eval': Split({'exponent', *at}, 0)}


TASKS: dict[str, Callable[[ml_collections.ConfigDict], Splits]] = {
    'lm': _lm,
    'rl': _rl,
    'fit': _fit,
    'search': _search,
}


class Finder:
    """Finds what the members of a sweep record; of members that differ in sizes alone, once.

    Args:
      metric: that they are compared by. Where it is not that of a single task, the numbers in a
        problem, as that of its tasks, have no part in it either.
    """

    def __init__(self, metric: str):
        self._of_task = '/' in metric
        self._known: dict[str, Splits] = {}

    def splits(self, config: ml_collections.ConfigDict) -> Splits:
        """As the function of this name."""
        values = sorted(flatten(config.to_dict()).items())
        key = repr([(k, v) for k, v in values if self._matters(k, v)])
        if key not in self._known:
            self._known[key] = splits(config)
        return self._known[key]

    def _matters(self, key: str, value: Any) -> bool:
        section = key.partition('.')[0]
        if section == 'train':
            return key in ('train.log_every', 'train.eval_every', 'train.topology')
        if section == 'problem' and not self._of_task:
            return isinstance(value, str)
        return section not in ('seeds', 'optim', 'model', 'dropout', 'match', 'loss', 'actors')


def check(metric: str, key: str, split: str, found: Splits) -> str:
    """What is wrong with the metric of a sweep, '' if nothing is.

    Args:
      metric: METRIC.
      key: SPLIT or CURVES.
      split: its value.
      found: what a member records.
    """
    if split not in found:
        return f'{key} = {split!r}: expected a split of its records; {suggest(split, found)}'
    if found[split].has(metric):
        return ''
    known = [*found[split].names, *(f'{prefix}TASK' for prefix in found[split].prefixes)]
    plain = [name for name in known if '/' not in name]  # of many tasks there are many
    of_tasks = f', and {len(known) - len(plain)} of single tasks' if len(known) > len(plain) else ''
    close = difflib.get_close_matches(metric, known, n=1)
    hint = f'did you mean {close[0]!r}? ' if close else ''
    if elsewhere := [name for name, of in found.items() if of.has(metric)]:
        hint = f'it is in those of {", ".join(elsewhere)}. '
    return (
        f'METRIC = {metric!r}: expected a number of the records of {key} = {split!r}; '
        f'{hint}known: {", ".join(sorted(plain))}{of_tasks}'
    )


def curves(metric: str, split: str, found: Sequence[Splits]) -> str:
    """The split of the learning curves, where a sweep names none.

    'valid' where all runs record the metric there on their way, else the split that is compared,
    else any other in which they do.
    """

    def is_curve(name: str) -> bool:
        return all(name in of and of[name].every and of[name].has(metric) for of in found)

    names = dict.fromkeys(['valid', split, *(name for of in found for name in of)])
    return next(filter(is_curve, names), split)
