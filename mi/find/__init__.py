"""`mi.find`: where values that depend on data are multiplied, in any JAX function.

    report = mi.find(model.apply, variables, x=x, z=z)
    print(report)

The package is callable, so that `mi.find(…)` and `from mi.find import Report` both work.
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
    """A package that calls `find`: importing it replaces the attribute `mi.find`."""

    def __call__(self, *args: Any, **streams: Any) -> Report:
        return find(*args, **streams)


sys.modules[__name__].__class__ = _CallablePackage
