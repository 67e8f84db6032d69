"""The names of the metrics that a run will record in metrics.jsonl, and their intervals.

The names are known before a run starts, so that a typo in the METRIC of a sweep is found
immediately. The metrics of language models and agents are declared here, except for the names of
tasks: those of a JAX environment are in its spec, and those of a host environment are unknown until
it is made. The metrics of a problem of `mi.fit` are found by tracing it. If METRIC refers to a
function of the metrics, it is called once with made-up values.
"""

import difflib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import chex
import jax
import ml_collections

from mi.config import UserError, flatten, suggest
from mi.fit import factory as fit
from mi.fit import train as train_fit
from mi.registry import is_reference
from mi.rl import config as rl_config
from mi.rl import envs
from mi.training.run_metric import find_refusal

LM_NAMES = {'nats_per_token', 'perplexity'}  # in every evaluation
EPISODE_NAMES = {'env_steps', 'return', 'success', 'length'}  # in every record of an agent
UPDATE_NAMES = {
    *('loss', 'policy', 'baseline', 'entropy', 'kl', 'rho_clipped', 'advantage', 'gradient_norm'),
    'episodes',
}
QUEUE_NAMES = {'lag', 'lag_max', 'dropped'}  # in topologies with actors
EVALUATION_NAMES = {'episodes_per_task'}
HOST_EVALUATION_NAMES = {'cut', 'steps_needed', 'steps_taken'}
CAPPED_NAMES = {'capped_mean', 'capped_median'}  # in evaluations of tasks with scores
TASK_PREFIXES = ('return/', 'success/')
UPDATE_PREFIXES = ('popart_mu/', 'popart_sigma/')
# Suites on the host whose episodes have no goal, and suites whose best scores are unknown.
SUITES_WITHOUT_SUCCESS = ('atari', 'procgen', 'gymnasium', 'vizdoom', 'dmlab30')
SUITES_WITHOUT_SCORES = ('gymnasium', 'vizdoom')


class Split(NamedTuple):
    """The records of a split.

    Attributes:
      names: names of the metrics in each record.
      interval: number of steps between two records, or 0 if there is only one record, at the end.
      prefixes: prefixes of further names, which are not known until the run has started.
    """

    names: Collection[str]
    interval: int
    prefixes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Return whether a metric with this name is recorded."""
        return name in self.names or name.startswith(self.prefixes)


Splits = dict[str, Split]


def find_splits(config: ml_collections.ConfigDict) -> Splits:
    """Return the splits recorded in a run with the given config, keyed by name.

    Raises:
      UserError: if the config is invalid.
    """
    if config.task not in TASKS:
        raise UserError(f'config.task = {config.task!r}: {suggest(str(config.task), TASKS)}')
    return TASKS[config.task](config)


def count_steps(config: ml_collections.ConfigDict) -> int:
    """Return the number of steps in a run, as counted in its records."""
    if config.task == 'search':
        return len(config.search.at)
    return rl_config.count_updates(config) if config.task == 'rl' else int(config.train.steps)


def _find_lm_splits(config: ml_collections.ConfigDict) -> Splits:
    names = LM_NAMES | (set() if config.data.level == 'word' else {'bits_per_byte'})
    return {
        'train': Split({'nats_per_token'}, config.train.log_every),
        'valid': Split(names, config.train.eval_every),
        'valid_whole': Split(names, 0),
        'test': Split(names, 0),
    }


def _find_rl_splits(config: ml_collections.ConfigDict) -> Splits:
    # Training records updates and the episodes that ended.
    names = UPDATE_NAMES | (set() if config.train.topology == 'fused' else QUEUE_NAMES)
    environment = describe_environment(config.env.name)
    prefixes: tuple[str, ...] = UPDATE_PREFIXES
    if environment.tasks is None or len(environment.tasks) > 1:
        prefixes += TASK_PREFIXES
    splits = {'train': environment.split(names, prefixes, config.train.log_every)}

    # Evaluations record episodes of the training environment and of the held-out one.
    evaluated = {'eval': config.env.name, 'held_out': config.eval.held_out}
    for split, env_name in evaluated.items():
        if not env_name:
            continue
        names = EVALUATION_NAMES | (HOST_EVALUATION_NAMES if envs.is_on_host(env_name) else set())
        environment = describe_environment(env_name)
        names |= CAPPED_NAMES if environment.has_scores else set()
        records = environment.split(names, (*TASK_PREFIXES, 'stderr/'), config.train.eval_every)
        for policy in ('', '_greedy') if config.eval.greedy else ('',):
            splits[split + policy] = records
    return splits


class EnvironmentInfo(NamedTuple):
    """Facts about an environment that are known before it is made.

    Attributes:
      tasks: names of the tasks, or None if unknown.
      has_success: whether episodes have a goal, or True if unknown.
      has_scores: whether best and random scores are known, or True if this is unknown.
    """

    tasks: tuple[str, ...] | None
    has_success: bool
    has_scores: bool

    def split(self, names: set[str], prefixes: tuple[str, ...], interval: int) -> Split:
        """Return the records of a split, with `names` and the metrics of episodes and tasks."""
        names = names | EPISODE_NAMES
        if not self.has_success:
            names -= {'success'}
            prefixes = tuple(prefix for prefix in prefixes if prefix != 'success/')
        if self.tasks is None:
            return Split(names, interval, prefixes)
        task_names = {prefix + task for prefix in prefixes for task in self.tasks}
        return Split(names | task_names, interval)


def describe_environment(name: str) -> EnvironmentInfo:
    """Return the facts about an environment that are known before it is made."""
    if envs.is_on_host(name):
        suite = name.partition('/')[0]
        has_success, has_scores = (
            suite not in suites for suites in (SUITES_WITHOUT_SUCCESS, SUITES_WITHOUT_SCORES)
        )
        return EnvironmentInfo(None, has_success, has_scores)
    spec = envs.make(name).spec
    has_scores = spec.random is not None and spec.reference is not None
    return EnvironmentInfo(spec.tasks, spec.has_success, has_scores)


def _find_fit_splits(config: ml_collections.ConfigDict) -> Splits:
    config = config.copy_and_resolve_references()
    config.model.parameters = 0  # the names are the same at any size, and no search is needed
    problem = fit.make_problem(config)

    def record_all(seed: chex.Array) -> dict[str, dict[str, chex.Array]]:
        world_key, init_key, batch_key, _ = train_fit.split_keys(seed)
        world = problem.draw_world(world_key)
        params = problem.init_params(init_key, world)
        loss, measured = problem.loss(params, world, batch_key)
        evaluated = train_fit.evaluate(problem, params, seed)
        return {'train': {'loss': loss, **measured}, **evaluated}

    seed_shape = jax.ShapeDtypeStruct((), jax.numpy.int32)
    train = config.train
    return {
        split: Split(set(numbers), train.log_every if split == 'train' else train.eval_every)
        for split, numbers in jax.eval_shape(record_all, seed_shape).items()
    }


def _find_search_splits(config: ml_collections.ConfigDict) -> Splits:
    probe_names = ('parameters', 'width', 'mse', 'learning_rate')
    names = {f'{name}/{value}' for name in probe_names for value in config.search.at}
    return {'probe': Split({'value', *probe_names}, 1), 'eval': Split({'exponent', *names}, 0)}


TASKS: dict[str, Callable[[ml_collections.ConfigDict], Splits]] = {
    'lm': _find_lm_splits,
    'rl': _find_rl_splits,
    'fit': _find_fit_splits,
    'search': _find_search_splits,
}


class Finder:
    """A cache for `find_splits`, in which members that differ only in sizes share an entry.

    Args:
      metric: metric of the sweep. Unless it belongs to a single task, members that differ only in
        the numbers of a problem, such as the number of tasks, also share an entry.
    """

    def __init__(self, metric: str):
        self._metric = metric
        self._reads_tasks = '/' in metric or is_reference(metric)
        self._cache: dict[str, Splits] = {}

    def find(self, config: ml_collections.ConfigDict) -> Splits:
        """Return the splits recorded in a run with the given config, keyed by name.

        A metric 'package.module:function' is added to each split from which it can be computed.
        """
        values = sorted(flatten(config.to_dict()).items())
        cache_key = repr([(key, value) for key, value in values if self._matters(key, value)])
        if cache_key not in self._cache:
            splits = find_splits(config)
            if is_reference(self._metric):
                splits = {name: self._add_reference(name, splits[name]) for name in splits}
            self._cache[cache_key] = splits
        return self._cache[cache_key]

    def _add_reference(self, name: str, split: Split) -> Split:
        """Add the metric to a split if its function accepts the records of the split."""
        refusal = find_refusal(self._metric, name, split.names, has_more_names=bool(split.prefixes))
        return split if refusal else split._replace(names={*split.names, self._metric})

    def _matters(self, key: str, value: Any) -> bool:
        """Return whether a config key can change the names of metrics or their intervals."""
        section = key.partition('.')[0]
        if section == 'train':
            return key in ('train.log_every', 'train.eval_every', 'train.topology')
        if section == 'problem' and not self._reads_tasks:
            return isinstance(value, str)
        return section not in ('seeds', 'optim', 'model', 'dropout', 'match', 'loss', 'actors')


def find_error(metric: str, key: str, split: str, splits: Splits) -> str:
    """Return the error in the metric of a sweep, or '' if there is none.

    Args:
      metric: METRIC of the sweep.
      key: 'SPLIT' or 'CURVES'.
      split: value of this key.
      splits: name → records of a member's splits.
    """
    if split not in splits:
        return f'{key} = {split!r}: expected a recorded split; {suggest(split, splits)}'
    if splits[split].has(metric):
        return ''
    if is_reference(metric):
        names = ', '.join(sorted(splits[split].names))
        return f'{find_refusal(metric, split, splits[split].names)}; {key} = {split!r} has {names}'

    # Name the closest number, or the splits that have it; names of single tasks are only counted.
    known_names = [
        *splits[split].names,
        *(f'{prefix}TASK' for prefix in splits[split].prefixes),
    ]
    plain_names = [name for name in known_names if '/' not in name]
    num_task_names = len(known_names) - len(plain_names)
    task_names = f', and {num_task_names} of single tasks' if num_task_names else ''
    close_names = difflib.get_close_matches(metric, known_names, n=1)
    hint = f'did you mean {close_names[0]!r}? ' if close_names else ''
    if splits_with_metric := [name for name, records in splits.items() if records.has(metric)]:
        hint = f'it is recorded in {", ".join(splits_with_metric)}. '
    return (
        f'METRIC = {metric!r}: expected a metric recorded in {key} = {split!r}; '
        f'{hint}known: {", ".join(sorted(plain_names))}{task_names}'
    )


def choose_curves(metric: str, split: str, member_splits: Sequence[Splits]) -> str:
    """Return the split for learning curves in a sweep that does not set CURVES.

    This is the first split in which all runs record the metric during training: 'valid', the split
    that is compared, or any other.
    """

    def is_curve(name: str) -> bool:
        return all(
            name in splits and splits[name].interval and splits[name].has(metric)
            for splits in member_splits
        )

    names = dict.fromkeys(['valid', split, *(name for splits in member_splits for name in splits)])
    return next(filter(is_curve, names), split)
