"""The examples of docs/find.md print what the page shows, and its rules are those of the code."""

import re

import pytest

from mi.find import motifs
from tests.conftest import ROOT

PAGE = (ROOT / 'docs/find.md').read_text()
EXAMPLES = re.findall(r'```python\n(.*?)\n```\n\n```text\n(.*?)\n```', PAGE, flags=re.DOTALL)


@pytest.mark.parametrize(('code', 'output'), EXAMPLES, ids=['block', 'candidate', 'degrees'])
def test_an_example_prints_what_the_page_shows(code, output, capsys):
    exec(compile(code, 'example.py', 'exec'), {'__name__': 'example'})
    assert capsys.readouterr().out.strip() == output


def test_the_table_of_rules_is_that_of_the_code():
    def read_table(text):
        return [line for line in text.splitlines() if line.startswith('|')]

    rules = read_table(motifs.__doc__)
    assert rules and not set(rules) - set(read_table(PAGE))
    named = {rule.split('|')[1].strip() for rule in rules}
    assert named | {motifs.SCORES} == {*motifs.MOTIFS, motifs.ACTIVATION, 'motif', '---'}
