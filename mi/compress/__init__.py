"""`mi.compress`: convert a trained MI layer to a low-rank, Tucker or block-diagonal form.

    module, variables, error = mi.compress(variables, form='cp', rank=8)
    y = module.apply(variables, x, z)

The package itself is callable, so `mi.compress(…)` and `from mi.compress import Compressed` both
work. `python -m mi.compress` compresses the layers of a run.
"""

import sys
import types
from typing import Any

from mi.compress.forms import FORMS as FORMS
from mi.compress.forms import Compressed as Compressed
from mi.compress.forms import compress as compress


class _CallablePackage(types.ModuleType):
    """A callable package, because importing it replaces the function `mi.compress`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Compressed:
        return compress(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
