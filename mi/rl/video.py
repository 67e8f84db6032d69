"""GIF videos of one episode for each task, with the instruction and the return so far."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from mi.rl.actors.worker import Policy
from mi.rl.agent import Agent, Inputs, Params
from mi.rl.envs.spec import HostEnvironment, Observation, Spec

SIDE = 240  # side of the picture, pixels
CAPTION = 30  # height of the text below it, pixels
MILLISECONDS = 150  # per frame
LAST_FRAMES = 8  # repetitions of the last frame

Frame = tuple[Observation, float]

# Category in the first layer → shape; others are filled squares.
SHAPES = {
    'xland': {3: 'circle', 4: 'box', 5: 'triangle'},
    'babyai': {4: 'door', 5: 'triangle', 6: 'circle', 7: 'box'},
    'actuator_inversion': {1: 'circle', 2: 'box'},
}
FIRST_PERSON = ('xland', 'babyai')  # the agent is in the middle of the last row, facing up
EMPTY = {'xland': (0, 1), 'babyai': (0, 1, 3)}  # categories without an object: unseen, empty, floor
COLORS = {
    'xland': ['white', 'red', 'green', 'blue', 'purple', 'yellow', 'grey', 'black'],
    'babyai': ['red', 'green', 'blue', 'purple', 'yellow', 'grey'],
}


def record_episodes(
    pool: HostEnvironment,
    agent: Agent,
    params: Params,
    rng_key: jax.Array,
    greedy: bool,
    max_steps: int = 500,
) -> dict[str, list[Frame]]:
    """Play an episode of each task, and return its frames: observations and returns so far.

    Args:
      pool: environments, at least one for each task.
      agent, params: the agent that acts, and its parameters.
      rng_key: random key for the actions.
      greedy: whether to take the most likely action instead of sampling.
      max_steps: number of steps after which an episode is cut.
    """
    policy, batch_size = Policy(agent, greedy), pool.batch
    step, policy_state = pool.reset(), policy.init(batch_size, rng_key)
    action, returns = jnp.zeros(batch_size, jnp.int32), np.zeros(batch_size)

    # The first row of each task is recorded.
    row_tasks = [int(task) for task in step.observation['task']]
    running = {task: row for row, task in reversed(list(enumerate(row_tasks)))}  # task → row
    frames: dict[str, list[Frame]] = {pool.spec.tasks[task]: [] for task in running}
    for _ in range(max_steps):
        # Record the frames of the rows whose episode runs.
        for task, row in running.items():
            observation = {entry: np.array(rows[row]) for entry, rows in step.observation.items()}
            frames[pool.spec.tasks[task]].append((observation, float(returns[row])))

        # Step all rows.
        inputs = Inputs(step.observation, action, step.reward, step.is_first)
        policy_state, action, _ = policy(params, policy_state, inputs)
        pool.send(np.asarray(action))
        step = pool.recv()
        returns += step.reward
        is_over = step.is_last | (step.discount == 0)

        # Repeat the last frame of an episode that ended, with its final return.
        for task, row in list(running.items()):
            if is_over[row]:
                task_frames = frames[pool.spec.tasks[task]]
                task_frames.append((task_frames[-1][0], float(returns[row])))
                del running[task]
        if not running:
            break
    return frames


def write(path: pathlib.Path, spec: Spec, task_name: str, frames: Sequence[Frame]) -> None:
    """Write frames as a GIF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        draw_frame(spec, task_name, observation, episode_return, step)
        for step, (observation, episode_return) in enumerate(frames)
    ]
    images += images[-1:] * LAST_FRAMES
    images[0].save(path, save_all=True, append_images=images[1:], duration=MILLISECONDS, loop=0)


def draw_frame(
    spec: Spec, task_name: str, observation: Observation, episode_return: float, step: int
) -> Image.Image:
    """Draw an observation, with the instruction or task name, the step and the return below it."""
    image = Image.new('RGB', (SIDE, SIDE + CAPTION), 'black')
    if 'pixels' in observation:
        pixels = observation['pixels']
        pixels = pixels if pixels.shape[-1] == 3 else np.repeat(pixels[..., -1:], 3, axis=-1)
        image.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    elif 'grid' in observation:
        _draw_grid(image, spec, observation['grid'])
    draw = ImageDraw.Draw(image)
    draw.text((4, SIDE + 3), get_instruction(spec, task_name, observation)[:44], 'white')
    draw.text((4, SIDE + 16), f'step {step}   return {episode_return:.2f}', 'white')
    return image


def get_instruction(spec: Spec, task_name: str, observation: Observation) -> str:
    """Return the instruction as text if its words are known, otherwise the name of the task."""
    tokens = observation.get('instruction')
    if tokens is None or not spec.words:
        return task_name
    return ' '.join(spec.words[token - 1] for token in tokens if token)


def _draw_grid(image: Image.Image, spec: Spec, grid: np.ndarray) -> None:
    """Draw the cells of a grid, whose first layer gives the shape and second layer the color."""
    env_name = spec.name.partition('/')[0]
    shapes, empty_categories = SHAPES.get(env_name, {}), EMPTY.get(env_name, (0,))
    colors = COLORS.get(env_name, ['white'])
    if env_name == 'babyai':  # [column, row]
        grid = grid.swapaxes(0, 1)
    num_rows, num_columns = grid.shape[:2]
    draw, cell_size = ImageDraw.Draw(image), SIDE / max(num_rows, num_columns)

    # Cells and their objects.
    for row in range(num_rows):
        for column in range(num_columns):
            category = int(grid[row, column, 0])
            color = int(grid[row, column, 1]) if grid.shape[-1] > 1 else 0
            left, top = column * cell_size, row * cell_size
            box = left, top, left + cell_size - 2, top + cell_size - 2
            draw.rectangle(box, '#202020')
            if category not in empty_categories:
                shape = shapes.get(category, 'square')
                _draw_object(draw, shape, colors[color % len(colors)], box, cell_size)

    # The agent, where the grid is what it sees.
    if env_name in FIRST_PERSON:
        left, top = num_columns // 2 * cell_size, (num_rows - 1) * cell_size
        middle, right, bottom = left + cell_size / 2, left + cell_size - 4, top + cell_size - 4
        corners = [(middle, top + 2), (right, bottom), (left + 4, bottom)]
        draw.polygon(corners, outline='orange')


def _draw_object(
    draw: ImageDraw.ImageDraw,
    shape: str,
    color: str,
    box: tuple[float, float, float, float],
    cell_size: float,
) -> None:
    """Draw an object into a cell, given by its box (left, top, right, bottom) in pixels."""
    left, top, right, bottom = box
    margin = cell_size / 5
    inner = left + margin, top + margin, right - margin, bottom - margin
    match shape:
        case 'circle':
            draw.ellipse(inner, color)
        case 'box':
            draw.rectangle(inner, color)
        case 'triangle':
            tip = (left + right) / 2, top + margin
            draw.polygon([tip, (inner[2], inner[3]), (inner[0], inner[3])], color)
        case 'door':
            draw.rectangle(box, outline=color, width=3)
        case _:
            draw.rectangle(box, color)
