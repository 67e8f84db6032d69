"""Tests of the fusion with the checks that the modules of mi pass."""

from my_fusion.environment import make
from my_fusion.layers import TanhGate

from mi import testing


def test_the_fusion_works_in_every_trainer():
    testing.check_fusion(TanhGate)


def test_the_environment_is_what_its_spec_says():
    testing.check_environment(make('two'))
