from __future__ import annotations

import pytest
import torch
from support import same

from malmend.editors.network import EditorNetwork, NetworkSettings
from malmend.errors import EditorError

WIDTH, SITES = 7, 2


def network(seed: int = 0, **settings) -> EditorNetwork:
    return EditorNetwork(WIDTH, SITES, NetworkSettings(**{"rank": 3, **settings}), seed)


def rows(count: int = 5) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def scattered(net: EditorNetwork) -> EditorNetwork:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("start", ["xavier", "normal"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_start_is_the_identity(placement, start, blocks):
    net = network(placement=placement, start=start, blocks=blocks)
    for site in range(SITES):
        assert torch.equal(net(rows(), site), rows())


@pytest.mark.parametrize("placement", ["before", "after"])
def test_the_start_can_be_learned_from(placement):
    """At U = 0 every pre-activation is 0, where relu would pass nothing back and clamp does."""
    net = network(placement=placement)
    target = rows() + 1
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    (net(rows(), 0) - target).square().sum().backward()
    for block in net.blocks:
        assert (block.up_FR.grad.norm(dim=1) > 0).all()
        assert (block.bias_F.grad != 0).all()
    optimiser.step()
    after = net(rows(), 0)
    assert (after - rows()).abs().max() > 1e-3
    assert (after - target).square().sum() < (rows() - target).square().sum()


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("site", range(SITES))
def test_the_blocks_are_equations_7_and_8(placement, site):
    net = scattered(network(placement=placement)).double()
    x = rows().double()
    wanted = []
    for row in x:
        for block in net.blocks:
            scale, offset = block.scale_SF[site], block.offset_SF[site]
            out = []
            for f in range(WIDTH):
                low = block.bias_F[f]
                for r in range(3):
                    inner = sum(block.down_RF[r, e] * row[e] for e in range(WIDTH))
                    low = low + block.up_FR[f, r] * inner
                if placement == "before":
                    out.append(row[f] + max(scale[f] * low + offset[f], 0 * low))
                else:
                    out.append(row[f] + scale[f] * max(low, 0 * low) + offset[f])
            row = torch.stack(out)
        wanted.append(row)
    torch.testing.assert_close(net(x, site), torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_a_site_has_its_own_scale_and_offset_and_shares_the_rest():
    net = scattered(network())
    first, second = net(rows(), 0), net(rows(), 1)
    assert not torch.allclose(first, second)
    for block in net.blocks:
        assert block.scale_SF.shape == block.offset_SF.shape == (SITES, WIDTH)
        with torch.no_grad():
            block.scale_SF[1], block.offset_SF[1] = block.scale_SF[0], block.offset_SF[0]
    assert torch.equal(net(rows(), 0), first)
    assert torch.equal(net(rows(), 1), first)


def test_the_rank_is_cut_to_the_width():
    for rank, wanted in ((3, 3), (7, 7), (1920, 7)):
        for block in network(rank=rank).blocks:
            assert block.down_RF.shape == (wanted, WIDTH)
            assert block.up_FR.shape == (WIDTH, wanted)


def test_the_seed_alone_decides_the_start():
    torch.manual_seed(1)
    first = network(seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(first, network(seed=3).state_dict())
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    other = network(seed=4).state_dict()
    for name in ("blocks.0.down_RF", "blocks.1.down_RF"):
        assert not torch.equal(first[name], other[name])
    assert not torch.equal(first["blocks.0.down_RF"], first["blocks.1.down_RF"])


def test_the_first_factor_starts_as_the_settings_say():
    wide = NetworkSettings(rank=200, blocks=1, start="xavier")
    down = EditorNetwork(300, 1, wide).blocks[0].down_RF
    bound = (6 / (200 + 300)) ** 0.5
    assert 0.99 * bound < down.abs().max() <= bound
    assert down.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    wide = NetworkSettings(rank=200, blocks=1, start="normal")
    down = EditorNetwork(300, 1, wide).blocks[0].down_RF
    assert down.std().item() == pytest.approx(1, rel=0.02)
    assert down.abs().max() > 3


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": -1}, {"blocks": -1}])
def test_settings_that_make_no_network_are_refused(wrong):
    with pytest.raises(EditorError, match=r"change --network\.(rank|blocks)\.$"):
        NetworkSettings(**wrong)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_random_start_is_no_identity_and_the_same_for_a_seed(placement):
    net = network(placement=placement, identity=False)
    assert (net(rows(), 0) - rows()).abs().max() > 1e-2
    assert torch.equal(net(rows(), 0), network(placement=placement, identity=False)(rows(), 0))
    first, other = net.blocks
    assert not torch.equal(first.up_FR, other.up_FR)
    # The first factor is that of the identity start, so that only the second one is compared.
    assert torch.equal(first.down_RF, network(placement=placement).blocks[0].down_RF)
