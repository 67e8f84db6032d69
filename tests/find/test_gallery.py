"""The models of docs/gallery.md: every product of their equations, counted by hand, and no other.

For each model, the comments derive the products and their FLOPs from the equations on the page.
FLOPs are two per multiplication with sum, and one per entry of an elementwise product.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs import build
from docs.gallery import attention, conditioning, page, recurrent
from mi.find.report import group_interactions

NORM, SCORES, MIX = 'normalization', 'attention scores', 'attention mix'
RECURRENCE, GATE, SCALE, BILINEAR = 'gated recurrence', 'gate', 'scale', 'bilinear pooling'


class Products(NamedTuple):
    """Equal products: motif, both sides (in any order), number, executions, FLOPs of all."""

    motif: str
    left: str
    right: str
    number: int
    times: int
    flops: int


EXPECTED = {
    # q · k and a · v of 8 heads, 256 tokens and 64 features per head. The softmax divides by a sum;
    # that belongs to a · v.
    'Multi-head attention': [
        Products(SCORES, 'x', 'x', 1, 1, 2 * 8 * 256 * 256 * 64),
        Products(MIX, 'x', 'x', 1, 1, 2 * 8 * 256 * 256 * 64),
    ],
    # Per block two norms, scores and mix, of 64 patches and a class token; at last the norm of the
    # class token alone. Positions and class token are parameters; GELU is an activation.
    'Vision Transformer': [
        Products(NORM, 'image', 'image', 2 * 6, 1, 2 * 6 * 65 * 512),
        Products(NORM, 'image', 'image', 1, 1, 512),
        Products(SCORES, 'image', 'image', 6, 1, 6 * 2 * 8 * 65 * 65 * 64),
        Products(MIX, 'image', 'image', 6, 1, 6 * 2 * 8 * 65 * 65 * 64),
    ],
    # Cross-attention: the latents are parameters, so that LN(latents) and q · k, whose q does not
    # depend on data, are no interactions. LN(pixels) and a · v are. Then LN(x) before the MLP, and
    # LN(x), q · k, a · v and LN(x) of the self-attention.
    'Perceiver': [
        Products(NORM, 'pixels', 'pixels', 1, 1, 50176 * 261),
        Products(MIX, 'pixels', 'pixels', 1, 1, 2 * 512 * 50176 * 261),
        Products(NORM, 'pixels', 'pixels', 3, 1, 3 * 512 * 1024),
        Products(SCORES, 'pixels', 'pixels', 1, 1, 2 * 8 * 512 * 512 * 128),
        Products(MIX, 'pixels', 'pixels', 1, 1, 2 * 8 * 512 * 512 * 128),
    ],
    # σ(f) ⊙ c, σ(i) ⊙ tanh(g) and σ(o) ⊙ tanh(c), in each of 100 steps.
    'LSTM': [Products(RECURRENCE, 'x', 'x', 3, 100, 3 * 100 * 32 * 256)],
    # The same three, in each of 10 steps on maps of 16 × 16 × 64.
    'Convolutional LSTM': [Products(RECURRENCE, 'x', 'x', 3, 10, 3 * 10 * 8 * 16 * 16 * 64)],
    # The torso has convolutions, maxima, sums and ReLUs: none. The core has the three of an LSTM,
    # in each of 20 steps; the reset selects, and frames / 255 divides by a constant.
    'IMPALA': [
        Products(RECURRENCE, 'carry,frames,is_first', 'carry,frames,is_first', 3, 20,
                 3 * 20 * 32 * 256),
    ],
    # i ⊙ x, √(1 − a²) ⊙ (i ⊙ x), a ⊙ h in each of 1024 steps, and h ⊙ y. The decay Λ is a
    # parameter: softplus(Λ) ⊙ r is no interaction.
    'RG-LRU': [
        Products(GATE, 'x', 'x', 3, 1, 3 * 1024 * 2560),
        Products(RECURRENCE, 'x', 'x', 1, 1024, 1024 * 2560),
    ],
    # Δ ⊙ u, and that ⊗ B; exp(ΔA) ⊙ h and hC in each of 1024 steps; y ⊙ silu(g). ΔA and D ⊙ u have
    # a parameter as one side. 768 features are expanded to 1536, with 16 states each. Δ and u are
    # both activations, and h is no map of a stream: two products that no rule names.
    'Mamba': [
        Products('unnamed', 'x', 'x', 1, 1, 1024 * 1536),
        Products(SCALE, 'x', 'x', 1, 1, 1024 * 1536 * 16),
        Products(RECURRENCE, 'x', 'x', 1, 1024, 1024 * 1536 * 16),
        Products('unnamed', 'x', 'x', 1, 1024, 1024 * 2 * 1536 * 16),
        Products(GATE, 'x', 'x', 1, 1, 1024 * 1536),
    ],
    # Two norms, two times (1 + γ), scores, mix, and α ⊙ of two branches. α and branch are both
    # affine maps, unbounded: bilinear pooling. x depends on c from the first branch on.
    'DiT block': [
        Products(NORM, 'x', 'x', 1, 1, 256 * 1152),
        Products(NORM, 'c,x', 'c,x', 1, 1, 256 * 1152),
        Products(SCALE, 'x', 'c', 1, 1, 256 * 1152),
        Products(SCALE, 'c,x', 'c', 1, 1, 256 * 1152),
        Products(SCORES, 'c,x', 'c,x', 1, 1, 2 * 16 * 256 * 256 * 72),
        Products(MIX, 'c,x', 'c,x', 1, 1, 2 * 16 * 256 * 256 * 72),
        Products(BILINEAR, 'c', 'c,x', 2, 1, 2 * 256 * 1152),
    ],
    # q |W₁(s)|, a generated matrix for 8 agents and 32 units; h · |w₂(s)|, a scalar product whose
    # sides are both activations. Biases only add.
    'QMIX': [
        Products('hypernetwork', 'values', 'state', 1, 1, 2 * 1920 * 8 * 32),
        Products('unnamed', 'state,values', 'state', 1, 1, 2 * 1920 * 32),
    ],
    # tanh(qU) ⊙ tanh(v_s V), which become logits of a softmax over the 196 cells; Σ_s a_s v_s of
    # two maps, whose softmax divides; tanh(qW) ⊙ tanh(v̂X).
    'Answers about images': [
        Products(SCORES, 'question', 'image', 1, 1, 196 * 1200),
        Products(MIX, 'image,question', 'image', 1, 1, 2 * 2 * 196 * 2048),
        Products(BILINEAR, 'question', 'image,question', 1, 1, 2400),
    ],
}  # fmt: skip

# x [n] and z [m] → k of the places where streams only meet in a sum or a concatenation. Flax's LSTM
# adds the maps of x and h for each of its four gates of 256 units.
CANDIDATES = {
    'LSTM': [('sum', {128, 256}, 4 * 256)],
    'Convolutional LSTM': [('sum', {9 * 32, 9 * 64}, 4 * 64)],
    'IMPALA': [('concatenation', {256}, 4 * 256)],
}


@pytest.fixture(scope='module')
def reports():
    return page.find_all()


def test_every_model_has_an_expectation():
    assert {entry.title for entry in page.ENTRIES} == {*EXPECTED}


def sort_sides(motif, left, right, *rest):
    return (motif, *sorted((left, right)), *rest)


@pytest.mark.parametrize('title', EXPECTED)
def test_no_product_is_missed_and_none_invented(title, reports):
    """Products of one motif with equal sides and executions are added up."""
    report, totals = reports[title], {}
    for interaction in report.interactions:
        sides = (','.join(sorted(side)) for side in (interaction.left, interaction.right))
        key = sort_sides(interaction.motif, *sides, interaction.times)
        number, flops = totals.get(key, (0, 0))
        totals[key] = number + 1, flops + interaction.flops
    expected = {}
    for motif, left, right, number, times, flops in EXPECTED[title]:
        key = sort_sides(motif, left, right, times)
        before = expected.get(key, (0, 0))
        expected[key] = before[0] + number, before[1] + flops
    assert totals == expected
    assert not report.notes


@pytest.mark.parametrize('title', EXPECTED)
def test_the_candidates_are_sums_and_concatenations_in_recurrent_cells(title, reports):
    found = [(c.kind, {c.n, c.m}, c.k) for c in reports[title].candidates]
    assert found == CANDIDATES.get(title, [])


def test_the_page_is_up_to_date(reports):
    assert (build.HERE / 'gallery.md').read_text() == page.make_page(reports), (
        'run python -m docs.build'
    )


def test_the_page_has_a_row_per_group_of_products(reports):
    text = page.make_page(reports)
    for title, report in reports.items():
        section = text.partition(f'\n## {title}\n')[2].partition('\n## ')[0]
        table = [line for line in section.split('\n') if line.startswith('| ')]
        assert len(table) == 2 + len(group_interactions(report.interactions))


# ------------------------------------------------------------------------------ the equations


@pytest.mark.slow
def test_the_block_of_dit_is_its_equation():
    """With c whose modulation is zero except α, the block is x + α ⊙ branch; against NumPy."""
    d, block = 6, conditioning.DiTBlock(2)
    x, c = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 3, d), (2, d)]))
    params = block.init(jax.random.key(2), x, c)['params']
    params = jax.tree.map(lambda p: np.asarray(p) + 0.1, params)
    y = block.apply({'params': params}, x, c)

    def normalize(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def dense(name, x, owner=params):
        return np.asarray(x) @ owner[name]['kernel'] + np.asarray(owner[name]['bias'])

    c, x = np.asarray(c), np.asarray(x)
    modulation = dense('modulation', c / (1 + np.exp(-c)))[:, None]
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = np.split(modulation, 6, -1)
    tokens = normalize(x) * (1 + scale_1) + shift_1
    heads = {
        name: np.einsum('btd,dhe->bhte', tokens, params['attention'][name]['kernel'])
        + np.asarray(params['attention'][name]['bias'])[None, :, None]
        for name in ('query', 'key', 'value')
    }
    logits = np.einsum('bhte,bhse->bhts', heads['query'], heads['key']) / np.sqrt(d / 2)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mixed = np.einsum('bhts,bhse->bthe', weights, heads['value'])
    out = params['attention']['out']
    x = x + gate_1 * (np.einsum('bthe,hed->btd', mixed, out['kernel']) + np.asarray(out['bias']))
    hidden = jax.nn.gelu(dense('up', normalize(x) * (1 + scale_2) + shift_2))
    np.testing.assert_allclose(y, x + gate_2 * dense('down', hidden), atol=2e-5)


@pytest.mark.slow
def test_the_recurrent_blocks_are_causal_and_mix_time():
    """The output at t depends on the inputs up to t, on each of them."""
    block = recurrent.RecurrentBlock(8, heads=2)
    x = jax.random.normal(jax.random.key(0), (1, 6, 4))
    variables = block.init(jax.random.key(1), x)
    jacobian = jax.jit(jax.jacobian(lambda x: block.apply(variables, x)[0].sum(-1)))(x)[:, 0]
    mamba = recurrent.Mamba(features=4)
    sequence = jax.random.normal(jax.random.key(2), (6, 4))
    other = jax.jit(jax.jacobian(lambda x: mamba(x).sum(-1)))(sequence)
    for derivatives in (jacobian, other):
        norms = np.linalg.norm(derivatives, axis=-1)
        assert not np.triu(norms, 1).any() and (np.tril(norms) > 0).sum() == 21


@pytest.mark.slow
def test_qmix_rises_with_the_value_of_every_agent():
    """Weights are absolute values, so that the joint value is monotonic."""
    _, shapes, streams = conditioning.build_qmix()
    keys = iter(jax.random.split(jax.random.key(0), 20))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape), shapes)
    values = jax.random.normal(next(keys), (5, streams['values'].shape[1]))
    state = jax.random.normal(next(keys), (5, streams['state'].shape[1]))
    grads = jax.grad(lambda values: conditioning.mix_values(params, values, state).sum())(values)
    assert (np.asarray(grads) > 0).all()


@pytest.mark.slow
def test_the_transformer_of_equinox_gives_a_logit_per_class():
    model = attention.VisionTransformer(features=16, hidden=8, heads=2, layers=2)
    assert model(jnp.ones((3, 32, 32))).shape == (10,)
