"""The agent: torso → [instruction] → [core input] → core → [read-out], a fusion at each site.

Shapes: T steps, B environments, tokens L, A actions, H core features, m context; all inputs and
outputs are [T, B, …], for an actor's step T = 1. Sizes known from public IMPALA code are quoted
where they are the default.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cells, cost
from mi.layers import Affine, MultiplicativeInteraction
from mi.rl.convolution import convolve
from mi.rl.envs.spec import Spec

Site = Literal['instruction', 'core_input', 'readout']
Source = Literal['task', 'embedding', 'inferred', 'instruction']
Torso = Literal['auto', 'dense', 'conv', 'shallow', 'deep']
SITES, SOURCES, TORSOS = get_args(Site), get_args(Source), get_args(Torso)

Carry = dict[str, Any]


class Inputs(NamedTuple):
    """What the agent sees at each step, [T, B, …].

    Attributes:
      observation: name → array, as the environment's `Spec.observation`; 'instruction' as tokens,
        or encoded by `encode_instruction`.
      action: int32, the one before; not looked at where `is_first`.
      reward: float32, of the action before; not looked at where `is_first`.
      is_first: bool, whether an episode starts here; the core's state is reset there.
    """

    observation: Mapping[str, Array]
    action: Array
    reward: Array
    is_first: Array


class Outputs(NamedTuple):
    """What the agent says at each step.

    Attributes:
      logits: [T, B, A] of the policy, f32.
      value: [T, B] in the units of the task's PopArt statistics, f32.
    """

    logits: Array
    value: Array


class Agent(nn.Module):
    """One network for all tasks.

        v_t = torso(observation_t)                           [F]
        v_t = fuse(v_t, instruction_t)                       [F]   site 'instruction'
        u_t = [v_t, onehot(a_{t−1}), clip(r_{t−1})]
        u_t = fuse(u_t, z_t)                                 [F]   site 'core_input'
        h_t = core(u_t, h_{t−1})                             [H]
        logits_t, value_t = fuse(h_t, z_t)  or affine maps         site 'readout'

    The context z_t of the last two sites is one of: the task's index, one-hot ('task'); a learnt
    vector of the task ('embedding'); what a small LSTM of the agent's own makes of v, a and r up to
    now, without being told the task ('inferred'); the encoded instruction ('instruction').
    An instruction that is at no site and no context is joined to u_t by concatenation where
    `see_instruction`.

    The value passes an affine map of its own for each task, gain and shift [tasks], which PopArt
    rescales when its statistics change (`mi.rl.popart`).

    Attributes:
      spec: of the environment.
      torso: 'auto' for 'dense' on grids and features; on pixels for 'shallow', or 'deep' where the
        picture is smaller than `Shallow.least`.
      features: F, 256 as in IMPALA.
      core: constructor of a cell of `mi.cells`; None for no memory.
      sites: where the fusion is; none, one or several.
      source: of the context.
      context: m, for all sources but 'task'.
      fusion: constructor of the module (x, z) → y, one of `mi.fusion.FUSIONS`.
      see_instruction: whether instructions are encoded at all.
      dtype: of the products; parameters, state and outputs are f32.
    """

    spec: Spec
    torso: Torso = 'auto'
    features: int = 256
    core: Callable[..., Any] | None = functools.partial(cells.LSTM, 256)
    sites: tuple[Site, ...] = ('readout',)
    source: Source = 'task'
    context: int = 32
    fusion: Callable[..., nn.Module] = MultiplicativeInteraction
    see_instruction: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, inputs: Inputs) -> tuple[Carry, Outputs]:
        """Carry, inputs [T, B, …] → the carry after the last step, outputs of every step."""
        spec, dtype = self.spec, self.dtype
        fuse = functools.partial(self.fusion, dtype=dtype)
        task = inputs.observation['task']
        before, after = carry, dict(carry)

        v = TORSOS_BY_NAME[self._torso()](self.features, spec, dtype, name='torso')(
            inputs.observation
        )
        instruction: Any = None
        is_new = inputs.is_first  # where the instruction is
        if reads_instructions(self):
            encoder = InstructionEncoder(spec.vocabulary, dtype=dtype, parent=None)
            given = instruction = inputs.observation['instruction']
            changes = (given[1:] != given[:-1]).any(-1)
            is_new = is_new | jnp.pad(changes, ((1, 0), (0, 0)))
            tokens = jnp.zeros((1, 1), jnp.int32)
            params = self.param(
                'instruction_encoder', lambda key: encoder.init(key, tokens)['params']
            )
            if jnp.issubdtype(given.dtype, jnp.integer):
                encode = functools.partial(encoder.apply, {'params': params})
                instruction = once_per_instruction(encode, given, is_new)
        if 'instruction' in self.sites:
            meet = fuse(self.features, context='dense', name='instruction')
            v = nn.relu(fused_per_instruction(meet, v, instruction, is_new))

        first = inputs.is_first[..., None]
        action = jnp.where(first, 0, jax.nn.one_hot(inputs.action, spec.actions, dtype=dtype))
        reward = jnp.where(first, 0, jnp.clip(inputs.reward[..., None], -1, 1)).astype(dtype)
        u = jnp.concatenate([v, action, reward], axis=-1)
        elsewhere = 'instruction' in self.sites or self.source == 'instruction'
        if instruction is not None and not elsewhere:
            u = jnp.concatenate([u, instruction], axis=-1)

        kind: dict[str, Any] = {'context': 'dense'}
        z: Any = None
        if self.source == 'task':
            kind = {'context': 'one_hot'}
            if takes_ids(self.fusion):
                z, kind['contexts'] = task, len(spec.tasks)
            else:
                z = jax.nn.one_hot(task, len(spec.tasks), dtype=dtype)
        elif self.source == 'embedding':
            shape = len(spec.tasks), self.context
            z = self.param('task_embedding', initializers.normal(1.0), shape)[task].astype(dtype)
        elif self.source == 'instruction':
            z = instruction
        elif self.source == 'inferred':
            own = cells.LSTM(self.context, dtype=dtype, name='context')
            after['context'], z = own(before['context'], u, inputs.is_first)

        def met(site: str, features: int, x: Array) -> Array:
            meet = fuse(features, **kind, name=site)
            if self.source == 'instruction':
                return fused_per_instruction(meet, x, z, is_new)
            return meet(x, z)

        if 'core_input' in self.sites:
            u = nn.relu(met('core_input', self.features, u))
        if self.core is None:
            h = nn.relu(Affine(self.features, dtype, name='core')(u))
        else:
            after['core'], h = self.core(dtype=dtype, name='core')(
                before['core'], u, inputs.is_first
            )

        if 'readout' in self.sites:
            y = met('readout', spec.actions + 1, h)
        else:
            y = Affine(spec.actions + 1, dtype, name='readout')(h)
        logits, raw = y[..., :-1], y[..., -1]
        gain = self.param('gain', initializers.ones, (len(spec.tasks),))
        shift = self.param('shift', initializers.zeros, (len(spec.tasks),))
        value = gain[task] * raw.astype(jnp.float32) + shift[task]
        return after, Outputs(logits.astype(jnp.float32), value)

    def initial_carry(self, batch: int) -> Carry:
        """The state before the first step of an episode: zeros."""
        carry: Carry = {}
        if self.core is not None:
            carry['core'] = self.core(parent=None).initial(batch)
        if self.source == 'inferred':
            carry['context'] = cells.initial(batch, self.context)
        return carry

    def _torso(self) -> str:
        if self.torso != 'auto':
            return self.torso
        if 'pixels' not in self.spec.observation:
            return 'dense'
        height, width, _ = self.spec.observation['pixels'].shape
        return 'shallow' if min(height, width) >= Shallow.least else 'deep'


def forward(agent: Agent, params: Any, carry: Carry, inputs: Inputs) -> tuple[Carry, Outputs]:
    """The agent with these parameters, on inputs [T, B, …]."""
    return agent.apply({'params': params}, carry, inputs)  # type: ignore[return-value,unused-ignore]


def reads_instructions(agent: Agent) -> bool:
    return bool(agent.spec.vocabulary) and agent.see_instruction


def encode_instruction(agent: Agent, params: Any, tokens: Array) -> Array:
    """Tokens [..., L] → what the agent's inputs may hold in their place, [..., hidden]."""
    encoder = InstructionEncoder(agent.spec.vocabulary, dtype=agent.dtype)
    return encoder.apply({'params': params['instruction_encoder']}, tokens)  # type: ignore[return-value,unused-ignore]


INSTRUCTIONS = 4  # of a column that are looked at one by one


def once_per_instruction(encode: Callable[[Array], Any], tokens: Array, is_new: Array) -> Array:
    """encode(tokens) for tokens [T, B, L] that change where `is_new` alone, [T, B, …].

    Where no column has more than `INSTRUCTIONS` of them, only one row of each is encoded: for 20
    steps a fifth of the work. Otherwise, and where it would not be less work, every row is.
    """
    T, _, L = tokens.shape
    if 2 * INSTRUCTIONS >= T or INSTRUCTIONS >= L:
        return encode(tokens)
    number, begins, few = _instructions(is_new)

    def some() -> Array:
        encoded = encode(jnp.take_along_axis(tokens, begins[..., None], axis=0))
        return jnp.take_along_axis(encoded, number[..., None], axis=0, mode='clip')

    return jax.lax.cond(few, some, lambda: encode(tokens))


def fused_per_instruction(meet: nn.Module, x: Array, z: Array, is_new: Array) -> Array:
    """meet(x, z) for x [T, B, n] and z [T, B, m] that changes where `is_new` alone, [T, B, k].

    As `once_per_instruction`: x meets each of the column's few z, and each step keeps its own. A
    full form, which contracts z first, has a quarter of the work then for 20 steps; where it would
    not be half of it, every row meets its own z alone.
    """
    if meet.is_initializing() or len(x) <= 2 * INSTRUCTIONS or not _halved(meet, x, z):
        return meet(x, z)
    number, begins, few = _instructions(is_new)

    def some(meet: nn.Module, x: Array, z: Array) -> Array:
        of_instructions = jnp.take_along_axis(z, begins[..., None], axis=0)
        y = meet(x[None], of_instructions[:, None])
        return jnp.take_along_axis(y, number[None, ..., None], axis=0, mode='clip')[0]

    return nn.cond(few, some, lambda meet, x, z: meet(x, z), meet, x, z)  # type: ignore[no-any-return,unused-ignore]


def _halved(meet: nn.Module, x: Array, z: Array) -> bool:
    """Whether meeting every z of `INSTRUCTIONS` is half the products of meeting one z a step."""
    (T, B, n), m, dtype = x.shape, z.shape[-1], x.dtype
    apply, variables = meet.clone(parent=None, name=None).apply, meet.variables

    def flops(*axes: tuple[int, ...]) -> int:
        x, z = (jax.ShapeDtypeStruct(a, dtype) for a in axes)
        return cost.flops(apply, variables, x, z)

    shared = flops((1, T, B, n), (INSTRUCTIONS, 1, B, m))
    return 2 * shared <= flops((T, B, n), (T, B, m))


def _instructions(is_new: Array) -> tuple[Array, Array, Array]:
    """Of columns [T, B]: each row's instruction, counted from 0; where each begins; whether few."""
    later = is_new & (jnp.arange(len(is_new)) > 0).reshape(-1, 1)
    number = jnp.cumsum(later, axis=0)  # [T, B]
    of_number = number[None] == jnp.arange(INSTRUCTIONS).reshape(-1, 1, 1)
    begins = of_number.argmax(1)  # [INSTRUCTIONS, B]
    return number, begins, (number < INSTRUCTIONS).all()


def takes_ids(constructor: Callable[..., nn.Module]) -> bool:
    """Whether a fusion takes integers for one-hot contexts, which is many times cheaper."""
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    return 'contexts' in getattr(constructor, '__dataclass_fields__', {})


_conv = functools.partial(nn.Conv, conv_general_dilated=convolve)


class Dense(nn.Module):
    """Grids as one-hot categories, and features, through two dense layers.

    A convolution's gradient inside a scan is 10 to 20 times slower than this on XLA's CPU backend.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = jnp.concatenate(_flat(observation, self.spec, self.dtype), axis=-1)
        for name in ('hidden', 'out'):
            x = nn.relu(_affine(self.features, self.dtype, name)(x))
        return x


class Conv(nn.Module):
    """A grid of one-hot categories through two 3 × 3 convolutions and a dense layer."""

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = _images(_one_hot(observation['grid'], self.spec.categories, self.dtype))
        for i, channels in enumerate((32, 64)):
            x = nn.relu(_conv(channels, (3, 3), dtype=self.dtype, name=f'conv_{i}')(x))
        return _read(x, observation, self.spec, self.features, self.dtype)


class Shallow(nn.Module):
    """The convolutions of DQN (Mnih et al., 2015): 32 of 8 × 8, 64 of 4 × 4, 64 of 3 × 3."""

    least: ClassVar[int] = 36  # pixels of a side: fewer leave nothing for the last convolution
    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = _images(observation['pixels'].astype(self.dtype) / 255)
        for i, (channels, size, stride) in enumerate(((32, 8, 4), (64, 4, 2), (64, 3, 1))):
            conv = _conv(
                channels,
                (size, size),
                (stride, stride),
                'VALID',
                dtype=self.dtype,
                name=f'conv_{i}',
            )
            x = nn.relu(conv(x))
        return _read(x, observation, self.spec, self.features, self.dtype)


class Deep(nn.Module):
    """The residual network of IMPALA (Espeholt et al., 2018): (16, 32, 32) channels, 2 blocks each.

    A section is a convolution, a max pool of 3 × 3 with stride 2, and two residual blocks
    x + conv(relu(conv(relu(x)))), all 3 × 3.
    """

    features: int
    spec: Spec
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, observation: Mapping[str, Array]) -> Array:
        x = _images(observation['pixels'].astype(self.dtype) / 255)
        for i, channels in enumerate((16, 32, 32)):
            conv = functools.partial(_conv, channels, (3, 3), dtype=self.dtype)
            x = conv(name=f'section_{i}')(x)
            x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
            for j in range(2):
                block = conv(name=f'section_{i}_block_{j}_in')(nn.relu(x))
                x = x + conv(name=f'section_{i}_block_{j}_out')(nn.relu(block))
        return _read(nn.relu(x), observation, self.spec, self.features, self.dtype)


TORSOS_BY_NAME: dict[str, Callable[..., nn.Module]] = {
    'dense': Dense,
    'conv': Conv,
    'shallow': Shallow,
    'deep': Deep,
}


class InstructionEncoder(nn.Module):
    """Tokens [..., L], 0 for padding → the LSTM's state after the last of them [..., hidden].

    Embedding 20 and hidden 64 are those of IMPALA's public code. Without any token it is zero.
    """

    vocabulary: int
    embed: int = 20
    hidden: int = 64
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        rows = tokens.reshape(-1, tokens.shape[-1]).T  # [L, rows]
        table = self.param('embedding', initializers.normal(1.0), (self.vocabulary, self.embed))
        lstm = cells.LSTM(self.hidden, dtype=self.dtype, name='lstm')
        _, h = lstm(cells.initial(rows.shape[1], self.hidden), table[rows].astype(self.dtype))
        there = rows > 0
        last = jnp.maximum(there.sum(0) - 1, 0)
        state = jnp.take_along_axis(h, last[None, :, None], axis=0)[0]
        state = jnp.where(there.any(0)[:, None], state, 0)
        return state.reshape(*tokens.shape[:-1], self.hidden)


def _affine(features: int, dtype: DTypeLike, name: str) -> Affine:
    return Affine(features, dtype, V_init=initializers.he_normal(), name=name)


def _one_hot(grid: Array, categories: tuple[int, ...], dtype: DTypeLike) -> Array:
    """[..., h, w, layers] → [..., h, w, Σ categories]."""
    return jnp.concatenate(
        [jax.nn.one_hot(grid[..., i], c, dtype=dtype) for i, c in enumerate(categories)], axis=-1
    )


def _flat(observation: Mapping[str, Array], spec: Spec, dtype: DTypeLike) -> list[Array]:
    """The grid, one-hot, and the features of an observation, each as vectors [T, B, n]."""
    parts = []
    if 'grid' in observation:
        x = _one_hot(observation['grid'], spec.categories, dtype)
        parts.append(x.reshape(*x.shape[:-3], -1))
    if 'features' in observation:
        parts.append(observation['features'].astype(dtype))
    return parts


def _images(x: Array) -> Array:
    """[T, B, h, w, c] → [T · B, h, w, c]."""
    return x.reshape(-1, *x.shape[-3:])


def _read(
    x: Array, observation: Mapping[str, Array], spec: Spec, features: int, dtype: DTypeLike
) -> Array:
    """The convolutions' last layer, and the observation's features, through a dense layer."""
    x = x.reshape(*observation['task'].shape, -1)
    if 'features' in observation:
        x = jnp.concatenate([x, observation['features'].astype(dtype)], axis=-1)
    return nn.relu(_affine(features, dtype, 'out')(x))
