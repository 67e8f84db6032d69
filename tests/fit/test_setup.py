"""What a config of mi.fit is checked for, and what is counted, whatever the problem."""

import pytest

from configs import expressivity
from mi.config import UserError
from mi.fit import setup


@pytest.mark.parametrize('word', expressivity.PRESETS)
def test_either_task_is_of_one_process(word, monkeypatch):
    config = expressivity.get_config(word)
    setup.validate(config)
    monkeypatch.setattr('jax.process_count', lambda: 2)
    with pytest.raises(UserError, match=f"config.task = '{word}' runs in one process"):
        setup.validate(config)
