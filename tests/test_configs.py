"""Arguments of config files: their order does not matter, and contradictions are refused."""

import itertools

import pytest

from configs import lm, lm_enwik8, lm_ptb, lm_wikitext103, rl, rl_dmlab30
from mi.config import UserError

VALUES = {
    'core': ('lstm', 'transformer'),
    'env': ('catch', 'xland/kinds'),
    'fusion': ('concat', 'mi_low_rank'),
    'site': ('both', 'decoder'),
    'source': ('domain', 'summary'),
}


def parts(module):
    """All presets of a config file, and two values of every key."""
    keys = getattr(module, 'KEYS', lm.KEYS)
    return [*module.PRESETS, *(f'{key}={value}' for key in keys for value in VALUES[key])]


def result(module, argument):
    """The config of an argument; if it is refused, the error's type."""
    try:
        return module.get_config(argument).to_dict()
    except UserError as error:
        assert '\n' not in str(error) and argument in str(error)
        return UserError


@pytest.mark.parametrize('module', [lm, lm_enwik8, lm_ptb, lm_wikitext103, rl, rl_dmlab30])
def test_the_order_of_an_argument_does_not_matter(module):
    for first, second in itertools.combinations(parts(module), 2):
        forward = result(module, f'{first},{second}')
        assert forward == result(module, f'{second},{first}'), (first, second)
        is_key = '=' in first and first.partition('=')[0] == second.partition('=')[0]
        if is_key:
            assert forward is UserError, (first, second)


def test_a_preset_overrides_the_sizes_of_a_core_and_not_the_core():
    config = lm.get_config('core=transformer,quickstart')
    assert (config.model.core, config.model.layers, config.model.embed) == ('transformer', 4, 64)


@pytest.mark.parametrize(
    ('module', 'layers', 'rate'), [(lm_enwik8, 12, 2.5e-4), (lm_wikitext103, 16, 2.5e-4)]
)
def test_a_preset_has_its_sizes_whether_or_not_its_core_is_named(module, layers, rate):
    for argument in ('transformer', 'core=transformer,transformer'):
        config = module.get_config(argument)
        assert (config.model.layers, config.optim.learning_rate) == (layers, rate)


def test_a_value_overrides_that_of_a_preset():
    config = rl.get_config('env=xland/kinds,catch')
    assert (config.env.name, config.model.features) == ('xland/kinds', 64)


@pytest.mark.parametrize(
    'module, argument, message',
    [
        (lm, 'tiny,quickstart', r"config\.model\.embed = 64 in 'quickstart' and 16 in 'tiny'"),
        (lm_enwik8, 'mogrifier_48m,mogrifier_96m', r'config\.model\.hidden = 1800 in'),
        (lm_ptb, 'awd,mogrifier', r"config\.model\.core = 'lstm' in 'awd'"),
        (lm_wikitext103, 'transformer,lstm', r"config\.model\.core = 'lstm' in 'lstm'"),
        (rl, 'pong,cartpole', r"config\.env\.name = .*'cartpole' and 'atari/Pong' in 'pong'"),
        (lm, 'core=lstm,core=mogrifier', 'expected one value for core'),
        (lm, 'quickstar', "did you mean 'quickstart'"),
        (rl_dmlab30, 'env=catch', 'expected fusion=… or a preset'),
    ],
)
def test_contradictions_and_unknown_parts_are_refused(module, argument, message):
    with pytest.raises(UserError, match=message):
        module.get_config(argument)
