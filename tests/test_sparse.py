"""Attention that skips tiles in a whole run: it learns, keeps to its bound, resumes, and is dense where it must be."""

import json
from dataclasses import replace

import pytest
import torch
from small_run import followed, of_kind, small_request, stopped
from test_selection import field, video

from skyrun.cli import main
from skyrun.engine.resume import continue_or_start
from skyrun.engine.run import run_job
from skyrun.errors import SkyrunError
from skyrun.events import Attended
from skyrun.kernels.attention import Keys, attend
from skyrun.kernels.tiles import SMALL, USUAL
from skyrun.media.video_writer import read_measured, read_request
from skyrun.models.dit.sparse import SHARES, Learned, SelfCheck
from skyrun.models.dit.tile_order import Frames, tile_order
from skyrun.planning.densities import remember_density, with_density
from skyrun.planning.job import prepare
from skyrun.planning.request import Request
from skyrun.planning.what_if import plan_request
from skyrun.presets.attention import Attention, parse_attention
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import stated


def made(request):
    job, state = continue_or_start(request)
    return followed(run_job(job, state=state))


@pytest.fixture
def model(converted):
    return converted("F32")


def looked(bound, q, k, v, order, learned=None, precision="int8", rows=None):
    """A block's attention after it has looked at a sample: the check, the prepared keys and its output."""
    check = SelfCheck(bound, order, (1, 1, 2), learned or Learned())
    block = check.block(0, 0)
    keys = block.keys(k.clone(), v.clone(), 2, precision)
    if isinstance(keys, Keys):  # nothing is skipped
        return check, keys, attend(q, keys)
    block.look(keys, lambda part: q[part], [slice(0, len(q))])
    parts = [slice(n, min(n + (rows or len(q)), len(q))) for n in range(0, len(q), rows or len(q))]
    return check, keys, torch.cat([block.attend(q[part], keys, part) for part in parts])


def errors(out, q, keys):
    dense = attend(q, getattr(keys, "keys", keys)).unflatten(1, (2, -1))
    return ((out.unflatten(1, (2, -1)) - dense).square().sum((0, 2)) / dense.square().sum((0, 2))).sqrt()


@pytest.fixture(scope="module")
def clip():
    """A smooth field of 3,456 tokens: queries, keys and values in tile order, and the order."""
    (q, k, v), _ = video((9, 16, 24), tiles=USUAL)
    return q, k, v, tile_order([Frames(1, True), Frames(8)], 16, 24, USUAL)


@pytest.mark.parametrize("bound", [0.003, 0.01, 0.03])
def test_the_first_step_is_dense_and_later_ones_keep_to_the_bound(clip, bound):
    q, k, v, order = clip
    check, keys, out = looked(bound, q, k, v, order)
    assert check.learns and not errors(out, q, keys).any()
    learned, (event,) = check.finish_step()
    assert event.density == 1 and event.dense_heads == event.heads == 2
    for _ in range(2):
        check, keys, out = looked(bound, q, k, v, order, learned)
        assert errors(out, q, keys).max() <= bound
        learned, (event,) = check.finish_step()
        assert event.density < 1 and event.error <= bound
    assert event.density < 0.5 or bound < 0.01
    summary = learned.summary()
    assert summary.error <= bound and summary.density == pytest.approx(event.density, abs=0.1)


def test_random_queries_and_keys_stay_dense():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3456, 256, generator=g) for _ in range(3))
    order = tile_order([Frames(1, True), Frames(8)], 16, 24, USUAL)
    learned = looked(0.01, q, k, v, order)[0].finish_step()[0]
    check, keys, out = looked(0.01, q, k, v, order, learned)
    assert isinstance(keys, Keys)  # it costs nothing any more
    assert not errors(out, q, keys).any()
    assert check.finish_step()[1][0].density == 1


def test_a_head_that_becomes_worse_keeps_more_at_once(clip):
    """Values that agreed where they were skipped, and no longer do."""
    q, k, v, order = clip
    flat = 0.01 * v + 1
    learned = looked(0.01, q, k, flat, order)[0].finish_step()[0]
    assert (learned.levels > 0).all()
    check, keys, out = looked(0.01, q, k, v, order, learned)
    assert errors(out, q, keys).max() <= 0.01
    assert (check.levels < learned.levels).all()
    again = looked(0.01, q, k, flat, order, check.finish_step()[0])[0]
    assert (again.levels <= check.levels).all()  # what was tightened stays so


@pytest.mark.parametrize("rows", [128, 1024])
def test_what_is_skipped_does_not_depend_on_how_many_tokens_pass_at_a_time(clip, rows):
    q, k, v, order = clip
    learned = looked(0.01, q, k, v, order)[0].finish_step()[0]
    whole, parts = looked(0.01, q, k, v, order, learned), looked(0.01, q, k, v, order, learned, rows=rows)
    assert torch.equal(whole[0].levels, parts[0].levels)
    torch.testing.assert_close(whole[2], parts[2])
    assert whole[0].finish_step()[1][0].densities == parts[0].finish_step()[1][0].densities
    assert whole[0].whole_tiles(700) == 768 and whole[0].whole_tiles(None) is None


def test_shares_fall():
    assert SHARES[0] == 1 and list(SHARES) == sorted(SHARES, reverse=True)


def test_with_a_bound_of_zero_it_is_the_dense_result(tmp_path, model):
    for precision in ("exact", "int8", "full-int8", "fp8"):
        clips = [
            made(small_request(tmp_path, model, attention=attention, output=None))[0].latents
            for attention in (precision, f"{precision},sparse:0")
        ]
        assert torch.equal(*clips)


@pytest.mark.parametrize("attention", ["exact,sparse:20", "int8,sparse:20"])
def test_a_resumed_run_makes_the_same_clip_and_says_the_same_of_it(tmp_path, model, attention):
    whole, events = made(small_request(tmp_path, model, attention=attention, size=(64, 64)))
    seen = of_kind(events, Attended)
    assert len(seen) == 4 and seen[0].density == 1 and min(one.density for one in seen[1:]) < 1
    assert all(one.error <= 0.2 for one in seen)
    assert whole.skipped.density == pytest.approx(sum(one.density for one in seen[1:]) / 3)
    request = replace(small_request(tmp_path, model, attention=attention, size=(64, 64)), output=tmp_path / "again.mp4")
    stopped(prepare(request), "denoise", 2)
    job, state = continue_or_start(request)
    assert state.steps == 2
    again, later = followed(run_job(job, state=state))
    assert torch.equal(whole.latents, again.latents)
    assert of_kind(later, Attended) == seen[2:]
    assert again.skipped == whole.skipped
    measured = read_measured(tmp_path / "again.mp4")
    assert measured == pytest.approx(read_measured(tmp_path / "out" / "clip.mp4"))
    assert measured == pytest.approx(vars(whole.skipped), abs=1e-5)
    assert read_request(tmp_path / "again.mp4")["attention"] == attention


def test_a_dense_clip_says_nothing_of_it(tmp_path, model):
    result, events = made(small_request(tmp_path, model, attention="int8"))
    assert not of_kind(events, Attended) and result.skipped is None
    assert read_measured(tmp_path / "out" / "clip.mp4") == {}


def test_what_a_run_reads_is_said_and_remembered_for_plans(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path / "cache"))
    request = small_request(tmp_path, model, size=(64, 64))
    images = ["--image", str(request.images[0]), "--size", "64x64", "--frames", "5", "--steps", "4", "--seed", "3"]
    command = ["r2v", "-p", "a sea", *images, "--model", str(model), "--device", "cpu", "--attention", "sparse:20"]
    assert main(["run", *command, "-o", str(tmp_path / "clip.mp4"), "--json"]) == 0
    out, err = capsys.readouterr()
    said = [json.loads(line) for line in out.splitlines()]
    assert sum(line["event"] == "attended" for line in said) == 4
    density = said[-1]["attention"]["density"]
    assert main(["info", str(tmp_path / "clip.mp4")]) == 0
    assert f"density: {density:.4f}" in capsys.readouterr().out
    assert density < 1 and f"attention read {density:.0%} of its tiles after the first step" in err
    plan = [*("plan", "r2v", "--model", str(model), "--size", "64x64", "--frames", "5", "--steps", "4")]
    assert main([*plan, "--attention", "sparse:20"]) == 0
    assert f"sparse:20%, reading {density:.0%} of its tiles (measured)" in capsys.readouterr().out
    assert main([*plan, "--attention", "sparse:10"]) == 0
    assert "sparse:10%, reading 50% of its tiles (assumed)" in capsys.readouterr().out


def test_a_damaged_memory_of_densities_counts_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    work = plan_request(Request("r2v", ""), stated(find_card("RTX 4090"), 64, 2.0)).workload
    remember_density(work, 0.01, 0.3)
    assert with_density(work, None).density == with_density(work, "int8,sparse").density == 0.3
    assert with_density(replace(work, steps=9), None).density == 0
    path = tmp_path / "densities.json"
    path.write_text(path.read_text().replace("0.3", "3.0"))
    assert with_density(work, None).density == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", Attention("int8")),
        ("sparse", Attention(None, 0.01)),
        ("Exact,Sparse", Attention("exact", 0.01)),
        ("full-int8,sparse:0.3%", Attention("full-int8", 0.003)),
        ("fp8, sparse:3", Attention("fp8", 0.03)),
        ("sparse:0", Attention(None, 0.0)),
    ],
)
def test_what_is_asked_for_is_understood(text, expected):
    assert parse_attention(text) == expected
    assert parse_attention(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["", "int4", "int8,", "sparse,int8", "sparse:", "sparse:-1", "sparse:51", "int8 sparse"]
)
def test_what_is_not_understood_is_refused_with_what_was_expected(text, tmp_path, model):
    with pytest.raises(ValueError, match="attention"):
        parse_attention(text)
    with pytest.raises(SkyrunError, match="attention .*expected"):
        prepare(small_request(tmp_path, model, attention=text or " "))


PLANS = [
    ("RTX 4090", {}, True),
    ("RTX 3060", {}, True),
    ("RTX 4090", {"precision": "exact"}, False),
    ("RTX 4090", {"prefer": "quality"}, False),
    ("RTX 4090", {"prefer": "memory"}, False),
    ("RTX 4090", {"attention": "int8"}, False),
    ("RTX 2080 Ti", {}, False),
]


@pytest.mark.parametrize(("card", "asked", "sparse"), PLANS)
def test_plans_skip_by_themselves_only_where_it_gains_and_nothing_speaks_against_it(card, asked, sparse):
    plan = plan_request(Request("r2v", "", resolution="720P", **asked), stated(find_card(card), 64, 2.0)).plan
    assert (plan.sparse is not None) == sparse
    dense, skipping = plan.beside
    assert (dense.density, skipping.density) == (1, 0.5)
    if sparse:
        assert plan.seconds == skipping.seconds <= 0.85 * dense.seconds


def test_a_gain_of_less_than_a_seventh_is_not_worth_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYRUN_CACHE", str(tmp_path))
    request, card = Request("r2v", "", resolution="720P"), stated(find_card("RTX 4090"), 64, 2.0)
    work = plan_request(request, card).workload
    for density, sparse in ((0.3, True), (0.95, False)):
        remember_density(work, 0.01, density)
        plan = plan_request(request, card).plan
        assert (plan.sparse is not None) == sparse and plan.beside[1].density_measured
        assert plan_request(replace(request, attention="sparse"), card).plan.sparse == 0.01


def test_cards_without_kernels_refuse_it():
    with pytest.raises(SkyrunError, match="sparse needs a card of the RTX 3000 series"):
        plan_request(Request("r2v", "", attention="sparse"), stated(find_card("RTX 2080 Ti"), 64, 2.0))


def test_small_tiles_serve_small_clips():
    q, k, v = field((5, 6, 6), 2, 4, 0), field((5, 6, 6), 2, 4, 0), field((5, 6, 6), 2, 6, 1)
    order = tile_order([Frames(1, True), Frames(4)], 6, 6, SMALL)
    q, k, v = (order.arranged(t) for t in (2 * q, k, v))
    learned = looked(0.03, q, k, v, order)[0].finish_step()[0]
    check, keys, out = looked(0.03, q, k, v, order, learned)
    assert errors(out, q, keys).max() <= 0.03 and check.finish_step()[1][0].density < 1


def test_a_look_at_numbers_that_overflowed_leaves_no_trace(clip):
    """A matmul in float16 that overflows is computed anew, and so is everything after it."""
    q, k, v, order = clip
    learned = looked(0.01, q, k, v, order)[0].finish_step()[0]
    check = SelfCheck(0.01, order, (1, 1, 2), learned)
    block = check.block(0, 0)
    keys = block.keys(k.clone(), v.clone(), 2, "int8")
    noise = torch.randn(q.shape, generator=torch.Generator().manual_seed(0))
    block.look(keys, lambda part: 5 * noise[part] * q[part], [slice(0, len(q))])
    block.look(keys, lambda part: q[part], [slice(0, len(q))])
    assert torch.equal(check.levels, looked(0.01, q, k, v, order, learned)[0].levels)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"levels": torch.zeros(2, 3, dtype=torch.int8)},
        {"levels": torch.full((1, 2, 3), len(SHARES), dtype=torch.int8)},
        {"levels": torch.zeros(1, 2, 3)},
        {"steps": torch.zeros(4, 2)},
    ],
)
def test_what_cannot_have_been_learned_is_refused(nonsense):
    with pytest.raises(ValueError, match="attention"):
        Learned(**nonsense)
