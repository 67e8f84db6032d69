"""Verified checkpoints: a run continues from one bit for bit, or not at all.

    checkpoints/00000500/state/          the arrays, by orbax
    checkpoints/00000500/meta.json       step, dtypes and shapes, and values of the training loop
    checkpoints/00000500/manifest.json   SHA-256 of every file above

Orbax restores flipped bits silently, and a killed process leaves a half-written directory.
Therefore a step is written to a hidden directory, gets its manifest, and is renamed last. Restoring
compares every hash. A damaged step is renamed to NAME.damaged, and the newest intact one is used.

Every process writes its own arrays; all of them have to call `save` and share a file system. The
primary process does everything else.
"""

import contextlib
import hashlib
import json
import logging as stdlib_logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mi.config import UserError
from mi.training import sharding
from mi.training.io import storage_failure

Tree = TypeVar('Tree')  # a pytree of arrays
Meta = dict[str, Any]  # the content of meta.json


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: their directory; the first save creates it.
      keep: number of checkpoints to keep. With fewer than 2, a damaged one has no predecessor.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        # One device writes a replicated array. To share the writing, orbax would compile a program
        # that slices it, for each array.
        handlers = ocp.type_handlers
        registry = handlers.create_type_handler_registry(
            (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
            (np.ndarray, handlers.NumpyHandler()),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        self._orbax = ocp.AsyncCheckpointer(handler)

    def save(self, step: int, state: chex.ArrayTree, meta: Meta) -> None:
        """Write a tree of arrays as the checkpoint of a step; return when it is on disk."""
        final = self._directory / f'{step:08d}'
        if sharding.broadcast_from_primary(
            final.exists()
        ):  # a run that was stopped at this very step
            return
        saving = self._directory / f'.saving-{step:08d}'
        try:
            self._write(saving, step, state, meta)
            if sharding.is_primary():
                os.rename(saving, final)
        except BaseException as error:
            if storage_failure(error):  # free the space that the incomplete checkpoint takes
                shutil.rmtree(saving, ignore_errors=True)
            raise
        if sharding.is_primary():
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
        sharding.barrier('checkpoint in place')

    def _write(self, saving: pathlib.Path, step: int, state: chex.ArrayTree, meta: Meta) -> None:
        """Write all files of a checkpoint to a hidden directory."""
        if sharding.is_primary():
            for leftover in self._directory.glob('.saving-*'):
                shutil.rmtree(leftover)
            saving.mkdir(parents=True)
        sharding.barrier('checkpoint begun')
        with _silence_orbax():
            self._orbax.save(saving / 'state', args=ocp.args.PyTreeSave(state))
            self._orbax.wait_until_finished()
        sharding.barrier('checkpoint written')
        if sharding.is_primary():
            meta = meta | {'step': step, 'arrays': _describe_arrays(state)}
            (saving / 'meta.json').write_text(json.dumps(meta, indent=2, allow_nan=False) + '\n')
            manifest = {name: hash_file(saving / name) for name in _files(saving)}
            (saving / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')

    def restore(self, like: Tree) -> tuple[Tree, Meta] | None:
        """Restore the newest intact checkpoint; return None if there is none.

        Only for the run that holds the directory, because it renames damaged checkpoints.

        Args:
          like: a tree of arrays with the shapes, dtypes and shardings to restore to.

        Returns:
          (state, meta)

        Raises:
          UserError: if all checkpoints are damaged, or the newest intact one is of another model.
            Nothing is deleted.
        """
        newest = self._set_damaged_aside() if sharding.is_primary() else 0
        step = sharding.broadcast_from_primary(newest)
        if step < 0:
            return None
        path = self._directory / f'{step:08d}'
        meta = _read_meta(path)
        _refuse_other_model(path, meta.pop('arrays'), _describe_arrays(like))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        return self._orbax.restore(path / 'state', args=restore), meta

    def newest(self) -> tuple[pathlib.Path, Meta]:
        """Return the path of the newest intact checkpoint, and its meta.

        Safe while the run is writing: it does not rename damaged checkpoints.

        Raises:
          UserError: if there is no checkpoint, or all are damaged.
        """
        paths: list[pathlib.Path] = []
        while paths != (paths := self._steps()):  # the run may delete one meanwhile
            for age, path in enumerate(paths):
                damage = find_damage(path)
                if not damage:
                    if age:
                        _warn(f'{path.name} is used instead of the newest')
                    return path, _read_meta(path)
                if path.exists():
                    _warn(f'checkpoint {path} is damaged ({damage})')
        if paths or self._damaged():
            raise UserError(self._all_damaged_message())
        raise UserError(f'{self._directory.parent} has no checkpoint yet: train it first')

    def restore_part(self, path: pathlib.Path, part: str, like: Any) -> Any:
        """Restore one part of a checkpoint's state and ignore the rest.

        Args:
          path: path from `newest`.
          part: path of fields, such as 'learner.params'.
          like: the part, with the shapes, dtypes and shardings to restore to.

        Raises:
          UserError: if the checkpoint is of another model.
        """
        arrays = {
            name.removeprefix(f'.{part}'): shape
            for name, shape in _read_meta(path)['arrays'].items()
            if name.startswith(f'.{part}[') or name == f'.{part}'
        }
        _refuse_other_model(path, arrays, _describe_arrays(like))
        tree = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for name in reversed(part.split('.')):
            tree = {name: tree}
        restore = ocp.args.PyTreeRestore(
            item=tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(path / 'state', args=restore)
        for name in part.split('.'):
            restored = restored[name]
        return restored

    def _set_damaged_aside(self) -> int:
        """Rename damaged checkpoints and return the newest intact step; −1 if there is none."""
        for path in self._steps():
            damage = find_damage(path)
            if not damage:
                return int(path.name)
            aside = _free_name(path)
            os.rename(path, aside)
            _warn(
                f'checkpoint {path} is damaged ({damage}); it is kept as {aside.name} and the run '
                f'continues from the previous one'
            )
        if self._damaged():
            raise UserError(self._all_damaged_message())
        return -1

    def _damaged(self) -> list[pathlib.Path]:
        return list(self._directory.glob('*.damaged*'))

    def _all_damaged_message(self) -> str:
        suffix = '; they are kept as *.damaged' if self._damaged() else ''
        return (
            f'no checkpoint in {self._directory} is intact{suffix}: restore one from a backup, '
            f'or name another --workdir to start over'
        )

    def _steps(self) -> list[pathlib.Path]:
        """Return the directories of the checkpoints, newest first."""
        paths = [path for path in self._directory.glob('*') if path.name.isdigit()]
        return sorted(paths, key=lambda path: int(path.name), reverse=True)


def hash_file(file: pathlib.Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _read_meta(path: pathlib.Path) -> Meta:
    return json.loads((path / 'meta.json').read_text())


def _refuse_other_model(
    path: pathlib.Path, saved: dict[str, str], expected: dict[str, str]
) -> None:
    """Refuse a checkpoint whose arrays differ from the expected ones."""
    names = sorted(saved | expected)
    changed = [name for name in names if saved.get(name) != expected.get(name)]
    if changed:
        name, absent = changed[0], 'absent'
        raise UserError(
            f'checkpoint {path} is of another model: {name} was {saved.get(name, absent)} and is '
            f'{expected.get(name, absent)} now; did the code change since? Name another --workdir'
        )


@contextlib.contextmanager
def _silence_orbax() -> Iterator[None]:
    """Suppress the traceback that each thread of orbax logs; orbax raises the error too."""

    def is_not_orbax(record: stdlib_logging.LogRecord) -> bool:
        return 'orbax' not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)


def _warn(line: str) -> None:
    print(f'warning: {line}', file=sys.stderr)


def _describe_arrays(tree: Any) -> dict[str, str]:
    """Return the name of each array → its dtype and shape, such as 'float32[2, 3]'."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in leaves}


def _files(path: pathlib.Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob('*') if f.is_file())


def find_damage(path: pathlib.Path) -> str:
    """Return what is wrong with a checkpoint, '' if it is intact."""
    try:
        manifest = json.loads((path / 'manifest.json').read_text())
    except FileNotFoundError:
        return 'it has no manifest.json'
    except ValueError:
        return 'its manifest.json is not JSON'
    for name, expected in manifest.items():
        try:
            if hash_file(path / name) != expected:
                return f'{name} does not match its SHA-256'
        except FileNotFoundError:
            return f'{name} is missing'
    return ''


def _free_name(path: pathlib.Path) -> pathlib.Path:
    for i in range(1, 1000):
        aside = path.with_name(f'{path.name}.damaged' + (f'-{i}' if i > 1 else ''))
        if not aside.exists():
            return aside
    raise UserError(f'{path.parent} holds 999 damaged copies of {path.name}; delete them')
