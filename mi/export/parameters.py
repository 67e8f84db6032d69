"""Export of one seed's parameters to a safetensors file, with the config in its metadata."""

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
      params: nested dict of NumPy arrays, for `model.apply({'params': params}, …)`.
      config: config of the run.
      about: 'step', the number of updates, and 'seed'. A language model also has 'vocabulary' and
        'domains', the sizes that `mi.lm.factory.build_model` takes in addition to the config.
    """

    params: dict[str, Any]
    config: dict[str, Any]
    about: dict[str, int]


def save_params(
    file: pathlib.Path, params: chex.ArrayTree, config: Mapping[str, Any], about: Mapping[str, int]
) -> None:
    """Write the parameters of one seed, naming arrays by path, such as 'core/layer_0/kernel'.

    Raises:
      OSError: if the file cannot be written.
      UserError: if safetensors is not installed.
    """
    safetensors = _import_safetensors()
    leaves, _ = jax.tree.flatten_with_path(params)
    arrays = {
        SEPARATOR.join(str(entry.key) for entry in path): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }
    metadata = {'format': 'flax', 'config': json.dumps(config), 'about': json.dumps(about)}
    try:
        safetensors.numpy.save_file(arrays, str(file), metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def load_params(file: str | pathlib.Path) -> ExportedParams:
    """Read a file written by `python -m mi.export --out=FILE`.

    Raises:
      UserError: if the file does not exist or was not written by `mi.export`, or safetensors is not
        installed.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(
            f'{path}: file not found; expected a file written by `python -m mi.export --out=FILE`'
        )
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
        raise UserError(f'{path}: expected a safetensors file (got {error})') from error
    if not {'config', 'about'} <= metadata.keys():
        raise UserError(
            f'{path}: expected a file with the metadata `config` and `about`. Write it with '
            '`python -m mi.export --out=FILE`'
        )
    return ExportedParams(params, json.loads(metadata['config']), json.loads(metadata['about']))


def _import_safetensors() -> types.ModuleType:
    """Import safetensors, an optional dependency."""
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise UserError(f'safetensors is not installed. Try {suggest_install("export")}') from error
    return safetensors
