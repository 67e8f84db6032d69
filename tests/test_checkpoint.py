import errno
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.config import UserError
from mi.training import checkpoint
from mi.training.checkpoint import Checkpoints


def state(step):
    key = jax.random.key(step)
    return {'W': jax.random.normal(key, (64, 64)), 'n': jnp.asarray(step), 'x': [jnp.ones(3)]}


def save(directory, *steps, keep=3):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state(step), {'metrics': 10 * step})


def restore(directory):
    return Checkpoints(directory).restore(jax.tree.map(jnp.zeros_like, state(0)))


def assert_is(step, restored):
    values, meta = restored
    assert meta == {'step': step, 'metrics': 10 * step}
    jax.tree.map(np.testing.assert_array_equal, values, state(step))


def largest(directory):
    return max((f for f in directory.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def test_the_newest_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, 5, 20, 10)
    assert_is(20, restore(tmp_path))


def test_none_yet(tmp_path):
    assert restore(tmp_path / 'checkpoints') is None


def test_old_ones_go(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000003', '00000004']


def flip_one_bit(path):
    file = largest(path)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(path):
    file = largest(path)
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(path):
    largest(path).unlink()


def lose_the_manifest(path):
    (path / 'manifest.json').unlink()


def half_a_manifest(path):
    text = (path / 'manifest.json').read_text()
    (path / 'manifest.json').write_text(text[: len(text) // 2])


def make_manifest(text):
    return lambda path: (path / 'manifest.json').write_text(text)


@pytest.mark.parametrize(
    'damage, said',
    [
        (flip_one_bit, 'does not match its SHA-256'),
        (truncate, 'does not match its SHA-256'),
        (lose_a_file, 'is missing'),
        (lose_the_manifest, 'has no manifest.json'),
        (half_a_manifest, 'is not JSON'),
        (make_manifest('{}'), 'has no hash of meta.json'),
        (make_manifest('["meta.json"]'), 'has no hash of meta.json'),
    ],
)
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, damage, said, capsys):
    save(tmp_path, 5, 10)
    damage(tmp_path / '00000010')
    restored = restore(tmp_path)
    [line] = capsys.readouterr().err.splitlines()  # without a line of code
    assert line.startswith(f'warning: checkpoint {tmp_path}/00000010 is damaged (') and said in line
    assert line.endswith(
        'it is kept as 00000010.damaged and the run continues from the previous one'
    )
    assert_is(5, restored)
    assert (tmp_path / '00000010.damaged').exists()
    save(tmp_path, 10)  # the run comes by here again
    assert_is(10, restore(tmp_path))


def test_who_only_reads_leaves_a_damaged_one_where_it_is_and_says_so(tmp_path, capsys):
    save(tmp_path, 5, 10)
    flip_one_bit(tmp_path / '00000010')
    path, meta = Checkpoints(tmp_path).newest()
    assert (path.name, meta['step'], meta['metrics']) == ('00000005', 5, 50)
    said = capsys.readouterr().err.splitlines()
    assert 'warning: checkpoint' in said[0] and '00000010 is damaged (' in said[0]
    assert said[1:] == ['warning: 00000005 is used instead of the newest']
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000005', '00000010']
    flip_one_bit(tmp_path / '00000005')
    with pytest.raises(
        UserError, match=r'no checkpoint in .* is intact\. Restore one from a backup'
    ):
        Checkpoints(tmp_path).newest()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000005', '00000010']
    (tmp_path / '00000005').rename(tmp_path / '00000005.damaged')
    (tmp_path / '00000010').rename(tmp_path / '00000010.damaged')
    with pytest.raises(UserError, match=r'is intact; they are kept as \*\.damaged'):
        Checkpoints(tmp_path).newest()


def test_who_only_reads_is_told_where_there_is_none(tmp_path):
    with pytest.raises(UserError, match=rf'{tmp_path} has no checkpoint\. Train the run first'):
        Checkpoints(tmp_path / 'checkpoints').newest()


def test_one_that_the_run_clears_away_meanwhile_is_passed_over(tmp_path, monkeypatch, capsys):
    save(tmp_path, 5, 10)
    damage = checkpoint.find_damage

    def cleared(path):
        if path.name == '00000010':  # the run has saved 20 and keeps two
            save(tmp_path, 20, keep=1)
        return damage(path)

    monkeypatch.setattr(checkpoint, 'find_damage', cleared)
    assert Checkpoints(tmp_path).newest()[0].name == '00000020'
    assert 'damaged' not in capsys.readouterr().err


class Whole(NamedTuple):
    learner: Any
    actor: Any


def test_a_part_is_restored_whatever_the_rest_is(tmp_path):
    params = {'W': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, Whole({'params': params}, jnp.zeros(8)), {})
    checkpoints.save(10, Whole(Whole(params, jnp.zeros(2)), jnp.zeros(4)), {})
    path, _ = checkpoints.newest()
    like = jax.tree.map(jnp.zeros_like, params)
    restored = checkpoints.restore_part(path, 'learner.learner', like)
    jax.tree.map(np.testing.assert_array_equal, restored, params)
    other = like | {'b': jnp.zeros(4)}
    change = r"\['b'\] is float32\[3\] in the checkpoint and float32\[4\] in the model"
    with pytest.raises(UserError, match=change):
        checkpoints.restore_part(path, 'learner.learner', other)


def test_one_that_was_being_written_does_not_count(tmp_path):
    save(tmp_path, 5)
    (tmp_path / '.saving-00000010' / 'state').mkdir(parents=True)
    assert_is(5, restore(tmp_path))
    save(tmp_path, 10)
    assert not list(tmp_path.glob('.saving-*'))


def test_all_damaged_is_an_error_that_deletes_nothing(tmp_path):
    save(tmp_path, 5, 10)
    for step in ('00000005', '00000010'):
        flip_one_bit(tmp_path / step)
    with pytest.raises(UserError, match=r'no checkpoint in .* is intact'):
        restore(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000005.damaged', '00000010.damaged']
    with pytest.raises(UserError, match=r'no checkpoint in .* is intact'):
        restore(tmp_path)  # not a fresh start the second time either


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 5)
    other = {**state(0), 'W': jnp.zeros((64, 32))}
    change = r"\['W'\] is float32\[64, 64\] in the checkpoint and float32\[64, 32\] in the model"
    with pytest.raises(UserError, match=change):
        Checkpoints(tmp_path).restore(other)


def test_meta_is_in_the_manifest(tmp_path):
    save(tmp_path, 5)
    assert 'meta.json' in json.loads((tmp_path / '00000005' / 'manifest.json').read_text())


@pytest.mark.parametrize('broken', ['orbax', 'meta.json', 'manifest.json', 'rename'])
def test_a_save_that_fails_leaves_the_ones_before_and_none_of_its_own(
    tmp_path, monkeypatch, broken
):
    """The name of a step is there when everything of it is."""
    save(tmp_path, 5)
    checkpoints = Checkpoints(tmp_path)
    full = OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patched, pytest.raises(OSError, match='No space left'):
        if broken == 'orbax':
            patched.setattr(checkpoints._orbax, 'save', raising(full))
        elif broken == 'rename':
            patched.setattr(checkpoint.os, 'rename', raising(full))
        else:
            write = pathlib.Path.write_text
            patched.setattr(
                pathlib.Path,
                'write_text',
                lambda path, text: raising(full)() if path.name == broken else write(path, text),
            )
        checkpoints.save(10, state(10), {'metrics': 100})
    assert [p.name for p in tmp_path.iterdir()] == ['00000005']  # and space for the next one
    assert_is(5, restore(tmp_path))
    save(tmp_path, 10)
    assert_is(10, restore(tmp_path))


def test_what_is_not_of_the_disk_is_left_to_be_looked_at(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, 'hash_file', raising(RuntimeError('odd')))
    with pytest.raises(RuntimeError, match='odd'):
        checkpoints.save(10, state(10), {})
    assert [p.name for p in tmp_path.iterdir()] == ['.saving-00000010']


def test_meta_is_json_or_nothing_is_saved(tmp_path):
    with pytest.raises(ValueError, match='not JSON compliant'):
        Checkpoints(tmp_path).save(10, state(10), {'nats': float('nan')})
    assert not list(tmp_path.glob('[0-9]*'))


def raising(error):
    def raise_it(*arguments, **named):
        raise error

    return raise_it


def test_a_checkpoint_has_its_name_only_once_it_is_whole(tmp_path, monkeypatch):
    """A kill at any moment before leaves nothing that looks like a checkpoint."""
    hashed, named = checkpoint.hash_file, []

    def look(file):
        named.append([path.name for path in tmp_path.iterdir() if path.name.isdigit()])
        return hashed(file)

    monkeypatch.setattr(checkpoint, 'hash_file', look)
    checkpoint.Checkpoints(tmp_path, keep=2).save(7, {'a': jnp.ones(3)}, {})
    assert named and not any(named)
    assert (tmp_path / '00000007').is_dir()
