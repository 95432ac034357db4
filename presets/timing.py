"""How long each stage takes and what limits its speed, computed from sizes and rates alone."""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from skyrun.presets.autoencoder import Autoencoder
from skyrun.presets.machine.card import Rates
from skyrun.presets.machine.cards import find_card
from skyrun.presets.machine.hardware import Hardware, cpu_rates
from skyrun.presets.machine.host import CACHED_SHARE
from skyrun.presets.memory import (
    BYTES,
    HEAD_DIM,
    KEY_TILE,
    QUERY_TILE,
    SAMPLED,
    own_rows,
    parked_bytes,
    values_pass,
    way_of,
)
from skyrun.presets.workload import Workload

if TYPE_CHECKING:
    from skyrun.presets.plan import Plan

HIDDEN = 1.03  # times as long as without any reading a step may take whose reading counts as hidden
_UNNOTICED = 0.2  # seconds of a step that nobody waits for
_CACHED_RATE = 4e9  # bytes per second from there
_CROSSINGS = 3  # of parked tokens in a block: to the device for keys and for everything else, and back
_VELOCITY_BYTES = 4 * 4 * 16  # of a token's velocity: float32, for 2 x 2 latents of 16 channels
_LEARNED_BYTES = 3 * 8  # of a head in a block: what it keeps, its error and its density, in float64
_GROUP = 4  # frames that the autoencoder decodes at a time
# Of the autoencoder, operations for a pixel of a frame in squares of its narrowest width.
_ENCODE, _DECODE = 550, 880
_ENCODE_STILL = 270  # of a frame before which there is none
_TEXT_TOKENS = 512
# Bytes that norms, GELU, residuals, copies and checks of a block read and write for a token's value, by how it is
# computed, and what quantizing queries, keys and values adds (tests/test_timing.py counts them).
_ELEMENTWISE = {"plain": 310, "exact": 65, "float16 sums": 71, "int8": 46}
_QUANTIZING = {"int8": 19, "full-int8": 18, "fp8": 18}
_GUIDING = 20  # and normalized attention guidance
FEW_KEYS = {"full-int8": "int8", "fp8": "int8"}  # the precision of attention to text and image
# Seconds until the first stage: Python and torch are read, and on a GPU the context is made (assumed).
START_SECONDS = {"cpu": 2.0, "cuda": 5.0}
# Pixels per second that become H.264: a core was measured to take 0.13 s for a frame of 720P; of four.
WRITTEN_PIXELS = 4 * 1280 * 720 / 0.13
# Operations for a head, a tile of queries and a tile of keys: their score, and the list (tests count them).
_SCORED, _LISTED = 2 * 128, 100
_POOLED = 8  # for each value of queries and keys
_HALVED = 4  # how often the first step computes the sample anew, besides once with all keys
_TEXT_SQUARES = 11.5  # weights of a block of the text encoder in squares of its width


@dataclass(frozen=True)
class Time:
    """The time of a stage or a step.

    seconds: in all. compute: seconds of computing alone. bound: what limits the speed: "compute", "disk" or "link".
    hidden: the share of reading that overlaps computing.
    """

    seconds: float
    compute: float
    bound: str
    hidden: float

    def is_hidden_by(self, computing: float) -> bool:
        """Whether all of it takes not noticeably longer than so many seconds of computing."""
        return self.seconds <= max(HIDDEN * computing, computing + _UNNOTICED)


def rates_of(hardware: Hardware) -> Rates:
    """The machine's rates; if they are not known, those of an RTX 3060 or of a CPU with four cores."""
    return hardware.rates or _usual_rates(hardware.device)


@cache
def _usual_rates(device: str) -> Rates:
    card = find_card("RTX 3060")
    assert card is not None
    return card.rates if device == "cuda" else cpu_rates(4)


def step_time(
    hardware: Hardware,
    workload: Workload,
    *,
    fast: bool = False,
    attention: str = "exact",
    dtype: str = "bfloat16",
    rows: int | None = None,
    parked: bool = False,
    resident: int = 0,
    density: float | None = None,
    learns: bool = False,
    shared: bool = False,
) -> Time:
    """The time of a denoising step after the first.

    Args:
        hardware: the machine.
        workload: the clip and its models.
        fast: whether linear layers run in int8.
        attention: its precision.
        dtype: of activations.
        rows: how many tokens pass through a block at a time; None stands for all.
        parked: whether the other tokens wait on the host.
        resident: how many blocks stay on the device.
        density: the share of tiles that attention reads; None: it skips nothing, and chooses nothing.
        learns: whether it is dense, and learns what later steps may skip.
        shared: whether each device reads a share of the blocks, and sends it to the others.
    """
    work = 1.0 if density is None else _attention_work(hardware, workload, density, learns)
    computing = workload.contexts * _computing(hardware, workload, fast, attention, dtype, rows, parked, work)
    gathering = gathered_bytes(workload, resident) if shared else 0.0
    computing += _waiting(hardware, workload, computing, dtype, rows, density is not None, gathering)
    reading = (workload.layers - resident) * workload.block_bytes
    rate = _disk_rate(hardware, workload, shared)
    if is_cached(hardware, workload):
        rate = max(_CACHED_RATE, hardware.disk_rate) * (workload.readers if shared else 1)
    return _overlapped(hardware, computing, reading, rate)


def start_time(hardware: Hardware) -> Time:
    """The time until the first stage. Kernels are not compiled then: they are while the text is encoded."""
    return Time(START_SECONDS[hardware.device], START_SECONDS[hardware.device], "compute", 1.0)


def load_time(hardware: Hardware, workload: Workload) -> Time:
    """The time to read the transformer's weights outside of blocks, once for each window."""
    return Time(workload.windows * workload.outer_bytes / hardware.disk_rate, 0.0, "disk", 0.0)


def write_time(workload: Workload) -> Time:
    """The time to encode the frames as video. The CPU does it as they are decoded; the decoder waits for it."""
    frames = workload.decoded_frames or workload.frames
    seconds = workload.height * workload.width * frames / WRITTEN_PIXELS
    return Time(seconds, seconds, "compute", 1.0)


def first_step_time(hardware: Hardware, workload: Workload, first: Time, shared: bool = False) -> Time:
    """The time of a window's first step, in which every block is read from disk, given what it computes.

    What one device has read into the page cache, the others find there.
    """
    reading = workload.layers * workload.block_bytes
    once = shared or is_cached(hardware, workload)
    return _overlapped(hardware, first.compute, reading, _disk_rate(hardware, workload, once))


def denoise_time(
    hardware: Hardware, workload: Workload, step: Time, first: Time | None = None, shared: bool = False
) -> Time:
    """The time of all steps, given that of one after the first, and of a first one with all blocks at hand.

    shared: as in `step_time`.
    """
    first = first or step
    cold = 1 if is_cached(hardware, workload) else workload.windows
    firsts, later = workload.windows, workload.windows * (workload.steps - 1)
    reading = first_step_time(hardware, workload, first, shared).seconds - first.seconds
    seconds = later * step.seconds + firsts * first.seconds + cold * reading
    return replace(step, seconds=seconds, compute=later * step.compute + firsts * first.compute)


def text_time(hardware: Hardware, workload: Workload) -> Time:
    """The time to encode a prompt of full length, which reads the text encoder once."""
    rates, weights = rates_of(hardware), workload.text_layers * _TEXT_SQUARES * workload.text_dim**2
    reading = workload.text_layers * workload.text_block_bytes
    computing = 2 * weights * _TEXT_TOKENS / rates.linear + (reading + 4 * weights) / rates.decode
    return _overlapped(hardware, computing, reading, hardware.disk_rate)


def images_time(hardware: Hardware, workload: Workload, vae: Autoencoder) -> Time:
    """The time to encode images and frames that the clip starts from, by the VAE and the image encoder."""
    reading = 2 * workload.vae_weights + workload.windows * workload.image_layers * workload.image_block_bytes
    time = _convolving(hardware, workload, vae, _ENCODE_STILL if workload.stills else _ENCODE, workload.encoded_frames)
    return _one_after_the_other(hardware, time, reading)


def decode_time(hardware: Hardware, workload: Workload, vae: Autoencoder) -> Time:
    """The time to decode latents to frames."""
    frames = workload.decoded_frames or workload.frames
    time = _convolving(hardware, workload, vae, _DECODE * own_rows(workload, "decode"), frames)
    return _one_after_the_other(hardware, time, 2 * workload.vae_weights)


def break_even_tokens(hardware: Hardware, workload: Workload, fast: bool, dtype: str, attention: str = "exact") -> int:
    """The least number of tokens for which reading all blocks from disk is hidden behind a step."""
    reading = workload.layers * workload.block_bytes / min(hardware.disk_rate, _link_rate(hardware))
    low, high = 1, 1 << 22
    while low < high:
        middle = (low + high) // 2
        some = with_tokens(workload, middle)
        computing = step_time(hardware, some, fast=fast, attention=attention, dtype=dtype).compute
        low, high = (low, middle) if computing >= reading else (middle + 1, high)
    return low


def with_tokens(workload: Workload, tokens: int) -> Workload:
    """The workload with that many tokens, as one long row of latents."""
    return replace(workload, latent_frames=1, height=16, width=16 * tokens)


def corrected(plan: "Plan", step_seconds: float) -> "Plan":
    """The plan with its times scaled by a measured step.

    If steps and decoding are both bound by computing, decoding is scaled too: it will be off by the same factor.
    """
    if plan.step_seconds <= 0:
        return plan
    factor = step_seconds / plan.step_seconds
    stages = tuple(
        replace(stage, seconds=stage.seconds * factor)
        if stage.name == "denoise" or (stage.name == "decode" and stage.bound == "compute" == _bound(plan))
        else stage
        for stage in plan.stages
    )
    return replace(plan, stages=stages, step_seconds=step_seconds)


def _bound(plan: "Plan") -> str:
    return next(stage.bound for stage in plan.stages if stage.name == "denoise")


def block_weights(workload: Workload) -> int:
    """How many weights a block's matrices have: two attentions, the feed-forward, and the workload's extra matrices."""
    dim, ffn = workload.dim, workload.ffn_dim
    return (8 + workload.token_matrices + workload.context_matrices) * dim**2 + 2 * dim * ffn


def step_operations(workload: Workload) -> tuple[float, float]:
    """Operations of a step with each of its contexts, on average: (in linear layers, in attention)."""
    dim, tokens, context = workload.dim, workload.tokens, _context(workload)
    per_token = (6 + workload.token_matrices) * dim**2 + 2 * dim * workload.ffn_dim
    linear = 2 * (tokens * (per_token + workload.adapter_weights) + context * 2 * dim**2)
    return workload.layers * linear, workload.layers * 4.0 * tokens * (tokens + context) * dim


def _attention_work(hardware: Hardware, workload: Workload, density: float, learns: bool) -> float:
    """The operations of self-attention to chosen tiles, in shares of those to all; a CPU computes all."""
    tokens = max(1, workload.tokens)
    read = 1 + (_HALVED if learns else 1) * density
    own = 1.0 if learns or hardware.device != "cuda" else density
    own += min(1.0, QUERY_TILE * SAMPLED / tokens) * read
    return own + selection_operations(workload) / (4.0 * tokens**2 * workload.dim)


def selection_operations(workload: Workload) -> float:
    """Operations of a block to choose the tiles that all queries read."""
    tokens, dim = workload.tokens, workload.dim
    pairs = -(-tokens // QUERY_TILE) * -(-tokens // KEY_TILE) * (dim // 128)
    return pairs * (_SCORED + _LISTED) + 2 * _POOLED * tokens * dim


def sent_bytes(workload: Workload, dtype: str, sparse: bool = False) -> float:
    """Bytes of activations that a device sends to the others in a step, on average: docs/devices.md has the formula.

    sparse: whether attention skips tiles, and looks at a sample of all queries.
    """
    devices, own = workload.devices, workload.tokens / workload.devices
    rows, found = 4 * own, own * _VELOCITY_BYTES
    if sparse:
        rows += min(SAMPLED * QUERY_TILE, workload.tokens) / devices
        found += _LEARNED_BYTES * workload.layers * workload.dim / HEAD_DIM / devices
    in_blocks = rows * workload.layers * workload.dim * BYTES[dtype] * (devices - 1) / devices
    return workload.contexts * (in_blocks + found * (devices - 1))


def gathered_bytes(workload: Workload, resident: int = 0) -> float:
    """Bytes of blocks that a device sends in a step after the first, on average, if each reads a share of them."""
    blocks = (workload.layers - resident) * workload.block_bytes
    return blocks * (workload.readers - 1) / workload.readers


def planned_sending(workload: Workload, plan: "Plan") -> float:
    """Bytes that a device sends to the others in a step of a plan after the first, on average."""
    gathered = gathered_bytes(workload, plan.resident_blocks) if plan.weights == "shared" else 0.0
    return sent_bytes(workload, plan.dtype, bool(plan.sparse)) + gathered


def _waiting(
    hardware: Hardware,
    workload: Workload,
    computing: float,
    dtype: str,
    rows: int | None,
    sparse: bool,
    gathering: float,
) -> float:
    """Seconds of a step in which a device waits for others: for the last span of each exchange, or for all if they take
    longer than computing. gathering: bytes of blocks that it sends meanwhile."""
    if workload.devices == 1:
        return 0.0
    sending = sent_bytes(workload, dtype, sparse) / hardware.peer_rate
    last = sending / (-(-workload.own_tokens // rows) if rows else 1)
    return last + max(0.0, sending + gathering / hardware.peer_rate - last - computing)


def _disk_rate(hardware: Hardware, workload: Workload, once: bool) -> float:
    """How quickly a device gets blocks from the disk that several read from. once: whether it reads each only once."""
    return hardware.disk_rate / (1 if once else workload.readers)


def _context(workload: Workload) -> float:
    """How many tokens of text and image a token sees, on average."""
    return workload.context_tokens + workload.avoided_tokens / workload.contexts


def _computing(
    hardware: Hardware,
    workload: Workload,
    fast: bool,
    attention: str,
    dtype: str,
    rows: int | None,
    parked: bool,
    work: float,
) -> float:
    """Seconds of a step of one context, of one device among several."""
    rates = rates_of(hardware)
    linear, scores = (operations / workload.devices for operations in step_operations(workload))
    linear_rate = (fast and rates.fast_linear) or _in_dtype(hardware, rates.linear, dtype)
    cross = scores * _context(workload) / (workload.tokens + _context(workload))
    seconds = linear / linear_rate
    for operations, precision in ((work * (scores - cross), attention), (cross, FEW_KEYS.get(attention, attention))):
        quick = precision != "exact" and rates.attention_in(precision)
        seconds += operations / (quick or _in_dtype(hardware, rates.attention, dtype))
    parts = -(-workload.own_tokens // rows) if rows else 1
    moved = parts * (workload.block_bytes + block_weights(workload) * (1 if fast else BYTES[dtype]))
    if hardware.device == "cuda":  # a CPU takes next to no time for them
        way = way_of(True, hardware.capability, dtype, fast)
        passes = _ELEMENTWISE[way] + (0 if way == "plain" else _QUANTIZING.get(attention, 0))
        guiding = _GUIDING / workload.contexts if workload.avoided_tokens else 0
        moved += int(workload.own_tokens * workload.dim * (passes + guiding))
    seconds += workload.layers * moved / rates.decode
    if parked:
        twice = values_pass(workload.devices, attention)
        crossing = (_CROSSINGS + twice) * parked_bytes(workload, dtype) / workload.contexts
        again = twice * 2 * workload.tokens * workload.dim**2
        seconds += workload.layers * (crossing / hardware.link_rate + again / linear_rate)
    return seconds


def is_cached(hardware: Hardware, workload: Workload) -> bool:
    """Whether the page cache keeps the transformer from one step to the next."""
    return workload.layers * workload.block_bytes + workload.outer_bytes <= CACHED_SHARE * hardware.ram_free


def _overlapped(hardware: Hardware, computing: float, reading: int, rate: float) -> Time:
    """The time if reading overlaps computing: the slowest of computing, the disk and the link decides."""
    waits = {"compute": computing, "disk": reading / rate, "link": reading / _link_rate(hardware)}
    bound = max(waits, key=waits.__getitem__)
    longest = max(waits["disk"], waits["link"])
    return Time(waits[bound], computing, bound, min(1.0, computing / longest) if longest else 1.0)


def _link_rate(hardware: Hardware) -> float:
    return hardware.link_rate if hardware.device == "cuda" else math.inf


def _one_after_the_other(hardware: Hardware, time: Time, reading: int) -> Time:
    loading = reading / hardware.disk_rate
    bound = "disk" if loading > time.seconds else time.bound
    return replace(time, seconds=time.seconds + loading, bound=bound)


def _in_dtype(hardware: Hardware, rate: float, dtype: str) -> float:
    """A rate in 16 bits, or a GPU's in float32. Rates that were measured before that was one of them have none."""
    if dtype != "float32" or hardware.device != "cuda":
        return rate
    return rates_of(hardware).float32 or rate / 2


def _convolving(hardware: Hardware, workload: Workload, vae: Autoencoder, operations: float, frames: int) -> Time:
    pixels = workload.height * workload.width * frames
    rate = _in_dtype(hardware, rates_of(hardware).convolution, vae.dtype)
    seconds = operations * workload.vae_base_dim**2 * pixels / rate
    travelling = 2 * vae.parked_bytes / hardware.link_rate * -(-frames // _GROUP)
    return Time(seconds + travelling, seconds, "link" if travelling > seconds else "compute", 1.0)
