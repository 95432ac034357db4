"""A hub that answers with nonsense, and records that somebody changed: one sentence, and nothing outside the folder."""

import json
import re

import pytest
from hub_server import COMMIT

from skyrun.cli import main
from skyrun.hub.head import HEAD_BYTES, read_head
from skyrun.hub.manifest import Manifest
from skyrun.hub.repository import is_plain_path, one_line
from skyrun.tasks import sources
from skyrun.tasks.sources import SOURCES, Source

R2V = SOURCES["r2v"].checkpoint
BLOB = "0" * 40


def entry(**changes):
    """One page of a listing, with one file."""
    file = {"type": "file", "path": "a.gguf", "oid": BLOB, "size": 1} | changes
    return json.dumps([{name: value for name, value in file.items() if value != "gone"}]).encode()


def sha(value):
    return json.dumps({"id": R2V, "sha": value}).encode()


HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"
PAGE = "{url}/api/models/" + R2V + "/tree/" + COMMIT

# fmt: off
REPLIES = [
    ("model", sha("../../../outside"), "answers with '../../../outside' as the commit, expected 40 hex"),
    ("model", sha("0" * 39), "as the commit"),
    ("model", sha("A" * 40), "as the commit"),
    ("model", sha(f"{COMMIT}\n"), "as the commit"),
    ("model", sha(7), "answers with '7' as the commit"),
    ("model", sha(None), "'None' as the commit"),
    ("model", b"[]", "as the commit"),
    ("model", HTML, "answers with '<!DOCTYPE html>.*expected JSON"),
    ("model", b"", "answers with nothing when asked for"),
    ("model", b"\xff\xfe\x00", "expected JSON"),
    ("model", b"[" * 200_000, "expected JSON"),
    ("model", b'{"sha": "\x1b[2J"}', "expected JSON"),
    ("model", sha("\x1b[2J\x07"), re.escape(r"'\x1b[2J\x07' as the commit")),
    ("model", b" " * (5 << 20), "more than 4 MiB"),
    ("tree", HTML, "expected JSON"),
    ("tree", b"", "answers with nothing"),
    ("tree", b'{"error": "none"}', "answers with 'dict', expected a list of files"),
    ("tree", b'[["a.gguf"]]', "'list' in a list of files"),
    ("tree", b"[" * 200_000, "expected JSON"),
    ("tree", b"[" + b"[]," * 2_000_000 + b"[]]", "more than 4 MiB"),
    ("tree", entry(path=None), "'dict' in a list of files"),
    ("tree", entry(path="/etc/passwd"), "has a file '/etc/passwd', which would leave its folder"),
    ("tree", entry(path="a/../../b.gguf"), "which would leave its folder"),
    ("tree", entry(path="..\\b.gguf"), "which would leave its folder"),
    ("tree", entry(path="C:b.gguf"), "which would leave its folder"),
    ("tree", entry(path="a//b.gguf"), "which would leave its folder"),
    ("tree", entry(path=""), "which would leave its folder"),
    ("tree", entry(path="a" * 600), "which would leave its folder"),
    ("tree", entry(size=-1), "'-1' as the size of a.gguf"),
    ("tree", entry(size=1 << 60), "as the size of a.gguf"),
    ("tree", entry(size="many"), "'many' as the size of a.gguf"),
    ("tree", entry(size=True), "as the size of a.gguf"),
    ("tree", entry().replace(b'"size": 1', b'"size": 1e999'), "'inf' as the size"),
    ("tree", entry().replace(b'"size": 1', b'"size": ' + b"9" * 5000), "expected JSON"),
    ("tree", entry(oid="gone"), "'None' as the SHA-1 of a.gguf"),
    ("tree", entry(oid="../../x"), "as the SHA-1 of a.gguf"),
    ("tree", entry(lfs={"oid": BLOB}), "as the SHA-256 of a.gguf"),
    ("tree", entry(lfs=[]), "as the SHA-256 of a.gguf"),
    ("tree", (entry(), {"Link": f'<{PAGE}>; rel="next"'}), "a.gguf twice in a list of files"),
    ("tree", (b"[]", {"Link": f'<{PAGE}>; rel="next"'}), "a list of files of more than 50 pages"),
    ("tree", (b"[]", {"Link": f'<{PAGE}?{"x" * 70_000}>; rel="next"'}), "goes on elsewhere, at "),
    ("tree", (b"[]", {"Link": '<http://127.0.0.1:9/api/x>; rel="next"'}), "goes on elsewhere, at http://127.0.0.1:9"),
]
# fmt: on


@pytest.fixture(autouse=True)
def checkpoint_only(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "r2v", Source(R2V))


@pytest.mark.parametrize(("what", "reply", "said"), REPLIES, ids=[said[:40] for *_, said in REPLIES])
def test_nonsense_ends_with_a_sentence(hub, tmp_path, capsys, what, reply, said):
    before = {path for path in tmp_path.rglob("*")}
    if isinstance(reply, tuple):
        reply = (reply[0], {name: value.replace("{url}", hub.url) for name, value in reply[1].items()})
    hub.replies[what] = reply
    assert main(["pull", "r2v:Q8_0"]) == 4
    error = capsys.readouterr().err
    assert re.search(f"error: .*{said}", error, re.DOTALL), error
    assert len(error.splitlines()) == 2 and len(error) < 700 and error.replace("\n", "").isprintable()
    assert {path for path in tmp_path.rglob("*")} == before, "something was written"


@pytest.mark.parametrize("body", [b"[1]", b'"x"', b"[" * 100_000, b'{"error": "\x1b[2J"}', HTML, b"x" * (64 << 20)])
@pytest.mark.parametrize("status", [404, 418])
def test_what_comes_with_an_error_does_not_matter(hub, capsys, body, status):
    hub.error_body, hub.refused[R2V] = body, status
    assert main(["pull", "r2v:Q8_0"]) == 4
    error = capsys.readouterr().err
    assert f"status {status}" in error and len(error) < 700 and error.replace("\n", "").isprintable()


def test_names_that_cannot_be_shown_are_left_out(hub, tmp_path, capsys):
    hub.more_entries.append({"type": "file", "path": "evil\x1b[31m.json", "oid": BLOB, "size": 1})
    assert main(["pull", "r2v:Q8_0", "--dry-run"]) == 0
    assert "\x1b" not in capsys.readouterr().err


def test_a_list_in_pages(hub, capsys):
    """As the real hub sends long ones: the second page is the whole list, the first has a file more."""
    rest = {"Link": f'<{hub.url}/api/models/{R2V}/tree/{COMMIT}?cursor=2>; rel="next"'}
    first = (entry(path="notes.txt"), rest)
    hub.replies["tree"] = lambda query: None if "cursor" in query else first
    assert main(["pull", "r2v:Q8_0", "--dry-run"]) == 0
    assert "5.5 MB to fetch" in capsys.readouterr().err


def test_plain_paths():
    assert all(map(is_plain_path, ("a", "a/b.gguf", "..a/b", "a b/ü")))
    assert not any(map(is_plain_path, ("", "/a", "a/", "a//b", ".", "a/./b", "a/..", "\\a", "c:\\a", "c:a", "a\0b")))
    assert one_line("a\x1b[1m\n\u202eb") == r"a\x1b[1m\n\u202eb"


# the first bytes of a file


def test_what_a_cut_header_says(converted):
    (file,) = converted("Q4_K_M").glob("SkyReels*")
    data = file.read_bytes()[:HEAD_BYTES]
    whole = read_head(data)
    assert whole.main_type == "Q4_K" and whole.text("skyrun.task") == "r2v" and len(whole.shapes) > 60
    for end in [*range(0, 300), *range(300, len(data), 997)]:
        part = read_head(data[:end])
        assert part.values.items() <= whole.values.items() and part.shapes.items() <= whole.shapes.items()


def test_any_bytes_are_a_header_that_says_little(converted):
    import random

    (file,) = converted("Q4_K_M").glob("SkyReels*")
    data, chance = bytearray(file.read_bytes()[:4096]), random.Random(0)
    for _ in range(300):
        wrong = bytearray(data)
        for _ in range(chance.randrange(1, 9)):
            wrong[chance.randrange(4, len(wrong))] = chance.choice((0, 1, 8, 9, 127, 255))
        head = read_head(bytes(wrong))
        assert isinstance(head.main_type, str) and isinstance(head.text("general.architecture"), str)


# what a folder says of its model

SOUND = {"name": "r2v", "quant": "Q8_0", "commits": {R2V: COMMIT}, "done": {f"{R2V}/a": ["a.gguf"]}, "complete": True}
DAMAGED = [
    {"name": "../x"},
    {"name": 1},
    {"name": ["r2v"]},
    {"quant": "../x"},
    {"quant": ""},
    {"commits": {R2V: "../../outside"}},
    {"commits": {R2V: 5}},
    {"commits": []},
    {"done": {"a": "a.gguf"}},
    {"done": {"a": ["../../etc/passwd"]}},
    {"done": {"a": ["/etc/passwd"]}},
    {"done": {"a": [".."]}},
    {"done": {"a": [3]}},
    {"done": {"a": ["猫" * 200]}},
    {"begun": ["\ud800"]},
    {"begun": ["sub/a.gguf"]},
    {"begun": "a.gguf"},
    {"complete": "yes"},
    {"task": "dance"},
    {"more": 1},
]


@pytest.mark.parametrize("change", DAMAGED, ids=str)
def test_a_damaged_record_is_none(tmp_path, change):
    (tmp_path / "skyrun-model.json").write_text(json.dumps(SOUND))
    assert Manifest.read(tmp_path) is not None
    (tmp_path / "skyrun-model.json").write_text(json.dumps(SOUND | change))
    assert Manifest.read(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'"' + b"x" * (2 << 20)])
def test_no_record_at_all(tmp_path, content):
    (tmp_path / "skyrun-model.json").write_bytes(content)
    assert Manifest.read(tmp_path) is None


def test_a_damaged_record_is_ignored_by_a_pull(hub, tmp_path):
    folder = tmp_path / "models" / "r2v-Q8_0"
    folder.mkdir(parents=True)
    (folder / "skyrun-model.json").write_text(json.dumps(SOUND | {"commits": {R2V: "../../outside"}}))
    assert main(["pull", "r2v:Q8_0"]) == 0
    assert Manifest.read(folder).commits == {R2V: COMMIT}
    assert {path.name for path in tmp_path.iterdir()} == {"models"}
