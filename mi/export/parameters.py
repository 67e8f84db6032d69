"""Parameters of one seed as a safetensors file, with the config in its metadata."""

import json
import pathlib
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from mi.config import UserError, suggest_install

SEPARATOR = '/'


class ExportedParams(NamedTuple):
    """The content of an exported file.

    Attributes:
      params: nested parameters, as NumPy arrays, for `model.apply({'params': params}, …)`.
      config: config of the run.
      about: 'step', the number of updates; 'seed'; for language models 'vocabulary' and 'domains',
        the sizes that `mi.lm.factory.build_model` takes beside the config.
    """

    params: dict[str, Any]
    config: dict[str, Any]
    about: dict[str, int]


def save_params(
    file: pathlib.Path, params: chex.ArrayTree, config: Mapping[str, Any], about: Mapping[str, int]
) -> None:
    """Write the parameters of one seed; the name of an array is its path, 'core/layer_0/kernel'.

    Raises:
      UserError: if safetensors is not installed.
    """
    leaves, _ = jax.tree.flatten_with_path(params)
    arrays = {
        SEPARATOR.join(str(entry.key) for entry in path): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }
    metadata = {'format': 'flax', 'config': json.dumps(config), 'about': json.dumps(about)}
    _import_safetensors().numpy.save_file(arrays, str(file), metadata)


def load_params(file: str | pathlib.Path) -> ExportedParams:
    """Read a file that `python -m mi.export --out=FILE` wrote.

    Raises:
      UserError: if the file is missing or of another program, or safetensors is not installed.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f'{path}: expected a file of `python -m mi.export --out=…` (got none)')
    safetensors = _import_safetensors()
    params: dict[str, Any] = {}
    try:
        with safetensors.safe_open(str(path), 'numpy') as stream:
            metadata = stream.metadata() or {}
            for name in stream.keys():  # noqa: SIM118, it is not a dict
                *parents, leaf = name.split(SEPARATOR)
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[leaf] = stream.get_tensor(name)
    except safetensors.SafetensorError as error:
        raise UserError(f'{path}: expected a file of safetensors (got {error})') from error
    if not {'config', 'about'} <= metadata.keys():
        raise UserError(
            f'{path}: expected the metadata config and about. Try `python -m mi.export --out=…`'
        )
    return ExportedParams(params, json.loads(metadata['config']), json.loads(metadata['about']))


def _import_safetensors() -> types.ModuleType:
    """Import safetensors, which is an extra."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise UserError(f'safetensors is not installed. Try {suggest_install("export")}') from error
    return safetensors
