import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mi import FUSIONS, cells, fusion
from mi.rl.agent import SOURCES, Agent, Inputs, StateContext
from mi.rl.envs.spec import Spec
from mi.rl.instructions import encode_once_per_instruction, fuse_once_per_instruction
from mi.rl.torsos import TORSOS_BY_NAME
from tests import prng
from tests.motifs.checks import drawn, random

T, B, TASKS, VOCABULARY = 4, 3, 5, 7
GRID = Spec(
    name='toy',
    observation={
        'grid': jax.ShapeDtypeStruct((3, 3, 2), jnp.int32),
        'task': jax.ShapeDtypeStruct((), jnp.int32),
        'instruction': jax.ShapeDtypeStruct((4,), jnp.int32),
    },
    actions=3,
    tasks=tuple(f'task {i}' for i in range(TASKS)),
    categories=(4, 2),
    vocabulary=VOCABULARY,
)
PIXELS = Spec(
    name='screen',
    observation={
        'pixels': jax.ShapeDtypeStruct((36, 36, 3), jnp.uint8),
        'task': jax.ShapeDtypeStruct((), jnp.int32),
    },
    actions=3,
    tasks=('only',),
)


def make(spec=GRID, fuse='mi', **options):
    sizes = {'features': 8, 'core': functools.partial(cells.LSTM, 6), 'context': 4} | options
    return Agent(spec=spec, fusion=fusion.get(fuse, rank=3, hidden=4), **sizes)


def sites_of(source):
    """The sites that a source can have, without the instruction's."""
    return ('readout',) if source == 'state' else ('core_input', 'readout')


def inputs(spec=GRID, seed=0, length=T):
    rng = np.random.default_rng(seed)
    high = {'grid': 2, 'task': len(spec.tasks), 'instruction': VOCABULARY, 'pixels': 256}
    observation = {
        name: jnp.asarray(rng.integers(high[name], size=(length, B, *a.shape)).astype(a.dtype))
        for name, a in spec.observation.items()
    }
    action = jnp.asarray(rng.integers(spec.actions, size=(length, B)), jnp.int32)
    reward = jnp.asarray(rng.normal(size=(length, B)), jnp.float32)
    return Inputs(observation, action, reward, jnp.zeros((length, B), bool))


def changed(given, row, **values):
    """The inputs with another value of some observation in one row."""
    observation = {
        name: a.at[row].set(values[name]) if name in values else a
        for name, a in given.observation.items()
    }
    return given._replace(observation=observation)


@pytest.mark.parametrize(
    'fuse',
    [
        pytest.param(word, marks=() if word in ('mi', 'multi_head') else pytest.mark.slow)
        for word in FUSIONS
    ],
)
def test_every_fusion_fits_every_site_and_all_its_parameters_learn(fuse):
    sites = ('core_input', 'readout') + (() if fuse in fusion.ONE_HOT else ('instruction',))
    agent = make(fuse=fuse, sites=sites)
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)

    def objective(variables):
        _, outputs = agent.apply(variables, carry, given)
        return (outputs.logits**2).sum() + (outputs.value**2).sum()

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(objective))(variables))
    dead = [jax.tree_util.keystr(path) for path, g in gradients if not (g != 0).any()]
    if fuse == 'none':  # which looks at no context
        dead = [name for name in dead if 'instruction_encoder' not in name]
    assert not dead


def test_every_parameter_of_a_read_out_by_the_cores_own_output_learns():
    agent = make(source='state', sites=('instruction', 'readout'))
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)

    def objective(variables):
        _, outputs = agent.apply(variables, carry, given)
        return (outputs.logits**2).sum() + (outputs.value**2).sum()

    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(objective))(variables))
    assert {'hidden', 'out'} == set(variables['params']['context'])
    assert not [jax.tree_util.keystr(path) for path, g in gradients if not (g != 0).any()]


@pytest.mark.parametrize('source', SOURCES)
def test_the_outputs_depend_on_the_task_where_the_context_is_told_it(source):
    agent = make(source=source, sites=sites_of(source), use_instruction=True)
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)
    # gain and shift are of the task by intention: set alike, what is left is the context's
    params = variables['params'] | {'gain': jnp.ones(TASKS), 'shift': jnp.zeros(TASKS)}
    apply = jax.jit(agent.apply)
    _, before = apply({'params': params}, carry, given)
    other = given._replace(
        observation=given.observation | {'task': (given.observation['task'] + 1) % TASKS}
    )
    _, after = apply({'params': params}, carry, other)
    assert bool((before.logits != after.logits).any()) == (source in ('task', 'embedding'))
    assert bool((before.value != after.value).any()) == (source in ('task', 'embedding'))


@pytest.mark.parametrize('source', ['inferred', 'state'])
def test_no_output_depends_on_a_later_input_and_the_core_remembers_earlier_ones(source):
    agent = make(source=source, sites=('instruction', *sites_of(source)))
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)
    apply = jax.jit(agent.apply)
    _, before = apply(variables, carry, given)
    _, after = apply(variables, carry, changed(given, 1, grid=1 - given.observation['grid'][1]))
    np.testing.assert_array_equal(before.logits[:1], after.logits[:1])
    assert (before.logits[1:] != after.logits[1:]).any(-1).all()


def test_an_episodes_start_forgets_what_was_before():
    agent = make(source='inferred', sites=('core_input',))
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)
    given = given._replace(is_first=given.is_first.at[2].set(True))
    apply = jax.jit(agent.apply)
    _, whole = apply(variables, carry, given)
    from_there = jax.tree.map(lambda a: a[2:], given)
    zeros = from_there._replace(
        action=from_there.action.at[0].set(0), reward=from_there.reward.at[0].set(9.0)
    )
    _, alone = apply(variables, carry, zeros)
    np.testing.assert_allclose(whole.logits[2:], alone.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.value[2:], alone.value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('source', ['inferred', 'state'])
def test_a_step_at_a_time_is_the_whole_sequence(source):
    """So the importance ratios of V-trace are 1 where actor and learner have equal parameters."""
    agent = make(source=source, sites=sites_of(source))
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)
    apply = jax.jit(agent.apply)
    _, whole = apply(variables, carry, given)
    for t in range(T):
        row = jax.tree.map(lambda a, t=t: a[t : t + 1], given)
        carry, outputs = apply(variables, carry, row)
        np.testing.assert_allclose(outputs.logits[0], whole.logits[t], rtol=1e-5, atol=1e-5)


def test_padding_of_an_instruction_is_not_read():
    agent = make(sites=('instruction',), source='task')
    given = inputs()
    padded = given.observation['instruction'].at[..., 2:].set(0).at[..., :2].set(3)
    given = given._replace(observation=given.observation | {'instruction': padded})
    longer = jnp.pad(padded, [(0, 0), (0, 0), (0, 3)])
    other = given._replace(observation=given.observation | {'instruction': longer})
    carry = agent.initial_carry(B)
    variables = drawn(agent, carry, given)
    _, before = jax.jit(agent.apply)(variables, carry, given)
    _, after = jax.jit(agent.apply)(variables, carry, other)
    np.testing.assert_allclose(before.logits, after.logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('likely', [0.05, 0.4], ids=['few episodes', 'many episodes'])
def test_instructions_are_encoded_once_per_instruction(likely):
    rng = np.random.default_rng(0)
    is_first = rng.random((21, 6)) < likely
    assert (is_first[1:].sum(0).max() < 4) == (likely == 0.05)
    tokens = np.zeros((21, 6, 9), np.int32)
    for t in range(21):
        new = is_first[t] | (t == 0)
        tokens[t] = np.where(new[:, None], rng.integers(0, 9, (6, 9)), tokens[t - 1])
    weights = rng.normal(size=(9, 2)).astype(np.float32)
    rows = []

    def counted(tokens):
        rows.append(tokens.shape[0])
        return jnp.einsum('tbl,lh->tbh', tokens.astype(jnp.float32), weights)

    got = jax.jit(lambda tokens: encode_once_per_instruction(counted, tokens, is_first))(tokens)
    np.testing.assert_allclose(got, tokens @ weights, rtol=1e-5, atol=1e-5)
    assert sorted(rows) == [4, 21]


class Meeting(nn.Module):
    fuse: nn.Module
    shared: bool

    @nn.compact
    def __call__(self, x, z, is_first):
        return (
            fuse_once_per_instruction(self.fuse, x, z, is_first) if self.shared else self.fuse(x, z)
        )


@pytest.mark.parametrize('likely', [0.05, 0.4], ids=['few episodes', 'many episodes'])
@pytest.mark.parametrize(
    'word, m, halved', [('mi', 32, True), ('concat', 8, False), ('hypernetwork', 8, True)]
)
def test_streams_meet_once_per_instruction_where_that_is_less_work(word, m, halved, likely):
    rng = np.random.default_rng(0)
    is_first = rng.random((21, 6)) < likely
    x, z = (rng.normal(size=(21, 6, n)).astype(np.float32) for n in (12, m))
    for t in range(1, 21):
        z[t] = np.where(is_first[t][:, None], z[t], z[t - 1])
    fuse = fusion.get(word, rank=3, hidden=16)(14)
    every, shared = Meeting(fuse, shared=False), Meeting(fuse, shared=True)
    variables = drawn(every, x, z, is_first)
    f, g = (
        lambda v, m=m: (lambda y: ((y**2).sum(), y))(m.apply(v, x, z, is_first))
        for m in (every, shared)
    )
    grads = [jax.jit(jax.grad(function, has_aux=True))(variables) for function in (f, g)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *grads)
    made = str(jax.make_jaxpr(shared.apply)(variables, x, z, is_first))
    assert ('cond[' in made) == halved


@pytest.mark.parametrize('torso', ['shallow', 'deep'])
def test_pixels_pass_the_convolutions(torso):
    agent = make(PIXELS, torso=torso, sites=(), core=None)
    carry, given = agent.initial_carry(B), inputs(PIXELS, length=1)
    variables = drawn(agent, carry, given)
    apply = jax.jit(agent.apply)
    _, outputs = apply(variables, carry, given)
    assert outputs.logits.shape == (1, B, 3)
    dark = changed(given, 0, pixels=jnp.zeros((B, 36, 36, 3), jnp.uint8))
    assert (outputs.logits != apply(variables, carry, dark)[1].logits).any(-1).all()


def convolved(x, layer, stride=1, padding='SAME'):
    dimensions = ('NHWC', 'HWIO', 'NHWC')
    y = jax.lax.conv_general_dilated(
        x, layer['kernel'], (stride, stride), padding, dimension_numbers=dimensions
    )
    return y + layer['bias'].reshape(1, 1, 1, -1)


def shallow(params, x):
    for i, stride in enumerate((4, 2, 1)):
        x = jnp.maximum(convolved(x, params[f'conv_{i}'], stride, 'VALID'), 0)
    return x


def deep(params, x):
    for i in range(3):
        x = convolved(x, params[f'section_{i}'])
        window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, 'SAME')
        for j in range(2):
            block = convolved(jnp.maximum(x, 0), params[f'section_{i}_block_{j}_in'])
            x += convolved(jnp.maximum(block, 0), params[f'section_{i}_block_{j}_out'])
    return jnp.maximum(x, 0)


@pytest.mark.parametrize('reference', [shallow, deep])
def test_torsos_are_the_published_layers(reference):
    torso = TORSOS_BY_NAME[reference.__name__](5, PIXELS)
    observation = inputs(PIXELS, length=1).observation
    variables = drawn(torso, observation)
    features = jax.jit(torso.apply)(variables, observation)
    params = variables['params']
    x = observation['pixels'][0].astype(jnp.float32) / 255
    x = jax.jit(reference)(params, x).reshape(B, -1)
    expected = jnp.maximum(x @ params['out']['V'] + params['out']['b'].reshape(1, -1), 0)
    np.testing.assert_allclose(features[0], expected, rtol=1e-3, atol=1e-3)


def test_the_last_reward_is_seen_between_minus_1_and_1():
    agent = make(sites=(), core=None)
    carry, given = agent.initial_carry(B), inputs()
    variables = drawn(agent, carry, given)
    apply = jax.jit(agent.apply)

    def logits(reward):
        rewards = jnp.full_like(given.reward, reward)
        return apply(variables, carry, given._replace(reward=rewards))[1].logits

    np.testing.assert_array_equal(logits(1.0), logits(5.0))
    np.testing.assert_array_equal(logits(-1.0), logits(-5.0))
    assert (logits(0.5) != logits(1.0)).any()


def test_ids_and_one_hot_contexts_are_the_same_agent():
    given = inputs()
    by_id = make()
    carry = by_id.initial_carry(B)
    variables = drawn(by_id, carry, given)
    _, outputs = jax.jit(by_id.apply)(variables, carry, given)
    p = variables['params']
    h = jax.jit(lambda v: by_id.apply(v, carry, given, capture_intermediates=True))(variables)
    h = h[1]['intermediates']['core']['__call__'][0][1]
    z = jax.nn.one_hot(given.observation['task'], TASKS)
    logits = (
        jnp.einsum('tbm,mnk,tbn->tbk', z, p['readout']['W'], h)
        + z @ p['readout']['U']
        + h @ p['readout']['V']
        + p['readout']['b'].reshape(1, 1, -1)
    )
    np.testing.assert_allclose(outputs.logits, logits[..., :-1], rtol=1e-4, atol=1e-4)


def read_out_by_equation(p, h):
    """Raw outputs [..., A + 1] of a read-out whose context is c = relu(A₂ relu(A₁h + a₁) + a₂)."""
    c = h
    for layer in ('hidden', 'out'):
        c = np.maximum(c @ p['context'][layer]['V'] + p['context'][layer]['b'], 0)
    r = p['readout']
    interaction = np.einsum('...m,mnk,...n->...k', c, r['W'], h)
    return interaction + c @ r['U'] + h @ r['V'] + r['b']


@functools.cache
def read_out_of_state():
    """An agent with a context of the core's output, its parameters, inputs and h [T, B, H]."""
    agent, given = make(source='state'), inputs()
    carry = agent.initial_carry(B)
    params = drawn(agent, carry, given)['params']
    _, captured = agent.apply({'params': params}, carry, given, capture_intermediates=True)
    h = captured['intermediates']['core']['__call__'][0][1]
    return agent, params, given, h


def test_a_read_out_by_the_cores_own_output_is_its_equation():
    agent, params, given, h = read_out_of_state()
    _, outputs = jax.jit(agent.apply)({'params': params}, agent.initial_carry(B), given)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    expected = read_out_by_equation(p, np.asarray(h, np.float64))
    task = given.observation['task']
    np.testing.assert_allclose(outputs.logits, expected[..., :-1], rtol=1e-5, atol=1e-5)
    value = p['gain'][task] * expected[..., -1] + p['shift'][task]
    np.testing.assert_allclose(outputs.value, value, rtol=1e-5, atol=1e-5)


def test_gradients_of_a_read_out_by_the_cores_own_output_are_those_of_the_equation():
    """By central differences in float64: of the context's layers, and of h, which enters twice."""
    _, params, _, h = read_out_of_state()
    heads = {name: params[name] for name in ('context', 'readout')}
    weights = np.random.default_rng(3).normal(size=(T, B, 4))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), heads)

    def reference(p, h):
        return (weights * read_out_by_equation(p, h)).sum()

    def by_modules(p, h):
        context = StateContext(4)
        c = context.apply({'params': p['context']}, h)
        y = fusion.get('mi')(4).apply({'params': p['readout']}, h, c)
        return (weights * y).sum()

    gradients = jax.jit(jax.grad(by_modules, (0, 1)))(heads, h)
    inputs_64 = (p, np.asarray(h, np.float64))
    rng = np.random.default_rng(4)
    leaves, tree = jax.tree.flatten(inputs_64)
    for leaf_index, (leaf, gradient) in enumerate(
        zip(leaves, jax.tree.leaves(gradients), strict=True)
    ):
        direction = rng.normal(size=leaf.shape)
        ends = []
        for step in (1e-6, -1e-6):
            moved = list(leaves)
            moved[leaf_index] = leaf + step * direction
            ends.append(reference(*jax.tree.unflatten(tree, moved)))
        difference = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-3, atol=1e-3)


def test_a_context_of_the_cores_output_starts_with_its_mean_square():
    h = 0.3 * random(5, 200, 64)
    context = StateContext(128)

    def mean_square(seed):
        return (context.init_with_output(prng.key(seed), h)[0] ** 2).mean()

    moments = jax.jit(jax.vmap(mean_square))(jnp.arange(64))
    np.testing.assert_allclose(moments.mean(), (h**2).mean(), rtol=0.05)
