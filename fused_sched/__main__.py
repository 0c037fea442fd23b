"""`python -m fused_sched`: what is installed and what this machine can run; paste its output into a bug report.

`python -m fused_sched plot`: schedules in a picture.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import _info, _plot_command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_sched",
        description="Without a command: what is installed, what this machine can run, and why not the rest.",
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")
    plot = commands.add_parser("plot", **_plot_command.HELP)
    _plot_command.add_arguments(plot)
    options = parser.parse_args(arguments)
    if options.command is None:
        print(_info.report())
    else:
        _plot_command.run(options, refuse=plot.error)


if __name__ == "__main__":
    main()
