"""The tables of formats and of quality in README.md: written by docs/make_readme.py, and true cell by cell.

Bytes are counted on the tensors of a step; bounds hold for every exponent and are nearly reached, so that none is
loose; the roundings themselves are swept in test_codec.py, the compiled ones against the twins used here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

import make_readme
import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Backend
from make_readme import Bound

from fused_sched import FusedScheduledAdam, backends, codec, precision

REMEDY = "run `make docs`"


def tables() -> list[list[list[str]]]:
    """README's tables of formats: of bytes, of masters, of moments; the cells of their rows."""
    bodies = [table.splitlines()[2:] for table in make_readme.formats().split("\n\n")]
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in body] for body in bodies]


# ---- up to date ------------------------------------------------------------------------------------------


def test_readme_is_what_the_script_writes() -> None:
    text = make_readme.README.read_text()
    assert make_readme.page(text) == text, REMEDY


def test_picture_shows_what_was_measured() -> None:
    assert make_readme.digest() in make_readme.PICTURE.read_text(), REMEDY
    assert make_readme.PICTURE.stat().st_size < 60_000


def test_place_of_a_table_must_be_marked() -> None:
    with pytest.raises(ValueError, match="must mark the place of formats once, got 0"):
        make_readme.page("")


# ---- one table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "name", "streams", "message"),
    [
        (codec.MASTERS, "split4", (), r"disagree on MASTERS: .*split4.*; rebuild"),
        (codec.MOMENTS, "4bit", codec.MOMENTS["8bit"], r"disagree on MOMENTS: .*4bit.*; rebuild"),
        (codec.MASTERS, "split8", codec.MASTERS["split16"], "other bytes per element; rebuild"),
        (codec.MOMENTS, "bf16", codec.MOMENTS["fp32"], "other bytes per element; rebuild"),
    ],
)
def test_format_that_only_one_side_knows_stops_the_import(
    table: dict[str, tuple[codec.Stream, ...]],
    name: str,
    streams: tuple[codec.Stream, ...],
    message: str,
    compiled: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = backends.select(compiled.name, compiled.device).module
    assert module is not None
    backends.register("again", module)  # nothing is wrong yet
    del backends._registered["again"]
    monkeypatch.setitem(table, name, streams)
    with pytest.raises(ImportError, match=message):
        backends.register("again", module)
    assert "again" not in backends._registered


@pytest.mark.parametrize("master", ["split16", "split8", "stochastic"])
def test_compiled_code_refuses_what_the_package_does(
    master: str, compiled: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(precision._MASTERS_OF, torch.float16, (master,))
    param = compiled.parameter([1.0, 2.0], torch.float16)
    param.grad = torch.ones_like(param)
    optimizer = compiled.optimizer([param], master=master)
    with pytest.raises((ValueError, RuntimeError), match=f'no update for fp16 .* master "{master}"'):
        optimizer.step()
    assert param.tolist() == [1.0, 2.0]


# ---- bytes -----------------------------------------------------------------------------------------------


def combinations() -> Iterator[tuple[torch.dtype, str, str, str]]:
    """Every combination in the table, read as its readers do, and the cell that tells its bytes."""
    for param, masters, *cells in tables()[0]:
        for master in codec.MASTERS if masters == "any, ignored" else re.findall(r"`(\w+)`", masters):
            for moments, cell in zip(codec.MOMENTS, cells, strict=True):
                yield getattr(torch, param.strip("`")), master, moments, cells[0] if cell == "as `fp32`" else cell


def test_columns_are_the_formats_of_moments() -> None:
    header = make_readme.formats().splitlines()[0]
    assert re.findall(r"`(\w+)`", header) == ["master", *codec.MOMENTS]


def test_every_combination_has_a_cell() -> None:
    told = [(dtype, master, moments) for dtype, master, moments, _ in combinations()]
    possible = set()
    for dtype in precision.FORMATS:
        for master in codec.MASTERS:
            try:
                precision.resolve_master(master, dtype)
            except ValueError:
                continue
            possible |= {(dtype, master, moments) for moments in codec.MOMENTS}
    assert len(told) == len(set(told))
    assert set(told) == possible


@pytest.mark.parametrize(("dtype", "master", "moments", "cell"), list(combinations()), ids=str)
def test_bytes_are_those_of_a_step(dtype: torch.dtype, master: str, moments: str, cell: str) -> None:
    numel = 4096
    param = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = FusedScheduledAdam([param], master=master, moments=moments)
    optimizer.step()
    kept, moved = map(float, cell.split(" / "))
    assert optimizer.bytes_per_param() == kept
    state = sum(v.nbytes for key, v in optimizer.state[param].items() if not key.startswith("step"))
    assert (2 * state + 2 * param.nbytes + param.grad.nbytes) / numel == moved


def test_default_is_the_master_of_auto() -> None:
    for (dtype, _), (_, master, *_) in zip(make_readme.ROWS, tables()[0], strict=True):
        if "(default)" in master:
            name = master.split("`")[1]
            assert precision.resolve_master("auto", dtype) == name
            param = torch.ones(1, dtype=dtype, requires_grad=True)
            param.grad = torch.ones_like(param)
            optimizer = FusedScheduledAdam([param])
            optimizer.step()
            assert [s.name for s in codec.MASTERS[name]] == [k for k in optimizer.state[param] if "master" in k]


def test_every_format_has_its_row() -> None:
    _, masters, moments = tables()
    for rows, table, use in (
        (masters, codec.MASTERS, make_readme.USE),
        (moments, codec.MOMENTS, make_readme.MOMENTS_USE),
    ):
        assert {row[0].strip("`") for row in rows} == set(table) == set(use)
        for row in rows:
            streams = table[row[0].strip("`")]
            assert float(row[1]) == sum(s.dtype.itemsize / s.group for s in streams)
            assert all(row)


# ---- bounds ----------------------------------------------------------------------------------------------


def normals(mantissas: int, lowest: int = 1, highest: int = 254) -> torch.Tensor:
    """Floats of both signs: of every exponent, the ends of its range, and others."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 1 << 23, (highest - lowest, mantissas))
    drawn[:, :6] = [0, 1, (1 << 23) - 1, 0x8000, 0x7FFF, 0x80]
    bits = (np.arange(lowest, highest)[:, None] << 23 | drawn).astype(np.uint32).reshape(-1)
    bits[1::2] |= 1 << 31
    return torch.from_numpy(bits.view(np.float32).copy())


def bounds_told(cell: str, symbol: str) -> list[Bound | None]:
    """The bounds in a cell of the tables, read back."""
    if cell == "none":
        return [None]
    one = (
        rf"(≤|<) 2<sup>(-\d+)</sup>&#124;{symbol}&#124;(?: or 2<sup>(-\d+)</sup> of the power of two covering [\w' ]+)?"
    )
    assert re.fullmatch(rf"{one}(?: \((\w+)\), {one} \((\w+)\))?", cell), cell
    return [
        Bound(int(relative), int(floor) if floor else None, strict=sign == "<")
        for sign, relative, floor in re.findall(one, cell)
    ]


def test_bounds_in_the_tables_are_those_that_are_tested() -> None:
    _, masters, moments = tables()
    for name, _, cell, _ in masters:
        bounds = make_readme.MASTERS[name.strip("`")]
        assert bounds_told(cell, "w") == list(dict.fromkeys(bounds.values()))
        assert re.findall(r"\((\w+)\)", cell) in ([], [make_readme.name_of(dtype) for dtype in bounds])
        assert set(bounds) == {
            dtype for dtype, master, _, _ in combinations() if dtype.itemsize == 2 and master == name.strip("`")
        }
    for name, _, first, second, _ in moments:
        assert (*bounds_told(first, "m"), *bounds_told(second, "v")) == make_readme.MOMENTS[name.strip("`")]


def assert_tight(error: npt.NDArray[np.float64], value: npt.NDArray[np.float64], bound: Bound | None) -> None:
    """No error is beyond the bound, and some come within a tenth of it."""
    if bound is None:
        assert not error.any()
        return
    limit = 2.0**bound.relative * np.abs(value)
    assert np.all(error < limit) if bound.strict else np.all(error <= limit)
    assert np.any(error > 0.9 * limit)


@pytest.mark.parametrize(
    ("master", "dtype"), [(m, dtype) for m, bounds in make_readme.MASTERS.items() for dtype in bounds], ids=str
)
def test_bound_of_a_master(master: str, dtype: torch.dtype) -> None:
    """The value that the next update starts from, against the one that was computed."""
    # Up to half the largest value, which rounds to no infinity; fp16's normal range is 2^-14 to 2^16.
    values = normals(500) if dtype == torch.bfloat16 or master == "fp32" else normals(20_000, 127 - 14, 127 + 15)
    if master == "fp32" and dtype == torch.float16:
        values = values[values.abs() < 2.0**15]
    key = codec.random_key(1, 2, 3)
    param, kept = codec.encode_master(master, values, dtype, key if master == "stochastic" else None)
    state = {} if kept is None else {codec.MASTERS[master][0].name: kept}
    back = codec.decode_master(master, param, state)
    exact = values.double().numpy()
    assert_tight(np.abs(back.double().numpy() - exact), exact, make_readme.MASTERS[master][dtype])


@pytest.mark.parametrize("moments", [m for m in codec.MOMENTS if m != "fp32"])
def test_bound_of_moments(moments: str) -> None:
    """Values of like size beside each other, so that the bound relative to a value counts; then far smaller ones beside
    a largest one, whose bound is its share of that."""
    key = codec.random_key(4, 5, 6)
    values = normals(1600, 1 + 24, 254)
    for name, bound in zip(("exp_avg", "exp_avg_sq"), make_readme.MOMENTS[moments], strict=True):
        assert bound is not None
        exact = values if name == "exp_avg" else values.abs()
        back = codec.decode_moment(name, codec.encode_moments(moments, exact, exact.abs(), key))
        assert back is not None
        error = np.abs(back.double().numpy() - exact.double().numpy())
        assert_tight(error, exact.double().numpy(), bound)
        if bound.floor is None:
            continue
        small = (exact * 2.0**-24).reshape(-1, codec.GROUP)
        small[:, 0] = exact.reshape(-1, codec.GROUP)[:, 0]
        flat = small.reshape(-1)
        back = codec.decode_moment(name, codec.encode_moments(moments, flat, flat.abs(), key))
        assert back is not None
        error = np.abs(back.double().numpy() - flat.double().numpy()).reshape(-1, codec.GROUP)[:, 1:]
        # The power of two below the largest, but the next where the largest is within two codes of that.
        largest, step = small[:, :1].abs().double().numpy(), 2.0**bound.relative
        below = np.exp2(np.floor(np.log2(largest)))
        limit = 2.0**bound.floor * np.where(largest > below * (2.0 - 2.0 * step), 2.0 * below, below)
        floored = (np.abs(small[:, 1:].double().numpy()) < limit) & (name == "exp_avg_sq")  # lifted to the least code
        assert np.all((error < limit) | (floored & (error <= limit)))
        assert np.any(error > 0.9 * limit)


def test_exact_moments_are_float32() -> None:
    assert make_readme.MOMENTS["fp32"] == (None, None)
    assert all(stream.dtype == torch.float32 for stream in codec.MOMENTS["fp32"])


# ---- quality ---------------------------------------------------------------------------------------------


def test_measured_quality_reaches_its_target() -> None:
    """Of the committed run: the smallest state ends within 0.5% of fp32's loss over three seeds."""
    results = make_readme.measured()["results"]
    assert set(results) == {"digits", "text"}
    for task in results.values():
        percent = task["split8 + 8bit"]["percent_above_fp32"]
        assert len(percent) == 3
        assert abs(statistics.fmean(percent)) <= 0.5
        for row in task.values():
            assert row["percent_above_fp32"] == pytest.approx(
                [
                    100 * (loss / base - 1)
                    for loss, base in zip(row["held_out_loss"], task["fp32"]["held_out_loss"], strict=True)
                ],
                abs=2e-3,  # of losses rounded to six digits
            )


def test_table_of_quality_has_every_run() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", make_readme.quality(), re.M)
    assert rows == list(make_readme.measured()["results"]["text"])
