"""Conversion of Gymnasium spaces: observations to features or pixels, actions to numbers.

Observation space                       entry
Box [h, w, c] or [c, h, w]              'pixels' uint8, if the values are those of an image
Box [h, w] of bytes                     'pixels' uint8
other Box, Discrete, MultiBinary, MultiDiscrete, and Dict or Tuple of these
                                        'features' float32, flattened; one-hot if discrete

Action space                            number
Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of these
                                        counted from 0
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mi.config import UserError

MAX_FEATURES = 2**16
MAX_ACTIONS = 1024
CHANNELS = (1, 2, 3, 4)

Space = Any  # gymnasium.Space; the package is optional
Element = Any  # of a space: an array, a number, or a dict or tuple of them
Convert = Callable[[Element], Element]


def observation(space: Space) -> tuple[str, tuple[int, ...], Convert]:
    """Return 'pixels' or 'features', the shape of this entry, and the conversion to it.

    Raises:
      UserError: if the space fits neither features nor pixels.
    """
    import gymnasium

    # A picture becomes pixels; other spaces must have one size.
    if _is_picture(space):
        return 'pixels', *_describe_picture(space)
    if _has_picture(space):
        raise UserError(
            f'the observation space {space} has images among other entries: expected a single '
            f'image, or no images. Register an id whose constructor wraps it, as with '
            f'gymnasium.wrappers.TransformObservation'
        )
    if not space.is_np_flattenable:
        raise UserError(
            f'the observation space {space} varies in size: expected a fixed size. Register an id '
            f'whose constructor wraps it, as with gymnasium.wrappers.TransformObservation'
        )

    # Flatten everything else to features.
    num_features = gymnasium.spaces.flatdim(space)
    if not 0 < num_features <= MAX_FEATURES:
        raise UserError(
            f'the observation space {space} has {num_features:,} numbers: expected 1 to '
            f'{MAX_FEATURES:,}'
        )

    def flatten(element: Element) -> np.ndarray:
        with np.errstate(over='ignore'):  # what is too large is inf, and refused as such
            return np.asarray(gymnasium.spaces.flatten(space, element)).astype(np.float32)

    return 'features', (num_features,), flatten


def actions(space: Space) -> tuple[int, Convert]:
    """Return the number of actions, and the conversion of a number to an action.

    Raises:
      UserError: if actions are continuous, or there are too many.
    """
    num_actions = _count_elements(space)
    if num_actions is None:
        raise UserError(
            f'the action space {space} is not discrete. Register an id whose constructor makes it '
            f'so, for example with gymnasium.wrappers.DiscretizeAction'
        )
    if not 0 < num_actions <= MAX_ACTIONS:
        raise UserError(
            f'the action space {space} has {num_actions:,} actions: expected 1 to {MAX_ACTIONS:,}'
        )
    return num_actions, lambda action: _decode_element(space, int(action))


def _count_elements(space: Space) -> int | None:
    """Return the number of elements of a discrete space, or None if a part is not discrete."""
    import gymnasium

    match space:
        case gymnasium.spaces.Discrete():
            return int(space.n)
        case gymnasium.spaces.MultiDiscrete():
            return math.prod(space.nvec.flatten().tolist())
        case gymnasium.spaces.MultiBinary():
            return int(2 ** math.prod(space.shape))
        case gymnasium.spaces.Tuple() | gymnasium.spaces.Dict():
            field_counts = [_count_elements(field) for field in _list_fields(space)]
            return None if None in field_counts else math.prod(field_counts)  # type: ignore[arg-type]
    return None


def _decode_element(space: Space, number: int) -> Element:
    """Return the element of a discrete space with this number. The last part varies fastest."""
    import gymnasium

    match space:
        case gymnasium.spaces.Discrete():
            return np.int64(number + int(space.start))
        case gymnasium.spaces.MultiDiscrete():
            digits = np.unravel_index(number, space.nvec.flatten())
            return (np.reshape(digits, space.shape) + space.start).astype(space.dtype)
        case gymnasium.spaces.MultiBinary():
            digits = np.unravel_index(number, (2,) * math.prod(space.shape))
            return np.reshape(digits, space.shape).astype(space.dtype)
    fields = _list_fields(space)
    field_numbers = np.unravel_index(number, [_count_elements(field) or 0 for field in fields])
    elements = [
        _decode_element(field, int(field_number))
        for field, field_number in zip(fields, field_numbers, strict=True)
    ]
    if isinstance(space, gymnasium.spaces.Tuple):
        return tuple(elements)
    return dict(zip(space.spaces, elements, strict=True))


def _list_fields(space: Space) -> list[Space]:
    import gymnasium

    is_tuple = isinstance(space, gymnasium.spaces.Tuple)
    return list(space.spaces if is_tuple else space.spaces.values())


def _is_picture(space: Space) -> bool:
    """Return whether a space is an image: a Box with 3 axes and channels, or 2 axes of bytes."""
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


def _has_picture(space: Space) -> bool:
    import gymnasium

    if isinstance(space, gymnasium.spaces.Tuple | gymnasium.spaces.Dict):
        return any(_is_picture(field) or _has_picture(field) for field in _list_fields(space))
    return False


def _describe_picture(space: Space) -> tuple[tuple[int, ...], Convert]:
    """Return the shape [h, w, c] of an image, and the conversion to it, as bytes."""
    picture_shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
    is_channels_first = picture_shape[-1] not in CHANNELS and picture_shape[0] < min(
        picture_shape[1:]
    )
    low_values = space.low.astype(np.float64)
    value_range = space.high.astype(np.float64) - space.low
    scale = 255 / np.where(value_range > 0, value_range, 1)

    def convert(element: Element) -> np.ndarray:
        picture = np.asarray(element)
        if space.dtype != np.uint8:
            if not np.isfinite(picture).all():
                raise UserError('an observation has non-finite pixels. Fix the environment')
            picture = np.clip(np.rint((picture - low_values) * scale), 0, 255).astype(np.uint8)
        picture = picture.reshape(picture_shape)
        return np.ascontiguousarray(np.moveaxis(picture, 0, -1)) if is_channels_first else picture

    entry_shape = (*picture_shape[1:], picture_shape[0]) if is_channels_first else picture_shape
    return entry_shape, convert
