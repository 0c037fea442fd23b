"""Pictures of schedules: what `plot_schedules` draws, and `python -m fused_sched plot`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import same_color

from fused_sched import landmarks, schedules
from fused_sched.__main__ import main
from fused_sched.plot import plot_schedules
from fused_sched.schedules import constant, cosine, join, linear, warmup_cosine, warmup_linear

ONE_CYCLE = schedules.deepspeed.OneCycle(cycle_min_lr=1e-4, cycle_max_lr=1e-3, cycle_first_step_size=50)


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    yield
    pyplot.close("all")


def marks(ax: Axes) -> list[list[int]]:
    """Updates marked on the axes, of each curve."""
    return [[int(segment[0][0]) for segment in lines.get_segments()] for lines in ax.collections]


# plot_schedules


def test_values_and_labels() -> None:
    line, wave = linear(1.0, 0.0, 100), cosine(1.0, 0.0, 50).repeat(50)
    ax = plot_schedules(line, wave, labels=["line", "wave"])
    for drawn, schedule in zip(ax.lines, (line, wave), strict=True):
        steps, values = drawn.get_data()
        assert steps.tolist() == list(range(111))  # a tenth more than the line has
        assert values.tolist() == schedule(steps).tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["line", "wave"]
    assert ax.figure.axes == [ax]


def test_given_axes_and_length() -> None:
    _, (left, right) = pyplot.subplots(1, 2)
    assert linear(1.0, 0.0, 100).plot(20, ax=left, label="line") is left
    assert ONE_CYCLE.plot(20, ax=right) is right
    assert [len(ax.lines) for ax in (left, right)] == [1, 1]
    assert left.lines[0].get_xdata().tolist() == list(range(20))
    assert left.get_legend().get_texts()[0].get_text() == "line"
    assert left.figure.axes == [left, right], "axes of one's own stay as they are"


def test_a_schedule_without_an_end_shows_a_thousand_updates() -> None:
    assert len(schedules.inverse_sqrt(1.0, 10).plot().lines[0].get_xdata()) == 1000


def test_a_long_schedule_is_thinned_but_for_its_jumps() -> None:
    jump = join([constant(1.0), constant(0.0)], [500_001]) * linear(1.0, 0.5, 10**6)
    steps = jump.plot().lines[0].get_xdata().tolist()
    assert len(steps) <= 4000
    assert steps[0] == 0
    assert steps[-1] == 1_100_000
    assert {500_000, 500_001} <= set(steps)


def test_phases_are_marked_where_they_begin() -> None:
    ax = plot_schedules(
        warmup_cosine(1.0, warmup_steps=10, total_steps=90),
        warmup_linear(1.0, warmup_steps=30, total_steps=60),
        linear(1.0, 0.0, 20).repeat(20, times=3),
        constant(0.5),
    )
    assert marks(ax) == [[10], [30], [20, 40, 60], []]


def test_dozens_of_cycles_are_not_marked_but_the_phases_around_them() -> None:
    cycles = linear(1.0, 0.0, 10).repeat(10)
    restarts = join([linear(0.0, 1.0, 35), cycles], [35])
    assert marks(restarts.plot(100))[0] == [35, 45, 55, 65, 75, 85, 95]
    assert marks(restarts.plot(1000))[0] == [35]
    stairs = join([constant(1.0 / (i + 1)) for i in range(40)], range_of_steps(40))
    assert marks(stairs.plot()) == [[]]
    assert landmarks.phase_starts(cycles.tree, 241, most_cycles=24) == list(range(10, 241, 10))
    assert landmarks.phase_starts(cycles.tree, 251, most_cycles=24) == []
    assert len(landmarks.phase_starts(cycles.tree, 251)) == 25


def range_of_steps(count: int) -> list[int]:
    return list(range(5, 5 * count, 5))


def test_momentum_is_drawn_below_the_rate() -> None:
    rate = ONE_CYCLE.plot(150)
    top, below = rate.figure.axes
    assert top is rate
    assert (top.get_ylabel(), below.get_ylabel()) == ("learning rate", "momentum")
    assert below.get_xlabel() == "update"
    assert below.get_shared_x_axes().joined(top, below)
    assert list(ONE_CYCLE.companions) == [text.get_text() for text in below.get_legend().get_texts()]
    for line, companion in zip(below.lines, ONE_CYCLE.companions.values(), strict=True):
        steps, values = line.get_data()
        assert values.tolist() == companion(steps).tolist()
    assert below.get_position().y1 < top.get_position().y0
    assert below.get_position().height < top.get_position().height
    assert marks(below) == marks(top) != [[]]


def test_weight_decay_is_drawn_below_the_momentum() -> None:
    decayed = schedules.megatron.OptimizerParamScheduler(
        init_lr=0.0,
        max_lr=1e-3,
        min_lr=1e-5,
        lr_warmup_steps=10,
        lr_decay_steps=100,
        lr_decay_style="cosine",
        start_wd=0.01,
        end_wd=0.1,
        wd_incr_steps=100,
        wd_incr_style="linear",
    )
    figure = plot_schedules(constant(1e-3), ONE_CYCLE, decayed, labels=["a", "b", "c"]).figure
    top, momentum, decay = figure.axes
    assert [ax.get_ylabel() for ax in figure.axes] == ["learning rate", "momentum", "weight decay"]
    _, *colors = [line.get_color() for line in top.lines]
    assert all(same_color(line.get_color(), colors[0]) for line in momentum.lines)
    assert all(same_color(line.get_color(), colors[1]) for line in decay.lines)
    assert [len(ax.lines) for ax in figure.axes] == [3, 2, 1]
    assert [marks(ax) for ax in figure.axes[1:]] == [[starts] for starts in marks(top)[1:]]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, ValueError, "at least one schedule is needed, got none; pass it"),
        ((constant(1.0),), {"labels": ["a", "b"]}, ValueError, "one label per schedule is needed, got 2 for 1; leave"),
        ((constant(1.0),), {"num_steps": 0}, ValueError, "num_steps must be at least 1, got 0; leave it out"),
        ((constant(1.0),), {"num_steps": 1.5}, TypeError, "num_steps must be an integer number of steps, got 1.5"),
        ((1e-3,), {}, TypeError, r"only a Schedule can be drawn, got 0.001; use constant\(value\)"),
    ],
)
def test_errors(arguments: tuple[object, ...], options: dict[str, object], error: type, message: str) -> None:
    with pytest.raises(error, match=f"plot_schedules: {message}"):
        plot_schedules(*arguments, **options)  # type: ignore[arg-type]
    assert pyplot.get_fignums() == []


def test_what_metrics_drive_names_replay() -> None:
    with pytest.raises(TypeError, match=r"torch.ReduceLROnPlateau .*drawn.*; replay\(metrics\) gives"):
        schedules.torch.ReduceLROnPlateau(base_lr=0.1).plot(100)
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"fused_sched\[plot\]"):
        constant(1.0).plot()


# python -m fused_sched


@pytest.mark.parametrize(
    ("name", "begins"), [("lr.png", b"\x89PNG"), ("lr.svg", b"<?xml"), ("lr.pdf", b"%PDF"), ("LR.PNG", b"\x89PNG")]
)
def test_the_suffix_says_the_format(name: str, begins: bytes, tmp_path: Path) -> None:
    main(["plot", "warmup_cosine(1e-3, warmup_steps=10, total_steps=100)", "-o", str(tmp_path / name)])
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "fused_sched._plot_command.draw_schedules",
        lambda figure, *drawn_now, **options: drawn.append((drawn_now, options)) or figure.subplots(),
    )
    Path("ds_config.json").write_text(
        '{"optimizer": {"type": "Adam", "params": {"lr": 0.001}}, "scheduler": {"type": "WarmupLR", "params": '
        '{"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 100}}}'
    )
    expressions = [
        "deepspeed.OneCycle(cycle_min_lr=1e-4, cycle_max_lr=1e-3,  cycle_first_step_size= 50)",
        "from_callable(lambda t: base_lr * exp(-t / 10), 5) * constant(math.pi)",
    ]
    main(["plot", "ds_config.json", *expressions, "-o", "lr.png", "--steps", "70", "--base-lr", "2"])
    ((configured, one_cycle, decay), options) = drawn[0]
    assert configured([1, 100, 101]).tolist() == pytest.approx([0.001, 0.01, 0.01])  # type: ignore[operator]
    assert one_cycle == ONE_CYCLE
    assert decay(0) == 2 * 3.141592653589793  # type: ignore[operator]
    shortened = "deepspeed.OneCycle(cycle_min_lr=1e-4, cycle_max_lr=1e-3,  cycle_first_step_si..."
    assert options == {"num_steps": 70, "labels": ["ds_config.json", shortened, expressions[1]]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "constant(1)"], "the following arguments are required: -o/--output"),
        (["plot", "-o", "a.png"], "the following arguments are required: schedule"),
        (["plot", "constant(1)", "-o", "a.jpg"], "-o/--output: must end in .pdf, .png or .svg, got 'a.jpg'; name it"),
        (["plot", "constant(1)", "-o", "no/a.png"], "must be in a folder that exists, got 'no/a.png'; make no first"),
        (["plot", "constant(1)", "-o", "folder.png"], "-o must be a path that can be written, got 'folder.png'"),
        (["plot", "constant(1)", "-o", "a.png", "--steps", "0"], "--steps: must be an integer number of updates, at"),
        (["plot", "constant(1)", "-o", "a.png", "--base-lr", "x"], "--base-lr: must be a finite rate, at least 0, got"),
        (["plot", "constant(1", "-o", "a.png"], "'constant(1' has no value: SyntaxError: "),
        (["plot", "constant()", "-o", "a.png"], "'constant()' has no value: TypeError: "),
        (["plot", "constant(base_lr)", "-o", "a.png"], "NameError: name 'base_lr' is not defined; give --base-lr"),
        (["plot", "3", "-o", "a.png"], "schedule '3' must be a Schedule, got 3; write an expression in the words of"),
        (
            ["plot", "no.json", "-o", "a.png"],
            "schedule must be a file that can be read or an expression, got 'no.json'",
        ),
        (["plot", "empty.json", "-o", "a.png"], "empty.json: "),
        (["plot", "auto.json", "-o", "a.png"], "; give --base-lr"),
        (["plot", "torch.ReduceLROnPlateau(base_lr=0.1)", "-o", "a.png"], "replay(metrics)"),
        (["draw"], "argument command: invalid choice: 'draw'"),
    ],
)
def test_a_bad_command_line_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.json").touch()
    (tmp_path / "auto.json").write_text(
        '{"optimizer": {"type": "Adam", "params": {"lr": "auto"}}, "scheduler": {"type": "WarmupCosineLR", "params": '
        '{"total_num_steps": 1000}}}'
    )
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_what_is_odd_is_said_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", "transformers.get_cosine_schedule_with_warmup(5, 20, base_lr=1.0)", "-o", str(tmp_path / "lr.png")])
    assert capsys.readouterr().err.startswith("warning: transformers.get_cosine_schedule_with_warmup: ")
    assert (tmp_path / "lr.png").exists()


def test_the_command_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as end:
        main(["plot", "constant(1.0)", "-o", str(tmp_path / "lr.png")])
    assert end.value.code == 2
    assert "pip install 'fused_sched[plot]'" in capsys.readouterr().err


def test_without_a_command_it_says_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("fused_sched  ")
    assert any(line.startswith("backend reference  usable") for line in rest)
