"""Verified checkpoints, from which a run continues bit for bit or not at all.

    checkpoints/00000500/state/          the arrays, by orbax
    checkpoints/00000500/meta.json       step, dtypes and shapes, and values of the training loop
    checkpoints/00000500/manifest.json   SHA-256 of every file above

Orbax restores flipped bits silently, and a killed process leaves a half-written directory.
Therefore, a checkpoint is written to a hidden directory, then gets its manifest, and is renamed
last. `restore` and `newest` verify every hash before they read anything else, and use the newest
intact checkpoint. `restore` renames damaged checkpoints to NAME.damaged.

Every process writes its own arrays. All processes must call `save` and share a file system. The
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
      directory: directory of the checkpoints, which the first save creates.
      keep: number of checkpoints to keep. Keep at least 2 to have a fallback for a damaged one.
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
        """Write a tree of arrays as the checkpoint of a step, and return once it is on disk."""
        final_dir = self._directory / f'{step:08d}'
        is_saved = sharding.broadcast_from_primary(final_dir.exists())
        if is_saved:  # a run that was stopped at this very step
            return

        # Write into a hidden directory; its new name makes it a checkpoint.
        saving_dir = self._directory / f'.saving-{step:08d}'
        try:
            self._write(saving_dir, step, state, meta)
            if sharding.is_primary():
                os.rename(saving_dir, final_dir)
        except Exception as error:  # orbax raises errors of its own for those of the disk
            if storage_failure(error):  # free the space that the incomplete checkpoint takes
                shutil.rmtree(saving_dir, ignore_errors=True)
            raise

        # Delete the oldest ones only now that the new one is complete.
        if sharding.is_primary():
            for old_checkpoint in self._list_steps()[self._keep :]:
                shutil.rmtree(old_checkpoint, ignore_errors=True)
        sharding.barrier('checkpoint in place')

    def _write(
        self, saving_dir: pathlib.Path, step: int, state: chex.ArrayTree, meta: Meta
    ) -> None:
        """Write all files of a checkpoint to the hidden directory `saving_dir`."""
        # Remove what killed processes have left, and write the arrays with all processes.
        if sharding.is_primary():
            for leftover in self._directory.glob('.saving-*'):
                shutil.rmtree(leftover)
            saving_dir.mkdir(parents=True)
        sharding.barrier('checkpoint begun')
        with _silence_orbax():
            self._orbax.save(saving_dir / 'state', args=ocp.args.PyTreeSave(state))
            self._orbax.wait_until_finished()
        sharding.barrier('checkpoint written')

        # The manifest comes last, because it has the hash of every other file.
        if sharding.is_primary():
            meta = meta | {'step': step, 'arrays': _describe_arrays(state)}
            (saving_dir / 'meta.json').write_text(
                json.dumps(meta, indent=2, allow_nan=False) + '\n'
            )
            files = _list_files(saving_dir)
            manifest = {file_name: hash_file(saving_dir / file_name) for file_name in files}
            (saving_dir / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')

    def restore(self, like: Tree) -> tuple[Tree, Meta] | None:
        """Restore the newest intact checkpoint.

        Only the run that owns the directory may call this, because it renames damaged checkpoints.

        Args:
          like: tree of arrays with the shapes, dtypes and shardings to restore.

        Returns:
          A tuple (state, meta), or None if there is no checkpoint.

        Raises:
          UserError: if all checkpoints are damaged, or if the newest intact one has a different
            model. Nothing is deleted.
        """
        newest_step = self._set_damaged_aside() if sharding.is_primary() else 0
        step = sharding.broadcast_from_primary(newest_step)
        if step < 0:
            return None
        checkpoint_dir = self._directory / f'{step:08d}'

        # Refuse the checkpoint of another model before orbax reads it.
        meta = _read_meta(checkpoint_dir)
        _refuse_other_model(checkpoint_dir, meta.pop('arrays'), _describe_arrays(like))
        abstract_state = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.args.PyTreeRestore(
            item=abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
        )
        return self._orbax.restore(checkpoint_dir / 'state', args=restore_args), meta

    def newest(self) -> tuple[pathlib.Path, Meta]:
        """Return the path of the newest intact checkpoint and its metadata.

        This is safe while the run is writing, because damaged checkpoints are not renamed.

        Raises:
          UserError: if there is no checkpoint, or if all are damaged.
        """
        checkpoint_dirs: list[pathlib.Path] = []
        # List them again after a failure: the run may have deleted one meanwhile.
        while checkpoint_dirs != (checkpoint_dirs := self._list_steps()):
            for age, checkpoint_dir in enumerate(checkpoint_dirs):
                damage = find_damage(checkpoint_dir)
                if not damage:
                    if age:
                        _warn(f'{checkpoint_dir.name} is used instead of the newest')
                    return checkpoint_dir, _read_meta(checkpoint_dir)
                if checkpoint_dir.exists():
                    _warn(f'checkpoint {checkpoint_dir} is damaged ({damage})')
        if checkpoint_dirs or self._list_damaged():
            raise UserError(self._describe_damage())
        raise UserError(f'{self._directory.parent} has no checkpoint. Train the run first')

    def restore_part(self, checkpoint_dir: pathlib.Path, field_path: str, like: Tree) -> Tree:
        """Restore one part of the state in a checkpoint, and ignore the rest.

        Hashes are not verified here, because `newest` has verified all of them. A caller that
        restores several parts would otherwise pay for each verification.

        Args:
          checkpoint_dir: path returned by `newest`.
          field_path: path of the part, such as 'learner.params'.
          like: tree of arrays with the shapes, dtypes and shardings to restore.

        Raises:
          UserError: if the checkpoint has a different model.
        """
        # Compare the arrays of the part with those in the checkpoint.
        saved_arrays = {
            name.removeprefix(f'.{field_path}'): shape
            for name, shape in _read_meta(checkpoint_dir)['arrays'].items()
            if name.startswith((f'.{field_path}[', f'.{field_path}.')) or name == f'.{field_path}'
        }
        _refuse_other_model(checkpoint_dir, saved_arrays, _describe_arrays(like))

        # Restore the part, nested in the fields that lead to it.
        abstract_state = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for name in reversed(field_path.split('.')):
            abstract_state = {name: abstract_state}
        restore_args = ocp.args.PyTreeRestore(
            item=abstract_state,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract_state),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored_part = reader.restore(checkpoint_dir / 'state', args=restore_args)
        for name in field_path.split('.'):
            restored_part = restored_part[name]
        return restored_part

    def _set_damaged_aside(self) -> int:
        """Rename damaged checkpoints, and return the step of the newest intact one or −1."""
        for checkpoint_dir in self._list_steps():
            damage = find_damage(checkpoint_dir)
            if not damage:
                return int(checkpoint_dir.name)
            damaged_dir = _choose_damaged_name(checkpoint_dir)
            os.rename(checkpoint_dir, damaged_dir)
            _warn(
                f'checkpoint {checkpoint_dir} is damaged ({damage}); it is kept as '
                f'{damaged_dir.name} and the run continues from the previous one'
            )
        if self._list_damaged():
            raise UserError(self._describe_damage())
        return -1

    def _list_damaged(self) -> list[pathlib.Path]:
        return list(self._directory.glob('*.damaged*'))

    def _describe_damage(self) -> str:
        suffix = '; they are kept as *.damaged' if self._list_damaged() else ''
        return (
            f'no checkpoint in {self._directory} is intact{suffix}. Restore one from a '
            f'backup, or use another --workdir to start over'
        )

    def _list_steps(self) -> list[pathlib.Path]:
        """List the directories of the checkpoints, newest first."""
        step_dirs = [path for path in self._directory.glob('*') if path.name.isdigit()]
        return sorted(step_dirs, key=lambda step_dir: int(step_dir.name), reverse=True)


def hash_file(file: pathlib.Path) -> str:
    """Compute the SHA-256 hash of a file, as a hexadecimal string."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _read_meta(checkpoint_dir: pathlib.Path) -> Meta:
    return json.loads((checkpoint_dir / 'meta.json').read_text())


def _refuse_other_model(
    checkpoint_dir: pathlib.Path, saved_arrays: dict[str, str], expected_arrays: dict[str, str]
) -> None:
    """Raise UserError if the arrays of a checkpoint differ from the expected ones."""
    array_names = sorted(saved_arrays | expected_arrays)
    changed_arrays = [
        array_name
        for array_name in array_names
        if saved_arrays.get(array_name) != expected_arrays.get(array_name)
    ]
    if changed_arrays:
        array_name = changed_arrays[0]
        saved_shape = saved_arrays.get(array_name, 'absent')
        expected_shape = expected_arrays.get(array_name, 'absent')
        raise UserError(
            f'checkpoint {checkpoint_dir} does not match the model: {array_name} is {saved_shape} '
            f'in the checkpoint and {expected_shape} in the model. Try the code that wrote it, or '
            f'another --workdir'
        )


@contextlib.contextmanager
def _silence_orbax() -> Iterator[None]:
    """Suppress the tracebacks that the threads of orbax log, because orbax also raises them."""

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


def _describe_arrays(tree: chex.ArrayTree) -> dict[str, str]:
    """Map the name of each array to its dtype and shape, such as 'float32[2, 3]'."""
    paths_and_leaves, _ = jax.tree.flatten_with_path(tree)
    return {
        jax.tree_util.keystr(key_path): f'{leaf.dtype}{list(leaf.shape)}'
        for key_path, leaf in paths_and_leaves
    }


def _list_files(directory: pathlib.Path) -> list[str]:
    return sorted(
        str(file.relative_to(directory)) for file in directory.rglob('*') if file.is_file()
    )


def find_damage(checkpoint_dir: pathlib.Path) -> str:
    """Return a description of the damage to a checkpoint, or '' if it is intact."""
    try:
        manifest = json.loads((checkpoint_dir / 'manifest.json').read_text())
    except FileNotFoundError:
        return 'it has no manifest.json'
    except ValueError:
        return 'its manifest.json is not JSON'
    if not isinstance(manifest, dict) or 'meta.json' not in manifest:
        return 'its manifest.json has no hash of meta.json'
    for file_name, expected_hash in manifest.items():
        try:
            if hash_file(checkpoint_dir / file_name) != expected_hash:
                return f'{file_name} does not match its SHA-256'
        except FileNotFoundError:
            return f'{file_name} is missing'
    return ''


def _choose_damaged_name(checkpoint_dir: pathlib.Path) -> pathlib.Path:
    for copy_number in range(1, 1000):
        damaged_dir = checkpoint_dir.with_name(
            f'{checkpoint_dir.name}.damaged' + (f'-{copy_number}' if copy_number > 1 else '')
        )
        if not damaged_dir.exists():
            return damaged_dir
    raise UserError(
        f'{checkpoint_dir.parent} has 999 damaged copies of {checkpoint_dir.name}. Delete them'
    )
