"""Flags that change a config: what they mean, and what is said of those that mean nothing."""

import ml_collections
import pytest

from launch import sweep
from mi import overrides
from mi.config import ArgumentError, UserError, name_config_keys
from mi.estimate import cli

FILE = """
import ml_collections

def get_config(word='default'):
    config = ml_collections.ConfigDict()
    config.task = 'lm'
    config.seeds = (0,)
    config.words = ('a',)
    config.sizes = [1, 2]
    config.nothing = None
    config.data = ml_collections.ConfigDict({'source': word, 'path': ''})
    config.model = ml_collections.ConfigDict({'hidden': 3, 'rate': 0.5, 'tied': False})
    config.model.fusion = ml_collections.ConfigDict({'rank': 4, 'name': 'mi'})
    return config
"""


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('configs') / 'config.py'
    path.write_text(FILE)
    return str(path)


def load(file, *arguments):
    return overrides.parse([f'--config={file}', *arguments])


@pytest.mark.parametrize(
    'arguments, key, value',
    [
        # The last value counts, of every type and in every spelling.
        (['--config.seeds=(0,1)', '--config.seeds=(2,3)'], 'seeds', (2, 3)),
        (['--config.seeds=(0,1)', '--config.seeds', '(2,3)'], 'seeds', (2, 3)),
        (['--config.seeds=1', '-config.seeds=2'], 'seeds', (2,)),
        (['--config.words=a,b', "--config.words=('c',)"], 'words', ('c',)),
        (['--config.sizes=(3,)', '--config.sizes=[4, 5]'], 'sizes', [4, 5]),
        (['--config.model.hidden=4', '--config.model.hidden=5'], 'model.hidden', 5),
        (['--config.model.tied', '--noconfig.model.tied'], 'model.tied', False),
        # Types are those of the config.
        (['--config.seeds=3,4'], 'seeds', (3, 4)),
        (['--config.seeds=()'], 'seeds', ()),
        (['--config.words=(core_input, readout)'], 'words', ('core_input', 'readout')),
        (['--config.words=xland/test'], 'words', ('xland/test',)),
        (['--config.model.tied'], 'model.tied', True),
        (['--config.model.tied', 'false'], 'model.tied', False),
        (['--config.model.rate=1'], 'model.rate', 1.0),
        (['--config.model.hidden=1_000'], 'model.hidden', 1000),
        (['--config.model.rate=-1e-3'], 'model.rate', -1e-3),
        (['--config.model.rate', '-1e-3'], 'model.rate', -1e-3),
        (['--config.data.source='], 'data.source', ''),
        (['--config.data.source=1'], 'data.source', '1'),
        (['--config.data.source=a=b'], 'data.source', 'a=b'),
        (['--config.nothing=(1, 2)'], 'nothing', (1, 2)),
        (['--config.nothing=word'], 'nothing', 'word'),
        (['--config.task=lm'], 'task', 'lm'),
    ],
    ids=str,
)
def test_the_last_value_of_a_key_counts_as_the_type_that_the_key_has(file, arguments, key, value):
    config = load(file, *arguments)
    for part in key.split('.'):
        config = config[part]
    assert config == value and type(config) is type(value)


def test_a_flag_file_and_an_override_replace_as_two_flags_do(file, tmp_path):
    (tmp_path / 'flags').write_text('--config.seeds=(0, 1)\n--config.model.hidden=7\n--x=3\n')
    flag_file = f'--flagfile={tmp_path}/flags'
    rest, changes = overrides.split(['main', flag_file, '--config.seeds=(2, 3)', '--y', 'z'])
    assert rest == ['main', '--x=3', '--y', 'z']
    config = overrides.load(file, changes)
    assert config.seeds == (2, 3) and config.model.hidden == 7
    _, changes = overrides.split(['--config.seeds=(2, 3)', flag_file])
    assert overrides.load(file, changes).seeds == (0, 1)
    with pytest.raises(UserError, match='none'):
        overrides.split([f'--flagfile={tmp_path}/none'])


def test_flags_before_the_file_and_the_argument_of_the_file(file):
    config = overrides.parse(['--config.model.hidden=4', f'--config={file}:text'])
    assert (config.model.hidden, config.data.source) == (4, 'text')


def test_members_of_a_sweep_and_the_table_of_costs_read_flags_in_the_same_way(file, capsys):
    twice = ['--config.seeds=(0, 1)', '--config.seeds=(2,)']
    assert sweep.parse_config(['python', f'--config={file}', *twice, '--workdir=x']).seeds == (2,)
    with pytest.raises(UserError, match=r'nosuch=1: config\.nosuch is unknown'):
        sweep.parse_config([f'--config={file}', '--config.seeds=(2,)', '--config.nosuch=1'])
    cli.main(['cost', '--config=configs/lm.py:tiny', '--nocompile', '--json', *twice])
    assert '"seeds": 1' in capsys.readouterr().out


@pytest.mark.parametrize(
    'argument, said',
    [
        ('--config.nosuch=1', 'config.nosuch is unknown; the keys of config are data, model, noth'),
        ('--config.model.nosuch=1', 'is unknown; the keys of config.model are fusion, hidden, rat'),
        ('--config.modle.hidden=1', 'unknown; did you mean config.model.hidden?'),
        ('--config.hidden=1', 'unknown; did you mean config.model.hidden?'),
        ('--config.model.hiden', 'config.model.hiden is unknown; did you mean config.model.hidden'),
        ('--config.model.hidden.x.y=1', 'config.model.hidden is a value and has no keys'),
        ('--config.nosuch_options={}', 'config.nosuch_options is unknown; the keys of config are'),
        ('--config.options={}', 'config.options is unknown'),
        ('--config.=1', 'config. is unknown; the keys of config are'),
        ('--config.model.=1', 'config.model. is unknown'),
        ('--config.seeds[0]=1', 'config.seeds[0] is unknown; did you mean config.seeds?'),
        (
            '--config.model.fusion=mi',
            "config.model.fusion = 'mi': expected a key of this section, one of config.",
        ),
        ('--config.model.fusion=mi', 'Try --config.model.fusion.name=mi'),
        ("--config.model.fusion={'name': 'mi'}", 'expected a key of this section'),
        ('--config.model', 'config.model: expected a key of this section'),
        ('--config.model.hidden', 'config.model.hidden has no value: expected --config.model.hid'),
        ('--config.model.hidden=', "config.model.hidden = '': expected an integer"),
        ('--config.model.hidden=big', "config.model.hidden = 'big': expected an integer"),
        ('--config.model.hidden=1.5', "config.model.hidden = '1.5': expected an integer"),
        ('--config.model.hidden=None', "config.model.hidden = 'None': expected an integer"),
        ('--config.model.hidden=(1,)', "config.model.hidden = '(1,)': expected an integer"),
        ('--config.model.rate=fast', "config.model.rate = 'fast': expected a number"),
        ('--config.model.rate=', "config.model.rate = '': expected a number"),
        ('--config.model.tied=maybe', "config.model.tied = 'maybe': expected True or False"),
        ('--noconfig.model.tied=1', 'expected no value. Use --config.model.tied=VALUE'),
        ('--noconfig.model.hidden', "config.model.hidden = 'False': expected an integer"),
        ('--config.seeds=(0,1', "config.seeds = '(0,1': expected a tuple such as '(0, 1)'"),
        ('--config.seeds=0,1)', "config.seeds = '0,1)': expected a tuple"),
        ('--config.seeds=', "config.seeds = '': expected a tuple"),
        ('--config.seeds', 'config.seeds has no value'),
        ('--config.seeds=0 1', "config.seeds = '0 1': expected a tuple"),
        ('--config.task=rl', "config.task = 'rl': expected 'lm', the task of the config file"),
    ],
)
def test_a_flag_that_means_nothing_is_refused_in_one_line(file, argument, said):
    with pytest.raises(UserError) as refused:
        load(file, argument)
    assert said in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'text, said',
    [
        ('def get_config():\n    return (\n', 'line 2'),
        ('import ml_colections\n', "line 1: No module named 'ml_colections'"),
        ('x = 1\n', "AttributeError: module 'config_file' has no attribute 'get_config'"),
        ('def get_config():\n    return 1 / 0\n', 'line 2: ZeroDivisionError: division by zero'),
        ('def get_config():\n    return {}\n', 'get_config() returned a dict; expected an ml_coll'),
        ('def get_config():\n    pass\n', 'get_config() returned a NoneType'),
        ("def get_config():\n    raise KeyError('a')\n", 'line 2: KeyError: a'),
    ],
)
def test_a_config_file_that_does_not_work_is_one_line_that_names_it(tmp_path, text, said):
    file = tmp_path / 'broken.py'
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        overrides.load(str(file))
    assert str(refused.value).startswith(f'--config={file}') and said in str(refused.value)
    assert '\n' not in str(refused.value)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    for file, said in (
        ('none.py', 'no such file'),
        (tmp_path, 'a directory'),
        (tmp_path / 'config.json', 'not a Python file'),
        ('.', 'a directory'),
        (':quickstart', 'a directory'),
    ):
        with pytest.raises(UserError, match=f'--config={file}: {said}; expected FILE.py or FILE'):
            overrides.load(str(file))
    with pytest.raises(UserError, match='takes 0 positional arguments'):
        path = tmp_path / 'config.py'
        path.write_text('def get_config():\n    pass\n')
        overrides.load(f'{path}:word')


def test_a_reference_to_another_key_is_set_where_it_points(file):
    config = ml_collections.ConfigDict({'a': 1})
    config.b = config.get_ref('a')
    overrides.apply(config, [overrides.Override('b', '2')])
    assert config.a == 2


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (["--config.env.options={'sticky': 0.25}"], {'sticky': 0.25}),
        (['--config.env.options.sticky=0.25'], {'sticky': 0.25}),
        (["--config.env.options={'a': 1}", '--config.env.options.b=x'], {'a': 1, 'b': 'x'}),
        (["--config.env.options={'a': 1}", '--config.env.options={}'], {}),
    ],
)
def test_options_are_given_as_a_dictionary_or_one_by_one(arguments, expected):
    config = overrides.parse(['--config=configs/rl.py:tiny', *arguments])
    assert config.env.options.to_dict() == expected
    assert config.is_locked


def test_a_library_names_arguments_and_a_trainer_the_keys():
    message = '`batch` = 3 and `options.size`: expected `other`'
    with (
        pytest.raises(UserError) as error,
        name_config_keys({'batch': 'config.train.batch', 'options': 'config.env.options'}),
    ):
        raise ArgumentError(message)
    assert str(error.value) == (
        'config.train.batch = 3 and config.env.options.size: expected `other`'
    )
    assert not isinstance(error.value, ArgumentError)  # no other trainer renames it


@pytest.mark.parametrize('group', ['env.options', 'model.core_options', 'model.fusion.options'])
@pytest.mark.parametrize('text', ['', '=3', '=sticky', '={1: 2}'])
def test_options_that_are_no_dictionary_are_refused(group, text):
    with pytest.raises(UserError, match=rf'config\.{group}.*expected a dictionary of options'):
        overrides.parse(['--config=configs/rl.py:tiny', f'--config.{group}{text}'])


def test_a_config_file_that_changes_within_a_second_is_read_again(tmp_path):
    """Python's bytecode cache compares whole seconds and the size of a file."""
    path = tmp_path / 'config.py'
    for word in ('wordA', 'wordB', 'wordC'):
        path.write_text(FILE.replace("word='default'", f"word='{word}'"))
        assert load(str(path)).data.source == word
