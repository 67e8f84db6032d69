"""Checkpoints that a run can be continued from bit for bit, or not at all.

    checkpoints/00000500/state/          the arrays, by orbax
    checkpoints/00000500/meta.json       step, what its arrays are, and what the loop adds
    checkpoints/00000500/manifest.json   SHA-256 of every file above

Orbax restores flipped bits without a word, and a directory can be left half-written. So a step is
written in a hidden directory, gets its manifest, and is renamed into place last; on restore every
hash is compared, and a step that fails is set aside as NAME.damaged for the newest one that holds.

Of several processes (mi.training.sharding) each writes the arrays that it has, so that all have to
call and see the same file system; the first one does everything else.
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
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mi.config import UserError
from mi.training import sharding
from mi.training.io import storage_failure


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, made on the first save.
      keep: how many of the newest to keep. With fewer than 2 a damaged one has no predecessor.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        # What every device has is written by one of them: to share the writing, orbax would compile
        # a program for each array that slices it.
        handlers = ocp.type_handlers
        registry = handlers.create_type_handler_registry(
            (jax.Array, handlers.ArrayHandler(use_replica_parallel=False)),
            (np.ndarray, handlers.NumpyHandler()),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        self._orbax = ocp.AsyncCheckpointer(handler)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes `state`, a tree of arrays, as the checkpoint of a step; returns when on disk."""
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
            if storage_failure(error):  # what is there of it would take what is left of the disk
                shutil.rmtree(saving, ignore_errors=True)
            raise
        if sharding.is_primary():
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
        sharding.barrier('checkpoint in place')

    def _write(self, saving: pathlib.Path, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Write everything of a checkpoint, in a hidden directory."""
        if sharding.is_primary():
            for leftover in self._directory.glob('.saving-*'):
                shutil.rmtree(leftover)
            saving.mkdir(parents=True)
        sharding.barrier('checkpoint begun')
        with _without_words_of_orbax():
            self._orbax.save(saving / 'state', args=ocp.args.PyTreeSave(state))
            self._orbax.wait_until_finished()
        sharding.barrier('checkpoint written')
        if sharding.is_primary():
            meta = meta | {'step': step, 'arrays': _arrays(state)}
            (saving / 'meta.json').write_text(json.dumps(meta, indent=2, allow_nan=False) + '\n')
            manifest = {name: hash_file(saving / name) for name in _files(saving)}
            (saving / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restore the newest checkpoint whose every hash holds; None if there is none.

        For the run that holds the directory: damaged ones are set aside.

        Args:
          like: a tree of arrays with the shapes, dtypes and shardings to restore to.

        Returns:
          (state, meta)

        Raises:
          UserError: if there are checkpoints but none of them holds, or the newest good one is of
            another model. Nothing is deleted.
        """
        step = sharding.broadcast_from_primary(self._mend() if sharding.is_primary() else 0)
        if step < 0:
            return None
        path = self._directory / f'{step:08d}'
        meta = _meta(path)
        _refuse_other(path, meta.pop('arrays'), _arrays(like))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore = ocp.args.PyTreeRestore(
            item=abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract)
        )
        return self._orbax.restore(path / 'state', args=restore), meta

    def newest(self) -> tuple[pathlib.Path, dict[str, Any]]:
        """Return the newest checkpoint whose every hash holds, and its meta.

        For those who only read, perhaps while the run goes on: damaged ones stay where they are.

        Raises:
          UserError: if there is none, or none of them holds.
        """
        paths: list[pathlib.Path] = []
        while paths != (paths := self._steps()):  # the run may clear one away that is looked at
            for passed, path in enumerate(paths):
                wrong = find_damage(path)
                if not wrong:
                    if passed:
                        _say(f'{path.name} is taken instead of the newest')
                    return path, _meta(path)
                if path.exists():
                    _say(f'checkpoint {path} is damaged ({wrong})')
        if paths or self._set_aside():
            raise UserError(self._none_is_whole())
        raise UserError(f'{self._directory.parent} has no checkpoint yet: train it first')

    def restore_part(self, path: pathlib.Path, part: str, like: Any) -> Any:
        """Restore one part of a checkpoint's state, whatever the rest of it is.

        Args:
          path: from `newest`.
          part: which one, as 'learner.params'.
          like: its arrays, with the shapes, dtypes and shardings to restore to.

        Raises:
          UserError: if it is of another model.
        """
        arrays = {
            name.removeprefix(f'.{part}'): shape
            for name, shape in _meta(path)['arrays'].items()
            if name.startswith(f'.{part}[') or name == f'.{part}'
        }
        _refuse_other(path, arrays, _arrays(like))
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

    def _mend(self) -> int:
        """Set damaged checkpoints aside and return the newest step that holds; −1 without any."""
        for path in self._steps():
            wrong = find_damage(path)
            if not wrong:
                return int(path.name)
            aside = _free_name(path)
            os.rename(path, aside)
            _say(
                f'checkpoint {path} is damaged ({wrong}); it is kept as {aside.name} and the run '
                f'goes on from the one before'
            )
        if self._set_aside():
            raise UserError(self._none_is_whole())
        return -1

    def _set_aside(self) -> list[pathlib.Path]:
        return list(self._directory.glob('*.damaged*'))

    def _none_is_whole(self) -> str:
        kept = '; they are kept as *.damaged' if self._set_aside() else ''
        return (
            f'no checkpoint in {self._directory} is whole{kept}: restore one from a backup, or '
            f'name another --workdir to start afresh'
        )

    def _steps(self) -> list[pathlib.Path]:
        """The directories of the steps in place, newest first."""
        found = [path for path in self._directory.glob('*') if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)


def hash_file(file: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _meta(path: pathlib.Path) -> dict[str, Any]:
    return json.loads((path / 'meta.json').read_text())


def _refuse_other(path: pathlib.Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Refuse a checkpoint whose arrays are not those that are asked for."""
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        name, absent = changed[0], 'absent'
        raise UserError(
            f'checkpoint {path} is of another model: {name} was {before.get(name, absent)} '
            f'and is {now.get(name, absent)}; was the code changed since? Name another --workdir'
        )


@contextlib.contextmanager
def _without_words_of_orbax() -> Iterator[None]:
    """Keep orbax from logging a traceback from each of its threads: it raises the error too."""

    def is_ours(record: stdlib_logging.LogRecord) -> bool:
        return 'orbax' not in record.pathname

    logger = logging.get_absl_logger()
    logger.addFilter(is_ours)
    try:
        yield
    finally:
        logger.removeFilter(is_ours)


def _say(line: str) -> None:
    print(f'warning: {line}', file=sys.stderr)


def _arrays(tree: Any) -> dict[str, str]:
    """Name of each array of a tree → its dtype and shape, in words."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f'{a.dtype}{list(a.shape)}' for path, a in leaves}


def _files(path: pathlib.Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob('*') if f.is_file())


def find_damage(path: pathlib.Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is."""
    try:
        manifest = json.loads((path / 'manifest.json').read_text())
    except FileNotFoundError:
        return 'it has no manifest.json'
    except ValueError:
        return 'its manifest.json is not JSON'
    for name, expected in manifest.items():
        try:
            if hash_file(path / name) != expected:
                return f'{name} has another SHA-256 than when it was written'
        except FileNotFoundError:
            return f'{name} is missing'
    return ''


def _free_name(path: pathlib.Path) -> pathlib.Path:
    for i in range(1, 1000):
        aside = path.with_name(f'{path.name}.damaged' + (f'-{i}' if i > 1 else ''))
        if not aside.exists():
            return aside
    raise UserError(f'{path.parent} holds 999 damaged copies of {path.name}; clear them away')
