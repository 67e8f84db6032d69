import json
import math
import os
import shutil
import signal
import time
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lm as configs
from configs import lm_enwik8, lm_ptb, lm_wikitext103
from mi.config import UserError
from mi.lm import (
    assess,
    factory,
    sample,
    train,
)
from mi.lm import (
    config as lm_config,
)
from mi.lm.data import sources
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.training import optim, progress, run_dir, utilization


def tiny(**changes):
    config = configs.get_config('tiny').unlock()
    config.update_from_flattened_dict(changes)
    return config.lock()


def records(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize(
    'key, value, expected',
    [
        ('model.fusion.name', 'filmm', "did you mean 'film'"),
        ('model.site', 'encodr', "did you mean 'encoder'"),
        ('model.hidden', 0, 'an integer of at least 1'),
        ('model.hidden', -3, 'an integer of at least 1'),
        ('model.hidden', 2.5, 'an integer of at least 1'),
        ('model.hidden', True, 'an integer of at least 1'),
        ('dropout.input', 1.0, 'at most 0.99'),
        ('eval.final_tokens', 1, 'at least 2'),
        ('dynamic.tokens', 1, 'at least 2'),
        ('optim.learning_rate', math.nan, 'a finite number above 0'),
        ('optim.learning_rate', 0.0, 'a finite number above 0'),
        ('optim.learning_rate', -1e-3, 'a finite number above 0'),
        ('optim.learning_rate', '1e-3', 'a finite number above 0'),
        ('seeds', (), 'a non-empty tuple of distinct'),
        ('seeds', (1, 1), 'a non-empty tuple of distinct'),
        ('data.level', 'words', "did you mean 'word'"),
    ],
)
def test_a_bad_value_is_refused_by_name(key, value, expected):
    config = configs.get_config('tiny').unlock()
    *parents, last = key.split('.')
    section = config
    for parent in parents:
        section = section[parent]
    with section.ignore_type():
        section[last] = value
    with pytest.raises(UserError) as error:
        lm_config.validate(config)
    assert str(error.value).startswith(f'config.{key} = {value!r}: expected')
    assert expected in str(error.value)


def test_unknown_and_missing_keys():
    config = configs.get_config('tiny').unlock()
    config.model.hiden = 3
    with pytest.raises(
        UserError, match=r'config\.model\.hiden is unknown; did you mean config\.model\.hidden'
    ):
        lm_config.validate(config)
    del config.model.hiden, config.model.hidden
    with pytest.raises(UserError, match=r'config\.model\.hidden is missing'):
        lm_config.validate(config)


@pytest.mark.parametrize(
    'fuse, quantity',
    [  # every arm by one quantity in make test, by the other one in make test_slow
        pytest.param(fuse, quantity, marks=() if quantity == quick else pytest.mark.slow)
        for quantity in ('parameters', 'flops')
        for fuse, quick in [
            *[('none', 'flops'), ('film', 'parameters')],
            *[('mi', 'parameters'), ('mi_low_rank', 'flops')],
        ]
    ],
)
def test_matched_arms_cost_what_concat_costs(fuse, quantity):
    kind = 'flops_per_token' if quantity == 'flops' else quantity
    base = {'model.hidden': 96, 'model.context': 16}
    target = factory.compute_costs(tiny(**base, **{'model.fusion.name': 'concat'}), 256)[kind][
        'model'
    ]
    config = factory.match_size(
        tiny(**base, **{'model.fusion.name': fuse, 'match.by': quantity}), 256
    )
    costs = factory.compute_costs(config, 256)
    assert abs(costs[kind]['model'] / target - 1) < 0.01
    for offset in (-1, 1):  # no neighbour is nearer
        near = tiny(**base, **{'model.fusion.name': fuse}).unlock()
        near.model.hidden = config.model.hidden + offset
        miss = abs(factory.compute_costs(near, 256)[kind]['model'] - target)
        assert miss >= abs(costs[kind]['model'] - target)


@pytest.mark.parametrize('site', ['none', 'encoder', 'decoder', 'both'])
def test_a_plain_baseline_is_the_same_for_every_site(site):
    """Its parameters are counted here by hand: embedding, LSTM and the map before the softmax."""
    (V, E, H), changes = (50, 16, 64), {'model.hidden': 64, 'model.context': 4}
    target = V * E + V + (E + H + 1) * 4 * H + (H + 1) * E
    changes |= {'match.by': 'parameters', 'match.baseline': 'plain', 'model.fusion.name': 'mi'}
    matched = factory.match_size(tiny(**changes, **{'model.site': site}), V)
    costs = factory.compute_costs(matched, V)['parameters']
    assert costs['model'] == pytest.approx(target, rel=0.03)
    for offset in (-1, 1):  # no neighbor is nearer
        near = factory.compute_costs(
            tiny(**changes | {'model.site': site, 'model.hidden': matched.model.hidden + offset}), V
        )
        assert abs(near['parameters']['model'] - target) >= abs(costs['model'] - target)
    assert (matched.model.hidden == H) == (site == 'none') and matched.model.hidden <= H
    assert (costs['fusion'] > 0) == (site != 'none')


def test_matching_by_rank_and_what_cannot_match():
    changes = {'model.fusion.name': 'mi_low_rank', 'match.by': 'parameters', 'match.knob': 'rank'}
    base = tiny(**changes)
    target = factory.compute_costs(base, 256)['parameters']['model'] + 1000
    matched = factory.match_size(tiny(**changes, **{'match.target': target}), 256)
    E, m = base.model.embed, base.model.context
    assert matched.model.fusion.rank == base.model.fusion.rank + round(1000 / (2 * E + m))
    with pytest.raises(UserError, match=r"fusion\.name = 'mi' has none"):
        factory.match_size(tiny(**{'match.by': 'parameters', 'match.knob': 'rank'}), 256)
    with pytest.raises(UserError, match='the smallest size, 1, costs'):
        factory.match_size(tiny(**{'match.by': 'parameters', 'match.target': 10}), 256)


def test_the_baseline_does_not_have_the_options_of_the_fusion():
    match = {'model.hidden': 96, 'match.by': 'parameters'}
    target = factory.compute_costs(tiny(**match, **{'model.fusion.name': 'concat'}), 256)
    changes = {'model.fusion.name': 'mfb', 'model.fusion.options': {'factors': 4}}
    matched = factory.match_size(tiny(**match, **changes), 256)
    assert matched.model.fusion.options.to_dict() == {'factors': 4}
    cost = factory.compute_costs(matched, 256)['parameters']['model']
    assert cost == pytest.approx(target['parameters']['model'], rel=0.02)


def test_rows_by_id_are_matched_by_all_of_their_flops():
    """Domains are ids: each token is multiplied by one matrix, as by that of no context."""
    changes = {'model.source': 'domain', 'model.site': 'decoder', 'train.batch': 16}
    costs = factory.compute_costs(tiny(**changes, **{'model.fusion.name': 'multi_head'}), 256, 6)
    plain = factory.compute_costs(tiny(**changes, **{'model.fusion.name': 'none'}), 256, 6)
    assert costs['flops_per_token'] == plain['flops_per_token']


def test_a_matched_transformer_has_a_feed_forward_layer():
    changes = {'model.ffn': 1, 'model.heads': 2, 'match.by': 'parameters', 'match.target': 8000}
    config = factory.match_size(tiny(**{'model.core': 'transformer'}, **changes), 256)
    assert config.model.ffn == 1 and config.model.hidden < 32
    assert factory.compute_costs(config, 256)['parameters']['model'] > 0


def test_costs_of_the_fusion_alone():
    costs = factory.compute_costs(tiny(**{'model.fusion.name': 'mi'}), 256)
    E, m = 16, 8
    assert costs['parameters']['fusion'] == m * E * E + m * E + E * E + E
    both = factory.compute_costs(tiny(**{'model.fusion.name': 'mi', 'model.site': 'both'}), 256)
    H = 32
    assert (
        both['parameters']['fusion']
        == costs['parameters']['fusion'] + m * H * E + m * E + H * E + E
    )
    assert factory.compute_costs(tiny(**{'model.site': 'none'}), 256)['parameters']['fusion'] == 0


def golden_step():
    config = tiny()
    model = factory.build_model(config, 11)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    trainer, seed = Trainer(model, optimizer, batch_size=2), jnp.asarray(3)
    state = jax.jit(trainer.init)(seed)
    tokens = jnp.arange(2 * 9).reshape(9, 2) * 7 % 11
    train_step = jax.jit(trainer.step)
    curve = []
    for step in range(3):
        state, metrics = train_step(state, Batch(tokens, None, seed, jnp.asarray(step)))
        curve.append([float(metrics['nats_per_token']), float(metrics['gradient_norm'])])
    return curve


def test_golden_step():
    """Changes only with the model, its initialization, the optimizer or jax's random numbers.

    If you changed one of these on purpose, say so in the commit and put the new numbers here.
    """
    expected = [[2.387505, 0.551476], [2.343289, 0.555351], [2.361697, 0.609907]]
    np.testing.assert_allclose(golden_step(), expected, rtol=2e-4)


@pytest.mark.slow
def test_a_seed_among_others_is_the_seed_alone(tmp_path, texts):
    small = {'data.source': texts}
    train.train(tiny(seeds=(0, 1, 2), **small), str(tmp_path / 'together'))
    train.train(tiny(seeds=(1,), **small), str(tmp_path / 'alone'))
    together = [r for r in records(tmp_path / 'together') if r['seed'] == 1]
    alone = records(tmp_path / 'alone')
    assert len(alone) == len(together) == 4 + 2 + 2
    for a, b in zip(together, alone, strict=True):
        assert (a['step'], a['split']) == (b['step'], b['split'])
        assert a['nats_per_token'] == pytest.approx(b['nats_per_token'], rel=1e-4)
    others = {
        r['seed']: r['nats_per_token'] for r in records(tmp_path / 'together') if r['step'] == 5
    }
    assert len(set(others.values())) == 3


def test_it_learns_and_leaves_a_run_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, 'INTERVAL', 0.02)  # of reports
    lengths = {'train': 300_000, 'valid': 5_000, 'test': 7_000}
    for split, [(_, text)] in sources.load_austen().items():
        (tmp_path / f'{split}.txt').write_bytes(text[: lengths[split]])
    changes = {'data.source': str(tmp_path), 'eval.valid_tokens': 0}
    train.train(tiny(**changes, **{'train.steps': 60, 'train.log_every': 30}), str(tmp_path))
    first, last = (r['nats_per_token'] for r in records(tmp_path) if r['split'] == 'train')
    assert last < first < math.log(256) + 0.1
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'done'
    test = records(tmp_path)[-1]
    assert test['split'] == 'test' and test['over']['predictions'] == 7_000 - 1
    assert test['bits_per_byte'] == pytest.approx(test['nats_per_token'] / math.log(2), rel=1e-6)
    assert test['perplexity'] == pytest.approx(math.exp(test['nats_per_token']))
    read = {r['split']: r['over']['predictions'] for r in records(tmp_path) if 'over' in r}
    assert read == {'valid': 5_000 - 1, 'valid_whole': 5_000 - 1, 'test': 7_000 - 1}
    stderr = capsys.readouterr().err
    for work in ('compiling the training step', 'evaluating valid', 'evaluating test'):
        assert f'{work} … ' in stderr


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, texts):
    config = tiny(**{
        'optim.learning_rate': 1e30, 'optim.clip_norm': 0.0, 'train.save_every': 1,
        'model.site': 'none', 'optim.schedule': 'constant', 'optim.warmup_steps': 0,
        'data.source': texts,
    })  # fmt: skip
    with pytest.raises(
        UserError, match=r'of seed 0 is not finite at step \d+, so this state is not saved'
    ):
        train.train(config, str(tmp_path))
    status = json.loads((tmp_path / 'status.json').read_text())
    assert status['state'] == 'failed' and 'not finite' in status['reason']
    for record in records(tmp_path):
        assert np.isfinite(record['nats_per_token'])


@pytest.mark.parametrize(
    'optimizer, rate, save_every',
    [('adam', 1e38, 20), pytest.param('sgd', 1e30, 1, marks=pytest.mark.slow)],
)
def test_a_run_whose_last_update_breaks_the_parameters_has_not_succeeded(
    tmp_path, texts, optimizer, rate, save_every
):
    """No loss shows it: that of the step was computed with the parameters before."""
    config = tiny(
        **{
            'data.source': texts,
            'train.steps': 1,
            'train.save_every': save_every,
            'optim.name': optimizer,
            'optim.warmup_steps': 0,
            'optim.learning_rate': rate,
        }
    )
    reason = r'(valid|parameters).* of seed 0 is not finite at step 1, so this state is not saved'
    with pytest.raises(UserError, match=reason):
        train.train(config, str(tmp_path))
    assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'failed'
    assert not list(tmp_path.glob('checkpoints/0*'))
    assert [row['split'] for row in records(tmp_path)] == ['train']  # made before the update


def test_broken_parameters_are_not_saved_where_nothing_is_evaluated(tmp_path, texts):
    changes = {'train.steps': 3, 'train.save_every': 1, 'train.eval_every': 10}
    changes |= {'optim.warmup_steps': 0, 'optim.learning_rate': 1e38}
    reason = r'parameters.* of seed 0 is not finite at step 1, so this state is not saved'
    with pytest.raises(UserError, match=reason):
        train.train(tiny(**{'data.source': texts, **changes}), str(tmp_path))
    assert not list(tmp_path.glob('checkpoints/0*'))


def test_a_continued_run_keeps_the_time_since_the_last_record(tmp_path):
    """Two steps, with a checkpoint and the end of a process between them, and then the record."""
    config = tiny()
    meta = {'metrics': 0, 'unlogged': []}
    for step in (1, 2):
        with (
            run_dir.open_run(tmp_path, config) as run,
            run.open_logger(config.train.steps, meta['metrics']) as run_log,
        ):
            meter = utilization.Meter(1.0, jax.devices())
            log = train._TrainingLog(config, run_log, meta, meter)
            log.add_step(step, {'nats_per_token': jnp.ones(len(config.seeds))})
            time.sleep(0.2)
            if step == 2:
                log.write_training(step)
            meta = json.loads(json.dumps(log.get_position()))
    (record,) = map(json.loads, (tmp_path / 'timing.jsonl').read_text().splitlines())
    assert record['seconds'] >= 0.4
    tokens = 2 * config.train.batch * config.train.length * len(config.seeds)
    assert record['tokens_per_second'] == tokens / record['seconds']
    assert meta['unlogged'] == [] and meta['untimed'][0] == 0


@pytest.mark.slow
def test_tokens_that_changed_since_are_noticed(tmp_path, texts):
    shutil.copytree(texts, tmp_path / 'texts')
    config = tiny(**{'data.source': str(tmp_path / 'texts'), 'train.steps': 5})
    train.train(config, str(tmp_path / 'run'))
    (tmp_path / 'texts' / 'test.txt').write_text('that is the question\n' * 50)
    with pytest.raises(UserError, match=r'expected the tokens that .* was trained on'):
        train.train(config, str(tmp_path / 'run'))
    with pytest.raises(UserError, match=r'expected the tokens that .* was trained on'):
        assess.assess(config, str(tmp_path / 'run'))

    # The same tokens in all, but some have moved from train to valid.
    shutil.copytree(texts, tmp_path / 'texts', dirs_exist_ok=True)
    train_file, valid_file = (tmp_path / 'texts' / f'{split}.txt' for split in ('train', 'valid'))
    text = train_file.read_bytes()
    train_file.write_bytes(text[:-100])
    valid_file.write_bytes(text[-100:] + valid_file.read_bytes())
    for call in (train.train, assess.assess):
        with pytest.raises(UserError, match=r'expected the tokens that .* was trained on'):
            call(config, str(tmp_path / 'run'))


def test_a_resumed_run_draws_no_parameters_and_no_text_is_evaluated_twice(
    tmp_path, texts, monkeypatch
):
    evaluated = []

    def evaluate(model, params, excerpt, *args):
        evaluated.append((excerpt.split, excerpt.num_tokens))
        return evaluate_text(model, params, excerpt, *args)

    evaluate_text = train.evaluate
    monkeypatch.setattr(train, 'evaluate', evaluate)
    config = tiny(**{'data.source': texts, 'train.steps': 5, 'eval.valid_tokens': 0})
    train.train(config, str(tmp_path))
    assert evaluated == [('valid', 0), ('test', 0)]
    first, *_, valid, test = records(tmp_path)
    assert valid['split'] == 'valid_whole' and test['split'] == 'test'

    # A run from before core_options continues; here only its last evaluations are repeated.
    file = tmp_path / 'config.json'
    recorded = json.loads(file.read_text())
    assert recorded['model'].pop('core_options') == {}
    file.write_text(json.dumps(recorded))
    monkeypatch.setattr(Trainer, 'init_seeds', None)
    train.train(config, str(tmp_path))
    assert evaluated[2:] == [('valid', 0), ('test', 0)]
    assert records(tmp_path)[0] == first and records(tmp_path)[-2:] == [valid, test]


def test_core_options_are_the_fields_of_a_core_without_a_key():
    options = {'hyper_features': 6, 'embedding': 3, 'layer_norm': True}
    config = tiny(**{'model.core': 'hyper_lstm', 'model.core_options': options})
    lm_config.validate(config)
    model = factory.build_model(config, 256)
    *_, hyper_h = model.initial_carry(2)['core'][0]
    assert hyper_h.shape == (2, 6)
    for core, options, message in (
        ('hyper_lstm', {'hyper_feature': 6}, "did you mean 'hyper_features'"),
        ('hyper_lstm', {'embedding': 'three'}, 'expected int'),
        ('mogrifier', {'rounds': 3}, r'Try config\.model\.rounds = 3'),
        ('transformer', {'hidden': 64}, r'Try config\.model\.ffn = 64'),
        ('transformer', {'site': 'none'}, r'core_options\.site is unknown'),
    ):
        with pytest.raises(UserError, match=message):
            factory.build_model(tiny(**{'model.core': core, 'model.core_options': options}), 256)


@pytest.mark.slow
def test_the_context_may_be_the_domain(tmp_path):
    config = configs.get_config('source=domain,tiny').unlock()
    config.data.source, config.train.steps = 'austen-domains', 10
    config.eval.final_tokens, config.dynamic.tokens = 2_000, 50
    train.train(config, str(tmp_path))
    assert {r['split'] for r in records(tmp_path)} == {'train', 'valid', 'valid_whole', 'test'}
    assess.assess(config, str(tmp_path))
    assert np.isfinite(json.loads((tmp_path / 'cost.json').read_text())['parameters']['fusion'])
    with pytest.raises(UserError, match='a sampled text has no domain'):
        sample.sample(config, str(tmp_path))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'source': 'ptb'}, "config.data.path = '': expected the path of 'ptb'. Try setting "),
        (
            {'source': 'austen', 'path': 'x'},
            "config.data.path = 'x': expected '', because config.data.source = 'austen' already "
            "says where the text is. Try config.data.path = ''",
        ),
        (
            {'source': 'austen', 'train_tokens': 10**9},
            'config.data.train_tokens = 1000000000: expected 0 for all, or at most 3,124,769, ',
        ),
    ],
)
def test_an_error_of_the_data_names_the_keys_of_the_config(changes, message, monkeypatch):
    monkeypatch.delenv('MI_DATA', raising=False)
    with pytest.raises(UserError) as error:
        factory.load_corpus(tiny(**{f'data.{key}': value for key, value in changes.items()}))
    assert str(error.value).startswith(message)


def test_a_batch_larger_than_the_text_names_the_key_of_the_config(tmp_path, texts):
    config = tiny(**{'data.source': texts, 'train.batch': 10**6})
    with pytest.raises(UserError, match=r'^config\.train\.batch = 1000000: expected less than '):
        train.train(config, str(tmp_path))


def test_cutoffs_and_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(UserError, match='expected integers below 300, the vocabulary'):
        factory.build_model(tiny(**{'model.cutoffs': (100, 300)}), 300)
    with pytest.raises(UserError, match='expected at least 256'):
        lm_config.validate(tiny(**{'data.level': 'bpe', 'data.vocabulary': 100}))


CONFIGS = {'lm': configs, 'enwik8': lm_enwik8, 'ptb': lm_ptb, 'wikitext103': lm_wikitext103}


@pytest.mark.parametrize(
    'file, words, changes',
    [
        ('lm', 'core=transformer', {}),
        ('lm', 'core=transformer,tiny', {}),
        ('lm', 'default', {'model.core': 'transformer'}),
        ('lm', 'tiny', {'model.core': 'transformer', 'train.length': 24}),
        ('lm', 'quickstart,core=transformer', {'train.length': 48}),
        ('enwik8', 'core=transformer,smoke', {}),
        ('enwik8', 'core=transformer', {}),
        ('ptb', 'core=transformer,smoke', {}),
        ('wikitext103', 'smoke,core=transformer', {}),
    ],
)
def test_a_transformer_without_memory_is_evaluated_on_positions_that_it_has_seen(
    file, words, changes
):
    config = CONFIGS[file].get_config(words).unlock()
    config.update_from_flattened_dict(changes)
    lm_config.validate(config)
    assert config.model.core == 'transformer' and config.model.memory == 0
    assert lm_config.get_reading(config).length == config.train.length


@pytest.mark.parametrize(
    'changes, key, most',
    [
        ({'eval.length': 17}, 'eval.length', 16),
        ({'train.length': 8, 'eval.length': 16}, 'eval.length', 8),
        ({'eval.memory': 16}, 'eval.memory', 15),
        ({'dynamic.tokens': 99, 'dynamic.length': 17}, 'dynamic.length', 16),
        ({'model.memory': 8, 'eval.memory': 0, 'eval.length': 10}, 'eval.length', 9),
    ],
)
def test_positions_that_a_transformer_has_not_seen_are_refused(changes, key, most):
    config = configs.get_config('tiny,core=transformer').unlock()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=rf'^config\.{key} = \d+: expected at most {most}, '):
        lm_config.validate(config)
    config.update_from_flattened_dict({key: most})
    lm_config.validate(config)
    config.model.core = 'lstm'  # carries its state without a limit
    config.update_from_flattened_dict({'eval.memory': -1, 'model.memory': 0, 'eval.length': 999})
    lm_config.validate(config)


@pytest.mark.parametrize('file', CONFIGS)
def test_the_order_of_the_words_of_a_config_makes_no_difference(file):
    words = ['core=transformer', 'site=attention', 'tiny' if file == 'lm' else 'smoke']
    first, *others = (
        CONFIGS[file].get_config(','.join(order)).to_dict() for order in permutations(words)
    )
    assert all(other == first for other in others)
    assert first['model']['hidden'] < 70  # that of the small preset


@pytest.mark.slow
def test_bf16_trains(tmp_path, texts):
    config = tiny(**{'model.dtype': 'bfloat16', 'data.source': texts})
    train.train(config, str(tmp_path))
    assert np.isfinite([r['nats_per_token'] for r in records(tmp_path)]).all()


def test_the_step_lowers_for_accelerators():
    config = tiny()
    trainer = factory.build_trainer(config, 256)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(trainer.init, number)
    tokens = jax.ShapeDtypeStruct((17, config.train.batch), jnp.int32)
    batch = Batch(tokens, None, seed=number, step=number)
    exported = jax.export.export(jax.jit(trainer.step), platforms=['cuda', 'tpu'])(state, batch)
    assert exported.platforms == ('cuda', 'tpu')


@pytest.mark.slow
def test_a_run_stopped_in_its_evaluations_continues_to_the_same_bits(tmp_path, monkeypatch):
    """SIGTERM ends the evaluation; the checkpoint of its step is there already."""
    changes = {'train.steps': 4, 'train.log_every': 2, 'train.eval_every': 2}
    config = tiny(**changes, **{'train.save_every': 100, 'eval.final_tokens': 500})
    train.train(config, str(tmp_path / 'whole'))
    original = train.evaluate
    for split, step in (('valid', 2), ('test', 4)):

        def evaluate_and_stop(model, params, excerpt, *rest, split=split):
            if excerpt.split == split:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(model, params, excerpt, *rest)

        with monkeypatch.context() as patched, pytest.raises(SystemExit) as raised:
            patched.setattr(train, 'evaluate', evaluate_and_stop)
            train.train(config, str(tmp_path / 'cut'))
        assert raised.value.code == 143
        status = json.loads((tmp_path / 'cut' / 'status.json').read_text())
        assert (status['state'], status['step']) == ('preempted', step)
        assert (tmp_path / 'cut' / 'checkpoints' / f'{step:08d}').exists()
    train.train(config, str(tmp_path / 'cut'))
    assert records(tmp_path / 'cut') == records(tmp_path / 'whole')
