"""CELLS: one config word → one recurrent cell, run over a sequence.

Shapes: T steps, B sequences, n input features, H state features; sequences are [T, B, n].

Every cell is a Linen module with the fields `features` (H), `dtype` and `param_dtype`, called

    carry, h = cell(carry, x, reset, keep)
    x [T, B, n], reset [T, B] bool or None, keep [B, H] or None → h [T, B, H]

Where `reset` is true, the state is zeroed before the step. `keep` is what h_{t−1} is multiplied by,
at every step, before anything reads it: a mask of state dropout, the same for all steps (Gal &
Ghahramani, 2016), or None. The carry is a tuple of arrays that starts with c and h, each [B, H];
`cell.initial(batch)` is the carry before the first step, and the one that is returned continues the
sequence in the next call. `dtype` is that of the products with the weights; gates and state are f32
(f64 where `dtype` is), as is what the products add up in. What depends on x alone is
made for the whole sequence before the loop. The four gates stand side by side in the order
i, f, o, j; W are weights of x, U of h, and the forget gate's bias starts at 1.

    word           class                 options
    'lstm'         LSTM                  impl
    'mlstm'        MultiplicativeLSTM
    'mi_lstm'      MILSTM                alpha, beta
    'mogrifier'    MogrifierLSTM         rounds, rank, capped
    'hyper_lstm'   HyperLSTM             hyper_features, embedding, layer_norm

A config file adds a cell of its own, for both trainers: `CELLS['mine'] = MyCell`.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from mi.cells.base import initial_carry as initial_carry
from mi.cells.hyper_lstm import HyperLSTM as HyperLSTM
from mi.cells.lstm import LSTM as LSTM
from mi.cells.mogrifier import MogrifierLSTM as MogrifierLSTM
from mi.cells.multiplicative import MILSTM as MILSTM
from mi.cells.multiplicative import MultiplicativeLSTM as MultiplicativeLSTM
from mi.config import has_parameter, suggest
from mi.kernels.lstm import Carry as Carry
from mi.kernels.lstm import Impl as Impl

CELLS: dict[str, Callable[..., nn.Module]] = {
    'lstm': LSTM,
    'mlstm': MultiplicativeLSTM,
    'mi_lstm': MILSTM,
    'mogrifier': MogrifierLSTM,
    'hyper_lstm': HyperLSTM,
}


def get(name: str, **options: Any) -> Callable[..., nn.Module]:
    """Return the constructor of CELLS[name], with those options that it has a field for.

    Raises:
      ValueError: on an unknown word, naming the nearest known one.
    """
    if name not in CELLS:
        raise ValueError(f'unknown cell {name!r}; {suggest(name, CELLS)}')
    cell = CELLS[name]
    return functools.partial(cell, **{k: v for k, v in options.items() if has_parameter(cell, k)})
