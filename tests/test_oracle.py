"""The oracle against torch.optim in float64, and its number formats against torch's casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import FORMATS, Options, Oracle, decode_codes, value_at

TORCH_16_BIT = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Two float64 programs that order the same few operations differently: 20 updates of at most ten roundings
# each, relative to a value near 1, are 200 * 2^-53 = 2.2e-14.
FLOAT64_AGREEMENT = 2.2e-14


def torch_optimizer(param: torch.Tensor, options: Options) -> torch.optim.Optimizer:
    cls = torch.optim.AdamW if options.decoupled else torch.optim.Adam
    return cls(
        [param],
        lr=value_at(options.lr, 0),
        betas=(value_at(options.beta1, 0), value_at(options.beta2, 0)),
        eps=options.eps,
        weight_decay=value_at(options.weight_decay, 0),
        amsgrad=options.amsgrad,
        maximize=options.maximize,
        foreach=False,
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(Options(), id="defaults"),
        pytest.param(Options(weight_decay=0.1, lr=1e-2), id="decoupled_decay"),
        pytest.param(Options(weight_decay=0.1, decoupled=False), id="l2_decay"),
        pytest.param(Options(amsgrad=True, beta2=0.5), id="amsgrad"),
        pytest.param(Options(maximize=True, weight_decay=0.1), id="maximize"),
        pytest.param(Options(maximize=True, weight_decay=0.1, decoupled=False), id="maximize_l2"),
        pytest.param(Options(beta1=0.0, beta2=0.3), id="small_betas"),
        pytest.param(
            Options(
                lr=lambda i: 1e-2 / (1 + i),
                beta1=lambda i: 0.95 - 0.01 * i,
                beta2=lambda i: 0.99 - 0.002 * i,
                weight_decay=lambda i: 0.1 * i,
            ),
            id="scheduled",
        ),
    ],
)
def test_matches_torch_in_float64(options: Options) -> None:
    rng = np.random.default_rng(0)
    start = rng.standard_normal(33)
    param = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = torch_optimizer(param, options)
    oracle = Oracle(start, options)
    for index in range(20):
        grad = rng.standard_normal(33) * 10.0 ** (index % 3)
        group = optimizer.param_groups[0]
        group["lr"] = value_at(options.lr, index)
        group["betas"] = (value_at(options.beta1, index), value_at(options.beta2, index))
        group["weight_decay"] = value_at(options.weight_decay, index)
        param.grad = torch.from_numpy(grad)
        optimizer.step()
        oracle.update(grad)
    state = optimizer.state[param]
    pairs = [
        (param, oracle.weight),
        (state["exp_avg"], oracle.exp_avg),
        (state["exp_avg_sq"], oracle.exp_avg_sq),
    ]
    if options.amsgrad:
        pairs.append((state["max_exp_avg_sq"], oracle.max_exp_avg_sq))
    for actual, expected in pairs:
        scale = np.maximum(np.abs(expected), 1.0)
        assert np.max(np.abs(actual.detach().numpy() - expected) / scale) <= FLOAT64_AGREEMENT
    assert float(state["step"]) == oracle.step


def test_grad_scale_and_divisor_divide_the_gradient() -> None:
    divided = Oracle(np.ones(3), Options(grad_divisor=4.0))
    plain = Oracle(np.ones(3), Options())
    divided.update(np.array([8.0, 16.0, -24.0]), grad_scale=2.0)
    plain.update(np.array([1.0, 2.0, -3.0]))
    np.testing.assert_array_equal(divided.weight, plain.weight)
    np.testing.assert_array_equal(divided.exp_avg_sq, plain.exp_avg_sq)


def test_schedules_follow_the_clock_and_bias_correction_the_step() -> None:
    late = Oracle(np.zeros(1), Options(lr=lambda i: float(i)))
    late.update(np.ones(1), index=7)
    # The first update of a parameter moves it by lr whatever the gradient: here lr(7).
    np.testing.assert_allclose(late.weight, [-7.0], rtol=1e-7)
    assert late.step == 1


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_every_16_bit_code_decodes_as_torch_does(name: str) -> None:
    codes = np.arange(65536, dtype=np.uint16)
    expected = torch.from_numpy(codes.view(np.int16)).view(TORCH_16_BIT[name]).double().numpy()
    np.testing.assert_array_equal(decode_codes(codes, name), expected)
    assert np.array_equal(np.signbit(decode_codes(codes, name)[expected == 0]), np.signbit(expected[expected == 0]))


def float32_samples() -> np.ndarray:
    """All exponents, both signs, random fractions, and the halfway points of both 16-bit formats."""
    rng = np.random.default_rng(1)
    high = np.arange(65536, dtype=np.uint32) << 16
    low = rng.integers(0, 1 << 16, 65536, dtype=np.uint32)
    half_fp16 = (np.arange(0, 1 << 32, 1 << 13, dtype=np.uint64) + (1 << 12)).astype(np.uint32)
    bits = np.concatenate([high, high | low, high | np.uint32(0x8000), half_fp16])
    values = bits.view(np.float32)
    return values[np.isfinite(values)].astype(np.float64)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_rounds_to_even_as_torch_casts(name: str) -> None:
    values = float32_samples()
    expected = torch.from_numpy(values).float().to(TORCH_16_BIT[name]).double().numpy()
    np.testing.assert_array_equal(FORMATS[name].round(values), expected)


def test_rounds_half_away_from_zero() -> None:
    values = float32_samples()
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    # In sign-magnitude bits, adding half a unit before cutting is rounding half away from zero.
    expected = decode_codes(((bits + 0x8000) >> 16).astype(np.uint16), "bf16")
    np.testing.assert_array_equal(FORMATS["bf16"].round(values, ties_away=True), expected)
    tie = 1.0 + 2.0**-8
    assert FORMATS["bf16"].round(np.array([tie, -tie]), ties_away=True).tolist() == [1.0078125, -1.0078125]
    assert FORMATS["bf16"].round(np.array([tie, -tie])).tolist() == [1.0, -1.0]


@pytest.mark.parametrize("name", ["fp32", "fp64", "bf16", "fp16"])
def test_spacing_is_the_distance_to_the_next_value(name: str) -> None:
    fmt = FORMATS[name]
    values = np.array([1.0, 1.5, 2.0**-20, 24576.0, 0.0])
    spacing = fmt.spacing(values)
    np.testing.assert_array_equal(fmt.round(values + spacing), values + spacing)
    if name in ("fp32", "fp64"):
        dtype = np.float32 if name == "fp32" else np.float64
        np.testing.assert_array_equal(spacing, np.spacing(values.astype(dtype)).astype(np.float64))
    else:
        half = fmt.round(values) + 0.49 * spacing
        np.testing.assert_array_equal(fmt.round(half), fmt.round(values))


@pytest.mark.parametrize(
    ("name", "master", "ties_away"), [("bf16", True, True), ("bf16", False, False), ("fp16", True, False)]
)
def test_16_bit_parameters_round_as_their_master_demands(name: str, master: bool, ties_away: bool) -> None:
    oracle = Oracle(np.array([1.0]), Options(lr=1.0, eps=0.0), name, master)
    tie = FORMATS[name].spacing(np.ones(1)) / 2.0
    # eps = 0: the first update is exactly -lr * sign(g).
    oracle.options = Options(lr=float(tie[0]), eps=0.0)
    oracle.update(np.array([-1.0]))
    up = 1.0 + 2.0 * tie[0]
    assert oracle.param[0] == (up if ties_away else 1.0)
    assert oracle.weight[0] == (1.0 + tie[0] if master else oracle.param[0])
