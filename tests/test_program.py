"""FLOPs, collectives and kernels of small programs, counted by hand."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from mi.estimate import hlo_cost, program
from mi.estimate.program import Collective
from tests.conftest import forced


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def analyze(function, *args):
    return program.analyze(jax.jit(function).lower(*args).compile())


ONE = 2 * 16 * 128 * 128  # [16, 128] @ [128, 128]


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_by_the_dearest():
    x, W = shape(16, 128), shape(128, 128)

    def scan(x, W):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ W), None), x, length=10)[0]

    def nested(x, W):
        return jax.lax.fori_loop(0, 7, lambda _, x: scan(x, W), x)

    def branch(x, W):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ W, lambda: jnp.tanh(x @ W) @ W)

    assert analyze(lambda x, W: x @ W, x, W).flops == ONE
    assert analyze(scan, x, W).flops == 10 * ONE
    assert analyze(nested, x, W).flops == 70 * ONE
    assert analyze(branch, x, W).flops == 2 * ONE


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    def loop(x, W, n):
        return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ W), x)

    found = analyze(loop, shape(16, 128), shape(128, 128), shape(dtype=jnp.int32))
    assert found.flops == ONE
    (name,) = found.unknown_loops
    assert 'jit(loop)/while' in name
    known = analyze(lambda x, W: loop(x, W, 5), shape(16, 128), shape(128, 128))
    assert known.flops == 5 * ONE and not known.unknown_loops


def test_the_kernels_of_a_loop_are_launched_in_every_iteration():
    def launches(length):
        def scan(x, W):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ W), None), x, length=length)[0]

        return sum(analyze(scan, shape(16, 128), shape(128, 128)).kernels.values())

    # Programs of different lengths have the same text but for the length.
    assert launches(30) - launches(20) == launches(20) - launches(10) >= 10


def test_a_kernel_reads_its_operands_and_of_a_stack_the_slice():
    x, W = shape(16, 128), shape(128, 128)
    product = 4 * (16 * 128 + 128 * 128 + 16 * 128)
    assert analyze(lambda x, W: x @ W, x, W).bytes_accessed == product

    def scan(W, rows):
        return jax.lax.scan(lambda _, row: (0, row @ W), 0, rows)[1]

    def accessed(length):
        return analyze(scan, W, shape(length, 16, 128)).bytes_accessed

    # An iteration slices a row out, multiplies, and writes a row; copies come with it.
    one = (accessed(40) - accessed(20)) / 20
    assert product <= one <= product + 8 * 4 * 16 * 128


@pytest.mark.parametrize('inputs', [1, 5, 8])
@pytest.mark.parametrize('outputs', [1, 7])
@pytest.mark.parametrize('stride', [1, 2, 7])
@pytest.mark.parametrize('pad', [-1, 0, 2])
@pytest.mark.parametrize('dilate', [1, 3, 8])
def test_taps_of_a_window_that_meet_an_entry(inputs, outputs, stride, pad, dilate):
    taps = hlo_cost.Taps(4, stride, pad, dilate, rhs_dilate=2)
    met = 0
    for tap in range(4):
        for output in range(outputs):
            position = output * stride + tap * 2 - pad
            met += position % dilate == 0 and 0 <= position // dilate < inputs
    assert taps.pairs(inputs, outputs) == met


def test_a_batch_of_products_and_its_gradient():
    a, b = shape(4, 16, 32), shape(4, 32, 64)

    def loss(a, b):
        return jnp.sum(jnp.einsum('bij,bjk->bik', a, b) ** 2)

    one = 2 * 4 * 16 * 32 * 64
    assert analyze(loss, a, b).flops == one
    assert analyze(jax.grad(loss, (0, 1)), a, b).flops == 3 * one


@pytest.mark.parametrize(
    ('padding', 'stride', 'taps'),
    [
        ('VALID', 1, 3 * 14),
        ('SAME', 1, 3 * 16 - 2),  # the first output and the last one have two taps each
        ('SAME', 2, 3 * 8 - 1),  # padded at the end alone
    ],
)
@pytest.mark.parametrize('groups', [1, 4])
def test_a_convolution_counts_the_taps_that_meet_an_entry(padding, stride, taps, groups):
    image, kernel = shape(2, 16, 16, 4), shape(3, 3, 4 // groups, 8)

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (stride, stride), padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=groups,
        )  # fmt: skip

    assert analyze(convolve, image, kernel).flops == 2 * 2 * taps**2 * (4 // groups) * 8


def test_each_collective_has_its_bytes_and_those_that_a_ring_sends():
    out = subprocess.run(
        [sys.executable, '-m', 'tests.programs'],
        env=os.environ | {'XLA_FLAGS': forced(4)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(out)
    h = 4 * 8 * 128  # bytes of one device's rows
    assert found['collectives'] == [
        ['all-gather', 1, 4 * h, 4],
        ['all-reduce', 10, 4 * 128, 4],
        ['all-to-all', 1, h, 4],
        ['collective-permute', 1, h, 4],
        ['reduce-scatter', 1, h, 4],
    ]
    sent = {
        'all-gather': 3 * h,
        'all-reduce': 10 * 2 * 3 * 128,  # 2·3/4 of 512 bytes, ten times
        'all-to-all': 3 * h // 4,
        'collective-permute': h,
        'reduce-scatter': 3 * h,
    }
    assert found['sent'] == sent and found['bytes_sent'] == sum(sent.values())
    assert found['flops'] == 10 * 2 * 8 * 128 * 128 + 2 * 32 * 128 * 128


def test_ring_bytes():
    assert program.count_ring_bytes('all-reduce', 800, 8) == 2 * 7 * 100
    assert program.count_ring_bytes('all-gather', 800, 8) == 700
    assert program.count_ring_bytes('reduce-scatter', 100, 8) == 700
    assert program.count_ring_bytes('all-to-all', 800, 8) == 700
    assert program.count_ring_bytes('collective-permute', 800, 8) == 800


# What XLA's compiler wrote for a v5e:2x2, shortened: an all-gather that runs beside a loop's
# products, a loop whose bound is in its state, and a batch of products as a dilated convolution.
TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%fused_start (p.0: bf16[32,256]) -> (bf16[32,256], bf16[128,256], u32[]) {
  %p.0 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[128,256]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.2 = (bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) custom-call(%all-gather.3), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.46 (p.1: f32[8,128], p.2: f32[128,128], p.3: bf16[32,256]) -> (f32[8,128], bf16[128,256]) {
  %p.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %p.2 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %p.3 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(2)
  %convolution.8 = f32[8,128]{1,0:T(8,128)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
  %all-gather.5 = bf16[128,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.3), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"15"}}
  ROOT %tuple.53 = (f32[8,128]{1,0:T(8,128)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%convolution.8, %all-gather.5)
}

%body (s.0: (s32[], f32[8,128], f32[128,128], bf16[32,256], s32[], /*index=5*/s32[])) -> (s32[], f32[8,128], f32[128,128], bf16[32,256], s32[], /*index=5*/s32[]) {
  %s.0 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s.0), index=0
  %h = f32[8,128]{1,0:T(8,128)} get-tuple-element(%s.0), index=1
  %W = f32[128,128]{1,0:T(8,128)} get-tuple-element(%s.0), index=2
  %w = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s.0), index=3
  %one = s32[]{:T(128)} get-tuple-element(%s.0), index=4
  %bound = s32[]{:T(128)} get-tuple-element(%s.0), index=5
  %constant.1 = s32[]{:T(128)} constant(1)
  %fusion.46 = (f32[8,128]{1,0:T(8,128)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}) fusion(%h, %W, %w), kind=kOutput, calls=%async_collective_fusion.46, backend_config={"window_config":{"estimated_cycles":"300"}}
  %h.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%fusion.46), index=0
  %add.1 = s32[]{:T(128)} add(%i, %constant.1)
  %psum.9 = f32[8,128]{1,0:T(8,128)} all-reduce(%h.1), channel_id=1, replica_groups=[2,2]<=[4], use_global_device_ids=true, to_apply=%region_2.2
  ROOT %tuple.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) tuple(%add.1, %psum.9, %W, %w, %one, /*index=5*/%bound)
}

%condition (s.1: (s32[], f32[8,128], f32[128,128], bf16[32,256], s32[], /*index=5*/s32[])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %bound.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=5
  ROOT %lt.7 = pred[]{:T(512)} compare(%i.1, %bound.1), direction=LT
}

%fused_batch (p.4: f32[8,16,16], p.5: f32[8,16,16]) -> f32[8,16,16] {
  %p.4 = f32[8,16,16]{2,1,0:T(8,128)} parameter(0)
  %p.5 = f32[8,16,16]{2,1,0:T(8,128)} parameter(1)
  ROOT %convolution-base-dilated.1 = f32[8,16,16]{2,1,0:T(8,128)} convolution(%p.4, %p.5), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf
}

ENTRY %main (x: f32[8,128], W.1: f32[128,128], w.1: bf16[32,256], a: f32[8,16,16]) -> (f32[8,128], f32[8,16,16], f32[8,128]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(0)
  %W.1 = f32[128,128]{1,0:T(8,128)} parameter(1)
  %w.1 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(2)
  %a = f32[8,16,16]{2,1,0:T(8,128)} parameter(3)
  %zero = s32[]{:T(128)} constant(0)
  %copy.27 = s32[]{:T(128)} copy(%zero)
  %one.1 = s32[]{:T(128)} constant(1)
  %ten = s32[]{:T(128)} constant(10)
  %async-collective-start = (bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[128,256]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}) fusion(%w.1), kind=kCustom, calls=%fused_start
  %tuple.44 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) tuple(%copy.27, %x, %W.1, %w.1, %one.1, /*index=5*/%ten)
  %while.20 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) while(%tuple.44), condition=%condition, body=%body
  %h.2 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while.20), index=1
  %fusion.7 = f32[8,16,16]{2,1,0:T(8,128)} fusion(%a, %a), kind=kOutput, calls=%fused_batch, backend_config={"window_config":{"estimated_cycles":"2221"}}
  %collective-permute-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%h.2), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %collective-permute-done = f32[8,128]{1,0:T(8,128)} collective-permute-done(%collective-permute-start)
  ROOT %tuple.2 = (f32[8,128]{1,0:T(8,128)}, f32[8,16,16]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}) tuple(%h.2, %fusion.7, %collective-permute-done)
}
"""  # noqa: E501


def test_a_program_of_a_tpu():
    found = program.analyze_text(TPU)
    assert not found.unknown_loops
    assert found.flops == 10 * 2 * 8 * 128 * 128 + 2 * 8 * 16 * 16 * 16
    assert found.collectives == (
        Collective('all-gather', 1, 2 * 128 * 256, 4),
        Collective('all-reduce', 10, 4 * 8 * 128, 2),
        Collective('collective-permute', 1, 4 * 8 * 128, 4),
    )
    assert found.kernels == {'fusion': 10 + 2, 'add': 10, 'copy': 1}
    assert found.cycles == 10 * 300 + 2221


def test_a_kernel_whose_cycles_a_tpu_does_not_estimate_counts_none():
    """A v6e offloads scatters to its sparse cores, with the largest int64 as their estimate."""
    offloaded = TPU.replace('"estimated_cycles":"2221"', f'"estimated_cycles":"{2**63 - 1}"')
    estimated = program.analyze_text(TPU).cycles
    assert program.analyze_text(offloaded).cycles == estimated - 2221 > 0


# What XLA's compiler wrote for four H100, shortened: cuDNN's convolution and the gradient of its
# kernel, cuBLAS, a product in a Triton kernel, and asynchronous collectives.
GPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%nested (p.6: f32[8,128], p.7: f32[128,64]) -> f32[8,64] {
  %p.6 = f32[8,128]{1,0} parameter(0)
  %p.7 = f32[128,64]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,64]{1,0} dot(%p.6, %p.7), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (image: f32[8,16,16,4], kernel: f32[8,3,3,4], x: f32[8,128], W: f32[128,64]) -> f32[8,64] {
  %image = f32[8,16,16,4]{3,2,1,0} parameter(0)
  %kernel = f32[8,3,3,4]{3,2,1,0} parameter(1)
  %x = f32[8,128]{1,0} parameter(2)
  %W = f32[128,64]{1,0} parameter(3)
  %cudnn-conv.2 = (f32[8,16,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={"operation_queue_id":"0"}
  %out = f32[8,16,16,8]{3,2,1,0} get-tuple-element(%cudnn-conv.2), index=0
  %cudnn-conv.3 = (f32[8,3,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%image, %out), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter", backend_config={"operation_queue_id":"0"}
  %gemm_fusion_dot.1 = f32[8,64]{1,0} fusion(%x, %W), kind=kCustom, calls=%nested, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %cublas-gemm.1 = (f32[8,64]{1,0}, s8[33554432]{0}) custom-call(%x, %W), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %rnn = (f32[8,64]{1,0}, u8[64]{0}) custom-call(%x, %W), custom_call_target="cudnn_rnn"
  %all-gather-start = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true
  %all-gather-done = f32[32,128]{1,0} all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[128,64]{1,0}), f32[32,64]{1,0}) reduce-scatter-start(%W), channel_id=1, replica_groups=[1,4]<=[4], use_global_device_ids=true, dimensions={0}, to_apply=%add
  %reduce-scatter-done = f32[32,64]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = (f32[8,128]{1,0}, bf16[128,64]{1,0}) all-reduce-start(%x, %W), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %all-reduce-done = (f32[8,128]{1,0}, bf16[128,64]{1,0}) all-reduce-done(%all-reduce-start)
  %alone = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0},{1},{2},{3}}, use_global_device_ids=true, to_apply=%add
  %of-mesh = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['seed'=2,'data'=2,'fsdp'=1] {'data','fsdp'}, use_global_device_ids=true, to_apply=%add
  %of-one-seed = f32[8,128]{1,0} all-reduce(%x), channel_id=1, replica_groups=mesh['seed'=4,'data'=1,'fsdp'=1] {'data','fsdp'}, use_global_device_ids=true, to_apply=%add
  ROOT %sum = f32[8,64]{1,0} get-tuple-element(%cublas-gemm.1), index=0
}
"""  # noqa: E501


def test_a_program_of_a_gpu():
    found = program.analyze_text(GPU)
    convolution = 2 * 8 * (3 * 16 - 2) ** 2 * 4 * 8
    assert found.flops == 2 * convolution + 2 * 2 * 8 * 128 * 64
    assert found.collectives == (
        Collective('all-reduce', 1, 4 * 8 * 128 + 2 * 128 * 64, 4),
        Collective('all-gather', 1, 4 * 32 * 128, 4),
        Collective('reduce-scatter', 1, 4 * 32 * 64, 4),
        Collective('all-reduce', 1, 4 * 8 * 128, 2),
    )
    assert found.kernels == {'custom-call': 4, 'fusion': 1}
    assert found.uncounted_calls == ('cudnn_rnn',)
