"""Conversion of Gymnasium's spaces: observations to features or pixels, actions to a number.

Box [h, w, c], [c, h, w] or [h, w]      'pixels' uint8, if its numbers are a picture's
Box of other shapes, Discrete, MultiBinary, MultiDiscrete, Dict and Tuple of them
                                        'features' float32, flat; one-hot where discrete
actions Discrete, MultiDiscrete, MultiBinary, Dict and Tuple of them
                                        numbered from 0
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mi.config import UserError

MOST_FEATURES = 2**16
MOST_ACTIONS = 1024
CHANNELS = (1, 2, 3, 4)

Convert = Callable[[Any], Any]


def observation(space: Any) -> tuple[str, tuple[int, ...], Convert]:
    """Return the entry of an observation, its shape, and the conversion to it.

    Raises:
      UserError: if neither features nor pixels can hold the space.
    """
    import gymnasium

    if _is_picture(space):
        return 'pixels', *_picture(space)
    if _has_picture(space):
        raise UserError(
            f'the observation space {space} has images among its entries: expected a single '
            f'image, or no images. Register an id whose constructor wraps it, as with '
            f'gymnasium.wrappers.TransformObservation'
        )
    if not space.is_np_flattenable:
        raise UserError(
            f'the observation space {space} varies in size: expected a fixed size. Register an id '
            f'whose constructor wraps it, as with gymnasium.wrappers.TransformObservation'
        )
    size = gymnasium.spaces.flatdim(space)
    if not 0 < size <= MOST_FEATURES:
        raise UserError(
            f'the observation space {space} has {size:,} numbers: expected 1 to {MOST_FEATURES:,}'
        )

    def flatten(value: Any) -> np.ndarray:
        with np.errstate(over='ignore'):  # what is too large is inf, and refused as such
            return np.asarray(gymnasium.spaces.flatten(space, value)).astype(np.float32)

    return 'features', (size,), flatten


def actions(space: Any) -> tuple[int, Convert]:
    """Return the number of actions, and the conversion of a number to an action.

    Raises:
      UserError: if actions are continuous, or too many.
    """
    number, decode = _count(space), _decode
    if number is None:
        raise UserError(
            f'the action space {space} is not discrete: expected a discrete one. Register an id '
            f'whose constructor wraps it, as with gymnasium.wrappers.DiscretizeAction'
        )
    if not 0 < number <= MOST_ACTIONS:
        raise UserError(
            f'the action space {space} has {number:,} actions: expected 1 to {MOST_ACTIONS:,}'
        )
    return number, lambda action: decode(space, int(action))


def _count(space: Any) -> int | None:
    """Return the number of elements of a discrete space; None if a part is not discrete."""
    import gymnasium

    match space:
        case gymnasium.spaces.Discrete():
            return int(space.n)
        case gymnasium.spaces.MultiDiscrete():
            return math.prod(space.nvec.flatten().tolist())
        case gymnasium.spaces.MultiBinary():
            return int(2 ** math.prod(space.shape))
        case gymnasium.spaces.Tuple() | gymnasium.spaces.Dict():
            counts = [_count(part) for part in _parts(space)]
            return None if None in counts else math.prod(counts)  # type: ignore[arg-type]
    return None


def _decode(space: Any, number: int) -> Any:
    """Return the element of a discrete space with this number; the last part counts fastest."""
    import gymnasium

    match space:
        case gymnasium.spaces.Discrete():
            return np.int64(number + space.start)
        case gymnasium.spaces.MultiDiscrete():
            digits = np.unravel_index(number, space.nvec.flatten())
            return (np.reshape(digits, space.shape) + space.start).astype(space.dtype)
        case gymnasium.spaces.MultiBinary():
            digits = np.unravel_index(number, (2,) * math.prod(space.shape))
            return np.reshape(digits, space.shape).astype(space.dtype)
    parts = _parts(space)
    numbers = np.unravel_index(number, [_count(part) or 0 for part in parts])
    values = [_decode(part, int(n)) for part, n in zip(parts, numbers, strict=True)]
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(values)
    return dict(zip(space.spaces, values, strict=True))


def _parts(space: Any) -> list[Any]:
    import gymnasium

    is_tuple = isinstance(space, gymnasium.spaces.Tuple)
    return list(space.spaces if is_tuple else space.spaces.values())


def _is_picture(space: Any) -> bool:
    """Return whether a space is a Box with 3 axes and channels, or with 2 axes and bytes."""
    import gymnasium

    if not isinstance(space, gymnasium.spaces.Box) or 0 in space.shape:
        return False
    if len(space.shape) == 2:
        return space.dtype == np.uint8 and min(space.shape) > 1
    if len(space.shape) != 3 or min(sorted(space.shape)[1:]) == 1:
        return False
    is_bounded = np.isfinite(space.low).all() and np.isfinite(space.high).all()
    has_channels = space.shape[0] in CHANNELS or space.shape[-1] in CHANNELS
    return space.dtype == np.uint8 or bool(is_bounded and has_channels)


def _has_picture(space: Any) -> bool:
    import gymnasium

    if isinstance(space, gymnasium.spaces.Tuple | gymnasium.spaces.Dict):
        return any(_is_picture(part) or _has_picture(part) for part in _parts(space))
    return False


def _picture(space: Any) -> tuple[tuple[int, ...], Convert]:
    """Return the shape [h, w, c] of a picture, and the conversion to it, in bytes."""
    shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
    is_first = shape[-1] not in CHANNELS and shape[0] < min(shape[1:])
    low, width = space.low.astype(np.float64), space.high.astype(np.float64) - space.low
    scale = 255 / np.where(width > 0, width, 1)

    def convert(value: Any) -> np.ndarray:
        picture = np.asarray(value)
        if space.dtype != np.uint8:
            if not np.isfinite(picture).all():
                raise UserError('a pixel of an observation is not finite. Fix the environment')
            picture = np.clip(np.rint((picture - low) * scale), 0, 255).astype(np.uint8)
        picture = picture.reshape(shape)
        return np.ascontiguousarray(np.moveaxis(picture, 0, -1)) if is_first else picture

    return ((*shape[1:], shape[0]) if is_first else shape), convert
