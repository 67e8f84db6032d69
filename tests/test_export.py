"""Exported runs: parameters and programs give the bits of the model, and need nothing of ours."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from configs import lm as lm_configs
from configs import rl as rl_configs
from mi.config import UserError
from mi.export import __main__ as cli
from mi.export import program
from mi.export.parameters import save_params
from mi.lm import factory as lm
from mi.lm import train as train_lm
from mi.lm.restore import restore
from mi.rl import envs
from mi.rl import factory as rl
from mi.rl import train as train_rl
from mi.rl.agent import Inputs, forward
from mi.rl.restore import restore_params
from tests import prng
from tests.conftest import ROOT


def make_lm(**changes):
    config = lm_configs.get_config('tiny').unlock()
    config.update_from_flattened_dict(changes)
    return config


def call_loaded(exported, args):
    """The results of a program that went through bytes."""
    pytest.importorskip('flatbuffers')
    return export.deserialize(program.serialize(exported)).call(*args)


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    'changes',
    [
        {},
        pytest.param({'model.source': 'summary'}, marks=pytest.mark.slow),
        pytest.param({'model.core': 'transformer', 'model.layers': 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_step_of_a_language_model_has_its_bits_for_any_batch(changes):
    """And a sequence of steps has the logits of the model on the whole sequence."""
    config = make_lm(**changes)
    model = lm.configure_sampling(lm.build_model(config, 256), config)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 3)).astype(np.int32)
    params = model.init(prng.key(0), model.initial_carry(3), tokens)['params']
    step, make_args = program.make_lm_step(model, params, len(tokens))
    exported = program.export_step(step, make_args, ('cpu', 'cuda', 'tpu'))
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    assert {str(a.shape[0]) for a in exported.in_avals if a.shape} == {'b'}  # but `filled`, []

    _, whole = model.apply({'params': params}, model.initial_carry(3), tokens)
    state = loaded_state = make_args(3)[0]
    for t, row in enumerate(tokens):
        expected = jax.jit(step)(state, row)
        found = call_loaded(exported, (loaded_state, row))
        assert_same_bits(found, expected)
        (state, logits), (loaded_state, _) = expected, found
        np.testing.assert_allclose(logits, whole[t], rtol=1e-4, atol=1e-5)
    assert_same_bits(call_loaded(exported, make_args(5)), jax.jit(step)(*make_args(5)))


@pytest.mark.parametrize('name', ['catch', pytest.param('xland', marks=pytest.mark.slow)])
def test_the_step_of_a_policy_has_its_bits(name):
    config = rl_configs.get_config(f'tiny,env={name}')
    agent = rl.build_agent(config, envs.make(config.env.name).spec)
    params = rl.init_params(agent, prng.key(0))
    step, make_args = program.make_policy_step(agent, params)
    exported = program.export_step(step, make_args, ('cpu', 'tpu'))
    for batch_size in (1, 3):
        carry, observation, action, reward, is_first = make_args(batch_size)
        observation = jax.tree.map(jnp.ones_like, observation)
        observation['task'] = jnp.zeros_like(observation['task'])
        args = carry, observation, action, reward + 0.5, is_first & False
        found = call_loaded(exported, args)
        assert_same_bits(found, jax.jit(step)(*args))
        inputs = jax.tree.map(lambda a: a[None], Inputs(*args[1:]))
        _, outputs = forward(agent, params, carry, inputs)
        np.testing.assert_allclose(found[1], outputs.logits[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[2], outputs.value[0], rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_is_in_the_program():
    config = rl_configs.get_config('tiny,env=catch')
    agent = rl.build_agent(config, envs.make('catch').spec)
    params = rl.init_params(agent, prng.key(0))
    exported = program.export_step(*program.make_policy_step(agent, params), ('cpu',), 4)
    assert {a.shape[0] for a in exported.in_avals} == {4}


def test_a_step_without_a_symbolic_batch_is_refused():
    def step(x):
        return x * int(x.shape[0])

    with pytest.raises(UserError, match=r'^--batch=0: expected a model .* Try --batch=1'):
        program.export_step(step, lambda batch_size: (jnp.zeros(batch_size),), ('cpu',))


LOAD = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/export.md').read_text(), flags=re.S)


def run_alone(code, directory):
    """Run code in a directory without this package; return what it prints."""
    paths = os.environ.get('PYTHONPATH', '').split(os.pathsep)
    others = os.pathsep.join(path for path in paths if path and pathlib.Path(path) != ROOT)
    environment = {**os.environ, 'PYTHONPATH': others, 'XLA_FLAGS': ''}
    code += "\nimport sys\nassert 'mi' not in sys.modules and 'flax' not in sys.modules"
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=directory, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_trained_agent_is_loaded_without_this_package(tmp_path, monkeypatch):
    """By the code of the page, in a process of its own; its parameters are those of the run."""
    pytest.importorskip('safetensors')
    pytest.importorskip('flatbuffers')
    config = rl_configs.get_config('tiny,env=catch').unlock()
    config.seeds = (3, 4)
    train_rl.train(config, str(tmp_path / 'agent'))
    cli.main(
        [
            *(f'--workdir={tmp_path / "agent"}', '--seed=4'),
            *(f'--out={tmp_path / "agent.safetensors"}', f'--program={tmp_path / "agent.program"}'),
        ]
    )
    run_alone(LOAD[1] + "\nnp.save('logits.npy', logits)\nnp.save('value.npy', value)", tmp_path)

    agent = rl.build_agent(config, envs.make('catch').spec)
    params, step_count = restore_params(config, agent, tmp_path / 'agent')
    seed_params = jax.tree.map(lambda a: a[1], params)
    step, make_args = program.make_policy_step(agent, seed_params)
    zeros = jax.tree.map(jnp.zeros_like, make_args(8))
    _, logits, value = jax.jit(step)(*zeros)
    np.testing.assert_allclose(np.load(tmp_path / 'logits.npy'), logits, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(np.load(tmp_path / 'value.npy'), value, rtol=1e-6, atol=1e-7)

    # The parameters, by the page's code that needs the package.
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(LOAD[0], names)
    assert_same_bits(names['params'], seed_params)
    assert names['about'] == {'seed': 4, 'step': step_count}
    assert names['config']['model']['hidden'] == config.model.hidden


@pytest.mark.slow
def test_a_trained_language_model_is_rebuilt_from_its_file(tmp_path, texts):
    import ml_collections

    from mi.export import load_params

    pytest.importorskip('safetensors')
    config = make_lm(**{'data.source': texts, 'train.steps': 5, 'optim.ema': 0.5})
    train_lm.train(config, str(tmp_path / 'run'))
    cli.main([f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "lm.safetensors"}'])
    params, saved_config, about = load_params(tmp_path / 'lm.safetensors')
    trained = restore(config, str(tmp_path / 'run'))
    assert_same_bits(params, jax.tree.map(lambda a: a[0], trained.params))  # the average
    assert about == {'seed': 0, 'step': 5, 'vocabulary': 256, 'domains': 0}
    model = lm.build_model(ml_collections.ConfigDict(saved_config), about['vocabulary'])
    tokens = jnp.arange(12).reshape(4, 3)
    model.apply({'params': params}, model.initial_carry(3), tokens)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], 'the following arguments are required: --workdir; see --help'),
        (['--workdir=none', '--seed=a'], "argument --seed: invalid int value: 'a'"),
        (['--workdir=none'], 'expected --out=FILE.safetensors, --program=FILE, or both'),
        (['--workdir=none', '--out=a'], '--workdir=none: expected a run directory'),
        (['--workdir=none', '--out=a', '--platforms=cpu,tpuu'], "did you mean 'tpu'"),
    ],
)
def test_bad_flags_end_with_one_line(flags, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        cli.main(flags)


@pytest.mark.parametrize('flag', ['out', 'program'])
def test_an_output_that_cannot_be_written_is_refused_before_the_restore(
    flag, tmp_path, monkeypatch
):
    def refuse_restore(config, workdir):
        raise AssertionError('restored')

    monkeypatch.setitem(cli.RESTORE, 'lm', refuse_restore)
    (tmp_path / 'config.json').write_text(make_lm().to_json())
    for file, reason in (('config.json/a', 'File exists'), ('', 'Is a directory')):
        message = f'--{flag}={tmp_path / file}: {reason}. Use another file'
        with pytest.raises(UserError, match=re.escape(message)):
            cli.main([f'--workdir={tmp_path}', f'--{flag}={tmp_path / file}'])


def test_a_safetensors_file_that_cannot_be_written_is_an_os_error(tmp_path):
    pytest.importorskip('safetensors')
    with pytest.raises(OSError, match='No such file or directory'):
        save_params(tmp_path / 'missing/a.safetensors', {'w': np.zeros(2)}, {}, {})


def test_what_is_no_exported_file_is_refused(tmp_path):
    pytest.importorskip('safetensors')
    import safetensors.numpy

    from mi.export import load_params

    file = tmp_path / 'a.safetensors'
    with pytest.raises(UserError, match=r'expected a file written by `python -m mi\.export'):
        load_params(file)
    file.write_text(json.dumps({}))
    with pytest.raises(UserError, match='expected a safetensors file'):
        load_params(file)
    safetensors.numpy.save_file({'w': np.zeros(2)}, str(file))
    with pytest.raises(UserError, match='expected a file with the metadata `config` and `about`'):
        load_params(pathlib.Path(file))
