"""Calibration inputs of a run: the x and z that its fusions receive on the run's own data."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend.core import get_opaque_trace_state

from mi.config import UserError
from mi.inspect.trained import Params, Site, Trained
from mi.lm import config as lm_config
from mi.lm import factory as lm_factory
from mi.lm.data import streams
from mi.rl import factory as rl_factory
from mi.rl.actors.worker import Policy
from mi.rl.agent import Inputs

Rows = tuple[np.ndarray, np.ndarray]
"""x [N, n] and z [N, m], or ids z [N]."""

MIN_STEPS = 100  # of an agent's environments, so that not all rows are the starts of episodes


class Recorder:
    """A recorder of the inputs that fusions receive while a model runs, even in loops or under jit.

    Args:
      sites: the fusions to record.
    """

    def __init__(self, sites: Iterable[Site]):
        self._rows: dict[tuple[str, ...], list[Rows]] = {site.path: [] for site in sites}
        self._model_trace: Any = None  # JAX's trace of the call of the whole model

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the calls in programs that are traced in this context."""
        with nn.intercept_methods(self._intercept):
            yield

    def count(self) -> int:
        """Return the smallest number of rows recorded at any site."""
        jax.effects_barrier()
        return min((sum(len(x) for x, _ in rows) for rows in self._rows.values()), default=0)

    def take(self, num_rows: int) -> dict[tuple[str, ...], Rows]:
        """Return at most this many rows of each site, evenly spaced, and clear the recorder."""
        jax.effects_barrier()
        taken = {}
        for path, rows in self._rows.items():
            x, z = (np.concatenate(arrays) for arrays in zip(*rows, strict=True))
            indices = np.linspace(0, len(x) - 1, min(num_rows, len(x))).round().astype(int)
            taken[path] = x[indices], z[indices]
            rows.clear()
        return taken

    def _intercept(
        self,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        path = context.module.path
        if not path:
            self._model_trace = get_opaque_trace_state()
        if path not in self._rows or context.method_name != '__call__':
            return call(*args, **kwargs)
        append = functools.partial(self._append, path)
        if self._model_trace == get_opaque_trace_state():
            jax.debug.callback(append, *args[:2])
            return call(*args, **kwargs)

        # Within a loop, Flax refuses an effect that depends on the step (since 0.12.12, with jax
        # 0.12). There, the callback is a term of the output.
        def append_and_return_zero(x: Any, z: Any) -> np.ndarray:
            append(x, z)
            return np.zeros((), output.dtype)

        output = call(*args, **kwargs)
        zero = jax.ShapeDtypeStruct((), output.dtype)
        return output + jax.pure_callback(
            append_and_return_zero, zero, *args[:2], vmap_method='sequential'
        )

    def _append(self, path: tuple[str, ...], x: Any, z: Any) -> None:
        """Add the rows of one call, broadcasting leading axes as the layer does."""
        x, z = np.asarray(x), np.asarray(z)
        z_axes = z.shape if np.issubdtype(z.dtype, np.integer) else z.shape[:-1]
        axes = np.broadcast_shapes(x.shape[:-1], z_axes)
        x = np.broadcast_to(x, (*axes, x.shape[-1])).reshape(-1, x.shape[-1])
        z_shape = z.shape[len(z_axes) :]
        z = np.broadcast_to(z, (*axes, *z_shape)).reshape(-1, *z_shape)
        self._rows[path].append((x.astype(np.float64), _to_float64(z)))


def draw_inputs(trained: Trained, num_rows: int) -> Iterator[dict[tuple[str, ...], Rows]]:
    """Yield the inputs of a run's fusions by path, one seed at a time.

    A language model reads its validation text as in an evaluation. An agent acts in its
    environment, in `config.actors.batch` rows, for at least 100 steps.

    Args:
      trained: the run.
      num_rows: number of rows for each fusion, or fewer if the text is too short.

    Raises:
      UserError: if the run does not call its fusions.
    """
    draw = {'lm': _read_text, 'rl': _act}[trained.config.task]
    recorder = Recorder(trained.sites)
    with draw(trained, recorder) as advance:
        for seed_index in range(len(trained.config.seeds)):
            advance(trained.get_seed_params(seed_index), num_rows)
            if not recorder.count():
                raise UserError(
                    '--calibration: expected a run that calls its fusions, but no fusion received '
                    'an input'
                )
            yield recorder.take(num_rows)


Advance = Callable[[Params, int], None]
"""Computes with parameters until the recorder has a number of rows."""


@contextlib.contextmanager
def _read_text(trained: Trained, recorder: Recorder) -> Iterator[Advance]:
    """Yield a function that reads the validation text of a language model."""
    config = trained.config
    corpus = lm_factory.load_corpus(config)
    model = lm_factory.build_model(config, *corpus.sizes)
    tokens = corpus.tokens['valid']
    reading = lm_config.get_reading(config)
    batch = min(reading.batch, len(tokens) - 1)

    @jax.jit
    def read(params: Params, carry: Any, inputs: jax.Array, domains: Any) -> Any:
        outputs: Any = model.apply({'params': params}, carry, inputs, None, domains)
        next_carry, logits = outputs
        return next_carry, logits.sum()  # callbacks in loops are terms of both; XLA removes others

    def advance(params: Params, num_rows: int) -> None:
        carry = model.initial_carry(batch)
        for inputs, _, mask, positions in streams.segments(tokens, batch, reading.length):
            # The end of the text is padded.
            if recorder.count() and (recorder.count() >= num_rows or not mask.all()):
                return
            uses_domains = model.source == 'domain'
            domains = corpus.get_domains('valid', positions) if uses_domains else None
            with recorder.record():
                carry, _ = read(params, carry, jnp.asarray(inputs), domains)

    yield advance


@contextlib.contextmanager
def _act(trained: Trained, recorder: Recorder) -> Iterator[Advance]:
    """Yield a function that steps the environments of an agent."""
    config = trained.config
    batch = config.actors.batch
    pool = rl_factory.make_pool(config, batch, config.seeds[0])
    policy = Policy(rl_factory.build_agent(config, pool.spec))

    def advance(params: Params, num_rows: int) -> None:
        step, policy_state = pool.reset(), policy.init(batch, jax.random.key(config.seeds[0]))
        action, num_steps = jnp.zeros(batch, jnp.int32), 0
        while num_steps < MIN_STEPS or 0 < recorder.count() < num_rows:
            inputs = Inputs(step.observation, action, step.reward, step.is_first)
            with recorder.record():
                policy_state, action, _ = policy(params, policy_state, inputs)
            pool.send(np.asarray(action))
            step, num_steps = pool.recv(), num_steps + 1

    try:
        yield advance
    finally:
        pool.close()


def _to_float64(z: np.ndarray) -> np.ndarray:
    """Convert a dense context to float64, but leave ids unchanged."""
    return z if np.issubdtype(z.dtype, np.integer) else z.astype(np.float64)
