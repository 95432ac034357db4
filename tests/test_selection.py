"""Attention to chosen tiles: what is chosen, kernels against their twins, and that all tiles are the dense result."""

import heapq
import inspect
from dataclasses import replace

import pytest
import torch
from cubins import SHARED_LIMIT, Cubins, Variant, cases
from float8 import rounded_as_on_a_card
from guards import guarded
from test_attention import definition, inputs, interpreted, quantized, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyrun.kernels import selection
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.quantized_keys import PRECISIONS
from skyrun.kernels.selection import TiledKeys, tiles_at_once, tiles_for
from skyrun.kernels.tiles import HALVINGS, SMALL, USUAL, Selection, Tiles
from skyrun.kernels.torch import attention as torch_attention
from skyrun.kernels.torch import selection as torch_selection
from skyrun.kernels.triton import attention as triton_attention
from skyrun.kernels.triton import selection as triton_selection
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.planning.published import published_workload
from skyrun.presets.timing import selection_operations

CPU = torch.device("cpu")
MODULES = [torch_selection, pytest.param(triton_selection, marks=interpreted)]
QUICK = PRECISIONS[1:]


@pytest.fixture
def rounded():
    with rounded_as_on_a_card():
        yield


def field(shape, heads, smooth, seed, noise=0.1):
    """Values that change smoothly over time and space, as those of a video do, [tokens, heads * 128]."""
    g = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*(torch.arange(n).float() for n in shape), indexing="ij"), -1).view(-1, 3)
    waves = places @ (torch.randn(3, heads * 128, generator=g) / smooth)
    values = 2**0.5 * (waves + 6.28 * torch.rand(heads * 128, generator=g)).cos()
    return values + noise * torch.randn(values.shape, generator=g)


def video(shape=(9, 16, 24), heads=2, tiles=USUAL, sharp=1.5):
    """Queries, keys and values of smooth fields in tile order, and ranges that are always read."""
    order = tile_order([Frames(1, True), Frames(shape[0] - 1)], *shape[1:], tiles)
    base = field(shape, heads, 8, 0)
    q, k, v = sharp * base, field(shape, heads, 8, 0, 0.2), field(shape, heads, 12, 1)
    return [order.arranged(t) for t in (q, k, v)], order.always


def starts(count, tiles):
    return list(range(0, count, tiles.queries))


def chosen_of(module, q, k, shares, tiles=USUAL, always=()):
    pools = module.pool(q, tiles.queries, None), module.pool(k, tiles.keys, k.mean(0, dtype=torch.float32))
    flags = torch.zeros(tiles.count_keys(len(k)), dtype=torch.bool)
    flags[list(always)] = True
    first = torch.tensor(starts(len(q), tiles), dtype=torch.int32)
    return module.choose(*pools, torch.tensor(shares), first, flags, len(k), tiles)


def listed(chosen):
    """Sets of the chosen tiles by head and query tile."""
    heads, queries = chosen.counts.shape
    return [[set(chosen.lists[h, t, : chosen.counts[h, t]].tolist()) for t in range(queries)] for h in range(heads)]


def made_up(queries, keys, heads, tiles=USUAL):
    """Lists that are drawn at random, some of them empty."""
    g = torch.Generator().manual_seed(queries + keys)
    shape = heads, tiles.count_queries(queries), keys // tiles.keys
    chosen = torch.rand(shape, generator=g) < torch.rand((*shape[:2], 1), generator=g)
    lists = torch.where(chosen, torch.arange(shape[2]), shape[2]).sort(2).values.to(torch.int16)
    padded = torch.nn.functional.pad(lists, (0, 2))
    return Selection(padded, chosen.sum(2, dtype=torch.int32), keys, tiles)


def everything(queries, keys, heads, tiles=USUAL):
    shape = heads, tiles.count_queries(queries), keys // tiles.keys
    lists = torch.arange(shape[2], dtype=torch.int16).expand(shape)
    return Selection(
        torch.nn.functional.pad(lists, (0, 1)).contiguous(),
        torch.full(shape[:2], shape[2], dtype=torch.int32),
        keys,
        tiles,
    )


@pytest.mark.parametrize("name", ["pool", "choose"])
def test_twins_have_one_signature(name):
    assert inspect.signature(getattr(torch_selection, name)) == inspect.signature(getattr(triton_selection, name))


def test_attention_to_lists_has_one_signature():
    for name in ("attend", "attend_plain"):
        pair = (inspect.signature(getattr(module, name)) for module in (torch_attention, triton_attention))
        assert next(pair) == next(pair)


@pytest.mark.parametrize("module", MODULES)
def test_the_chosen_tiles_hold_the_share_and_no_tile_is_there_in_vain(module):
    (q, k, _), _ = video((5, 16, 12))
    pools = torch_selection.pool(q, 128, None), torch_selection.pool(k, 64, k.mean(0))
    values = [(p.codes.view(-1, 2, 128).transpose(0, 1).float() * p.scales.unsqueeze(2)) for p in pools]
    shared = (values[0] @ values[1].mT / 128**0.5).softmax(2)
    for share in (0.5, 0.9, 0.99):
        for head, rows in enumerate(listed(chosen_of(module, q, k, [share] * 2))):
            for tile, found in enumerate(rows):
                mass = shared[head, tile]
                assert mass[list(found)].sum() > share - 0.002
                optional = sorted(float(mass[n]) for n in found if n // 2 != tile)
                assert not optional or mass[list(found)].sum() - optional[0] < share + 0.004


@pytest.mark.parametrize("module", MODULES)
def test_what_is_always_read(module):
    """Oneself, what the caller names, tiles whose members disagree; and queries that disagree read all."""
    (q, k, _), _ = video((5, 16, 12))
    g = torch.Generator().manual_seed(3)
    k[64 * 7 : 64 * 8, :128] = 20 * torch.randn(64, 128, generator=g)  # of the first head
    q[128 * 5 : 128 * 6, 128:] = torch.randn(128, 128, generator=g)  # of the second
    found = listed(chosen_of(module, q, k, [0.0, 0.0], always=[1, 2]))
    whole = len(k) // 64
    for tile in range(len(found[0])):
        own = {2 * tile, 2 * tile + 1}
        assert found[0][tile] == ({1, 2, 7} | own) & set(range(whole))
        assert found[1][tile] == (({1, 2} | own) & set(range(whole)) if tile != 5 else set(range(whole)))
    found = listed(chosen_of(module, q, k, [1.0, 1.0]))
    assert all(tile == set(range(whole)) for head in found for tile in head)


@pytest.mark.parametrize("module", MODULES)
def test_random_queries_and_keys_are_all_read(module):
    q, k, _ = inputs(256, 640, 2, "random")
    assert (chosen_of(module, q, k, [0.1, 0.1]).counts == 10).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("module", MODULES)
def test_what_is_no_number_is_read(module):
    (q, k, _), _ = video((5, 16, 12))
    k[70, 5] = float("nan")
    q[300, 200] = float("nan")
    found = listed(chosen_of(module, q, k, [0.0, 0.0]))
    assert all(1 in tile for tile in found[0])
    assert found[1][2] == set(range(len(k) // 64))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (130, 200), (300, 1000)])
def test_pools_are_those_of_the_twin(queries, keys, dtype):
    for x, tile, mean in (
        (inputs(queries, keys, 2, "biased", dtype)[1], 64, True),
        (inputs(queries, keys, 2)[0], 128, False),
    ):
        average = x.mean(0, dtype=torch.float32) if mean else None
        expected = torch_selection.pool(x, tile, average)
        with guarded():
            ours = triton_selection.pool(x, tile, average)
        assert int((ours.codes.int() - expected.codes.int()).abs().max()) <= 1
        torch.testing.assert_close(ours.scales, expected.scales, rtol=1e-4, atol=1e-6)
        assert torch.equal(ours.alike, expected.alike)


@interpreted
@pytest.mark.parametrize("shape", [(5, 7, 11), (2, 3, 3)])
def test_the_kernel_chooses_what_its_twin_does(shape):
    (q, k, _), _ = video(shape)
    for share in (0.0, 0.6, 0.95, 1.0):
        expected = listed(chosen_of(torch_selection, q, k, [share, 0.9], always=[0]))
        with guarded():
            ours = listed(chosen_of(triton_selection, q, k, [share, 0.9], always=[0]))
        differing = sum(
            len(a ^ b) for one, two in zip(ours, expected, strict=True) for a, b in zip(one, two, strict=True)
        )
        assert differing <= 0.002 * sum(len(tile) for head in expected for tile in head)


@pytest.mark.parametrize("tiles", [USUAL, SMALL, Tiles(32, 16)])
def test_the_twin_reads_what_is_listed(tiles):
    q, k, v = inputs(130, 200, 2)
    chosen = made_up(130, 200, 2, tiles)
    result = torch_attention.attend_plain(q, k, v, chosen)
    for head, rows in enumerate(listed(chosen)):
        part = slice(128 * head, 128 * head + 128)
        for tile, found in enumerate(rows):
            some = slice(tile * tiles.queries, (tile + 1) * tiles.queries)
            numbers = [n * tiles.keys + m for n in sorted(found) for m in range(tiles.keys)]
            numbers += range(200 // tiles.keys * tiles.keys, 200)
            expected = definition(q[some, part], k[numbers, part], v[numbers, part], 1)
            assert relative(result[some, part], expected) < 1e-5


@interpreted
@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(("queries", "keys", "heads"), [(1, 64, 1), (130, 200, 2), (257, 513, 2)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_kernel_reads_what_is_listed(precision, queries, keys, heads):
    q, k, v = inputs(queries, keys, heads, "biased")
    chosen = made_up(queries, keys, heads)
    if keys % 64 == 0:  # a list without any key
        chosen = everything(queries, keys, heads)
    if precision == "exact":
        expected = torch_attention.attend_plain(q, k, v, chosen)
        with guarded():
            result = triton_attention.attend_plain(q, k, v, chosen)
    else:
        expected = torch_attention.attend(q, quantized(torch_attention, k, v, precision), chosen)
        with guarded():
            result = triton_attention.attend(q, quantized(triton_attention, k, v, precision), chosen)
    assert relative(result, expected.double()) < 3e-3


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("module", [torch_attention, pytest.param(triton_attention, marks=interpreted)])
@pytest.mark.parametrize("precision", QUICK)
def test_the_list_of_all_is_the_dense_result_bit_for_bit(module, precision):
    q, k, v = inputs(130, 200, 2)
    keys = quantized(module, k, v, precision)
    assert torch.equal(module.attend(q, keys, everything(130, 200, 2)), module.attend(q, keys))
    wide = module.attend(q.half(), keys, everything(130, 200, 2), torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.half(), module.attend(q.half(), keys))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_smooth_fields_half_is_skipped_at_one_percent(precision):
    (q, k, v), always = video()
    keys = TiledKeys(k.clone(), v.clone(), 2, precision, USUAL, always)
    first = starts(len(q), USUAL)
    keys.prepare()
    dense = keys.attend(q, first, torch.ones(2))
    assert dense.read.tolist() == [dense.all] * 2
    best = 1.0
    for share in (0.999, 0.998, 0.995, 0.99):
        sparse = keys.attend(q, first, torch.full((2,), share))
        if relative(sparse.out, dense.out.double()) < 0.01:
            best = float(sparse.read.sum()) / (2 * sparse.all)
    assert best < 0.5


def test_lists_are_made_for_a_few_tiles_at_a_time_without_any_difference(monkeypatch):
    (q, k, v), always = video()
    keys = TiledKeys(k, v, 2, "int8", USUAL, always)
    keys.prepare()
    whole = keys.attend(q, starts(len(q), USUAL), torch.full((2,), 0.9))
    monkeypatch.setattr(selection, "tiles_at_once", lambda *_: 3)
    parts = keys.attend(q, starts(len(q), USUAL), torch.full((2,), 0.9))
    assert torch.equal(whole.out, parts.out) and torch.equal(whole.read, parts.read)


def test_tiles_suit_the_device_and_the_length(monkeypatch):
    assert tiles_for(81, CPU) == SMALL and tiles_for(75600, CPU) == USUAL
    monkeypatch.setattr(selection, "uses_triton", lambda device: True)
    assert tiles_for(81, CPU) == USUAL
    assert (USUAL.queries, USUAL.keys) == (triton_attention.QUERIES, triton_attention.KEYS)


@pytest.mark.parametrize("tokens", [32760, 75600, 126000])
def test_lists_and_pools_take_a_hundredth_of_keys_and_values(tokens):
    heads, width = 40, 40 * 128
    count, at_once = USUAL.count_keys(tokens), tiles_at_once(tokens, 40, USUAL)
    pools = count * (width + 5 * heads) + at_once * (width + 5 * heads)
    lists = heads * at_once * (2 * (count + 17) + 4)
    assert pools + lists <= 0.01 * 2 * 2 * tokens * width


def test_a_dense_call_knows_nothing_of_lists():
    q, k, v = inputs(70, 90, 2)
    assert torch.equal(attend(q, Keys(k, v, 2)), attend(q, Keys(k.clone(), v.clone(), 2), None))


class Counter(TorchDispatchMode):
    """Counts operations: two for each product of a matmul, one for each value that anything else makes."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                inner = args[0].shape[-1] if "mm" in function.__name__ else 0
                self.operations += tensor.numel() * (2 * inner or 1)
        return result


def test_choosing_takes_next_to_nothing_of_the_operations_of_dense_attention():
    tokens, heads = 126000, 40
    x = torch.empty(tokens, heads * 128, dtype=torch.bfloat16, device="meta")
    with Counter() as counted:
        pools = torch_selection.pool(x, 128, None), torch_selection.pool(x, 64, x.mean(0, dtype=torch.float32))
        first, flags = torch.empty(985, dtype=torch.int32, device="meta"), torch.empty(1969, device="meta").bool()
        torch_selection.choose(*pools, torch.empty(heads, device="meta"), first, flags, tokens, USUAL)
    dense = 4 * tokens**2 * heads * 128
    assert counted.operations < 0.0002 * dense  # 0.03 would do
    work = replace(published_workload("r2v"), latent_frames=1, height=16, width=16 * tokens)
    assert counted.operations / 3 < selection_operations(work) < 3 * counted.operations


def test_heads_with_much_to_do_come_first_so_that_none_is_waited_for():
    """Launched in order on 128 multiprocessors, unequal heads end at about the same time."""
    g = torch.Generator().manual_seed(0)
    shares = torch.rand(40, generator=g) ** 3
    counts = (1968 * shares.view(-1, 1) * (0.5 + torch.rand(40, 97, generator=g)).clamp_max(1)).int()
    chosen = Selection(torch.empty(40, 97, 1984, dtype=torch.int16), counts, 126000, USUAL)

    def end(turns):
        free = [0] * 128
        for head in turns:
            for work in counts[head].tolist():
                heapq.heapreplace(free, free[0] + work)
        return max(free)

    turns = triton_attention._listed(chosen)[2].tolist()
    assert sorted(turns) == list(range(40))
    ideal = int(counts.sum()) / 128
    assert end(turns) < 1.02 * ideal < end(turns[::-1])


MODULE = "skyrun.kernels.triton.selection"
POOL = {"x": "*bf16", "codes": "*i8", "scales": "*fp32", "alike": "*i8", "count": "i32", "least": "fp32"}
SCORE = {"q": "*i8", "q_scales": "*fp32", "k": "*i8", "k_scales": "*fp32", "scores": "*fp16", "factor": "fp32"}
LIST = {"scores": "*fp16", "lists": "*i16", "counts": "*i32", "starts": "*i32", "shares": "*fp32"}
LIST |= dict.fromkeys(("q_alike", "k_alike", "always"), "*i8")
COUNTS = dict.fromkeys(("T", "K", "stride"), "i32")
RAGGED = ("count", "T", "K", "whole")
VARIANTS = [
    Variant("pool keys", f"{MODULE}:pool_kernel", POOL | {"mean": "*fp32"}, {"HEADS": 40, "ROWS": 64}, 4),
    Variant("pool queries", f"{MODULE}:pool_kernel", POOL, {"HEADS": 40, "ROWS": 128, "mean": None}, 4),
    Variant(
        "score",
        f"{MODULE}:score_kernel",
        SCORE | COUNTS,
        {"HEADS": 40, "SIDE": triton_selection.SIDE, "LARGEST": torch_selection.LARGEST},
        triton_selection.SCORE_WARPS,
    ),
    Variant(
        "list",
        f"{MODULE}:list_kernel",
        LIST | COUNTS | dict.fromkeys(("whole", "queries", "keys"), "i32"),
        {"HALVINGS": HALVINGS, "WIDTH": 2048},
        triton_selection.LIST_WARPS,
    ),
]
VARIANTS = [replace(one, unaligned=tuple(name for name in RAGGED if name in one.signature)) for one in VARIANTS]


@pytest.fixture(scope="module")
def cubins():
    return Cubins(VARIANTS)


@pytest.mark.parametrize(("name", "arch"), cases(VARIANTS))
def test_cubin(cubins, name, arch):
    cubin = cubins[name, arch]
    assert cubin.stack == 0 and cubin.shared <= SHARED_LIMIT[arch]
    if name == "score":
        assert cubin.count({90: "IGMMA", 100: "UTCIMMA"}.get(arch, "IMMA"))
