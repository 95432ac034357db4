"""Several threads read what one would have read, in every way that systems offer, and say clearly what went wrong."""

import errno
import os
import threading
from concurrent.futures import CancelledError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skyrun.errors import FAILED, SkyrunError
from skyrun.streaming import reader as module
from skyrun.streaming.reader import Extent, FileReader, read_ahead
from skyrun.streaming.ring import page_aligned

SIZE, CHUNK = 300_001, 16384
WAYS = ["positions", "own files", "direct"]
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", CHUNK)
    path = tmp_path / "numbers.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture
def opened(path, monkeypatch):
    """opened(way) opens the file to be read in that way. Afterwards all threads have ended."""
    before, readers = threading.active_count(), []

    def open_reader(way):
        if way == "own files":
            monkeypatch.delattr(os, "preadv")
        readers.append(FileReader(path, direct=way == "direct"))
        return readers[-1]

    yield open_reader
    for reader in readers:
        reader.close()
    assert threading.active_count() == before


def is_direct(file):
    import fcntl

    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & DIRECT)


def whole(path, reader):
    """What the reader makes of the file."""
    buffer = torch.zeros(path.stat().st_size, dtype=torch.uint8)
    reader.read([Extent(0, len(buffer), 0)], buffer)
    return buffer.numpy().tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_extents_arrive_where_they_belong_and_nothing_else_changes(path, opened, way):
    content = np.frombuffer(path.read_bytes(), np.uint8)
    reader, rng = opened(way), np.random.default_rng(1)
    lengths = [1, 31, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 77]
    places = [(0, SIZE), (SIZE - 1, 1), (4096, 4096), (4095, 2), (CHUNK - 1, 2)]
    places += [(int(rng.integers(SIZE - length)), length) for length in lengths for _ in range(3)]
    for start in range(0, len(places), 3):  # several extents in one call, with gaps between them
        expected, extents, at = [], [], 0
        for offset, nbytes in places[start : start + 3]:
            extents.append(Extent(offset, nbytes, at))
            expected += [content[offset : offset + nbytes], np.full(13, 7, np.uint8)]
            at += nbytes + 13
        for shift in (0, places[start][0] % 4096, 5):  # of the buffer in a page: as the file, and not
            buffer = page_aligned(at + shift).fill_(7)[shift:]
            reader.read(extents, buffer)
            np.testing.assert_array_equal(buffer.numpy(), np.concatenate(expected))


@pytest.mark.parametrize("way", WAYS)
def test_threads_share_a_reader(path, opened, way):
    content = np.frombuffer(path.read_bytes(), np.uint8)
    reader, wrong = opened(way), []

    def read(offset):
        for _ in range(10):
            buffer = torch.zeros(90_000, dtype=torch.uint8)
            reader.read([Extent(offset, 90_000, 0)], buffer)
            if not np.array_equal(buffer.numpy(), content[offset : offset + 90_000]):
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in (0, 70_001, 200_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("most", [1000, 4096, 5000])
def test_short_reads_are_continued(path, opened, monkeypatch, way, most):
    reader, whole_reads = opened(way), module.read_at

    def few_at(file):
        read = whole_reads(file)
        return lambda buffer, offset: read(buffer[:most], offset)

    monkeypatch.setattr(module, "read_at", few_at)
    if way != "own files":
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: min(most, preadv(file, buffers, offset)))
    assert whole(path, reader) == path.read_bytes()


@pytest.mark.parametrize("way", WAYS)
def test_a_disk_that_fails(path, opened, monkeypatch, way):
    reader = opened(way)
    calls = iter(range(100))

    def fail(*_):
        if next(calls) >= 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return CHUNK

    monkeypatch.setattr(module, "read_at", lambda file: fail)
    if way != "own files":
        monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SkyrunError, match=r"cannot read .*numbers.bin: .*Input/output error") as caught:
        whole(path, reader)
    assert caught.value.code == FAILED and "disk" in caught.value.hint


@pytest.mark.skipif(not DIRECT, reason="every read goes through the page cache")
@pytest.mark.parametrize(("shift", "copies"), [(100, 4096), (0, 3 * CHUNK)])
def test_direct_reads_copy_only_where_pages_differ(path, opened, monkeypatch, shift, copies):
    copied, copy = [], np.copyto
    monkeypatch.setattr(np, "copyto", lambda to, source: (copied.append(len(to)), copy(to, source)))
    reader, buffer = opened("direct"), page_aligned(CHUNK * 3 + shift)[shift:]
    if reader._files[-1] is reader._files[0]:
        pytest.skip("the file system refuses")
    reader.read([Extent(100, CHUNK * 3, 0)], buffer)
    assert buffer.numpy().tobytes() == path.read_bytes()[100 : 100 + CHUNK * 3]
    assert sum(copied) == copies


@pytest.mark.skipif(not DIRECT, reason="every read goes through the page cache")
@pytest.mark.parametrize("when", ["opened", "read"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_file_systems_that_refuse_direct_reads(path, opened, monkeypatch, when, number):
    open_file, preadv, direct = os.open, os.preadv, []

    def refuse_open(path, flags, *rest, **named):
        if flags & DIRECT:
            raise OSError(number, os.strerror(number))
        return open_file(path, flags, *rest, **named)

    def refuse_read(file, buffers, offset):
        direct.append(is_direct(file))
        if direct[-1]:
            raise OSError(number, os.strerror(number))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(*((os, "open", refuse_open) if when == "opened" else (os, "preadv", refuse_read)))
    reader = opened("direct")
    assert whole(path, reader) == path.read_bytes()
    direct.clear()
    assert whole(path, reader) == path.read_bytes()
    assert not any(direct)  # refused once is enough


@pytest.mark.skipif(not DIRECT, reason="every read goes through the page cache")
@pytest.mark.parametrize(("free", "direct"), [(4 * SIZE, False), (SIZE, True)])
def test_files_that_do_not_fit_into_memory_go_around_the_page_cache(path, monkeypatch, free, direct):
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    preadv, used = os.preadv, set()

    def note(file, buffers, offset):
        used.add(is_direct(file))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", note)
    reader = FileReader(path)
    expected = direct and reader._files[-1] is not reader._files[0]  # the folder of the tests may refuse
    assert whole(path, reader) == path.read_bytes()
    reader.close()
    assert (True in used) == expected


def cut(path):
    os.truncate(path, SIZE // 2)


def replace(path):
    other = path.with_name("other.bin")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def write(path):
    with open(path, "r+b") as file:
        file.write(b"something else")
    os.utime(path, ns=(1, 1))  # clocks of file systems are coarse


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, f"changed from {SIZE} to {SIZE // 2} bytes"),
        (replace, "replaced by another file"),
        (write, "written to"),
    ],
)
def test_a_file_that_changes(path, opened, way, change, message):
    reader, buffer = opened(way), torch.zeros(1000, dtype=torch.uint8)
    reader.read([Extent(0, 1000, 0)], buffer)
    change(path)
    with pytest.raises(SkyrunError, match=f"numbers.bin was {message} while it was read") as caught:
        reader.read([Extent(0, 1000, 0)], buffer)
    assert caught.value.code == FAILED and "restore" in caught.value.hint


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_ends_early(path, opened, way):
    reader = opened(way)
    cut(path)
    with pytest.raises(SkyrunError, match=rf"ended at byte {SIZE // 2}, expected \d+ more") as caught:
        buffer = torch.zeros(SIZE, dtype=torch.uint8)
        reader.read([Extent(SIZE // 2 - 10, 100, 0)], buffer)
    assert caught.value.code == FAILED


@pytest.mark.skipif(os.name == "nt", reason="files in use cannot be removed")
def test_a_file_that_has_gone_is_read_to_its_end(path, opened):
    content, reader = path.read_bytes(), opened("positions")
    path.unlink()
    buffer = torch.zeros(SIZE, dtype=torch.uint8)
    reader.read([Extent(0, SIZE, 0)], buffer)
    assert buffer.numpy().tobytes() == content


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SkyrunError, match="cannot read"):
        FileReader(tmp_path / "absent.bin")


def test_closing_ends_reads_that_wait(path, monkeypatch):
    monkeypatch.setattr(module, "_THREADS", 1)
    entered, gate, calls, raised = threading.Event(), threading.Event(), [], []

    def wait(self, target, offset):
        calls.append(offset)
        entered.set()
        assert gate.wait(60)
        return len(target)

    monkeypatch.setattr(FileReader, "_read_positions", wait)
    monkeypatch.setattr(FileReader, "_read_own", wait)
    reader = FileReader(path, direct=False)

    def read():
        try:
            whole(path, reader)
        except (CancelledError, RuntimeError) as error:  # while it waits, or while it still asks for more
            raised.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    assert entered.wait(60)
    reader._threads.shutdown(wait=False, cancel_futures=True)  # as close does, without waiting for the gate
    gate.set()
    reader.close()
    reading.join(60)
    assert len(calls) == 1 and raised


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
def test_first_blocks_are_read_ahead_where_the_cache_holds_them(tmp_path, monkeypatch):
    path = tmp_path / "blocks"
    path.write_bytes(bytes(9000))
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *what: advice.append(what))
    read_ahead(path, [Extent(100, 50, 0), Extent(5000, 4000, 64)])
    assert advice == [(100, 50, os.POSIX_FADV_WILLNEED), (5000, 4000, os.POSIX_FADV_WILLNEED)]
    monkeypatch.setattr(module, "CACHED_SHARE", 0.0)
    read_ahead(path, [Extent(100, 50, 0)])
    assert len(advice) == 2
