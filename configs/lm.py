"""Language models: an LSTM or a Transformer that fuses the token stream with a context.

Source: the question is that of Jayakumar et al. (ICLR 2020), section on language modelling. All
sizes are ours, chosen for a laptop. See configs/lm_*.py for the settings of known benchmarks.

    python -m mi.main --config=configs/lm.py --workdir=runs/lm
    python -m mi.main --config=configs/lm.py:quickstart,fusion=concat --workdir=runs/concat
    python -m mi.main --config=configs/lm.py:core=transformer,site=attention --workdir=runs/xl
    python -m mi.main --config=configs/lm.py --config.optim.learning_rate=5e-4 --workdir=runs/slow

The argument after the colon consists of these parts, in any order:

quickstart         minutes on two cores
fusion_study       five minutes per arm on one core, for experiments/lm_fusion.py
table              a minute per arm on one core, for experiments/lm_table.py
table_enwik8       ten minutes per arm on bytes, for experiments/lm_table_enwik8.py
tiny               seconds, for tests
fusion=NAME, site=NAME, source=NAME
                   set config.model.fusion.name, config.model.site or config.model.source
core=NAME          set config.model.core; core=transformer also sets sizes, which presets override
"""

from collections.abc import Mapping

import ml_collections

from configs import arguments
from mi.training import optim

KEYS = {
    'core': 'model.core',
    'fusion': 'model.fusion.name',
    'site': 'model.site',
    'source': 'model.source',
}
CORES: dict[str, arguments.Settings] = {
    'transformer': {
        'model.layers': 4,
        'model.embed': 256,
        'model.hidden': 256,
        'optim.learning_rate': 1e-3,
        'optim.warmup_steps': 200,
    }
}
# For comparisons of arms: one number of parameters, three seeds, no dropout.
COMPARISON: arguments.Settings = {
    'seeds': (0, 1, 2),
    'dropout.input': 0.0,
    'dropout.layer': 0.0,
    'dropout.output': 0.0,
    'match.by': 'parameters',
    'eval.batch': 64,
}
# The rows of a table: all arms have the parameters of the LSTM without a context.
TABLE: arguments.Settings = {
    **COMPARISON,
    'seeds': (0, 1, 2, 3, 4),
    'match.baseline': 'plain',
    'model.context': 8,  # W of a full MI takes up to half of the core
    'train.batch': 16,
    'train.length': 32,
    'train.log_every': 50,
}
# A minute on a laptop, on Austen's text: the preset `smoke` of configs/lm_*.py.
SMOKE: arguments.Settings = {
    'data.source': 'austen',
    'train.batch': 16,
    'train.length': 32,
    'train.steps': 60,
    'train.log_every': 20,
    'train.eval_every': 20,
    'train.save_every': 20,
    'eval.length': -1,
    'optim.warmup_steps': -1,
}
PRESETS: dict[str, arguments.Settings] = {
    'default': {},
    'quickstart': {  # minutes on two cores
        **COMPARISON,
        'data.level': 'bpe',
        'data.vocabulary': 1024,
        'model.embed': 64,
        'model.hidden': 256,
        'model.fusion.hidden': 64,
        'train.steps': 400,
        'train.log_every': 20,
        'train.eval_every': 50,
        'train.save_every': 100,
        'eval.valid_tokens': 30_000,
        'optim.learning_rate': 4e-3,
    },
    'fusion_study': {  # experiments/lm_fusion.py: five minutes an arm on one core
        **COMPARISON,
        'model.embed': 48,  # keeps W of a full MI at a fifth of the model
        'model.context': 16,
        'model.fusion.rank': 16,
        'model.hidden': 128,
        'model.layers': 2,
        'model.heads': 4,
        'model.ffn': 352,
        'model.memory': 64,
        'train.steps': 1_000,
        'train.batch': 16,
        'train.log_every': 50,
        'train.eval_every': 250,
        'train.save_every': 250,
        'eval.length': 256,
        'eval.valid_tokens': 50_000,
        'eval.final_tokens': 500_000,
        'optim.learning_rate': 3e-3,
    },
    'table': {  # experiments/lm_table.py
        **TABLE,
        'data.level': 'word',
        'data.vocabulary': 2_000,
        'model.embed': 48,
        'model.hidden': 112,
        'train.steps': 400,
        'train.eval_every': 200,
        'train.save_every': 200,
        'eval.length': 32,
        'eval.valid_tokens': 10_000,
        'eval.final_tokens': 50_000,
        'optim.learning_rate': 4e-3,
    },
    'table_enwik8': {  # experiments/lm_table_enwik8.py
        **TABLE,
        'data.source': 'enwik8',
        'data.train_tokens': 10_000_000,
        'model.embed': 64,
        'model.hidden': 256,
        'train.length': 64,
        'train.steps': 2_500,
        'train.eval_every': 250,
        'train.save_every': 250,
        'eval.valid_tokens': 50_000,
        'eval.final_tokens': 500_000,
        'optim.learning_rate': 3e-3,
    },
    'tiny': {  # seconds, for tests
        'model.embed': 16,
        'model.hidden': 32,
        'model.ffn': 32,
        'model.context': 8,
        'model.fusion.rank': 4,
        'model.fusion.hidden': 16,
        'train.steps': 20,
        'train.batch': 4,
        'train.length': 16,
        'train.log_every': 5,
        'train.eval_every': 10,
        'train.save_every': 5,
        'optim.warmup_steps': -1,
        'eval.batch': 128,
        'eval.valid_tokens': 5_000,
    },
}


def get_config(arg: str = 'default') -> ml_collections.ConfigDict:
    argument = arguments.parse('configs/lm.py', arg, PRESETS, KEYS)
    config = ml_collections.ConfigDict()
    config.task = 'lm'
    config.seeds = (0,)  # trained simultaneously, logged separately
    config.tracker = 'none'  # a name in mi.training.trackers.TRACKERS: none, wandb, trackio

    config.data = data_config()
    config.model = model_config()
    config.dropout = dropout_config()
    config.loss = loss_config()
    config.match = match_config()
    config.train = train_config()
    config.eval = evaluation_config()
    config.dynamic = dynamic_config()
    config.sample = sample_config()
    config.optim = optim.get_config()
    config.optim.learning_rate = 2e-3

    apply_argument(config, argument, PRESETS)
    return config.lock()


def apply_argument(
    config: ml_collections.ConfigDict,
    argument: arguments.Argument,
    presets: Mapping[str, arguments.Settings],
) -> None:
    """Set the sizes of the core in an argument, then its presets, then its values."""
    config.update_from_flattened_dict(CORES.get(argument.values.get('model.core', ''), {}))
    config.update_from_flattened_dict(argument.merge(presets))
    config.update_from_flattened_dict(argument.values)


def data_config() -> ml_collections.ConfigDict:
    """Return the section `data`, with corpus and tokens."""
    config = ml_collections.ConfigDict()
    config.source = 'austen'  # of mi.lm.data.sources: a corpus, file, directory, 'module:read'
    config.path = ''  # where the files of a known corpus are; '' is $MI_DATA/SOURCE
    config.level = 'byte'  # byte, bpe, word, token, file
    config.vocabulary = 10_000  # at most; bpe, word and token
    config.tokenizer = ''  # path of a tokenizer.json of the library tokenizers; file
    config.train_tokens = 0  # from the start of the training text; 0 for all
    config.cache = ''  # directory for token files; '' is $MI_CACHE or ~/.cache/mi
    return config


def model_config() -> ml_collections.ConfigDict:
    """Return the section `model`, with core, fusion site, context and fusion."""
    config = ml_collections.ConfigDict()
    config.core = 'lstm'  # a name in mi.cells.CELLS, or transformer
    config.embed = 128  # E
    config.hidden = 512  # H
    config.layers = 1
    config.tied = True  # input and output embedding
    config.cutoffs = ()  # of an adaptive softmax: first id of each tail cluster; () disables it
    config.divisor = 4  # of the adaptive softmax: tail i has embed / divisor^i features
    config.dtype = 'float32'  # of the products: float32, bfloat16
    config.impl = 'xla'  # of the LSTM: xla, or cudnn on an NVIDIA GPU

    config.rounds = 5  # of the Mogrifier
    config.rank = 0  # of its matrices; 0 for full ones
    config.capped = True  # its input gate: min(1 − f, i)
    # Other fields of the core, by name: --config.model.core_options="{'hyper_features': 64}"
    config.core_options = ml_collections.ConfigDict()

    # Of the Transformer alone, up to remat.
    config.heads = 4
    config.kv_heads = 0  # heads of keys and values; 0 for as many
    config.ffn = 1024  # hidden features of feed-forward layers, also those of the LSTM's site ffn
    config.activation = 'swiglu'  # swiglu, relu, gelu
    config.positions = 'rotary'  # rotary, relative (Transformer-XL's)
    config.memory = 0  # M: tokens of the segments before that are attended to
    config.remat = False  # recompute the activations of each block in the backward pass

    config.site = 'encoder'  # none, encoder, decoder, both, input_gate, norm, ffn, attention
    # The context: recurrent (an LSTM of its own), summary (a decaying mean), domain (one-hot), or
    # state (the core's), with which fusion and input projection run in the loop over time, unless
    # the site is the decoder; docs/lm.md has what that costs.
    config.source = 'recurrent'
    config.context = 32  # m; for domain it is their number
    config.fusion = fusion = ml_collections.ConfigDict()
    fusion.name = 'mi'  # a name in mi.fusion.FUSIONS, or 'package.module:Class'
    # Other fields of its module, by name: --config.model.fusion.options="{'factors': 4}"
    fusion.options = ml_collections.ConfigDict()
    fusion.rank = 32  # of the fusions that have one: mi_low_rank, mi_tucker, mlb, …
    fusion.hidden = 128  # of those that have a hidden layer: concat_mlp, hypernetwork, …
    return config


def dropout_config() -> ml_collections.ConfigDict:
    """Return the section `dropout`, with rates; see mi.lm.dropout."""
    config = ml_collections.ConfigDict()
    config.word = 0.0
    config.input = 0.1
    config.layer = 0.1
    config.state = 0.0
    config.attention = 0.0
    config.output = 0.1
    config.locked = False  # the same features at all steps of a segment
    return config


def loss_config() -> ml_collections.ConfigDict:
    """Return the section `loss`."""
    config = ml_collections.ConfigDict()
    config.label_smoothing = 0.0
    config.z_loss = 0.0  # weight of (ln Z)²
    config.chunk = 0  # tokens per block of logits, for large vocabularies; 0 for all
    return config


def match_config() -> ml_collections.ConfigDict:
    """Return the section `match`, which sets one model size such that all arms have equal cost."""
    config = ml_collections.ConfigDict()
    config.by = 'none'  # none, parameters, flops (forward, per token)
    config.knob = 'hidden'  # the size that is changed: hidden (H), rank
    config.baseline = 'concat'  # whose cost is reached: fusion concat, or plain, without a fusion
    config.target = 0  # the cost to reach; 0 for that of the baseline
    return config


def train_config() -> ml_collections.ConfigDict:
    """Return the section `train`, with steps, batch, devices and logging."""
    config = ml_collections.ConfigDict()
    config.steps = 5_000
    config.batch = 32  # B: streams read in parallel, a seed, over all devices
    config.length = 64  # T: tokens a stream and step; truncated BPTT, state carries over
    config.accumulate = 1  # parts of the batch that run one after another; their gradients add up
    config.fsdp = 1  # devices that share one copy of parameters and optimizer
    config.mesh = ()  # devices along (seed, data, fsdp); (): seeds first, then the batch
    config.matmul_precision = 'default'  # of f32 products: default, high, highest
    config.log_every = 50
    config.eval_every = 500  # on the validation text
    config.save_every = 500
    config.keep = 2  # checkpoints
    return config


def evaluation_config() -> ml_collections.ConfigDict:
    """Return the section `eval`, with segments and numbers of tokens."""
    config = ml_collections.ConfigDict()
    config.batch = 32
    # Tokens of a segment; -1: train.length for a Transformer without memory, which has seen no
    # other positions, and 256 for others
    config.length = -1
    config.memory = -1  # of a Transformer, tokens; -1 for that of training
    config.stride = 0  # of a sliding window of `length`; 0 carries state instead
    config.valid_tokens = 0  # of the validation text during training; 0 for all
    config.final_tokens = 0  # of the validation and test text at the end; 0 for all
    return config


def dynamic_config() -> ml_collections.ConfigDict:
    """Return the section `dynamic`, for dynamic evaluation with --mode=eval."""
    config = ml_collections.ConfigDict()
    config.tokens = 0  # of each text; 0 for none of it
    config.length = 5  # tokens between two updates
    config.learning_rate = 5e-5
    config.decay = 2e-3  # back to the trained parameters
    config.epsilon = 2e-5  # beside the root of the mean square of gradients
    config.statistics = 200  # segments of the training text for the mean square of gradients
    return config


def sample_config() -> ml_collections.ConfigDict:
    """Return the section `sample`, for text generation with --mode=sample."""
    config = ml_collections.ConfigDict()
    config.prompt = 'It is a truth universally acknowledged,'
    config.texts = 1  # of each seed
    config.tokens = 400
    config.temperature = 0.8  # 0 for the likeliest token
    config.top_p = 0.95  # of the distribution, the likeliest tokens
    return config
