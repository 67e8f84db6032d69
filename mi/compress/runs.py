"""Compression of a run's MI layers into a new run directory."""

import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mi import overrides
from mi.compress.forms import Form, compress
from mi.compress.inputs import draw_inputs
from mi.config import UserError
from mi.fusion import FUSIONS
from mi.inspect.trained import Params, Site, Trained, load
from mi.layers import MultiplicativeInteraction
from mi.lm import config as lm_config
from mi.lm import factory as lm_factory
from mi.lm.trainer import TrainState
from mi.options import get_field_defaults, get_options
from mi.rl import config as rl_config
from mi.rl import factory as rl_factory
from mi.rl import restore as rl_restore
from mi.rl.actors import loop as actors_loop
from mi.rl.evaluate import Evaluation
from mi.rl.fused import loop as fused_loop
from mi.training import checkpoint, optim, run_mesh
from mi.training.io import write_json
from mi.training.progress import Work
from mi.training.run_config import record_config

FUSION_NAMES: dict[Form, str] = {'cp': 'mi_low_rank', 'tucker': 'mi_tucker', 'block': 'mi_block'}
TERMS = ('use_U', 'use_V', 'use_b')


class CompressedSite(NamedTuple):
    """The relative error of the compressed layer at a site, for one seed.

    The error is that of W, or that of the outputs at the calibration inputs if there are any.
    """

    site: str
    seed: int
    error: float


class Start(NamedTuple):
    """The state of a new run's first checkpoint, and its metadata."""

    state: Any
    meta: checkpoint.Meta


def compress_run(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    form: Form,
    size: int,
    changes: Sequence[overrides.Override] = (),
    calibration: int = 0,
) -> list[CompressedSite]:
    """Compress every fusion of a run, and write a new run directory that starts from the result.

    The new run is at step 0. It has the compressed parameters, a new optimizer state and, for an
    agent, the statistics of PopArt. `--mode=eval` evaluates it, and training fine-tunes it for
    `config.train.steps`. The old run is not modified.

    Args:
      workdir: directory of the run.
      out: directory of the new run, which must be empty or not exist.
      form: as in `mi.compress`.
      size: rank of the forms 'cp' and 'tucker', or number of blocks of 'block'.
      changes: overrides of other config keys, such as the learning rate.
      calibration: number of inputs per fusion at which the outputs are fitted, as drawn by
        `mi.compress.inputs`. 0 approximates W instead.

    Raises:
      UserError: if a fusion does not have a W [m, n, k], `out` is not empty, or the config with its
        changes is invalid.
    """
    # Compress the parameters of every seed.
    out_path = _check_out(out)
    trained = load(workdir)
    config = make_config(trained, form, size, changes)
    params, results = _compress_params(trained, form, size, calibration)

    # Write config.json last: without it, the directory is not a run.
    _save_start(config, params, workdir, out_path)
    origin = {'workdir': str(workdir), 'step': trained.step, 'form': form, 'size': size}
    origin['calibration'] = calibration
    errors = [result._asdict() for result in results]
    write_json(out_path / 'compressed.json', {**origin, 'errors': errors})
    record_config(out_path / 'config.json', config)
    return results


def copy_run(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    changes: Sequence[overrides.Override] = (),
) -> None:
    """Write a new run directory that starts from a run's parameters without compressing them.

    The new run is like that of `compress_run` otherwise, which makes it the control of a
    fine-tuning.

    Args:
      workdir: directory of the run.
      out: directory of the new run, which must be empty or not exist.
      changes: overrides of config keys, such as the learning rate.

    Raises:
      UserError: if `out` is not empty, or the config with its changes is invalid.
    """
    out_path = _check_out(out)
    trained = load(workdir)
    config = change_config(trained.config, changes)
    _save_start(config, trained.params, workdir, out_path)
    record_config(out_path / 'config.json', config)


def make_config(
    trained: Trained, form: Form, size: int, changes: Sequence[overrides.Override]
) -> ml_collections.ConfigDict:
    """Return a copy of the config with the compressed fusion and the changes, for the new run."""
    # The fusions of a model are of one form, so they have the same terms.
    module = _check_sites(trained)[0].module
    options = get_options(trained.config.model.fusion, 'options')
    known_options = get_field_defaults(FUSIONS[FUSION_NAMES[form]])
    options = {name: options[name] for name in options if name in known_options}
    options |= {term: False for term in TERMS if not getattr(module, term)}
    if form == 'block':
        options['blocks'] = size

    # The sizes of the model are those of the old run, whatever they were matched to.
    config = trained.config.copy_and_resolve_references().unlock()
    config.model.fusion.name = FUSION_NAMES[form]
    config.model.fusion.options = ml_collections.ConfigDict(options)
    if form != 'block':
        config.model.fusion.rank = size
    return change_config(config, changes)


def change_config(
    config: ml_collections.ConfigDict, changes: Sequence[overrides.Override]
) -> ml_collections.ConfigDict:
    """Return a valid copy of a config with overrides, whose sizes are not matched again."""
    config = config.copy_and_resolve_references().unlock()
    if 'match' in config:
        config.match.by = 'none'
    config.lock()
    overrides.apply(config, changes)
    validate = lm_config.validate if config.task == 'lm' else rl_config.validate
    validate(config)
    return config


def _check_out(out: str | os.PathLike[str]) -> pathlib.Path:
    out_path = pathlib.Path(out)
    if out_path.exists() and (not out_path.is_dir() or any(out_path.iterdir())):
        raise UserError(f'--out={out}: expected a new or empty directory. Try another one')
    return out_path


def _save_start(
    config: ml_collections.ConfigDict,
    params: Params,
    workdir: str | os.PathLike[str],
    out_path: pathlib.Path,
) -> None:
    """Save the first checkpoint of a new run, which starts from parameters [S, …]."""
    make_start = {'lm': _start_lm, 'rl': _start_rl}[config.task]
    start = make_start(config, params, pathlib.Path(workdir))
    checkpoints = checkpoint.Checkpoints(out_path / 'checkpoints', config.train.keep)
    checkpoints.save(0, start.state, start.meta)


def _check_sites(trained: Trained) -> tuple[Site, ...]:
    """Return the sites of a run after checking that each one has a W [m, n, k]."""
    fusion_name = trained.config.model.fusion.name
    for site in trained.sites:
        if not isinstance(site.module, MultiplicativeInteraction) or not site.module.use_W:
            raise UserError(
                f'config.model.fusion.name = {fusion_name!r}: expected fusions with W [m, n, k] '
                f'({site.name} is {type(site.module).__name__}). Try a run with mi, multi_head, '
                f'mi_low_rank, mi_tucker or mi_block'
            )
    if not trained.sites:
        raise UserError(
            f'config.model.fusion.name = {fusion_name!r}: expected a run with a fusion to compress'
        )
    return trained.sites


def _compress_params(
    trained: Trained, form: Form, size: int, calibration: int
) -> tuple[Params, list[CompressedSite]]:
    """Compress every site, and return the parameters of all seeds, [S, …], and the errors."""
    sizes: dict[str, Any] = {'blocks' if form == 'block' else 'rank': size}
    results: list[CompressedSite] = []
    params_by_seed = []
    inputs_by_seed = draw_inputs(trained, calibration) if calibration else itertools.repeat({})
    for seed_index, seed in enumerate(trained.config.seeds):
        params = trained.get_seed_params(seed_index)
        inputs = next(inputs_by_seed)
        for site in trained.sites:
            with Work(f'compressing {site.name}, seed {seed}'):
                variables = {'params': site.get_params(params)}
                try:
                    compressed = compress(
                        variables, form=form, inputs=inputs.get(site.path), **sizes
                    )
                except (ValueError, ImportError) as error:
                    raise UserError(f'{site.name}: {error}') from error
            params = _replace(params, site.path, compressed.variables['params'])
            results.append(CompressedSite(site.name, seed, compressed.error))
        params_by_seed.append(params)
    stacked: Params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_by_seed)
    return stacked, results


def _replace(params: Params, path: tuple[str, ...], subtree: Mapping[str, Any]) -> Params:
    """Return the parameters with the subtree at a path replaced."""
    name, *inner = path
    child = _replace(params[name], tuple(inner), subtree) if inner else dict(subtree)
    return {**params, name: child}


def _start_lm(config: ml_collections.ConfigDict, params: Params, run_path: pathlib.Path) -> Start:
    corpus = lm_factory.load_corpus(config)
    seeds = np.asarray(config.seeds, np.int32)
    mesh = run_mesh.make_run_mesh(config)
    trainer = lm_factory.build_trainer(config, *corpus.sizes)
    initial = trainer.init_seeds(seeds, mesh)
    params = _place(params, initial.params)
    opt_state = jax.vmap(trainer.optimizer.init)(params)
    state = TrainState(params, _place(opt_state, initial.opt_state), initial.carry)
    meta = {'metrics': 0, 'unlogged': [], **corpus.fingerprint, 'is_evaluated': False}
    return Start(state, meta)


def _start_rl(config: ml_collections.ConfigDict, params: Params, run_path: pathlib.Path) -> Start:
    with Evaluation(config) as evaluation:
        agent = rl_factory.build_agent(config, evaluation.spec)
    optimizer = optim.make_optimizer(config.optim, rl_config.count_updates(config))
    statistics = rl_restore.restore_statistics(config, agent, run_path)
    meta: checkpoint.Meta = {'metrics': 0, 'is_evaluated': False}
    if rl_restore.has_seed_axis(config):
        environment = rl_factory.make_environment(config)
        mesh = run_mesh.make_run_mesh(config)
        initial = fused_loop.init_states(config, environment, agent, optimizer, mesh)
        learner = initial.learner._replace(
            params=params, opt_state=jax.vmap(optimizer.init)(params), statistics=statistics
        )
        state = initial._replace(learner=_place(learner, initial.learner))
        return Start(fused_loop.unwrap_keys(state), meta | {'env_steps': [0] * len(config.seeds)})

    # The topologies threads and ray have one seed, without an axis.
    params = jax.tree.map(lambda a: a[0], params)
    mesh = run_mesh.make_run_mesh(config)
    first = actors_loop.init_state(agent, optimizer, config.seeds[0], mesh)
    replaced = first._replace(
        params=params, opt_state=optimizer.init(params), statistics=statistics
    )
    return Start(_place(replaced, first), meta | {'env_steps': 0})


def _place(tree: Any, like: Any) -> Any:
    """Place a tree on the devices of another one, which must have the same structure and shapes.

    Raises:
      UserError: if a change of the config has given the new model other sizes.
    """
    shapes, expected = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(a)}
        for a in (tree, like)
    )
    for name in sorted(shapes | expected):
        if shapes.get(name) != expected.get(name):
            raise UserError(
                f'state{name}: expected {expected.get(name, "no such array")}, got '
                f'{shapes.get(name, "no such array")}. The changes must keep the sizes of the model'
            )
    return jax.tree.map(
        lambda a, b: jax.device_put(jnp.asarray(a, b.dtype), b.sharding), tree, like
    )
