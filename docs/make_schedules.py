"""Writes docs/schedules.md and the pictures of schedules, from the code: `make docs`.

Every registered schedule is listed, in the words of its docstring and drawn as in tests/schedule_samples.py.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # with docs, where this script is, on the path already

from pictures import Curve, Picture, curves  # noqa: E402
from schedule_samples import SAMPLES, evaluated, words  # noqa: E402

from fused_sched import schedules  # noqa: E402
from fused_sched.schedules import Schedule  # noqa: E402
from fused_sched.schedules.metric import MetricSchedule  # noqa: E402

DOCS = ROOT / "docs"
PAGE, GALLERY, PICTURES = DOCS / "schedules.md", DOCS / "images" / "schedules.svg", DOCS / "images" / "schedules"

_ENDLESS_STEPS = 400  # shown of a schedule that has no end

# Heads the column of pictures: GitHub shrinks pictures to nothing in a column that no text keeps open.
_ROOM = "&nbsp;" * 60

# A loss that comes to rest three times, for schedules that react to one.
METRICS = [3.0, 2.4, 2.0, 1.8] + [1.7] * 12 + [1.4, 1.2, 1.1] + [1.05] * 12 + [0.95, 0.9] + [0.88] * 12

INTRODUCTION = """\
# Schedules

<!-- Written by docs/make_schedules.py (`make docs`) from the docstrings: edit those. -->

Every schedule of `fused_sched.schedules`. `f(t)` is the value that update t uses; the first update is t = 0. A picture
shows an example, named when pointed at: its rate in blue, what it writes beside the rate in orange, and dotted lines
where phases begin.
"""

# Module of `fused_sched.schedules`: its heading.
SECTIONS = {
    "curves": "Curves",
    "combinators": "Combinations",
    "recipes": "Recipes",
    "deepspeed": "DeepSpeed",
    "torch": "torch",
    "transformers": "Hugging Face transformers",
    "optax": "optax",
    "megatron": "Megatron-LM",
    "timm": "timm",
}
LIBRARIES = [name for name in SECTIONS if name in schedules.__all__]

# How schedules are written that have no constructor of their own.
NOTATIONS = {
    "product": "a * b",
    "scaled": "s.scaled(factor)",
    "shifted": "s.shifted(steps)",
    "repeat": "s.repeat(period, times=None)",
    "companion": 's.companions["beta1"]',
}

# Panels of the picture in README.md, row by row: title and expression.
PANELS = {
    "warmup_cosine": "warmup_cosine(1.0, warmup_steps=40, total_steps=364)",
    "warmup_stable_decay": "warmup_stable_decay(1.0, warmup_steps=40, total_steps=364, decay_steps=100)",
    "linear(...) * cosine(...).repeat(50)": "linear(1.0, 0.0, 350) * cosine(1.0, 0.3, 50).repeat(50)",
    "deepspeed.WarmupDecayLR": "deepspeed.WarmupDecayLR(360, 0.0, 1.0, 80)",
    "torch.CosineAnnealingWarmRestarts": "torch.CosineAnnealingWarmRestarts(60, 2, base_lr=1.0)",
    "transformers.get_inverse_sqrt_schedule": "transformers.get_inverse_sqrt_schedule(40, base_lr=1.0)",
    "optax.exponential_decay": "optax.exponential_decay(1.0, 60, 0.6, staircase=True)",
    "timm.CosineLRScheduler": "timm.CosineLRScheduler(100, 0, 1, 0.5, 3, 30, 0, True, False, base_lr=1)",
    "torch.CyclicLR": "torch.CyclicLR(0.1, 1.0, 50, mode='triangular2', cycle_momentum=False)",
    "deepspeed.OneCycle": "deepspeed.OneCycle(0.1, 1.0, 0.2, 100, decay_step_size=20)",
    "megatron.OptimizerParamScheduler": "megatron.OptimizerParamScheduler(0.0, 1.0, 0.1, 40, 364, 'cosine', 0.01, 0.1, "
    "364, 'linear')",
    "torch.ReduceLROnPlateau": "torch.ReduceLROnPlateau(factor=0.5, patience=3, base_lr=1.0)",
}


def pictures() -> dict[Path, Picture]:
    """What this script draws."""
    drawn = {PICTURES / f"{word}.svg": Picture(SAMPLES[word], {"": sample(word)}) for word in words()}
    panels = {title: shown(evaluated(expression)) for title, expression in PANELS.items()}
    return {GALLERY: Picture(f"Learning rates of {', '.join(PANELS)}", panels, columns=3), **drawn}


def page() -> str:
    """The text of docs/schedules.md."""
    return "\n".join([INTRODUCTION, *map(section, SECTIONS)])


def section(name: str) -> str:
    rows = [row(word, cls) for word, cls in by_sample() if section_of(word, cls) == name]
    blocks = [
        f"## {SECTIONS[name]}",
        *remarks(name),
        "\n".join([f"| {_ROOM} | schedule | value |", "|---|---|---|", *rows]),
        "\n".join(f"- {code(signature(call, f))}: {first_paragraph(f)}" for call, f in functions(name)),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def by_sample() -> Iterator[tuple[str, type[Schedule]]]:
    """All schedules, in the order of their examples."""
    known = words()
    yield from ((word, known[word]) for word in SAMPLES)


def section_of(word: str, cls: type[Schedule]) -> str:
    if "." in word:
        return word.split(".")[0]
    module = cls.__module__.removeprefix("fused_sched.schedules.")
    return "combinators" if module == "library" else module


def remarks(name: str) -> list[str]:
    """What a library's module says about all of its schedules, below its first line."""
    if name not in LIBRARIES:
        return []
    paragraphs = (inspect.getdoc(getattr(schedules, name)) or "").split("\n\n")[1:]
    return [paragraph for paragraph in paragraphs if not paragraph.startswith(">>>")]


def functions(name: str) -> Iterator[tuple[str, Callable[..., object]]]:
    """What makes schedules without being one: its call, and itself."""
    module = getattr(schedules, name) if name in LIBRARIES else schedules
    for public in getattr(module, "__all__", ()):  # a library in one file has classes only
        function = getattr(module, public)
        if inspect.isfunction(function):
            if name in LIBRARIES:
                yield f"{name}.{public}", function
            elif function.__module__.endswith(f".{name}"):
                yield public, function


def first_paragraph(function: Callable[..., object]) -> str:
    return one_line((inspect.getdoc(function) or "").split("\n\n")[0])


def row(word: str, cls: type[Schedule]) -> str:
    value, source = described(cls)
    shown_example = SAMPLES[word].replace('"', "'")
    cells = [
        f'![{word}](images/schedules/{word}.svg "{shown_example}")',
        code(notation(word, cls)),
        f"{value}<br>*{source}*" if source else value,
    ]
    return " | ".join(["", *(cell.replace("|", "\\|") for cell in cells), ""]).strip()


def notation(word: str, cls: type[Schedule]) -> str:
    """The call, as in code."""
    return NOTATIONS[word] if word in NOTATIONS else signature(word, cls)


def signature(name: str, constructor: Callable[..., object]) -> str:
    annotated = inspect.signature(constructor)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in annotated.parameters.values()]
    return name + str(annotated.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def described(cls: type[Schedule]) -> tuple[str, str]:
    """Summary and formula, and the source, from a docstring: all before its arguments, and its last paragraph."""
    paragraphs = (inspect.getdoc(cls) or "").split("\n\n")
    sources = [p.removeprefix("Source: ") for p in paragraphs if p.startswith("Source: ")]
    value = "<br>".join(value_lines(paragraphs, list(inspect.signature(cls).parameters)))
    return re.sub(r"(<br>)?(</?pre>)(<br>)?", r"\2", value), one_line("".join(sources))


def value_lines(paragraphs: list[str], arguments: list[str]) -> Iterator[str]:
    argument = re.compile(rf"({'|'.join(arguments)})(, \w+)*(:|, by default)")
    for paragraph in paragraphs:
        if argument.match(paragraph) or paragraph.startswith((">>> ", "Source: ", "Raises ")):
            return
        yield preformatted(paragraph) if paragraph.startswith("    ") else one_line(paragraph)


def preformatted(paragraph: str) -> str:
    """Formulas on lines of their own. In a table Markdown reads them on, so that its signs are written as entities."""
    text = escape(inspect.cleandoc("\n" + paragraph), quote=False)
    text = re.sub(r"[*_`~\[\]\\]", lambda sign: f"&#{ord(sign[0])};", text)
    return f"<pre>{text.replace(chr(10), '<br>')}</pre>"


def one_line(paragraph: str) -> str:
    """reStructuredText as Markdown."""
    return paragraph.replace("\n", " ").replace("``", "`").replace("::", ":")


def code(text: str) -> str:
    return f"`{text}`"


def sample(word: str) -> list[Curve]:
    return shown(evaluated(SAMPLES[word]))


def shown(schedule: Schedule) -> list[Curve]:
    """The curves of a schedule over its length and a tenth more; what metrics drive, with metrics below it."""
    if isinstance(schedule, MetricSchedule):
        return [Curve("", schedule.replay(METRICS)), Curve("metric", METRICS)]
    end = schedule.held_from()
    return curves(schedule, round(end * 1.1) + 1 if end else _ENDLESS_STEPS)


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    drawn = pictures()
    for stale in set(PICTURES.iterdir()) - set(drawn):
        stale.unlink()
    for path, picture in drawn.items():
        picture.save(path)
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(drawn)} pictures")


if __name__ == "__main__":
    main()
