"""Programs that start in a tenth of a second: a Python that has imported torch already.

`import torch` costs a process two seconds of the processor, a torchrun of two ranks six. A server
is forked from the tests' own process, before that computes anything. The directory `Warm.place` has
a `python` and a `torchrun`: small scripts that ask the server for a fork of itself with their
arguments, directory, environment, streams and namespaces, pass signals on to it, and end as it
ends. The processes are as real as others, and what they import is the project's own. Their starts
are not: one test of each kind should use the real ones.
"""

import array
import atexit
import ctypes
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any, NoReturn

SHIM = """#!{python} -IS
import array, json, os, signal, socket, sys
if sys.argv[1:2] in (["-S"], ["-I"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
words = {first!r} + sys.argv[1:]
asked = json.dumps([words, os.getcwd(), dict(os.environ), os.getpid()]).encode()
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
streams = array.array("i", [0, 1, 2])
server.sendmsg(
    [len(asked).to_bytes(4, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
)
server.sendall(asked)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
for number in (0, 1, 2):
    os.close(number)
ended = server.recv(2)
status, number = ended if len(ended) == 2 else (1, 9)
if number:
    signal.signal(number, signal.SIG_DFL) if number != 9 else None
    os.kill(os.getpid(), number)
os._exit(status)
"""


class Warm:
    """The server and its directory of programs. The server ends with this process."""

    def __init__(self) -> None:
        # no TemporaryDirectory: forked ranks would remove it at their ends
        self.place = Path(tempfile.mkdtemp(prefix="warm-"))
        address = str(self.place / "socket")
        for name, first in (("python", []), ("torchrun", ["-m", "torch.distributed.run"])):
            shim = SHIM.format(python=sys.executable, first=first, address=address)
            (self.place / name).write_text(shim)
            (self.place / name).chmod(0o755)
        (self.place / "python3").symlink_to("python")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(64)
        parent = os.getpid()
        if os.fork() == 0:
            try:
                _serve(listener, parent, str(self.place / "python"))
            finally:  # never back into the tests
                os._exit(1)
        listener.close()

    @property
    def python(self) -> str:
        return str(self.place / "python")

    def close(self) -> None:
        shutil.rmtree(self.place)


def _serve(listener: socket.socket, parent: int, executable: str) -> NoReturn:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies of handlers
    sys.executable = executable
    while os.getppid() == parent:
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                _handle(client)
            finally:
                os._exit(1)
        client.close()
    os._exit(0)


def _handle(client: socket.socket) -> NoReturn:
    """One program: a process that runs it, and this one, which passes signals on and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, _, _ = client.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i", ancillary[0][2])
    size, asked = int.from_bytes(head, "little"), b""
    while len(asked) < size:
        asked += client.recv(size - len(asked))
    words, place, environment, shim = json.loads(asked)
    child = os.fork()
    if child == 0:
        client.close()
        _become(words, place, environment, shim, list(streams))
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([client.fileno(), ended], [], [])
        if ended in ready:
            break
        number = client.recv(1)
        os.kill(child, number[0] if number else signal.SIGKILL)
        if not number:
            break
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)  # negative: the signal that ended it
    try:
        client.send(bytes([max(code, 0), max(-code, 0)]))
    finally:
        os._exit(0)


def _become(
    words: list[str], place: str, environment: dict[str, str], shim: int, streams: list[int]
) -> NoReturn:
    atexit._clear()  # what this process's parents meant to do at their ends
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    _enter_namespaces(shim)
    os.setpgid(0, 0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        mode = "r" if number == 0 else "w"
        errors = "backslashreplace" if number == 2 else None
        buffering = 1 if number == 2 or os.isatty(number) else -1
        opened = open(number, mode, buffering, closefd=False, errors=errors)
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
    import torch

    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    while words[:1] == ["-u"]:
        words = words[1:]
    sys.path = [path for path in sys.path if not path.endswith("/tests")]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    status: Any = 0
    try:
        _run(words)
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(status or 0))


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _enter_namespaces(pid: int) -> None:
    """Those of the program that asked, as `ip netns exec` and `unshare` give it."""
    for kind in ("net", "uts", "mnt"):
        theirs, own = f"/proc/{pid}/ns/{kind}", f"/proc/self/ns/{kind}"
        if os.readlink(theirs) != os.readlink(own):
            with open(theirs) as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns {kind}")
