"""Guarantees of the command line: bad input is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import yaml
from test_htnet_release import CLIPS, PICTURES, make_release, write_labels

from htnet import __version__
from htnet.config import Config
from htnet.config.load import load_config, parse_yaml, validate_config
from htnet.config.plain import config_hash
from htnet.data.datasets.htnet_release import LABELS, LANDMARKS
from htnet.data.store.reader import FORMAT_VERSION, open_store
from htnet.errors import InputError
from htnet.rooms import check_rooms
from launch import cli
from launch.commands import doctor, prepare
from launch.run.folder import open_run

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("synth", "prepare", "sweep", "report", "doctor")


class Workplace:
    """A folder with a release, a configuration for it and the command line, heard to the file descriptor."""

    def __init__(self, path: Path, capfd) -> None:
        self.path, self.capfd = path, capfd
        self.release = make_release(path / "release")
        self.config, self.store = path / "c.yaml", path / "store"
        self.write()

    def write(self, **sections) -> None:
        sources = [{"adapter": "htnet_release", "root": str(self.release)}]
        plain = {"prepare": {"sources": sources}, "data": {"store": str(self.store)}, **sections}
        self.config.write_text(yaml.safe_dump(plain))

    def run(self, *arguments) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *self.capfd.readouterr()

    def refuses(self, command: str, *arguments) -> str:
        """The one line of a refusal; what lies in the folder is as before."""
        before = self.files()
        code, out, err = self.run(command, self.config, *arguments)
        assert code == 2
        assert out == ""
        assert err.startswith(f"htnet {command}: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert self.files() == before
        return err.rstrip("\n")

    def files(self) -> dict[str, int]:
        return {str(file): file.stat().st_mtime_ns for file in self.path.rglob("*") if file.is_file()}


@pytest.fixture
def work(tmp_path, capfd) -> Workplace:
    return Workplace(tmp_path, capfd)


@pytest.fixture
def stored(work) -> Workplace:
    assert work.run("prepare", work.config)[0] == 0
    return work


def program(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- the input of prepare


def test_a_missing_folder_is_named_with_its_key(work):
    message = work.refuses("prepare", "--set", f"prepare.sources.0.root={work.path / 'none'}")
    assert message == f"htnet prepare: prepare.sources: {work.path / 'none'}: no such folder (adapter htnet_release)"
    work.config.write_text("{}")
    assert work.refuses("prepare").endswith("prepare.sources: at least one source is needed, got none")


def test_a_missing_flow_file_is_named(work):
    (work.release / PICTURES / "006_006_1_2 .png").unlink()
    for options in ((), ("--dry-run",)):
        message = work.refuses("prepare", *options)
        assert f"{work.release / PICTURES / '006_006_1_2 .png'}: missing flow file of samm/006/006_1_2" in message


def test_a_label_outside_the_classes_is_named(work):
    write_labels(work.release, [*CLIPS[:3], (*CLIPS[3][:3], 3)])
    message = work.refuses("prepare")
    assert f"{work.release / LABELS}, row 5, column label: must be 0 (negative)" in message
    assert message.endswith("got '3'")


def test_a_duplicate_clip_is_named(work):
    write_labels(work.release, [*CLIPS, CLIPS[0]])
    assert "row 6: duplicate clip casme2/sub01/EP02_01f: row 2 holds it already" in work.refuses("prepare")


def test_a_clip_of_two_sources_is_named(work):
    source = {"adapter": "htnet_release", "root": str(work.release)}
    work.write(prepare={"sources": [source, source]})
    expected = f"row 2: clip casme2/sub01/EP02_01f is in two sources: also {work.release / LABELS}"
    assert expected in work.refuses("prepare")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_an_unreadable_picture_is_named_and_no_library_speaks(work, damage):
    """An unreadable picture is named, and no library speaks beside us."""
    path = work.release / PICTURES / "006_006_1_2 .png"
    path.write_bytes({"cut": path.read_bytes()[:-300], "empty": b"", "text": b"words"}[damage])
    message = work.refuses("prepare")
    assert message.startswith(f"htnet prepare: {path}: unreadable picture: not a PNG, damaged or truncated")


def test_missing_lists_are_named(work):
    (work.release / LANDMARKS).unlink()
    assert f"{work.release / LANDMARKS}: no such landmark table" in work.refuses("prepare")
    (work.release / LABELS).unlink()
    assert f"{work.release / LABELS}: no such file" in work.refuses("prepare")


def test_a_place_that_cannot_hold_a_store_is_named(work):
    message = work.refuses("prepare", "--out", work.config / "store")
    assert f"{work.config / 'store'}: the store cannot be written: " in message
    assert f"{work.config}: is a file" in work.refuses("prepare", "--out", work.config)
    assert "release/store.json: not found; this folder is not a store" in work.refuses("prepare", "--out", work.release)


# --- prepare, and again


def test_a_second_prepare_finds_the_store_up_to_date(work):
    """Prepare writes a store, and it says the second time that the store is up to date."""
    code, out, err = work.run("prepare", work.config)
    assert (code, err) == (0, "")
    assert all(name in out for name in ("casme2", "samm", "smic", "negative"))
    assert len(open_store(work.store).rows) == 4
    before = work.files()
    assert work.run("prepare", work.config) == (0, f"{work.store} is up to date: 4 samples\n", "")
    assert work.files() == before


def test_prepare_refuses_a_store_of_other_settings_or_input(stored):
    """Prepare refuses a store of other settings or input and says what differs."""
    expected = "holds a store made from other input or settings (flow.size differ); remove it or choose"
    assert expected in stored.refuses("prepare", "--set", "prepare.flow_size=56")
    picture = np.zeros((28, 28, 3), np.uint8)
    picture[:14] = 255
    cv2.imwrite(str(stored.release / PICTURES / "006_006_1_2 .png"), picture)
    assert "(sources differ)" in stored.refuses("prepare")
    assert "(sources differ)" in stored.refuses("prepare", "--dry-run")
    assert stored.run("prepare", stored.config, "--out", stored.path / "other")[0] == 0


def test_prepare_removes_what_a_killed_one_left(stored):
    (stored.path / ".store.lock").touch()
    (stored.path / ".store.partial").mkdir()
    assert stored.run("prepare", stored.config)[0] == 0
    assert sorted(item.name for item in stored.path.iterdir()) == ["c.yaml", "release", "store", "store.prepare.json"]
    (stored.path / ".new.partial").mkdir()
    assert stored.run("prepare", stored.config, "--out", stored.path / "new")[0] == 0
    assert not (stored.path / ".new.partial").exists()


@pytest.mark.parametrize("name", ["a [bold]b", "x[/y]", "long " * 30])
def test_names_of_folders_are_shown_as_they_are(work, name):
    out = work.path / name.strip()
    assert f"would write {out}: 4 clips\n" in work.run("prepare", work.config, "--out", out, "--dry-run")[1]
    assert work.run("prepare", work.config, "--out", out)[0] == 0
    assert work.run("prepare", work.config, "--out", out) == (0, f"{out} is up to date: 4 samples\n", "")


def test_synthetic_data_suit_the_demo_configuration(tmp_path, capsys):
    """Synthetic data go through prepare with the demo configuration."""
    assert cli.main(["synth", str(tmp_path / "raw"), "--subjects", "2", "--clips", "3"]) == 0
    names = ("casme2", "samm", "smic")
    roots = [f"prepare.sources.{n}.root={tmp_path / 'raw' / name}" for n, name in enumerate(names)]
    overrides = [part for root in roots for part in ("--set", root)]
    command = ["prepare", str(ROOT / "configs" / "demo.yaml"), *overrides, "--out", str(tmp_path / "store")]
    assert cli.main(command) == 0
    store = open_store(tmp_path / "store")
    assert {sample.id.dataset for sample in store.samples} == set(names)
    assert len(store.samples) == 18
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'store'} is up to date: 18 samples\n"
    assert cli.main(["synth", str(tmp_path / "none"), "--subjects", "0"]) == 2
    assert "subjects must be in 1..90, got 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- configuration


@pytest.mark.parametrize("command", ["prepare", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.lr=1"], "--set train.lr=1: train.lr: unknown key; known here: epochs, batch_size"),
        (["--set", "train.epochs=many"], "train.epochs: must be a valid integer, got 'many'"),
        (["--set", "train.learning_rate=.nan"], "train.learning_rate: must be a finite number, got nan"),
        (["--set", "model.image_size=30"], "model: image_size must be a multiple of patch_size, got 30 and 7"),
        (["--set", "model.patch_size=4"], "28 / 4 = 7 tokens per side and 4 blocks per side"),
        (["--set", "train.epochs"], "--set train.epochs: expected key.path=value"),
        (["--set", "train.epochs=[1"], "--set train.epochs=[1: not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line(work, command, arguments, message):
    out = ["--out", work.path / "out"]
    assert message in work.refuses(command, *out, *arguments)
    assert message in work.refuses(command, *out, "--dry-run", *arguments)
    assert message in work.refuses(command, *out, "--print-config", *arguments)


@pytest.mark.parametrize("command", ["prepare", "sweep"])
def test_a_wrong_configuration_has_a_line_per_error(work, command):
    """A wrong configuration file is named and has a line per error."""
    out = ["--out", work.path / "out"]
    work.write(modle={})
    assert f"{work.config}: modle: unknown key; known here: seed" in work.refuses(command, *out)
    work.config.write_text("seed: 1\nseed: 2\n")
    assert "the key 'seed' is given twice at line 2" in work.refuses(command, *out)
    work.write(model={"dim": "x", "heads": "y"})
    code, _, err = work.run(command, work.config, *out)
    assert code == 2
    assert err.splitlines() == [
        f"htnet {command}: {work.config}: model.{key}: must be a valid integer, got '{value}'"
        for key, value in (("dim", "x"), ("heads", "y"))
    ]
    work.config.unlink()
    assert work.refuses(command, *out) == f"htnet {command}: {work.config}: no such configuration file"


@pytest.mark.parametrize("command", ["prepare", "sweep"])
def test_a_printed_configuration_loads_again_and_nothing_is_done(work, command):
    overrides = ["--set", "train.learning_rate=5e-5", "--set", "model.depths=[1, 1, 2]"]
    before = work.files()
    code, out, err = work.run(command, work.config, *overrides, "--print-config", "--out", work.path / "out")
    assert (code, err) == (0, "")
    printed = validate_config(parse_yaml(out, "printed"), "printed")
    assert printed == load_config(work.config, overrides[1::2])
    assert printed.train.learning_rate == 5e-5
    assert work.files() == before


# --- the store, as sweep finds it


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(work):
    before = work.files()
    code, out, _ = work.run("prepare", work.config, "--dry-run")
    assert code == 0
    assert out.splitlines()[-1] == f"would write {work.store}: 4 clips"
    assert str(work.release) in out
    assert work.files() == before
    assert work.run("prepare", work.config)[0] == 0
    before = work.files()
    code, out, _ = work.run("sweep", work.config, "--dry-run", "--out", work.path / "run")
    assert code == 0
    assert "3 folds, 4 test samples" in out
    assert config_hash(load_config(work.config), open_store(work.store).digest) in out
    assert work.run("prepare", work.config, "--dry-run")[1].endswith(f"{work.store} is up to date: 4 samples\n")
    assert work.files() == before


def test_a_missing_store_is_named(work):
    message = work.refuses("sweep", "--out", work.path / "run")
    assert message == f"htnet sweep: {work.store}: no such store; make it with htnet prepare"


def test_a_store_of_a_newer_format_is_refused_by_every_command(stored):
    path = stored.store / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    expected = f"{path}: store format 99 is newer than this htnet reads ({FORMAT_VERSION}); update htnet"
    for arguments in (("prepare",), ("sweep", "--out", stored.path / "run")):
        assert stored.refuses(*arguments).endswith(expected)


def test_a_truncated_shard_is_refused_by_every_command(stored):
    shard = stored.store / "shards" / "samm" / "006.tar"
    shard.write_bytes(shard.read_bytes()[:-1024])
    for arguments in (("prepare",), ("sweep", "--out", stored.path / "run"), ("sweep", "--dry-run", "--out", "run")):
        assert f"{shard}: truncated or changed shard: {shard.stat().st_size} bytes" in stored.refuses(*arguments)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.datasets=[sam]", "data.datasets: 'sam' is not in"),
        ("data.subjects=[samm/007]", "data.subjects: 'samm/007' has no samples in"),
        ("data.datasets=[samm]", "LOSO needs at least two subjects, found 1"),
        ("data.validation_subjects=2", "2 of 2 training subjects of fold casme2/sub01 leaves none to train on"),
        ("model.num_classes=2", "samm/006/006_1_2 has label 2; model.num_classes=2"),
        ("model.in_channels=2", "model.in_channels: flow input has 3 channels"),
        ("data.input=frames", "has no onset.jpg: data.input=frames needs prepare.keep_frames=true"),
        ("engine.device=cuda", "engine.device=cuda needs resources.gpus_per_fold > 0"),
    ],
)
def test_settings_that_do_not_fit_the_store_make_no_run_folder(stored, override, message):
    """Settings that do not fit the store are refused before a run folder is made."""
    assert message in stored.refuses("sweep", "--out", stored.path / "run", "--set", override)


def test_a_gpu_asked_for_where_there_is_none_is_refused(stored, monkeypatch):
    """A stand-in for Ray tells of a node without a GPU, because starting one takes longer than all other tests here."""
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    machine = SimpleNamespace(init=lambda **_: None, nodes=lambda: [node], shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", machine)
    monkeypatch.setattr("launch.cluster._local_only", contextlib.nullcontext)
    for share, needed in (("1", "1"), ("0.25", "0.25")):
        options = ("--out", stored.path / "run", "--set", f"resources.gpus_per_fold={share}")
        code, _, err = stored.run("sweep", stored.config, *options)
        expected = f"resources.gpus_per_fold={needed}: no node has more than 0 GPU(s): no fold can run"
        assert (code, err) == (2, f"htnet sweep: {expected}\n")


# --- the run folder


def test_a_run_of_another_configuration_is_refused(stored):
    """A run of another configuration or store is refused, and the message says why."""
    run, config = stored.path / "run", load_config(stored.config)
    with open_run(run, config, open_store(stored.store)) as folder:
        (folder.path / "checkpoints").mkdir()
        (folder.path / "checkpoints" / "casme2__sub01.pt").touch()  # something was done here
    before = stored.files()
    changes = ["train.epochs=3", "seed=9", "data.validation_subjects=1", "resources.gpus_per_fold=1"]
    for override, key in ((change, change.partition("=")[0]) for change in changes):
        message = stored.refuses("sweep", "--out", run, "--set", override)
        assert f"{run}: this run belongs to another configuration: it differs in {key}; choose another" in message
    other = stored.path / "other"
    write_labels(stored.release, [*CLIPS[:3], (*CLIPS[3][:3], 1)])
    assert stored.run("prepare", stored.config, "--out", other)[0] == 0
    # keys that are no part of the identity are never the reason, beside a changed store neither
    for overrides in ((), ("data.cache_mb=1",), ("engine.device=cpu", "score.bootstrap=9", "resources.retries=9")):
        options = [part for override in overrides for part in ("--set", override)]
        message = stored.refuses("sweep", "--out", run, "--set", f"data.store={other}", *options)
        assert f"belongs to another configuration: the content of the store {other} differs; choose" in message
    message = stored.refuses("sweep", "--out", run, "--set", f"data.store={other}", "--set", "train.epochs=3")
    assert "it differs in train.epochs; choose" in message
    assert {name: stamp for name, stamp in stored.files().items() if str(run) in name} == {
        name: stamp for name, stamp in before.items() if str(run) in name
    }


def test_a_run_of_another_version_is_refused_as_such(stored):
    run = stored.path / "run"
    with open_run(run, load_config(stored.config), open_store(stored.store)) as folder:
        (folder.folds / "casme2__sub01.json").touch()
    path = run / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config_hash": "of before"}))
    message = stored.refuses("sweep", "--out", run)
    assert "belongs to another configuration: another version of htnet made it; choose another --out" in message


def test_a_run_in_which_nothing_was_done_may_be_taken_over(stored):
    store, config = open_store(stored.store), load_config(stored.config)
    for overrides in ((), ("seed=9",)):
        with open_run(stored.path / "run", load_config(stored.config, overrides), store) as folder:
            pass
    assert load_config(folder.path / "config.yaml").seed == 9 != config.seed


def test_a_folder_that_is_no_run_is_refused(stored):
    assert "is not empty and not a run" in stored.refuses("sweep", "--out", stored.release)
    assert f"{stored.config}: is a file" in stored.refuses("sweep", "--out", stored.config)
    code, _, err = stored.run("report", stored.path / "none")
    assert (code, err) == (2, f"htnet report: {stored.path / 'none'}: not a run: it holds no config.yaml\n")


def test_a_run_that_another_process_drives_is_refused(stored):
    run = stored.path / "run"
    with open_run(run, load_config(stored.config), open_store(stored.store)):
        message = stored.refuses("sweep", "--out", run)
    assert "another process is running this sweep" in message


# --- doctor


def test_the_doctor_shows_an_error_as_it_is_and_goes_on(monkeypatch, capsys):
    def broken():
        raise ValueError("[/dev/shm] too small")

    for name in ("_torch", "_dali", "_deepspeed", "_ray"):
        monkeypatch.setattr(doctor, name, broken)
    monkeypatch.setattr(doctor, "_triton", lambda: "[bold]3")
    monkeypatch.setattr(doctor, "machine_facts", lambda: {"processor": "[/a]"})
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert out.count("fails: ValueError: [/dev/shm] too small") == 4
    assert all(text in out for text in ("[bold]3", "[/a]"))


# --- the program itself


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"] if command is None else [command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: htnet {command or ''}".rstrip() in text
    if command is None:
        assert all(name in text for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"htnet {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["swep"], ["sweep"], ["prepare"], ["synth", "x", "--subjects", "two"]])
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("htnet")


def test_a_refusal_of_the_machine_has_no_traceback(work, monkeypatch):
    """A refusal of the machine is one line, and a defect of ours keeps its traceback."""

    def fails(error):
        def failing(*_, **__):
            raise error

        monkeypatch.setattr(prepare, "prepare", failing)

    fails(PermissionError(errno.EACCES, "Permission denied", "/somewhere"))
    assert work.refuses("prepare") == "htnet prepare: /somewhere: Permission denied"
    fails(OSError(errno.ENOSPC, "No space left on device", "/full"))
    assert work.refuses("prepare") == "htnet prepare: /full: No space left on device"
    for code, said in ((errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded")):
        fails(OSError(code, said))  # as write() and flush() say it, which know no name
        assert work.refuses("prepare") == f"htnet prepare: a file could not be written to its end: {said}"
    fails(OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        work.run("prepare", work.config)
    fails(FileNotFoundError(errno.ENOENT, "No such file or directory", "/forgotten"))
    with pytest.raises(FileNotFoundError):
        work.run("prepare", work.config)
    fails(KeyboardInterrupt())
    assert work.run("prepare", work.config) == (1, "", "htnet prepare: interrupted\n")


def test_the_program_prints_one_line_and_no_traceback(tmp_path):
    done = program("sweep", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"htnet sweep: {tmp_path / 'none.yaml'}: no such configuration file\n"
    assert list(tmp_path.iterdir()) == []


def test_the_program_starts_without_the_heavy_libraries(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    check = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
        "heavy = [name for name in ('torch', 'ray', 'deepspeed', 'nvidia.dali', 'cv2', 'pyarrow') "
        "if name in sys.modules]; sys.exit(f'imported {heavy}' if heavy else code)"
    )
    command = [sys.executable, "-c", check, "sweep", str(tmp_path / "c.yaml"), "--out", "x", "--print-config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert validate_config(parse_yaml(done.stdout, "printed"), "printed") == Config(seed=3)


def test_a_dry_run_looks_at_the_run_folder_and_writes_nothing(stored):
    before = stored.files()
    assert "is not empty and not a run" in stored.refuses("sweep", "--out", stored.release, "--dry-run")
    assert stored.run("sweep", stored.config, "--out", stored.path / "run", "--dry-run")[0] == 0
    assert stored.files() == before


def test_the_attention_variable_enters_the_configuration(stored, monkeypatch):
    """The attention variable becomes part of the configuration."""
    monkeypatch.setenv("HTNET_ATTENTION", "reference")
    code, out, _ = stored.run("sweep", stored.config, "--out", stored.path / "run", "--print-config")
    assert code == 0
    assert "attention_backend: reference" in out
    monkeypatch.setenv("HTNET_ATTENTION", "flash")
    message = stored.refuses("sweep", "--out", stored.path / "run")
    assert "HTNET_ATTENTION=flash: must be one of auto, reference" in message


@pytest.mark.slow
def test_bad_input_found_at_once_never_aborts_the_process(stored):
    # threads of a library that are still starting when the program ends abort it: seen in one of three runs
    command = [sys.executable, "-m", "launch.cli", "sweep", str(stored.config), "--out", str(stored.path / "run")]
    for _ in range(8):
        done = subprocess.run([*command, "--set", "data.datasets=[sam]"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


# --- other packages under our names


@pytest.mark.parametrize("name", ["kernels", "launch", "dali_pipelines"])
def test_a_foreign_package_under_our_name_is_one_line(tmp_path, name):
    """Hugging Face has a package ``kernels``, ROS one named ``launch``; the one found first wins, silently."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "htnet", "doctor"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"htnet: {name}: Python finds {tmp_path / name}, which is not htnet's own {ROOT / name}: ")
    assert "uninstall that package or take it off PYTHONPATH" in line


def test_a_foreign_package_over_our_files_is_named(monkeypatch):
    """Both were installed into one folder: it is ours by its place and the other's by some of its files."""
    other = SimpleNamespace(version="0.12.1", locate_file=lambda name: ROOT / name)
    monkeypatch.setattr("htnet.rooms._installed", lambda name: other if name == "kernels" else None)
    with pytest.raises(InputError, match=r"kernels: the package kernels 0\.12\.1 was installed over htnet's own files"):
        check_rooms()
    monkeypatch.undo()
    check_rooms()


def test_the_program_starts_by_its_name_too():
    done = subprocess.run(
        [sys.executable, "-m", "htnet", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"htnet {__version__}\n"
