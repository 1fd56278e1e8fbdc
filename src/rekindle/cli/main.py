"""Arguments of the `rekindle` command, and the translation of errors into exit codes.

Exit codes: 0 done, 1 the request was wrong or could not be met, 2 the command line was wrong, 130 interrupted.
A command's module is imported only when it runs, so that `rekindle --help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rekindle.errors import RekindleError
from rekindle.units import parse_bytes
from rekindle.version import VERSION

_MEASUREMENTS = ["cost", "thrash", "loads", "ranks"]
_DESCRIPTION = "Serve many LoRA adapters from one resident base model, behind the OpenAI API."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parsed = make_parser().parse_args(arguments)
    try:
        return int(getattr(importlib.import_module(parsed.module), parsed.function)(parsed))
    except ModuleNotFoundError as error:
        extra = "serve" if parsed.module.endswith(".serve") else "import"
        print(f"rekindle: this command needs {error.name}: pip install 'rekindle[{extra}]'", file=sys.stderr)
        return 1
    except RekindleError as error:
        print(f"rekindle: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="rekindle", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"rekindle {VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_models(commands)
    _add_adapters(commands)
    _add_bench(commands)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _command(
        commands, "serve", "serve base models and their adapters over HTTP", "rekindle.cli.serve", "serve"
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="names of the bases to serve (default: every model of the home)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML; see docs/reference/settings.md")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one setting, such as engine.memory=4GiB; may be repeated",
    )  # fmt: skip
    parser.add_argument("--example", action="store_true", help="print example requests when ready")
    parser.add_argument("--host", help="address to listen on (setting server.host)")
    parser.add_argument("--port", type=int, help="port to listen on (setting server.port)")


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    models = commands.add_parser("models", help="import, list and remove base models").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    add = _command(models, "add", "import a Hugging Face directory or a GGUF file", "rekindle.cli.models", "add")
    add.add_argument("path", type=Path, metavar="PATH", help="a model directory, or a .gguf file")
    add.add_argument("--name", required=True, help="the name clients will use")
    listing = _command(models, "list", "list imported models", "rekindle.cli.models", "list_models")
    listing.add_argument("--names", action="store_true", help="print nothing but names, one a line")
    remove = _command(models, "rm", "remove a model and its files", "rekindle.cli.models", "remove")
    remove.add_argument("name")


def _add_adapters(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    adapters = commands.add_parser("adapters", help="register, list and remove LoRA adapters").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    add = _command(adapters, "add", "register a PEFT adapter directory", "rekindle.cli.adapters", "add")
    add.add_argument("path", type=Path, metavar="PATH", help="a directory with adapter_config.json and its weights")
    add.add_argument("--name", required=True, help="the name clients will use; a known name gets a new version")
    add.add_argument("--base", metavar="MODEL", help="the base model (default: the only one there is)")
    listing = _command(adapters, "list", "list registered adapters", "rekindle.cli.adapters", "list_adapters")
    listing.add_argument("--names", action="store_true", help="print nothing but names, one a line")
    remove = _command(adapters, "rm", "remove an adapter", "rekindle.cli.adapters", "remove")
    remove.add_argument("name")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure on this machine").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    _add_bench_lora(bench)
    _add_bench_coldstart(bench)
    _add_bench_codecs(bench)
    _add_bench_load(bench)


def _add_bench_load(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    load = _command(
        bench, "load", "measure how fast loaders bring weights from disk to memory", "rekindle.cli.bench", "load"
    )
    load.add_argument(
        "--sizes", type=_sizes, default="1MB,100MB,1GB", metavar="SIZE,...",
        help="of the files made for it, each twice (default: 1MB,100MB,1GB)",
    )  # fmt: skip
    load.add_argument(
        "--dir", type=Path, metavar="DIR", help="on the disk to measure (default: where temporary files go)"
    )
    load.add_argument("--repetitions", type=_count, default=5, metavar="N", help="rounds of all loaders (default: 5)")
    load.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")


def _add_bench_lora(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    lora = _command(bench, "lora", "measure what adapters cost an engine, without HTTP", "rekindle.cli.bench", "lora")
    lora.add_argument("--model", metavar="NAME", help="the base model (default: the only one there is)")
    lora.add_argument(
        "--only", nargs="+", default=_MEASUREMENTS, choices=_MEASUREMENTS, help="what to measure (default: everything)"
    )
    for name, default, text in (
        ("adapters", [0, 1, 8, 32, 64], "numbers of adapters in a batch"),
        ("concurrency", [1, 8, 32, 64], "numbers of sequences in a batch"),
        ("ranks", [8, 16, 32, 64], "ranks, given to the adapters in turn"),
    ):
        shown = " ".join(map(str, default))
        lora.add_argument(
            f"--{name}", type=int, nargs="+", default=default, metavar="N", help=f"{text} (default: {shown})"
        )
    lora.add_argument(
        "--targets", nargs="+", default=["attention"], metavar="MODULE",
        help="modules the adapters change, by name, or attention, or all-linear (default: attention)",
    )  # fmt: skip
    lora.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of each timed run (default: 8)")
    lora.add_argument(
        "--rate", type=float, metavar="R", help="requests a second of thrash (default: half of what can be served)"
    )
    lora.add_argument("--seed", type=int, default=0, help="of adapters, prompts and arrivals (default: 0)")
    lora.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one setting of the engine, such as engine.threads=4; may be repeated",
    )  # fmt: skip
    lora.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    lora.add_argument("--plot", type=Path, metavar="DIR", help="draw pictures into a directory; needs matplotlib")


def _add_bench_coldstart(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    coldstart = _command(
        bench, "coldstart", "measure a sleeping model's way to its first token", "rekindle.cli.bench", "coldstart"
    )
    coldstart.add_argument("--model", metavar="NAME", help="the base model (default: the only one there is)")
    coldstart.add_argument("--repetitions", type=int, default=5, metavar="N", help="rounds (default: 5)")
    coldstart.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
        help="override one setting of the engine, such as engine.threads=4; may be repeated",
    )  # fmt: skip
    coldstart.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    coldstart.add_argument("--plot", type=Path, metavar="DIR", help="draw a picture into a directory; needs matplotlib")


def _add_bench_codecs(bench: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    codecs = _command(
        bench, "codecs", "measure how well and how fast weights are packed", "rekindle.cli.bench", "codecs"
    )
    codecs.add_argument(
        "--data", type=Path, nargs="+", default=[], metavar="FILE",
        help="safetensors files to pack (default: the adapters of the home, and its models in F16 and F32)",
    )  # fmt: skip
    codecs.add_argument("--size", default="64MiB", metavar="SIZE", help="how much of each dtype (default: 64MiB)")
    codecs.add_argument("--threads", type=int, metavar="N", help="threads that pack and unpack (default: every core)")
    codecs.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [parse_bytes(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if min(sizes) < 2:
        raise argparse.ArgumentTypeError(f"{text} has a size of less than one element, 2 bytes")
    return sizes


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, module: str, function: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(module=module, function=function)
    parser.add_argument(
        "--home", type=Path, metavar="DIR", default=None,
        help="where models, adapters and the catalog live (default: $REKINDLE_HOME or ~/.rekindle)",
    )  # fmt: skip
    return parser
