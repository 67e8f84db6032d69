"""Prints what a program with one of each collective does on four devices, as JSON.

A program of its own, because the number of devices is fixed when jax starts:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.programs
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mi.estimate import program


def communicate(rows, W):
    def step(h, x):
        h = jnp.tanh(h @ W + x)
        return h, jax.lax.psum(h.sum(0), 'data')  # [128]

    h, sums = jax.lax.scan(step, rows[0], rows)
    gathered = jax.lax.all_gather(h, 'data', tiled=True)  # [32, 128]
    scattered = jax.lax.psum_scatter(gathered @ W, 'data', tiled=True)  # [8, 128]
    shifted = jax.lax.ppermute(scattered, 'data', [(i, (i + 1) % 4) for i in range(4)])
    turned = jax.lax.all_to_all(h, 'data', 0, 1, tiled=True)  # [2, 512]
    return sums, shifted, turned


def main():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ('data',))
    function = jax.shard_map(
        communicate,
        mesh=mesh,
        in_specs=(P(None, 'data'), P()),
        out_specs=(P(), P('data'), P(None, 'data')),
        check_vma=False,
    )
    rows = jax.ShapeDtypeStruct(
        (10, 32, 128), jnp.float32, sharding=NamedSharding(mesh, P(None, 'data'))
    )
    W = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = program.analyze(jax.jit(function).lower(rows, W).compile())
    report = {
        'flops': found.flops,
        'collectives': [dataclasses.astuple(c) for c in found.collectives],
        'sent': {c.kind: c.bytes_sent for c in found.collectives},
        'bytes_sent': found.bytes_sent,
    }
    print(json.dumps(report))


if __name__ == '__main__':
    main()
