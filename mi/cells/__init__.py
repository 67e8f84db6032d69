"""Recurrent cells that run over whole sequences, and the table CELLS of their names.

Shapes: T steps, B sequences, n input features, H state features; sequences are [T, B, n].

Every cell is a Linen module with the fields `features` (H), `dtype` and `param_dtype`. Call it as

    carry, h = cell(carry, x, reset, keep)
    x [T, B, n], reset [T, B] bool or None, keep [B, H] or None → h [T, B, H]

- `reset` zeroes the state before a step.
- `keep` is a mask for state dropout, which multiplies h_{t−1} before every step. It is the same for
  all steps (Gal & Ghahramani, 2016).
- The carry is a tuple of arrays that starts with c and h, each [B, H]. `cell.initial(batch)` is the
  carry before the first step. Pass the returned carry to the next call to continue the sequence.
- `dtype` is the dtype of the products with the weights. Their sums, the gates and the state are in
  f32, or in f64 if `dtype` is f64.
- Products that only depend on x are computed for the whole sequence before the loop.
- The four gates are concatenated in the order i, f, o, j. W holds the weights of x and U those of
  h. The bias of the forget gate starts at 1.

    name           class                 options
    'lstm'         LSTM                  impl
    'mlstm'        MultiplicativeLSTM
    'mi_lstm'      MILSTM                alpha, beta
    'mogrifier'    MogrifierLSTM         rounds, rank, capped
    'hyper_lstm'   HyperLSTM             hyper_features, embedding, layer_norm

To use your own cell, set the config key to 'package.module:Class', or add an entry in the config
file: `CELLS['mine'] = MyCell`. Test the cell with `mi.testing.check_cell`.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from mi.cells.hyper_lstm import HyperLSTM as HyperLSTM
from mi.cells.lstm import LSTM as LSTM
from mi.cells.mogrifier import MogrifierLSTM as MogrifierLSTM
from mi.cells.multiplicative import MILSTM as MILSTM
from mi.cells.multiplicative import MultiplicativeLSTM as MultiplicativeLSTM
from mi.cells.state import initial_carry as initial_carry
from mi.config import has_parameter, suggest
from mi.kernels.lstm import Carry as Carry
from mi.kernels.lstm import Impl as Impl
from mi.registry import Registry

CELLS: Registry[Callable[..., nn.Module]] = Registry(
    lstm=LSTM,
    mlstm=MultiplicativeLSTM,
    mi_lstm=MILSTM,
    mogrifier=MogrifierLSTM,
    hyper_lstm=HyperLSTM,
)
CELLS.refuse = lambda cell: '' if is_cell(cell) else 'its __call__ has no argument reset'


def is_cell(constructor: Callable[..., nn.Module]) -> bool:
    """Return whether a module or a partial of a module is called with an argument `reset`."""
    module: Any = constructor
    while isinstance(module, functools.partial):
        module = module.func
    return has_parameter(module.__call__, 'reset')


def get(cell_name: str, **options: object) -> Callable[..., nn.Module]:
    """Return the constructor CELLS[cell_name], with the options that are fields of the cell bound.

    Raises:
      ValueError: if the name is unknown. The message suggests the nearest known name.
    """
    if cell_name not in CELLS:
        raise ValueError(f'unknown cell {cell_name!r}; {suggest(cell_name, CELLS)}')
    cell = CELLS[cell_name]
    known_options = {option: options[option] for option in options if has_parameter(cell, option)}
    return functools.partial(cell, **known_options)
