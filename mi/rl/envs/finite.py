"""Checks that rewards and observations are finite, with errors that name the environment."""

import numpy as np

from mi.config import UserError
from mi.rl.envs.spec import Spec, Step


def check_finite(spec: Spec, step: Step) -> None:
    """Check that rewards and observations are finite, before the learner uses them.

    Raises:
      UserError: if one is not finite. The message names the environment, the task and the entry.
    """
    task_indices = np.asarray(step.observation['task'])
    named_arrays = {'reward': step.reward, 'discount': step.discount, **step.observation}
    for field_name, array in named_arrays.items():
        field_values = np.asarray(array)
        if not np.issubdtype(field_values.dtype, np.floating):
            continue
        is_finite = np.isfinite(field_values).reshape(len(field_values), -1).all(1)
        if is_finite.all():
            continue

        # Name the first row that is not finite, and its first such number.
        bad_row = int(np.argmin(is_finite))
        label = (
            field_name if field_name in ('reward', 'discount') else f'observation {field_name!r}'
        )
        row_values = np.atleast_1d(field_values[bad_row])
        bad_value = row_values[~np.isfinite(row_values)].flat[0]
        description = f'{spec.name}, task {spec.tasks[task_indices[bad_row]]!r},'
        raise make_error(description, f'{label} of {bad_value}')


def make_error(description: str, value: str) -> UserError:
    """Return the error to raise for a value that is not finite."""
    return UserError(
        f'the environment {description} returned a {value}: expected finite float32 numbers. Fix '
        f'or wrap the environment, because no optimizer setting helps'
    )
