"""How every entry point begins and ends: parse options, start the world, run, report a failure."""

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
from base.errors import ReaderGone, Stopped, UserError, first_line, is_out_of_memory, print_error
from base.processes import call_within
from cli.grammar import parse, parse_command
from cli.options import MeshOptions, RunOptions, as_dict
from parallel.ledger import CollectiveError
from parallel.replicas import DriftError
from world.launch import ANSWER_S, NoStore, connect
from world.mesh import World, start
from world.watch import report_failure

# options that need not be the same on all ranks: rank 0 alone uses them
OF_RANK_0 = {"wandb_run_name", "wandb_project", "wandb_log", "debug"}

Main = Callable[[World, Any], None]


def _rank() -> str:
    return os.environ.get("RANK", "0")


def say_once(line: str) -> None:
    """Print on rank 0 only, before there is a world."""
    if _rank() == "0":
        print_error(line)


def run(options_class: type[RunOptions], main: Main, prog: str) -> None:
    """Parse sys.argv and run `main(world, options)` on every rank; see `run_parsed`."""
    run_parsed(lambda: (main, parse(options_class, sys.argv[1:], prog, say_once)), prog)


def run_commands(commands: dict[str, tuple[type[RunOptions], Main]], prog: str) -> None:
    """The same for an entry point whose first word picks the options and the main function."""
    classes = {name: options_class for name, (options_class, _) in commands.items()}

    def parsed() -> tuple[Main, Any]:
        name, options = parse_command(classes, sys.argv[1:], prog, say_once)
        return commands[name][1], options

    run_parsed(parsed, prog)


def run_parsed(parsed: Callable[[], tuple[Main, Any]], prog: str) -> None:
    """Start the world that the options ask for, run main on every rank, and exit. One rank prints
    why the run failed, and no rank is left waiting for another. parsed: gives main and the options.

    Exit status: 0; 1 for a fault of this program or of the machine; 2 for a UserError; that of
    Stopped; 130 for Ctrl-C. If nothing reads standard output any more: 141, as after SIGPIPE; under
    a launcher 0, as it would report a failure."""
    if _rank() != "0" and {"--help", "-h"} & {*sys.argv}:
        return  # rank 0 prints it
    with console():
        world, debug = None, False
        try:
            main, options = parsed()
            debug = options.debug
            shared = {key: value for key, value in as_dict(options).items() if key not in OF_RANK_0}
            tp = options.tp if isinstance(options, MeshOptions) else 0
            with start(options, tp, prog, shared) as world:
                main(world, options)
                sys.stdout.flush()
            if world.size > 1:
                # a gloo thread that frees the tensors of the last message needs the interpreter
                atexit._run_exitfuncs()
                sys.stdout.flush()
                os._exit(0)
        except ReaderGone:
            _die(world, 0 if "RANK" in os.environ else 128 + signal.SIGPIPE, "")
        except UserError as error:
            _die(world, 2, f"{prog}: {error}", debug)
        except Stopped as stop:
            _die(world, stop.status, f"{prog}: {stop}")
        except KeyboardInterrupt:
            _die(world, 130, f"{prog}: stopped by Ctrl-C")
        except Exception as error:
            known = _description(error, world)
            text = known or f"rank {_rank()}: {type(error).__name__}: {first_line(error)}"
            _die(world, 1, f"{prog}: {text}", debug or not known)


def _description(error: Exception, world: World | None) -> str:
    """One line for an error that needs no traceback to be understood; "" for any other."""
    first = first_line(error)
    if is_out_of_memory(error):
        need = " ".join(getattr(error, "__notes__", ["Use a smaller batch or a larger tp."]))
        what = first.rpartition("DefaultCPUAllocator: ")[2].rstrip(".")
        return f"rank {_rank()} is out of memory: {what}. {need}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"rank {_rank()}: {error.strerror}: {error.filename}"
    if isinstance(error, DriftError):
        return str(error)
    cause = error.__cause__ if isinstance(error, CollectiveError) else error
    if isinstance(cause, torch.AcceleratorError):
        fault = f"its GPU failed{':' if cause is error else ' in'} {first}"
        return (
            f"rank {_rank()}: {fault}. Look at nvidia-smi and the kernel's log; train_tp.py goes "
            "on from its last checkpoint with --init_from=resume."
        )
    if isinstance(error, CollectiveError | dist.DistError) or "by peer" in str(error):
        time.sleep(0.1)  # a process ends a moment after its sockets have closed
        ended = sorted(world.watch.ended()) if world and world.watch else []
        gone = ", ".join(f"rank {rank} is gone" for rank in ended) or "no rank of this host is gone"
        return f"rank {_rank()} lost contact with its peers ({gone}) in {first}"
    return ""


def _die(world: World | None, status: int, message: str, show_traceback: bool = False) -> None:
    """Print the message if no other rank failed before, and end this process at once: an orderly
    shutdown would wait for ranks that are not coming."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C does not interrupt this
    first = isinstance(sys.exception(), NoStore) or first_to_fail(world)
    if first and message:
        if show_traceback:
            traceback.print_exc()
        print_error(message.translate(CONTROLS))
    linger(world, first)
    with contextlib.suppress(OSError, ReaderGone):
        sys.stdout.flush()
    os._exit(status)


def first_to_fail(world: World | None) -> bool:
    """Report that the run has failed; True on the first rank, which prints why."""
    if world is not None:
        return world.watch is None or world.watch.is_first()
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not rank or not size:
        return True
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "0")
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    alone = not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))

    def report() -> bool:
        store = connect(host, int(port), False, time.monotonic())
        return report_failure(dist.PrefixStore(f"start {restarts}", store))

    return call_within(report, alone, ANSWER_S)  # without a store rank 0 prints


def linger(world: World | None, printed: bool) -> None:
    """Wait, before a failed run's exit, while other ranks need this process."""
    if world is not None and world.watch is not None:
        world.watch.linger(printed)
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        # torchrun ends all ranks when the first one exits: let it be the one that printed
        time.sleep(0.3 if printed else 5)
