"""AdamW with encoded moments: error of the formats, bytes, the step against torch's, meshes, state dicts, controls."""

import io
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from commq.optim import AdamW4bit, AdamW8bit, AdamWFp8
from commq.optim.grid import grid_of, has_codes
from commq.optim.moment_format import (
    FIRST_4,
    FIRST_8,
    FIRST_FP8,
    ROOT_4,
    ROOT_4_ZERO,
    ROOT_8,
    ROOT_FP8,
    decode,
    encode,
)
from harness import thread_ranks

FORMATS = [FIRST_8, ROOT_8, FIRST_4, ROOT_4, FIRST_FP8, ROOT_FP8]
KINDS = {"8bit": AdamW8bit, "4bit": AdamW4bit, "fp8": AdamWFp8}
WHOLE_STATE = {"8bit": 0.27, "4bit": 0.15, "fp8": 0.27}


def blocks_of(fmt):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(6, fmt.block, generator=generator)
    normal[1] *= 1e30
    normal[2] *= 1e-40  # subnormal
    normal[3, 5] = 1e6
    normal[4] = -1.0 if fmt.signed else 1.0
    normal[5] = 0.0
    return normal if fmt.signed else normal.abs()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_error_is_half_a_gap(fmt):
    x_GB = blocks_of(fmt)
    codes_GP, scales_G = encode(x_GB, fmt)
    assert codes_GP.dtype == torch.uint8 and codes_GP.shape == (6, fmt.code_bytes(fmt.block))
    y_GB = decode(codes_GP, scales_G, fmt)
    amax_G = x_GB.abs().amax(dim=-1)
    assert torch.equal(scales_G, amax_G) and torch.equal(y_GB.abs().amax(dim=-1), amax_G)
    assert not y_GB[5].any()
    levels = torch.tensor(fmt.levels[fmt.lowest :], dtype=torch.float64)
    for x, y, s in zip(x_GB[:5].double(), y_GB[:5].double(), amax_G[:5].double(), strict=True):
        above = torch.searchsorted(levels, x.abs() / s).clamp(max=len(levels) - 1)
        half_gap = torch.where(above > 0, (levels[above] - levels[(above - 1).clamp(min=0)]) / 2, levels[0])
        unit = 2.0**-149  # what a subnormal result is rounded to
        assert ((x - y).abs() <= half_gap * s * (1 + 1e-6) + unit).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_block_that_is_not_finite_is_nan_and_no_other_is(fmt):
    x_GB = blocks_of(fmt)
    x_GB[0, 3], x_GB[4, 0] = float("nan"), float("inf")
    y_GB = decode(*encode(x_GB, fmt), fmt)
    assert y_GB[[0, 4]].isnan().all() and y_GB[[1, 2, 3, 5]].isfinite().all()
    arbitrary = torch.randint(256, (4, fmt.code_bytes(fmt.block)), dtype=torch.uint8)
    assert decode(arbitrary, torch.ones(4), fmt).abs().max() <= 1.0


def test_no_second_moment_is_zero_but_the_controls():
    x_GB = torch.full((1, 256), 1e-12)
    x_GB[0, 7] = 1.0
    for fmt in (ROOT_8, ROOT_4, ROOT_FP8, ROOT_4_ZERO):
        y_GB = decode(*encode(x_GB.view(-1, fmt.block), fmt), fmt)
        assert (y_GB[0, 8:] > 0).all() == (fmt is not ROOT_4_ZERO)


def test_codes_of_fp8_are_the_bits_of_e4m3():
    x_GB = blocks_of(FIRST_FP8)[:1]
    x_GB /= x_GB.abs().max()  # a power-of-two scale is not needed: 1 decodes as 448 / 448
    expected = (x_GB * 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    codes_GP, _ = encode(x_GB, FIRST_FP8)
    same = (codes_GP == expected) | (x_GB == 0)
    assert same.float().mean() > 0.999  # ties go up here and to even there
    assert torch.equal(codes_GP[same], expected[same])


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, 200), torch.nn.Linear(200, 333), torch.nn.LayerNorm(333), torch.nn.Linear(333, 5)]
    return torch.nn.Sequential(*layers).to(dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_state_has_the_bytes_that_it_says(kind):
    model = torch.nn.Sequential(*(torch.nn.Linear(384, 1536) for _ in range(2)), torch.nn.LayerNorm(1536))

    def nbytes(optimizer):
        train(model, optimizer, 1)
        tensors = [t for s in optimizer.state.values() for name, t in s.items() if name != "step"]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    ratio = nbytes(KINDS[kind](model.parameters())) / nbytes(torch.optim.AdamW(model.parameters()))
    assert ratio <= WHOLE_STATE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_and_parameters_without_codes_are_those_of_adamw(kind):
    """Moments that are zero are encoded exactly; 5 rows of 333 are too few for codes."""
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}
    ours, theirs = model_of(), model_of()
    mine, torchs = KINDS[kind](ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for steps in (1, 4):
        train(ours, mine, steps), train(theirs, torchs, steps)
        for name, p in ours.named_parameters():
            expected = theirs.get_parameter(name)
            if steps == 1 or not has_codes(p):
                assert ((p - expected).abs() <= 2.0**-20 * (expected.abs() + 0.1)).all(), name
    assert [name for name, p in ours.named_parameters() if has_codes(p)] == ["0.weight", "1.weight"]


def test_one_step_is_what_the_formulas_say():
    """From moments as they are stored, in float64."""
    model = torch.nn.Linear(130, 70, bias=False)
    optimizer = AdamW4bit(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    train(model, optimizer, 3)
    state = optimizer.state[model.weight]

    def stored(part, fmt):
        codes = torch.nn.functional.pad(state[f"{part}_codes"], (0, 128 - 65)).view(-1, 64)
        return decode(codes, state[f"{part}_scales"].view(-1), fmt).view(70, 256)[:, :130].double()

    m, r, x = stored("first", FIRST_4), stored("root", ROOT_4), model.weight.detach().double()
    train(model, optimizer, 1, first=3)
    g = model.weight.grad.double()
    m, v = 0.9 * m + 0.1 * g, 0.95 * r**2 + 0.05 * g**2
    direction = (m / (1 - 0.9**4)) / ((v / (1 - 0.95**4)).sqrt() + 1e-8)
    assert (
        (x * (1 - 0.001) - 0.01 * direction - model.weight).abs() <= 2.0**-20 * (x.abs() + 0.01 * direction.abs())
    ).all()
    half_gap = 0.5 * (1 - 0.6625)
    assert ((m - stored("first", FIRST_4)).abs().amax(dim=-1) <= half_gap * m.abs().amax(dim=-1) * (1 + 1e-6)).all()


def test_a_zero_point_takes_steps_that_are_too_large():
    """Gradients of one row differ by 1000: Adam's steps are all about lr, and the control's are not."""

    def longest_step(**options):
        weight = torch.nn.Parameter(torch.zeros(32, 128))
        optimizer = AdamW4bit([weight], lr=1.0, betas=(0.9, 0.999), weight_decay=0.0, **options)
        generator = torch.Generator().manual_seed(0)
        size = torch.logspace(0, -3, 128)
        found = 0.0
        for _ in range(20):
            before = weight.detach().clone()
            weight.grad = size * torch.randn(32, 128, generator=generator)
            optimizer.step()
            found = max(found, float((weight.detach() - before).abs().max()))
        return found

    assert longest_step() < 10.0 < 1000.0 < longest_step(root=ROOT_4_ZERO)


def test_update_clipping_divides_by_the_rms_of_the_scaled_gradient():
    """A second moment that is behind makes one step of AdamW far too large."""
    steps = {}
    for clips in (False, True):
        model = model_of()
        optimizer = AdamW8bit(model.parameters(), lr=1.0, weight_decay=0.0, update_clipping=clips)
        for scale in (1e-3, 1e-3, 1.0):
            before = [p.detach().clone() for p in model.parameters()]
            for number, p in enumerate(model.parameters()):
                p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        steps[clips] = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    for p, free, clipped in zip(model.parameters(), steps[False], steps[True], strict=True):
        v = (2 * 1e-6 * 0.999 * 0.001 * p.grad.double() ** 2 + 0.001 * p.grad.double() ** 2) / (1 - 0.999**3)
        rms = float((p.grad.double() ** 2 / v).mean().sqrt())
        assert rms > 1.5
        ratio = float(free.norm() / clipped.norm())
        assert abs(ratio - rms) < 0.01 * rms  # the older gradients' share of v, which codes round, is below 1e-5


def test_bfloat16_weights_move_by_steps_below_half_a_unit():
    weight = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    vector = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = AdamW8bit([weight, vector], lr=1e-4, weight_decay=0.0, stochastic_rounding=True, seed=3)
    for _ in range(50):
        for p in (weight, vector):
            p.grad = torch.ones_like(p)
        optimizer.step()
    # Each step is 1e-4 of a gap of 2**-8 below 1: 0.0256 on average with deviation sqrt(p (1 - p)), 50 times.
    share, count = 1e-4 * 2**8, weight.numel()
    moved = (1.0 - weight.float()).mean() * 2**8 / 50
    deviation = (share * (1 - share) / (50 * count)) ** 0.5
    assert abs(moved - share) < 4 * deviation
    assert (vector < 1.0).any() and vector.isfinite().all()
    plain = torch.nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    optimizer = AdamW8bit([plain], lr=1e-4, weight_decay=0.0)
    plain.grad = torch.ones_like(plain)
    optimizer.step()
    assert (plain == 1.0).all()


SHAPES = [(64, 96), (7, 700), (50, 2, 9, 6), (4100,), (3, 40), (96, 512)]


def sharded_run(placements_of, kind, steps=3):
    """Parameters and whole states, by shape, of a run whose parameters have the placements."""
    found = {}
    for number, shape in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        whole = torch.randn(shape, generator=generator).to(torch.bfloat16 if number % 2 else torch.float32)
        placements = placements_of(shape)

        def place(tensor, placements=placements):
            if placements is None:
                return tensor.clone()
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            return distribute_tensor(tensor, mesh, placements)

        p = torch.nn.Parameter(place(whole))
        optimizer = KINDS[kind]([p], lr=0.1, stochastic_rounding=True, seed=5)
        for _ in range(steps):
            p.grad = place(torch.randn(shape, generator=generator).to(whole.dtype))
            optimizer.step()
        tensors = {"parameter": p.detach(), **optimizer.state[p]}
        found[shape] = {name: t.full_tensor() if isinstance(t, DTensor) else t.clone() for name, t in tensors.items()}
    return found


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
@thread_ranks(2, 3)
def test_state_is_the_same_on_every_mesh(kind):
    alone = sharded_run(lambda shape: None, kind)
    assert len(alone[(7, 700)]) == 6 and len(alone[(4100,)]) == 4
    placements = [lambda shape: [Shard(0)], lambda shape: [Replicate()]]
    if dist.get_world_size() == 2:
        placements.append(lambda shape: [Shard(1) if shape == (96, 512) else Shard(0)])
    for placements_of in placements:
        for shape, tensors in sharded_run(placements_of, kind).items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, alone[shape][name]), (shape, name)


@thread_ranks(3)
def test_a_mesh_that_cuts_blocks_is_refused_and_clipping_sums_over_shards():
    mesh = init_device_mesh("cpu", (3,))
    columns = distribute_tensor(torch.ones(96, 96), mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"found 32 elements of a row.*multiple of the block of 256"):
        AdamW8bit([torch.nn.Parameter(columns)])
    whole = torch.randn(70, 96, generator=torch.Generator().manual_seed(0))
    results = []
    for tensor in (whole, distribute_tensor(whole, mesh, [Shard(0)])):
        p = torch.nn.Parameter(tensor.clone())
        optimizer = AdamW8bit([p], lr=0.1, update_clipping=True)
        for scale in (1e-3, 1.0):
            p.grad = (tensor * scale).detach()
            optimizer.step()
        results.append(p.detach().full_tensor() if isinstance(p, DTensor) else p.detach())
    # The clipping's sum is added up in another order: 70 * 96 additions of float32.
    assert (results[0] - results[1]).abs().max() <= 0.1 * 70 * 96 * 2.0**-24


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_restores_every_bit(kind):
    runs = []
    for interrupted in (False, True):
        model = model_of(torch.bfloat16)
        groups = [{"params": [p], "lr": 0.01 * (n + 1)} for n, p in enumerate(model.parameters())]
        optimizer = KINDS[kind](groups, stochastic_rounding=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        train(model, optimizer, 3)
        scheduler.step()
        if interrupted:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            saved.seek(0)
            optimizer = KINDS[kind](groups, stochastic_rounding=True)
            optimizer.load_state_dict(torch.load(saved, weights_only=True))
        train(model, optimizer, 3, first=3)
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_state_of_another_format_is_refused():
    model = model_of()
    eight = AdamW8bit(model.parameters())
    train(model, eight, 1)
    with pytest.raises(ValueError, match=r"first_codes is torch.uint8 \(200, 96\), expected torch.uint8 \(200, 48\)"):
        AdamW4bit(model.parameters()).load_state_dict(eight.state_dict())
    other = torch.optim.AdamW(model.parameters())
    train(model, other, 1)
    with pytest.raises(ValueError, match="first_codes is missing"):
        AdamW8bit(model.parameters()).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="expected the same bits and block in both"):
        AdamW8bit(model.parameters(), root=ROOT_4)
    with pytest.raises(ValueError, match="ascending"):
        replace(ROOT_4, levels=(0.5, 0.5, 1.0))


def test_grids():
    assert (grid_of(torch.empty(64, 3, 7, 7)).leading, grid_of(torch.empty(64, 3, 7, 7)).width) == (1, 147)
    assert (grid_of(torch.empty(8, 96, 128)).leading, grid_of(torch.empty(8, 96, 128)).rows) == (2, 768)
    assert not has_codes(torch.empty(1 << 20)) and not has_codes(torch.empty(1 << 17, 8))
    assert grid_of(torch.empty(2, 3, 64)).row_numbers(torch.device("cpu")).tolist() == [0, 1, 2, 3, 4, 5]
