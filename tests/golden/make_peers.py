"""Write peers.json: multiplicative interactions of MultiBench and DI-engine, with all gradients.

    git clone https://github.com/pliang279/MultiBench
    git clone https://github.com/opendilab/DI-engine
    python tests/golden/make_peers.py MultiBench DI-engine    # with the extra `benchmark`: torch

It runs the files of these clones, not copies of them:

MultiBench   fusions/common_fusions.py, MultiplicativeInteractions2Modal (MIT license)
DI-engine    ding/torch_utils/network/merge.py, BilinearGeneral (Apache License 2.0)

It also prints the standard deviation of each layer's output before training, of standard normal
inputs, beside that of `mi`.
"""

import argparse
import hashlib
import importlib.util
import json
import pathlib
import types
from collections.abc import Callable

import torch

BATCH, FIRST, SECOND, OUT = 5, 3, 4, 2  # sizes of the batch, both inputs and the output
CLIP, GRAD_CLIP = (-0.6, 0.6), (-0.4, 0.4)
FILES = {
    'MultiBench': (
        'fusions/common_fusions.py',
        'f2ac6316a519cb8d2de98db5d3af0180e3899a6480fb948272f08b126ffcd1fb',
    ),
    'DI-engine': (
        'ding/torch_utils/network/merge.py',
        'ca4807a812f30d4f561e6763ada83de52e02c0dbe8d4239213dc3591d6e1b0b4',
    ),
}
"""Peer → its file, and the SHA-256 of the version whose values are in peers.json."""


def load_file(peer: str, clone: pathlib.Path) -> types.ModuleType:
    """Run the file of a peer in its clone.

    Raises:
      SystemExit: if the file is another version than that of peers.json.
    """
    relative_path, expected_hash = FILES[peer]
    file = clone / relative_path
    file_hash = hashlib.sha256(file.read_bytes()).hexdigest()
    if file_hash != expected_hash:
        raise SystemExit(f'{file}: SHA-256 {file_hash}: expected {expected_hash}. Try its commit')
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record_case(
    layer: torch.nn.Module, call: Callable[..., torch.Tensor], sizes: tuple[int, int]
) -> dict[str, list]:
    """Return parameters, inputs, output and all gradients of a layer of two inputs, in float64."""
    layer.double()
    first, second = (torch.randn(BATCH, size, dtype=torch.float64) for size in sizes)
    first.requires_grad_(), second.requires_grad_()
    output = call(layer, first, second)
    output_gradient = torch.randn_like(output)
    output.backward(output_gradient)
    values = {
        'first': first, 'second': second, 'output': output, 'output_gradient': output_gradient,
        'first_gradient': first.grad, 'second_gradient': second.grad,
    }  # fmt: skip
    for name, parameter in layer.named_parameters():
        values |= {name: parameter, f'{name}_gradient': parameter.grad}
    return {name: value.tolist() for name, value in values.items()}


def call_multibench(layer: torch.nn.Module, first: torch.Tensor, second: torch.Tensor):
    return layer([first, second])


def call_di_engine(layer: torch.nn.Module, first: torch.Tensor, second: torch.Tensor):
    return layer(first, second)


def record_cases(
    multibench: types.ModuleType, di_engine: types.ModuleType
) -> dict[str, dict[str, list]]:
    """Return the values of each form and option of both peers."""
    torch.manual_seed(0)
    modal, sizes = multibench.MultiplicativeInteractions2Modal, (FIRST, SECOND)
    layers = {
        'matrix': modal(sizes, OUT, 'matrix'),
        'vector': modal(sizes, SECOND, 'vector'),
        'scalar': modal(sizes, SECOND, 'scalar'),
        'matrix3D': modal(sizes, (OUT, 3), 'matrix3D'),
        'flip': modal(sizes, OUT, 'matrix', flip=True),
        'clip': modal(sizes, OUT, 'matrix', clip=CLIP),
        'grad_clip': modal(sizes, OUT, 'matrix', grad_clip=GRAD_CLIP),
    }
    cases = {
        f'multibench_{name}': record_case(layer, call_multibench, sizes[:: -1 if layer.flip else 1])
        for name, layer in layers.items()
    }
    layer = di_engine.BilinearGeneral(FIRST, SECOND, OUT)
    return cases | {'di_engine': record_case(layer, call_di_engine, sizes)}


def measure_initial_outputs(
    multibench: types.ModuleType, di_engine: types.ModuleType, m: int, n: int, k: int
) -> dict[str, float]:
    """Return the standard deviation of outputs before training, over 200 layers.

    Args:
      multibench, di_engine: modules of the peers.
      m, n, k: sizes of z, x and the output.
    """

    modal = multibench.MultiplicativeInteractions2Modal

    def measure(compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        outputs = [compute(torch.randn(64, n), torch.randn(64, m)).detach() for _ in range(200)]
        return float(torch.stack(outputs).std())

    return {
        'MultiBench, matrix': measure(lambda x, z: modal((m, n), k, 'matrix')([z, x])),
        'MultiBench, vector': measure(lambda x, z: modal((m, n), n, 'vector')([z, x])),
        'DI-engine': measure(lambda x, z: di_engine.BilinearGeneral(n, m, k)(x, z)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('multibench', type=pathlib.Path, help='clone of pliang279/MultiBench')
    parser.add_argument('di_engine', type=pathlib.Path, help='clone of opendilab/DI-engine')
    arguments = parser.parse_args()
    multibench = load_file('MultiBench', arguments.multibench)
    di_engine = load_file('DI-engine', arguments.di_engine)
    record = {
        'torch': torch.__version__,
        'clip': CLIP,
        'grad_clip': GRAD_CLIP,
        'files': {peer: file_hash for peer, (_, file_hash) in FILES.items()},
        'cases': record_cases(multibench, di_engine),
    }
    pathlib.Path(__file__).with_name('peers.json').write_text(json.dumps(record) + '\n')
    for sizes in ((16, 16, 16), (32, 256, 256)):
        for name, deviation in measure_initial_outputs(multibench, di_engine, *sizes).items():
            print(f'm, n, k = {sizes}: {name}: {deviation:.2f}')


if __name__ == '__main__':
    main()
