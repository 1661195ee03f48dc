"""The links between ranks, and the seconds that a collective takes over one. No torch."""

import math
import re
from dataclasses import dataclass, replace
from math import gcd

from base.errors import UserError, shown


def ring_bytes(nbytes: float, size: int) -> float:
    """Bytes that each of `size` ranks sends in a ring all-reduce of nbytes."""
    return 2 * (size - 1) / size * nbytes


@dataclass(frozen=True)
class Link:  # between ranks
    alpha: float  # seconds of an empty message
    beta: float  # seconds a byte
    one_shot: bool = False  # a rank can read all others' memory at once

    @classmethod
    def parse(cls, text: str, option: str = "link") -> "Link":
        """A name in LINKS, or alpha_us:200,GBps:1; UserError for any other text."""
        if text in LINKS:
            return LINKS[text]
        parts = [part.partition(":")[::2] for part in text.split(",")]
        fields = dict(parts)
        fault = f"--{option}={shown(text)}: use alpha_us:200,GBps:1, or one of {', '.join(LINKS)}"
        if sorted(name for name, _ in parts) != ["GBps", "alpha_us"]:
            raise UserError(f"{fault}.")
        for name, (low, high) in {"alpha_us": (0, 1e5), "GBps": (1e-3, 1e5)}.items():
            number = re.fullmatch(r"[0-9]{0,9}\.?[0-9]{0,9}", fields[name])
            value = float(fields[name]) if number and fields[name].strip(".") else math.nan
            if not low <= value <= high:
                raise UserError(f"{fault}. {name} is {low:g} to {high:g}.")
        return cls(1e-6 * float(fields["alpha_us"]), 1e-9 / float(fields["GBps"]))

    def seconds(self, op: str, nbytes: float, size: int, stride: int = 1,
                senders: int = 0) -> float:
        """A collective of nbytes (the whole message) over `size` ranks, by its fastest algorithm.
        stride and senders matter between nodes only: see Cluster.

        all_reduce: a ring, 2 (N - 1) rounds of m / N; a tree, 2 log2 N rounds of m; or one shot, 2
        rounds, in which a rank reads the m bytes of N - 1 others. all_gather and reduce_scatter are
        half a ring, broadcast is half a tree.
        """
        if size == 1:
            return 0.0
        ring = (size - 1) * self.alpha + ring_bytes(nbytes, size) / 2 * self.beta
        tree = (size - 1).bit_length() * (self.alpha + nbytes * self.beta)
        ways = {"all_reduce": [2 * ring, 2 * tree], "broadcast": [tree]}.get(op, [ring])
        if self.one_shot:
            others = (size - 1) * (nbytes if op == "all_reduce" else nbytes / size)
            ways.append(2 * self.alpha + (nbytes if op == "broadcast" else others) * self.beta)
        return min(ways)

    def __str__(self) -> str:
        return f"{1e6 * self.alpha:g} us, {1e-9 / self.beta:.4g} GB/s"


@dataclass(frozen=True)
class Cluster(Link):  # this one is within a node
    ranks: int = 1  # of a node
    between: Link = Link(0.0, 0.0)  # of one node to the others; its ranks share it

    def seconds(self, op: str, nbytes: float, size: int, stride: int = 1,
                senders: int = 0) -> float:
        """A collective over ranks that are `stride` apart, while as many ranks of each node, all or
        `senders`, are in one of the same kind. The members within a node share out the message: an
        all-reduce is a reduce-scatter within nodes, all-reduces between them, an all-gather."""
        inner = gcd(size, self.ranks // stride) if self.ranks % stride == 0 else 1
        if inner == size:
            return super().seconds(op, nbytes, size)
        sharing = min(senders or self.ranks, self.ranks)
        between = replace(self.between, beta=sharing * self.between.beta)
        around = super().seconds("all_gather", nbytes, inner) * (1 + (op == "all_reduce"))
        return around + between.seconds(op, nbytes / inner, size // inner)


NVLINK4, NVLINK3 = Link(4e-6, 1 / 365e9, one_shot=True), Link(4e-6, 1 / 243e9, one_shot=True)
PCIE, PCIE_HOST = Link(5e-6, 1 / 19e9), Link(7e-6, 1 / 10e9)
ROCE, ETHERNET = Link(15e-6, 1 / 12e9), Link(40e-6, 1 / 5e9)
# that --link knows; an ethernet's GB/s are its rated ones without the headers of TCP
LINKS = {"ethernet-1g": Link(40e-6, 1 / 0.117e9), "ethernet-10g": Link(40e-6, 1 / 1.17e9),
         "roce-100g": ROCE, "pcie": PCIE, "nvlink": NVLINK4}
