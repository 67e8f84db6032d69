import subprocess
import sys

import numpy as np
import pytest

from mi.config import UserError
from mi.rl.envs import text


def test_the_tokens_of_babyai_are_places_in_its_word_list_then_padding():
    tokens = text.babyai(8)('go to the red ball')
    words = [text.BABYAI_WORDS[i - 1] for i in tokens[:5]]
    assert words == ['go', 'to', 'the', 'red', 'ball']
    np.testing.assert_array_equal(tokens[5:], 0)


def test_every_word_has_its_own_token_below_the_vocabulary():
    tokens = text.babyai(40)(' '.join(text.BABYAI_WORDS))
    assert sorted(tokens[tokens > 0]) == list(range(1, text.BABYAI_VOCABULARY))


def test_case_and_punctuation_do_not_matter():
    tokenize = text.babyai(8)
    np.testing.assert_array_equal(
        tokenize('Open the door, then go'), tokenize('open the door then go')
    )


def test_the_longest_sentence_of_the_grammar_fits_exactly():
    thing = 'a grey ball in front of you'
    clause = f'put {thing} next to {thing}'
    sentence = f'{clause} and {clause} after you {clause} and {clause}'
    assert (text.babyai()(sentence) > 0).all()


def test_a_distinct_text_is_tokenised_once():
    seen = []
    tokenize = text.Tokenizer(lambda word: seen.append(word) or len(seen), 4)
    first = tokenize('a b')
    assert tokenize('a b') is first
    assert seen == ['a', 'b']
    with pytest.raises(ValueError, match='read-only'):
        first[0] = 7


def test_hashes_are_the_same_in_another_process():
    code = "from mi.rl.envs import text; print(*text.hashed(1000, 4)('pick the red key'))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    tokens = text.hashed(1000, 4)('pick the red key')
    assert [int(token) for token in out.stdout.split()] == tokens.tolist()


def test_hashes_are_between_one_and_the_number_of_buckets():
    tokens = text.hashed(7, 300)(' '.join(f'w{i}' for i in range(300)))
    assert set(tokens) == set(range(1, 8))


def test_too_long_a_text_and_an_unknown_word_raise_user_errors():
    with pytest.raises(UserError, match=r'at most 2. Raise `options\.length`'):
        text.babyai(2)('go to the')
    with pytest.raises(UserError, match=r"instruction word 'swim': expected one of"):
        text.babyai()('swim to the ball')
