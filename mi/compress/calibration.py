"""Calibration of a compressed layer, which fits its outputs to the trained layer's outputs."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from mi.layers import MultiplicativeInteraction
from mi.unify.tensors import Tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MAX_STEPS = 2000  # of L-BFGS
TOLERANCE = 1e-14  # relative decrease of the error at which it ends


def calibrate(
    module: MultiplicativeInteraction,
    params: Mapping[str, np.ndarray],
    tensors: Tensors,
    inputs: 'tuple[ArrayLike, ArrayLike]',
) -> dict[str, np.ndarray]:
    """Return the parameters that minimize the mean squared error of the outputs, in float64.

    L-BFGS starts from the given parameters and never returns worse ones. For the block form, the
    error is convex, so the minimum is global.

    Args:
      module: the compressed layer.
      params: the initial parameters of the compressed layer.
      tensors: the tensors of the trained layer, whose outputs are the targets.
      inputs: x [..., n] and z [..., m], or integer ids z [...].
    """
    from scipy import optimize  # layers do without it

    with jax.enable_x64(True):
        # The error of the outputs as a function of one flat vector of parameters.
        x, z = (jnp.asarray(stream) for stream in inputs)
        x = x.astype(jnp.float64)
        if not jnp.issubdtype(z.dtype, jnp.integer):
            z = z.astype(jnp.float64)
        module = module.clone(dtype=jnp.float64, param_dtype=jnp.float64, precision='highest')
        initial, unravel = ravel_pytree({name: jnp.asarray(params[name]) for name in params})
        compute_loss = _make_loss(module, unravel, x, z, jnp.asarray(tensors.apply(*inputs)))

        def evaluate(flat: np.ndarray) -> tuple[float, np.ndarray]:
            loss, grad = compute_loss(jnp.asarray(flat))
            return float(loss), np.asarray(grad)

        # Ties count as improved; NaN does not.
        options = {'maxiter': MAX_STEPS, 'maxfun': 2 * MAX_STEPS, 'ftol': TOLERANCE, 'gtol': 1e-12}
        result = optimize.minimize(
            evaluate, np.asarray(initial), jac=True, method='L-BFGS-B', options=options
        )
        has_improved = result.fun <= evaluate(np.asarray(initial))[0]
        best = unravel(jnp.asarray(result.x if has_improved else initial))
        return {name: np.asarray(best[name]) for name in params}


def _make_loss(
    module: MultiplicativeInteraction,
    unravel: Callable[[jax.Array], Any],
    x: jax.Array,
    z: jax.Array,
    target: jax.Array,
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Return a function from flat parameters to the relative squared error and its gradient."""
    scale = jnp.maximum(jnp.square(target).sum(), jnp.finfo(target.dtype).tiny)

    def compute_loss(flat: jax.Array) -> jax.Array:
        output: Any = module.apply({'params': unravel(flat)}, x, z)
        return jnp.square(output - target).sum() / scale

    return jax.jit(jax.value_and_grad(compute_loss))
