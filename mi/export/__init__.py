"""Export of trained runs: parameters to safetensors, and the model's step to StableHLO."""

from mi.export.parameters import ExportedParams as ExportedParams
from mi.export.parameters import load_params as load_params
