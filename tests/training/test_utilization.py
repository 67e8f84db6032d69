"""Utilization: FLOPs per second over the peaks of all devices, in timing.jsonl alone."""

import json
import types

import pytest

from configs import lm as lm_configs
from configs import rl as rl_configs
from mi.lm import train as train_lm
from mi.rl import train as train_rl
from mi.training import utilization


def devices(*kinds):
    return [types.SimpleNamespace(device_kind=kind) for kind in kinds]


def test_it_is_the_share_of_all_devices_peaks():
    """2 MFLOPs for each of 10⁸ tokens a second: 200 TFLOP/s of 312, and of twice that."""
    assert utilization.Meter(2e6, devices('NVIDIA A100-SXM4-80GB')).measure(1e8) == {
        'mfu': pytest.approx(200 / 312)
    }
    two = devices('TPU v5 lite', 'TPU v6 lite')
    assert utilization.Meter(2e6, two).measure(1e8)['mfu'] == pytest.approx(200 / (197 + 918))


@pytest.mark.parametrize('kinds', [['cpu'], ['NVIDIA H200', 'NVIDIA Unknown']])
def test_a_device_without_a_known_peak_has_none(kinds):
    assert utilization.Meter(2e6, devices(*kinds)).measure(1e8) == {}
    assert utilization.format_rate('5 tokens/s', {'seconds': 1.0}) == '5 tokens/s'
    assert utilization.format_rate('5 tokens/s', {'mfu': 0.4126}) == '5 tokens/s, 41.3% MFU'


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_language_model_logs_three_forward_passes_a_token(tmp_path, texts, monkeypatch, capsys):
    """By hand for an LSTM without fusion: 2 FLOPs a weight and token in the products."""
    config = lm_configs.get_config('tiny').unlock()
    config.data.source, config.seeds = texts, (0, 1)
    config.model.update({'site': 'none', 'tied': False})
    config.model.fusion.name = 'none'
    for name, peak in (('plain', None), ('known', 1e12)):
        if peak:
            monkeypatch.setitem(utilization.PEAK_FLOPS, 'cpu', peak)
        train_lm.train(config, str(tmp_path / name))
    E, H, V = config.model.embed, config.model.hidden, 256
    forward = 2 * (E * 4 * H + H * 4 * H + H * E + E * V)
    cost = json.loads((tmp_path / 'known/cost.json').read_text())
    assert cost['flops_per_token']['model'] == forward
    assert 'MFU' in capsys.readouterr().err
    for record in read(tmp_path / 'known/timing.jsonl'):
        expected = 3 * forward * record['tokens_per_second'] / 1e12
        assert record['mfu'] == pytest.approx(expected, rel=1e-12)
    assert not any('mfu' in record for record in read(tmp_path / 'plain/timing.jsonl'))
    metrics = [(tmp_path / name / 'metrics.jsonl').read_bytes() for name in ('plain', 'known')]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
@pytest.mark.parametrize(('topology', 'passes'), [('fused', 4), ('threads', 3)])
def test_an_agent_logs_its_learning_and_in_one_program_its_acting(
    topology, passes, tmp_path, monkeypatch
):
    monkeypatch.setitem(utilization.PEAK_FLOPS, 'cpu', 1e12)
    config = rl_configs.get_config('tiny,env=catch').unlock()
    config.train.topology = topology
    train_rl.train(config, str(tmp_path))
    forward = json.loads((tmp_path / 'cost.json').read_text())['flops_per_step']['model']
    for record in read(tmp_path / 'timing.jsonl'):
        expected = passes * forward * record['steps_per_second'] / 1e12
        assert record['mfu'] == pytest.approx(expected, rel=1e-12)
