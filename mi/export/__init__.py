"""Export trained runs: parameters to safetensors, and their step to a StableHLO program."""

from mi.export.parameters import ExportedParams as ExportedParams
from mi.export.parameters import load_params as load_params
