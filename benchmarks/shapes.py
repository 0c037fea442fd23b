"""Parameter lists of real models: the shapes of their tensors, in the order of `model.parameters()`."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """torchvision.models.resnet50: 161 tensors, 25,557,032 elements (torchvision 0.26, models/resnet.py)."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]  # a convolution and its batch norm
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 124M: 148 tensors, 124,439,808 elements (transformers 5, models/gpt2, its default configuration)."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    layer: list[Shape] = [
        *norm,
        *((width, 3 * width), (3 * width,), (width, width), (width,)),
        *norm,
        *((width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    ]
    return [(50257, width), (1024, width), *layer * 12, *norm]


def llama3_8b(shrink: int = 1) -> list[Shape]:
    """Llama 3 8B: 291 tensors, 8,030,261,248 elements (Meta's configuration; transformers 5, models/llama).

    shrink: divides every dimension, and so the elements of the matrices by its square.
    """
    hidden, key_value, feed_forward, vocabulary = (n // shrink for n in (4096, 1024, 14336, 128256))
    layer: list[Shape] = [
        *((hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)),
        *((feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward)),
        *((hidden,), (hidden,)),
    ]
    return [(vocabulary, hidden), *layer * 32, (hidden,), (vocabulary, hidden)]


def flat(numel: int) -> list[Shape]:
    """One tensor."""
    return [(numel,)]


def even(num_tensors: int, numel: int) -> list[Shape]:
    """Many tensors of one size."""
    return [(numel,)] * num_tensors


def elements(shapes: list[Shape]) -> int:
    return sum(map(prod, shapes))


def shrunk_llama(limit: int) -> tuple[int, list[Shape]]:
    """The largest Llama 3 8B of at most `limit` elements, shrunk by a power of two, and by which."""
    shrink = 1
    while elements(llama3_8b(shrink)) > limit and shrink < 64:
        shrink *= 2
    return shrink, llama3_8b(shrink)
