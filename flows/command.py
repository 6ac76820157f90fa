"""The command line of a flow: parameters in, exit code out, one line for each error."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import config, disk
from components.config import RetrainConfig
from components.errors import AdapterlineError, ConfigError
from infra import local

if TYPE_CHECKING:
    from flows.screen import Terminal

# What every retrain imports, once its servers start.
MEANWHILE = ("datasets", "mlflow")
INTERRUPTED = "interrupted: run the same command again to go on from the last checkpoint"
CODES = "0 registered or up to date, 2 the gate failed, 3 the test part is too small, 1 an error"
ABOUT = "Retrain an adapter, compare it with full fine-tuning, register it if it passes the gate."


def main(
    flow: Callable[[RetrainConfig], Any],
    arguments: list[str] | None = None,
    module: str = "flows.retrain",
    about: str = ABOUT,
    upgrade: Callable[..., list[str]] | None = None,
    codes: str = CODES,
    registers: bool = True,
) -> int:
    """module: what was started with -m.  about: what it does, in a sentence.  upgrade: the flow behind --all-from.
    codes: what exit codes mean.  registers: does the flow return the version that answers?
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=about,
        epilog=f"exit code: {codes}",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--preset", help="a ready parameter set of flows/presets, and a method if you like: tweets+lora")
    what.add_argument("--config", type=Path, help="your own YAML file")
    if upgrade:
        _add_upgrade(parser, what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. gate.margin=0.02"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' own messages")
    options = parser.parse_args(arguments)
    listen(options.debug)
    local.interrupt_on_sigterm()
    with one_line_errors(options.debug, INTERRUPTED) as ending:
        if upgrade and _is_upgrade(options):
            with _prefect() as ready, servers(), _terminal():
                ready()
                upgrade(options.base, options.all_from, options.standing_on, _overrides(options.set), options.list)
            return 0
        read = config.load_preset if options.preset else config.load
        settings = read(options.preset or options.config, _overrides(options.set))
        with _prefect() as ready, servers() as stack, _terminal() as terminal:
            ready()
            made = flow(settings)
            if registers:
                _closing(settings, made, stack, terminal.said)
    return ending.code


@dataclass
class Ending:
    """The exit code of a command."""

    code: int = 0


@contextlib.contextmanager
def one_line_errors(debug: bool, interrupted: str) -> Iterator[Ending]:
    """Whatever goes wrong becomes one line on standard error, and an exit code."""
    ending = Ending()
    try:
        yield ending
    except (AdapterlineError, local.StackError) as error:
        if debug:
            raise
        sys.stdout.flush()
        sys.stderr.write(f"error: {error}\n")
        ending.code = error.exit_code if isinstance(error, AdapterlineError) else 1
    except Exception as error:  # a bug of ours or of a library: one line too, and how to see more
        if debug:
            raise
        sys.stderr.write(f"error: {in_one_line(error)}\n")
        ending.code = 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{interrupted}\n")
        ending.code = 130


def in_one_line(error: Exception) -> str:
    """What to say of any error. A library's own words may quote a row, its name does not."""
    known = error if isinstance(error, AdapterlineError) else disk.full(error) or _away(error)
    return str(known or f"unexpected {type(error).__name__}; run again with --debug to see where")


def _away(error: Exception) -> AdapterlineError | None:
    """What to say of the one server whose clients are not ours."""
    import httpx
    from prefect.settings import get_current_settings

    if not isinstance(error, httpx.TransportError) and "Failed to reach API" not in str(error):
        return None
    url = get_current_settings().api.url or "its temporary address"
    todo = "start it, or correct PREFECT_API_URL; then run the same again: what is done is kept"
    return AdapterlineError(f"a Prefect server at {url}", "no answer", todo)


def _add_upgrade(parser: argparse.ArgumentParser, what: Any) -> None:
    """Another base for everything that stands under an alias: flows/upgrade.py."""
    what.add_argument(
        "--all-from",
        type=str.lower,
        choices=("production", "candidate"),
        help="retrain every model with this alias on the base given by --base, each on its own rows, and compare",
    )
    group = parser.add_argument_group("with --all-from")
    group.add_argument("--base", help="the new base: minilm, a folder, or a hub id with --set base.revision=COMMIT")
    group.add_argument("--standing-on", metavar="OLD", help="only what stands on this base: name, revision or digest")
    group.add_argument("--list", action="store_true", help="say what would be done, and do nothing")


def _is_upgrade(options: argparse.Namespace) -> bool:
    """Raises ConfigError when only half of it was given."""
    if options.all_from and not options.base:
        raise ConfigError("--base NEW with --all-from", "none", "name the base that the adapters are to stand on")
    given = [f"--{name}" for name in ("base", "standing-on", "list") if getattr(options, name.replace("-", "_"))]
    if given and not options.all_from:
        todo = "add --all-from production, or use --set base.name=… for one model"
        raise ConfigError("--all-from with --base, --standing-on and --list", ", ".join(given), todo)
    return bool(options.all_from)


def _overrides(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError("--set KEY=VALUE", f"--set {pair}", "add the equals sign")
        found[key] = value
    return found


@contextlib.contextmanager
def servers() -> Iterator[local.Stack | None]:
    """The local stack; None when the environment names an MLflow of one's own."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        yield None
        return
    with local.stack() as stack, local.exported(stack.environment):
        yield stack


@contextlib.contextmanager
def _prefect() -> Iterator[Callable[[], object]]:
    """Prefect's temporary server, where none is named, starting; what is called to wait for it.

    Ctrl-C reaches a whole process group: a server that ended by it before its flow would have the flow ask for minutes
    who there is to be told of its end.
    """
    from prefect.settings import get_current_settings

    if get_current_settings().api.url:
        yield lambda: None
        return
    from prefect.server.api.server import SubprocessASGIServer

    failed: list[Exception] = []

    def start() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # of this thread, from which the server inherits it
        try:
            SubprocessASGIServer().start()  # the one that Prefect itself would start; it ends with this process
        except Exception as error:  # noqa: BLE001  # raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()

    def ready() -> None:
        for name in MEANWHILE:
            importlib.import_module(name)
        thread.join()
        for error in failed:
            raise error

    yield ready


@contextlib.contextmanager
def _terminal() -> Iterator[Terminal]:
    from rich.console import Console

    from flows.screen import Terminal

    with Terminal(Console()) as terminal:
        yield terminal


def listen(debug: bool) -> None:
    """Our own lines on standard output; of the libraries nothing: every error of theirs becomes a line of ours."""
    log = logging.getLogger("adapterline")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    if debug:
        return
    import warnings

    warnings.simplefilter("ignore")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read when it is imported, which takes seconds
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"  # for when Prefect configures logging again
    for each in logging.getLogger().handlers:
        each.setLevel(logging.CRITICAL)


def _closing(settings: RetrainConfig, version: str, stack: local.Stack | None, said: str) -> None:
    """What a new version said of the preset's own sentences, as the command says it that a user would type, and where
    to look.
    """
    ours = stack is not None or not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")
    python = os.path.relpath(sys.executable)
    if said:
        print("\nprediction of the registered version:")
        for text, line in zip(["", *settings.report.examples], said.splitlines(), strict=False):
            print(f"  {line}    {text}".rstrip())
    print("\nlook further:")
    if ours:
        port = stack.mlflow if stack is not None and stack.mlflow else 5000
        print(f"  {python} -m infra.local mlflow     # runs, gate table and versions at http://127.0.0.1:{port}")
    run = f"{python} -m infra.local run -- " if ours else ""
    print(f"  {run}{python} -m components.serving.score {version} --text 'your sentence'")
