"""`mi.find`: find where a JAX function multiplies values that depend on data.

    report = mi.find(model.apply, variables, x=x, z=z)
    print(report)

The package itself is callable, so `mi.find(…)` and `from mi.find import Report` both work.
"""

import sys
import types
from typing import Any

from mi.find.analysis import find as find
from mi.find.candidates import Candidate as Candidate
from mi.find.degree import Output as Output
from mi.find.report import Interaction as Interaction
from mi.find.report import Report as Report


class _CallablePackage(types.ModuleType):
    """A callable package, because importing it replaces the function `mi.find`."""

    def __call__(self, *args: Any, **streams: Any) -> Report:
        return find(*args, **streams)


sys.modules[__name__].__class__ = _CallablePackage
