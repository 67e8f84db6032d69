"""The precision of every product, read from programs that are lowered for TPU and NVIDIA GPUs."""

import contextlib
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import lm, rl
from experiments.composition import config as composition
from experiments.expressivity import config as expressivity
from experiments.seq2seq import config as seq2seq
from mi import cells, fusion, precision
from mi.config import UserError
from mi.estimate import memory
from mi.fit import factory as fit_setup
from mi.fit import search
from mi.fit import train as fit
from mi.layers import MultiplicativeInteraction
from mi.lm import assess, sample
from mi.lm import config as lm_config
from mi.lm import factory as lm_setup
from mi.lm import train as lm_train
from mi.lm.data.batches import Batch
from mi.lm.trainer import Trainer
from mi.rl import assess as assess_rl
from mi.rl import config as rl_setup
from mi.rl import train as rl_train
from mi.training import checkpoint, optim, run_dir
from mi.unify import as_mi, explain
from tests.motifs.checks import drawn, random

N, M, K = 5, 3, 4


def products(function, *args):
    """(dtype of the operands, precision) of each product of function(*args)."""
    traced = jax.jit(function).trace(*args)
    text = traced.lower(lowering_platforms=('tpu', 'cuda')).as_text()
    found = []
    for line in re.findall(r'stablehlo\.(?:dot_general|convolution).*', text):
        (precisions,) = {tuple(set(re.findall(r'\b(?:DEFAULT|HIGHEST|HIGH)\b', line)))}
        (dtypes,) = {tuple(re.findall(r'x(f32|bf16|f64)>', line)[:2])}
        assert len(precisions) <= 1
        found.append((dtypes, *(precisions or ('DEFAULT',))))
    assert found
    return set(found)


def edited(config, **changes):
    config = config.unlock()
    config.update_from_flattened_dict(changes)
    return config.lock()


@pytest.fixture(autouse=True)
def no_setting_of_jax():
    with jax.default_matmul_precision(None):
        yield


F32 = ('f32', 'f32')


@pytest.mark.parametrize(
    ('word', 'setting'),
    [
        ('', 'default'),
        pytest.param('', 'high', marks=pytest.mark.slow),
        ('', 'highest'),
        pytest.param('core=transformer,site=attention', 'highest', marks=pytest.mark.slow),
        pytest.param('source=state,fusion=mi_low_rank', 'highest', marks=pytest.mark.slow),
    ],
)
def test_the_config_sets_the_precision_of_a_training_step(word, setting):
    config = edited(lm.get_config(f'{word},tiny'.strip(',')), **{'train.matmul_precision': setting})
    model = lm_setup.build_model(config, 11)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    trainer = Trainer(model, optimizer, batch_size=2)
    state = jax.eval_shape(trainer.init, 0)
    batch = Batch(jax.ShapeDtypeStruct((9, 2), jnp.int32), None, seed=0, step=0)
    with precision.use_config(config):
        assert products(trainer.step, state, batch) == {(F32, setting.upper())}


@pytest.mark.parametrize('config', [composition.get_config(), seq2seq.get_config()])
def test_fit_problems_ask_for_f32(config):
    problem = fit_setup.make_problem(config)
    optimizer = optim.make_optimizer(config.optim, config.train.steps)
    state = jax.eval_shape(
        functools.partial(fit.init_train_state, problem, optimizer), jnp.int32(0)
    )
    with precision.use_config(config):
        step = functools.partial(fit.train_steps, problem, optimizer, 1)
        assert products(step, state, 0) == {(F32, 'HIGHEST')}
        errors = functools.partial(fit.evaluate, problem)
        assert products(errors, state.params, 0) == {(F32, 'HIGHEST')}


class Own(nn.Module):
    """A module that `as_mi` knows nothing about."""

    @nn.compact
    def __call__(self, x, z):
        return MultiplicativeInteraction(K)(x, z)


@pytest.mark.parametrize(
    'name', ['mi_low_rank', 'block', 'concat_mlp', 'hypernetwork', 'multi_head', 'lstm', 'own']
)
def test_as_mi_asks_for_f32(name):
    x, z = random(0, 7, N), random(1, 7, M)
    if name == 'lstm':
        module = cells.LSTM(K)
        inputs = jax.tree.map(jnp.zeros_like, module.initial(7)), random(2, 1, 7, N)
    elif name == 'own':
        module, inputs = Own(), (x, z)
    else:
        context = {'context': 'one_hot'} if name in fusion.ONE_HOT else {}
        inputs = x, jax.nn.one_hot(jnp.arange(7) % M, M) if context else z
        module = fusion.get(name, rank=2, hidden=8)(K, **context)
    variables = drawn(module, *inputs)

    def output(variables, inputs):
        return as_mi(module, variables, *inputs).output

    found = {level for _, level in products(output, variables, inputs)}
    assert found == {'HIGHEST'}


@pytest.mark.slow
def test_explain_asks_for_f32():
    traces = []

    class Watched(nn.Module):
        @nn.compact
        def __call__(self, x, z):
            traces.append(precision.get_current())
            return MultiplicativeInteraction(K)(x, z)

    x, z = random(0, 7, N), random(1, 7, M)
    variables = drawn(Watched(), x, z)
    traces.clear()
    explain(Watched(), variables, x, z)
    assert set(traces) == {'highest'}
    assert precision.get_current() is None


def test_products_of_bf16_take_no_other_dtype():
    """The precision is an attribute of them that no compiler heeds: their inputs are exact."""
    config = edited(lm.get_config('tiny'), **{'model.dtype': 'bfloat16'})
    model = lm_setup.build_model(config, 11)
    carry = model.initial_carry(2)
    tokens = jnp.zeros((3, 2), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), carry, tokens, None, None)
    found = {}
    for setting in precision.PRECISIONS:
        config = edited(config, **{'train.matmul_precision': setting})
        with precision.use_config(config):
            found[setting] = {d for d, _ in products(model.apply, params, carry, tokens, None)}
    assert found['default'] == found['high'] == found['highest']
    assert ('bf16', 'bf16') in found['default']


# The trainers: a module writes down the precision with which it is traced.
TRACES = []


class Watched(MultiplicativeInteraction):
    @nn.compact
    def __call__(self, x, z):
        TRACES.append(precision.get_current())
        return super().__call__(x, z)


@pytest.fixture
def watched(monkeypatch):
    """Name of a fusion; what is traced for shapes alone, before a run starts, is not counted."""
    monkeypatch.setitem(fusion.FUSIONS, 'watched', Watched)
    run_start, restore = run_dir.open_run, checkpoint.Checkpoints.restore_part

    @contextlib.contextmanager
    def start(*args, **kwargs):
        with run_start(*args, **kwargs) as run:
            TRACES.clear()
            yield run

    def restore_part(*args):
        TRACES.clear()
        return restore(*args)

    monkeypatch.setattr(run_dir, 'open_run', start)
    monkeypatch.setattr(checkpoint.Checkpoints, 'restore_part', restore_part)
    return 'watched'


EVERY = {f'train.{name}': 1 for name in ('steps', 'log_every', 'eval_every', 'save_every')}


def assert_traced(setting):
    assert set(TRACES) == {setting}
    assert precision.get_current() is None
    TRACES.clear()


@pytest.mark.slow
def test_a_language_model_is_trained_evaluated_and_sampled_with_it(tmp_path, texts, cache, watched):
    changes = {'data.source': texts, 'data.cache': cache, 'sample.tokens': 2, **EVERY}
    config = edited(lm.get_config('tiny'), **changes, **{'model.fusion.name': watched})
    config = edited(config, **{'train.matmul_precision': 'high'})
    lm_train.train(config, str(tmp_path))
    assert_traced('high')
    assert json.loads((tmp_path / 'config.json').read_text())['train']['matmul_precision'] == 'high'
    config = edited(config, **{'train.matmul_precision': 'default'})  # evaluated as it was trained
    assess.assess(config, str(tmp_path))
    assert_traced('high')
    sample.sample(config, str(tmp_path))
    assert_traced('high')


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_an_agent_is_trained_and_evaluated_with_it(tmp_path, watched, topology):
    config = edited(
        rl.get_config('tiny,env=catch'),
        **{'train.topology': topology, 'train.matmul_precision': 'highest', **EVERY},
        **{'model.fusion.name': watched},
    )
    rl_train.train(config, str(tmp_path))
    assert_traced('highest')
    assess_rl.assess(config, str(tmp_path))
    assert_traced('highest')


@pytest.mark.slow
def test_a_fit_and_a_search_compute_with_it(tmp_path, watched):
    small = {'seeds': (0,), 'model.fusion.name': watched, 'problem.examples': 16, **EVERY}
    fit.train(edited(expressivity.get_config('fit'), **small), str(tmp_path / 'fit'))
    assert_traced('highest')
    one = {'search.at': (1,), 'search.target': 1e9, 'search.rates': (1e-2,)}
    search.search(edited(expressivity.get_config(), **small, **one), str(tmp_path / 'search'))
    assert_traced('highest')


@pytest.mark.parametrize(
    ('get_config', 'validate'),
    [
        (lambda: lm.get_config('tiny'), lm_config.validate),
        (lambda: rl.get_config('tiny'), rl_setup.validate),
        (expressivity.get_config, fit_setup.validate),
    ],
)
def test_an_unknown_precision_is_refused(get_config, validate):
    config = edited(get_config(), **{'train.matmul_precision': 'highest'})
    validate(config)
    with pytest.raises(UserError, match=r"train\.matmul_precision = 'hihgest'.*'highest'"):
        validate(edited(config, **{'train.matmul_precision': 'hihgest'}))


def test_runs_from_before_there_was_the_key_go_on(tmp_path, capsys):
    config = expressivity.get_config('fit')
    before = config.copy_and_resolve_references().unlock()
    del before.train.matmul_precision
    with run_dir.open_run(tmp_path, before):
        assert precision.get_current() is None
    (tmp_path / 'checkpoints' / '00000040').mkdir(parents=True)
    with run_dir.open_run(tmp_path, config):
        assert precision.get_current() == 'highest'
    assert "train.matmul_precision = 'highest'" in capsys.readouterr().err


def test_a_setting_of_jax_holds_where_the_config_says_default():
    config = edited(lm.get_config('tiny'), **{'train.matmul_precision': 'default'})
    with jax.default_matmul_precision('highest'), precision.use_config(config):
        assert precision.get_current() == 'highest'
    np.testing.assert_equal(precision.get_current(), None)


def test_costs_are_those_of_programs_with_that_precision(monkeypatch):
    compiled_with = []

    def training(config, devices):
        def compile_program():
            compiled_with.append(precision.get_current())

        return memory.RunPrograms({}, None, 1, compile_program, compile_program)

    monkeypatch.setitem(memory.PROGRAMS, 'lm', training)
    config = edited(lm.get_config('tiny'), **{'train.matmul_precision': 'highest'})
    programs = memory.make_programs(config)
    programs.compile()
    programs.compile_evaluation()
    assert compiled_with == ['highest', 'highest']
    assert precision.get_current() is None
