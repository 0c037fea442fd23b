"""benchmarks/quality.py in small: formats train, and its numbers are what it says they are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from benchmarks import quality

FIVE_EPOCHS = 225


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark's own processes: batches are too small to share, least of all on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def digits_loss(formats: str) -> float:
    return float(quality.train("digits", formats, seed=0, steps=FIVE_EPOCHS)["held_out_loss"])


@pytest.mark.parametrize("formats", ["stochastic + bf16", "split16 + bf16", "split8 + 8bit"])
def test_compressed_state_trains_the_digits(formats: str) -> None:
    """Three seeds of such a third of the task ended within 0.9% of fp32; untrained, the loss is four times as high."""
    assert abs(digits_loss(formats) / digits_loss("fp32") - 1.0) <= 0.02
    assert digits_loss("fp32") < 0.7


def test_language_model_learns_the_text() -> None:
    """In 20 updates from the loss of 256 equally likely bytes to below that of half of them."""
    run = quality.train("text", "split8 + 8bit", seed=0, steps=20)
    assert run["held_out_loss"] < math.log(128)


def test_runs_of_a_seed_start_alike_and_see_the_same() -> None:
    for task in quality.TASKS.values():
        first, again = task.make_model(3), task.make_model(3)
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters(), strict=True))
        batches, again_batches, others = task.batches(3), task.batches(3), task.batches(4)
        for _ in range(2):
            (inputs, labels), (same_inputs, same_labels) = next(batches), next(again_batches)
            assert torch.equal(inputs, same_inputs)
            assert torch.equal(labels, same_labels)
            assert not torch.equal(inputs, next(others)[0])


def test_held_out_text_is_not_trained_on() -> None:
    text, (inputs, labels) = quality.text(), quality.held_out_text()
    assert torch.equal(inputs[0, 1:], labels[: quality.CONTEXT - 1]), "labels are the bytes that follow"
    start = len(text) * 9 // 10
    assert torch.equal(inputs[0], text[start : start + quality.CONTEXT])
    windows, _ = quality.windows(text[:start], torch.tensor([start - quality.CONTEXT - 1]))
    assert torch.equal(windows[0], text[start - quality.CONTEXT - 1 : start - 1])


def test_summary_compares_within_a_seed() -> None:
    def run(formats: str, seed: int, loss: float) -> dict[str, object]:
        shared = {"task": "digits", "training_loss": 0.0, "accuracy": 1.0}
        return {"formats": formats, "seed": seed, "held_out_loss": loss, **shared}

    runs = [run("fp32", 0, 1.0), run("fp32", 1, 2.0), run("x", 0, 1.1), run("x", 1, 1.8)]
    results = quality.summary(runs)
    assert results["digits"]["x"]["percent_above_fp32"] == [10.0, -10.0]
    assert list(quality.table(results))[1].split() == [
        "digits",
        "x",
        "1.1000,",
        "1.8000",
        "+0.00%",
        "(-10.00",
        "to",
        "+10.00)",
    ]
