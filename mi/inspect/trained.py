"""The MI layers of a run, with their trained and their initial parameters."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from mi import counting
from mi.config import UserError
from mi.layers import DiagonalMultiplicativeInteraction, MultiplicativeInteraction
from mi.lm import config as lm_config
from mi.lm import factory as lm_factory
from mi.lm import restore as lm_restore
from mi.rl import config as rl_config
from mi.rl import factory as rl_factory
from mi.rl import restore as rl_restore
from mi.rl.evaluate import Evaluation
from mi.training.run_config import read_config

MAX_CONTEXTS = 24  # of a text
FUSION_NAMES = r'fuse_.*|instruction|core_input|readout'

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Site:
    """A module of a model that fuses x with z.

    Attributes:
      path: names of the enclosing modules and the module, such as ('core', 'fuse_encoder').
      module: the unbound module.
      x, z: shapes and dtypes of its inputs.
    """

    path: tuple[str, ...]
    module: nn.Module
    x: jax.ShapeDtypeStruct
    z: jax.ShapeDtypeStruct

    @property
    def name(self) -> str:
        """The path of the site, joined by slashes."""
        return '/'.join(self.path)

    def get_params(self, params: Params) -> dict[str, Any]:
        """Return the site's parameters from the model's parameters."""
        subtree: Any = params
        for name in self.path:
            subtree = subtree.get(name, {})
        return dict(subtree)


class Contexts(NamedTuple):
    """The contexts to compare.

    Attributes:
      z: the contexts, [C, m].
      names: their names, [C].
    """

    z: np.ndarray
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained run.

    Attributes:
      config: config of the run.
      sites: fusions of the model.
      params: evaluated parameters of all seeds, [S, …].
      step: number of updates.
      init_params: function from a seed to its parameters before the first update.
      get_contexts: function from a site and one seed's parameters to the contexts, or to None if
        the run has no finite set of contexts.
    """

    config: ml_collections.ConfigDict
    sites: tuple[Site, ...]
    params: Params
    step: int
    init_params: Callable[[int], Params]
    get_contexts: Callable[[Site, Params], Contexts | None]

    def get_seed_params(self, seed_index: int) -> Params:
        """Return the parameters of one seed."""
        params: Params = jax.tree.map(lambda a: a[seed_index], self.params)
        return params


def load(workdir: str | os.PathLike[str]) -> Trained:
    """Load the newest checkpoint from a run of a language model or an agent.

    Raises:
      UserError: if the run has another task, or no complete checkpoint.
    """
    config = read_config(workdir)
    loaders = {'lm': _load_lm, 'rl': _load_rl}
    if config.get('task') not in loaders:
        raise UserError(
            f'--workdir={workdir}: expected a run with config.task = lm or rl (got '
            f'{config.get("task")!r})'
        )
    return loaders[config.task](config, pathlib.Path(workdir))


def find_sites(model: nn.Module, variables: Any, *inputs: Any) -> tuple[Site, ...]:
    """Return the fusions and the other MI layers of a model, in the order of their calls.

    Modules inside a fusion are not listed separately. Variables and inputs can be shapes.
    """

    def is_fusion(module: nn.Module) -> bool:
        forms = MultiplicativeInteraction, DiagonalMultiplicativeInteraction
        is_named = counting.has_name(module, FUSION_NAMES)
        return isinstance(module, forms) or is_named

    calls = counting.find_calls(model, is_fusion, variables, *inputs)
    return tuple(
        Site(path, module, shapes[0], shapes[1])
        for path, (module, shapes) in calls.items()
        if len(shapes) == 2 and not any(path[:depth] in calls for depth in range(1, len(path)))
    )


def _load_lm(config: ml_collections.ConfigDict, run_path: pathlib.Path) -> Trained:
    trained = lm_restore.restore(config, str(run_path))
    model = lm_factory.build_model(trained.config, *trained.corpus.sizes)
    trainer = lm_factory.build_trainer(trained.config, *trained.corpus.sizes)
    uses_domains = model.source == 'domain'

    def make_inputs(tokens: Any) -> tuple[Any, ...]:
        carry = model.initial_carry(tokens.shape[1])
        return carry, tokens, None, jnp.zeros_like(tokens) if uses_domains else None

    def get_contexts(site: Site, params: Params) -> Contexts | None:
        if uses_domains:
            return Contexts(np.eye(site.z.shape[-1]), trained.corpus.domains)
        # The contexts at evenly spaced positions of the start of the validation text.
        length = lm_config.get_reading(config).length
        tokens = np.asarray(trained.corpus.tokens['valid'][:length], np.int32)
        inputs = make_inputs(jnp.asarray(tokens)[:, None])
        z = _record_context(model, site, params, inputs)
        if z is None:
            return None
        positions = np.unique(np.linspace(1, len(z) - 1, MAX_CONTEXTS).astype(int))
        names = []
        for position in positions:
            text = trained.corpus.decode(tokens[max(0, position - 12) : position])
            names.append(f'{position}: …{" ".join(text.split())}')
        return Contexts(z[positions], tuple(names))

    inputs = jax.eval_shape(lambda: make_inputs(jnp.zeros((2, 2), jnp.int32)))
    variables = {'params': jax.eval_shape(trainer.init, jnp.int32(0)).params}
    return Trained(
        config=trained.config,
        sites=find_sites(model, variables, *inputs),
        params=trained.params,
        step=trained.step,
        init_params=lambda seed: trainer.init(jnp.int32(seed)).params,
        get_contexts=get_contexts,
    )


def _record_context(
    model: nn.Module, site: Site, params: Params, inputs: Sequence[Any]
) -> np.ndarray | None:
    """Return z [T, m] of one sequence at a site, or None inside a loop, where z has no value."""
    contexts: list[Any] = []

    def record(
        call: Callable[..., object],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> object:
        if context.module.path == site.path and context.method_name == '__call__':
            contexts.append(args[1])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply({'params': params}, *inputs)
    if not contexts or isinstance(contexts[0], jax.core.Tracer):
        return None
    z = np.asarray(contexts[0], np.float64)
    return z.reshape(-1, z.shape[-1])


def _load_rl(config: ml_collections.ConfigDict, run_path: pathlib.Path) -> Trained:
    rl_config.validate(config)
    with Evaluation(config) as evaluation:
        spec = evaluation.spec
    agent = rl_factory.build_agent(config, spec)
    params, step = rl_restore.restore_params(config, agent, run_path)

    def get_contexts(site: Site, params: Params) -> Contexts | None:
        if site.name == 'instruction' or config.model.source not in ('task', 'embedding'):
            return None
        is_task = config.model.source == 'task'
        z = np.eye(len(spec.tasks)) if is_task else np.asarray(params['task_embedding'])
        return Contexts(z, spec.tasks)

    carry = jax.eval_shape(lambda: agent.initial_carry(1))
    inputs = rl_factory.make_input_shapes(spec, 1, 1)
    variables = jax.eval_shape(agent.init, jax.random.key(0), carry, inputs)
    return Trained(
        config=config,
        sites=find_sites(agent, variables, carry, inputs),
        params=params,
        step=step,
        init_params=lambda seed: rl_restore.init_seed_params(config, agent, seed),
        get_contexts=get_contexts,
    )
