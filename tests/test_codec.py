"""Storage formats alone, as the core's headers define them: exact where they promise it, within their bounds elsewhere,
unbiased where they round stochastically; and their twins in plain torch, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from core_library import core
from oracle import FORMATS

from fused_sched import codec

#: Random bits with which a stochastic rounding becomes one to nearest, and the largest.
NEAREST = {"exp_avg": 1 << 19, "exp_avg_sq": 1 << 31}
ONES = 0xFFFFFFFF
MOMENTS = {"exp_avg": 3, "exp_avg_sq": 4}  # bits of significand in a code
each_moment = pytest.mark.parametrize("name", list(MOMENTS))

#: Lower halves at which roundings change: the ends, the tie, those of the upper byte, and their neighbours.
EDGES = (0x0000, 0x0001, 0x007F, 0x0080, 0x0081, 0x00FF, 0x7F7F, 0x7F80, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x80FF, 0xFF7F,
         0xFF80, 0xFFFE, 0xFFFF)  # fmt: skip


def floats_of(bits: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.asarray(bits, np.uint32).view(np.float32)


def bits_of(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    return np.asarray(values, np.float32).view(np.uint32)


def at_every_upper_half() -> npt.NDArray[np.float32]:
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    return floats_of((upper[:, None] | np.array(EDGES, np.uint32)).reshape(-1))


def finite_bfloat16(codes: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    return floats_of(codes.astype(np.uint32) << 16).astype(np.float64)


# ---- split masters ---------------------------------------------------------------------------------------


def test_split16_is_exact_for_all_bf16_values_and_remainders_at_the_edges() -> None:
    """Every float but NaNs comes back bit for bit: zeros of both signs, subnormals, infinities, and the finite ones
    whose parameter rounds to infinity."""
    weight = at_every_upper_half()
    param, kept = core().encode_master("split16", weight, 0)
    back = core().decode_master("split16", param, kept)
    nan = np.isnan(weight)
    assert nan.sum() == 2 * (128 * len(EDGES) - 1)
    np.testing.assert_array_equal(bits_of(back[~nan]), bits_of(weight[~nan]))
    assert np.isnan(back[nan]).all()
    assert (kept[nan] == 0).all()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            finite_bfloat16(param[~nan]), FORMATS["bf16"].round(weight[~nan].astype(np.float64), ties_away=True)
        )


def test_split16_of_all_remainders_of_some_values() -> None:
    for upper in (0x0000, 0x8000, 0x0080, 0x3F80, 0xBFFF, 0x7F7F, 0xFF7F):
        weight = floats_of((upper << 16) + np.arange(1 << 16, dtype=np.uint32))
        back = core().decode_master("split16", *core().encode_master("split16", weight, 0))
        np.testing.assert_array_equal(bits_of(back), bits_of(weight))


def test_split8_error_bound_of_every_exponent() -> None:
    """At most 2^-16 of the power of two below the weight (2^-142 for subnormals): half a unit of 16 digits."""
    rng = np.random.default_rng(1)
    for exponent in range(255):
        upper = (rng.integers(0, 2) << 31) + (exponent << 23) + (int(rng.integers(0, 128)) << 16)
        weight = floats_of(upper + np.arange(1 << 16, dtype=np.uint32))
        param, kept = core().encode_master("split8", weight, 0)
        assert kept.min() >= -128
        assert kept.max() <= 127
        back = core().decode_master("split8", param, kept)
        bound = math.ldexp(1.0, max(exponent, 1) - 127 - 16)
        with np.errstate(invalid="ignore"):
            error = np.abs(back.astype(np.float64) - weight.astype(np.float64))
        # The last half unit below infinity rounds to it, as in any format.
        overflown = np.abs(weight.astype(np.float64)) >= 2.0**128 - 2.0**111
        assert np.all(error[~overflown] <= bound), exponent
        assert np.isinf(back[overflown]).all()
        again = core().encode_master("split8", back, 0)
        np.testing.assert_array_equal(again[0], param)
        np.testing.assert_array_equal(again[1], kept)


@pytest.mark.parametrize("tag", ["split16", "split8"])
def test_parameter_wins_over_a_remainder_that_no_float_leaves(tag: str) -> None:
    """Zeroed or set to infinity outside: the sum of the halves would be a NaN."""
    for param, kept in ((0x0000, -1), (0x8000, -5), (0x7F80, 3), (0xFF80, 100)):
        back = core().decode_master(tag, [param], [kept])
        assert bits_of(back)[0] == param << 16
    edited = core().decode_master(tag, [0x3F80, 0x3F80], [-100, 100])  # else it stays beside the parameter
    assert np.all(np.abs(edited - 1.0) <= 2.0**-8)
    assert edited[0] < 1.0 < edited[1]


# ---- 8-bit moments ---------------------------------------------------------------------------------------


def group_of(values: npt.ArrayLike, largest: float) -> npt.NDArray[np.float32]:
    """Groups of 16 whose first element sets the scale."""
    values = np.asarray(values, np.float32)
    padded = np.resize(values, (-(-len(values) // 15), 15))
    return np.insert(padded, 0, np.float32(largest), axis=1).reshape(-1)


@each_moment
def test_8bit_error_bounds_of_every_exponent(name: str) -> None:
    """Less than one step between codes, whatever is drawn, and half a step to nearest. Steps are 2^-3 (exp_avg) or 2^-4
    (exp_avg_sq) of the power of two below a value; below 2^-14 of the one that covers the group, those of 2^-14. The
    last step below infinity rounds to it."""
    mantissa = MOMENTS[name]
    rng = np.random.default_rng(2)
    for exponent in range(255):
        own = np.maximum(exponent - rng.integers(0, 24, 1500), 0)
        values = floats_of((own << 23) + rng.integers(0, 1 << 23, 1500))
        largest = float(floats_of([(exponent << 23) + rng.integers(0, 1 << 23)])[0])
        group = group_of(np.minimum(values, largest), largest)
        below = max(math.frexp(largest)[1] - 1, -126)
        covering = below + (largest > (2.0 - 2.0 ** (1 - mantissa)) * 2.0**below)
        exact = group.astype(np.float64)
        smallest = max(covering - 14, -126)
        step = np.ldexp(1.0, np.maximum(np.frexp(exact)[1] - 1, smallest) - mantissa)
        for random, limit in ((0, 1.0), (NEAREST[name], 0.5 + 2.0**-16), (ONES, 1.0)):
            code, scale = core().encode_8bit(name, group, random)
            back = core().decode_8bit(name, code, scale)
            error = np.abs(back.astype(np.float64) - exact)
            floor = (name == "exp_avg_sq") & (exact > 0) & (exact < step)  # lifted to the smallest code
            overflown = np.isinf(back) & (exact > 2.0**128 - step)
            assert np.all((error < limit * step) | (floor & (error <= step)) | overflown), (exponent, random)
            assert np.all((back > 0) == (group > 0)) or name == "exp_avg"
            assert exponent > 253 or not overflown.any()


@each_moment
def test_8bit_codes_are_values_that_stay(name: str) -> None:
    """decode, encode, decode: no drift, whatever is drawn. All codes of all scales."""
    codes = np.arange(255 if name == "exp_avg_sq" else 256, dtype=np.uint8)
    if name == "exp_avg":
        codes = codes[codes & 0x7F != 0x7F]
    codes = np.resize(codes, 16 * 16)
    below_infinity = np.where((codes & (0x7F if name == "exp_avg" else 0xFF)) < 15 << MOMENTS[name], codes, 0)
    for scale in range(241):
        kept = codes if scale < 240 else below_infinity  # 240: of the largest floats
        value = core().decode_8bit(name, kept, np.full(16, scale, np.uint8))
        assert np.isfinite(value).all()
        for random in (0, NEAREST[name], ONES):
            again = core().decode_8bit(name, *core().encode_8bit(name, value, random))
            np.testing.assert_array_equal(bits_of(again), bits_of(value))


def test_8bit_second_moment_is_never_rounded_to_zero() -> None:
    """The update divides by its root."""
    tiny = floats_of(np.concatenate([np.arange(1, 100), 1 << np.arange(31), (np.arange(1, 255) << 23)]))
    tiny = tiny[np.isfinite(tiny)]
    for largest in (1e-44, 1e-30, 1.0, 1e30, 3.4e38):
        code, scale = core().encode_8bit("exp_avg_sq", group_of(np.minimum(tiny, largest), largest), 0)
        assert (core().decode_8bit("exp_avg_sq", code, scale) > 0).all()
    assert (core().encode_second_bf16(tiny, 0) > 0).all()
    assert (core().encode_8bit("exp_avg_sq", np.zeros(16), ONES)[0] == 0).all()
    assert core().encode_second_bf16(np.zeros(1), ONES)[0] == 0


@each_moment
def test_8bit_values_that_are_not_finite_harm_nobody_else(name: str) -> None:
    rng = np.random.default_rng(3)
    values = np.abs(rng.standard_normal(16)).astype(np.float32)
    expected, scale = core().encode_8bit(name, np.where(np.arange(16) % 5 == 2, 0, values), NEAREST[name])
    for special in (math.inf, -math.inf, math.nan):
        code, special_scale = core().encode_8bit(name, np.where(np.arange(16) % 5 == 2, special, values), NEAREST[name])
        others = np.arange(16) % 5 != 2
        assert special_scale == scale
        np.testing.assert_array_equal(code[others], expected[others])
        assert np.isnan(core().decode_8bit(name, code, special_scale)[~others]).all()


def test_8bit_first_moment_keeps_its_sign() -> None:
    values = np.array([0.0, -0.0, 1.0, -1.0, 1e-3, -1e-3] * 3, np.float32)
    back = core().decode_8bit("exp_avg", *core().encode_8bit("exp_avg", values, 0))
    np.testing.assert_array_equal(np.signbit(back), np.signbit(values))


# ---- stochastic rounding ---------------------------------------------------------------------------------

DRAWS = 1 << 16


def assert_unbiased(up: npt.NDArray[np.bool_], fraction: float) -> None:
    """`up` of len(up) roundings went to the upper neighbour, `fraction` of the way there: a binomial of that mean,
    allowed five standard deviations (one wrong alarm in two million)."""
    n = len(up)
    deviation = math.sqrt(n * fraction * (1.0 - fraction))
    assert abs(int(up.sum()) - n * fraction) <= 5.0 * deviation


FRACTIONS = (0.001, 0.1, 0.25, 0.5, 0.7, 0.999)


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("along", ["elements", "updates", "parameters"])
def test_stochastic_roundings_are_unbiased(along: str, fraction: float) -> None:
    """Over the elements of a tensor, over the updates of one element, and over the tensors of an optimizer."""
    if along == "elements":
        random = core().random(7, 1000, 3, DRAWS)
    elif along == "updates":
        random = np.array([core().random(7, 2**24 + t, 3, 1, first=17)[0] for t in range(DRAWS // 8)])
    else:
        random = np.array([core().random(7, 1000, i, 1)[0] for i in range(DRAWS // 8)])
    n = len(random)
    # bfloat16: between 1 and 1 + 2^-7; 8 bits: between 1 and 1 + 2^-3 or 2^-4, in a group whose largest is 1.5.
    value = np.float32(1.0 + fraction * 2.0**-7)
    exact = (float(value) - 1.0) * 2.0**7
    assert_unbiased(core().encode_second_bf16(np.full(n, value), random) == 0x3F81, exact)
    assert_unbiased(core().encode_master("stochastic", np.full(n, -value), random)[0] == 0xBF81, exact)
    for name in ("exp_avg", "exp_avg_sq"):
        step = 2.0 ** -MOMENTS[name]
        value = np.float32(1.0 + fraction * step)
        groups = np.tile(np.array([1.5] + [value] * 15, np.float32), n // 15 + 1)
        draws = np.insert(np.resize(random, (n // 15 + 1, 15)), 0, 0, axis=1).reshape(-1)
        back = core().decode_8bit(name, *core().encode_8bit(name, groups, draws)).reshape(-1, 16)[: n // 15, 1:]
        assert set(np.unique(back)) <= {1.0, np.float32(1.0 + step)}
        assert_unbiased((back > 1.0).reshape(-1), (float(value) - 1.0) / step)


@each_moment
def test_8bit_subnormal_codes_are_unbiased_too(name: str) -> None:
    random = core().random(11, 5, 0, DRAWS)
    step = 2.0 ** (-14 - MOMENTS[name])
    for multiple in (1.3, 4.75):
        values = np.array([1.0] + [multiple * step] * 15, np.float32)
        back = core().decode_8bit(name, *core().encode_8bit(name, np.resize(values, DRAWS), random))
        steps = back.reshape(-1, 16)[:, 1:].reshape(-1) / step
        assert set(np.unique(steps)) == {math.floor(multiple), math.ceil(multiple)}
        assert_unbiased(steps > multiple, multiple % 1.0)


def test_random_bits_depend_on_each_part_of_their_key() -> None:
    base = core().random(1, 2, 3, 4096)
    others = {
        "seed": core().random(2, 2, 3, 4096),
        "upper half of the seed": core().random(1 + 2**40, 2, 3, 4096),
        "clock": core().random(1, 3, 3, 4096),
        "clock beyond 2^32": core().random(1, 2 + 2**33, 3, 4096),
        "ordinal": core().random(1, 2, 4, 4096),
        "element": core().random(1, 2, 3, 4096, first=4096),
        "element beyond 2^32": core().random(1, 2, 3, 4096, first=2**32),
    }
    for what, other in others.items():
        # Of 4096 pairs of random words some 128 equal bits in 32 differ: 65,536 +- 5 x 181.
        different = int(np.unpackbits((base ^ other).view(np.uint8)).sum())
        assert abs(different - 16 * 4096) <= 5 * math.sqrt(32 * 4096) / 2, what
    assert np.unique(base).size > 4090


def test_every_random_bit_is_a_fair_coin() -> None:
    words = core().random(0, 0, 0, DRAWS)
    ones = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=0)
    assert np.all(np.abs(ones - DRAWS / 2) <= 5 * math.sqrt(DRAWS) / 2)
    neighbours = np.unpackbits((words[1:] ^ words[:-1]).view(np.uint8).reshape(-1, 4), axis=1).sum(axis=0)
    assert np.all(np.abs(neighbours - DRAWS / 2) <= 5 * math.sqrt(DRAWS) / 2)


def test_neighbours_draw_the_halves_of_one_hash() -> None:
    """So that an element's two moments, and one moment of any two elements, draw independently."""
    words = core().random(3, 4, 5, DRAWS)
    even, odd = words[::2], words[1::2]
    np.testing.assert_array_equal(odd, even >> 16 | even << 16)
    halves = np.stack([even >> 16, even & 0xFFFF, np.roll(even, 1) >> 16]).astype(np.float64) / 2.0**16
    # Independent uniform numbers have a correlation of 0 +- 1/sqrt(n).
    correlation = np.corrcoef(halves) - np.eye(3)
    assert np.all(np.abs(correlation) <= 5.0 / math.sqrt(len(even)))


# ---- the twins in plain torch ----------------------------------------------------------------------------


def twin_values() -> torch.Tensor:
    rng = np.random.default_rng(4)
    bits = np.concatenate([bits_of(at_every_upper_half())[:: len(EDGES) - 2], rng.integers(0, 1 << 32, 50_000)])
    return torch.from_numpy(floats_of(bits).copy())


@pytest.mark.parametrize("tag", ["split16", "split8", "stochastic"])
def test_torch_twin_of_masters(tag: str) -> None:
    weight = twin_values()
    key = codec.random_key(5, 2**40, 9)
    random = codec.random_bits(codec.key_of_parameter(key), torch.arange(len(weight))).numpy().astype(np.uint32)
    param, kept = core().encode_master(tag, weight.numpy(), random)
    twin_param, twin_kept = codec.encode_master(tag, weight, torch.bfloat16, key)
    np.testing.assert_array_equal(twin_param.view(torch.int16).numpy().view(np.uint16), param)
    if twin_kept is None:
        return
    np.testing.assert_array_equal(twin_kept.numpy(), kept)
    edited = torch.from_numpy(np.roll(param, 1).view(np.int16)).view(torch.bfloat16)
    back = codec.decode_master(tag, edited, {codec.MASTERS[tag][0].name: twin_kept}).numpy()
    expected = core().decode_master(tag, np.roll(param, 1), kept)
    same = (bits_of(back) == bits_of(expected)) | (np.isnan(back) & np.isnan(expected))
    assert same.all()


def test_torch_twin_of_moments() -> None:
    values = twin_values()[:-5]  # the last group is not whole
    key = codec.random_key(6, 77, 0)
    random = codec.random_bits(key, torch.arange(len(values))).numpy().astype(np.uint32)
    np.testing.assert_array_equal(random, core().random(6, 77, 0, len(values)))
    for second in (values.abs(), values.abs() * 0 + 3e-41):
        twin = codec.encode_moments("8bit", values, second, key)
        for name, value in (("exp_avg", values), ("exp_avg_sq", second)):
            code, scale = core().encode_8bit(name, value.numpy(), random)
            np.testing.assert_array_equal(twin[f"{name}_scale"].numpy(), scale)
            np.testing.assert_array_equal(twin[f"{name}_code"].numpy(), code)
            back = codec.decode_moment(name, twin)
            assert back is not None
            np.testing.assert_array_equal(back.numpy(), core().decode_8bit(name, code, scale))
        stored = codec.encode_moments("bf16", values, second, key)["exp_avg_sq"].view(torch.int16).numpy()
        np.testing.assert_array_equal(stored.view(np.uint16), core().encode_second_bf16(second.numpy(), random))


def test_torch_twin_of_random_bits_beyond_2_to_32_elements() -> None:
    key = codec.random_key(2**64 - 1, 2**53, 2**32 - 1)
    first = 2**32 - 3
    assert (
        codec.random_bits(key, torch.arange(first, first + 7)).tolist()
        == core().random(2**64 - 1, 2**53, 2**32 - 1, 7, first=first).tolist()
    )
