"""Whether a process of this host still runs."""

import os


def is_running(pid: int) -> bool:
    """False for one that has ended, also while it waits as a zombie for its parent."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or a system without /proc: it exists
        return True
