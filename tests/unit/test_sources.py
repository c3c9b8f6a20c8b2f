"""Sources: the same samples from HTTP (a real nginx), S3 and several folders; faults mended or named; the cache."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from listen_dist.config import set_addresses
from listen_dist.data import remote, shard_cache
from listen_dist.data.remote import HttpFolder, SourceError, StoreFolder
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import ShardIndex
from listen_dist.data.sources import hosts_of
from listen_dist.schema import ConfigError, DataConfig
from tests import tiny
from tests.serving import STALL, FaultyProxy, Nginx, find_nginx, serve

pytestmark = pytest.mark.timeout(120)

NET = DataConfig(timeout_seconds=20.0, retries=3)
SETS = {"a": tiny.speech_records(12, "a"), "b": tiny.speech_records(7, "b")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Nginx]:
    """nginx over two sets, `a` (three shards) and `b` (two)."""
    root = tmp_path_factory.mktemp("www")
    for name, records in SETS.items():
        tiny.write_set(root / name, records)
    binary = find_nginx(pytestconfig.cache.mkdir("nginx"))
    with serve(binary, root, tmp_path_factory.mktemp("nginx") / "run") as nginx:
        yield nginx


@pytest.fixture
def nginx(server: Nginx) -> Nginx:
    server.forget()
    shard_cache._refused.clear()
    return server


@pytest.fixture
def proxy(nginx: Nginx) -> Iterator[FaultyProxy]:
    remote._session.cache_clear()  # a kept connection would pass the proxy's next fault by
    with FaultyProxy(nginx.port) as proxy:
        yield proxy
        proxy.shutdown()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses before retries, not slept through."""
    taken: list[float] = []
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=taken.append))
    return taken


def everything(index: ShardIndex) -> dict[str, np.ndarray]:
    """id → waveform of every sample."""
    samples = [index.read_sample(shard, row) for shard, entry in enumerate(index.shards)
               for row in range(entry.samples)]
    assert all(sample.waveform is not None for sample in samples)
    return {sample.record.id: sample.waveform for sample in samples if sample.waveform is not None}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)


# --- what works --------------------------------------------------------------------------------------


def test_http_gives_the_samples_of_the_folder_with_one_range_request_each(nginx: Nginx) -> None:
    local, index = ShardIndex.load(nginx.root / "a"), ShardIndex.load(nginx.url("a"), NET)
    assert index.fingerprint == local.fingerprint and str(index.folder) == nginx.url("a")
    index = pickle.loads(pickle.dumps(index))
    tables = [index.shard_table(number) for number in range(3)]
    nginx.forget()
    assert same(everything(index), everything(local))
    ranges = [f"{start}-{start + size - 1}" for table in tables
              for start, size in zip(table.offset, table.bytes, strict=True)]
    assert [(status, asked) for status, asked, _ in nginx.requests(12)] == [(206, asked) for asked in ranges]
    index.verify()


def test_braces_join_folders_from_anywhere(nginx: Nginx, tmp_path: Path) -> None:
    a, b = ShardIndex.load(nginx.root / "a"), ShardIndex.load(nginx.root / "b")
    path = f"{{{nginx.root}/a,{nginx.url('b')}}}"
    index = ShardIndex.load(path, NET)
    assert same(everything(index), everything(a) | everything(b))
    assert (index.samples, len(index.shards), str(index.folder)) == (19, 5, path)
    assert index.tasks == {task: a.tasks[task] + b.tasks[task] for task in a.tasks}
    assert [str(index.folder / shard.name) for shard in index.shards[2:4]] == [
        f"{nginx.root}/a/shard-000002.tar", nginx.url("b/shard-000000.tar")]
    index.verify()
    for number in range(11):
        os.symlink(nginx.root / ("a" if number % 2 else "b"), tmp_path / f"part-{number:02d}")
    assert ShardIndex.load(f"{tmp_path}/part-{{08..10}}").samples == 7 + 12 + 7
    with pytest.raises(ShardError, match=r"part-11/index\.json: no such index"):
        ShardIndex.load(f"{tmp_path}/part-{{10..11}}")


def test_s3_and_memory_through_fsspec(nginx: Nginx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    boto3, server = pytest.importorskip("boto3"), pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.get_host_and_port()[1]}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(key, "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="shards")
        for file in (nginx.root / "b").iterdir():
            client.put_object(Bucket="shards", Key=f"sets/b/{file.name}", Body=file.read_bytes())
        local = ShardIndex.load(nginx.root / "b")
        for data in (NET, replace(NET, cache_dir=str(tmp_path / "cache"))):
            index = ShardIndex.load("s3://shards/sets/b", data)
            assert same(everything(index), everything(local))
        client.delete_object(Bucket="shards", Key="sets/b/shard-000001.tar")
        with pytest.raises(ShardError, match=r"s3://shards/sets/b/shard-000001\.tar: sample .* missing"):
            ShardIndex.load("s3://shards/sets/b", NET).read_sample(1, 0)
        with pytest.raises(ShardError, match=r"s3://shards/nowhere/index\.json: no such index"):
            ShardIndex.load("s3://shards/nowhere", NET)
    finally:
        store.stop()
    memory = StoreFolder("memory://set", 0, 1.0)
    remote._store("memory", os.getpid()).pipe("/set/x.tar", bytes(range(200)))
    assert memory.read_range(remote.PinnedFile("x.tar", 200, ""), 7, 90) == bytes(range(7, 97))
    assert memory.read_file("x.tar", 200) == bytes(range(200))
    with pytest.raises(ShardError, match="longer than the 199 bytes"):
        memory.read_file("x.tar", 199)


@pytest.mark.parametrize(("path", "message"), [
    ("pipe:curl evil | sh", "'pipe:' is no source"), ("ftp://host/x", "'ftp:' is no source"),
    ("file:///etc", "'file:' is no source"), ("simplecache::s3://b/x", "'simplecache:' is no source"),
    ("http:host", "'http:' is no source"), ("{/a,pipe:id}", "'pipe:' is no source"),
    ("https://me:secret@host/x", "holds no password"), ("https://host/x?token=1", r"no '\?'"),
    ("/a/{00..03", "a brace without its pair"), ("/a/{x,x}", "names a folder twice"),
])
def test_other_addresses_are_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_addresses(path)


def test_a_missing_client_of_a_store_is_named() -> None:
    with pytest.raises(SourceError, match=r"gs://.*pip install 'listen_dist\[gs\]'"):
        if "gcsfs" in {p.name.split("-")[0] for p in Path(np.__file__).parents[1].iterdir()}:
            pytest.skip("gcsfs is installed")
        ShardIndex.load("gs://bucket/set", NET)


# --- faults ------------------------------------------------------------------------------------------


def test_a_dropped_connection_goes_on_at_the_byte_reached(nginx: Nginx, proxy: FaultyProxy,
                                                          pauses: list[float]) -> None:
    content = (nginx.root / "a/shard-000000.tar").read_bytes()
    file = remote.PinnedFile("shard-000000.tar", len(content), "")
    proxy.faults = [20_000, 0, 30_000, 2_000]
    folder = HttpFolder(proxy.url("a"), 4, 20.0)
    end = 5_000 + 100_000
    assert folder.read_range(file, 5_000, 100_000) == content[5_000:end]
    starts, ends = zip(*(map(int, asked.split("-")) for _, asked, _ in nginx.requests(4)), strict=True)
    assert set(ends) == {end - 1} and len(pauses) == 4
    # What the proxy let through (the second time not even the request), less an answer's head each time.
    reached = [5_000, 25_000, 55_000, 57_000]
    assert all(at - 3_000 < start <= at for start, at in zip(sorted(starts), reached, strict=True)), starts


def test_a_busy_server_is_asked_again(nginx: Nginx) -> None:
    folder, content = HttpFolder(nginx.url("busy/b"), 4, 20.0), (nginx.root / "b/index.json").read_bytes()
    for number in range(1, 21):  # nginx refuses what comes within half a second of the last
        assert folder.read_file("index.json", 10**6) == content
        if 503 in (statuses := [status for status, _, _ in nginx.requests(number)]):
            break
    # The answer that ended the last read may not be in the log yet.
    statuses = [status for status, _, _ in nginx.requests(number + statuses.count(503))]
    assert 503 in statuses and statuses[-1] == 200


def test_hosts_of_a_set(tmp_path: Path) -> None:
    assert hosts_of(f"{{{tmp_path},http://host:81/a,s3://bucket/b/c}}") == ["host:81", "bucket"]
    assert hosts_of(str(tmp_path)) == []


def test_pauses_double_and_the_error_names_shard_and_cause(nginx: Nginx, pauses: list[float]) -> None:
    remote.take_retries()
    file = remote.PinnedFile("shard-000000.tar", 9, "")
    with pytest.raises(SourceError, match=r"^http://127.*/broken/shard-000000\.tar: 6 tries in a row failed, the "
                                          r"last at byte 0: HTTP 500 Internal Server Error\. Start again"):
        HttpFolder(nginx.url("broken"), 5, 20.0).read_range(file, 0, 9)
    assert remote.take_retries() == {f"127.0.0.1:{nginx.port}": 5} and remote.take_retries() == {}
    assert all(0.75 * 0.5 * 2**i <= pause <= 0.5 * 2**i for i, pause in enumerate(pauses)) and len(pauses) == 5
    assert len(nginx.requests(6)) == 6
    with pytest.raises(SourceError, match=r"closed/shard-000000\.tar: 2 tries .*RemoteDisconnected"):
        HttpFolder(nginx.url("closed"), 1, 20.0).read_range(file, 0, 9)
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1/shard-000000\.tar: 2 tries .*Connection refused"):
        HttpFolder("http://127.0.0.1:1", 1, 20.0).read_range(file, 0, 9)


def test_a_server_that_stalls(proxy: FaultyProxy, pauses: list[float], nginx: Nginx) -> None:
    content = (nginx.root / "b/index.json").read_bytes()
    folder = HttpFolder(proxy.url("b"), 1, 0.5)
    proxy.faults = [STALL]
    assert folder.read_file("index.json", 10**6) == content
    remote._session.cache_clear()
    proxy.faults = [STALL, STALL]
    with pytest.raises(SourceError, match=r"/b/index\.json: 2 tries in a row failed.*timed out"):
        folder.read_file("index.json", 10**6)


def test_a_slow_server_is_waited_for(nginx: Nginx) -> None:
    content = (nginx.root / "a/shard-000000.tar").read_bytes()
    size = 160 * 1024  # 64 KiB a second: longer than the time-out, but never silent for so long
    file = remote.PinnedFile("shard-000000.tar", len(content), "")
    assert HttpFolder(nginx.url("slow/a"), 0, 1.5).read_range(file, 0, size) == content[:size]
    assert [status for status, _, _ in nginx.requests(1)] == [206]


def test_what_no_retry_mends(nginx: Nginx, pauses: list[float], tmp_path: Path) -> None:
    index = ShardIndex.load(nginx.url("b"), NET)
    gone = replace(index, shards=tuple(replace(shard, name="shard-000009.tar") for shard in index.shards))
    with pytest.raises(ShardError, match=r"b/shard-000000\.tar: sample .* 5 bytes long|missing \(HTTP 404"):
        folder = HttpFolder(nginx.url("b"), 3, 20.0)
        folder.read_range(gone.shards[0].tar, 0, 10)
    with pytest.raises(ShardError, match=r"nowhere/index\.json: no such index"):
        ShardIndex.load(nginx.url("nowhere"), NET)
    with pytest.raises(SourceError, match=r"private/index\.json: HTTP 403 Forbidden; check the address"):
        ShardIndex.load(nginx.url("private"), NET)
    with pytest.raises(SourceError, match="does not honour byte ranges; set data.cache_dir"):
        HttpFolder(nginx.url("whole/b"), 3, 20.0).read_range(index.shards[0].tar, 512, 10)
    entry = index.shards[0]
    for change in (-1, 1):
        with pytest.raises(ShardError, match=f"{entry.bytes} bytes long, the index says {entry.bytes + change}"):
            folder.read_range(replace(entry.tar, bytes=entry.bytes + change), 0, 10)
    with pytest.raises(ShardError, match="cut short: the server has no byte"):
        folder.read_range(replace(entry.tar, bytes=2 * entry.bytes), entry.bytes + 5, 10)
    assert pauses == []


# --- the cache ---------------------------------------------------------------------------------------


def cached(nginx: Nginx, folder: Path, gib: float = 1.0, path: str = "a") -> ShardIndex:
    return ShardIndex.load(nginx.url(path), replace(NET, cache_dir=str(folder), cache_gib=gib))


def read_all(index: ShardIndex, start: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    everything(index)


def test_four_processes_fetch_each_shard_once(nginx: Nginx, tmp_path: Path) -> None:
    index = cached(nginx, tmp_path / "cache")
    nginx.forget()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    children = [context.Process(target=read_all, args=(index, start)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(90)
        assert child.exitcode == 0
    tars = sorted(path for status, _, path in nginx.requests(3) if path.endswith(".tar"))
    assert tars == [f"/a/shard-{number:06d}.tar" for number in range(3)]
    assert {p.stem for p in (tmp_path / "cache").glob("*.tar")} == {shard.sha256 for shard in index.shards}
    nginx.forget()
    assert same(everything(index), everything(ShardIndex.load(nginx.root / "a")))
    cached(nginx, tmp_path / "cache").shard_table(0)
    assert [path for _, _, path in nginx.requests(1)] == ["/a/index.json"]  # the rest is here


def test_the_cache_keeps_its_limit_and_drops_what_was_used_longest_ago(nginx: Nginx, tmp_path: Path) -> None:
    sizes = [shard.bytes for shard in ShardIndex.load(nginx.root / "a").shards]
    limit = max(sizes[0] + sizes[1], sizes[0] + sizes[2]) + 4_000  # and the sidecars
    index = cached(nginx, tmp_path, limit / 2**30)
    held = lambda: {index.shards[i].sha256 for i in range(3)} & {p.stem for p in tmp_path.glob("*.tar")}  # noqa: E731
    for order, (shard, age) in enumerate([(0, 300), (1, 200), (0, 100)]):
        index.read_sample(shard, 0)
        os.utime(tmp_path / f"{index.shards[shard].sha256}.tar", (0, 10**9 - age)), order
    index.read_sample(2, 0)
    assert held() == {index.shards[0].sha256, index.shards[2].sha256}, "1 was used longest ago"
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= limit
    index.read_sample(1, 0)  # comes back
    assert index.shards[1].sha256 in held()
    with pytest.raises(ShardError, match=r"shard-000000\.tar: .* GiB, more than data\.cache_gib = "):
        cached(nginx, tmp_path, 1e-6)


def test_a_killed_download_goes_on_and_a_wrong_one_is_refused(nginx: Nginx, tmp_path: Path) -> None:
    index = cached(nginx, tmp_path)
    entry = index.shards[0]
    good = (nginx.root / "a/shard-000000.tar").read_bytes()
    part = tmp_path / f"{entry.sha256}.{entry.bytes}.part"
    index.shard_table(0)
    part.write_bytes(good[:30_000])
    nginx.forget()
    index.read_sample(0, 0)
    assert nginx.requests(1) == [(206, f"30000-{entry.bytes - 1}", "/a/shard-000000.tar")] and not part.exists()
    copy = tmp_path / f"{entry.sha256}.tar"
    assert copy.read_bytes() == good
    copy.write_bytes(good[:-1])  # a disk that lost the end: fetched again
    index.read_sample(0, 0)
    assert copy.read_bytes() == good
    copy.unlink()
    part.write_bytes(b"x" * 30_000)
    nginx.forget()
    for _ in range(3):
        with pytest.raises(ShardError, match=r"shard-000000\.tar: sample .*sha256 differs from the index"):
            index.read_sample(0, 0)
    assert len(nginx.requests(1)) == 1 and not part.exists() and not copy.exists()


def test_the_cache_serves_where_ranges_are_not_honoured(nginx: Nginx, proxy: FaultyProxy, pauses: list[float],
                                                        tmp_path: Path) -> None:
    data = replace(NET, cache_dir=str(tmp_path))
    index = ShardIndex.load(proxy.url("whole/a"), data)
    index.shard_table(0)
    remote._session.cache_clear()
    proxy.faults = [50_000]  # what had come is asked for again, and left out
    index.read_sample(0, 0)
    assert (tmp_path / f"{index.shards[0].sha256}.tar").read_bytes() == (nginx.root / "a/shard-000000.tar").read_bytes()
    assert len(pauses) == 1 and [path for _, _, path in nginx.requests(4)][-2:] == ["/whole/a/shard-000000.tar"] * 2


def test_a_cache_that_can_not_be_written_is_named(nginx: Nginx, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match=r"data\.cache_dir = .*file/cache.*needs a folder on this node's disk"):
        cached(nginx, tmp_path / "file/cache").read_sample(0, 0)
