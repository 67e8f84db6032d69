"""Inspection and compression of runs: end to end on tiny ones."""

import csv
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import mi
from configs import lm as lm_configs
from configs import rl as rl_configs
from mi.compress import inputs
from mi.compress import runs as compress_runs
from mi.compress.forms import FORMS
from mi.compress.runs import FUSION_NAMES, compress_run
from mi.config import UserError
from mi.fusion import FUSIONS
from mi.inspect import report, trained
from mi.lm import assess as assess_lm
from mi.lm import config as lm_config
from mi.lm import factory
from mi.lm import train as lm
from mi.overrides import Override
from mi.rl import train as rl
from mi.training.run_config import read_config
from mi.unify import compute_tensors
from tests.conftest import ROOT

LM = {
    'data.source': 'austen-domains',
    'model.source': 'domain',
    'train.steps': 2,
    'train.log_every': 1,
    'train.eval_every': 2,
    'train.save_every': 2,
    'eval.batch': 8,
    'eval.length': 16,
    'eval.valid_tokens': 300,
    'eval.final_tokens': 300,
    'optim.warmup_steps': 0,
}
RL = {
    'env.name': 'catch',
    'model.features': 8,
    'model.hidden': 8,
    'model.source': 'embedding',
    'model.context': 3,
    'model.sites': ('core_input', 'readout'),
    'train.steps': 40 * 5,
    'train.log_every': 5,
    'train.eval_every': 5,
    'eval.episodes': 2,
}


def make_config(configs, settings, **changes):
    config = configs.get_config('tiny').unlock()
    config.update_from_flattened_dict(settings | changes)
    return config.lock()


def read_csv(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def list_files(folder):
    return {
        file.relative_to(folder): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob('*')
        if file.is_file()
    }


@pytest.fixture(scope='module')
def lm_run(tmp_path_factory):
    path = tmp_path_factory.mktemp('lm')
    lm.train(make_config(lm_configs, LM, seeds=(0, 1)), str(path))
    return path


@pytest.mark.slow
def test_a_language_model_is_inspected(lm_run):
    header, rows, files = report.write(lm_run, lm_run / 'inspect', seed=1)
    assert header[:3] == ['layer', 'seed', 'm × n × k'] and len(rows) == 2
    folder = lm_run / 'inspect'
    assert sorted(files) == sorted(folder.iterdir())
    assert all(file.stat().st_size > 500 for file in files)
    page = (folder / 'inspect.html').read_text()
    assert page.count('data:image/svg+xml') == 3 and 'http://' not in page
    assert {file.suffix for file in folder.glob('*.contexts.*')} == {'.png', '.pdf', '.svg'}

    # The numbers are those of the checkpoint, by NumPy.
    run = trained.load(lm_run)
    (site,) = run.sites
    W = np.asarray(site.get_params(run.get_seed_params(1))['W'], np.float64)
    sigma = np.linalg.svd(W.reshape(len(W), -1), compute_uv=False)
    share = sigma / sigma.sum()
    (rank,) = [
        row
        for row in read_csv(folder / 'spectrum.csv')
        if (row['seed'], row['state'], row['unfolding']) == ('1', 'trained', 'z')
    ]
    assert float(rank['effective_rank']) == pytest.approx(
        np.exp(-(share * np.log(share)).sum()), rel=1e-3
    )
    norms = {
        row['context']: float(row['norm_zW'])
        for row in read_csv(folder / 'contexts.csv')
        if (row['seed'], row['state']) == ('1', 'trained')
    }
    assert len(norms) == len(W) > 1
    np.testing.assert_allclose(
        list(norms.values()), np.linalg.norm(W.reshape(len(W), -1), axis=1), rtol=1e-3
    )
    outputs = [row for row in read_csv(folder / 'outputs.csv') if row['seed'] == '1']
    assert float(outputs[0]['norm']) == pytest.approx(np.linalg.norm(W[:, :, 0]), rel=1e-3)

    # Two updates have changed little since the initial parameters.
    initial = np.asarray(site.get_params(run.init_params(1))['W'])
    assert 0 < np.linalg.norm(W - initial) < 0.2 * np.linalg.norm(W)
    with pytest.raises(UserError, match=r'--seed=7: expected one of 0, 1'):
        report.write(lm_run, lm_run / 'inspect', seed=7)


@pytest.mark.slow
@pytest.mark.parametrize(('source', 'num_contexts'), [('summary', 15), ('state', 0)])
def test_dense_contexts_are_those_of_the_text_unless_they_are_made_in_a_loop(
    tmp_path, source, num_contexts
):
    settings = {'data.source': 'austen', 'model.source': source, 'train.steps': 1}
    lm.train(make_config(lm_configs, LM, **settings), str(tmp_path))
    run = trained.load(tmp_path)
    (site,) = run.sites
    contexts = run.get_contexts(site, run.get_seed_params(0))
    if not num_contexts:
        assert contexts is None
        return
    # Every position of the segment of 16 tokens but the first, which has no token before it.
    assert len(contexts.names) == num_contexts and contexts.names[0].startswith('1: …')
    assert contexts.z.shape == (num_contexts, site.z.shape[-1])

    # The context of the summary, by its recursion s_t = λ s_{t−1} + √(1 − λ²) (A x_t + c).
    params = jax.tree.map(np.asarray, run.get_seed_params(0))
    corpus = factory.load_corpus(run.config)
    tokens = np.asarray(corpus.tokens['valid'][:15])
    model = factory.build_model(run.config, *corpus.sizes)
    words = model.words(dtype=model.dtype)
    x = words.apply({'params': params['words']}, tokens[:, None], method='embed')[:, 0]
    decay = np.exp(-np.exp(-params['context']['log_tau']))
    inputs = x @ params['context']['input']['V'] + params['context']['input']['b']
    state, expected = np.zeros(len(decay)), []
    for row in inputs:
        state = decay * state + np.sqrt(1 - decay**2) * row
        expected.append(state)
    np.testing.assert_allclose(contexts.z, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_language_model_compressed_at_full_rank_evaluates_the_same(lm_run, tmp_path):
    before = list_files(lm_run)
    (site,) = trained.load(lm_run).sites
    m, n = site.z.shape[-1], site.x.shape[-1]
    changes = [Override('optim.learning_rate', '1e-4')]
    results = compress_run(lm_run, tmp_path / 'new', 'cp', m * n, changes)
    assert list_files(lm_run) == before
    assert [result.seed for result in results] == [0, 1]
    assert max(result.error for result in results) < 1e-6

    # The config names the form, and evaluation is that of the old run.
    config = read_config(tmp_path / 'new')
    assert config.model.fusion.name == 'mi_low_rank' and config.model.fusion.rank == m * n
    assert config.optim.learning_rate == 1e-4
    for path in (lm_run, tmp_path / 'new'):
        assess_lm.assess(read_config(path), str(path))
    old, new = (
        json.loads((path / 'evaluation.json').read_text()) for path in (lm_run, tmp_path / 'new')
    )
    (lm_run / 'evaluation.json').unlink()
    assert (old['step'], new['step']) == (2, 0)
    for split in ('valid', 'test'):
        for seed in ('0', '1'):
            nats = new[split][seed]['nats_per_token']
            assert nats == pytest.approx(old[split][seed]['nats_per_token'], abs=1e-5)

    # Training continues from it, after an evaluation of the compressed model.
    command = [sys.executable, '-m', 'mi.main', f'--workdir={tmp_path / "new"}']
    subprocess.run(command, cwd=ROOT, check=True)
    records = [json.loads(x) for x in (tmp_path / 'new/metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in records if r['split'] == 'valid'] == [0, 0, 2, 2]
    assert records[0]['nats_per_token'] == pytest.approx(
        new['valid']['0']['nats_per_token'], abs=1e-5
    )
    with pytest.raises(UserError, match=r'--out=.*: expected a new or empty directory'):
        compress_run(lm_run, tmp_path / 'new', 'cp', 2)


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_an_agent_is_inspected_compressed_and_trained_on(tmp_path, topology):
    path, new = tmp_path / 'run', tmp_path / 'new'
    rl.train(make_config(rl_configs, RL, **{'train.topology': topology}), str(path))
    _, rows, _ = report.write(path, tmp_path / 'inspect')
    assert [row[0] for row in rows] == ['core_input', 'readout']
    compress_run(path, new, 'block', 1)
    config = read_config(new)
    assert config.model.fusion.name == 'mi_block'
    assert config.model.fusion.options.to_dict() == {'blocks': 1}

    # One block is the full form.
    runs = [trained.load(folder) for folder in (path, new)]
    for site in runs[0].sites:
        full, block = (site.get_params(run.get_seed_params(0)) for run in runs)
        np.testing.assert_array_equal(full.pop('W'), block.pop('W')[0])
        jax.tree.map(np.testing.assert_array_equal, full, block)
    rl.train(config, str(new))
    records = [json.loads(x) for x in (new / 'metrics.jsonl').read_text().splitlines()]
    assert [r['step'] for r in records if r['split'] == 'eval'] == [0, 5]


class Loop(nn.Module):
    """h ← tanh(MI(x_t, h)) over time, with a fusion of the mean."""

    @nn.compact
    def __call__(self, x, ids):
        def step(cell, h, x_t):
            h = nn.tanh(cell(x_t, h))
            return h, h

        scan = nn.scan(step, variable_broadcast='params', split_rngs={'params': False})
        _, h = scan(mi.MultiplicativeInteraction(4, name='cell'), jnp.ones((2, 4)), x)
        return mi.MultiHead(3, contexts=5, name='head')(h.mean(0), ids)


def test_inputs_are_recorded_in_loops_and_with_ids():
    """In a scan under jit, the context of step t is the output of step t − 1, by NumPy."""
    model, ids = Loop(), jnp.array([4, 1])
    x = jax.random.normal(jax.random.key(0), (7, 2, 3))
    variables = model.init(jax.random.key(1), x, ids)
    sites = trained.find_sites(model, variables, x, ids)
    assert [site.name for site in sites] == ['cell', 'head']
    recorder = inputs.Recorder(sites)
    apply = jax.jit(model.apply)
    with recorder.record():
        apply(variables, x, ids)
    assert recorder.count() == 2  # of the head
    rows = recorder.take(100)
    assert recorder.count() == 0

    params = jax.tree.map(np.asarray, variables['params']['cell'])
    W, U, V, b = (params[name] for name in 'WUVb')
    h, contexts = np.ones((2, 4)), []
    for x_t in np.asarray(x):
        contexts.append(h)
        h = np.tanh(np.einsum('bm,mnk,bn->bk', h, W, x_t) + h @ U + x_t @ V + b)
    by_x = {tuple(np.round(row, 5)): z for row, z in zip(*rows['cell',], strict=True)}
    for x_t, context in zip(np.asarray(x).reshape(-1, 3), np.reshape(contexts, (-1, 4)),
                            strict=True):  # fmt: skip
        np.testing.assert_allclose(by_x[tuple(np.round(x_t.astype(float), 5))], context, atol=1e-5)
    np.testing.assert_array_equal(rows['head',][1], ids)

    # Rows are evenly spaced.
    with recorder.record():
        jax.jit(model.apply)(variables, x, ids)
    few = recorder.take(4)['cell',][0]
    assert len(few) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'model.source': 'state', 'model.site': 'ffn'},
        {
            **{'model.core': 'transformer', 'model.site': 'ffn', 'model.source': 'domain'},
            **{'model.memory': 0, 'model.layers': 2, 'model.remat': True},
        },
    ],
    ids=['lstm', 'remat'],
)
def test_inputs_of_a_fusion_that_only_the_logits_depend_on_are_recorded(tmp_path, changes):
    lm.train(make_config(lm_configs, LM, seeds=(0,), **changes), str(tmp_path))
    run = trained.load(tmp_path)
    (rows,) = inputs.draw_inputs(run, 50)
    assert {path: (len(x), len(z)) for path, (x, z) in rows.items()} == {
        site.path: (50, 50) for site in run.sites
    }


@pytest.mark.slow
def test_the_contexts_of_a_calibration_are_those_of_the_validation_text(lm_run, tmp_path):
    run = trained.load(lm_run)
    (site,) = run.sites
    by_seed = list(inputs.draw_inputs(run, 200))
    assert len(by_seed) == 2
    x, z = by_seed[1][site.path]
    assert x.shape == (200, site.x.shape[-1]) and len(z) == 200

    # One-hot domains of the tokens at the start of each part of the text, in order of time.
    corpus = factory.load_corpus(run.config)
    reading = lm_config.get_reading(run.config)
    part = -(-(len(corpus.tokens['valid']) - 1) // reading.batch)
    steps = -(-200 // (reading.batch * reading.length)) * reading.length
    positions = np.arange(steps)[:, None] + np.arange(reading.batch)[None] * part
    domains = corpus.get_domains('valid', positions).reshape(-1)
    spaced = np.linspace(0, domains.size - 1, 200).round().astype(int)
    found = z if z.ndim == 1 else z.argmax(-1)
    np.testing.assert_array_equal(found, domains[spaced])

    # Fitted there, the outputs are nearer than those of the nearest W.
    plain = compress_run(lm_run, tmp_path / 'plain', 'block', 2)
    fitted = compress_run(lm_run, tmp_path / 'fitted', 'block', 2, calibration=200)
    origin = json.loads((tmp_path / 'fitted/compressed.json').read_text())
    assert origin['calibration'] == 200
    for seed_index, (before, after) in enumerate(zip(plain, fitted, strict=True)):
        rows = by_seed[seed_index][site.path]
        variables = {'params': site.get_params(run.get_seed_params(seed_index))}
        target = compute_tensors(variables).apply(*rows)
        errors = []
        for name in ('plain', 'fitted'):
            new = trained.load(tmp_path / name)
            params = new.sites[0].get_params(new.get_seed_params(seed_index))
            blocks = new.sites[0].module.apply({'params': params}, *map(jnp.float32, rows))
            errors.append(np.linalg.norm(blocks - target) / np.linalg.norm(target))
        assert after.error == pytest.approx(errors[1], rel=1e-3)
        assert errors[1] < errors[0] and before.error != after.error


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['fused', 'threads'])
def test_the_contexts_of_an_agent_s_calibration_are_the_embeddings_of_its_tasks(tmp_path, topology):
    rl.train(make_config(rl_configs, RL, **{'train.topology': topology}), str(tmp_path))
    run = trained.load(tmp_path)
    (rows,) = inputs.draw_inputs(run, 500)
    embedding = np.asarray(run.get_seed_params(0)['task_embedding'])
    assert [site.path for site in run.sites] == list(rows)
    for site in run.sites:
        x, z = rows[site.path]
        assert x.shape == (500, site.x.shape[-1])
        distances = np.abs(z[:, None] - embedding[None]).max(-1)
        assert distances.min(1).max() < 1e-6
        counts = np.bincount(distances.argmin(1), minlength=len(embedding))
        assert counts.min() > 0.5 * counts.max()  # rows are divided evenly among tasks
        assert len(np.unique(x, axis=0)) > 50  # states, not only starts of episodes


@pytest.mark.slow
def test_a_run_without_an_interaction_is_refused(tmp_path):
    rl.train(make_config(rl_configs, RL, **{'model.fusion.name': 'concat'}), str(tmp_path))
    done = subprocess.run(
        [sys.executable, '-m', 'mi.inspect', f'--workdir={tmp_path}'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert "config.model.fusion.name = 'concat': expected a run with an MI layer" in done.stderr
    with pytest.raises(UserError, match=r"'concat': expected fusions with W \[m, n, k\]"):
        compress_run(tmp_path, tmp_path / 'new', 'block', 2)


def test_the_first_array_of_another_shape_is_named():
    like = {'a': jnp.zeros(2), 'b': [jnp.zeros(3), jnp.zeros((4, 5))]}
    tree = {'a': np.ones(2), 'b': [np.ones(3), np.ones((4, 6))]}
    with pytest.raises(
        UserError, match=r"^state\['b'\]\[1\]: expected \(4, 5\), got \(4, 6\)\. The"
    ):
        compress_runs._place(tree, like)
    with pytest.raises(UserError, match=r"state\['b'\]\[1\]: .* got no such array"):
        compress_runs._place(tree | {'b': [np.ones(3)]}, like)


def test_every_form_is_the_fusion_of_its_module():
    assert FUSION_NAMES.keys() == FORMS.keys()
    for form, name in FUSION_NAMES.items():
        constructor = FUSIONS[name]
        assert getattr(constructor, 'func', constructor) is FORMS[form]


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['mi.inspect'], 'expected --workdir=DIRECTORY'),
        (['mi.inspect', '--workdir=nowhere'], 'found no config.json'),
        (['mi.compress', '--workdir=a'], '--workdir=DIRECTORY and --out=DIRECTORY'),
        (['mi.compress', '--workdir=a', '--out=b'], '--rank=None: expected at least 1 for'),
        (['mi.compress', '--workdir=a', '--out=b', '--form=block'], '--blocks=None: expected'),
        (
            ['mi.compress', '--workdir=a', '--out=b', '--rank=2', '--blocks=2'],
            '--blocks=2: only applies to --form=block; remove it',
        ),
        (
            ['mi.compress', '--workdir=a', '--out=b', '--rank=2', '--calibration=-1'],
            '--calibration=-1: expected at least 0',
        ),
    ],
)
@pytest.mark.slow
def test_a_wrong_command_is_one_line(command, message):
    done = subprocess.run(
        [sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr


PAGE = (ROOT / 'docs/inspect.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)\n```\n\n```text\n(.*?)\n```', PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(('code', 'output'), EXAMPLES, ids=['spectrum', 'compress'])
def test_an_example_prints_what_the_page_shows(code, output, capsys):
    exec(compile(code, 'example.py', 'exec'), {'__name__': 'example'})
    assert capsys.readouterr().out.strip() == output
