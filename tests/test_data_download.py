"""Downloads and archives under every fault: cuts, changed files, full disks, kills, rivals, attacks; LRA's release."""

import gzip
import hashlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from s4nb.data.download import (LRA, SOURCES, Source, archive_files, download_file, extract, extract_lra, fetch,
                                find_lra)

DATA = bytes(range(256)) * 400


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        s, start = self.server, 0
        want = self.headers.get("Range")
        if want and s.ranges and self.headers.get("If-Range") in s.tags.values(): start = int(want[6:-1])
        status = s.statuses.pop(0) if s.statuses else 416 if start >= len(s.data) else 206 if start else 200
        s.requests.append((want, status))
        self.send_response(status)
        if status == 416: self.send_header("Content-Range", f"bytes */{len(s.data)}")
        if status == 206: start += s.shift
        body = s.data[start:][:s.portion if status == 206 else None] if status in (200, 206) else b""
        if status == 206: self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(s.data)}")
        if s.announce_length: self.send_header("Content-Length", str(len(body)))
        for name, value in s.tags.items(): self.send_header(name, value)
        self.end_headers()
        cut, s.cut = s.cut, None
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if cut is not None and s.hold: s.hold.wait(20)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    "A server of one file, on this machine: what it does wrong is set by its attributes."
    s = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.data, s.ranges, s.tags, s.cut, s.hold = DATA, True, {"ETag": '"a"'}, None, None
    s.statuses, s.requests, s.announce_length, s.shift, s.portion = [], [], True, 0, None
    s.url = f"http://127.0.0.1:{s.server_port}/f.bin"
    threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
    yield s
    if s.hold: s.hold.set()
    s.shutdown()
    s.server_close()


def sha(data): return hashlib.sha256(data).hexdigest()


def cut_once(server, path, at=30_000):
    "A download that broke off after some bytes."
    server.cut = at
    with pytest.raises(ConnectionError, match=f"closed at byte {at:,} of .* running again goes on from there"):
        download_file(server.url, path, pauses=())
    assert Path(f"{path}.part").read_bytes() == server.data[:at] and not path.exists()


# ---- downloads ------------------------------------------------------------------------------------------------------
def test_cut_in_the_middle_and_resumed_byte_for_byte(server, tmp_path, capfd):
    cut_once(server, tmp_path / "f")
    download_file(server.url, tmp_path / "f", sha256=sha(DATA), size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.requests == [(None, 200), ("bytes=30000-", 206)]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".f.lock", "f"]
    said = capfd.readouterr().err
    assert f"f: {len(DATA):,} bytes into" in said
    assert f"f (30,000 bytes are here): {len(DATA) - 30_000:,} bytes into" in said


def test_a_date_serves_where_there_is_no_etag(server, tmp_path):
    server.tags = {"Last-Modified": "Sat, 01 Jan 2022 00:00:00 GMT"}
    cut_once(server, tmp_path / "f")
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1] == ("bytes=30000-", 206) and (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize("tags", [{}, {"ETag": 'W/"a"'}], ids=["none", "weak"])
def test_without_a_tag_of_the_content_it_starts_over(server, tmp_path, tags):
    server.tags = tags
    cut_once(server, tmp_path / "f")
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1] == (None, 200) and (tmp_path / "f").read_bytes() == DATA


def test_a_server_that_ignores_ranges(server, tmp_path):
    server.ranges = False
    cut_once(server, tmp_path / "f")
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1] == ("bytes=30000-", 200) and (tmp_path / "f").read_bytes() == DATA


def test_a_file_that_changed_between_the_attempts(server, tmp_path):
    cut_once(server, tmp_path / "f")
    server.data, server.tags = DATA[::-1], {"ETag": '"b"'}
    download_file(server.url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA[::-1]


def test_a_part_of_another_address_is_not_used(server, tmp_path):
    cut_once(server, tmp_path / "f")
    download_file(server.url + "?other", tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1] == (None, 200)


def test_a_part_that_was_complete(server, tmp_path):
    cut_once(server, tmp_path / "f", at=len(DATA) - 1)
    with open(tmp_path / "f.part", "ab") as f: f.write(DATA[-1:])            # killed after the last byte
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1][1] == 416


def test_a_part_that_is_too_long(server, tmp_path):
    cut_once(server, tmp_path / "f")
    with open(tmp_path / "f.part", "ab") as f: f.write(bytes(len(DATA)))
    download_file(server.url, tmp_path / "f", sha256=sha(DATA), pauses=(0,))
    assert [status for _, status in server.requests] == [200, 416, 200]


def test_a_rest_that_comes_in_portions(server, tmp_path):
    cut_once(server, tmp_path / "f")
    server.portion = 40_000
    download_file(server.url, tmp_path / "f", pauses=(0,))
    assert (tmp_path / "f").read_bytes() == DATA
    assert server.requests[1:] == [("bytes=30000-", 206), ("bytes=70000-", 206)]


def test_another_rest_than_was_asked_for_is_not_taken(server, tmp_path):
    cut_once(server, tmp_path / "f")
    server.shift = -5
    download_file(server.url, tmp_path / "f", pauses=(0,))
    assert (tmp_path / "f").read_bytes() == DATA and server.requests[2] == (None, 200)


def test_attempts_go_on_while_something_arrives_and_end_when_nothing_does(server, tmp_path):
    class Cuts(list):
        def pop(self, i):
            server.cut = 20_000
            return super().pop(i)
    server.statuses = Cuts([200] + [206] * 4)
    with pytest.raises(ConnectionError, match="broke off"):
        server.ranges = False
        download_file(server.url, tmp_path / "f", pauses=(0, 0))
    assert len(server.requests) == 3                                         # the first, and two pauses: no news
    server.ranges, server.requests = True, []
    server.cut, busy = 20_000, [503, 429, 503]
    server.statuses = busy
    download_file(server.url, tmp_path / "g", sha256=sha(DATA), pauses=(0, 0, 0))
    assert [status for _, status in server.requests][:4] == [503, 429, 503, 200]


def test_busy_for_ever_missing_refused_unreachable(server, tmp_path):
    server.statuses = [503] * 9
    with pytest.raises(ConnectionError, match="cannot be reached .*503.*put the file at .*f yourself"):
        download_file(server.url, tmp_path / "f", pauses=(0,))
    assert len(server.requests) == 2
    server.statuses = [404, 403]
    for status in (404, 403):
        with pytest.raises(OSError, match=f"cannot be had .status {status} .*If you have this file, put it at .*f and"):
            download_file(server.url, tmp_path / "f", pauses=(0,))
    assert len(server.requests) == 4                                         # no second attempt
    server.statuses = [404]
    with pytest.raises(OSError, match="a%20b cannot be had"):
        download_file(server.url + "?a%20b", tmp_path / "f", pauses=())
    with pytest.raises(ConnectionError, match="cannot be reached"):
        download_file("http://127.0.0.1:9/f", tmp_path / "f", pauses=())
    with pytest.raises(ValueError, match="takes http://, https:// and file:// addresses, got 'ftp"):
        download_file("ftp://x/f", tmp_path / "f")


def test_wrong_checksum_and_wrong_size(server, tmp_path):
    with pytest.raises(ValueError, match=f"{server.url}: expected sha256 {'0' * 64}, got {sha(DATA)}. What arrived"):
        download_file(server.url, tmp_path / "f", sha256="0" * 64)
    with pytest.raises(ValueError, match=f"offers {len(DATA):,} bytes, 5 are expected"):
        download_file(server.url, tmp_path / "f", size=5)
    server.announce_length = False
    with pytest.raises(ValueError, match=f"expected 5 bytes, got {len(DATA):,}"):
        download_file(server.url, tmp_path / "f", size=5)
    assert [p.name for p in tmp_path.iterdir()] == [".f.lock"]
    download_file(server.url, tmp_path / "f", sha256=sha(DATA).upper())           # of unannounced length, and right
    assert (tmp_path / "f").read_bytes() == DATA


def test_first_use_is_recorded_and_compared(server, tmp_path, capfd):
    path = download_file(server.url, tmp_path / "f")
    assert (tmp_path / "f.sha256").read_text() == f"{sha(DATA)}  f\n" and sha(DATA) in capfd.readouterr().err
    assert download_file(server.url, path) == path and len(server.requests) == 1  # there already
    path.write_bytes(b"edited")
    with pytest.raises(ValueError, match=r"f is not http.*got .*f.sha256 keeps .*Delete it and run again"):
        download_file(server.url, path)
    path.unlink()
    server.data = b"another"
    with pytest.raises(ValueError, match=f"expected sha256 {sha(DATA)}.*f.sha256 keeps .*: delete it too if you trust"):
        download_file(server.url, path)
    assert not path.exists()
    (tmp_path / "f.sha256").unlink()                                         # as the message says
    assert download_file(server.url, path).read_bytes() == b"another"


def test_a_file_that_lies_there_is_checked_and_never_removed(server, tmp_path):
    (tmp_path / "f").write_bytes(DATA[:100])
    with pytest.raises(ValueError, match="is not .*: expected 102,400 bytes, got 100. Delete it"):
        download_file(server.url, tmp_path / "f", size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA[:100] and not server.requests


def test_files_of_a_mirror(tmp_path):
    (tmp_path / "source").write_bytes(DATA)
    source = Source((tmp_path / "source").as_uri(), "none", len(DATA), sha(DATA), "bytes")
    assert fetch(source, tmp_path / "there").read_bytes() == DATA
    with pytest.raises(OSError, match="cannot be had"): download_file(f"file://{tmp_path}/nothing", tmp_path / "f")


def test_a_disk_too_small_is_refused_before_the_first_byte(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(OSError, match="needs 102,400 bytes, .* has 1 free: make room there"):
        download_file(server.url, tmp_path / "f")
    assert not (tmp_path / "f.part").exists()


def start(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def full_disk(call, error):
    "Run `call` where no file may exceed 50,000 bytes, and write its error to a file."
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        call()
    except OSError as e:
        error.write_text(str(e))


def test_a_disk_that_fills_up(server, tmp_path):
    start(full_disk, lambda: download_file(server.url, tmp_path / "f", pauses=(60,)), tmp_path / "error").join(30)
    said = (tmp_path / "error").read_text()
    assert "f.part could not be written" in said and "Make room" in said and "goes on from there" in said
    assert not (tmp_path / "f").exists() and 0 < (tmp_path / "f.part").stat().st_size <= 50_000
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1][1] == 206


def test_kill_in_the_middle_then_resumed(server, tmp_path):
    server.cut, server.hold = 60_000, threading.Event()                      # half of it comes, then nothing
    child, part = start(download_file, server.url, tmp_path / "f"), tmp_path / "f.part"
    until = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size >= 50_000) and time.monotonic() < until: time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    have = part.stat().st_size
    assert 0 < have <= 60_000 and not (tmp_path / "f").exists()
    download_file(server.url, tmp_path / "f", sha256=sha(DATA))
    assert server.requests[1] == (f"bytes={have}-", 206)


def test_two_processes_make_one_transfer(server, tmp_path):
    server.cut, server.hold = len(DATA), threading.Event()
    rivals = [start(download_file, server.url, tmp_path / "f", sha(DATA)) for _ in range(3)]
    time.sleep(0.3)                                                          # the others stand at the lock
    server.hold.set()
    for p in rivals: p.join(30)
    assert [p.exitcode for p in rivals] == [0, 0, 0] and len(server.requests) == 1


def test_sources_are_well_formed():
    for name, source in SOURCES.items():
        assert source.url.startswith("http") and source.licence and source.what and source.name
        assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32 and source.bytes
    assert SOURCES["cifar10"].size == "170 MB" and SOURCES["lra"].size == "size unknown"
    assert SOURCES["mnist/t10k-images-idx3"].size == "1.6 MB"


# ---- archives -------------------------------------------------------------------------------------------------------
def tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info is not content: info.size = len(content)
            t.addfile(info, None if info is content else io.BytesIO(content))
    return path


def entry(name, kind, to=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items(): z.writestr(name, content)
    return path


def tree(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


FILES = {"top/a.txt": b"a" * 700, "top/b/c.txt": os.urandom(30_000), "top/b/empty": b""}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_every_kind_of_archive(tmp_path, mode):
    archive = zipped(tmp_path / "x", FILES) if mode == "zip" else tar(tmp_path / "x", FILES, mode)
    assert tree(extract(archive, tmp_path / "all")) == FILES
    one = extract(archive, tmp_path / "one", members=lambda name: "d.txt" if name.endswith("c.txt") else False)
    assert tree(one) == {"d.txt": FILES["top/b/c.txt"]}
    assert {str(path) for path, _ in archive_files(archive)} == set(FILES)


def test_a_single_compressed_file(tmp_path):
    (tmp_path / "idx.gz").write_bytes(gzip.compress(DATA))
    assert [(str(path), member.read()) for path, member in archive_files(tmp_path / "idx.gz")] == [("idx", DATA)]
    assert tree(extract(tmp_path / "idx.gz", tmp_path / "out")) == {"idx": DATA}


ATTACKS = {"up": ("../../evil", b"x", "the folder"), "absolute": ("/evil", b"x", "the folder"),
           "symlink": ("d", entry("d", tarfile.SYMTYPE, "/etc"), "link or a device"),
           "inside": ("d", entry("d", tarfile.SYMTYPE, "top"), "link or a device"),
           "hardlink": ("h", entry("h", tarfile.LNKTYPE, "../../evil"), "link or a device"),
           "device": ("n", entry("n", tarfile.CHRTYPE), "link or a device"),
           "fifo": ("p", entry("p", tarfile.FIFOTYPE), "link or a device")}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_tar_cannot_write_outside(tmp_path, attack):
    name, content, said = ATTACKS[attack]
    archive = tar(tmp_path / "bad.tar.gz", {**FILES, name: content, f"{name}/then": b"x"})
    with pytest.raises(ValueError, match=f"bad.tar.gz: its member .{name}. .*{said}. Nothing was extracted"):
        extract(archive, tmp_path / "deep/er/out")
    assert tree(tmp_path / "deep") == {"er/.out.lock": b""} and not (tmp_path / "evil").exists()
    left = extract(archive, tmp_path / "out", members=lambda n: n.startswith("top"))     # what is not taken is harmless
    assert tree(left) == FILES


def test_a_zip_cannot_write_outside(tmp_path):
    for name in ("../evil", "/evil"):
        with pytest.raises(ValueError, match="would be written outside the folder"):
            extract(zipped(tmp_path / "x.zip", {name: b"x"}), tmp_path / "out")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z: z.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="is a link or a device"): extract(tmp_path / "x.zip", tmp_path / "out")
    with pytest.raises(ValueError, match="would be written outside the folder"):
        extract(zipped(tmp_path / "x.zip", {"fine": b"x"}), tmp_path / "out", members=lambda name: f"../{name}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_a_cut_archive_is_one_clear_error_and_nothing_is_left(tmp_path, mode):
    archive = zipped(tmp_path / "x", FILES) if mode == "zip" else tar(tmp_path / "x", FILES, mode)
    whole = archive.read_bytes()
    for part in (whole[:len(whole) // 2], whole[:-(20 if mode != "w" else 10_240)], whole[:100], b""):
        archive.write_bytes(part)
        with pytest.raises(ValueError, match="x is damaged or incomplete .*Delete it and run again"):
            extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*.tmp"))


def test_a_tar_cut_between_two_members(tmp_path):
    archive = tar(tmp_path / "x.tar", {"a": b"x" * 512, "b": b"y" * 512}, "w")
    archive.write_bytes(archive.read_bytes()[:1024])
    with tarfile.open(archive) as t: assert t.getnames() == ["a"]            # tarfile notices nothing
    with pytest.raises(ValueError, match="its end is missing"): extract(archive, tmp_path / "out")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path, mode):
    content = bytearray(tar(tmp_path / "x", {"a": b"x" * 512, "b": b"y" * 512, "c": b""}, "w").read_bytes())
    for header in (0, 1024, 2048):
        damaged = content[:header] + b"?" + content[header + 1:]
        (tmp_path / "x").write_bytes(gzip.compress(damaged) if mode == "w:gz" else damaged)
        with tarfile.open(tmp_path / "x", ignore_zeros=True) as t: assert len(t.getnames()) == 2
        if header == 0 and mode == "w:gz": continue                          # a compressed file that is no tar
        with pytest.raises(ValueError, match="x is damaged or incomplete"): extract(tmp_path / "x", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_compressed_tar_without_its_end(tmp_path):
    whole = tar(tmp_path / "x", {"a": b"x" * 512, "b": b"y" * 512}, "w").read_bytes()
    for kept in (512, 1024, 1500, 2048):                                     # a `tar | gzip` whose tar was killed
        (tmp_path / "x").write_bytes(gzip.compress(whole[:kept]))
        with pytest.raises(ValueError, match="x is damaged or incomplete"): extract(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize("at, value", [(6, 1), (8, 9)], ids=["encrypted", "method"])
def test_a_zip_that_python_cannot_read(tmp_path, at, value):
    content = bytearray(zipped(tmp_path / "x", FILES).read_bytes())
    for magic, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)): content[content.index(magic) + shift + at] = value
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="x is damaged or incomplete .*(password|compression)"):
        extract(tmp_path / "x", tmp_path / "out")


@pytest.mark.parametrize("mode", ["w:gz", "zip"])
def test_a_changed_byte_is_noticed(tmp_path, mode):
    archive = zipped(tmp_path / "x", FILES) if mode == "zip" else tar(tmp_path / "x", FILES, mode)
    content = bytearray(archive.read_bytes())
    content[10_000] ^= 1
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or incomplete"): extract(archive, tmp_path / "out")


def test_what_is_no_archive(tmp_path):
    (tmp_path / "page.tar.gz").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="neither a tar nor a zip"): extract(tmp_path / "page.tar.gz", tmp_path / "out")
    with pytest.raises(FileNotFoundError): extract(tmp_path / "none.tar", tmp_path / "out")


def test_extracting_on_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    archive = tar(tmp_path / "x.tar.gz", {"small": b"x", "big": b"y" * 80_000})
    start(full_disk, lambda: extract(archive, tmp_path / "out"), tmp_path / "error").join(30)
    assert "big could not be written" in (tmp_path / "error").read_text() and not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*.tmp"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    with pytest.raises(OSError, match="unpacking x.tar.gz, at least its size needs .* has 1 free"):
        extract(archive, tmp_path / "out")


def test_extraction_adds_whole_files_and_sweeps_what_was_killed(tmp_path):
    extract(tar(tmp_path / "x.tar", FILES, "w"), tmp_path / "out")
    for left in (tmp_path / "out/.out.0badf00d.tmp", tmp_path / ".new.0badf00d.tmp"):
        left.mkdir()
        (left / "half").write_text("x")
    extract(tar(tmp_path / "y.tar", {"top/a.txt": b"new", "z": b"z"}, "w"), tmp_path / "out")
    extract(tmp_path / "x.tar", tmp_path / "new")
    assert tree(tmp_path / "out") == {**FILES, "top/a.txt": b"new", "z": b"z", ".out.lock": b""}
    assert tree(tmp_path / "new") == FILES and not (tmp_path / ".new.0badf00d.tmp").exists()


def test_a_folder_that_is_a_link_to_another_disk(tmp_path):
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev: pytest.skip("no second disk")
    with tempfile.TemporaryDirectory(dir=other) as far:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/top").symlink_to(far)
        assert tree(extract(tar(tmp_path / "x.tar", FILES, "w"), tmp_path / "out") / "top") == {
            name[4:]: content for name, content in FILES.items()}
        assert sorted(p.name for p in Path(far).iterdir()) == ["a.txt", "b"]


# ---- Long Range Arena -----------------------------------------------------------------------------------------------
INNER = "lra_release/lra_release"


def release():
    "The archive's true layout: an outer ListOps and a bad outer Pathfinder-128, the good copy one level deeper."
    files = {f"{nest}/listops-1000/basic_{s}.tsv": b"Source\tTarget\r\n" for nest in ("lra_release", INNER)
             for s in ("train", "val", "test")}
    files |= {f"{INNER}/tsv_data/new_aan_pairs.{s}.tsv": b"1.0\ta\tb" for s in ("train", "eval", "test")}
    for nest, r in (("lra_release", 128), *((INNER, r) for r in (32, 64, 128, 256))):
        for level in ("curv_baseline", "curv_contour_length_9", "curv_contour_length_14"):
            base = f"{nest}/pathfinder{r}/{level}"
            files |= {f"{base}/metadata/0.npy": b"imgs/0 0.png", f"{base}/imgs/0/0.png": f"{nest} {r}".encode()}
    return files


def test_the_release_as_it_comes(tmp_path):
    archive = tar(tmp_path / "lra_release.gz", release())
    (tmp_path / "root/listops").mkdir(parents=True)
    (tmp_path / "root/listops/mine").write_text("kept")
    found = extract_lra(archive, tmp_path / "root", ["listops", "pathfinder128"])
    assert found == {"listops": tmp_path / "root/listops", "pathfinder128": tmp_path / "root/pathfinder/pathfinder128"}
    hard = "pathfinder/pathfinder128/curv_contour_length_14"
    assert {n: c for n, c in tree(tmp_path / "root").items() if not n.startswith(".")} == {
        **{f"listops/basic_{s}.tsv": b"Source\tTarget\r\n" for s in ("train", "val", "test")}, "listops/mine": b"kept",
        f"{hard}/metadata/0.npy": b"imgs/0 0.png", f"{hard}/imgs/0/0.png": f"{INNER} 128".encode()}
    archive.unlink()
    assert extract_lra(archive, tmp_path / "root", ["listops"])["listops"] == found["listops"]     # nothing to unpack


def test_a_part_that_the_archive_lacks(tmp_path):
    archive = tar(tmp_path / "x.gz", {n: c for n, c in release().items() if "tsv_data" not in n})
    with pytest.raises(ValueError, match="has not all of listops, aan"):
        extract_lra(archive, tmp_path, ["listops", "aan"])
    with pytest.raises(ValueError, match="no part 'aam': one of listops, aan"): extract_lra(archive, tmp_path, ["aam"])


@pytest.mark.parametrize("strip", [0, 1, 2])
def test_an_unpacked_release_in_each_nesting(tmp_path, strip):
    files = {"/".join(n.split("/")[strip:]): c for n, c in release().items() if not strip or n.startswith(INNER)}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for part in LRA:
        place = find_lra(tmp_path, part)
        if part.startswith("pathfinder"):
            assert (place / "curv_contour_length_14/imgs/0/0.png").read_bytes() == f"{INNER} {part[10:]}".encode()
        assert find_lra(place, part) == place                                # the folder itself may be named
    shutil.rmtree(find_lra(tmp_path, "pathfinder64") / "curv_contour_length_14/imgs")
    with pytest.raises(ValueError, match="holds pathfinder64 without curv_contour_length_14/imgs.*: complete it or"):
        find_lra(tmp_path, "pathfinder64")


def test_the_bad_pathfinder_alone_is_not_taken(tmp_path):
    place = tmp_path / "lra_release/pathfinder128/curv_contour_length_14"
    for name in ("metadata/0.npy", "imgs/0/0.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(b"x")
    assert find_lra(tmp_path, "pathfinder128") is None
