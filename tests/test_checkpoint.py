import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.checkpoint import Checkpoints
from mi.config import UserError


def state(step):
    key = jax.random.key(step)
    return {'W': jax.random.normal(key, (64, 64)), 'n': jnp.asarray(step), 'x': [jnp.ones(3)]}


def save(directory, *steps, keep=3):
    checkpoints = Checkpoints(directory, keep)
    for step in steps:
        checkpoints.save(step, state(step), {'metrics': 10 * step})


def restore(directory, **options):
    return Checkpoints(directory).restore(jax.tree.map(jnp.zeros_like, state(0)), **options)


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


@pytest.mark.parametrize(
    'damage, said',
    [
        (flip_one_bit, 'has another SHA-256'),
        (truncate, 'has another SHA-256'),
        (lose_a_file, 'is missing'),
        (lose_the_manifest, 'has no manifest.json'),
        (half_a_manifest, 'is not JSON'),
    ],
)
def test_a_damaged_one_is_set_aside_for_the_one_before(tmp_path, damage, said):
    save(tmp_path, 5, 10)
    damage(tmp_path / '00000010')
    with pytest.warns(UserWarning, match=said):
        restored = restore(tmp_path)
    assert_is(5, restored)
    assert (tmp_path / '00000010.damaged').exists()
    save(tmp_path, 10)  # the run comes by here again
    assert_is(10, restore(tmp_path))


def test_who_only_reads_leaves_a_damaged_one_where_it_is(tmp_path):
    save(tmp_path, 5, 10)
    lose_a_file(tmp_path / '00000010')  # as one that the run is clearing away looks
    assert_is(5, restore(tmp_path, mend=False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000005', '00000010']


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
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r'no checkpoint in .* is whole'):
        restore(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['00000005.damaged', '00000010.damaged']
    with pytest.raises(UserError, match=r'no checkpoint in .* is whole'):
        restore(tmp_path)  # not a fresh start the second time either


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 5)
    other = {**state(0), 'W': jnp.zeros((64, 32))}
    with pytest.raises(UserError, match=r"\['W'\] was float32\[64, 64\] and is float32\[64, 32\]"):
        Checkpoints(tmp_path).restore(other)


def test_meta_is_in_the_manifest(tmp_path):
    save(tmp_path, 5)
    assert 'meta.json' in json.loads((tmp_path / '00000005' / 'manifest.json').read_text())
