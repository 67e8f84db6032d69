"""The training step of a language model, for one seed and for all seeds of a run.

One program updates all seeds, vmapped over a leading axis of seeds. Such arrays are marked [S, …].
Several devices divide the seeds, the batches and, with `config.train.fsdp`, the parameters. See
`mi.training.sharding`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from chex import ArrayTree
from jax import Array

from mi.lm.data.batches import Batch
from mi.lm.loss import Losses
from mi.lm.model import Carry, LanguageModel, Params
from mi.rows import get_row_indices, mean_over_rows, select_rows
from mi.training import optim, sharding

Metrics = dict[str, Array]

Result = TypeVar('Result')  # arrays of one seed, or of all seeds


@flax.struct.dataclass
class TrainState:
    """State of training. In a run, every array has a leading axis of seeds.

    Attributes:
      params: parameters of the model.
      opt_state: state of the optimizer.
      carry: state of the model after the last token of the previous batch.
    """

    params: Params
    opt_state: optax.OptState
    carry: Carry


def name_parts(train_state: TrainState) -> dict[str, ArrayTree]:
    """Return the parts of the state that must be finite, by their names in messages."""
    return {
        'parameters': train_state.params,
        'moments of the optimizer': train_state.opt_state,
    }


class Gradient(NamedTuple):
    """Gradient of a batch's mean loss.

    Attributes:
      grads: gradients, one array for each parameter.
      nats: mean loss in nats per token.
      carry: state of the model after the last token.
    """

    grads: Params
    nats: Array
    carry: Carry


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A trainer, which updates a model with an optimizer.

    Attributes:
      model: the model.
      optimizer: the optimizer.
      batch_size: number of token streams of one seed, B.
      accumulation: number of parts into which a batch is divided. Their gradients are computed one
        after another, so that only the activations of one part are in memory at a time.
    """

    model: LanguageModel
    optimizer: optax.GradientTransformation
    batch_size: int
    accumulation: int = 1

    def init(self, seed: Array) -> TrainState:
        """Return the state of one seed before the first update."""
        carry = self.model.initial_carry(self.batch_size)
        params_key, _ = jax.random.split(jax.random.key(seed))
        tokens = jnp.zeros((1, self.batch_size), jnp.int32)
        domains = tokens if self.model.source == 'domain' else None
        params = self.model.init(params_key, carry, tokens, None, domains)['params']
        return TrainState(params=params, opt_state=self.optimizer.init(params), carry=carry)

    @functools.cached_property
    def _init_seeds(self) -> Callable[[np.ndarray], TrainState]:
        """The jitted `init` of all seeds, whose trace `shapes` and `init_seeds` share."""
        return jax.jit(jax.vmap(self.init))

    def init_seeds(self, seeds: np.ndarray, mesh: jax.sharding.Mesh) -> TrainState:
        """Return the state of all seeds before the first update, [S, …], placed on the mesh."""
        shardings = jax.tree.map(lambda a: a.sharding, self.shapes(seeds, mesh))
        return sharding.jit_once(self._init_seeds, seeds, out_shardings=shardings)

    def shapes(self, seeds: np.ndarray, mesh: jax.sharding.Mesh) -> TrainState:
        """Return the shapes and shardings of `init_seeds`, as `jax.ShapeDtypeStruct`s."""
        state = jax.eval_shape(self._init_seeds, seeds)
        row_sharding = sharding.batch_sharding(mesh, 1, has_seeds=True)
        shardings = TrainState(
            params=sharding.fsdp_sharding(state.params, mesh),
            opt_state=sharding.fsdp_sharding(state.opt_state, mesh),
            carry=jax.tree.map(lambda _: row_sharding, state.carry),
        )
        return sharding.with_shardings(state, shardings)

    def batch_shapes(self, seeds: np.ndarray, length: int, mesh: jax.sharding.Mesh) -> Batch:
        """Return the shapes and shardings of a batch for all seeds, as `jax.ShapeDtypeStruct`s.

        Args:
          seeds: the seeds, int32 [S].
          length: number of predicted tokens of each stream, T.
          mesh: mesh of devices.
        """
        tokens: Any = jax.ShapeDtypeStruct(
            (len(seeds), length + 1, self.batch_size),
            jnp.int32,
            sharding=sharding.batch_sharding(mesh, 2, has_seeds=True),
        )
        seed: Any = jax.ShapeDtypeStruct(
            seeds.shape, seeds.dtype, sharding=sharding.seed_sharding(mesh)
        )
        domains = tokens if self.model.source == 'domain' else None
        return Batch(tokens, domains, seed, np.int32(0))

    def compute_gradient(
        self, params: Params, carry: Carry, batch: Batch, partition: ArrayTree | None = None
    ) -> Gradient:
        """Compute the gradient for one seed. This function is pure.

        Under `jax.shard_map`, the batch holds the rows of this device, and the gradient is averaged
        over all devices that share the batch.

        Args:
          params: shard of the parameters on this device.
          carry: state of the model before the first token.
          batch: inputs and targets.
          partition: partition of the parameters, as in `mi.training.sharding.gather_params`.
        """
        # Random keys depend on the seed and the step alone, so that a resumed run draws the same.
        _, dropout_key = jax.random.split(jax.random.key(batch.seed))
        dropout_key = jax.random.fold_in(dropout_key, batch.step)
        rngs = {'dropout': dropout_key, 'state': jax.random.fold_in(dropout_key, 0)}

        def compute_loss(
            params: Params, carry: Carry, tokens: Array, domains: Array | None
        ) -> tuple[Array, tuple[Array, Carry]]:
            losses: Losses
            next_carry, losses = self.model.apply(  # type: ignore[assignment]
                {'params': sharding.gather_params(params, partition)},
                carry,
                tokens[:-1],
                tokens[1:],
                None if domains is None else domains[:-1],
                train=True,
                rngs=rngs,
            )
            return losses.objective.mean(), (losses.nats.mean(), next_carry)

        # The gradient of the whole batch, or the mean of those of its parts.
        grad_fn = jax.grad(compute_loss, has_aux=True)
        token_rows = batch.tokens, batch.domains
        # A device that has few rows divides them into as many parts as it can.
        num_parts = math.gcd(self.accumulation, batch.tokens.shape[1])
        if num_parts == 1:
            grads, (nats, carry) = grad_fn(params, carry, *token_rows)
        else:
            grads, nats, carry = _accumulate(grad_fn, params, carry, token_rows, num_parts)
        return Gradient(sharding.mean_gradients(grads, partition), mean_over_rows(nats), carry)

    def apply_gradient(self, state: TrainState, gradient: Gradient) -> tuple[TrainState, Metrics]:
        """Update one seed with a gradient, and return the new state and the metrics."""
        updates, opt_state = self.optimizer.update(gradient.grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            'nats_per_token': gradient.nats,
            'gradient_norm': optax.tree.norm(gradient.grads),
        }
        return TrainState(params, opt_state, gradient.carry), metrics

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Update one seed on one device. This function is pure."""
        return self.apply_gradient(state, self.compute_gradient(state.params, state.carry, batch))

    def compile(
        self,
        state: TrainState,
        batch: Batch,
        mesh: jax.sharding.Mesh,
        learning_rates: Array | None = None,
    ) -> jax.stages.Compiled:
        """Compile the update of all seeds, (state, batch) → (state, metrics), ahead of time.

        An array of an unexpected shape raises an error instead of triggering a recompilation. The
        state is donated.

        Args:
          state: arrays or shapes of the state for all seeds, sharded as in `shapes`.
          batch: arrays or shapes of a batch for all seeds, sharded as in `batch_shapes`.
          mesh: mesh of devices.
          learning_rates: learning rate of each update, f32 [steps], which becomes a third argument
            of the program, or None for the learning rates of the optimizer's schedule.
        """
        # Where each array of the state, the batch and the gradient is placed.
        state_specs = sharding.partition_specs(state)
        seed_spec: Any = sharding.seed_sharding(mesh).spec
        row_spec: Any = sharding.batch_sharding(mesh, 2, has_seeds=True).spec
        step_spec: Any = sharding.replicated(mesh).spec
        batch_specs = Batch(row_spec, row_spec, seed_spec, step_spec)
        gradient_specs = Gradient(state_specs.params, seed_spec, state_specs.carry)
        partition = sharding.fsdp_specs(state.params, mesh)
        compute_gradient = functools.partial(self.compute_gradient, partition=partition)

        # Each device computes the gradient of its seeds on its rows.
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(state_specs.params, state_specs.carry, batch_specs),
            out_specs=gradient_specs,
            check_vma=False,
        )
        def compute_gradients(params: Params, carry: Carry, batch: Batch) -> Gradient:
            batch = batch._replace(step=jnp.broadcast_to(batch.step, batch.seed.shape))
            return _map_seeds(compute_gradient, params, carry, batch)

        # The optimizer sees whole arrays, so that any is right. The partitioner splits its work as
        # the parameters are split. vmap also maps a single seed: with a[0] and a[None], XLA would
        # compute the moments twice and therefore copy the donated state.
        def update(
            state: TrainState, batch: Batch, *learning_rates: Array
        ) -> tuple[TrainState, Metrics]:
            gradient = compute_gradients(state.params, state.carry, batch)
            trainer = self._with_learning_rates(*learning_rates)
            return jax.vmap(trainer.apply_gradient)(state, gradient)

        out_shardings = jax.tree.map(lambda a: a.sharding, state), sharding.metrics_sharding(mesh)
        jitted = jax.jit(update, donate_argnums=0, out_shardings=out_shardings)
        rates = () if learning_rates is None else (learning_rates,)
        return jitted.lower(state, batch, *rates).compile()

    def _with_learning_rates(self, *learning_rates: Array) -> 'Trainer':
        if not learning_rates:
            return self
        optimizer = optim.with_learning_rates(self.optimizer, *learning_rates)
        return dataclasses.replace(self, optimizer=optimizer)


def _accumulate(
    grad_fn: Callable[..., tuple[Params, tuple[Array, Carry]]],
    params: Params,
    carry: Carry,
    token_rows: tuple[Array, Array | None],
    num_parts: int,
) -> tuple[Params, Array, Carry]:
    """Average the gradient and the loss over parts of the batch, one part at a time.

    Returns:
      The gradient, the loss in nats per token, and the carry of all rows.
    """

    def add_part(
        total: ArrayTree, part: tuple[Carry, tuple[Array, Array | None], Array]
    ) -> tuple[ArrayTree, Carry]:
        carry, token_rows, row_indices = part
        with select_rows(row_indices):
            grads, (nats, next_carry) = grad_fn(params, carry, *token_rows)
        total = jax.tree.map(lambda a, b: a + b / num_parts, total, (grads, nats))
        return total, next_carry

    # Rows are axis 0 of the carry and axis 1 of the tokens [T, B]; the scan stacks the carries.
    zeros = jax.tree.map(jnp.zeros_like, (params, jnp.zeros(())))
    parts = (
        _split_rows(carry, num_parts, 0),
        _split_rows(token_rows, num_parts, 1),
        _split_rows(get_row_indices(token_rows[0].shape[1]), num_parts, 0),
    )
    (grads, nats), carries = jax.lax.scan(add_part, zeros, parts)
    carry = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), carries)
    return grads, nats, carry


def _split_rows(tree: ArrayTree, num_parts: int, axis: int) -> ArrayTree:
    """Split arrays […, B, …] into [parts, …, B / parts, …], where row i goes to part i % parts."""

    def split(array: Array) -> Array:
        row_parts = array.reshape(*array.shape[:axis], -1, num_parts, *array.shape[axis + 1 :])
        return jnp.moveaxis(row_parts, axis + 1, 0)

    return jax.tree.map(split, tree)


def _map_seeds(function: Callable[..., Result], *args: ArrayTree) -> Result:
    """Apply a function to each seed. A single seed avoids vmap, whose products are slower."""
    if len(jax.tree.leaves(args)[0]) > 1:
        return jax.vmap(function)(*args)
    result = function(*jax.tree.map(lambda a: a[0], args))
    return jax.tree.map(lambda a: a[None], result)
