"""Restoration of a trained language model from its run directory."""

import pathlib
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from mi.config import UserError, describe_difference, flatten, name_config_keys
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm.data.corpus import Corpus
from mi.lm.model import Params
from mi.training import averaging, checkpoint, run_mesh, sharding
from mi.training.run_config import merge_eval_config, read_config

OVERRIDABLE = ('eval', 'dynamic', 'sample', 'data', 'tracker')  # sections that an evaluation sets
FIXED = ('task', 'model', 'seeds')  # sections that must be those of the run


class Trained(NamedTuple):
    """A model restored from the newest complete checkpoint of a run.

    Attributes:
      config: config of the run, with the requested values of the sections in OVERRIDABLE.
      corpus: the corpus on which the model was trained.
      params: parameters to evaluate, for all seeds, [S, …]. See `mi.training.averaging`.
      step: number of updates.
      mesh: mesh of devices that hold the parameters.
    """

    config: ml_collections.ConfigDict
    corpus: Corpus
    params: Params
    step: int
    mesh: jax.sharding.Mesh


def restore(config: ml_collections.ConfigDict, workdir: str) -> Trained:
    """Restore a trained model from a run directory.

    The text may have moved since training, because the SHA-256 of its tokens identifies it. Values
    that evaluation does not use, such as the optimizer, the batch size or the number of devices,
    may differ from those of training.

    Raises:
      UserError: if the directory has no complete checkpoint, or if the model, the seeds or the
        tokens of the run differ from those of the config.
    """
    # The config of the run; if sizes were matched, the recorded model has the matched size.
    lm_config.validate(config)
    run_path = pathlib.Path(workdir)
    recorded = read_config(run_path)
    corpus = factory.load_corpus(config)
    if flatten(config.model.to_dict()) != flatten(recorded.model.to_dict()):
        config = factory.match_size(config, *corpus.sizes)
    config = merge_eval_config(run_path, config, overridable=OVERRIDABLE, fixed=FIXED)
    lm_config.validate(config)

    # The shapes of the parameters, on the present devices.
    seeds = np.asarray(config.seeds, np.int32)
    with name_config_keys(run_mesh.KEYS):
        mesh = sharding.make_mesh(len(seeds), config.train.batch, config.train.fsdp)
    shapes = factory.build_trainer(config, *corpus.sizes).shapes(seeds, mesh)

    # The parameters, if they were trained on the same tokens.
    checkpoints = checkpoint.Checkpoints(run_path / 'checkpoints', config.train.keep)
    newest, checkpoint_meta = checkpoints.newest()
    if not corpus.is_described_by(checkpoint_meta):
        trained_data, current_data = (
            {'data': side.data.to_dict() | {'cache': ''}} for side in (recorded, config)
        )
        difference = describe_difference(trained_data, current_data)
        raise UserError(
            f'config.data.source = {config.data.source!r}: expected the tokens that {run_path} was '
            f'trained on, but the text differs{f" ({difference})" if difference else ""}. Try '
            f'restoring the original text, or set config.data.source to its path'
        )
    params = averaging.restore_eval_params(checkpoints, newest, shapes.params, shapes.opt_state)
    return Trained(config, corpus, params, checkpoint_meta['step'], mesh)
