"""Metadata of the distribution multiplicative-interactions, imported as mi."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent

RUN = [
    'absl-py>=2.1',
    'chex>=0.1.92',
    'flax>=0.12',
    'jax>=0.10,!=0.10.2,<0.13',
    'jaxlib!=0.10.2',
    'matplotlib>=3.10',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.6',
    'orbax-checkpoint>=0.11.33',
    'pyyaml>=6.0',
    'rich>=14.0',
    'scipy>=1.15',
    'tensorboardX>=2.6.4',
    'tokenizers>=0.22',
]
EXTRAS = {
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    # Other versions of torch pull gigabytes; only benchmarks and the golden file's script use it.
    'benchmark': ['torch==2.13.0', 'ray[rllib]>=2.50', 'envpool>=1.2'],
    'hub': ['datasets>=4.0'],
    'digits': ['scikit-learn>=1.6'],  # its images, for experiments/attention_conv
    'envpool': ['envpool>=1.2'],
    'gym': ['gymnasium>=1.2'],
    'vizdoom': ['gymnasium>=1.2', 'vizdoom>=1.3'],
    'ray': ['ray>=2.50'],
    'docs': ['mkdocs>=1.6,<2', 'mkdocs-material>=9.7', 'mkdocstrings[python]>=1.0'],
    'wandb': ['wandb>=0.22'],
    'trackio': ['trackio>=0.30'],
}
EXTRAS['test'] = [
    *('mypy>=2.0', 'pytest>=9.0', 'pytest-xdist>=3.8', 'ruff>=0.15'),
    'setuptools>=77',  # venv has none from Python 3.12 on; a test asks it what it would pack
    *('jsonschema>=4.23', 'kubernetes-validate>=1.34'),  # manifests
    *('dm-haiku>=0.0.16', 'equinox>=0.13'),  # models that mi.find is tested on
    *('minigrid>=3.0', 'xminigrid>=0.9'),  # peers that the environments are compared with
    *(
        package
        for extra in ('digits', 'docs', 'envpool', 'ray', 'vizdoom')
        for package in EXTRAS[extra]
    ),
]

setuptools.setup(
    name='multiplicative-interactions',
    version='0.1.0',
    description='Multiplicative interactions for JAX: fusing and conditioning streams',
    long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='jax flax multiplicative interactions hypernetworks conditioning fusion',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    project_urls={'Paper': 'https://openreview.net/forum?id=rylnK6VtDH'},
    python_requires='>=3.11,<3.14',
    # Own configs import configs.lm, own sweeps launch.sweep, from whatever directory they are in.
    packages=[
        *setuptools.find_packages(
            include=['mi', 'mi.*', 'launch', 'configs', 'experiments', 'experiments.*']
        ),
    ],
    package_data={'mi': ['py.typed', 'data/*.xz', 'report/page.*']},
    install_requires=RUN,
    extras_require=EXTRAS,
)
