"""Conversion of variables from modules in `mi.layers` to the tensors W, U, V and b."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mi.unify.composition import Variables

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class Tensors(NamedTuple):
    """The tensors of f(x, z) = zᵀWx + zᵀU + Vx + b in float64.

    Attributes:
      W: the tensor of the interaction, [m, n, k].
      U, V, b: the other terms, [m, k], [n, k] and [k], or None for a term that the module does not
        have.
    """

    W: np.ndarray
    U: np.ndarray | None
    V: np.ndarray | None
    b: np.ndarray | None

    def apply(self, x: 'ArrayLike', z: 'ArrayLike') -> np.ndarray:
        """Return f(x, z) [..., k] for x [..., n] and z [..., m] or integer ids z [...].

        Ids outside of [0, m) are clipped, as in the layers.
        """
        inputs, contexts = np.asarray(x, np.float64), np.asarray(z)
        if np.issubdtype(contexts.dtype, np.integer):
            contexts = np.eye(len(self.W))[np.clip(contexts, 0, len(self.W) - 1)]
        contexts = contexts.astype(np.float64)
        output = np.einsum('...m,mnk,...n->...k', contexts, self.W, inputs, optimize=True)
        if self.U is not None:
            output = output + contexts @ self.U
        if self.V is not None:
            output = output + inputs @ self.V
        return output if self.b is None else output + self.b


def compute_tensors(variables: Variables) -> Tensors:
    """Return W, U, V and b for the variables of a module from `mi.layers`.

    The form is inferred from the names and shapes of the parameters. W [m, n, k] is the full form
    or `MultiHead`, W [g, m, ⌈n/g⌉, ⌈k/g⌉] the block form, W [m, n] the diagonal form, and W [m, 1]
    the scalar form. P, Q and O are the low-rank form, or the Tucker form if there is also a G. A
    block form without V is assumed to have a multiple of g inputs. For other modules, use
    `mi.as_mi`.

    Args:
      variables: variables of the module, as for `module.apply`.

    Raises:
      ValueError: if the parameters do not match any form.
    """
    params = {
        name: np.asarray(leaf, np.float64)
        for name, leaf in variables.get('params', {}).items()
        if not isinstance(leaf, Mapping)
    }
    # Expand W where the form does not have all of its entries.
    factors = {name: params[name] for name in ('P', 'Q', 'G', 'O') if name in params}
    W: Any = params.get('W')
    if factors.keys() == {'P', 'Q', 'O'}:
        W = np.einsum('mr,nr,rk->mnk', *factors.values())
    elif factors.keys() == {'P', 'Q', 'G', 'O'}:
        W = np.einsum('ma,nb,abc,ck->mnk', *factors.values(), optimize=True)
    elif W is not None and W.ndim == 4:
        W = _expand_blocks(params)
    elif W is not None and W.ndim == 2 and params.keys() == {'W', 'U', 'V', 'b'}:
        num_features = params['U'].shape[1]
        identity = np.eye(num_features)
        W = W[:, :, None] * identity  # a scalar form has one column, which broadcasts
        params['V'] = params['V'] * identity
    elif W is None or W.ndim != 3:
        shapes = {name: array.shape for name, array in params.items()}
        raise ValueError(
            f'variables with the parameters {shapes or sorted(variables)}: expected those of a '
            f'module from mi.layers. Try mi.as_mi(module, variables, x, z)'
        )
    return Tensors(W, params.get('U'), params.get('V'), params.get('b'))


def _expand_blocks(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return W [m, n, k] for the block form, without the padding in its last block."""
    num_blocks, context_size, block_inputs, block_outputs = params['W'].shape
    W = np.zeros((context_size, num_blocks * block_inputs, num_blocks * block_outputs))
    for index, block in enumerate(params['W']):
        rows = slice(index * block_inputs, (index + 1) * block_inputs)
        columns = slice(index * block_outputs, (index + 1) * block_outputs)
        W[:, rows, columns] = block
    input_size = params['V'].shape[0] if 'V' in params else W.shape[1]
    output_sizes = [params[name].shape[-1] for name in 'UVb' if name in params]
    return W[:, :input_size, : min(output_sizes, default=W.shape[2])]
