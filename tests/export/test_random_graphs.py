"""Random networks of each scheme: lowered, run and compared code by code with themselves."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from export.random_graphs import EMITTED, SCHEMES, random_batch, random_net, verified

GRAPHS = 20  # a scheme; `python tests/torture_programs.py` runs hundreds
WIDE = 2**24  # what float32 holds of every sum


@pytest.mark.parametrize("scheme", SCHEMES)
def test_programs_of_random_networks_are_their_networks(scheme: str) -> None:
    kinds: Counter[str] = Counter()
    widest = 0
    for number in range(GRAPHS):
        program, certificate = verified(scheme, number)
        assert certificate.ok, f"verified({scheme!r}, {number}): {certificate}"
        kinds.update({op.kind for op in program.ops})
        widest = max([widest, *(max(-each.seen_low, each.seen_high) for each in certificate.accumulators)])
    assert widest > WIDE
    rare = {kind: kinds[kind] for kind in EMITTED[scheme] if kinds[kind] < 2}
    assert not rare, f"kinds in fewer than two of {GRAPHS} programs: {rare}; all: {dict(kinds)}"


def test_islands_between_integers() -> None:
    certificates = [verified("tqt", number, islands=True)[1] for number in range(8)]
    assert all(certificate.ok for certificate in certificates)
    assert any(certificate.entries for certificate in certificates)
    assert not any(certificate.end_to_end for certificate in certificates if certificate.islands)


def test_the_same_draw_is_the_same_network() -> None:
    nets = [random_net(random.Random(5), "tqt") for _ in range(2)]
    assert nets[0][1] == nets[1][1]
    a, b = (net.state_dict() for net, _ in nets)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = random_net(random.Random(6), "tqt")[0].state_dict()
    assert any(name not in other or not torch.equal(a[name], other[name]) for name in a)


def test_a_draw_leaves_torch_s_generator_alone() -> None:
    before = torch.get_rng_state()
    random_batch(random_net(random.Random(3))[1], 2)
    assert torch.equal(before, torch.get_rng_state())
