"""The race with nanoGPT's recipe: what its sides compute; torch's where it is installed."""

import math

import numpy as np
import pytest

from benchmarks import nanogpt
from mi.config import UserError
from mi.lm import factory

TOY = nanogpt.Recipe(layers=2, heads=2, width=16, length=8, batch=3, steps=12, warmup=4)
V = 11


def count_recipe(recipe, vocabulary):
    """Count the parameters of the recipe's model by hand."""
    H = recipe.width
    block = 3 * H * H + H * H + 2 * 4 * H * H + 2 * H
    return vocabulary * H + recipe.length * H + recipe.layers * block + H


def test_our_model_has_the_parameters_of_the_recipe():
    recipe = nanogpt.Recipe()
    assert count_recipe(recipe, 65) == 804_096  # "0.80M", which omits the positions
    for vocabulary in (65, 81):
        costs = factory.compute_costs(nanogpt.make_config(recipe), vocabulary)
        expected = count_recipe(recipe, vocabulary)
        assert costs['parameters']['model'] == pytest.approx(expected, rel=0.01)


def test_learning_rates_rise_linearly_and_fall_as_a_cosine():
    rates = nanogpt.compute_learning_rates(nanogpt.Recipe())
    assert rates.shape == (2000,) and rates.argmax() == 100
    np.testing.assert_allclose(rates[[0, 49, 100]], [1e-3 / 101, 50e-3 / 101, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(rates[1050], (1e-3 + 1e-4) / 2, rtol=1e-5)  # half of the cosine
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)


def test_windows_are_of_the_text_and_the_same_for_all_sides(tmp_path):
    file = tmp_path / 'input.txt'
    file.write_text('abcdefghij' * 30 + 'é')
    text = nanogpt.load_text(str(file), TOY.length)
    assert (len(text.train), len(text.valid), text.vocabulary) == (270, 31, V)
    first = nanogpt.draw_batch(text.train, TOY, 0, 5)
    assert first.shape == (3, 9) and first.dtype == np.int32
    np.testing.assert_array_equal((first[:, 1:] - first[:, :-1]) % 10, 1)  # consecutive letters
    np.testing.assert_array_equal(first, nanogpt.draw_batch(text.train, TOY, 0, 5))
    assert not np.array_equal(first, nanogpt.draw_batch(text.train, TOY, 0, 6))
    with pytest.raises(UserError, match=r'--data=.*missing.*Try without'):
        nanogpt.load_text(str(tmp_path / 'missing'), TOY.length)


@pytest.mark.parametrize(
    'content, message',
    [
        (b'caf\xe9' * 100, r'expected text in UTF-8, got 0xe9 as byte 3\. Convert the file'),
        (b'abcd' * 20, r'expected more than 80 characters, got 80\. Try without'),
        (b'', r'expected more than 80 characters, got 0\. Try without'),
    ],
)
def test_a_text_that_has_no_windows_is_refused(tmp_path, content, message):
    file = tmp_path / 'input.txt'
    file.write_bytes(content)
    with pytest.raises(UserError, match=f'^--data={file}: {message}'):
        nanogpt.load_text(str(file), TOY.length)
    file.write_bytes(b'abcd' * 20 + b'e')
    assert len(nanogpt.load_text(str(file), TOY.length).valid) == TOY.length + 1


def test_turns_divide_the_updates():
    assert nanogpt.list_turns(10, 3) == [range(0, 3), range(3, 6), range(6, 10)]
    assert nanogpt.list_turns(2, 2) == [range(0, 1), range(1, 2)]
    with pytest.raises(UserError, match=r'^--turns=4: expected at most --steps=3$'):
        nanogpt.list_turns(3, 4)


def test_the_loss_at_equal_seconds_is_interpolated():
    turns = [{'seconds': 2.0, 'loss': 3.0}, {'seconds': 3.0, 'loss': 2.0}]
    assert nanogpt.find_loss(turns, 2.0) == 3 and nanogpt.find_loss(turns, 3.5) == 2.5
    assert nanogpt.find_loss(turns, 9.0) == 2 and math.isnan(nanogpt.find_loss(turns, 1.0))


def train(side):
    """Train on one text of repeated letters, in two turns; return what the turns report."""
    ids = np.arange(300, dtype=np.int32) % 10
    text = nanogpt.Text(ids, ids, V)
    turns = nanogpt.list_turns(TOY.steps, 2)
    take_turn = nanogpt.train_in_turns(side, text, TOY, 0, turns)
    return [take_turn(), take_turn()]


@pytest.mark.slow
@pytest.mark.parametrize('name', ['torch', 'mi'])
def test_a_side_starts_near_the_uniform_loss_and_learns(name):
    if name == 'torch':
        pytest.importorskip('torch', reason='the extra benchmark is not installed')
    side = nanogpt.make_side(name, TOY._replace(learning_rate=3e-2), V, 0)
    tokens = nanogpt.draw_batch(np.arange(300, dtype=np.int32) % 10, TOY, 1)
    assert side.evaluate(tokens) == pytest.approx(math.log(V), abs=0.8)
    first, second = train(side)
    assert [first['steps'], second['steps']] == [6, 6] and first['seconds'] > 0
    assert second['loss'] < first['loss'] < side.evaluate(np.full((3, 9), 10, np.int32))


def test_the_model_in_torch_is_causal_and_has_the_parameters_of_the_recipe():
    torch = pytest.importorskip('torch', reason='the extra benchmark is not installed')
    torch.manual_seed(0)
    model = nanogpt.make_torch_model(TOY, V)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_recipe(TOY, V)
    ids = torch.arange(16).reshape(2, 8) % V
    logits = model(ids)
    assert logits.shape == (2, 8, V)
    log_probs = logits.log_softmax(-1).detach().numpy()
    targets = (ids + 3) % V
    expected = -np.take_along_axis(log_probs, targets.numpy()[..., None], -1).mean()
    np.testing.assert_allclose(model(ids, targets).item(), expected, rtol=1e-5)
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % V
    differs = (model(changed) != logits).any(-1)
    assert not differs[:, :5].any() and differs[:, 5:].all()
