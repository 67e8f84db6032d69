"""Whether what an environment on the host returns is finite, and who is to blame if it is not."""

import numpy as np

from mi.config import UserError
from mi.rl.envs.spec import Spec, Step


def check_finite(spec: Spec, step: Step) -> None:
    """Refuse a reward or an observation that is NaN or infinite, before anything learns from it.

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
        what = name if name in ('reward', 'discount') else f'observation {name!r}'
        wrong = value[row][~np.isfinite(value[row])].flat[0] if value[row].ndim else value[row]
        where = f'{spec.name}, task {spec.tasks[task[row]]!r},'
        raise error(where, f'{what} of {wrong}')


def error(environment: str, what: str) -> UserError:
    """Return the error about an environment that returned what is not finite."""
    return UserError(
        f'the environment {environment} returned a {what}: expected finite float32 numbers. Mend '
        f'the environment, or wrap it; no setting of the optimizer helps'
    )
