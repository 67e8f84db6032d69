import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm as configs
from mi.config import UserError
from mi.lm import (
    assess,
    dynamic_evaluation,
    factory,
    restore,
    sample,
    train,
)
from mi.lm.data.token_store import Recipe, load
from tests import prng


def tiny(word='core=lstm', **changes):
    config = configs.get_config(f'{word},tiny').unlock()
    config.model.layers = 1 if word.startswith('core=lstm') else 2
    config.update_from_flattened_dict(changes)
    return config.lock()


@functools.partial(jax.jit, static_argnames=('model', 'num_tokens'))
def generate(model, params, prompt, seed, num_tokens, temperature=1.0, top_p=1.0):
    """Return the tokens of one text."""
    decoding = sample.Decoding(num_tokens, temperature, top_p)
    return sample.generate(model, params, prompt, prng.key(seed), decoding)[0]


@pytest.mark.parametrize('word', ['core=lstm,source=state', 'core=transformer'])
def test_the_likeliest_tokens_are_those_of_the_whole_text(word):
    """Greedy sampling from kept state is the argmax of logits computed for all tokens together."""
    config = tiny(word, **{'model.memory': 0})
    model = factory.build_model(config, 11)
    carry = model.initial_carry(1)
    params = jax.jit(model.init)(prng.key(3), carry, jnp.zeros((1, 1), int))['params']
    params = jax.tree.map(lambda a: 2 * a, params)  # far from uniform
    prompt = jnp.array([1, 4, 2])
    drawn = generate(model, params, prompt, 0, 12, 0.0, 1.0)
    text = jnp.concatenate([prompt, drawn])
    _, logits = jax.jit(model.apply)({'params': params}, carry, text[:, None])
    np.testing.assert_array_equal(drawn, logits[2:-1, 0].argmax(-1))
    again = generate(model, params, prompt, 1, 12, 1.5, 1.0)
    assert (again != drawn).any()


def uniform(config):
    """A model whose logits are all the same, whatever it reads, and its parameters."""
    model = factory.build_model(config, 11)
    carry = model.initial_carry(1)
    shapes = jax.eval_shape(model.init, jax.random.key(3), carry, jnp.zeros((1, 1), int))['params']
    return model, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def test_every_token_is_drawn_with_a_key_of_its_own():
    model, params = uniform(tiny())
    drawn = generate(model, params, jnp.array([1]), 0, 200)
    counts = np.bincount(drawn, minlength=11)  # 200 / 11 = 18 each, σ = 4
    assert counts.min() > 0 and counts.max() < 18 + 5 * 4
    pairs = {(int(a), int(b)) for a, b in itertools.pairwise(drawn)}
    assert len(pairs) > 60  # of 121 pairs, 98 are expected


@pytest.mark.slow
def test_a_transformer_writes_from_no_more_tokens_than_it_was_trained_on():
    changes = {'model.layers': 1, 'model.site': 'none', 'train.length': 6}
    config = tiny('core=transformer', **changes)
    model = factory.configure_sampling(factory.build_model(config, 11), config)
    carry = model.initial_carry(1)
    params = jax.jit(model.init)(prng.key(3), carry, jnp.zeros((1, 1), int))['params']
    params = jax.tree.map(lambda a: 3 * a, params)  # far from uniform

    def draw(prompt):
        tokens = jnp.asarray(prompt, jnp.int32)
        return generate(model, params, tokens, 0, 12, 0.0).tolist()

    drawn = draw([1, 2, 3, 4, 5, 6])
    assert draw([9, 8, 7, 1, 2, 3, 4, 5, 6]) == drawn  # what is further back has no part
    # Each token is the most likely one after the 6 before it alone.
    text = [*range(1, 7), *drawn]
    plain = factory.build_model(config, 11)
    prompt = jnp.arange(1, 7, dtype=jnp.int32)
    farther = generate(plain, params, prompt, 0, 12, 0.0).tolist()
    assert farther != drawn  # it would have a part
    carry, apply = plain.initial_carry(1), jax.jit(plain.apply)
    for i in range(6, len(text)):
        _, logits = apply({'params': params}, carry, jnp.asarray(text[i - 6 : i])[:, None])
        assert text[i] == logits[-1, 0].argmax()


def test_nucleus_and_temperature_draw_from_the_distribution_they_say():
    p = jnp.array([0.05, 0.5, 0.15, 0.3])
    draw = jax.vmap(sample.draw, (None, 0, None, None))
    keys = jax.random.split(prng.key(0), 20_000)

    def shares(temperature, top_p):
        return np.bincount(draw(jnp.log(p), keys, temperature, top_p), minlength=4) / len(keys)

    np.testing.assert_allclose(shares(1.0, 1.0), p, atol=0.02)
    np.testing.assert_allclose(shares(1.0, 0.75), [0, 0.5 / 0.8, 0, 0.3 / 0.8], atol=0.02)
    np.testing.assert_allclose(shares(1.0, 0.01), [0, 1, 0, 0])
    np.testing.assert_allclose(shares(0.5, 1.0), p**2 / (p**2).sum(), atol=0.02)
    np.testing.assert_allclose(shares(0.0, 1.0), [0, 1, 0, 0])


def test_dynamic_evaluation_is_the_update_written_out(texts):
    """Against a loop over segments in NumPy, with gradients of a model that is linear in words."""
    config = tiny('core=lstm', **{'model.site': 'none', 'data.source': texts})
    corpus = load(Recipe(texts, 'byte', 256))
    model = factory.build_model(config, 256)
    carry = model.initial_carry(1)
    params = jax.jit(model.init)(prng.key(0), carry, jnp.zeros((1, 1), int))['params']
    adaptation = dynamic_evaluation.Adaptation(
        tokens=25, length=6, learning_rate=1e-2, decay=0.5, epsilon=1e-8, statistics=4
    )
    stacked = jax.tree.map(lambda a: a[None], params)
    results = dynamic_evaluation.evaluate(model, stacked, corpus, ['test', 'valid'], adaptation)
    (measured,) = results['valid']

    def loss(params, carry, tokens):
        after, losses = model.apply({'params': params}, carry, tokens[:-1, None], tokens[1:, None])
        return losses.nats.mean(), after

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    leaves, tree = jax.tree.flatten(params)
    squares = [np.zeros(a.shape) for a in leaves]
    text, state = jnp.asarray(corpus.tokens['train'][:25], jnp.int32), carry
    for i in range(4):
        (_, state), g = gradient(params, state, text[6 * i : 6 * i + 7])
        squares = [
            s + np.asarray(a, np.float64) ** 2
            for s, a in zip(squares, jax.tree.leaves(g), strict=True)
        ]
    roots = [np.sqrt(s / 4) for s in squares]
    mean = sum(r.sum() for r in roots) / sum(r.size for r in roots)
    text, state, total = jnp.asarray(corpus.tokens['valid'][:25], jnp.int32), carry, 0.0
    now = [np.asarray(a, np.float64) for a in leaves]
    for i in range(4):
        current = jax.tree.unflatten(tree, [jnp.asarray(a, jnp.float32) for a in now])
        (nats, state), g = gradient(current, state, text[6 * i : 6 * i + 7])
        total += 6 * float(nats)
        now = [
            a - 1e-2 * np.asarray(b) / (r + 1e-8) + np.minimum(1, 0.5 * r / mean) * (start - a)
            for a, b, r, start in zip(now, jax.tree.leaves(g), roots, leaves, strict=True)
        ]
    assert measured['nats_per_token'] == pytest.approx(total / 24, rel=1e-3)
    assert measured['over']['predictions'] == 24 and measured['over']['batch'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('word', ['core=lstm', 'core=transformer'])
def test_a_run_is_evaluated_in_other_ways_and_sampled(word, tmp_path, texts, capsys):
    source = {'data.source': texts, 'seeds': (0, 1), 'model.memory': 8 if 'trans' in word else 0}
    with pytest.raises(UserError, match=r'expected a run directory, but found no config\.json'):
        assess.assess(tiny(word, **source), str(tmp_path / 'nothing'))
    train.train(tiny(word, **source), str(tmp_path))
    with pytest.raises(UserError, match=r'config\.model\.hidden = 64: expected 32, as in'):
        assess.assess(tiny(word, **source, **{'model.hidden': 64}), str(tmp_path))
    with pytest.raises(UserError, match=r'config\.seeds = \(7, 8\): expected \(0, 1\), as in'):
        assess.assess(tiny(word, **{**source, 'seeds': (7, 8)}), str(tmp_path))
    written = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    test = [row for row in written if row['split'] == 'test']
    assess.assess(tiny(word, **source, **{'dynamic.tokens': 500}), str(tmp_path))
    scores = json.loads((tmp_path / 'evaluation.json').read_text())
    assert set(scores) == {'step', 'valid', 'test', 'valid_dynamic', 'test_dynamic'}
    for row in test:  # the same checkpoint, evaluated in the same way
        again = scores['test'][str(row['seed'])]
        assert again['nats_per_token'] == pytest.approx(row['nats_per_token'], rel=1e-6)
    assess.assess(tiny(word, **source, **{'eval.stride': 4, 'eval.length': 16}), str(tmp_path))
    sliding = json.loads((tmp_path / 'evaluation.json').read_text())['test']['0']
    assert sliding['over']['stride'] == 4
    assert sliding['nats_per_token'] == pytest.approx(test[0]['nats_per_token'], rel=0.2)
    assert 'nats/token' in capsys.readouterr().out

    # The same text at another path and with another cache; what evaluation does not read.
    moved = shutil.copytree(texts, tmp_path / 'moved')
    elsewhere = {'data.source': str(moved), 'data.cache': str(tmp_path / 'cache')}
    unread = {'train.batch': 8, 'optim.warmup_steps': 7, 'optim.name': 'sgd', 'loss.z_loss': 0.1}
    assess.assess(tiny(word, **{**source, **elsewhere, **unread}), str(tmp_path))
    again = json.loads((tmp_path / 'evaluation.json').read_text())['test']
    assert again['0']['nats_per_token'] == pytest.approx(test[0]['nats_per_token'], rel=1e-6)
    (moved / 'valid.txt').write_text('another text. ' * 100)
    with pytest.raises(UserError, match=r'expected the tokens .* was trained on.*data\.source was'):
        sample.sample(tiny(word, **{**source, **elsewhere}), str(tmp_path))
    sample.sample(tiny(word, **source, **{'sample.tokens': 5}), str(tmp_path))
    texts_drawn = json.loads((tmp_path / 'samples.json').read_text())['texts']
    assert len(texts_drawn) == 2 and texts_drawn[0][0] in capsys.readouterr().out


@pytest.mark.slow
def test_dynamic_evaluation_as_it_is_set_helps_a_trained_model_or_says_that_it_diverged(tmp_path):
    changes = {'train.steps': 200, 'optim.learning_rate': 1e-2, 'eval.final_tokens': 2_000}
    config = tiny('core=lstm', **changes)
    train.train(config, str(tmp_path))
    corpus = factory.load_corpus(config)
    params = restore.restore(config, str(tmp_path)).params
    model = factory.configure_evaluation(factory.build_model(config, *corpus.sizes), config)

    def nats(**changes):
        adaptation = dynamic_evaluation.Adaptation(tokens=3_000)._replace(**changes)
        metrics, *_ = dynamic_evaluation.evaluate(model, params, corpus, ['test'], adaptation)[
            'test'
        ]
        return metrics['nats_per_token']

    assert nats() < nats(learning_rate=0.0) - 0.01
    config.dynamic.tokens, config.dynamic.learning_rate = 3_000, 1e30
    with pytest.raises(UserError, match=r'not finite\. Try a config\.dynamic\.learning'):
        assess.assess(config, str(tmp_path))
