"""Guarantees of a prepared store: whole or not at all, the same bytes again, damage named."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import random_samples
from hypothesis import given, settings
from hypothesis import strategies as st

from htnet import files
from htnet.data.samples import Sample, SampleId
from htnet.data.store.manifest import SCHEMA, file_stem, manifest_digest, read_manifest, write_manifest
from htnet.data.store.reader import FORMAT_VERSION, Store, open_store
from htnet.data.store.writer import PreparedSample, remove_leftovers, staging, write_part, write_store
from htnet.errors import InputError

RECIPE = {"sources": [{"adapter": "made up"}]}
LANDMARKS = ((9.25, 11.0), (21.0, 10.0), (15.0, 17.0), (10.0, 21.0), (20.0, 21.5))


def prepared(dataset="samm", subject="006", clip="006_1_2", label=0, size=8, frames=(), **facts) -> PreparedSample:
    rng = np.random.default_rng([*dataset.encode(), *subject.encode(), *clip.encode()])
    return PreparedSample(
        sample=Sample(
            id=SampleId(dataset=dataset, subject=subject, clip=clip),
            label=label,
            landmarks=LANDMARKS,
            flow_size=size,
            **facts,
        ),
        flow_image=rng.integers(0, 256, (size, size, 3)).astype(np.float16),
        frames=frames,
    )


def some_samples() -> list[PreparedSample]:
    return [
        prepared("smic", "s01", "s1_ne_01", 0, fps=100.0, onset=1, apex=5, offset=9, emotion="negative"),
        prepared("casme2", "sub01", "EP02_01f", 1, frames=(("onset.jpg", b"first"), ("apex.jpg", b"second"))),
        prepared("smic", "s01", "s1_ne_02", 2),
        prepared("casme2", "sub02", "EP19", 2),
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_sample(found: Sample, expected: Sample) -> bool:
    return found == replace(expected, landmarks=found.landmarks) and np.allclose(found.landmarks, expected.landmarks)


@pytest.fixture
def store(tmp_path) -> Store:
    return write_store(tmp_path / "store", iter(some_samples()), RECIPE)


def edit_record(store: Store, **changes) -> None:
    path = store.path / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_store_reads_back_as_it_was_written(store):
    opened = open_store(store.path)
    assert opened == store
    assert opened.recipe == RECIPE
    # sorted by dataset and subject; a subject's samples keep their order
    order = [1, 3, 0, 2]
    for row, number in enumerate(order):
        item = some_samples()[number]
        assert same_sample(opened.samples[row], item.sample)
        assert np.array_equal(opened.read_flow(row), item.flow_image)
        assert opened.read_flow(row).dtype == np.float16
    assert opened.read_member(0, "apex.jpg") == b"second"
    with pytest.raises(InputError, match=r"casme2/sub02/EP19 has no apex\.jpg"):
        opened.read_member(1, "apex.jpg")


def test_the_order_of_subjects_changes_no_byte(tmp_path, store):
    """The same input gives the same bytes, whatever the order of subjects."""
    samples = some_samples()
    other = write_store(tmp_path / "other", iter([samples[3], samples[0], samples[2], samples[1]]), RECIPE)
    assert content(other.path) == content(store.path)
    assert other.digest == store.digest


def test_the_digest_changes_with_pixels_labels_and_landmarks(tmp_path, store):
    first, *rest = some_samples()
    changed = {
        "pixel": replace(first, flow_image=first.flow_image + np.float16(1)),
        "label": replace(first, sample=replace(first.sample, label=1)),
        "point": replace(first, sample=replace(first.sample, landmarks=((9.5, 11.0), *LANDMARKS[1:]))),
    }
    digests = {write_store(tmp_path / name, iter([item, *rest]), RECIPE).digest for name, item in changed.items()}
    assert len(digests | {store.digest}) == 4


def test_a_shard_is_a_tar_with_webdataset_names(store):
    assert sorted(name for name in content(store.path) if name.endswith(".tar")) == [
        "shards/casme2/sub01.tar",
        "shards/casme2/sub02.tar",
        "shards/smic/s01.tar",
    ]
    with tarfile.open(store.path / "shards/smic/s01.tar") as tar:
        assert tar.getnames() == ["s1_ne_01.flow.npy", "s1_ne_01.json", "s1_ne_02.flow.npy", "s1_ne_02.json"]
        facts = json.load(tar.extractfile("s1_ne_02.json"))
        flow = np.load(io.BytesIO(tar.extractfile("s1_ne_02.flow.npy").read()), allow_pickle=False)
    assert facts == {"dataset": "smic", "subject": "s01", "clip": "s1_ne_02", "label": 2, "notes": []}
    assert np.array_equal(flow, some_samples()[2].flow_image)
    with tarfile.open(store.path / "shards/casme2/sub01.tar") as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {"EP02_01f"}
        assert tar.extractfile("EP02_01f.onset.jpg").read() == b"first"


def test_the_manifest_knows_where_every_member_lies(store):
    for row in store.rows:
        data = (store.path / row.shard).read_bytes()
        with tarfile.open(store.path / row.shard) as tar:
            for member, where in row.members.items():
                expected = tar.extractfile(f"{row.sample.id.clip}.{member}").read()
                assert data[where.start : where.start + where.bytes] == expected
                assert hashlib.sha256(expected).hexdigest() == where.sha256


odd_names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=40)


@settings(max_examples=25, deadline=None)
@given(clips=st.lists(odd_names, min_size=1, max_size=4, unique=True), subject=st.text("a./ é\\%~", min_size=1))
def test_any_clip_and_subject_name_is_kept(tmp_path_factory, clips, subject):
    path = tmp_path_factory.mktemp("odd") / "store"
    written = [prepared(clip=clip, subject=subject) for clip in clips]
    opened = write_store(path, iter(written), RECIPE)
    assert [sample.id.clip for sample in opened.samples] == clips
    assert {sample.id.subject for sample in opened.samples} == {subject}
    for row, item in enumerate(written):
        assert np.array_equal(opened.read_flow(row), item.flow_image)
    assert {path.parent / file for file in content(path.parent)} == {path / file for file in content(path)}


@pytest.mark.parametrize(
    "clip", ["a b", "EP02.01f", "a/b", "../../a", "é", "表情", "a" * 300, "a.flow.npy", "%41", " "]
)
def test_a_clip_with_an_odd_name_has_one_member_key_without_dots(tmp_path, clip):
    opened = write_store(tmp_path / "store", iter([prepared(clip=clip), prepared(clip="A")]), RECIPE)
    with tarfile.open(opened.path / opened.rows[0].shard) as tar:
        names = tar.getnames()
    assert [name.partition(".")[2] for name in names] == ["flow.npy", "json"] * 2
    assert not any("/" in name for name in names)
    assert len({name.partition(".")[0] for name in names}) == 2
    assert opened.samples[0].id.clip == clip


@settings(max_examples=100, deadline=None)
@given(odd_names, odd_names)
def test_different_names_never_share_a_file(one, other):
    assert (file_stem(one) == file_stem(other)) == (one == other)


@pytest.mark.parametrize(
    ("column", "name", "rule"),
    [
        ("clip", "EP1\nforged 1 1", r"'EP1\\nforged 1 1': the name of a clip must not hold"),
        ("dataset", "composite", "no dataset may be named 'composite'"),  # its scores would be everybody's
        ("dataset", "mine/2", "the name of a dataset must not hold a slash, got 'mine/2'"),
    ],
)
def test_a_manifest_with_a_confusable_name_is_refused(store, column, name, rule):
    """A store that an earlier version or another program wrote may hold such a name."""
    path = store.path / "manifest.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, pa.array([name] * len(table))), path)
    with pytest.raises(InputError, match=rf"manifest\.parquet: .*{rule}"):
        open_store(store.path)


def test_a_clip_given_twice_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="samm/006/006_1_2: duplicate clip"):
        write_store(tmp_path / "store", iter([prepared(), prepared(clip="x"), prepared()]), RECIPE)
    assert list(tmp_path.iterdir()) == []
    same_clip_elsewhere = [prepared(), prepared(subject="007"), prepared(dataset="smic")]
    assert len(write_store(tmp_path / "store", iter(same_clip_elsewhere), RECIPE).rows) == 3


def test_a_store_without_samples_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        write_store(tmp_path / "store", iter(()), RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_source_leaves_nothing(tmp_path):
    def failing():
        yield prepared()
        raise InputError("row 2 is bad")

    with pytest.raises(InputError, match="row 2"):
        write_store(tmp_path / "store", failing(), RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_store_is_never_written_over(tmp_path, store):
    before = content(store.path)
    with pytest.raises(InputError, match="is there already"):
        write_store(store.path, iter([prepared()]), RECIPE)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        write_store(tmp_path / "file", iter([prepared()]), RECIPE)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is there already"):
        write_store(tmp_path / "dangling", iter([prepared()]), RECIPE)
    assert content(store.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "store"]


@pytest.mark.parametrize("place", ["file/store", "/proc/htnet/store", f"{'n' * 300}"])
def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="the store cannot be written") as caught:
        write_store(tmp_path / place, iter([prepared()]), RECIPE)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_parent_is_one_sentence(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write_store(tmp_path / "closed" / "store", iter([prepared()]), RECIPE)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(InputError, match=r"store: the store cannot be written: .*no space left on the device"):
        write_store(tmp_path / "store", iter([prepared()]), RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_name_too_long_for_the_disk_is_one_sentence(tmp_path):
    """A subject whose name no file system holds is refused in one sentence."""
    with pytest.raises(InputError, match="File name too long"):
        write_store(tmp_path / "store", iter([prepared(subject="情" * 60)]), RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_other_files_and_folders_are_no_stores(tmp_path):
    """A missing folder, a file and another folder are no stores."""
    with pytest.raises(InputError, match="no such store; make it with htnet prepare"):
        open_store(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; a store is a folder"):
        open_store(tmp_path / "file")
    with pytest.raises(InputError, match="this folder is not a store"):
        open_store(tmp_path)


def test_a_store_of_a_newer_format_asks_for_an_update(store):
    edit_record(store, format=FORMAT_VERSION + 1, shards="changed meaning")
    with pytest.raises(InputError, match=r"store\.json: store format 3 is newer than this htnet reads \(2\); update"):
        open_store(store.path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\xff", '{"format": 1}', '{"format": "x"}', '{"format": 0}', '{"format": 1, "shards": []}']
)
def test_a_damaged_record_is_named(store, text):
    (store.path / "store.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"store\.json: not a store record"):
        open_store(store.path)


def test_a_truncated_a_longer_and_a_missing_shard_are_named(store):
    shard = store.path / "shards/smic/s01.tar"
    data = shard.read_bytes()
    for changed in (data[:-512], data[:1], b"", data + b"\0"):
        shard.write_bytes(changed)
        with pytest.raises(InputError, match=rf"s01\.tar: truncated or changed shard: {len(changed)} bytes, expected"):
            open_store(store.path)
    shard.unlink()
    with pytest.raises(InputError, match=r"shards/smic/s01\.tar: shard is missing"):
        open_store(store.path)
    with pytest.raises(InputError, match=r"s01\.tar: cannot be read: No such file"):
        store.read_flow(2)


def test_a_damaged_member_is_named_when_it_is_read(store):
    shard, where = store.path / store.rows[2].shard, store.rows[2].members["flow.npy"]
    data = bytearray(shard.read_bytes())
    data[where.start + 200] ^= 1
    shard.write_bytes(data)
    opened = open_store(store.path)
    with pytest.raises(InputError, match=r"s01\.tar: flow\.npy of smic/s01/s1_ne_01 is damaged: its checksum differs"):
        opened.read_flow(2)
    assert opened.read_flow(3).shape == (8, 8, 3)


def test_a_foreign_or_damaged_manifest_is_named(tmp_path, store):
    """A manifest of another store, a changed one and a damaged one are named."""
    manifest = store.path / "manifest.parquet"
    whole = manifest.read_bytes()
    write_manifest(manifest, store.rows[:-1])
    with pytest.raises(InputError, match=r"manifest\.parquet: does not belong to this store"):
        open_store(store.path)
    for damaged in (b"", whole[:-20], whole[:100], b"PAR1" + bytes(50) + b"PAR1"):
        manifest.write_bytes(damaged)
        with pytest.raises(InputError, match=r"manifest\.parquet: not a readable Parquet file"):
            open_store(store.path)
    pq.write_table(pq.read_table(io.BytesIO(whole)).drop_columns(["label", "shard"]), manifest)
    with pytest.raises(InputError, match=r"missing column\(s\) label, shard"):
        open_store(store.path)
    empty = [None] * len(store.rows)
    table = pq.read_table(io.BytesIO(whole))
    place = SCHEMA.get_field_index("landmarks")
    pq.write_table(table.set_column(place, SCHEMA.field("landmarks"), pa.array(empty, SCHEMA.types[place])), manifest)
    with pytest.raises(InputError, match="holds a row that is no sample"):
        open_store(store.path)
    manifest.unlink()
    with pytest.raises(InputError, match="has no manifest; make it again"):
        open_store(store.path)


@pytest.mark.parametrize("shard", ["../outside.tar", "/etc/passwd", "shards/../../outside.tar"])
def test_a_shard_outside_the_store_is_refused(store, shard):
    rows = [replace(row, shard=shard) for row in store.rows]
    write_manifest(store.path / "manifest.parquet", rows)
    edit_record(store, digest=manifest_digest(rows), shards={})
    with pytest.raises(InputError, match="leads out of the store"):
        open_store(store.path)


def test_a_shard_that_the_record_does_not_list_is_refused(store):
    edit_record(store, shards={"shards/smic/s01.tar": (store.path / "shards/smic/s01.tar").stat().st_size})
    with pytest.raises(InputError, match=r"does not list the shard shards/casme2/sub01\.tar"):
        open_store(store.path)


def test_equal_rows_give_equal_manifests(tmp_path, store):
    for name in ("a", "b"):
        write_manifest(tmp_path / name, store.rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_manifest(tmp_path / "a") == store.rows


def test_frame_numbers_may_be_time_stamps(tmp_path, store):
    """Frame numbers that are time stamps are kept, and older tables read the same."""
    stamped = replace(store.rows[0].sample, onset=1699999999999, apex=1700000000199)
    write_manifest(tmp_path / "a", [replace(store.rows[0], sample=stamped)])
    assert read_manifest(tmp_path / "a")[0].sample == stamped
    table = pq.read_table(store.path / "manifest.parquet")
    for name in ("onset", "apex", "offset"):
        table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.int32()))
    pq.write_table(table, store.path / "manifest.parquet")
    assert open_store(store.path).rows == store.rows  # the digest agrees


def many() -> list[PreparedSample]:
    return [prepared(subject=f"{s:03d}", clip=f"{s:03d}_{c}", size=28) for s in range(30) for c in range(3)]


def write_slowly(path: Path, seconds: float, begun) -> None:
    """A writer that rests at every sync, so that kills fall between any two of its steps."""
    sync = files._sync

    def slow_sync(file):
        time.sleep(seconds)
        sync(file)

    files._sync = slow_sync
    begun.set()
    write_store(path, iter(many()), RECIPE)


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    # what this module imports, once instead of in every writer
    context.set_forkserver_preload(["pytest", "hypothesis", "htnet.data.store.writer"])
    return context


def test_a_late_part_does_not_bring_a_store_back(tmp_path):
    """A part that comes after its store was given up brings nothing back."""
    with staging(tmp_path / "store", RECIPE) as stage:
        stage.discard()
        with pytest.raises(FileNotFoundError):
            write_part(stage.folder, "samm", "006", [prepared()])
        assert not stage.folder.exists()


def started(processes, path: Path, seconds: float):
    """A writer process that is at work."""
    begun = processes.Event()
    writer = processes.Process(target=write_slowly, args=(path, seconds, begun))
    writer.start()
    assert begun.wait(60), "the writer did not start"
    return writer


def test_a_killed_writer_leaves_a_whole_store_or_none(tmp_path, processes):
    """A writer that is killed at any moment leaves a whole store or none."""
    undisturbed = content(write_store(tmp_path / "undisturbed", iter(many()), RECIPE).path)
    rng = np.random.default_rng()
    path, inside = tmp_path / "killed", 0
    for attempt in range(20):
        writer = started(processes, path, 0.002)
        time.sleep(float(rng.uniform(0, 0.25)))
        writer.kill()
        writer.join()
        inside += writer.exitcode == -signal.SIGKILL and (tmp_path / ".killed.partial").exists()
        if path.exists():
            assert content(path) == undisturbed, f"attempt {attempt}"
            open_store(path)
            shutil.rmtree(path)
        # mostly straight into the next kill, so that leftovers meet leftovers
        if attempt % 4 == 3:
            assert content(write_store(path, iter(many()), RECIPE).path) == undisturbed
            assert sorted(item.name for item in tmp_path.iterdir()) == ["killed", "undisturbed"]
            shutil.rmtree(path)
    assert inside >= 5, "the kills fell outside the writing"


def test_leftovers_of_dead_writers_alone_are_removed(tmp_path, processes):
    """Leftovers of a killed writer are removed, and those of a writer at work are not."""
    path = tmp_path / "store"
    writer = started(processes, path, 60)
    while not (tmp_path / ".store.partial").exists():
        time.sleep(0.01)
    remove_leftovers(path)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".store.lock", ".store.partial"]
    with pytest.raises(InputError, match="another htnet prepare is writing this store; wait for it"):
        write_store(path, iter(many()), RECIPE)
    assert sorted(item.name for item in tmp_path.iterdir()) == [".store.lock", ".store.partial"]
    writer.kill()
    writer.join()
    remove_leftovers(path)
    assert list(tmp_path.iterdir()) == []
    remove_leftovers(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_flow_that_is_not_finite_is_never_stored(tmp_path, value):
    """Flow that is not finite is refused when the store is made."""
    samples = list(random_samples(subjects=2))
    samples[3].flow_image[4, 5, 1] = value
    with pytest.raises(InputError, match=f"{samples[3].sample.id}: flow image must be finite"):
        write_store(tmp_path / "store", iter(samples), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_landmarks_that_are_not_finite_are_never_stored(tmp_path, value):
    """Landmarks that are not finite are refused when the store is made."""
    item = prepared()
    bad = replace(item, sample=replace(item.sample, landmarks=((value, 1.0), *LANDMARKS[1:])))
    with pytest.raises(InputError, match=f"{item.sample.id}: landmarks must be finite"):
        write_store(tmp_path / "store", iter([bad]), {})
    assert not list(tmp_path.iterdir())
