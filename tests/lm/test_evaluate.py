"""Evaluation against sums over predictions that are written out here, from single applications."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm as configs
from mi.lm import dynamic_evaluation, evaluate, factory
from mi.lm.data import token_store
from mi.lm.data.token_store import Recipe
from mi.training import sharding
from tests import prng


def tiny(word='core=lstm', **changes):
    config = configs.get_config(f'{word},tiny').unlock()
    config.update_from_flattened_dict({'train.length': 16, 'eval.length': 16} | changes)
    return config.lock()


def digits_then_words(directory):
    """Texts whose first part has fewer bytes per token than the rest."""
    lines = [f'{i * 7919 % 1000}\n' for i in range(200)] + ['the same naïve words\n'] * 200
    for split in ('train', 'valid', 'test'):
        (directory / f'{split}.txt').write_text(''.join(lines))
    return str(directory)


@pytest.mark.parametrize('level, size', [('byte', 256), ('bpe', 300), ('token', 5_000)])
@pytest.mark.parametrize('read', [2, 150, 900, 0])
def test_bits_per_byte_are_of_the_bytes_that_were_predicted(level, size, read, tmp_path, cache):
    corpus = token_store.load(Recipe(digits_then_words(tmp_path), level, size), cache)
    text = (tmp_path / 'valid.txt').read_text()
    count = read or len(corpus.tokens['valid'])
    if level == 'byte':
        predicted = count - 1
    elif level == 'bpe':  # ids give back the text, up to bytes within a letter
        ids = corpus.tokens['valid'][:count]
        predicted = len(corpus.decode(ids).encode()) - len(corpus.decode(ids[:1]).encode())
    else:  # words and ends of lines, by hand
        ends = [len(text[:i].encode()) for i in _ends_of_words(text)]
        predicted = ends[count - 1] - ends[0]
    result = evaluate.compute_metrics(3.0, corpus, 'valid', {'predictions': count - 1})
    assert corpus.count_predicted_bytes('valid', count - 1) == predicted
    expected = 3.0 * (count - 1) / (predicted * math.log(2))
    assert result['bits_per_byte'] == pytest.approx(expected, rel=1e-12)


def _ends_of_words(text):
    ends, inside = [], False
    for i, letter in enumerate(text):
        if letter.isspace() and inside:
            ends.append(i)
        if letter == '\n':
            ends.append(i + 1)
        inside = not letter.isspace()
    return ends


def test_bytes_of_words_are_those_of_several_texts_with_any_white_space(tmp_path, cache):
    (tmp_path / 'one').mkdir()
    for domain, text in (('a', ' ä  b \n\nc <eos> d'), ('b', 'e\t\tf  \n g\n \n')):
        (tmp_path / 'one' / domain).mkdir()
        for split in ('train', 'valid', 'test'):
            (tmp_path / 'one' / domain / f'{split}.txt').write_text(text)
    corpus = token_store.load(Recipe('domains', 'token', 100), cache, path=str(tmp_path / 'one'))
    assert corpus.lossless and len(corpus.tokens['valid']) == 14
    # ä, b, end, end, c, <eos>, d, <eos> of an open line | e, f, end, g, end, end
    ends = [3, 6, 8, 9, 10, 16, 18, 18, 19, 22, 25, 27, 28, 30]
    counts = [corpus.count_predicted_bytes('valid', n) for n in range(1, 14)]
    assert counts == [end - 3 for end in ends[1:]]


def test_tokens_that_do_not_determine_the_text_have_no_bits_per_byte(tmp_path, cache):
    corpus = token_store.load(Recipe(digits_then_words(tmp_path), 'word', 50), cache)
    assert (
        evaluate.compute_metrics(3.0, corpus, 'valid', {'predictions': 9})['bits_per_byte'] is None
    )


def with_params(word='core=lstm', **changes):
    """A model with parameters of one seed that are far from uniform, and its config."""
    config = tiny(word, **{'data.level': 'byte'} | changes)
    model = factory.build_model(config, 256)
    row = jnp.zeros((1, 1), jnp.int32)
    key = prng.key(1)
    params = jax.jit(lambda: model.init(key, model.initial_carry(1), row))()['params']
    return config, model, jax.tree.map(lambda a: 3 * a, params)


def seed_axis(params):
    return jax.tree.map(lambda a: a[None], params)


def nats_of(model, params, tokens):
    """−ln p of tokens[1:], by one application from the initial state."""
    tokens = np.asarray(tokens, np.int32)[:, None]
    return np.asarray(_nats(model, params, tokens[:-1], tokens[1:])[:, 0], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _nats(model, params, inputs, targets):
    _, losses = model.apply({'params': params}, model.initial_carry(1), inputs, targets)
    return losses.nats


def measure(model, params, corpus, reading, num_tokens):
    excerpt, mesh = evaluate.Excerpt(corpus, 'valid', num_tokens), sharding.make_mesh(1, 1)
    return evaluate.evaluate(model, seed_axis(params), excerpt, reading, mesh)[0]


@pytest.mark.parametrize(
    'word, changes',
    [
        ('core=lstm', {}),
        pytest.param(
            'core=transformer', {'model.memory': 48, 'model.layers': 2}, marks=pytest.mark.slow
        ),
    ],
)
def test_state_is_carried_from_segment_to_segment(word, changes, texts):
    _, model, params = with_params(word, **changes)
    corpus = token_store.load(Recipe(texts, 'byte', 256))
    measured = measure(model, params, corpus, evaluate.Reading(batch=1, length=8), 41)
    whole = nats_of(model, params, corpus.tokens['valid'][:41])
    assert measured['nats_per_token'] == pytest.approx(whole.mean(), rel=1e-5)
    alone = [nats_of(model, params, corpus.tokens['valid'][i : i + 9]) for i in range(0, 40, 8)]
    assert abs(np.mean(alone) - whole.mean()) > 1e-3  # it matters here


def test_a_sliding_window_starts_from_no_state(texts):
    _, model, params = with_params()
    corpus = token_store.load(Recipe(texts, 'byte', 256))
    reading = evaluate.Reading(batch=2, length=8, stride=3)
    measured = measure(model, params, corpus, reading, 42)
    tokens = corpus.tokens['valid'][:42]
    nats = list(nats_of(model, params, tokens[:9]))
    while len(nats) < 41:
        at = len(nats) - 8 + 3
        nats += list(nats_of(model, params, tokens[at : at + 9])[5:])
    assert measured['nats_per_token'] == pytest.approx(np.mean(nats[:41]), rel=1e-5)
    carried = nats_of(model, params, tokens)
    assert abs(np.mean(nats[:41]) - carried.mean()) > 1e-3


@pytest.mark.parametrize(
    'changes',
    [
        pytest.param({'loss.label_smoothing': 0.3}, marks=pytest.mark.slow),
        {'loss.z_loss': 0.1},
    ],
)
def test_what_is_minimized_has_no_part_in_what_is_reported(changes, texts):
    _, model, params = with_params()
    smoothed = factory.build_model(tiny(**changes), 256)
    corpus = token_store.load(Recipe(texts, 'byte', 256))
    reading = evaluate.Reading(batch=2, length=8)
    plain = measure(model, params, corpus, reading, 41)
    assert measure(smoothed, params, corpus, reading, 41) == plain
    adaptation = dynamic_evaluation.Adaptation(tokens=21, learning_rate=0.0, decay=0.0)
    stacked = jax.tree.map(lambda a: a[None], params)
    first, second = (
        dynamic_evaluation.evaluate(m, stacked, corpus, ['valid'], adaptation)
        for m in (model, smoothed)
    )
    assert first == second


@pytest.mark.slow
def test_dynamic_evaluation_records_the_memory(texts):
    config = tiny('core=transformer', **{'model.memory': 8, 'model.layers': 1, 'eval.memory': 5})
    model = factory.configure_evaluation(factory.build_model(config, 256), config)
    params = factory.build_trainer(config, 256).init(0).params
    corpus = token_store.load(Recipe(texts, 'byte', 256))
    stacked = jax.tree.map(lambda a: a[None], params)
    adaptation = dynamic_evaluation.Adaptation(tokens=11, statistics=2)
    results = dynamic_evaluation.evaluate(model, stacked, corpus, ['valid'], adaptation)
    assert results['valid'][0]['over']['memory'] == 5
