"""Compression of a trained run against its low-rank form from scratch."""

import csv
import json
import shutil
import subprocess
import sys

import pytest

from configs import lm as lm_configs
from experiments.compression import run as compression
from mi.inspect import trained
from mi.lm import train as lm
from mi.training.run_config import read_config
from tests.conftest import ROOT
from tests.test_inspect import LM, make_config


def make_settings(tmp_path, **changes):
    settings = compression.Settings(tmp_path / 'base', tmp_path / 'out', 'cp', 2)
    return settings._replace(**changes)


def write_run(path, records, cost=None, errors=None):
    path.mkdir(parents=True)
    lines = [json.dumps(record) for record in records]
    (path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    (path / 'config.json').write_text(json.dumps({'task': 'lm'}))
    if cost:
        (path / 'cost.json').write_text(json.dumps({'parameters': {'model': cost}}))
        (path / 'compressed.json').write_text(json.dumps({'errors': errors}))


def record(step, seed, value, split='valid'):
    return {'step': step, 'seed': seed, 'split': split, 'bits_per_byte': value}


def test_the_values_are_those_of_the_first_and_the_last_evaluation(tmp_path):
    records = [record(0, 0, 3.0), record(0, 1, 4.0), record(7, 0, 9.0, 'train'),
               record(5, 0, 2.0), record(5, 1, 1.0), record(5, 1, 8.0, 'test')]  # fmt: skip
    write_run(tmp_path / 'run', records)
    metric = compression.find_metric(tmp_path / 'run')
    assert metric == ('valid', 'bits_per_byte')
    assert compression.read_values(tmp_path / 'run', metric, is_last=False) == {0: 3.0, 1: 4.0}
    assert compression.read_values(tmp_path / 'run', metric, is_last=True) == {0: 2.0, 1: 1.0}
    write_run(tmp_path / 'later', records[3:])
    with pytest.raises(compression.UserError, match="an evaluation of the split 'valid' at step 0"):
        compression.read_values(tmp_path / 'later', metric, is_last=False)


def test_metrics_that_a_run_does_not_record_are_passed_over(tmp_path):
    write_run(tmp_path / 'run', [record(0, 0, None) | {'nats_per_token': 1.0}])
    assert compression.find_metric(tmp_path / 'run') == ('valid', 'nats_per_token')
    write_run(tmp_path / 'none', [record(0, 0, None)])
    with pytest.raises(compression.UserError, match='bits_per_byte or nats_per_token'):
        compression.find_metric(tmp_path / 'none')


def test_the_report_has_means_with_intervals_and_every_value(tmp_path):
    settings = make_settings(tmp_path)
    errors = [{'error': 0.2}, {'error': 0.4}]
    for rank, cost in ((1, 100), (4, 160)):
        write_run(tmp_path / f'out/tuned_cp_{rank}', [record(0, 0, 1.0)], cost, errors)
    values = {
        arm: {rank: {0: base + rank, 1: base + rank + 2} for rank in (1, 4)}
        for arm, base in (('compressed', 10), ('fine-tuned', 20), ('from scratch', 30),
                          ('full', 40), ('full, trained on', 50))
    }  # fmt: skip
    path = compression.write_report(settings, values, ('valid', 'bits_per_byte'))
    table = (path / 'compression.md').read_text().splitlines()
    assert table[2].startswith('| 1 | 100 | 0.3000 | 12.0000 [11.0000, 13.0000] | 22.0000')
    assert table[3].startswith('| 4 | 160 | 0.3000 | 15.0000 [14.0000, 16.0000] | 25.0000')
    assert table[0].endswith('| fine-tuned − from scratch | fine-tuned − full, trained on |')
    assert table[2].endswith('| -10.0000 [-10.0000, -10.0000] | -30.0000 [-30.0000, -30.0000] |')
    rows = list(csv.DictReader((path / 'compression.csv').read_text().splitlines()))
    assert len(rows) == 5 * 2 * 2
    assert {'arm': 'full', 'rank': '4', 'seed': '1', 'value': '46'} in rows
    assert (path / 'compression.png').stat().st_size > 1000
    assert json.loads((path / 'settings.json').read_text())['steps'] == 2


@pytest.mark.slow
def test_a_language_model_is_compressed_fine_tuned_and_trained_from_scratch(tmp_path, monkeypatch):
    """At the rank that is exact, compression changes nothing."""
    lm.train(make_config(lm_configs, LM), str(tmp_path / 'base'))
    trained_paths = []

    def train(run_path):
        trained_paths.append(run_path.name)
        lm.train(read_config(run_path), str(run_path))

    monkeypatch.setattr(compression, 'train', train)
    (site,) = trained.load(tmp_path / 'base').sites
    exact = site.z.shape[-1] * site.x.shape[-1]
    settings = make_settings(tmp_path)
    values = compression.run(settings, [exact])
    assert trained_paths == [f'tuned_cp_{exact}', f'scratch_cp_{exact}', 'full']
    assert read_config(tmp_path / 'out/full').train.steps == 2
    metric = compression.find_metric(tmp_path / 'base')
    at_start = compression.read_values(tmp_path / 'out/full', metric, is_last=False)
    assert at_start == pytest.approx(values['full'][exact], abs=1e-5)
    assert values['full, trained on'][exact] != values['full'][exact]
    assert values['compressed'][exact] == pytest.approx(values['full'][exact], abs=1e-4)
    assert values['from scratch'][exact] != pytest.approx(values['full'][exact], abs=1e-4)

    # From scratch: the same form, for the steps of both, and not from the compressed parameters.
    scratch = tmp_path / f'out/scratch_cp_{exact}'
    config = read_config(scratch)
    assert (config.model.fusion.name, config.model.fusion.rank) == ('mi_low_rank', exact)
    assert config.train.steps == 4 and not (scratch / 'compressed.json').exists()
    assert read_config(tmp_path / f'out/tuned_cp_{exact}').train.steps == 2
    path = compression.write_report(settings, values, metric)
    assert 'nan' not in (path / 'compression.md').read_text()

    # The same command continues; one with other settings is refused; a killed start is made again.
    shutil.rmtree(tmp_path / 'out/full')
    (tmp_path / 'out/full/checkpoints').mkdir(parents=True)
    again = compression.run(settings, [exact])
    assert again.keys() == values.keys() and again['compressed'] == values['compressed']
    with pytest.raises(compression.UserError, match=r'train\.steps .* Use another --out'):
        compression.run(settings._replace(steps=3), [exact])
    with pytest.raises(compression.UserError, match=r'--calibration=0, not 20\. Use another --out'):
        compression.run(settings._replace(calibration=20), [exact])


def test_a_killed_start_is_removed_and_other_files_are_not(tmp_path):
    config = lm_configs.get_config('tiny')
    assert not compression._is_started(tmp_path / 'new', config)
    (tmp_path / 'killed/checkpoints/00000000').mkdir(parents=True)
    assert not compression._is_started(tmp_path / 'killed', config)
    assert not (tmp_path / 'killed').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/thesis.tex').write_text('mine')
    with pytest.raises(compression.UserError, match=r'got thesis\.tex\. Use another --out'):
        compression._is_started(tmp_path / 'full', config)
    assert (tmp_path / 'full/thesis.tex').exists()


@pytest.mark.slow
def test_a_run_that_is_done_is_not_repeated(tmp_path):
    """And one that fails ends the experiment with its directory."""
    (tmp_path / 'status.json').write_text(json.dumps({'state': 'done'}))
    compression.train(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ['status.json']
    with pytest.raises(compression.UserError, match=r'nothing failed with exit code 1'):
        compression.train(tmp_path / 'nothing')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--workdir=a'], '--workdir=DIRECTORY and --out=DIRECTORY are both required'),
        (['--workdir=a', '--out=b', '--ranks=1,x'], '--ranks=1,x: expected integers'),
        (['--workdir=a', '--out=b'], 'found no config.json'),
    ],
)
def test_a_wrong_command_is_one_line(flags, message):
    command = [sys.executable, '-m', 'experiments.compression', *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr
