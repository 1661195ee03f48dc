"""How every entry point begins and ends: options, world, the run; and how a mistake or a lost rank is reported."""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from base.console import CONTROLS, console
from base.errors import ReaderGone, Stopped, Unheard, UserError, is_out_of_memory, print_error
from cli.grammar import parse, parse_command
from cli.options import RunOptions, as_dict
from parallel.ledger import CollectiveError
from parallel.replicas import DriftError
from world import mesh

# Options that may differ between ranks without harm: they name what only rank 0 does.
_OWN = ("wandb_run_name", "wandb_project", "wandb_log", "debug")


Main = Callable[[mesh.World, Any], None]


def say_once(line: str) -> None:
    """Before there is a world: by rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print_error(line)


def run(options_class: type[RunOptions], main: Main, prog: str) -> None:
    """Parse sys.argv, start the world, run `main(world, options)` on every rank, and exit; see `run_parsed`."""
    run_parsed(lambda: (main, parse(options_class, sys.argv[1:], prog, say_once)), prog)


def run_commands(commands: dict[str, tuple[type[RunOptions], Main]], prog: str) -> None:
    """The same where the first word says which options and which main."""

    def parsed() -> tuple[Main, Any]:
        classes = {name: cls for name, (cls, _) in commands.items()}
        name, options = parse_command(classes, sys.argv[1:], prog, say_once)
        return commands[name][1], options

    run_parsed(parsed, prog)


def run_parsed(parsed: Callable[[], tuple[Main, Any]], prog: str) -> None:
    """Start the world that the options ask for, run main on every rank, and exit.

    Exit status: 0; 2 for a user's mistake (one line, no traceback); 1 for an error of ours or of the machine; 130 for
    Ctrl-C, 143 for SIGTERM. One rank speaks; no rank is left waiting for another. Where nobody reads standard output any
    more: 141, as of a program that SIGPIPE ends, and 0 of a rank, as its launcher would make a report of any other.
    """
    with console():
        _run_parsed(parsed, prog)


def _run_parsed(parsed: Callable[[], tuple[Main, Any]], prog: str) -> None:
    debug = any(word.replace("-", "_").lstrip("_").startswith("debug") for word in sys.argv[1:])
    world = None
    if os.environ.get("RANK", "0") != "0" and {"--help", "-h"} & set(sys.argv):
        return  # rank 0 prints it
    try:
        main, options = parsed()
        debug = options.debug
        promise = {name: value for name, value in as_dict(options).items() if name not in _OWN}
        tp = getattr(options, "tp", 0)
        tp = tp if isinstance(tp, int) else 0  # bench_tp.py block makes groups of several sizes, of all ranks
        with mesh.start(options, tp, prog, promise) as world:
            main(world, options)
            sys.stdout.flush()
        if world.size > 1:
            _leave()
    except ReaderGone:
        _die(0 if "RANK" in os.environ else 128 + signal.SIGPIPE, "", False, world)
    except UserError as error:
        _die(2, f"{prog}: {error}", debug, world)
    except Stopped as stop:
        _die(stop.status, f"{prog}: {stop}", False, world)
    except KeyboardInterrupt:
        _die(130, f"{prog}: stopped by Ctrl-C", False, world)
    except Exception as error:
        _die(1, *_describe(prog, error, world, debug), world)


def _describe(prog: str, error: Exception, world: mesh.World | None, debug: bool) -> tuple[str, bool]:
    """The message for an error that is not the user's, and whether its traceback helps."""
    rank = os.environ.get("RANK", "0")
    if is_out_of_memory(error):
        need = " ".join(getattr(error, "__notes__", ["Use a smaller batch or a larger tp."]))
        what = _first_line(error).rpartition("DefaultCPUAllocator: ")[2].rstrip(".")
        return f"{prog}: rank {rank} is out of memory: {what}. {need}", debug
    if isinstance(error, OSError) and error.filename is not None:
        return f"{prog}: rank {rank}: {error.strerror}: {error.filename}", debug
    if isinstance(error, DriftError):
        return f"{prog}: {error}", debug
    cause = error.__cause__ if isinstance(error, CollectiveError) else error
    if isinstance(cause, torch.AcceleratorError):
        where = f" in {_first_line(error)}" if cause is not error else f": {_first_line(error)}"
        return (
            f"{prog}: rank {rank}: its GPU failed{where}. Look at nvidia-smi and the kernel's log; "
            f"train_tp.py goes on from its last checkpoint with --init_from=resume."
        ), debug
    if _is_lost_peer(error):
        time.sleep(0.1)  # a peer's sockets close a moment before its process is gone
        gone = ", ".join(f"rank {r} is gone" for r in (world.gone() if world else ())) or "no rank of this host is gone"
        return f"{prog}: rank {rank} lost contact with its peers ({gone}) in {_first_line(error)}", debug
    return f"{prog}: rank {rank}: {type(error).__name__}: {_first_line(error)}", True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_lost_peer(error: Exception) -> bool:
    return isinstance(error, CollectiveError | dist.DistError) or "by peer" in str(error)


def _leave() -> None:
    """End this process without taking down the interpreter. A gloo thread may still free the tensors of the last message.
    It needs the interpreter for that, and aborts the process if that is gone."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def _die(status: int, message: str, show_traceback: bool, world: mesh.World | None) -> None:
    """Say it once and end this process at once: a tidy shutdown would wait for ranks that are not coming."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever is impatient does not break off this
    first = isinstance(sys.exception(), Unheard) or mesh.first_to_fail(world)
    if first and message:
        if show_traceback:
            traceback.print_exc()
        print(message.translate(CONTROLS), file=sys.stderr, flush=True)
    mesh.linger(world, first)
    with contextlib.suppress(OSError, ReaderGone):
        sys.stdout.flush()
    os._exit(status)
