"""Any motif as the one equation: `as_mi` gives the tensors, `explain` says it in words."""

from mi.unify import (  # noqa: F401
    attention,
    cells,
    dynamic_conv,
    experts,
    fusion,
    gating,
    hypernetwork,
    normalization,
    pooling,
)
from mi.unify.composition import Composition as Composition
from mi.unify.composition import Product as Product
from mi.unify.composition import as_mi as as_mi
from mi.unify.explanation import explain as explain
