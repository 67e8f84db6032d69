"""A trained language model from its run directory: config, corpus and parameters."""

import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from mi.config import UserError, describe_difference
from mi.lm import config as lm_config
from mi.lm import factory, train
from mi.lm.data import token_store
from mi.training import checkpoint, optim, sharding
from mi.training.run_config import merge_eval_config, read_config

OWN = ('eval', 'dynamic', 'sample', 'data', 'tracker')
FIXED = ('task', 'model', 'seeds')


class Trained(NamedTuple):
    """A run's newest whole checkpoint, ready to be evaluated.

    Attributes:
      config: of the run, evaluated and sampled from as was asked for.
      corpus: the tokens that it was trained on, wherever the text is now.
      params: of all seeds, [S, …].
      step: how many updates they have had.
      mesh: the devices that the parameters are on.
    """

    config: ml_collections.ConfigDict
    corpus: token_store.Corpus
    params: Any
    step: int
    mesh: jax.sharding.Mesh


def restore(config: ml_collections.ConfigDict, workdir: str) -> Trained:
    """Restore the parameters of a run directory.

    The text may have moved: what counts is the SHA-256 of its tokens. What evaluation does not
    read, such as the optimizer, the batch or how many devices trained, may be another.

    Raises:
      UserError: if the directory has no whole checkpoint, or is of another model, other seeds or
        other tokens.
    """
    lm_config.validate(config)
    path = pathlib.Path(workdir)
    recorded = read_config(path)
    corpus = factory.corpus(config)
    if config.model.to_dict() != recorded.model.to_dict():  # the run has the size that was matched
        config = factory.matched(config, *corpus.sizes)
    config = merge_eval_config(path, config, overridable=OWN, fixed=FIXED)
    lm_config.validate(config)

    # The shapes of the parameters, on the devices that are here.
    batch, seeds = config.train.batch, np.asarray(config.seeds, np.int32)
    mesh = sharding.make_mesh(len(seeds), batch, config.train.fsdp)
    model = factory.build(config, *corpus.sizes)
    optimiser = optim.make_optimizer(config.optim, config.train.steps)
    like = train.shapes(model, optimiser, seeds, batch, mesh)

    saved = checkpoint.Checkpoints(path / 'checkpoints', config.train.keep)
    newest, meta = saved.newest()
    if meta['data'] != corpus.sha256:
        before, now = ({'data': side.data.to_dict() | {'cache': ''}} for side in (recorded, config))
        changed = describe_difference(before, now)
        raise UserError(
            f'{path} was trained on other tokens than {config.data.source} has now'
            f'{f" ({changed})" if changed else ""}; restore the text, or name it by '
            f'--config.data.source'
        )
    params = saved.restore_part(newest, 'params', like.params)
    return Trained(config, corpus, params, meta['step'], mesh)
