"""Laws of motion from frames: a variational autoencoder whose latent state moves by a learned law.

Mass and spring, pendulum, two bodies, seen as soft discs on 32×32 pixels. The latent law is an
energy, by concatenation or by an MI of q and p, or a field without an energy; all models have
about 300,000 parameters, most of them in the encoder and the decoder. Trained to predict 11
frames from the first 3 of them, evaluated on 101. Five seeds, and once more with five others.

    python -m launch.local --sweep=experiments/hamiltonian/sweep_frames.py --workdir=runs/frames \\
        --parallel=2

The report also has films of true and predicted frames, SYSTEM.gif; hamiltonian_frames.png and .pdf:
some of these frames, errors over time; and hamiltonian_frames.md: all scores with intervals, and
ranks in each set of seeds.

Source: after Toth et al. (ICLR 2020); what is different is said in
  experiments/hamiltonian/frames.py.
"""

import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from experiments.figures import roll_outs
from experiments.figures.roll_outs import Style
from experiments.hamiltonian import reports
from experiments.hamiltonian.mechanics import SYSTEMS
from mi.report import (
    plots,
    runs,
    statistics,
    tables,
)

CONFIG = 'experiments/hamiltonian/config.py:frames'
TITLE = 'Laws of motion from frames: how long predictions hold'
METRIC = 'valid'
SPLIT = CURVES = 'eval'
LOWER_IS_BETTER = False
BASELINE = None
PROBLEMS = ('problem.system',)
NOTES = [
    'Valid: the time for which the squared distance of the bodies in predicted frames to those in '
    'true ones is below 0.1 of its variance, as a share of 100 frames, ten times as many as in '
    'training; mean over 20 fresh trajectories. error_long: that distance, over all of them.',
    'A label is the system, the form of the law, and the fusion in it. All models have about '
    '287,000 parameters, some 4,500 of them in the law.',
    'Energies move by the generalized leapfrog with two iterations.',
    'An error or a drift that is above 100 or not a number counts as 100, so that a mean over '
    'trajectories may be that of the few that run away. A body that rests in the middle has an '
    'error of 1 and no drift: the drift of an arm that has not learned to move means nothing.',
]

ARMS = {
    'field, concat': Style('field, concat', plots.GREY, plots.DASHES[0]),
    'joint, concat': Style('energy, concat', plots.PALETTE[0], plots.DASHES[0]),
    'joint, mi': Style('energy, MI', plots.PALETTE[1], plots.DASHES[0]),
}
REFERENCE = ARMS['joint, concat'].label
SCORES = ('pixels', 'pixels_long', 'error', 'error_long', 'drift', 'drift_learnt')
FILM_ARMS = ('joint, concat', 'joint, mi', 'field, concat')
SIDE = 128  # of a film's pictures, pixels
CAPTION = 16
MILLISECONDS = 60  # a frame
BODIES = np.array([[0xD5, 0x5E, 0x00], [0x00, 0x72, 0xB2]])  # colors of the channels, on white
HORIZONS = (0, 1, 2, 5, 10)  # in the figure


def sweep() -> list[dict[str, Any]]:
    return reports.combine(list(ARMS))


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Write films and figures of the first seed's predictions, curves, and tables of scores."""
    sweep = runs.read_sweep(workdir)
    texts = []
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.6 + 1.9 * len(SYSTEMS)), layout='constrained')
        panels = figure.subplots(len(SYSTEMS), 2, width_ratios=(1.3, 1))
        for (pictures, errors), name in zip(panels, SYSTEMS, strict=True):
            arms = reports.select_arms(sweep, name, list(ARMS))
            artifacts = {arm: roll_outs.load_artifacts(workdir, f'{name}, {arm}') for arm in arms}
            films = _select_films(artifacts)
            pictures.set_axis_off()
            if films:
                _write_gif(out / f'{name}.gif', films, SYSTEMS[name].time)
                horizon = next(iter(arms.values())).config['problem']['horizon']
                image, size = _tile(films, horizon)
                pictures.imshow(image)
                for i, label in enumerate(films):
                    pictures.text(-4, (i + 0.5) * size, label, ha='right', va='center', fontsize=6)
                for i, h in enumerate(HORIZONS):
                    pictures.text((i + 0.5) * size, -4, f'{h} T', ha='center', fontsize=6)
            for arm, arrays in artifacts.items():
                values = arrays['error'].mean(-1)  # over trajectories
                time = SYSTEMS[name].time * np.arange(values.shape[1])
                roll_outs.draw_curve(errors, time, values, ARMS[arm])
            errors.set_ylabel(f'error, {tables.humanize(name)}')
            labeled = {ARMS[key].label: arm for key, arm in arms.items()}
            texts.append(reports.describe(sweep, name, labeled, SCORES, REFERENCE))
        panels[-1][1].set_xlabel('time')
        roll_outs.draw_legend(figure, columns=3)
        plots.save(figure, out, 'hamiltonian_frames')
    texts += [
        f'{text}\n'
        for text in (roll_outs.NOTE, statistics.CAUTION, sweep.describe_excluded())
        if text
    ]
    (out / 'hamiltonian_frames.md').write_text('\n'.join(texts), encoding='utf-8')


def _select_films(artifacts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return frames [time, side, side, 3] of the first seed's first trajectory, by label."""
    filmed = {arm: artifacts[arm] for arm in FILM_ARMS if arm in artifacts}
    films = {ARMS[arm].label: arrays['predicted'] for arm, arrays in filmed.items()}
    if filmed:
        films = {'true': next(iter(filmed.values()))['true'], **films}
    return {label: _paint(arrays[0, :, 0]) for label, arrays in films.items()}


def _paint(frames: np.ndarray) -> np.ndarray:
    """Convert brightness [..., bodies] in bytes to colors on white [..., 3] in bytes."""
    absorbed = frames[..., None] / 255 * (1 - BODIES / 255)
    return np.uint8(np.round(255 * np.prod(1 - absorbed, axis=-2)))


def _write_gif(path: pathlib.Path, films: dict[str, np.ndarray], time: float) -> None:
    """Write one GIF with all films side by side."""
    images = []
    for t, frames in enumerate(zip(*films.values(), strict=True)):
        image = Image.new('RGB', (SIDE * len(films), SIDE + CAPTION), 'white')
        draw = ImageDraw.Draw(image)
        for i, (label, frame) in enumerate(zip(films, frames, strict=True)):
            scaled = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            image.paste(scaled, (i * SIDE, 0))
            draw.text((i * SIDE + 4, SIDE + 2), label, 'black')
        draw.text((4, 2), f't = {t * time:.1f}', 'grey')
        images.append(image.quantize(64))
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)


def _tile(films: dict[str, np.ndarray], horizon: int) -> tuple[np.ndarray, int]:
    """Return a row of frames per film, at the HORIZONS, and the size of a frame with its margin."""
    margin = 2
    lines = []
    for frames in films.values():
        tiles = [frames[h * horizon] for h in HORIZONS if h * horizon < len(frames)]
        padding = ((margin, margin), (margin, margin), (0, 0))
        lines.append(np.concatenate([np.pad(f, padding, constant_values=200) for f in tiles], 1))
    return np.concatenate(lines), frames.shape[1] + 2 * margin
