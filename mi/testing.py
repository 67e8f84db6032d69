"""Checks for user-defined modules, which the modules of this package also pass.

    from mi import testing

    def test_my_fusion():
        testing.check_fusion(MyFusion)

    def test_my_environment():
        testing.check_environment(make_my_environment(''))

Each check raises AssertionError with the expected and the actual result. Modules that pass work in
every trainer, topology and sweep of this package. Importing `mi.testing` requires the extra
`train`.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

FEATURES, CONTEXT, OUTPUTS = 12, 8, 18  # sizes n, m and k that do not divide each other
LEADING_AXES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    *(((), ()), ((6,), (6,)), ((2, 5), (2, 1)), ((2, 5), (5,)), ((2, 5), ())),
    *(((2, 1), (2, 5)), ((5,), (2, 5)), ((2, 1), (1, 5))),
)
"""Leading axes of x and of z that broadcast against each other."""
STEPS, ROWS = 6, 3
TOLERANCE = 2e-5


@jax.numpy_rank_promotion('allow')
def check_fusion(
    constructor: Callable[..., nn.Module], *, is_one_hot: bool = False, uses_context: bool = True
) -> None:
    """Check that a module (x, z) → y meets the requirements of `mi.fusion`.

    - y is [..., features] for leading axes of x and z that broadcast. Broadcasting a stream is
      equivalent to repeating it.
    - Each row of y depends only on its own row of x and z, and `jit` and `vmap` do not change it.
    - The gradients of every parameter, of x and of z are finite and not all zero.
    - `dtype` is the dtype of y, and parameters stay in `param_dtype`.

    Args:
      constructor: constructor of the module, called with `features` and, by keyword, `dtype`.
      is_one_hot: whether z is one-hot, as for the names in `mi.fusion.ONE_HOT`.
      uses_context: whether y depends on z, which is False for a baseline without context.

    Raises:
      AssertionError: if a check fails. The message shows the expected and the actual result.
    """
    module: Any = constructor(OUTPUTS)
    variables = randomize(module, jnp.zeros((1, FEATURES)), _draw_context(1, is_one_hot))
    apply = jax.jit(module.apply)

    # Leading axes, where either stream can be shared.
    for x_rows, z_rows in LEADING_AXES:
        x, z = _normal(0, *x_rows, FEATURES), _draw_context(z_rows, is_one_hot)
        rows = jnp.broadcast_shapes(x_rows, z_rows)
        y = apply(variables, x, z)
        _expect(
            y.shape == (*rows, OUTPUTS),
            f'x {x.shape} and z {z.shape}: expected y {(*rows, OUTPUTS)}, got {y.shape}',
        )
        repeated = jnp.broadcast_to(x, (*rows, FEATURES)), jnp.broadcast_to(z, (*rows, CONTEXT))
        subject = f'x {x.shape} and z {z.shape}, and both repeated'
        _expect_close(y, apply(variables, *repeated), subject)

    # Rows are independent, compiled or not.
    x, z = _normal(0, 6, FEATURES), _draw_context(6, is_one_hot)
    y = apply(variables, x, z)
    _expect_close(module.apply(variables, x, z), y, 'calls with and without jit', TOLERANCE)
    _expect_close(
        jax.vmap(apply, (None, 0, 0))(variables, x, z), y, 'calls with and without vmap', TOLERANCE
    )
    _expect_close(apply(variables, x[::-1], z[::-1])[::-1], y, 'rows in either order', TOLERANCE)

    # Gradients.
    gradient = jax.jit(jax.grad(lambda *inputs: (module.apply(*inputs) ** 2).sum(), (0, 1, 2)))
    param_grads, x_grad, z_grad = gradient(variables, x, z)
    _check_gradients(param_grads)
    _check_gradient('x', x_grad)
    _expect(bool(jnp.isfinite(z_grad).all()), 'the gradient of z is not finite')
    _expect(
        bool((z_grad != 0).any()) == uses_context,
        f'expected a {"nonzero" if uses_context else "zero"} gradient of z',
    )

    # Types.
    low_precision = constructor(OUTPUTS, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(low_precision.init_with_output, jax.random.key(0), x, z)
    _expect(shapes[0].dtype == jnp.bfloat16, f'dtype=bfloat16: y is {shapes[0].dtype}')
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(shapes[1])}
    _expect(dtypes <= {'float32'}, f'dtype=bfloat16: expected float32 parameters, got {dtypes}')


@jax.numpy_rank_promotion('allow')
def check_cell(constructor: Callable[..., nn.Module], features: int = 8) -> None:
    """Check a recurrent cell, (carry, x [T, B, n], reset, keep) → (carry, h [T, B, H]).

    - h has shape [T, B, H]. The carry starts with c and h, each [B, H], and a call preserves its
      structure, shapes and dtypes.
    - Running a sequence in two halves gives the same result as running it in one call.
    - h_t does not depend on later steps of x or on other rows.
    - `reset` before a step is equivalent to a new sequence in this row, and has no effect on other
      rows.
    - `keep` multiplies the h of the previous step before every step.
    - The gradients of every parameter and of x are finite and not all zero.

    Args:
      constructor: constructor of the cell, called with `features`.
      features: H, the number of state features.

    Raises:
      AssertionError: if a check fails. The message shows the expected and the actual result.
    """
    cell: Any = constructor(features)
    x, carry = _normal(0, STEPS, ROWS, FEATURES), cell.initial(ROWS)
    variables = randomize(cell, carry, x)
    apply = jax.jit(cell.apply)

    # Shapes.
    last, hidden = apply(variables, carry, x)
    expected_shape = (STEPS, ROWS, features)
    _expect(hidden.shape == expected_shape, f'expected h {expected_shape}, got {hidden.shape}')
    first_types, last_types = _describe(carry), _describe(last)
    _expect(
        first_types == last_types,
        f'expected a carry with the types of the initial carry, {first_types}, got {last_types}',
    )
    state_shapes = [jnp.shape(state) for state in carry[:2]]
    _expect(
        state_shapes == 2 * [(ROWS, features)],
        f'expected a carry that starts with c and h, each {(ROWS, features)}, got {state_shapes}',
    )

    # Rows.
    row = jax.tree.map(lambda leaf: leaf[:1], carry)
    alone = apply(variables, row, x[:, :1])[1]
    _expect_close(alone, hidden[:, :1], 'a row by itself and in a batch')

    # Time and state dropout.
    _check_time(apply, variables, carry, x)
    _check_keep(apply, variables, carry, x)

    # Gradients.
    gradient = jax.jit(jax.grad(lambda v, x: (cell.apply(v, carry, x)[1] ** 2).sum(), (0, 1)))
    param_grads, x_grad = gradient(variables, x)
    _check_gradients(param_grads)
    _check_gradient('x', x_grad)


def _check_time(apply: Callable[..., Any], variables: Any, carry: Any, x: Array) -> None:
    """Check that a cell continues from its carry, does not see later steps, and resets rows."""
    half = len(x) // 2
    last, hidden = apply(variables, carry, x)

    # A sequence in two halves.
    middle, first_half = apply(variables, carry, x[:half])
    end, second_half = apply(variables, middle, x[half:])
    _expect_close(
        jnp.concatenate([first_half, second_half]),
        hidden,
        'a sequence in two halves and in one call',
    )
    for name, full_state, state in zip(
        _describe(last), *map(jax.tree.leaves, (last, end)), strict=True
    ):
        _expect_close(state, full_state, f'carry{name} after two halves and after one call')

    # Later steps of x, and a reset of the first row.
    changed = x.at[half:].set(0.0)
    _expect_close(
        apply(variables, carry, changed)[1][:half],
        hidden[:half],
        f'h before step {half} when later x change',
    )
    reset = jnp.zeros(x.shape[:2], bool).at[half, 0].set(True)
    _, restarted = apply(variables, carry, x, reset)
    fresh = apply(variables, carry, x[half:])[1]
    subject = 'h after a reset and at the start of a sequence'
    _expect_close(restarted[half:, 0], fresh[:, 0], subject)
    _expect_close(restarted[:, 1:], hidden[:, 1:], 'h with and without a reset of another row')


def _check_keep(apply: Callable[..., Any], variables: Any, carry: Any, x: Array) -> None:
    """Check that `keep` multiplies the h of the previous step before every step."""
    middle, _ = apply(variables, carry, x[:1])

    # Half of the features are dropped, and the others doubled, as by state dropout.
    keep = 2.0 * jax.random.bernoulli(jax.random.key(2), shape=middle[1].shape)
    dropped, state = apply(variables, middle, x[1:], None, keep)[1], middle
    for step in range(1, len(x)):
        c, h, *others = state
        state, next_h = apply(variables, (c, (keep * h).astype(h.dtype), *others), x[step][None])
        _expect_close(dropped[step - 1], next_h[0], 'h with keep and after a product with keep')


@jax.numpy_rank_promotion('allow')
def check_environment(environment: Any, num_rows: int = 8, seed: int = 0) -> None:
    """Check a `mi.rl.envs.spec.JaxEnvironment`: its spec, and episodes of a random policy.

    - The types of reset and step match the spec (`mi.rl.envs.check.check_environment`).
    - Equal keys and actions give equal episodes, with `jit` and `vmap`.
    - Observations are finite and within the spec's categories, vocabulary and tasks.
    - Rewards are finite.
    - An observation has the task of its episode.
    - Every episode ends within `Spec.episode` steps.

    Args:
      environment: the environment.
      num_rows: number of episodes that run in parallel.
      seed: seed of the actions and the episodes.

    Raises:
      UserError: if the spec is invalid, or a method is missing or contradicts it.
      AssertionError: if another check fails. The message shows the expected and the actual result.
    """
    from mi.rl.envs import check

    # Types, without running anything.
    check.check_environment(environment)
    spec = environment.spec
    tasks = jnp.arange(num_rows, dtype=jnp.int32) % len(spec.tasks)
    reset, step = jax.jit(jax.vmap(environment.reset)), jax.jit(jax.vmap(environment.step))

    def play() -> list[Any]:
        keys = jax.random.split(jax.random.key(seed), num_rows)
        state, observation = reset(keys, tasks)
        steps, is_over = [jax.tree.map(np.asarray, observation)], np.zeros(num_rows, bool)
        rng = np.random.default_rng(seed)
        for _ in range(spec.episode):
            action = rng.integers(spec.actions, size=num_rows).astype(np.int32)
            state, transition = step(state, action)
            transition = jax.tree.map(np.asarray, transition)
            is_running = ~is_over
            _check_observations(spec, transition.observation, is_running, np.asarray(tasks))
            _expect(
                bool(np.isfinite(transition.reward[is_running]).all()),
                f'expected finite rewards, got {transition.reward}',
            )
            is_over |= transition.terminated | transition.truncated
            steps.append(transition)
            if is_over.all():
                return steps
        raise AssertionError(
            f'Spec.episode = {spec.episode}: expected every episode to end within this many steps, '
            f'but {num_rows - is_over.sum()} of {num_rows} did not'
        )

    # Episodes of a random policy, twice.
    first, second = play(), play()
    _check_observations(spec, first[0], np.ones(num_rows, bool), np.asarray(tasks))
    chex.assert_trees_all_equal(first, second, custom_message='two episodes with the same key')


@jax.numpy_rank_promotion('allow')
def check_host_environment(
    maker: Callable[..., Any], suite: str = '', num_rows: int = 2, num_steps: int = 200
) -> None:
    """Check a `mi.rl.envs.spec.HostEnvironment` with a random policy.

    - The spec and the first step are valid (`mi.rl.envs.check`).
    - Every step has finite rewards, and the same shapes and dtypes as the first step.
    - Observations are within the spec's categories, vocabulary and tasks.
    - Each row keeps its task. The step after `is_last` has `is_first` and reward 0.
    - Equal seeds and actions give equal steps.
    - `recv` does not overwrite the previous step.

    Args:
      maker: maker(suite, *, batch, seed) → environment, as in `mi.rl.envs.HOST`.
      suite: the part of the environment's name after the slash.
      num_rows: number of rows, with at least one for each task.
      num_steps: number of steps of the random policy.

    Raises:
      UserError: if the spec is invalid, or a shape or dtype differs from it.
      AssertionError: if another check fails. The message shows the expected and the actual result.
    """
    from mi.rl.envs import check

    def play() -> list[Any]:
        pool = maker(suite, batch=num_rows, seed=0)
        try:
            # The first step.
            check.check_spec(pool.spec)
            step = pool.reset()
            check.check_step(pool.spec, num_rows, step)
            tasks, everyone = np.array(step.observation['task']), np.ones(num_rows, bool)
            _expect(bool(np.all(step.is_first)), 'reset: expected is_first in every row')
            steps, rng = [jax.tree.map(np.array, step)], np.random.default_rng(0)
            # Steps of a random policy.
            for _ in range(num_steps):
                previous, previous_copy = step, steps[-1]
                pool.send(rng.integers(pool.spec.actions, size=num_rows).astype(np.int32))
                step = pool.recv()
                chex.assert_trees_all_equal(
                    jax.tree.map(np.asarray, previous),
                    previous_copy,
                    custom_message='recv overwrote the step that it had returned',
                )
                chex.assert_trees_all_equal_shapes_and_dtypes(
                    jax.tree.map(np.asarray, step), previous_copy
                )
                _check_observations(pool.spec, step.observation, everyone, tasks)
                _check_stream(previous_copy, step)
                steps.append(jax.tree.map(np.array, step))
            return steps
        finally:
            pool.close()

    chex.assert_trees_all_equal(play(), play(), custom_message='two pools with the same seed')


def randomize(module: nn.Module, *inputs: Any, scale: float = 0.3) -> Any:
    """Draw random variables for a module, so that zero initializers have no effect."""
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), max(1, len(leaves)))
    draws = [
        scale * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(structure, draws)


def _check_stream(previous: Any, step: Any) -> None:
    """Check a step of a pool: its rewards, its discounts, and the start of new episodes."""
    is_restart = np.asarray(previous.is_last)
    _expect(
        bool(np.all(np.asarray(step.is_first)[is_restart])),
        'the step after is_last: expected is_first',
    )
    _expect(
        bool((np.asarray(step.reward)[is_restart] == 0).all()),
        'the step after is_last: expected reward 0',
    )
    reward, discount = np.asarray(step.reward), np.asarray(step.discount)
    _expect(bool(np.isfinite(reward).all()), f'expected finite rewards, got {reward}')
    _expect(bool(np.isin(discount, (0, 1)).all()), f'expected discounts 0 or 1, got {discount}')


def _check_observations(spec: Any, observation: Any, is_running: np.ndarray, tasks: Any) -> None:
    """Check that the observations of running rows are valid for their tasks."""
    limits = {'task': len(spec.tasks), 'instruction': spec.vocabulary}
    for name, array in observation.items():
        values = np.asarray(array)[is_running]
        if name == 'task':
            expected = np.asarray(tasks)[is_running]
            _expect(
                bool((values == expected).all()),
                f"observation['task']: expected the task of the episode, {expected}, got {values}",
            )
        if name in limits and values.size:
            low, high = values.min(), values.max()
            _expect(
                bool(low >= 0 and high < limits[name]),
                f'observation[{name!r}]: expected 0 to {limits[name] - 1}, got {low} to {high}',
            )
        if name == 'grid' and values.size:
            highest = values.reshape(-1, values.shape[-1]).max(axis=0)
            _expect(
                bool((highest < np.asarray(spec.categories)).all() and values.min() >= 0),
                f"observation['grid']: expected layers below {spec.categories}, got {highest}",
            )
        if np.issubdtype(values.dtype, np.floating):
            _expect(bool(np.isfinite(values).all()), f'observation[{name!r}] is not finite')


def _check_gradients(grads: Any) -> None:
    """Check the gradient of every parameter."""
    for path, grad in jax.tree_util.tree_flatten_with_path(grads)[0]:
        _check_gradient(f'parameter {jax.tree_util.keystr(path)}', grad)


def _check_gradient(name: str, grad: Array) -> None:
    _expect(bool(jnp.isfinite(grad).all()), f'the gradient of {name} is not finite')
    _expect(bool((grad != 0).any()), f'the gradient of {name} is zero')


def _normal(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _draw_context(rows: int | tuple[int, ...], is_one_hot: bool) -> Array:
    """Draw a context [*rows, m], either normally distributed or one-hot."""
    shape = (rows,) if isinstance(rows, int) else rows
    if not is_one_hot:
        return _normal(1, *shape, CONTEXT)
    return jax.nn.one_hot(jax.random.randint(jax.random.key(1), shape, 0, CONTEXT), CONTEXT)


def _describe(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of every leaf, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in leaves}


def _expect_close(actual: Any, expected: Any, subject: str, tolerance: float = TOLERANCE) -> None:
    try:
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
    except AssertionError as error:
        raise AssertionError(f'expected equal results for {subject}{error}') from error


def _expect(is_met: bool, message: str) -> None:
    if not is_met:
        raise AssertionError(message)
