"""The agent: torso → [instruction] → [core input] → core → [read-out], a fusion at each site.

Shapes: T steps, B environments, tokens L, A actions, H core features, m context; all inputs and
outputs are [T, B, …], for an actor's step T = 1. Sizes known from public IMPALA code are quoted
where they are the default.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.nn import initializers
from jax.typing import DTypeLike

from mi import cells
from mi.layers import Affine, MultiplicativeInteraction
from mi.rl.envs.spec import Spec
from mi.rl.instructions import InstructionEncoder, fused_per_instruction, once_per_instruction
from mi.rl.torsos import TORSOS_BY_NAME, Shallow

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
            carry['context'] = cells.initial_carry(batch, self.context)
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


def takes_ids(constructor: Callable[..., nn.Module]) -> bool:
    """Whether a fusion takes integers for one-hot contexts, which is many times cheaper."""
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    return 'contexts' in getattr(constructor, '__dataclass_fields__', {})
