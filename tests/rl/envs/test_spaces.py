import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.config import UserError
from mi.rl import envs, factory
from mi.rl.envs import spaces
from tests.rl.test_train import tiny

gymnasium = pytest.importorskip('gymnasium', reason='the extra gym is not installed')
from gymnasium.spaces import (  # noqa: E402
    Box,
    Dict,
    Discrete,
    Graph,
    MultiBinary,
    MultiDiscrete,
    Sequence,
    Tuple,
)

ID = 'gymnasium/tests.rl.envs.foreign:Foreign-v0'


def bytes_(*shape):
    return Box(0, 255, shape, np.uint8)


def floats(*shape, low=-np.inf):
    return Box(low, 1.0 if np.isfinite(low) else np.inf, shape, np.float32)


@pytest.mark.parametrize(
    ('space', 'shape'),
    [
        *((bytes_(10, 10, 3), (10, 10, 3)), (bytes_(30, 30, 3), (30, 30, 3))),
        *((bytes_(3, 64, 48), (64, 48, 3)), (bytes_(84, 84), (84, 84, 1))),
        *((bytes_(16, 40, 40), (40, 40, 16)), (floats(12, 9, 3, low=0.0), (12, 9, 3))),
        *((bytes_(1, 36, 36), (36, 36, 1)), (bytes_(2, 2, 3), (2, 2, 3))),
    ],
    ids=str,
)
def test_pictures_are_pixels_with_the_channels_last(space, shape):
    """And the agent has a torso for them, however small they are."""
    pool = envs.pool(ID, 2, 0, {'observation_space': space})
    assert pool.spec.observation['pixels'].shape == shape
    step = pool.reset()
    assert step.observation['pixels'].shape == (2, *shape)
    assert step.observation['pixels'].dtype == np.uint8
    agent = factory.build_agent(tiny(**{'env.name': ID}), pool.spec)
    params = jax.eval_shape(lambda: factory.init_params(agent, jax.random.key(0)))
    assert all(0 not in leaf.shape for leaf in jax.tree.leaves(params))
    pool.close()


def test_pixels_are_those_of_the_picture():
    _, shape, convert = spaces.observation(bytes_(3, 8, 7))
    picture = np.arange(3 * 8 * 7, dtype=np.uint8).reshape(3, 8, 7)
    assert shape == (8, 7, 3)
    np.testing.assert_array_equal(convert(picture)[..., 1], picture[1])
    _, _, convert = spaces.observation(Box(-1.0, 1.0, (5, 6, 3), np.float32))
    assert convert(np.full((5, 6, 3), -1.0)).max() == 0
    assert convert(np.full((5, 6, 3), 1.0)).min() == 255
    assert convert(np.zeros((5, 6, 3))).max() in (127, 128)


@pytest.mark.parametrize(
    ('space', 'value', 'features'),
    [
        (Discrete(4), 2, [0, 0, 1, 0]),
        (Discrete(3, start=5), 6, [0, 1, 0]),
        (MultiBinary(3), np.array([1, 0, 1]), [1, 0, 1]),
        (MultiDiscrete([2, 3]), np.array([1, 2]), [0, 1, 0, 0, 1]),
        (floats(), np.float32(0.5), [0.5]),
        (floats(2, 2), np.array([[1.0, 2.0], [3.0, 4.0]]), [1, 2, 3, 4]),
        (Tuple([Discrete(2), floats(1)]), (1, np.array([7.0])), [0, 1, 7]),
        (Dict(a=floats(1), b=Discrete(2)), {'a': np.array([7.0]), 'b': 0}, [7, 1, 0]),
    ],
    ids=str,
)
def test_other_spaces_are_features(space, value, features):
    entry, shape, convert = spaces.observation(space)
    assert (entry, shape) == ('features', (len(features),))
    assert convert(value).tolist() == features
    assert convert(value).dtype == np.float32


@pytest.mark.parametrize(
    ('space', 'said'),
    [
        (floats(0), 'has 0 numbers'),
        (bytes_(0, 64, 3), 'has 0 numbers'),
        (Discrete(10**6), 'has 1,000,000 numbers'),
        (Dict(image=bytes_(64, 64, 3), speed=floats(1)), 'a single image, or no images'),
        (Sequence(floats(1)), 'expected a fixed size'),
        (Graph(floats(1), None), 'expected a fixed size'),
    ],
    ids=str,
)
def test_an_observation_that_no_network_takes_is_refused(space, said):
    with pytest.raises(UserError, match=rf"^`env_name` = '{ID}': .* observation space .*{said}"):
        envs.pool(ID, 1, 0, {'observation_space': space})


@pytest.mark.parametrize(
    ('space', 'number'),
    [
        (Discrete(4), 4),
        (Discrete(3, start=-1), 3),
        (MultiDiscrete([2, 3]), 6),
        (MultiDiscrete([[2, 2], [3, 1]]), 12),
        (MultiDiscrete([2, 2], start=[5, 7]), 4),
        (MultiBinary(3), 8),
        (Tuple([Discrete(2), Discrete(3, start=1)]), 6),
        (Dict(a=Discrete(2), b=Tuple([MultiBinary(2), Discrete(2)])), 16),
    ],
    ids=str,
)
def test_every_action_of_a_discrete_space_has_one_number(space, number):
    count, decode = spaces.actions(space)
    assert count == number
    made = [decode(i) for i in range(number)]
    assert all(space.contains(action) for action in made)
    flat = [gymnasium.spaces.flatten(space, action) for action in made]
    assert all((a != b).any() for a, b in itertools.combinations(flat, 2))
    pool = envs.pool(ID, number, 0, {'action_space': space})
    pool.reset()
    pool.send(np.arange(number))
    assert pool.recv().reward.tolist() == [1.0] * number
    pool.close()


@pytest.mark.parametrize(
    ('space', 'said'),
    [
        (floats(2, low=0.0), 'is not discrete'),
        (Tuple([Discrete(2), floats(2, low=0.0)]), 'is not discrete'),
        (MultiBinary(11), 'has 2,048 actions: expected 1 to 1,024'),
    ],
    ids=str,
)
def test_other_actions_are_refused(space, said):
    with pytest.raises(UserError, match=f'the action space .*{said}'):
        envs.pool(ID, 1, 0, {'action_space': space})


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('nomod:Foo-v0', "No module named 'nomod'.*Install it"),
        ('tests.rl.envs.foreign:Raises-v0', 'RuntimeError: no display is there'),
        ('tests.rl.envs.foreign:Wants-v0', 'TypeError: .*size'),
        ('Foreignn-v0', 'is unknown; .*my_module:MyEnv-v0'),
        ('CartPole-v99', 'cannot be made: VersionNotFound'),
        ('', 'expected an id'),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_line(name, said):
    with pytest.raises(UserError, match=said) as raised:
        envs.pool(f'gymnasium/{name}', 1, 0)
    assert '\n' not in str(raised.value)


def test_the_arguments_of_a_constructor_are_options():
    pool = envs.pool('gymnasium/tests.rl.envs.foreign:Wants-v0', 1, 0, {'size': 7})
    assert pool.spec.observation['features'].shape == (7,)
    pool.close()


@pytest.mark.parametrize('asynchronous', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_that_are_left_alone_are_not_stepped(asynchronous):
    pool = envs.pool(ID, 3, 0, {'asynchronous': asynchronous})
    pool.reset()
    actions = jnp.zeros(3, int)
    for _ in range(5):
        pool.send(actions)
        ended = pool.recv()
    assert ended.is_last.all()
    pool.skip(np.array([False, True, False]))
    pool.send(actions)
    step = pool.recv()
    assert step.is_first.tolist() == [True, False, True]
    for _ in range(5):
        pool.send(actions)
        step = pool.recv()
    assert step.reward.tolist() == [1, 0, 1]
    assert step.is_last.tolist() == [True, False, True]
    seen = step.observation['features'][1]
    np.testing.assert_array_equal(seen, ended.observation['features'][1])
    assert pool.reset().is_first.all()
    pool.send(actions)
    assert pool.recv().reward.tolist() == [1, 1, 1]
    pool.close()
