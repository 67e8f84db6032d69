"""Checkpoints that a run can be continued from bit for bit, or not at all.

    checkpoints/00000500/state/          the arrays, by orbax
    checkpoints/00000500/meta.json       step, what its arrays are, and what the loop adds
    checkpoints/00000500/manifest.json   SHA-256 of every file above

Orbax restores flipped bits without a word, and a directory can be left half-written. So a step is
written in a hidden directory, gets its manifest, and is renamed into place last; on restore every
hash is compared, and a step that fails is set aside as NAME.damaged for the newest one that holds.

Of several processes (mi.parallel) each writes the arrays that it has, so that all have to call and
see the same file system; the first one does everything else.
"""

import hashlib
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

from mi import parallel
from mi.config import UserError


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, made on the first save.
      keep: how many of the newest to keep. With fewer than 2 a damaged one has no predecessor.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2):
        self._directory = pathlib.Path(directory).absolute()
        self._keep = keep
        self._orbax = ocp.StandardCheckpointer()

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Writes `state`, a tree of arrays, as the checkpoint of a step; returns when on disk."""
        final = self._directory / f'{step:08d}'
        if parallel.of_first(final.exists()):  # a run that was stopped at this very step
            return
        saving = self._directory / f'.saving-{step:08d}'
        if parallel.first():
            for leftover in self._directory.glob('.saving-*'):
                shutil.rmtree(leftover)
            saving.mkdir(parents=True)
        parallel.wait('checkpoint begun')
        self._orbax.save(saving / 'state', state)
        self._orbax.wait_until_finished()
        parallel.wait('checkpoint written')
        if parallel.first():
            meta = meta | {'step': step, 'arrays': _arrays(state)}
            (saving / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
            manifest = {name: digest(saving / name) for name in _files(saving)}
            (saving / 'manifest.json').write_text(json.dumps(manifest, indent=2) + '\n')
            os.rename(saving, final)
            for old in self._steps()[self._keep :]:
                shutil.rmtree(old, ignore_errors=True)
        parallel.wait('checkpoint in place')

    def restore(self, like: Any, *, mend: bool = True) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint whose every hash holds, as (state, meta); None if there is none.

        Args:
          like: a tree of arrays with the shapes, dtypes and shardings to restore to.
          mend: whether damaged ones are set aside; not by one who does not hold the run, and may
            see one that is just being cleared away.

        Raises:
          UserError: if there are checkpoints but none of them holds, or the newest good one is of
            another model. Nothing is deleted.
        """
        step = parallel.of_first(self._newest(mend) if parallel.first() else 0)
        return None if step < 0 else self._load(self._directory / f'{step:08d}', like)

    def _newest(self, mend: bool) -> int:
        """The newest step whose every hash holds; −1 if there are none."""
        for path in self._steps():
            wrong = damage(path)
            if not wrong:
                return int(path.name)
            if not mend:
                continue
            aside = _free_name(path)
            os.rename(path, aside)
            warnings.warn(
                f'checkpoint {path} is damaged ({wrong}); it is kept as {aside.name} and the run '
                f'goes on from the one before',
                stacklevel=3,
            )
        if list(self._directory.glob('*.damaged*')):
            raise UserError(
                f'no checkpoint in {self._directory} is whole; they are kept as *.damaged: restore '
                f'one from a backup, or name another --workdir to start afresh'
            )
        return -1

    def _load(self, path: pathlib.Path, like: Any) -> tuple[Any, dict[str, Any]]:
        meta = json.loads((path / 'meta.json').read_text())
        before, now = meta.pop('arrays'), _arrays(like)
        changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
        if changed:
            raise UserError(
                f'checkpoint {path} is of another model: {changed[0]} was {before.get(changed[0])} '
                f'and is {now.get(changed[0])}; was the code changed since? Name another --workdir'
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._orbax.restore(path / 'state', abstract), meta

    def _steps(self) -> list[pathlib.Path]:
        """The directories of the steps in place, newest first."""
        found = [path for path in self._directory.glob('*') if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)


def digest(file: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(file, 'rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def _arrays(tree: Any) -> dict[str, str]:
    """Name of each array of a tree → its dtype and shape, in words."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): f'{a.dtype}{list(a.shape)}' for path, a in leaves}


def _files(path: pathlib.Path) -> list[str]:
    return sorted(str(f.relative_to(path)) for f in path.rglob('*') if f.is_file())


def damage(path: pathlib.Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is."""
    try:
        manifest = json.loads((path / 'manifest.json').read_text())
    except FileNotFoundError:
        return 'it has no manifest.json'
    except ValueError:
        return 'its manifest.json is not JSON'
    for name, expected in manifest.items():
        try:
            if digest(path / name) != expected:
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
