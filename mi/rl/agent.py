"""The agent: torso → [instruction] → [core input] → core → [read-out], with optional fusion sites.

Shapes: T steps, B environments, L tokens, A actions, H core features, m context features. All
inputs and outputs are [T, B, …], with T = 1 for a step of an actor. Default sizes are those of the
public IMPALA code where they are known.
"""

import functools
from collections.abc import Callable, Collection, Mapping
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
from mi.rl.instructions import (
    InstructionEncoder,
    encode_once_per_instruction,
    fuse_once_per_instruction,
)
from mi.rl.torsos import TORSOS_BY_NAME, Shallow

Site = Literal['instruction', 'core_input', 'readout']
Source = Literal['task', 'embedding', 'inferred', 'instruction', 'state']
Torso = Literal['auto', 'dense', 'conv', 'shallow', 'deep']
SITES, SOURCES, TORSOS = get_args(Site), get_args(Source), get_args(Torso)

Params = Mapping[str, Any]  # the agent's parameters, as Flax nests them
Carry = dict[str, Any]  # 'core' and 'context' → the state of that cell, [B, …]


class Inputs(NamedTuple):
    """Inputs of the agent at each step, [T, B, …].

    Attributes:
      observation: name → array, as in `Spec.observation` of the environment. 'instruction' holds
        tokens or their encoding from `encode_instruction`.
      action: int32, the previous action, which is ignored where `is_first` is True.
      reward: float32, the reward of the previous action, which is ignored where `is_first` is True.
      is_first: bool, whether an episode starts at this step, which resets the state of the core.
    """

    observation: Mapping[str, Array]
    action: Array
    reward: Array
    is_first: Array


class Outputs(NamedTuple):
    """Outputs of the agent at each step.

    Attributes:
      logits: logits of the policy, f32 [T, B, A].
      value: value, normalized by the PopArt statistics of the task, f32 [T, B].
    """

    logits: Array
    value: Array


class Context(NamedTuple):
    """The second input of a fusion.

    Attributes:
      z: [T, B, m], or int32 [T, B] if the fusion takes the index of a one-hot context.
      options: arguments of the fusion's constructor that describe z.
      is_new: bool [T, B], whether an episode starts or z, an instruction, has changed since the
        previous step. None if z is not an instruction.
    """

    z: Array
    options: Mapping[str, object]
    is_new: Array | None = None


class StateContext(nn.Module):
    """A context computed from the core's output h, c = relu(A₂ relu(A₁h + a₁) + a₂).

    Maps h [..., H] to c [..., m]. With `he_normal` weights each layer preserves the mean square of
    its input, so c and h initially have the same mean square.

    Source: Jayakumar et al. (ICLR 2020) use c = relu(MLP(h)) at the read-outs (recalled). Depth and
    widths are ours.

    Attributes:
      features: width of both layers, m.
      dtype: dtype of the products.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        for layer in ('hidden', 'out'):
            V_init = initializers.he_normal()
            h = nn.relu(Affine(self.features, self.dtype, V_init=V_init, name=layer)(h))
        return h


class Agent(nn.Module):
    """One network for all tasks.

        v_t = torso(observation_t)                           [F]
        i_t = encode(instruction_t)
        v_t = relu(fuse(v_t, i_t))                           [F]   site 'instruction'
        u_t = [v_t, onehot(a_{t−1}), clip(r_{t−1})]
        z_t = context(task_t, u_t, i_t)                      [m]
        u_t = relu(fuse(u_t, z_t))                           [F]   site 'core_input'
        h_t = core(u_t, h_{t−1})                             [H]
        logits_t, value_t = fuse(h_t, z_t)                         site 'readout', otherwise affine

    The context z_t depends on `source`:

        'task'          the one-hot index of the task
        'embedding'     a learned vector for each task
        'inferred'      the state of a small LSTM that reads u up to step t and never the task
        'instruction'   the encoded instruction
        'state'         a function of h_t (`StateContext`), only for the site 'readout'

    If `use_instruction` is True, an instruction that is neither fused at a site nor the context is
    concatenated to u_t. The value finally passes through an affine map with a gain and a shift for
    each task, which PopArt rescales when its statistics change (`mi.rl.popart`).

    Attributes:
      spec: spec of the environment.
      torso: a name in `TORSOS`. 'auto' is 'dense' for grids and features, and for pixels it is
        'shallow', or 'deep' if the picture is smaller than `Shallow.min_side`.
      features: number of torso features, F. Defaults to 256, as in IMPALA.
      core: constructor of a cell from `mi.cells`, or None for no memory.
      sites: sites with a fusion, a subset of `SITES`.
      source: source of the context, one of `SOURCES`.
      context: number of context features, m, unused if `source` is 'task'.
      fusion: constructor of the module (x, z) → y, such as an entry of `mi.fusion.FUSIONS`.
      use_instruction: whether to encode instructions.
      dtype: dtype of the products. Parameters, state and outputs are f32.
    """

    spec: Spec
    torso: Torso = 'auto'
    features: int = 256
    core: Callable[..., Any] | None = functools.partial(cells.LSTM, 256)
    sites: tuple[Site, ...] = ('readout',)
    source: Source = 'task'
    context: int = 32
    fusion: Callable[..., nn.Module] = MultiplicativeInteraction
    use_instruction: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, carry: Carry, inputs: Inputs) -> tuple[Carry, Outputs]:
        """Return the carry after the last step and the outputs of every step.

        Args:
          carry: carry from `initial_carry` or the previous call.
          inputs: inputs of the agent, [T, B, …].

        Raises:
          ValueError: if the source is unknown, or does not fit the sites.
        """
        if error := explain_source(self.source, self.sites):
            raise ValueError(f'source = {self.source!r}: {error}')

        # What the agent sees and reads.
        torso = TORSOS_BY_NAME[self._torso_name()]
        v = torso(self.features, self.spec, self.dtype, name='torso')(inputs.observation)
        instruction = self._encode_instruction(inputs)
        if 'instruction' in self.sites:
            v = nn.relu(self._fuse('instruction', self.features, v, instruction))

        # The core's input, and the context that modulates it.
        u = self._core_input(v, inputs, instruction)
        context, context_carry = self._context(carry, u, inputs, instruction)
        if 'core_input' in self.sites:
            u = nn.relu(self._fuse('core_input', self.features, u, context))

        # Memory and outputs.
        h, core_carry = self._core(carry, u, inputs.is_first)
        if self.source == 'state':
            c = StateContext(self.context, self.dtype, name='context')(h)
            context = Context(c, {'context': 'dense'})
        logits, value = self._readout(h, context, inputs.observation['task'])
        return context_carry | core_carry, Outputs(logits, value)

    def initial_carry(self, batch_size: int) -> Carry:
        """Return the all-zero initial carry of an episode."""
        carry: Carry = {}
        if self.core is not None:
            carry['core'] = self.core(parent=None).initial(batch_size)
        if self.source == 'inferred':
            carry['context'] = cells.initial_carry(batch_size, self.context)
        return carry

    def _torso_name(self) -> str:
        """Return the name of the torso, after resolving 'auto'."""
        if self.torso != 'auto':
            return self.torso
        if 'pixels' not in self.spec.observation:
            return 'dense'
        height, width, _ = self.spec.observation['pixels'].shape
        return 'shallow' if min(height, width) >= Shallow.min_side else 'deep'

    def _encode_instruction(self, inputs: Inputs) -> Context | None:
        """Return the encoded instructions as a context, or None if the agent does not read them.

        Instructions that are already encoded, for example by a `Policy`, are used as they are.
        """
        if not is_instructed(self):
            return None
        instruction = inputs.observation['instruction']
        changes = (instruction[1:] != instruction[:-1]).any(-1)
        is_new = inputs.is_first | jnp.pad(changes, ((1, 0), (0, 0)))

        # The parameters are made here and not in a submodule, because the encoder is applied as a
        # pure function inside of a `lax.cond`.
        encoder = InstructionEncoder(self.spec.vocabulary, dtype=self.dtype, parent=None)
        one_token = jnp.zeros((1, 1), jnp.int32)
        params = self.param(
            'instruction_encoder', lambda rng_key: encoder.init(rng_key, one_token)['params']
        )
        if jnp.issubdtype(instruction.dtype, jnp.integer):
            encode = functools.partial(encoder.apply, {'params': params})
            instruction = encode_once_per_instruction(encode, instruction, is_new)
        return Context(instruction, {'context': 'dense'}, is_new)

    def _core_input(self, v: Array, inputs: Inputs, instruction: Context | None) -> Array:
        """Append the previous action, the reward, and an instruction not used elsewhere."""
        is_first = inputs.is_first[..., None]
        action = jax.nn.one_hot(inputs.action, self.spec.actions, dtype=self.dtype)
        action = jnp.where(is_first, 0, action)
        reward = jnp.where(is_first, 0, jnp.clip(inputs.reward[..., None], -1, 1))
        u = jnp.concatenate([v, action, reward.astype(self.dtype)], axis=-1)
        is_fused = 'instruction' in self.sites or self.source == 'instruction'
        if instruction is not None and not is_fused:
            u = jnp.concatenate([u, instruction.z], axis=-1)
        return u

    def _context(
        self, carry: Carry, u: Array, inputs: Inputs, instruction: Context | None
    ) -> tuple[Context | None, Carry]:
        """Return the context for the last two sites, and the carry of its LSTM if there is one.

        A context computed from the core's output is None before the core has run.
        """
        task, num_tasks = inputs.observation['task'], len(self.spec.tasks)
        match self.source:
            case 'task' if takes_ids(self.fusion):
                return Context(task, {'context': 'one_hot', 'contexts': num_tasks}), {}
            case 'task':
                z = jax.nn.one_hot(task, num_tasks, dtype=self.dtype)
                return Context(z, {'context': 'one_hot'}), {}
            case 'embedding':
                table_shape = num_tasks, self.context
                embeddings = self.param('task_embedding', initializers.normal(1.0), table_shape)
                return Context(embeddings[task].astype(self.dtype), {'context': 'dense'}), {}
            case 'inferred':
                context_lstm = cells.LSTM(self.context, dtype=self.dtype, name='context')
                next_carry, z = context_lstm(carry['context'], u, inputs.is_first)
                return Context(z, {'context': 'dense'}), {'context': next_carry}
            case 'instruction':
                return instruction, {}
            case 'state':
                return None, {}
        raise ValueError(f'source = {self.source!r}: expected one of {", ".join(SOURCES)}')

    def _fuse(self, site: Site, features: int, x: Array, context: Context | None) -> Array:
        """Fuse x [T, B, n] with the context at a site into [T, B, features]."""
        if context is None:
            raise ValueError(
                f'site {site!r} needs an instruction, but this agent does not read any. Try '
                f'use_instruction=True'
            )
        fusion = self.fusion(features, dtype=self.dtype, **context.options, name=site)
        if context.is_new is not None:
            return fuse_once_per_instruction(fusion, x, context.z, context.is_new)
        fused: Array = fusion(x, context.z)
        return fused

    def _core(self, carry: Carry, u: Array, is_first: Array) -> tuple[Array, Carry]:
        """Return the core's outputs [T, B, H] and its carry."""
        if self.core is None:
            return nn.relu(Affine(self.features, self.dtype, name='core')(u)), {}
        next_carry, h = self.core(dtype=self.dtype, name='core')(carry['core'], u, is_first)
        return h, {'core': next_carry}

    def _readout(self, h: Array, context: Context | None, task: Array) -> tuple[Array, Array]:
        """Return logits [T, B, A] and value [T, B], after PopArt's affine map of the value."""
        num_outputs, num_tasks = self.spec.actions + 1, len(self.spec.tasks)
        if 'readout' in self.sites:
            outputs = self._fuse('readout', num_outputs, h, context)
        else:
            outputs = Affine(num_outputs, self.dtype, name='readout')(h)
        gain = self.param('gain', initializers.ones, (num_tasks,))
        shift = self.param('shift', initializers.zeros, (num_tasks,))
        value = gain[task] * outputs[..., -1].astype(jnp.float32) + shift[task]
        return outputs[..., :-1].astype(jnp.float32), value


def explain_source(source: Source, sites: Collection[Site]) -> str:
    """Return why a context source does not fit the sites, or '' if it does."""
    if source == 'state' and ('readout' not in sites or 'core_input' in sites):
        return (
            f"the context is a function of the core's output: expected the site 'readout' and not "
            f"'core_input' (got sites {tuple(sites)}). Try sites = ('readout',), or source = "
            f"'inferred' for a context before the core"
        )
    is_read = 'core_input' in sites or 'readout' in sites
    if source != 'task' and not is_read and (source, *sites) != ('instruction', 'instruction'):
        return (
            f"no site reads this context: expected the site 'core_input' or 'readout' (got sites "
            f"{tuple(sites)}). Try sites = ('core_input',), or source = 'task'"
        )
    return ''


def forward(agent: Agent, params: Params, carry: Carry, inputs: Inputs) -> tuple[Carry, Outputs]:
    """Apply an agent with the given parameters to inputs [T, B, …]."""
    return agent.apply({'params': params}, carry, inputs)  # type: ignore[return-value,unused-ignore]


def is_instructed(agent: Agent) -> bool:
    """Return whether the agent reads instructions."""
    return bool(agent.spec.vocabulary) and agent.use_instruction


def encode_instruction(agent: Agent, params: Params, tokens: Array) -> Array:
    """Encode tokens [..., L] as [..., hidden], which may replace the tokens in `Inputs`."""
    encoder = InstructionEncoder(agent.spec.vocabulary, dtype=agent.dtype)
    return encoder.apply({'params': params['instruction_encoder']}, tokens)  # type: ignore[return-value,unused-ignore]


def takes_ids(constructor: Callable[..., nn.Module]) -> bool:
    """Return whether a fusion accepts indices of one-hot contexts, which is many times cheaper."""
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    return 'contexts' in getattr(constructor, '__dataclass_fields__', {})
