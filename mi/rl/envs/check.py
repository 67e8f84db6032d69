"""Checks that an environment agrees with its spec, before anything is compiled."""

import math
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mi.config import UserError
from mi.rl.envs.spec import JaxEnvironment, Observation, Spec, Step, Transition

PROTOCOL = 'see JaxEnvironment in mi/rl/envs/spec.py'
AGENT_ENTRIES = ('grid', 'pixels', 'features')  # an agent needs one of them
# Entry of an observation → rank, type, and both as text.
ENTRIES: dict[str, tuple[int, DTypeLike, str]] = {
    'task': (0, jnp.int32, 'int32 []'),
    'grid': (3, jnp.integer, 'integers [h, w, layers]'),
    'pixels': (3, jnp.uint8, 'uint8 [h, w, c]'),
    'features': (1, jnp.floating, 'floats [n]'),
    'instruction': (1, jnp.integer, 'integers [L]'),
}


def check_batch(env_name: str, num_tasks: int, batch: int) -> None:
    """Check that a batch of environments has a row for each task.

    Raises:
      UserError: if it has fewer rows.
    """
    if batch < num_tasks:
        raise UserError(
            f'{env_name} has {num_tasks} tasks but the batch has only {batch} environments: '
            f'expected at least one per task. Raise `batch` or choose fewer tasks'
        )


def check_spec(spec: Spec) -> None:
    """Check that a spec is valid and consistent.

    Raises:
      UserError: if a field is invalid or contradicts another one.
    """
    if not isinstance(spec, Spec):
        raise UserError(f'environment.spec = {spec!r}: expected a Spec; {PROTOCOL}')

    # A rule for each field: whether it holds, and what is expected.
    num_tasks = len(spec.tasks)
    layer_sizes = spec.observation['grid'].shape[-1:] if 'grid' in spec.observation else ()
    num_words = max(0, spec.vocabulary - 1)
    rules = [
        ('actions', _is_count(spec.actions) and spec.actions > 0, 'an integer of at least 1'),
        (
            'tasks',
            not isinstance(spec.tasks, str) and 0 < num_tasks == len(set(spec.tasks)),
            'a tuple of distinct names',
        ),
        ('random', _are_scores(spec.random, num_tasks), f'None or {num_tasks} numbers'),
        ('reference', _are_scores(spec.reference, num_tasks), f'None or {num_tasks} numbers'),
        (
            'categories',
            layer_sizes in ((), (len(spec.categories),)) and all(c > 0 for c in spec.categories),
            "a positive number for each layer of observation['grid']",
        ),
        (
            'vocabulary',
            _is_count(spec.vocabulary)
            and (spec.vocabulary > 0) == ('instruction' in spec.observation),
            "the number of tokens of observation['instruction'], and 0 without one",
        ),
        ('words', len(spec.words) in (0, num_words), f'() or {num_words} words for tokens 1, 2, …'),
        ('episode', _is_count(spec.episode), 'the maximum length of an episode, or 0 if unknown'),
    ]
    for field_name, is_valid, expected in rules:
        if not is_valid:
            _refuse(spec, f'Spec.{field_name} = {getattr(spec, field_name)!r}: expected {expected}')

    # Scores are normalized by the difference of the two references.
    if spec.random and spec.reference:
        for task_name, random_score, reference_score in zip(
            spec.tasks, spec.random, spec.reference, strict=True
        ):
            if random_score == reference_score:
                _refuse(
                    spec,
                    f'Spec.reference of task {task_name!r} = {reference_score}: expected a score '
                    f'different from that in Spec.random',
                )
    _check_entries(spec)


def _check_entries(spec: Spec) -> None:
    """Check that an agent can read the observation of a spec."""
    if 'task' not in spec.observation or not spec.observation.keys() & set(AGENT_ENTRIES):
        _refuse(
            spec,
            f"Spec.observation has {_list_names(spec.observation)}: expected 'task' and at least "
            f'one of {", ".join(AGENT_ENTRIES)}',
        )
    for entry_name, entry in spec.observation.items():
        if entry_name not in ENTRIES:
            continue
        expected_rank, expected_dtype, expected = ENTRIES[entry_name]
        is_valid = len(entry.shape) == expected_rank and all(entry.shape)
        if not is_valid or not jnp.issubdtype(entry.dtype, expected_dtype):
            actual = _describe_type(entry)
            _refuse(spec, f'Spec.observation[{entry_name!r}] is {actual}: expected {expected}')


def check_environment(environment: JaxEnvironment) -> None:
    """Check that `reset` and `step` of an environment agree with its spec.

    The two methods are traced but not run.

    Raises:
      UserError: if the spec is invalid, or a method is missing or contradicts it.
    """
    for method_name in ('spec', 'reset', 'step'):
        if not hasattr(environment, method_name):
            raise UserError(f'{type(environment).__name__} has no {method_name}; {PROTOCOL}')
    spec = environment.spec
    check_spec(spec)
    if spec.episode == 0:
        _refuse(spec, 'Spec.episode = 0: expected the maximum length of an episode, for evaluation')

    # Trace `reset`.
    rng_key, task_index = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    result = jax.eval_shape(environment.reset, rng_key, task_index)
    if not _is_pair(result, Mapping):
        _refuse(
            spec,
            f'reset returned {_describe_class(result)}: expected the state and the first '
            f'observation, name → array; {PROTOCOL}',
        )
    reset_state, observation = result
    _check_observation(spec, 'reset', observation)

    # Trace `step`, whose state must have the same types.
    result = jax.eval_shape(environment.step, reset_state, task_index)
    if not _is_pair(result, Transition):
        _refuse(
            spec,
            f'step returned {_describe_class(result)}: expected the state and a Transition; '
            f'{PROTOCOL}',
        )
    step_state, transition = result
    _check_observation(spec, 'step', transition.observation)
    _check_scalars(spec, transition)
    reset_types, step_types = (_describe_leaves(tree) for tree in (reset_state, step_state))
    for state_path in sorted(reset_types.keys() | step_types.keys()):
        if reset_types.get(state_path) != step_types.get(state_path):
            _refuse(
                spec,
                f'state{state_path} is {reset_types.get(state_path, "absent")} after reset and '
                f'{step_types.get(state_path, "absent")} after step: expected the same',
            )


def check_step(spec: Spec, batch: int, step: Step) -> None:
    """Check that the first step of a pool, [B, …], agrees with its spec.

    Raises:
      UserError: if a shape or dtype differs from the spec.
    """
    _check_observation(spec, 'reset', step.observation, (batch,))
    for field_name in ('reward', 'discount', 'is_first', 'is_last', 'success'):
        shape = np.shape(getattr(step, field_name))
        if shape != (batch,):
            _refuse(spec, f'reset returned {field_name} of shape {shape}: expected ({batch},)')


def _check_observation(
    spec: Spec, function: str, observation: Observation, rows: tuple[int, ...] = ()
) -> None:
    """Check that an observation has the entries, shapes and dtypes of the spec."""
    is_mapping = isinstance(observation, Mapping)
    if not is_mapping or observation.keys() != spec.observation.keys():
        actual = _list_names(observation) if is_mapping else _describe_class(observation)
        _refuse(
            spec,
            f'{function} returned the observation {actual}: expected that of the spec, '
            f'{_list_names(spec.observation)}',
        )
    for entry_name, entry in spec.observation.items():
        expected = _describe_type(jax.ShapeDtypeStruct((*rows, *entry.shape), entry.dtype))
        actual = _describe_type(observation[entry_name])
        if actual != expected:
            _refuse(
                spec,
                f'{function} returned observation[{entry_name!r}] as {actual}: expected '
                f'{expected}, as in Spec.observation',
            )


def _check_scalars(spec: Spec, transition: Transition) -> None:
    """Check that the reward and the flags are scalars of the right type."""
    for field_name in ('reward', 'terminated', 'truncated', 'success'):
        field_value = getattr(transition, field_name)
        is_real = jnp.issubdtype(field_value.dtype, jnp.floating) or jnp.issubdtype(
            field_value.dtype, jnp.integer
        )
        is_valid = is_real if field_name == 'reward' else field_value.dtype == bool
        if field_value.shape != () or not is_valid:
            expected = 'float32 []' if field_name == 'reward' else 'bool []'
            _refuse(
                spec,
                f'step returned {field_name} as {_describe_type(field_value)}: expected {expected}',
            )


def _refuse(spec: Spec, message: str) -> None:
    raise UserError(f'environment {spec.name!r}: {message}')


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return int(value) >= 0


def _is_pair(result: object, kind: type) -> bool:
    return isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], kind)


def _are_scores(scores: Sequence[float] | None, num_tasks: int) -> bool:
    return scores is None or (
        len(scores) == num_tasks and all(math.isfinite(score) for score in scores)
    )


def _list_names(observation: Mapping[str, object]) -> str:
    return ', '.join(map(repr, observation)) or 'nothing'


def _describe_type(array: chex.ArrayNumpy | jax.Array | jax.ShapeDtypeStruct) -> str:
    """Return the dtype and shape of an array, for example 'float32[3,2]'."""
    typed_array = array if hasattr(array, 'dtype') else np.asarray(array)
    return f'{_name_dtype(typed_array.dtype)}[{",".join(map(str, typed_array.shape))}]'


def _name_dtype(dtype: DTypeLike) -> str:
    """Return the name of a dtype, for example 'float32', or 'key<fry>' for random keys."""
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return str(dtype) if is_key else jnp.dtype(dtype).name


def _describe_class(value: object) -> str:
    """Return the class name of a value, or of each tuple element: '(State, Step)'."""
    if type(value) is tuple:
        return f'({", ".join(type(element).__name__ for element in value)})'
    return type(value).__name__


def _describe_leaves(tree: chex.ArrayTree) -> dict[str, str]:
    """Return path → dtype and shape for the arrays of a state."""
    paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(key_path): _describe_type(leaf) for key_path, leaf in paths_and_leaves
    }
