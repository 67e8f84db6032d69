"""Checks that an environment agrees with its spec, before anything is compiled."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mi.config import UserError
from mi.rl.envs.spec import JaxEnvironment, Spec, Step, Transition

PROTOCOL = 'see JaxEnvironment in mi/rl/envs/spec.py'
AGENT_ENTRIES = ('grid', 'pixels', 'features')  # an agent needs one of them
ENTRIES: dict[
    str, tuple[int, DTypeLike, str]
] = {  # entry of an observation → rank, type, and both as text
    'task': (0, jnp.int32, 'int32 []'),
    'grid': (3, jnp.integer, 'integers [h, w, layers]'),
    'pixels': (3, jnp.uint8, 'uint8 [h, w, c]'),
    'features': (1, jnp.floating, 'floats [n]'),
    'instruction': (1, jnp.integer, 'integers [L]'),
}


def check_spec(spec: Spec) -> None:
    """Refuse a spec that contradicts itself.

    Raises:
      UserError: which field, and what is expected.
    """
    if not isinstance(spec, Spec):
        raise UserError(f'environment.spec = {spec!r}: expected a Spec; {PROTOCOL}')

    # A rule for each field: whether it holds, and what is expected.
    tasks = len(spec.tasks)
    layers = spec.observation['grid'].shape[-1:] if 'grid' in spec.observation else ()
    words = max(0, spec.vocabulary - 1)
    rules = [
        ('actions', _is_count(spec.actions) and spec.actions > 0, 'an integer of at least 1'),
        (
            'tasks',
            not isinstance(spec.tasks, str) and 0 < tasks == len(set(spec.tasks)),
            'a tuple of distinct names',
        ),
        ('random', _are_scores(spec.random, tasks), f'None or {tasks} numbers'),
        ('reference', _are_scores(spec.reference, tasks), f'None or {tasks} numbers'),
        (
            'categories',
            layers in ((), (len(spec.categories),)) and all(c > 0 for c in spec.categories),
            "a positive number for each layer of observation['grid']",
        ),
        (
            'vocabulary',
            _is_count(spec.vocabulary)
            and (spec.vocabulary > 0) == ('instruction' in spec.observation),
            "the number of tokens of observation['instruction'], and 0 without one",
        ),
        ('words', len(spec.words) in (0, words), f'() or {words}, of the tokens 1, 2, …'),
        ('episode', _is_count(spec.episode), 'the most steps of an episode, or 0 where unknown'),
    ]
    for field, is_valid, expected in rules:
        if not is_valid:
            _refuse(spec, f'Spec.{field} = {getattr(spec, field)!r}: expected {expected}')
    if spec.random and spec.reference:
        for task, low, high in zip(spec.tasks, spec.random, spec.reference, strict=True):
            if low == high:
                _refuse(
                    spec,
                    f'Spec.reference of task {task!r} = {high}: expected a score other than that '
                    f'of Spec.random',
                )
    _check_entries(spec)


def _check_entries(spec: Spec) -> None:
    """Refuse a spec whose observation no agent can read."""
    if 'task' not in spec.observation or not spec.observation.keys() & set(AGENT_ENTRIES):
        _refuse(
            spec,
            f"Spec.observation has {_list_names(spec.observation)}: expected 'task' and at least "
            f'one of {", ".join(AGENT_ENTRIES)}',
        )
    for name, entry in spec.observation.items():
        if name not in ENTRIES:
            continue
        rank, kind, expected = ENTRIES[name]
        is_valid = len(entry.shape) == rank and all(entry.shape)
        if not is_valid or not jnp.issubdtype(entry.dtype, kind):
            actual = _describe_type(entry)
            _refuse(spec, f'Spec.observation[{name!r}] is {actual}: expected {expected}')


def check_environment(environment: JaxEnvironment) -> None:
    """Refuse an environment whose functions contradict its spec.

    Traces `reset` and `step` without running them.

    Raises:
      UserError: what was returned, and what is expected.
    """
    for name in ('spec', 'reset', 'step'):
        if not hasattr(environment, name):
            raise UserError(f'{type(environment).__name__} has no {name}; {PROTOCOL}')
    spec = environment.spec
    check_spec(spec)
    if spec.episode == 0:
        _refuse(spec, 'Spec.episode = 0: expected the most steps of an episode, for its evaluation')

    # Trace `reset`.
    key, index = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    result = jax.eval_shape(environment.reset, key, index)
    if not _is_pair(result, Mapping):
        _refuse(
            spec,
            f'reset returned {_describe_class(result)}: expected the state and the first '
            f'observation, name → array; {PROTOCOL}',
        )
    state, observation = result
    _check_observation(spec, 'reset', observation)

    # Trace `step`, whose state must have the same types.
    result = jax.eval_shape(environment.step, state, index)
    if not _is_pair(result, Transition):
        _refuse(
            spec,
            f'step returned {_describe_class(result)}: expected the state and a Transition; '
            f'{PROTOCOL}',
        )
    next_state, transition = result
    _check_observation(spec, 'step', transition.observation)
    _check_scalars(spec, transition)
    reset_types, step_types = (_describe_leaves(tree) for tree in (state, next_state))
    for path in sorted(reset_types.keys() | step_types.keys()):
        if reset_types.get(path) != step_types.get(path):
            _refuse(
                spec,
                f'state{path} is {reset_types.get(path, "absent")} after reset and '
                f'{step_types.get(path, "absent")} after step: expected the same',
            )


def check_step(spec: Spec, batch: int, step: Step) -> None:
    """Refuse a first step of a pool, [B, …], that contradicts the spec.

    Raises:
      UserError: what was returned, and what is expected.
    """
    _check_observation(spec, 'reset', step.observation, (batch,))
    for name in ('reward', 'discount', 'is_first', 'is_last', 'success'):
        shape = np.shape(getattr(step, name))
        if shape != (batch,):
            _refuse(spec, f'reset returned {name} of shape {shape}: expected ({batch},)')


def _check_observation(
    spec: Spec, function: str, observation: Any, rows: tuple[int, ...] = ()
) -> None:
    """Refuse an observation that differs from the spec."""
    if not isinstance(observation, Mapping) or observation.keys() != spec.observation.keys():
        is_mapping = isinstance(observation, Mapping)
        actual = _list_names(observation) if is_mapping else _describe_class(observation)
        _refuse(
            spec,
            f'{function} returned the observation {actual}: expected that of the spec, '
            f'{_list_names(spec.observation)}',
        )
    for name, entry in spec.observation.items():
        expected = _describe_type(jax.ShapeDtypeStruct((*rows, *entry.shape), entry.dtype))
        actual = _describe_type(observation[name])
        if actual != expected:
            _refuse(
                spec,
                f'{function} returned observation[{name!r}] as {actual}: expected {expected}, as '
                f'in Spec.observation',
            )


def _check_scalars(spec: Spec, transition: Transition) -> None:
    """Refuse rewards and flags that are not scalars of their type."""
    for name in ('reward', 'terminated', 'truncated', 'success'):
        value = getattr(transition, name)
        is_real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
        is_valid = is_real if name == 'reward' else value.dtype == bool
        if value.shape != () or not is_valid:
            expected = 'float32 []' if name == 'reward' else 'bool []'
            _refuse(spec, f'step returned {name} as {_describe_type(value)}: expected {expected}')


def _refuse(spec: Spec, message: str) -> None:
    raise UserError(f'environment {spec.name!r}: {message}')


def _is_count(value: Any) -> bool:
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and value >= 0


def _is_pair(result: Any, kind: type) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], kind)


def _are_scores(scores: Any, tasks: int) -> bool:
    return scores is None or (len(scores) == tasks and all(math.isfinite(s) for s in scores))


def _list_names(observation: Mapping[str, Any]) -> str:
    return ', '.join(map(repr, observation)) or 'nothing'


def _describe_type(array: Any) -> str:
    """Return shape and type as 'float32[3,2]'."""
    array = array if hasattr(array, 'dtype') else np.asarray(array)
    return f'{jnp.dtype(array.dtype).name}[{",".join(map(str, array.shape))}]'


def _describe_class(value: Any) -> str:
    """Return the name of a value's class, or of the classes in a tuple, as '(State, Step)'."""
    if type(value) is tuple:
        return f'({", ".join(type(part).__name__ for part in value)})'
    return type(value).__name__


def _describe_leaves(tree: Any) -> dict[str, str]:
    """Return path → shape and type of a state's arrays."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): _describe_type(leaf) for path, leaf in paths}
