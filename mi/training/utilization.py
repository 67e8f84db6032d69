"""Model FLOPs utilization (MFU), the fraction of the peak FLOPs that the model's products use.

    MFU = model FLOPs per second / (devices · peak)

Model FLOPs count the forward pass (`mi.counting.flops`), times 3 for an update, because the
backward pass has two products for each product of the forward pass (Chowdhery et al., PaLM, 2022,
appendix B). Recomputed activations and the optimizer are not counted. The tails
of an adaptive softmax are counted for every token, although a step skips most of them, so that its
MFU is too high by this part.
"""

from collections.abc import Iterable, Mapping

import jax

UPDATE = 3  # forward passes that have the FLOPs of an update
TERA = 1e12

# Dense products in bf16, without sparsity, for each name of a device in jax.
# TPU: https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e), of a chip.
# A100: NVIDIA A100 Tensor Core GPU datasheet. H100, H200: their datasheets, whose figures are with
# sparsity, which doubles them.
PEAK_FLOPS: dict[str, float] = {
    'TPU v4': 275 * TERA,
    'TPU v5 lite': 197 * TERA,  # v5e
    'TPU v5': 459 * TERA,  # v5p
    'TPU v5p': 459 * TERA,
    'TPU v6 lite': 918 * TERA,  # v6e
    'NVIDIA A100-SXM4-40GB': 312 * TERA,
    'NVIDIA A100-SXM4-80GB': 312 * TERA,
    'NVIDIA A100-PCIE-40GB': 312 * TERA,
    'NVIDIA A100 80GB PCIe': 312 * TERA,
    'NVIDIA H100 80GB HBM3': 989.5 * TERA,  # SXM
    'NVIDIA H100 PCIe': 756.5 * TERA,
    'NVIDIA H100 NVL': 835.5 * TERA,
    'NVIDIA H200': 989.5 * TERA,  # SXM
    'NVIDIA H200 NVL': 835.5 * TERA,
}
"""Name of a device in JAX → peak FLOP/s; the utilization of other devices is unknown."""


class Meter:
    """A meter for the utilization of a run's devices.

    Args:
      flops: model FLOPs per unit of throughput, such as a token.
      devices: devices of the run, in all processes.
    """

    def __init__(self, flops: float, devices: Iterable[jax.Device]):
        self._flops = flops
        self._peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]

    def measure(self, units_per_second: float) -> dict[str, float]:
        """Return {'mfu': fraction of the peak} for timing.jsonl, or {} if a peak is unknown."""
        peaks = [peak for peak in self._peaks if peak is not None]
        if len(peaks) < len(self._peaks):
            return {}
        return {'mfu': self._flops * units_per_second / sum(peaks)}


def format_rate(rate: str, timing: Mapping[str, float]) -> str:
    """Format a rate for the progress line, with the utilization if `timing` has it."""
    return f'{rate}, {timing["mfu"]:.1%} MFU' if 'mfu' in timing else rate
