"""Sweep that compares MI and concatenation in laws of motion learned from frames.

The systems are a mass and spring, a pendulum, and two bodies, rendered as soft discs on 32×32
pixels. The model is a variational autoencoder whose latent state follows a learned law: an energy
that fuses q and p by concatenation or by an MI, or a field without an energy. All models have about
300,000 parameters, most of them in the encoder and the decoder. They are trained to predict 11
frames from the first 3, and are evaluated on 101 frames. Every arm is trained with two sets of five
seeds.

    python -m launch.local --sweep=experiments/hamiltonian/sweep_frames.py --workdir=runs/frames \
        --parallel=2

The report also has SYSTEM.gif, with animations of true and predicted frames, hamiltonian_frames.png
and .pdf, with some of these frames and errors over time, and hamiltonian_frames.md, with all
scores, their intervals, and ranks in each set of seeds.

Source: Toth et al. (ICLR 2020). experiments/hamiltonian/frames.py lists the differences.
"""

import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from experiments.figures import roll_outs
from experiments.figures.roll_outs import Style
from experiments.hamiltonian import reports
from experiments.hamiltonian.mechanics import SYSTEMS
from launch.sweep import Overrides
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


def sweep() -> list[Overrides]:
    return reports.combine(list(ARMS))


def report(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """Write animations and figures of the first seed's predictions, curves, and score tables."""
    sweep = runs.read_sweep(workdir)
    sections = []
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(plots.WIDTH, 0.6 + 1.9 * len(SYSTEMS)), layout='constrained')
        panel_grid = figure.subplots(len(SYSTEMS), 2, width_ratios=(1.3, 1))
        # A row for each system: frames at some horizons, then the error over time.
        for (film_axes, error_axes), system in zip(panel_grid, SYSTEMS, strict=True):
            arms = reports.select_arms(sweep, system, list(ARMS))
            artifacts = {arm: roll_outs.load_artifacts(workdir, f'{system}, {arm}') for arm in arms}
            films = _select_films(artifacts)
            film_axes.set_axis_off()
            if films:
                _write_gif(out / f'{system}.gif', films, SYSTEMS[system].time)
                horizon = next(iter(arms.values())).config['problem']['horizon']
                image, tile_size = _tile(films, horizon)
                film_axes.imshow(image)
                for row, label in enumerate(films):
                    y = (row + 0.5) * tile_size
                    film_axes.text(-4, y, label, ha='right', va='center', fontsize=6)
                for column, num_horizons in enumerate(HORIZONS):
                    x = (column + 0.5) * tile_size
                    film_axes.text(x, -4, f'{num_horizons} T', ha='center', fontsize=6)

            # The error over time, and the tables.
            for arm, arrays in artifacts.items():
                mean_errors = arrays['error'].mean(-1)  # over trajectories
                time = SYSTEMS[system].time * np.arange(mean_errors.shape[1])
                roll_outs.draw_curve(error_axes, time, mean_errors, ARMS[arm])
            error_axes.set_ylabel(f'error, {tables.humanize(system)}')
            labeled_arms = {ARMS[arm_name].label: arm for arm_name, arm in arms.items()}
            sections.append(reports.describe(sweep, system, labeled_arms, SCORES, REFERENCE))
        panel_grid[-1][1].set_xlabel('time')
        roll_outs.draw_legend(figure, columns=3)
        plots.save(figure, out, 'hamiltonian_frames')
    sections += [
        f'{note}\n'
        for note in (roll_outs.NOTE, statistics.CAUTION, sweep.describe_excluded())
        if note
    ]
    (out / 'hamiltonian_frames.md').write_text('\n'.join(sections), encoding='utf-8')


def _select_films(artifacts: dict[str, dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the frames [time, side, side, 3] of the first seed's first trajectory, by label."""
    filmed = {arm: artifacts[arm] for arm in FILM_ARMS if arm in artifacts}
    films = {ARMS[arm].label: arrays['predicted'] for arm, arrays in filmed.items()}
    if filmed:
        films = {'true': next(iter(filmed.values()))['true'], **films}
    return {label: _paint(arrays[0, :, 0]) for label, arrays in films.items()}


def _paint(frames: np.ndarray) -> np.ndarray:
    """Convert brightness [..., bodies] to colors on a white background [..., 3], both uint8."""
    absorbed = frames[..., None] / 255 * (1 - BODIES / 255)
    return np.uint8(np.round(255 * np.prod(1 - absorbed, axis=-2)))


def _write_gif(path: pathlib.Path, films: dict[str, np.ndarray], time: float) -> None:
    """Write a GIF that shows all films side by side."""
    images = []
    for frame_index, frames in enumerate(zip(*films.values(), strict=True)):
        image = Image.new('RGB', (SIDE * len(films), SIDE + CAPTION), 'white')
        canvas = ImageDraw.Draw(image)
        for film_index, (label, frame) in enumerate(zip(films, frames, strict=True)):
            scaled = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            image.paste(scaled, (film_index * SIDE, 0))
            canvas.text((film_index * SIDE + 4, SIDE + 2), label, 'black')
        canvas.text((4, 2), f't = {frame_index * time:.1f}', 'grey')
        images.append(image.quantize(64))
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)


def _tile(films: dict[str, np.ndarray], horizon: int) -> tuple[np.ndarray, int]:
    """Return the frames at HORIZONS, one row per film, and the frame size with its margin."""
    margin = 2
    padding = ((margin, margin), (margin, margin), (0, 0))
    times = [num_horizons * horizon for num_horizons in HORIZONS]
    film_rows = []
    for frames in films.values():
        tiles = [frames[time] for time in times if time < len(frames)]
        padded = [np.pad(tile, padding, constant_values=200) for tile in tiles]
        film_rows.append(np.concatenate(padded, 1))
    return np.concatenate(film_rows), frames.shape[1] + 2 * margin
