"""An episode of each task as a GIF: what the agent sees, its instruction, its return so far."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mi.rl.actors.worker import Policy
from mi.rl.agent import Agent, Inputs
from mi.rl.envs.spec import HostEnvironment, Observation, Spec

SIDE = 240  # of the picture, pixels
CAPTION = 30  # below it, pixels
MILLISECONDS = 150  # a frame
LAST = 8  # frames that the last one stays

Frame = tuple[Observation, float]

# Category of the first layer → shape; what is not named is a filled square of its colour.
SHAPES = {
    'xland': {3: 'circle', 4: 'box', 5: 'triangle'},
    'babyai': {4: 'door', 5: 'triangle', 6: 'circle', 7: 'box'},
}
HIDDEN = {'xland': (0, 1), 'babyai': (0, 1, 3)}  # nothing there: unseen, empty, floor
COLOURS = {
    'xland': ['white', 'red', 'green', 'blue', 'purple', 'yellow', 'grey', 'black'],
    'babyai': ['red', 'green', 'blue', 'purple', 'yellow', 'grey'],
}


def episodes(
    pool: HostEnvironment, agent: Agent, params: Any, key: jax.Array, greedy: bool, most: int = 500
) -> dict[str, list[Frame]]:
    """The first episode of one row of each task, observation and return up to there, by task."""
    policy, B = Policy(agent, greedy), pool.batch
    step, acting, action = pool.reset(), policy.init(B, key), jnp.zeros(B, jnp.int32)
    first = {int(task): row for row, task in reversed(list(enumerate(step.observation['task'])))}
    frames: dict[str, list[Frame]] = {pool.spec.tasks[task]: [] for task in first}
    running, returned = dict(first), np.zeros(B)
    for _ in range(most):
        for task, row in running.items():
            observation = {name: np.array(a[row]) for name, a in step.observation.items()}
            frames[pool.spec.tasks[task]].append((observation, float(returned[row])))
        inputs: Any = step.observation, action, step.reward, step.is_first
        acting, action, _ = policy(params, acting, Inputs(*inputs))
        pool.send(np.asarray(action))
        step = pool.recv()
        returned += step.reward
        over = step.is_last | (step.discount == 0)
        for task, row in list(running.items()):
            if over[row]:
                seen = frames[pool.spec.tasks[task]]
                seen.append((seen[-1][0], float(returned[row])))
                del running[task]
        if not running:
            break
    return frames


def write(path: pathlib.Path, spec: Spec, task: str, frames: Sequence[Frame]) -> None:
    """One GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture(spec, task, *frame, step) for step, frame in enumerate(frames)]
    images += images[-1:] * LAST
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)


def picture(
    spec: Spec, task: str, observation: Observation, returned: float, step: int
) -> Image.Image:
    """What is seen in one step, with the instruction (or the task's name) below it."""
    image = Image.new('RGB', (SIDE, SIDE + CAPTION), 'black')
    if 'pixels' in observation:
        pixels = observation['pixels']
        pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., -1:], 3, axis=-1)
        image.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    elif 'grid' in observation:
        _draw(image, spec, observation['grid'])
    draw = ImageDraw.Draw(image)
    draw.text((4, SIDE + 3), instruction(spec, task, observation)[:44], 'white')
    draw.text((4, SIDE + 16), f'step {step}   return {returned:.2f}', 'white')
    return image


def instruction(spec: Spec, task: str, observation: Observation) -> str:
    """In words where they are known, else the task's name."""
    tokens = observation.get('instruction')
    if tokens is None or not spec.words:
        return task
    return ' '.join(spec.words[token - 1] for token in tokens if token)


def _draw(image: Image.Image, spec: Spec, grid: np.ndarray) -> None:
    """A grid's cells: the shape says the first layer, the colour the second."""
    kind = spec.name.partition('/')[0]
    shapes, hidden = SHAPES.get(kind, {}), HIDDEN.get(kind, (0,))
    colours = COLOURS.get(kind, ['white'])
    if kind == 'babyai':  # [column, row]
        grid = grid.swapaxes(0, 1)
    rows, columns = grid.shape[:2]
    draw, size = ImageDraw.Draw(image), SIDE / max(rows, columns)
    for y in range(rows):
        for x in range(columns):
            what, colour = int(grid[y, x, 0]), int(grid[y, x, 1]) if grid.shape[-1] > 1 else 0
            left, top = x * size, y * size
            right, bottom = left + size - 2, top + size - 2
            draw.rectangle((left, top, right, bottom), '#202020')
            if what in hidden:
                continue
            fill, inner = colours[colour % len(colours)], size / 5
            box = left + inner, top + inner, right - inner, bottom - inner
            match shapes.get(what, 'square'):
                case 'circle':
                    draw.ellipse(box, fill)
                case 'box':
                    draw.rectangle(box, fill)
                case 'triangle':
                    top_point = (left + right) / 2, top + inner
                    draw.polygon([top_point, (box[2], box[3]), (box[0], box[3])], fill)
                case 'door':
                    draw.rectangle((left, top, right, bottom), outline=fill, width=3)
                case _:
                    draw.rectangle((left, top, right, bottom), fill)
    if kind in SHAPES:  # the agent, in the middle of the last row, looks up
        left, top = columns // 2 * size, (rows - 1) * size
        middle = left + size / 2
        corners = [(middle, top + 2), (left + size - 4, top + size - 4), (left + 4, top + size - 4)]
        draw.polygon(corners, outline='orange')
