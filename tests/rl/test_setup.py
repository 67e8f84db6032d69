import dataclasses

import jax
import jax.numpy as jnp
import pytest

from configs import rl as configs
from mi.config import UserError
from mi.rl import config as rl_config
from mi.rl import envs, factory
from mi.rl.envs.check import check_batch
from mi.rl.envs.spec import Spec
from mi.rl.evaluate import Evaluation

FEATURES, TASKS = 16, 30
STATE = {'model.source': 'state', 'model.sites': ('readout',)}
INPUT = FEATURES + 6 + 1  # what the site core_input sees: features, action, reward


def tiny(**changes):
    config = configs.get_config('tiny').unlock()
    config.update_from_flattened_dict(changes)
    return config.lock()


def costs(config):
    return factory.compute_costs(factory.build_agent(config, envs.make('xland').spec), 8, 5)


@pytest.mark.parametrize(
    ('word', 'parameters', 'flops'),
    [
        # With V and b; the bias of a known task is read, not multiplied. Each row is multiplied
        # with the W of its task.
        ('none', (INPUT + 1) * FEATURES, 2 * INPUT * FEATURES),
        (
            'mi',
            (TASKS * INPUT + TASKS + INPUT + 1) * FEATURES,
            2 * 2 * INPUT * FEATURES,
        ),
    ],
)
def test_costs_of_the_fusion_alone(word, parameters, flops):
    found = costs(tiny(**{'model.fusion.name': word}))
    assert found['parameters']['fusion'] == parameters
    assert found['flops_per_step']['fusion'] == flops
    assert found['parameters']['model'] > parameters


def test_arms_differ_in_cost_by_their_fusions():
    concat, mi = (costs(tiny(**{'model.fusion.name': word})) for word in ('concat', 'mi'))
    for what in ('parameters', 'flops_per_step'):
        gap = mi[what]['model'] - concat[what]['model']
        assert gap == pytest.approx(mi[what]['fusion'] - concat[what]['fusion'], abs=1)


def test_the_cost_where_streams_meet_once_per_episode_is_that_of_each_step():
    config = tiny(**{'model.instruction': True, 'model.sites': ('instruction',)})
    agent = factory.build_agent(config, envs.make('xland').spec)
    of_fusions = [
        [cost['fusion'] for cost in factory.compute_costs(agent, 8, length).values()]
        for length in (5, 20)
    ]
    assert of_fusions[0] == pytest.approx(of_fusions[1], rel=0.15)
    assert min(of_fusions[1]) > 64 * FEATURES**2


def test_no_site_no_cost_of_fusions():
    found = costs(tiny(**{'model.sites': ()}))
    assert (found['parameters']['fusion'], found['flops_per_step']['fusion']) == (0, 0)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'model.fusion.name': 'multi_head', 'model.source': 'inferred'}, 'one-hot contexts'),
        (
            {
                'model.fusion.name': 'multi_head',
                'model.source': 'state',
                'model.sites': ('readout',),
            },
            'one-hot contexts',
        ),
        ({'train.eval_every': 7}, 'a multiple of'),
        ({'train.topology': 'threads', 'seeds': (0, 1)}, 'expected one seed'),
        ({'train.topology': 'ray', 'actors.batch': 3}, 'config.actors.batch'),
        ({'model.sites': ('readout', 'readout')}, 'distinct sites'),
    ],
)
def test_what_cannot_work_is_refused_with_a_way_out(changes, said):
    with pytest.raises(UserError, match=said):
        rl_config.validate(tiny(**changes))


@pytest.mark.parametrize(
    'sites', [('core_input',), ('core_input', 'readout'), ('instruction',), ()]
)
def test_a_context_of_the_cores_output_is_for_the_read_outs_alone(sites):
    changes = {'model.source': 'state', 'model.sites': sites, 'model.instruction': True}
    with pytest.raises(UserError, match=r"config\.model\.source = 'state': .*site 'readout'.*got"):
        rl_config.validate(tiny(**changes))
    agent = factory.build_agent(tiny(**changes), envs.make('xland').spec)
    with pytest.raises(ValueError, match=r"source = 'state': .* \('readout',\)"):
        jax.eval_shape(lambda: factory.init_params(agent, jax.random.key(0)))
    rl_config.validate(tiny(**changes | {'model.sites': ('instruction', 'readout')}))


@pytest.mark.parametrize(
    ('source', 'sites'),
    [
        ('embedding', ()),
        ('inferred', ('instruction',)),
        ('instruction', ()),
        ('embedding', ('instruction',)),
    ],
)
def test_a_context_that_no_site_reads_is_refused(source, sites):
    changes = {'model.source': source, 'model.sites': sites, 'model.instruction': True}
    with pytest.raises(UserError, match=r"source = '\w+': no site reads this context.*got sites"):
        rl_config.validate(tiny(**changes))
    changes = {'model.source': 'instruction', 'model.sites': ('instruction',)}
    rl_config.validate(tiny(**changes, **{'model.instruction': True}))


def test_the_cost_of_a_context_of_the_cores_output_is_that_of_two_layers():
    changes = {'model.sites': ('readout',), 'model.hidden': 24, 'model.context': 8}
    given, learned = (
        costs(tiny(**changes, **{'model.source': source})) for source in ('embedding', 'state')
    )
    num_params, hidden_flops = 24 * 8 + 8 + 8 * 8 + 8, 2 * (24 * 8 + 8 * 8)
    assert learned['parameters']['model'] - given['parameters']['model'] == num_params - TASKS * 8
    flops = [cost['flops_per_step']['model'] for cost in (given, learned)]
    assert flops[1] - flops[0] == hidden_flops
    for cost in (given, learned):  # W, U, V and b of six logits and a value
        assert cost['parameters']['fusion'] == (8 * 24 + 8 + 24 + 1) * 7


def test_an_instruction_that_is_not_there_is_refused():
    config = tiny(**{'model.source': 'instruction', 'model.instruction': True})
    spec = Spec(name='mute', observation={}, actions=2, tasks=('only',))
    with pytest.raises(UserError, match='has no instructions'):
        factory.build_agent(config, spec)


def test_too_few_rows_for_the_evaluation_name_their_key(tmp_path, monkeypatch):
    config = tiny(**{'env.name': 'vizdoom/basic,take_cover', 'eval.batch': 1})

    def make_pool(suite, *, batch, seed):
        check_batch('vizdoom', 2, batch)

    monkeypatch.setitem(envs.HOST, 'vizdoom', make_pool)
    with pytest.raises(UserError, match=r'has 2 tasks .* only 1 .*Raise config\.eval\.batch'):
        Evaluation(config)


def test_held_out_tasks_need_a_context_that_knows_them():
    world = envs.make('xland/kinds').spec
    others = envs.make('xland/test').spec
    assert world.tasks != others.tasks
    with pytest.raises(UserError, match=r"config\.model\.source = 'instruction'"):
        factory.check_held_out(tiny(**{'model.source': 'task'}), world, others)
    for source in ('inferred', 'state'):
        factory.check_held_out(tiny(**{'model.source': source}), world, others)
    # Agents that do not read the index.
    for changes in ({'model.sites': ('instruction',)}, {'model.fusion.name': 'none'}):
        factory.check_held_out(tiny(**{'model.source': 'task'} | changes), world, others)
    # The same tasks with other levels, as procgen/test.
    factory.check_held_out(
        tiny(**{'model.source': 'task'}), world, dataclasses.replace(world, name='again')
    )


def test_a_world_that_looks_different_is_refused_before_training():
    config = tiny(**{'model.source': 'inferred', 'eval.held_out': 'catch'})
    with pytest.raises(UserError, match=r'expected the observation of config\.env\.name'):
        factory.check_held_out(config, envs.make('xland/kinds').spec, envs.make('catch').spec)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'model.torso': 'shallow'}, 'expected an observation with pixels .got grid'),
        ({'model.core': 'transformer', 'model.hidden': 10}, 'expected a multiple of 4'),
    ],
)
def test_an_agent_that_does_not_fit_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        factory.build_agent(tiny(**{'env.name': 'catch', **changes}), envs.make('catch').spec)


def test_every_field_of_a_core_is_an_option():
    options = {'layers': 3, 'memory': 5}
    config = tiny(**{'model.core': 'transformer', 'model.core_options': options})
    rl_config.validate(config)
    agent = factory.build_agent(config, envs.make('xland').spec)
    assert agent.initial_carry(2)['core']['inputs'].shape == (2, 5, 3, config.model.hidden)


def test_a_config_from_before_core_options_builds_the_same_agent():
    spec = envs.make('xland').spec
    config = tiny().unlock()
    agent = factory.build_agent(config, spec)
    del config.model['core_options']
    rl_config.validate(config)
    assert jax.tree.map(jnp.shape, factory.build_agent(config, spec).initial_carry(2)) == (
        jax.tree.map(jnp.shape, agent.initial_carry(2))
    )


@pytest.mark.parametrize(
    ('core', 'options', 'message'),
    [
        ('transformer', {'layer': 3}, r"core_options\.layer is unknown .* did you mean 'layers'"),
        ('transformer', {'layers': 'three'}, r"layers = 'three': expected int"),
        (
            'transformer',
            {'heads': 3},
            "expected a multiple of 3, the transformer's number of heads",
        ),
        ('lstm', {'layers': 3}, r"core_options\.layers is unknown to 'lstm'"),
        ('none', {'layers': 3}, 'it has no options'),
    ],
)
def test_an_option_that_the_core_does_not_have_is_refused(core, options, message):
    config = tiny(**{'model.core': core, 'model.core_options': options})
    with pytest.raises(UserError, match=message):
        factory.build_agent(config, envs.make('xland').spec)
