"""Random networks by the hundred: each is lowered, and its program compared with it code by code.

    python tests/torture_programs.py --graphs 200 --schemes tqt niti --seed 1

Prints how often each kind of operation occurred; exits with 1 where a program is not its network, where a kind that
the scheme's programs have occurred too rarely, or where no sum passed what float32 holds.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter

import torch
from export.random_graphs import EMITTED, SCHEMES, verified
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

ENOUGH = 20  # programs of 200 that hold a kind
WIDE = 2**24
ISLANDS = 0.2  # of the networks have float functions between


def torture(scheme: str, graphs: int, number: int) -> bool:
    """Whether so many programs are their networks, and show what a scheme's programs can hold."""
    kinds: Counter[str] = Counter()
    found: Counter[str] = Counter()

    @seed(number)
    @settings(max_examples=graphs, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(draw=st.integers(0, 2**32 - 1), blocks=st.integers(0, 6))
    def check(draw: int, blocks: int) -> None:
        islands = random.Random(draw).random() < ISLANDS
        program, certificate = verified(scheme, draw, islands=islands, blocks=blocks)
        assert certificate.ok, str(certificate)
        kinds.update({op.kind for op in program.ops})
        sums = max((max(-each.seen_low, each.seen_high) for each in certificate.accumulators), default=0)
        found.update(graphs=1, wide=int(sums > WIDE), exact=int(certificate.end_to_end), samples=certificate.samples)
        found.update(elements=certificate.elements, flipped=sum(entry.flipped for entry in certificate.entries))

    began = time.monotonic()
    try:
        check()
    except Exception as error:  # every kind of failure is a finding, with hypothesis's smallest example of it
        notes = "\n".join(getattr(error, "__notes__", []))
        print(f"{scheme}: FAILED behind {found['graphs']} networks: {error}\n{notes}", flush=True)
        return False
    least = ENOUGH * graphs // 200
    rare = sorted(f"{kind} {kinds[kind]}" for kind in EMITTED[scheme] if kinds[kind] < least)
    print(
        f"{scheme}: {found['graphs']} networks equal, {found['exact']} end to end, {found['elements']:,} numbers, "
        f"{found['flipped']} codes flipped behind islands, {found['wide']} with sums beyond 2^24, "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    print(f"  {', '.join(f'{kind} {count}' for kind, count in kinds.most_common())}", flush=True)
    if rare:
        print(f"{scheme}: FAILED, kinds in fewer than {least} programs: {', '.join(rare)}", flush=True)
    if not found["wide"]:
        print(f"{scheme}: FAILED, no sum passed 2^24", flush=True)
    return not rare and bool(found["wide"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graphs", type=int, default=200, help="networks a scheme")
    parser.add_argument("--schemes", nargs="+", choices=sorted(SCHEMES), default=sorted(SCHEMES))
    parser.add_argument("--seed", type=int, default=None, help="of the networks; default another one each time")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    number = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    print(f"torture: --seed {number}", flush=True)
    held = [torture(scheme, options.graphs, number) for scheme in options.schemes]
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
