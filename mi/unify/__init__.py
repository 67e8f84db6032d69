"""Any motif as f(x, z) = zᵀWx + zᵀU + Vx + b: `as_mi` computes W, U, V, b; `explain` reports it."""

from mi.unify.composition import Composition as Composition
from mi.unify.composition import Product as Product
from mi.unify.explanation import explain as explain
from mi.unify.registry import CONVERTERS as CONVERTERS
from mi.unify.registry import as_mi as as_mi
