"""Find the sync points that can go, repair the weights for it, and write shards that need fewer.

    python drop_syncs.py group --init_from=SRC --ranks=2 --dataset=NAME --out=GROUPED
    torchrun --standalone --nproc_per_node=2 drop_syncs.py scan --init_from=GROUPED \\
        --dataset=NAME --scan=FILE.json --budget=1%
    torchrun --standalone --nproc_per_node=2 drop_syncs.py repair --init_from=GROUPED \\
        --dataset=NAME --sync=mlp --out=DIR

Perplexities are exact, of the dataset's validation split. The results hold for one number of ranks.
"""

from typing import Any

import base.quick_start  # noqa: F401
from cli.options import GroupOptions, RepairOptions, ScanOptions
from fewer_syncs.grouping import group_heads
from fewer_syncs.repair import repair
from fewer_syncs.scan import scan
from world.entry import Main, run_commands

COMMANDS: dict[str, tuple[type[Any], Main]] = {
    "group": (GroupOptions, group_heads), "scan": (ScanOptions, scan),
    "repair": (RepairOptions, repair)}

if __name__ == "__main__":
    run_commands(COMMANDS, "drop_syncs.py")
