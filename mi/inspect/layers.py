"""Analysis of every product in a run, with trained and initial weights, for each seed."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mi.config import UserError
from mi.inspect.trained import Contexts, Site, Trained
from mi.training.progress import Work
from mi.unify import (
    as_mi,
    compare_contexts,
    compute_output_eigenvalues,
    compute_spectrum,
)
from mi.unify.composition import Product
from mi.unify.spectrum import ContextComparison, Unfolding

STATES = ('trained', 'initial')


@dataclasses.dataclass(frozen=True)
class Weights:
    """The analysis of a tensor W [m, n, k].

    Attributes:
      shape: the shape of W, (m, n, k).
      norm: ‖W‖_F.
      shared_norm: ‖V‖_F, or 0 without V.
      unfoldings: the unfoldings of W along z, x and y.
      eigenvalues: eigenvalues of each output, [k, d], see `mi.unify.compute_output_eigenvalues`.
      contexts: comparison of zᵀW between contexts, or None if the run has no finite set of
        contexts.
      generated: the same for W′(z) = zᵀW + V.
    """

    shape: tuple[int, ...]
    norm: float
    shared_norm: float
    unfoldings: tuple[Unfolding, Unfolding, Unfolding]
    eigenvalues: np.ndarray
    contexts: ContextComparison | None
    generated: ContextComparison | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """The analysis of one product at a site, for one seed.

    Attributes:
      name: path of the site, followed by the product's name if the site has several.
      seed: the seed.
      names: names of the contexts, or () if there are none.
      states: analysis of the 'trained' and the 'initial' weights.
    """

    name: str
    seed: int
    names: tuple[str, ...]
    states: Mapping[str, Weights]


def analyze(trained: Trained) -> list[Layer]:
    """Analyze the products of all sites for all seeds.

    Raises:
      UserError: if no site has an interaction, or a fusion is not affine and has no converter.
    """
    layers: list[Layer] = []
    for seed_index, seed in enumerate(trained.config.seeds):
        with Work(f'analyzing seed {seed}'):
            layers += _analyze_seed(trained, seed_index, seed)
    if not layers:
        fusion_name = trained.config.model.fusion.name
        raise UserError(
            f'config.model.fusion.name = {fusion_name!r}: expected a run with an MI layer (got '
            f'{len(trained.sites)} fusions, all with W = 0). Try a run with the fusion mi'
        )
    return layers


def _analyze_seed(trained: Trained, seed_index: int, seed: int) -> Iterator[Layer]:
    params_by_state = {
        'trained': trained.get_seed_params(seed_index),
        'initial': trained.init_params(seed),
    }
    contexts_by_site = {
        site: trained.get_contexts(site, params_by_state['trained']) for site in trained.sites
    }
    for site, contexts in contexts_by_site.items():
        products = {state: convert_site(site, params) for state, params in params_by_state.items()}
        for index, product in enumerate(products['trained']):
            if not np.any(np.asarray(product.W)):
                continue
            # Only the product that reads the context itself is compared at the contexts.
            has_contexts = contexts is not None and product.W.shape[0] == contexts.z.shape[1]
            is_single = len(products['trained']) == 1
            yield Layer(
                name=site.name if is_single else f'{site.name}/{product.name}',
                seed=seed,
                names=contexts.names if contexts is not None and has_contexts else (),
                states={
                    state: _analyze_product(
                        products[state][index], contexts if has_contexts else None
                    )
                    for state in STATES
                },
            )


def convert_site(site: Site, params: Mapping[str, Any]) -> tuple[Product, ...]:
    """Return the products of a site for the given model parameters.

    Raises:
      UserError: if the fusion is not affine and has no converter.
    """
    # One row of each stream: the tensors do not depend on the values.
    x_key, z_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (1, site.x.shape[-1]), site.x.dtype)
    if jnp.issubdtype(site.z.dtype, jnp.integer):
        z = jnp.zeros(1, site.z.dtype)
    else:
        z = jax.random.normal(z_key, (1, site.z.shape[-1]), site.z.dtype)
    try:
        return as_mi(site.module, {'params': site.get_params(params)}, x, z).products
    except ValueError as error:
        raise UserError(
            f'{site.name}: expected a fusion that is a multiplicative interaction. {error}'
        ) from error


def _analyze_product(product: Product, contexts: Contexts | None) -> Weights:
    W = np.asarray(product.W, np.float64)
    V = None if product.V is None else np.asarray(product.V, np.float64)
    comparisons: dict[str, ContextComparison | None] = {'contexts': None, 'generated': None}
    if contexts is not None:
        comparisons['contexts'] = compare_contexts(W, contexts.z)
        comparisons['generated'] = compare_contexts(W, contexts.z, V)
    return Weights(
        shape=W.shape,
        norm=float(np.linalg.norm(W)),
        shared_norm=0.0 if V is None else float(np.linalg.norm(V)),
        unfoldings=compute_spectrum(W),
        eigenvalues=compute_output_eigenvalues(W),
        **comparisons,
    )
