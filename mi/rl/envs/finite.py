"""Checks that rewards and observations are finite, with errors that name the environment."""

import numpy as np

from mi.config import UserError
from mi.rl.envs.spec import Spec, Step


def check_finite(spec: Spec, step: Step) -> None:
    """Refuse a reward or an observation that is NaN or infinite, before it is learned from.

    Raises:
      UserError: which environment, task and entry.
    """
    task = np.asarray(step.observation['task'])
    values = {'reward': step.reward, 'discount': step.discount, **step.observation}
    for name, value in values.items():
        value = np.asarray(value)
        if not np.issubdtype(value.dtype, np.floating):
            continue
        is_finite = np.isfinite(value).reshape(len(value), -1).all(1)
        if is_finite.all():
            continue
        row = int(np.argmin(is_finite))
        label = name if name in ('reward', 'discount') else f'observation {name!r}'
        example = value[row][~np.isfinite(value[row])].flat[0] if value[row].ndim else value[row]
        environment = f'{spec.name}, task {spec.tasks[task[row]]!r},'
        raise make_error(environment, f'{label} of {example}')


def make_error(environment: str, value: str) -> UserError:
    """Return the error about a value that is not finite."""
    return UserError(
        f'the environment {environment} returned a {value}: expected finite float32 numbers. Fix '
        f'or wrap the environment; no optimizer setting helps'
    )
