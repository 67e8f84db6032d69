"""The parts of a step to which `benchmarks.shares` counts the time of its instructions."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import shares
from mi.estimate import hlo

PROGRAM = """HloModule jit_update

%fused_product (p: f32[2,3], q: f32[3,4]) -> f32[2,4] {
  %p = f32[2,3] parameter(0)
  %q = f32[3,4] parameter(1)
  ROOT %dot.0 = f32[2,4] dot(%p, %q), metadata={op_name="jit(f)/LanguageModel/norm_1/dot_general"}
}

%fused_exp (p: f32[2,4]) -> f32[2,4] {
  %p.1 = f32[2,4] parameter(0)
  ROOT %exp.0 = f32[2,4] exponential(%p.1)
}

ENTRY %main (x: f32[2,3], W: f32[3,4]) -> f32[2,4] {
  %x = f32[2,3] parameter(0)
  %W = f32[3,4] parameter(1)
  %product = f32[2,4] fusion(%x, %W), kind=kCustom, calls=%fused_product
  %exp_fusion = f32[2,4] fusion(%product), calls=%fused_exp, metadata={op_name="jit(f)/LanguageModel/block_0/attention/exp"}
  %loop = f32[2,4] while(%exp_fusion), condition=%c, body=%b, metadata={op_name="jit(f)/LanguageModel/while"}
  %scale = f32[2,4] multiply(%loop, %loop), metadata={op_name="jit(f)/LanguageModel/norm_1/mul"}
  %gate = f32[2,4] multiply(%scale, %scale), metadata={op_name="jit(f)/LanguageModel/feed_forward/mul"}
  %half = f32[2,4] reverse(%gate), dimensions={0}
  %sum = f32[2,4] add(%gate, %half), metadata={op_name="jit(f)/LanguageModel/add"}
  ROOT %adam = f32[2,4] add(%sum, %sum), metadata={op_name="jit(f)/mul"}
}
"""  # noqa: E501


def test_every_instruction_counts_for_its_part():
    """A product by itself, a loop not at all, and what has no module for the optimizer.

    An instruction without an operation counts with its operand.
    """
    names = ('product', 'exp_fusion', 'loop', 'scale', 'gate', 'sum', 'adam', 'half')
    seconds = collections.Counter({name: 2.0**i for i, name in enumerate(names)})
    seconds['of another program'] = 1000.0
    assert shares.compute_shares(PROGRAM, seconds, shares.TRANSFORMER_PARTS) == {
        'optimizer': (64, 1),
        'embedding, residual sums and loss': (32, 1),
        'feed-forward without products': (16 + 128, 2),
        'normalization': (8, 1),
        'attention without products': (2, 1),
        shares.PRODUCTS: (1, 1),
    }


def test_a_compiled_product_is_one():
    compiled = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((64, 64))).compile()
    module = hlo.parse(compiled.as_text())
    entry = module.computations[module.entry]
    instructions = entry.instructions.values()
    parts = [
        shares.find_part(instruction, entry, module, shares.XLAND_PARTS)
        for instruction in instructions
    ]
    assert parts.count(shares.PRODUCTS) == 1


@pytest.mark.parametrize(
    ('operation', 'part'),
    [
        ('while/body/jvp(Agent)/torso/tanh', 'learning without products'),
        ('while/body/transpose(jvp(Agent))/Agent._core/mul', 'learning without products'),
        ('while/body/Agent/Agent._core/tanh', 'acting without products'),
        ('while/body/vmap(jit(_gumbel))/log', 'environments and sampled actions'),
        ('while/body/jvp(vmap())/add', 'losses and optimizer'),
        ('while/body/mul', 'losses and optimizer'),
    ],
)
def test_parts_of_an_agent(operation, part):
    program = f"""HloModule jit_update

ENTRY %main (x: f32[2]) -> f32[2] {{
  %x = f32[2] parameter(0)
  ROOT %y = f32[2] tanh(%x), metadata={{op_name="jit(update)/{operation}"}}
}}
"""
    seconds = collections.Counter(y=1.0)
    assert shares.compute_shares(program, seconds, shares.XLAND_PARTS) == {part: (1.0, 1)}


def test_products_of_a_program_are_those_of_its_source():
    """`torch.matmul` gets the factors in its own order of axes."""

    def multiply(x, V, scores):
        gradient = jnp.einsum('bn,bk->nk', x, x @ V)
        return jnp.tanh(gradient), jnp.einsum('bhtd,bhsd->bhts', scores, scores)

    arrays = jnp.ones((64, 32)), jnp.ones((32, 48)), jnp.ones((2, 3, 5, 7))
    compiled = jax.jit(multiply).lower(*arrays).compile()
    dots = shares.list_dots(compiled.as_text())
    assert len(dots) == 3
    for dot, (left, right) in zip(dots, shares.draw_factors(dots), strict=True):
        product = jax.lax.dot_general(left, right, (dot.contracted, dot.batch))
        left_order, right_order = dot.permutations()
        expected = left.transpose(left_order) @ right.transpose(right_order)
        np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)


def test_parts_sum_to_the_step_without_the_profiler():
    profiled = {'a': {'seconds': 3.0, 'instructions': 1}, 'b': {'seconds': 1.0, 'instructions': 2}}
    figures = {'seconds': 2.0, 'profiled_seconds': 5.0, 'shares': profiled}
    assert shares.scale_shares(figures) == {'a': 1.5, 'b': 0.5}
