"""Flags that several benchmarks have. absl allows one definition of a flag in a process."""

from absl import flags

ROUNDS = flags.DEFINE_integer('rounds', 7, 'Interleaved rounds.', lower_bound=1)
ONLY = flags.DEFINE_list('only', [], "Sets, as in the benchmark's docstring; all by default.")
SIDE = flags.DEFINE_string('side', None, 'For the workers: the side that a process serves.')
JSON = flags.DEFINE_string('json', None, 'JSON file to write the figures to.')
