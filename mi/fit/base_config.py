"""The config keys that all small problems share, as a starting point for config files."""

from collections.abc import Collection

import ml_collections

from mi.config import UserError, suggest
from mi.training import optim


def get_base_config(problem_name: str) -> ml_collections.ConfigDict:
    """Return an unlocked config with the keys that every problem has.

    Args:
      problem_name: the problem's module, such as 'experiments.regression.problem', or a reference
        'package.module:Object' to an object with SCHEMA and make.
    """
    config = ml_collections.ConfigDict()
    config.task = 'fit'  # fit, search
    config.tracker = 'none'  # a name in mi.training.trackers.TRACKERS: none, wandb, trackio
    config.seeds = (0, 1, 2, 3, 4)  # trained simultaneously

    config.problem = ml_collections.ConfigDict()
    config.problem.name = problem_name

    config.train = ml_collections.ConfigDict()
    config.train.matmul_precision = 'highest'  # of f32 products: default, high, highest
    config.train.keep = 1  # checkpoints

    config.optim = optim.get_config()
    return config


def get_fused_mlp_config() -> ml_collections.ConfigDict:
    """Return the section `model` of a problem whose network is `mi.fit.network.FusedMLP`."""
    model = ml_collections.ConfigDict()
    model.width = 32
    model.parameters = 0  # choose the width with about this many; 0 keeps it
    model.depth = 1  # hidden layers
    model.site = 'first'  # first, last, all: the maps that take z
    model.activation = 'relu'  # relu, softplus, tanh, identity
    model.fusion = ml_collections.ConfigDict()
    model.fusion.name = 'concat'
    model.fusion.options = ml_collections.ConfigDict()  # other fields of its module
    model.fusion.rank = 0  # as the width
    model.fusion.hidden = 0  # as the width
    return model


def check_preset(config_file: str, preset: str, presets: Collection[str] = ()) -> None:
    """Check that a config file's argument is one of its presets.

    Raises:
      UserError: if the file has no such preset.
    """
    if presets and preset not in presets:
        expected = f'expected a preset; {suggest(preset, presets)}'
    elif preset and not presets:
        expected = 'expected no argument'
    else:
        return
    raise UserError(f'--config={config_file}:{preset}: {expected}')
