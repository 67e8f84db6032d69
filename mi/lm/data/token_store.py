"""The token store: corpora are tokenized once, into files that later runs map into memory.

A corpus has three splits: train, valid and test (see `mi.lm.data.sources`). The level of its tokens
is one of:

- 'byte': the bytes of the text.
- 'bpe': byte pairs, which are lossless.
- 'word': words and punctuation marks of raw text.
- 'token': words separated by white space, for pretokenized corpora (WikiText, PTB).
- 'file': the ids of a tokenizer.json of the tokenizers library, such as a pretrained tokenizer.

The levels 'word' and 'token' end each line with <eos>, and replace words outside the vocabulary
with <unk>.
"""

import dataclasses
import hashlib
import json
import pathlib
from importlib import metadata
from typing import IO, NamedTuple

import numpy as np
import tokenizers

from mi.config import suggest
from mi.lm.data.archives import name_os_errors, write_atomically
from mi.lm.data.corpus import Corpus
from mi.lm.data.sources import find_source, get_cache_directory, load_texts
from mi.lm.data.texts import SPLITS, DataError, Text, Texts
from mi.lm.data.tokenizers import (
    UNKNOWN,
    Level,
    count_id_bytes,
    count_ids,
    encode,
    fit_tokenizer,
    read_tokenizer,
)
from mi.training import progress
from mi.training.checkpoint import hash_file

HASHED = 64 * 2**20  # bytes of the token files up to which every load verifies their hash
_FORMAT = 2  # version of the token files; those of another version are made again


class Recipe(NamedTuple):
    """The text of a corpus, and how to tokenize it.

    Attributes:
      source: a name in `mi.lm.data.sources.CORPORA`; 'hub:OWNER/NAME/CONFIG'; a text file, whose
        last tenth of lines becomes valid and test; or a directory with one file for each of
        *train*, *valid* and *test*. Files may be compressed: .bz2, .gz, .xz or .zip.
      level: level of the tokens, one of those above.
      vocabulary: maximum number of ids at the levels 'bpe', 'word' and 'token'.
      splits: the splits to tokenize. Files of other splits may be missing.
      fit: the splits from which the vocabulary is built. If it excludes train, results are not
        comparable to published numbers.
      tokenizer: path of a tokenizer.json, for the level 'file'.
    """

    source: str
    level: Level
    vocabulary: int
    splits: tuple[str, ...] = SPLITS
    fit: tuple[str, ...] = ('train',)
    tokenizer: str = ''

    @property
    def name(self) -> str:
        """The name of the corpus, without its directory."""
        return pathlib.Path(self.source).name


def load(
    recipe: Recipe,
    cache: str = '',
    *,
    path: str = '',
    train_tokens: int = 0,
    verify: bool = False,
) -> Corpus:
    """Load a corpus, and tokenize it on first use.

    The bytes of uncompressed files are mapped into memory directly, without token files.

    Args:
      recipe: the text, and how to tokenize it.
      cache: directory for token files, or '' for $MI_CACHE or ~/.cache/mi.
      path: path of the files if `source` is a name in `CORPORA`, or '' for $MI_DATA/SOURCE.
      train_tokens: number of tokens to keep from the start of train, or 0 for all. The vocabulary
        is always built from all of train.
      verify: whether to verify the hashes of token files larger than `HASHED` too.

    Raises:
      DataError: if a file is missing, empty, ambiguous, damaged or not UTF-8, if a well-known
        corpus has unexpected token counts, or if `tokenizer` is not a valid tokenizer file.
      ValueError: if `splits` is empty or has an unknown split, or if `train_tokens` is set and
        `splits` has no 'train'.
    """
    # Check the splits, and put them into one order, on which the name of the token files depends.
    recipe = _order_splits(recipe)
    if train_tokens and 'train' not in recipe.splits:
        raise ValueError(
            f"train_tokens = {train_tokens}: expected 'train' in splits, but got {recipe.splits}"
        )

    # Read the token files, or make them.
    cache_directory = get_cache_directory(cache)
    with name_os_errors(cache_directory):
        used_splits = [split for split in SPLITS if split in recipe.splits + recipe.fit]
        texts = load_texts(recipe.source, path, used_splits, cache_directory)
        corpus = _load(recipe, texts, cache_directory, verify)
        return _shorten(corpus, train_tokens, recipe.level) if train_tokens else corpus


def _order_splits(recipe: Recipe) -> Recipe:
    """Return the recipe with its splits in the order of SPLITS, and with a canonical `fit`.

    `fit` becomes () at levels that do not fit a vocabulary.

    Raises:
      ValueError: if there are no splits, or if a split is unknown.
    """
    if not recipe.splits:
        raise ValueError(f'splits = (): expected at least one of {SPLITS}')
    for split in (*recipe.splits, *recipe.fit):
        if split not in SPLITS:
            raise ValueError(f'splits: unknown split {split!r}; {suggest(split, SPLITS)}')
    fit = () if recipe.level in ('byte', 'file') else recipe.fit
    return recipe._replace(
        splits=tuple(split for split in SPLITS if split in recipe.splits),
        fit=tuple(split for split in SPLITS if split in fit),
    )


def _load(recipe: Recipe, texts: Texts, cache_directory: pathlib.Path, verify: bool) -> Corpus:
    """Map uncompressed bytes or token files into memory, after writing missing token files."""
    splits = recipe.splits
    domains = tuple(text.domain for text in texts[splits[0]] if text.domain)
    num_bytes = {split: sum(text.size for text in texts[split]) for split in splits}
    for split in splits:
        for text in texts[split]:
            _check_length(recipe, split, text, 2 * text.size)

    # Bytes of plain files.
    if recipe.level == 'byte' and all(len(texts[split]) == 1 for split in splits):
        tokens = {split: texts[split][0].array() for split in splits}
        for split in splits:
            _check_length(recipe, split, texts[split][0], len(tokens[split]))
        return Corpus(
            recipe.name,
            vocabulary=256,
            tokens=tokens,
            num_bytes=num_bytes,
            lossless=True,
            sha256=_compute_sha256(*tokens.values()),
            domains=domains,
            starts={split: np.zeros(1, np.int64) for split in splits},
            tokenizer=None,
            texts=texts,
            level='byte',
        )

    # Token files, named by a hash of all that they depend on.
    known_source = find_source(recipe.source)
    checks = [dict(known_source.num_tokens), known_source.vocabulary]
    versions = [_FORMAT, metadata.version('tokenizers')]
    tokenizer_sha256 = ''
    if recipe.level == 'file':
        read_tokenizer(recipe.tokenizer)  # refuse it before the text is read
        tokenizer_sha256 = hash_file(pathlib.Path(recipe.tokenizer))
    vocabulary = tokenizer_sha256 or recipe.vocabulary
    num_texts = [[split, len(split_texts)] for split, split_texts in texts.items()]
    options = [recipe.level, vocabulary, splits, recipe.fit, checks, num_texts, *versions]
    text_spans = [text.array() for split_texts in texts.values() for text in split_texts]
    span_lengths = np.array([len(text_span) for text_span in text_spans])
    recipe_key = _compute_sha256(json.dumps(options).encode(), span_lengths, *text_spans)[:16]
    directory = cache_directory / f'{recipe.name}-{recipe.level}-{recipe_key}'
    if not directory.exists():
        _write_token_files(directory, texts, recipe)
    corpus = _read_token_files(directory, recipe, domains, texts, num_bytes)
    corpus = dataclasses.replace(corpus, tokenizer_sha256=tokenizer_sha256)
    is_small = sum(ids.nbytes for ids in corpus.tokens.values()) <= HASHED
    # Cut files are always noticed. The hash of large files is not verified at every start: reading
    # all of them takes as long as reading the text, and a complete directory only changes if a disk
    # fails or someone edits it.
    if (is_small or verify) and _compute_sha256(*corpus.tokens.values()) != corpus.sha256:
        raise _make_damage_error(directory)
    return corpus


def _write_token_files(directory: pathlib.Path, texts: Texts, recipe: Recipe) -> None:
    """Build the vocabulary, and write the ids of each split to a new directory atomically.

    Raises:
      DataError: if a well-known corpus has unexpected token counts.
    """
    # The vocabulary, and the smallest dtype for its ids.
    level = recipe.level
    if level == 'file':
        tokenizer: tokenizers.Tokenizer | None = read_tokenizer(recipe.tokenizer)
    else:
        tokenizer, num_types = fit_tokenizer(texts, level, recipe.vocabulary, recipe.fit)
        _check_num_types(recipe, texts, num_types)
    num_ids = 256 if tokenizer is None else count_ids(tokenizer)
    id_type = np.uint8 if num_ids <= 2**8 else np.uint16 if num_ids <= 2**16 else np.int32
    id_dtype = np.dtype(id_type)

    # The ids, some pieces at a time.
    id_bytes = count_id_bytes(tokenizer) if tokenizer and level == 'file' else None
    lossless, sha256 = level != 'word', hashlib.sha256()
    num_tokens: dict[str, int] = {}
    starts: dict[str, list[int]] = {}
    with write_atomically(directory) as new_directory:
        new_directory.mkdir()
        for split in recipe.splits:
            num_tokens[split], starts[split] = 0, []
            with open(new_directory / f'{split}.npy', 'wb') as stream:
                _write_header(stream, id_dtype, 0)
                for text in texts[split]:
                    starts[split].append(num_tokens[split])
                    for piece, ids in encode(text, level, tokenizer, split):
                        if level == 'token' and tokenizer and lossless:
                            num_unknown = int((ids == tokenizer.token_to_id('<unk>')).sum())
                            lossless = num_unknown == len(UNKNOWN.findall(piece))
                        elif level == 'file':
                            lossless &= _has_all_bytes(piece, ids, id_bytes)
                        narrow_ids = ids.astype(id_dtype)
                        stream.write(narrow_ids.data)
                        sha256.update(narrow_ids.data)
                        num_tokens[split] += len(narrow_ids)
                    _check_length(recipe, split, text, num_tokens[split] - starts[split][-1])
                stream.seek(0)
                _write_header(stream, id_dtype, num_tokens[split])
            _check_num_tokens(recipe, split, texts[split][0], num_tokens[split])

        # The tokenizer, and what a reader needs to know of the ids.
        if tokenizer:
            (new_directory / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True))
        store_meta = {
            'vocabulary': num_ids,
            'lossless': lossless,
            'sha256': sha256.hexdigest(),
            'tokens': num_tokens,
            'starts': starts,
        }
        (new_directory / 'meta.json').write_text(json.dumps(store_meta, indent=2) + '\n')


def _has_all_bytes(piece: str, ids: np.ndarray, id_bytes: np.ndarray | None) -> bool:
    """Return whether the ids represent every byte of a piece, or False if `id_bytes` is None."""
    return id_bytes is not None and int(id_bytes[ids].sum()) == len(piece.encode())


def _write_header(stream: IO[bytes], dtype: np.dtype, length: int) -> None:
    """Write the header of an .npy file, which NumPy pads so that a new length fits in place."""
    header = {'descr': dtype.str, 'fortran_order': False, 'shape': (length,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _read_token_files(
    directory: pathlib.Path,
    recipe: Recipe,
    domains: tuple[str, ...],
    texts: Texts,
    num_bytes: dict[str, int],
) -> Corpus:
    """Map the files that `_write_token_files` wrote into memory.

    Raises:
      DataError: if a file is missing or truncated.
    """
    # Any file that is missing, cut or edited counts as damage.
    try:
        store_meta = json.loads((directory / 'meta.json').read_text())
        tokens = {split: np.load(directory / f'{split}.npy', mmap_mode='r') for split in num_bytes}
        required_keys = {'vocabulary', 'lossless', 'sha256', 'starts'}
        if not isinstance(store_meta, dict) or required_keys - store_meta.keys():
            raise ValueError('meta.json does not have all required keys')
        tokenizer_file, tokenizer = directory / 'tokenizer.json', None
        if tokenizer_file.exists():
            description = tokenizer_file.read_text()
            json.loads(description)  # raises ValueError where tokenizers raises a bare Exception
            tokenizer = tokenizers.Tokenizer.from_str(description)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise _make_damage_error(directory) from error

    # Sources without domains store the starts of their texts; they are read as one domain.
    starts = store_meta['starts'] if domains else {split: [0] for split in num_bytes}
    return Corpus(
        recipe.name,
        store_meta['vocabulary'],
        tokens,
        num_bytes,
        store_meta['lossless'],
        store_meta['sha256'],
        domains,
        {split: np.array(positions) for split, positions in starts.items()},
        tokenizer,
        texts,
        recipe.level,
    )


def _make_damage_error(directory: pathlib.Path) -> DataError:
    return DataError(f'the token files in {directory} are damaged. Delete that directory')


def _shorten(corpus: Corpus, num_tokens: int, level: Level) -> Corpus:
    """Return the corpus with only the first `num_tokens` tokens of train."""
    train_tokens, domain_starts = corpus.tokens['train'], corpus.starts['train']
    if not domain_starts[-1] < num_tokens <= len(train_tokens):
        minimum = f'more than {domain_starts[-1]:,}, so that every domain is included, and '
        raise DataError(
            f'`train_tokens` = {num_tokens}: expected 0 for all, or '
            f'{minimum if corpus.domains else ""}at most {len(train_tokens):,}, the size of train'
        )
    num_bytes = {split: size for split, size in corpus.num_bytes.items() if split != 'train'}
    if level == 'byte':
        num_bytes['train'] = num_tokens
    return dataclasses.replace(
        corpus,
        tokens=corpus.tokens | {'train': train_tokens[:num_tokens]},
        num_bytes=num_bytes,
        sha256=_compute_sha256(f'{corpus.sha256} {num_tokens}'.encode()),
    )


def _check_num_types(recipe: Recipe, texts: Texts, num_types: int) -> None:
    """Raise DataError if the full vocabulary of a well-known corpus has an unexpected size."""
    known_size = find_source(recipe.source).vocabulary
    is_whole = recipe.fit == ('train',) and recipe.vocabulary >= known_size > 0
    if recipe.level == 'token' and is_whole and num_types != known_size:
        raise find_source(recipe.source).make_error(
            f'{texts["train"][0].origin}: expected {known_size:,} distinct tokens including <eos>, '
            f'but found {num_types:,}'
        )


def _check_num_tokens(recipe: Recipe, split: str, text: Text, num_tokens: int) -> None:
    """Raise DataError if a split of a well-known corpus has an unexpected number of tokens."""
    source = find_source(recipe.source)
    expected = source.num_tokens.get(split, num_tokens)
    if recipe.level == 'token' and num_tokens != expected:
        raise source.make_error(
            f'{text.origin}: expected {expected:,} tokens including <eos>, but found {num_tokens:,}'
        )


def _check_length(recipe: Recipe, split: str, text: Text, num_tokens: int) -> None:
    """Raise DataError if a text has fewer than two tokens."""
    if num_tokens < 2:
        raise find_source(recipe.source).make_error(
            f'{text.origin}: the {split} text has fewer than two tokens. '
            f'Try a longer text, or a directory with a file for each split'
        )


def _compute_sha256(*buffers: bytes | np.ndarray) -> str:
    """Compute the SHA-256 hash of the bytes in all buffers."""
    digest, block_size = hashlib.sha256(), 2**22
    views = [
        np.ascontiguousarray(buffer).reshape(-1).view(np.uint8).data
        if isinstance(buffer, np.ndarray)
        else memoryview(buffer)
        for buffer in buffers
    ]
    num_bytes = sum(len(view) for view in views)
    with progress.Work('hashing the text', num_bytes, 'MB', 1e6) as work:
        for view in views:
            for block_start in range(0, len(view), block_size):
                block = view[block_start : block_start + block_size]
                digest.update(block)
                work.done += len(block)
    return digest.hexdigest()
