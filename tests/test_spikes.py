"""Formats with two kept values: what stands on the wire, and activations with outliers."""

import pytest
import torch
import torch.distributed as dist

import commq
from commq.codecs.formats import SPIKE_FORMATS
from commq.codecs.wire import pack_planes, planes, unpack_planes
from harness import rank_generator, thread_ranks


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes(bits):
    """Each width is a sum of powers of two, and every code comes back; of 5 bits the bytes are written out."""
    assert sum(planes(bits)) == bits and all(width in (1, 2, 4, 8) for width in planes(bits))
    codes_GB = torch.arange(4 * 256).view(4, 256).to(torch.int32) - 100
    packed = pack_planes(codes_GB, bits)
    assert packed.shape == (4, 32 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack_planes(packed, bits), (codes_GB & (1 << bits) - 1).to(torch.uint8))
    codes = torch.tensor([[1, -1, 15, -15, 0, 0, 0, 0, *[0] * 8]], dtype=torch.int32)
    assert pack_planes(codes, 5)[0].tolist() == [0xF1, 0x1F, *[0] * 6, 0b1010, 0]


def test_the_record_of_a_block():
    """Scale, larger value, other value, their places; the first of equal magnitudes is the larger one."""
    x = torch.zeros(16)
    x[3], x[9], x[12], x[14] = 2.0, -256.0, 256.0, -0.5
    x[3] = 1.0
    found = commq.encode(x, commq.get_format("spike4", block=16, scale="bf16x3"))
    assert found.wire[16:24].tolist() == [0x80, 0x3F, 0x80, 0xC3, 0x80, 0x43, 9, 12]
    codes = found.wire[:8].tolist()
    assert codes == [0, 7 << 4, 0, 0, 0, 0, 0, 0xC]  # -0.5 * 7 is rounded to the even -4
    wide = commq.encode(x, commq.get_format("spike4", block=16, scale="fp32x3"))
    assert wide.wire[16:28].view(torch.float32).tolist() == [1.0, -256.0, 256.0]
    assert wide.wire[28:32].tolist() == [9, 12, 0, 0]
    assert commq.decode(found)[:12].tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, -256, 0, 0]


def test_a_block_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="block=512 for format 'spike5': expected at most 256"):
        commq.get_format("spike5", block=512)
    assert [fmt.bits_per_element for fmt in SPIKE_FORMATS.values()] == [bits + 0.5 for bits in range(2, 9)]


OUTLIERS = [7, 77, 300, 411]


def activations(tokens=64, width=512, generator=None):
    """bfloat16: channels of a few magnitudes, and four some 100 times larger for every token, as real models have."""
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(-0.5, 0.5, width)
    x[:, OUTLIERS] = 100.0 * (1.0 + x[:, OUTLIERS].abs()) * x[:, OUTLIERS].sign()
    return x.to(torch.bfloat16)


@pytest.mark.parametrize("bits", range(2, 9))
def test_planted_outlier_channels_survive_and_do_not_hurt_their_block(bits):
    """At most two in a block of 128: both are exact, and the others err as in a block without them."""
    x = activations()
    fmt = commq.get_format(f"spike{bits}")
    y = commq.decode(commq.encode(x, fmt))
    outliers = torch.zeros(512, dtype=torch.bool).index_fill(0, torch.tensor(OUTLIERS), True)
    assert torch.equal(y[:, outliers], x[:, outliers].float())
    calm = x.masked_fill(outliers, 0.0)
    step = calm.float().view(64, 4, 128).abs().amax(-1) * (1 + 2.0**-7) / fmt.max_code
    assert bool(((y - x.float()).view(64, 4, 128).abs().amax(-1) <= step * 0.5001).all())


def test_five_bits_with_kept_values_beat_eight_without():
    """On values that are not outliers: plain int8 loses more than ten times the energy, plain int4 nearly all."""
    x = activations()
    calm = x.float().abs() < 20.0

    def lost(name):
        return float(
            (commq.decode(commq.encode(x, name)) - x.float())[calm].square().sum() / x.float()[calm].square().sum()
        )

    assert lost("spike5") < lost("int8") / 10
    assert lost("int4") > 0.5


@thread_ranks(2, 3, 4)
def test_outlier_channels_survive_an_all_reduce():
    """Sums of whole numbers that bfloat16 holds: the outliers of all ranks are in the same channels."""
    x = activations(tokens=12, generator=rank_generator(1))
    x[:, 7] = float(1 << 10)
    total = x.clone()
    commq.all_reduce(total, format="spike5", schedule="two_shot")
    assert bool((total[:, 7] == dist.get_world_size() << 10).all())
    ones = torch.ones(1003)
    for name in SPIKE_FORMATS:
        commq.all_reduce(ones, dist.ReduceOp.AVG, format=name, schedule="two_shot")
        assert bool((ones == 1.0).all()), name
