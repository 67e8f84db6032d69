"""Tokens of a tokenizer.json: ids and bytes of the library, hash, cache and errors."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from configs import lm as configs
from mi.config import UserError
from mi.estimate import costs
from mi.lm import config as lm_config
from mi.lm import factory, sample, train
from mi.lm.data import token_store
from mi.lm.data.texts import DataError
from mi.training.checkpoint import hash_file
from mi.training.run_config import read_config

TRAIN = 'The gate opens — « souvent » 中文.\nIt opens twice, and closes.\n' * 40


def make_byte_level(path, num_ids=300):
    """A byte-level BPE as GPT-2's, with a special token, and with truncation left on."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_ids,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<|end|>'],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAIN], trainer)
    tokenizer.save(str(path))
    plain = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return plain


def make_words(path):
    """Lower-cased words; some ids up to 9 are not used."""
    words = {'[UNK]': 0, 'the': 3, 'gate': 4, 'opens': 9}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / 'texts'
    directory.mkdir()
    for split, text in {'train': TRAIN, 'valid': TRAIN[:300], 'test': TRAIN[60:400]}.items():
        (directory / f'{split}.txt').write_text(text)
    return str(directory)


def load(source, cache, file, **options):
    recipe = token_store.Recipe(source, 'file', 10_000, tokenizer=str(file), **options)
    return token_store.load(recipe, str(cache))


def test_the_ids_are_those_of_the_tokenizer(tmp_path, source):
    tokenizer = make_byte_level(tmp_path / 'tokenizer.json')
    corpus = load(source, tmp_path / 'cache', tmp_path / 'tokenizer.json')
    expected = tokenizer.encode(TRAIN, add_special_tokens=False).ids
    assert corpus.tokens['train'].tolist() == expected and len(expected) > 100
    assert corpus.vocabulary == tokenizer.get_vocab_size() == 300
    assert corpus.decode(corpus.tokens['valid']) == TRAIN[:300]
    assert corpus.encode('It opens\n').tolist() == tokenizer.encode('It opens\n').ids

    # The bytes of the predicted tokens; two tokens may share a character.
    assert corpus.lossless
    for num_predictions in (1, 7, len(corpus.tokens['valid']) - 1):
        names = map(tokenizer.id_to_token, corpus.tokens['valid'][1 : 1 + num_predictions])
        num_bytes = corpus.count_predicted_bytes('valid', num_predictions)
        assert num_bytes == sum(map(len, names))
    first = len(tokenizer.id_to_token(int(corpus.tokens['valid'][0])))
    assert num_bytes == len(TRAIN[:300].encode()) - first


def test_an_added_token_has_the_bytes_of_its_text(tmp_path, source):
    text = 'a<|end|>b ' * 50
    tokenizer = make_byte_level(tmp_path / 'tokenizer.json')
    (pathlib.Path(source) / 'valid.txt').write_text(text)
    corpus = load(source, tmp_path / 'cache', tmp_path / 'tokenizer.json')
    assert tokenizer.token_to_id('<|end|>') in corpus.tokens['valid']
    num_predictions = len(corpus.tokens['valid']) - 1
    assert corpus.lossless
    assert corpus.count_predicted_bytes('valid', num_predictions) == len(text) - 1


def test_words_with_unused_ids_determine_no_bytes(tmp_path, source):
    make_words(tmp_path / 'words.json')
    corpus = load(source, tmp_path / 'cache', tmp_path / 'words.json')
    assert corpus.vocabulary == 10 and not corpus.lossless
    assert corpus.tokens['train'][:4].tolist() == [3, 4, 9, 0]
    assert set(np.unique(corpus.tokens['train'])) == {0, 3, 4, 9}


def test_tokens_are_cached_under_the_hash_of_the_file(tmp_path, source):
    file, cache = tmp_path / 'tokenizer.json', tmp_path / 'cache'
    make_byte_level(file)
    first = load(source, cache, file)
    assert first.tokenizer_sha256 == hash_file(file)
    (directory,) = cache.iterdir()
    moved = tmp_path / 'moved.json'
    file.rename(moved)
    assert load(source, cache, moved).sha256 == first.sha256
    assert [*cache.iterdir()] == [directory]  # the path does not count
    make_byte_level(moved, num_ids=280)
    other = load(source, cache, moved)
    assert len([*cache.iterdir()]) == 2 and other.vocabulary == 280
    assert other.sha256 != first.sha256 and other.tokenizer_sha256 != first.tokenizer_sha256


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, r'`tokenizer` = .*: expected the path of a tokenizer\.json, but found no file'),
        ('merges', r'`tokenizer` = .*: expected a JSON file'),
        ('{"model": {}}', r'expected a file written by tokenizers\.Tokenizer\.save'),
        ('one id', r'expected at least 2 ids, but found 1'),
    ],
)
def test_what_is_no_tokenizer_is_refused(content, message, tmp_path, source):
    file = tmp_path / 'tokenizer.json'
    if content == 'one id':
        tokenizers.Tokenizer(models.WordLevel({'the': 0}, unk_token='the')).save(str(file))
    elif content:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        load(source, tmp_path / 'cache', file)


def test_a_text_outside_the_vocabulary_is_refused(tmp_path, source):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({'the': 0, 'gate': 1}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(DataError, match=r'`tokenizer`: expected .* for the train text, .*UNK'):
        load(source, tmp_path / 'cache', tmp_path / 'tokenizer.json')


def make_config(source, file, **changes):
    config = configs.get_config('tiny').unlock()
    changes = {'data.level': 'file', 'data.tokenizer': str(file), **changes}
    config.update_from_flattened_dict({'data.source': source, **changes})
    return config.lock()


def test_level_and_file_go_together(tmp_path, source):
    config = make_config(source, tmp_path / 'none.json', **{'data.level': 'bpe'})
    with pytest.raises(UserError, match=r"config\.data\.level = 'bpe': expected 'file', because"):
        lm_config.validate(config)
    with pytest.raises(UserError, match=r"config\.data\.tokenizer = '': expected the path of a"):
        lm_config.validate(make_config(source, ''))
    with pytest.raises(UserError, match=r"config\.data\.tokenizer = '.*none\.json': expected the"):
        factory.load_corpus(make_config(source, tmp_path / 'none.json'))


def test_the_estimate_has_the_size_of_the_vocabulary(tmp_path, source):
    make_byte_level(tmp_path / 'tokenizer.json')
    config = make_config(source, tmp_path / 'tokenizer.json')
    assert costs.make_lm_setup(config).vocabulary == 300


@pytest.mark.slow
def test_a_run_records_the_hash_and_samples(tmp_path, source, capsys):
    file, workdir = tmp_path / 'tokenizer.json', tmp_path / 'run'
    make_byte_level(file)
    config = make_config(
        source, file, **{'data.cache': str(tmp_path / 'cache'), 'train.length': 8, 'eval.batch': 4}
    )
    train.train(config, str(workdir))
    data = json.loads((workdir / 'data.json').read_text())
    assert data['tokenizer_sha256'] == hash_file(file) and data['tokenizer'] == str(file)
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    *_, last = (record for record in lines if record['split'] == 'test')
    bits = last['nats_per_token'] / np.log(2) * last['over']['predictions']
    corpus = factory.load_corpus(config)
    num_bytes = corpus.count_predicted_bytes('test', last['over']['predictions'])
    assert last['bits_per_byte'] == pytest.approx(bits / num_bytes, rel=1e-6)
    with config.unlocked():
        config.sample.update({'prompt': 'The gate', 'tokens': 5})
    sample.sample(config, str(workdir))
    assert 'The gate' in capsys.readouterr().out

    # A run from before the key is read with the levels that it knew.
    plain = configs.get_config('tiny').to_dict()
    del plain['data']['tokenizer']
    (tmp_path / 'config.json').write_text(json.dumps(plain))
    assert read_config(tmp_path).data.tokenizer == ''
