"""Writes bilinear.json: torch.nn.Bilinear plus linear terms, forward and all gradients.

python tests/golden/make_bilinear.py, with the extra `benchmark`, for torch.
"""

import json
import pathlib

import torch

B, m, n, k = 5, 3, 4, 2


def main() -> None:
    torch.manual_seed(0)
    bilinear = torch.nn.Bilinear(m, n, k, bias=False, dtype=torch.float64)  # weight [k, m, n]
    of_z = torch.nn.Linear(m, k, bias=False, dtype=torch.float64)
    of_x = torch.nn.Linear(n, k, dtype=torch.float64)
    z = torch.randn(B, m, dtype=torch.float64, requires_grad=True)
    x = torch.randn(B, n, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(B, k, dtype=torch.float64)
    y = bilinear(z, x) + of_z(z) + of_x(x)
    y.backward(dy)
    values = {
        'x': x, 'z': z, 'dy': dy, 'y': y, 'dx': x.grad, 'dz': z.grad,
        'W': bilinear.weight.permute(1, 2, 0), 'dW': bilinear.weight.grad.permute(1, 2, 0),
        'U': of_z.weight.T, 'dU': of_z.weight.grad.T,
        'V': of_x.weight.T, 'dV': of_x.weight.grad.T,
        'b': of_x.bias, 'db': of_x.bias.grad,
    }  # fmt: skip
    record = {name: value.tolist() for name, value in values.items()}
    record['torch'] = torch.__version__
    file = pathlib.Path(__file__).with_name('bilinear.json')
    file.write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
    main()
