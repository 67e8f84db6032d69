"""Conversion of any motif to f(x, z) = zᵀWx + zᵀU + Vx + b, and analysis of its tensors.

`as_mi` computes W, U, V and b, and `explain` describes them. `compute_spectrum` and the other
functions of `mi.unify.spectrum` analyze W.
"""

from mi.unify.composition import Composition as Composition
from mi.unify.composition import Product as Product
from mi.unify.explanation import explain as explain
from mi.unify.registry import CONVERTERS as CONVERTERS
from mi.unify.registry import as_mi as as_mi
from mi.unify.spectrum import cluster_contexts as cluster_contexts
from mi.unify.spectrum import compare_contexts as compare_contexts
from mi.unify.spectrum import compute_output_eigenvalues as compute_output_eigenvalues
from mi.unify.spectrum import compute_spectrum as compute_spectrum
from mi.unify.spectrum import decompose_output as decompose_output
from mi.unify.tensors import Tensors as Tensors
from mi.unify.tensors import compute_tensors as compute_tensors
