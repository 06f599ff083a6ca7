"""Test pictures whose number can be read back after lossy video coding.

A picture shows, from the top: two rows of eight blocks (16 bits: a 12-bit code and a
4-bit check), then a smooth moving scene with a disc, then a solid red block at the
lower left and a solid blue one at the lower right. So a reader that takes a wrong
frame, swaps red and blue, mirrors, turns or crops is found out.

code = (episode number in its source set * 64 + frame in the episode) * 2 + camera
(a second source set begins at episode number 16).
"""

import numpy as np

COLUMNS, LOW, HIGH = 8, 28, 228


def code_of(episode: int, frame: int, camera: int) -> int:
    assert 0 <= episode < 32 and 0 <= frame < 64 and camera in (0, 1)
    return (episode * 64 + frame) * 2 + camera


def parts_of(code: int) -> tuple[int, int, int]:
    """(episode, frame, camera) of a code."""
    return code // 128, code // 2 % 64, code % 2


def _check(code: int) -> int:
    return (code ^ (code >> 4) ^ (code >> 8) ^ 0b1010) & 0xF


def _edges(length: int, parts: int) -> list[int]:
    return [round(i * length / parts) for i in range(parts + 1)]


def render(code: int, height: int, width: int) -> np.ndarray:
    """uint8 picture (height, width, 3), RGB."""
    episode, frame, camera = parts_of(code)
    y, x = np.mgrid[0:height, 0:width]
    out = np.empty((height, width, 3), np.float64)
    out[..., 0] = 70 + 40 * np.sin(2 * np.pi * (x / width + frame / 40))
    out[..., 1] = 90 + 40 * np.cos(2 * np.pi * (y / height + episode / 7))
    out[..., 2] = 110 + 30 * np.sin(2 * np.pi * (x + y) / (width + height) + camera)
    cx = width * (0.5 + 0.3 * np.sin(2 * np.pi * frame / 30 + episode))
    cy = height * (0.60 + 0.08 * np.cos(2 * np.pi * frame / 20))
    out[(x - cx) ** 2 + (y - cy) ** 2 < (0.11 * height) ** 2] = (230, 200, 60)
    word = (code << 4) | _check(code)
    ys, xs = _edges(height // 4 * 2, 4)[:3], _edges(width, COLUMNS)
    for bit in range(16):
        row, column = divmod(bit, COLUMNS)
        value = HIGH if word >> (15 - bit) & 1 else LOW
        out[ys[row] : ys[row + 1], xs[column] : xs[column + 1]] = value
    block = height // 5
    out[-block:, :block] = (220, 30, 30)
    out[-block:, -block:] = (30, 30, 220)
    return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def read(picture: np.ndarray) -> int:
    """The code in a picture (H, W, 3) uint8, or -1 if it isn't there whole."""
    picture = np.asarray(picture, np.float64)
    height, width = picture.shape[:2]
    grey = picture.mean(2)
    ys, xs = _edges(height // 4 * 2, 4)[:3], _edges(width, COLUMNS)
    word = 0
    for bit in range(16):
        row, column = divmod(bit, COLUMNS)
        h, w = ys[row + 1] - ys[row], xs[column + 1] - xs[column]
        block = grey[ys[row] + h // 4 : ys[row + 1] - h // 4, xs[column] + w // 4 : xs[column + 1] - w // 4]
        word = word << 1 | int(block.mean() > (LOW + HIGH) / 2)
    code = word >> 4
    if word & 0xF != _check(code):
        return -1
    block = height // 5
    red = picture[-block + 2 : -2, 2 : block - 2].mean((0, 1))
    blue = picture[-block + 2 : -2, -block + 2 : -2].mean((0, 1))
    if red[0] < 120 or red[2] > 110 or blue[2] < 120 or blue[0] > 110:
        return -1
    return code
