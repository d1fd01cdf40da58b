"""Guarantees of configuration files: strict reading, clear errors, overrides, a stable identity."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import small_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

import htnet.config
from htnet.config import Config, DataConfig, FlipConfig, HTNetConfig, PrepareConfig, SourceConfig, TrainConfig
from htnet.config.load import load_config, parse_yaml, validate_config
from htnet.config.plain import changed_keys, config_hash, dump_config, to_plain
from htnet.config.reference import field_docs, reference
from htnet.errors import InputError
from htnet.model_folder import save_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SECTIONS = [kind for kind in vars(htnet.config).values() if dataclasses.is_dataclass(kind)]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path, text), overrides)
    return str(caught.value)


def leaves(plain, prefix=""):
    if not isinstance(plain, dict):
        return {prefix.rstrip("."): plain}
    return {key: value for name, part in plain.items() for key, value in leaves(part, f"{prefix}{name}.").items()}


@pytest.mark.parametrize("text", ["", "\n", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_is_the_default_configuration(tmp_path, text):
    assert load_config(written(tmp_path, text)) == Config()


@pytest.mark.parametrize(
    ("text", "number"), [("5e-5", 5e-5), ("1E-3", 1e-3), (".5e-1", 0.05), ("5.0e-5", 5e-5), ("3.e-2", 0.03), ("1", 1.0)]
)
def test_numbers_are_written_as_people_write_them(tmp_path, text, number):
    config = load_config(written(tmp_path, f"train:\n  learning_rate: {text}\n"))
    assert config.train.learning_rate == number
    assert isinstance(config.train.learning_rate, float)


@pytest.mark.parametrize("text", ["5e", "e5", "1e-5x", "v1e3", "sub01e5x"])
def test_a_name_that_resembles_a_number_stays_a_name(text):
    assert parse_yaml(f"a: {text}", "x") == {"a": text}


SPELLINGS = ["010", "00", "08", "-017", "0o17", "0x1f", "0b11", "1_000", "1:30", "190:20:30"]
"""Whole numbers in some version of YAML, and not the same one in every version."""
FRACTIONS = ["1:30.5", "1_000.5", "1_0e3", "20:30.25"]


@pytest.mark.parametrize("text", [*SPELLINGS, *FRACTIONS])
def test_no_number_is_read_as_another(tmp_path, text):
    for key, section, rule in (
        ("epochs", "train", "a valid integer"),
        ("learning_rate", "train", "a valid number"),
        ("flow_size", "prepare", "a valid integer"),
    ):
        said = f"{section}.{key}: must be {rule}, got {text!r}"
        assert refused(tmp_path, f"{section}: {{{key}: {text}}}") == f"{tmp_path / 'c.yaml'}: {said}"
        assert refused(tmp_path, "", f"{section}.{key}={text}") == f"--set {section}.{key}={text}: {said}"


@pytest.mark.parametrize(
    "text", [*SPELLINGS, *FRACTIONS, "2014-03-01", "2014-3-1", "2001-12-14 21:59:43.10", "2014-99-99"]
)
def test_a_subject_of_digits_stays_as_it_is_written(tmp_path, text):
    config = load_config(written(tmp_path, f"data: {{subjects: [{text}]}}"))
    assert config.data.subjects == (text,)
    assert load_config(written(tmp_path, ""), [f"data.subjects=[{text}]"]).data.subjects == (text,)
    again = dump_config(config)
    assert yaml.safe_load(again)["data"]["subjects"] == parse_yaml(again, "printed")["data"]["subjects"] == [text]


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "True", "FALSE", "~", "null", "7", "1e5", ".inf"])
def test_a_name_that_is_no_text_is_refused_until_it_is_quoted(tmp_path, text):
    assert "data.subjects.0: must be a valid string, got " in refused(tmp_path, f"data: {{subjects: [{text}]}}")
    assert load_config(written(tmp_path, f"data: {{subjects: ['{text}']}}")).data.subjects == (text,)


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("no", False), ("Yes", True), ("OFF", False), ("true", True)]
)
def test_switches_are_written_as_people_write_them(tmp_path, text, value):
    assert load_config(written(tmp_path, f"data: {{shuffle: {text}}}")).data.shuffle is value


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, text):
    assert "train.eps: must be a finite number" in refused(tmp_path, f"train: {{eps: {text}}}")


def test_an_anchor_may_be_merged_into_a_section(tmp_path):
    text = "train: &t {epochs: 3, batch_size: 7}\n"
    assert parse_yaml(f"{text}other:\n  <<: *t\n  epochs: 4\n", "x")["other"] == {"epochs": 4, "batch_size": 7}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' is given twice at line 2"),
        ("train:\n  epochs: 1\n  epochs: 1\n", "the key 'epochs' is given twice at line 3"),
        ("1: 2", "the key 1 is not a text: write it as '1' at line 1, column 1"),
        ("no: 2", "the key False is not a text: write it as 'no' at line 1, column 1"),
        ("? [a, b]\n: c", "the key ['a', 'b'] is not a text"),
        ("data: {subjects: [!!binary aGk=]}", "could not determine a constructor"),
        ("data: {subjects: !!set {a}}", "could not determine a constructor"),
        ("seed: !!int 010", "'010' is no plain int at line 1"),
        ("train: {epochs: !!int 1:30}", "'1:30' is no plain int at line 1"),
        ("train: {eps: !!float 1:30}", "'1:30' is no plain float at line 1"),
        ("data: {shuffle: !!bool maybe}", "'maybe' is no plain bool at line 1"),
        ("a: b: c", "mapping values are not allowed here at line 1, column 5"),
        ("a: [1", "expected ',' or ']'"),
        ("seed: !!int x", "'x' is no plain int"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("[" * 3000, "recursion"),
        ("a: \x00", "special characters are not allowed"),
        ("a: &a [*a]", "holds itself"),
        ("- a\n- b\n", "must hold a mapping of sections, got list"),
        ("just words", "must hold a mapping of sections, got str"),
    ],
)
def test_broken_configuration_text_is_one_line_with_the_file(tmp_path, text, rule):
    """Text that is no configuration is refused in one line that names the file."""
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'c.yaml'}: ")
    assert rule in message
    assert "\n" not in message


def test_unreadable_configuration_files_are_input_errors(tmp_path):
    """A missing file, a folder and binary data are input errors."""
    with pytest.raises(InputError, match=r"none\.yaml: no such configuration file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        load_config(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {}", "modle: unknown key; known here: seed, prepare, data, model"),
        ("train: {lr: 1}", "train.lr: unknown key; known here: epochs, batch_size, optimizer, learning_rate"),
        (
            "prepare: {sources: [{adapter: samm, root: r, path: p}]}",
            "prepare.sources.0.path: unknown key; known here: adapter, root, annotations, landmarks",
        ),
    ],
)
def test_an_unknown_key_names_the_known_ones(tmp_path, text, message):
    assert message in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: one", "seed: must be a valid integer, got 'one'"),
        ("seed: 1.0", "seed: must be a valid integer, got 1.0"),
        ("seed: true", "seed: must be a valid integer, got True"),
        ("seed: '1'", "seed: must be a valid integer, got '1'"),
        ("seed: .nan", "seed: must be a valid integer, got nan"),
        ("seed:", "seed: must be a valid integer, got None"),
        ("train: {learning_rate: .nan}", "train.learning_rate: must be a finite number, got nan"),
        ("train: {learning_rate: .inf}", "train.learning_rate: must be a finite number, got inf"),
        ("train: {learning_rate: 1e400}", "train.learning_rate: must be a finite number, got inf"),
        ("train: {learning_rate: fast}", "train.learning_rate: must be a valid number, got 'fast'"),
        ("train: {betas: [0.9, .nan]}", "train.betas.1: must be a finite number, got nan"),
        ("train: {betas: [0.9]}", "train.betas.1: must be given"),
        ("train: {betas: [0.9, 0.99, 0.999]}", "train.betas: too many items in the list, got [0.9, 0.99, 0.999]"),
        ("data: {shuffle: 1}", "data.shuffle: must be a valid boolean, got 1"),
        ("data: {store: 3}", "data.store: must be a folder or a list of folders, got 3"),
        ("data: {crop: up}", "data.crop: must be 'upstream' or 'anatomical', got 'up'"),
        ("data: {datasets: samm}", "data.datasets: must be a list, got 'samm'"),
        ("model: {depths: 2}", "model.depths: must be a list, got 2"),
        ("model: {depths: [2, a, 10]}", "model.depths.1: must be a valid integer, got 'a'"),
        ("model: 3", "model: must be a section of keys, got 3"),
        ("model:", "model: must be a section of keys, got None"),
        ("prepare: {sources: [{root: r}]}", "prepare.sources.0.adapter: must be given"),
        ("prepare: {sources: [r]}", "prepare.sources.0: must be a section of keys, got 'r'"),
    ],
)
def test_a_wrong_type_names_key_rule_and_value(tmp_path, text, message):
    assert refused(tmp_path, text) == f"{tmp_path / 'c.yaml'}: {message}"


def test_every_error_of_a_file_has_its_line(tmp_path):
    lines = refused(tmp_path, "seed: x\nmodel: {dim: y, heads: z}\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["seed", "model.dim", "model.heads"]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        *(
            (f"model.{name}", "0", "must be at least 1, got 0")
            for name in ("image_size", "patch_size", "dim", "heads", "levels", "mlp_ratio", "in_channels")
        ),
        ("seed", "-1", "must be at least 0, got -1"),
        ("seed", "2147483648", "must be less than 2147483648, got 2147483648"),
        ("model.num_classes", "-1", "must be at least 1, got -1"),
        ("model.depths.1", "0", "must be at least 1, got 0"),
        ("model.dropout", "1.0", "must be less than 1, got 1.0"),
        ("model.dropout", "-0.1", "must be at least 0, got -0.1"),
        ("prepare.flow_size", "7", "must be at least 8, got 7"),
        ("prepare.working_size", "31", "must be at least 32, got 31"),
        ("prepare.keep_neighbours", "101", "must be at most 100, got 101"),
        ("data.cache_mb", "-1", "must be at least 0, got -1"),
        ("data.validation_subjects", "-1", "must be at least 0, got -1"),
        ("data.augment.flip.probability", "1.5", "must be at most 1, got 1.5"),
        ("data.augment.rotate.degrees", "50", "must be at most 45, got 50"),
        ("data.augment.photometric.gamma", "0.5", "must be at least 1, got 0.5"),
        ("data.augment.mix.alpha", "0", "must be greater than 0, got 0"),
        ("train.epochs", "0", "must be at least 1, got 0"),
        ("train.learning_rate", "0", "must be greater than 0, got 0"),
        ("train.eps", "-1e-8", "must be greater than 0, got -1e-08"),
        ("train.weight_decay", "-1", "must be at least 0, got -1"),
        ("train.label_smoothing", "1.0", "must be less than 1, got 1.0"),
        ("train.betas.1", "1.0", "must be less than 1, got 1.0"),
        ("engine.threads", "0", "must be at least 1, got 0"),
        ("score.bootstrap", "-1", "must be at least 0, got -1"),
        ("resources.cpus_per_fold", "0", "must be greater than 0, got 0"),
        ("resources.gpus_per_fold", "-1", "must be at least 0, got -1"),
        ("resources.retries", "-1", "must be at least 0, got -1"),
        ("resources.stall_minutes", "-1", "must be at least 0, got -1"),
    ],
)
def test_a_value_out_of_bounds_names_key_and_rule(tmp_path, key, value, rule):
    assert refused(tmp_path, "", f"{key}={value}") == f"--set {key}={value}: {key}: {rule}"


@pytest.mark.parametrize(
    ("section", "text", "rule"),
    [
        ("model", "levels: 2", "levels=2, depths=(2, 2, 10)"),
        ("model", "depths: []", "levels=3, depths=()"),
        ("model", "dim: 2", "heads must not exceed dim, got heads=3, dim=2"),
        ("model", "image_size: 30", "image_size must be a multiple of patch_size, got 30 and 7"),
        ("model", "patch_size: 4", "28 / 4 = 7 tokens per side and 4 blocks per side"),
        ("prepare", "flow_size: 512", "working_size must not be smaller than flow_size, got 256 and 512"),
        ("train", "{epochs: 2, warmup_epochs: 3}", "warmup_epochs must not exceed epochs, got 3 and 2"),
        ("engine", "{precision: fp16, device: cpu}", "precision=fp16 needs a GPU, got device=cpu"),
        ("resources", "gpus_per_fold: 1.5", "gpus_per_fold above 1 must be whole, got 1.5"),
    ],
)
def test_keys_that_do_not_fit_together_are_named(tmp_path, section, text, rule):
    message = refused(tmp_path, f"{section}:\n  {text}\n")
    assert message.startswith(f"{tmp_path / 'c.yaml'}: {section}: ")
    assert rule in message


def test_made_in_python_a_section_is_checked_as_well():
    with pytest.raises(ValueError, match="less_than_equal"):
        FlipConfig(probability=2.0)
    with pytest.raises(ValueError, match="int_type"):
        TrainConfig(epochs=2.0)
    with pytest.raises(ValueError, match="Unexpected keyword argument"):
        TrainConfig(epoch=2)


def test_a_key_that_has_moved_names_its_new_place(tmp_path):
    message = refused(tmp_path, "score: {validation_subjects: 2}")
    assert message == f"{tmp_path / 'c.yaml'}: score.validation_subjects: moved: write data.validation_subjects"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (
            "model: {image_size: 35, patch_size: 35, levels: 1, depths: [1]}",
            "model.image_size must be even (a mosaic is 2 x 2 regions), got 35",
        ),
    ],
)
def test_rules_of_the_whole_configuration_are_named(tmp_path, text, rule):
    assert refused(tmp_path, text) == f"{tmp_path / 'c.yaml'}: {rule}"


def test_a_fraction_of_a_gpu_and_whole_gpus_are_taken(tmp_path):
    for share in ("0.25", "1", "2.0"):
        assert load_config(written(tmp_path, f"resources: {{gpus_per_fold: {share}}}"))


def test_overrides_set_values_lists_items_and_sections(tmp_path):
    path = written(tmp_path, "prepare:\n  sources:\n    - {adapter: samm, root: a}\nmodel: {dim: 24}\n")
    overrides = (
        "seed=7",
        "train.learning_rate=5e-5",
        "model.depths=[1, 1, 2]",
        "model.depths.2=4",
        "prepare.sources.0.root=/data/a b=c",
        "prepare.sources.0.landmarks=points.csv",
        "data.datasets=[samm, smic]",
        "score={bootstrap: 2}",
    )
    config = load_config(path, overrides)
    assert config.seed == 7
    assert config.train.learning_rate == 5e-5
    assert config.model == HTNetConfig(dim=24, depths=(1, 1, 4))
    assert config.prepare.sources == (SourceConfig(adapter="samm", root="/data/a b=c", landmarks="points.csv"),)
    assert config.data.datasets == ("samm", "smic")
    assert config.score.bootstrap == 2
    assert load_config(path, ["seed=1", "seed=2"]).seed == 2


def test_overrides_that_need_each_other_are_checked_together(tmp_path):
    config = load_config(written(tmp_path, ""), ["model.levels=2", "model.depths=[1, 1]"])
    assert config.model.blocks_per_side == (2, 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected key.path=value"),
        ("=3", "--set =3: expected key.path=value"),
        ("sed=3", "--set sed=3: sed: unknown key; known here: seed, prepare"),
        ("model..dim=3", "--set model..dim=3: model.: unknown key; known here: image_size"),
        ("modle.dim=3", "--set modle.dim=3: modle: unknown key; known here: seed, prepare"),
        ("seed.x=3", "--set seed.x=3: seed.x: the part before it is a value, not a section"),
        ("prepare.sources.0.root=a", "prepare.sources.0: expected the number of an item, the list has 0"),
        ("model.depths.x=1", "model.depths.x: expected the number of an item, the list has 3"),
        ("model.depths.²=1", "model.depths.²: expected the number of an item, the list has 3"),
        ("model.depths.-1=1", "model.depths.-1: expected the number of an item, the list has 3"),
        ("seed=[1", "--set seed=[1: not valid YAML"),
        ("seed=", "--set seed=: seed: must be a valid integer, got None"),
        ("seed=1\ntrain: 2", "not valid YAML"),
        ("model.dim=big", "--set model.dim=big: model.dim: must be a valid integer, got 'big'"),
        ("model.image_size=30", "--set model.image_size=30: model: image_size must be a multiple of patch_size"),
    ],
)
def test_an_override_that_is_wrong_is_named_instead_of_the_file(tmp_path, override, message):
    found = refused(tmp_path, "", override)
    assert message in found
    assert "c.yaml" not in found


# without control characters and line separators, which no path has and PyYAML does not give back
names = (
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
    | st.text("0123456789_:.+-eEoxb", max_size=8)
    | st.sampled_from(
        [*SPELLINGS, *FRACTIONS, "2014-03-01", "no", "~", "null", "=", "<<", ".inf", ".nan", "yes", "Off"]
    )
)
configs = st.builds(
    Config,
    seed=st.integers(0, 2**31 - 1),
    prepare=st.builds(
        PrepareConfig,
        sources=st.lists(
            st.builds(SourceConfig, adapter=st.sampled_from(["samm", "smic"]), root=names, landmarks=st.none() | names),
            max_size=2,
        ).map(tuple),
        keep_frames=st.booleans(),
    ),
    data=st.builds(DataConfig, store=names, datasets=st.lists(names, max_size=3).map(tuple), shuffle=st.booleans()),
    model=st.builds(HTNetConfig, depths=st.tuples(*[st.integers(1, 20)] * 3), dropout=st.floats(0, 0.99)),
    train=st.builds(
        TrainConfig,
        learning_rate=st.floats(1e-300, 1e300),
        weight_decay=st.floats(0, 1e20),
        betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(configs)
@example(Config(data=DataConfig(store="-.5")))  # a name that reads as a number
def test_a_printed_configuration_reads_back_equal(config):
    again = validate_config(parse_yaml(dump_config(config), "printed"), "printed")
    assert again == config
    assert yaml.safe_load(dump_config(config)) == to_plain(config)  # a reader of YAML 1.1
    assert dump_config(again) == dump_config(config)
    assert config_hash(again, "d") == config_hash(config, "d")


OTHER = {
    "seed": 1,
    "prepare.sources": [{"adapter": "samm", "root": "a"}],
    "prepare.label_scheme": "5class",
    "prepare.official_list": "list.csv",
    "prepare.flow_size": 56,
    "prepare.flow_method": "dis",
    "prepare.working_size": 128,
    "prepare.strain": "sobel",
    "prepare.head_motion": "median",
    "prepare.detector": "mtcnn",
    "prepare.detector_model": "yunet.onnx",
    "prepare.landmark_failures": "error",
    "prepare.device": "cpu",
    "prepare.threads": 2,
    "prepare.gpus_per_task": 0.5,
    "prepare.retries": 1,
    "prepare.keep_frames": True,
    "prepare.keep_neighbours": 2,
    "data.store": "elsewhere",
    "data.datasets": ["samm"],
    "data.subjects": ["samm/006"],
    "data.validation_subjects": 1,
    "data.validation_datasets": ["samm"],
    "data.crop": "upstream",
    "data.scaling": "stored",
    "data.standardise": False,
    "data.shuffle": False,
    "data.balance": "class",
    "data.input": "frames",
    "data.cache_mb": 0,
    "data.augment.flip.probability": 0.5,
    "data.augment.rotate.degrees": 5.0,
    "data.augment.jitter.shift": 0.1,
    "data.augment.jitter.scale": 0.1,
    "data.augment.magnify.low": 0.5,
    "data.augment.magnify.high": 2.0,
    "data.augment.drop_region.probability": 0.5,
    "data.augment.photometric.brightness": 0.1,
    "data.augment.photometric.contrast": 0.1,
    "data.augment.photometric.gamma": 1.5,
    "data.augment.photometric.blur": 1.0,
    "data.augment.photometric.noise": 2.0,
    "data.augment.time_jitter.frames": 1,
    "data.augment.mix.kind": "mixup",
    "data.augment.mix.alpha": 0.5,
    "model.image_size": 56,
    "model.patch_size": 1,
    "model.dim": 24,
    "model.heads": 4,
    "model.levels": 3,
    "model.depths": [1, 1, 1],
    "model.mlp_ratio": 2,
    "model.in_channels": 2,
    "model.num_classes": 5,
    "model.dropout": 0.1,
    "model.position": "channel",
    "model.attention_backend": "sdpa",
    "train.epochs": 1,
    "train.batch_size": 1,
    "train.optimizer": "adam",
    "train.learning_rate": 0.5,
    "train.weight_decay": 0.5,
    "train.betas": [0.5, 0.5],
    "train.eps": 0.5,
    "train.schedule": "cosine",
    "train.warmup_epochs": 2.0,
    "train.clip_norm": 1.0,
    "train.label_smoothing": 0.1,
    "train.class_weights": "balanced",
    "train.init": "models/other",
    "train.ema": 0.99,
    "train.patience": 3,
    "engine.name": "torch",
    "engine.precision": "bf16",
    "engine.device": "cpu",
    "engine.threads": 2,
    "score.bootstrap": 3,
    "score.chance_trials": 3,
    "scale.workers": 2,
    "scale.cpus_per_worker": 2.0,
    "scale.gpus_per_worker": 1.0,
    "scale.zero": 1,
    "scale.micro_batch": 8,
    "scale.checkpoint_activations": True,
    "scale.keep_snapshots": 1,
    "scale.look_steps": 1,
    "logging.tensorboard": True,
    "logging.mlflow": "runs/mlflow",
    "resources.cpus_per_fold": 2.0,
    "resources.gpus_per_fold": 1.0,
    "resources.max_parallel_folds": 1,
    "resources.checkpoint_minutes": 1.0,
    "resources.retries": 1,
    "resources.stall_minutes": 1.0,
    "resources.keep_models": True,
    "resources.mixed_devices": True,
    "resources.slots_per_gpu": 2,
}
"""A valid other value for every key; a new key has to be added here, and thought about below."""
NEEDED = {
    "prepare.keep_neighbours": {"prepare.keep_frames": True},
    "data.augment.magnify": {"data.scaling": "stored"},  # minmax would undo it
    "data.augment.photometric": {"data.input": "frames"},
    "data.augment.time_jitter": {"data.input": "frames"},
}
"""What keys (or the sections of these names) cannot be set without."""


def set_value(plain: dict, key: str, value: object) -> None:
    *path, last = key.split(".")
    for part in path:
        plain = plain[part]
    plain[last] = value


def test_all_but_the_marked_keys_are_the_identity_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, config, facts = small_model()
    save_model(Path(OTHER["train.init"]), network.state_dict(), config, facts)  # its content counts, not its name
    assert OTHER.keys() == leaves(to_plain(Config())).keys()
    changes_nothing = set()
    for key, value in OTHER.items():
        base, plain = to_plain(Config()), to_plain(Config())
        for name, values in NEEDED.items():
            if key.startswith(name):
                for other, needed in values.items():
                    set_value(base, other, needed)
                    set_value(plain, other, needed)
        set_value(plain, key, value)
        if key == "model.levels":  # cannot change alone
            plain["model"].update(levels=2, depths=[2, 2])
        assert set(changed_keys(base, plain)) in ({key}, {"model.levels", "model.depths"}, set())
        if config_hash(validate_config(plain, key), "d") == config_hash(validate_config(base, key), "d"):
            changes_nothing.add(key)
    expected = {key for key in OTHER if key.split(".")[0] in ("prepare", "resources", "score", "scale", "logging")}
    expected |= {"data.store", "data.subjects", "data.cache_mb"}
    # the device is what counts: without a share of a GPU, "auto" is the CPU; with one, it is not
    assert changes_nothing == expected - {"resources.gpus_per_fold"} | {"engine.device"}


def test_the_identity_of_a_run_depends_on_its_store():
    """The identity of a run changes with the content of the store, and it is the same each time."""
    assert config_hash(Config(), "a") != config_hash(Config(), "b")
    assert config_hash(Config(), "a") == config_hash(replace(Config(), seed=0), "a")


def test_whole_numbers_and_their_decimal_form_are_one_identity(tmp_path):
    whole = load_config(written(tmp_path, "train: {weight_decay: 0, clip_norm: 1}"))
    decimal = load_config(written(tmp_path, "train: {weight_decay: 0.0, clip_norm: 1.0}"))
    assert config_hash(whole, "d") == config_hash(decimal, "d")


def test_changed_keys_names_the_paths_that_differ():
    new = replace(Config(), seed=1, model=HTNetConfig(dim=24, depths=(1, 1, 1)))
    assert changed_keys(to_plain(Config()), to_plain(new)) == ["seed", "model.dim", "model.depths"]
    assert changed_keys(to_plain(Config()), to_plain(Config())) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_load_and_print_back(path):
    config = load_config(path)
    assert config.prepare.sources
    assert validate_config(parse_yaml(dump_config(config), "printed"), "printed") == config


def test_paper_yaml_is_upstreams_setting_to_the_letter():
    config = load_config(CONFIGS / "paper.yaml")
    model, train, data = config.model, config.train, config.data
    assert (model.image_size, model.patch_size, model.dim, model.heads) == (28, 7, 256, 3)
    assert (model.levels, model.depths, model.mlp_ratio, model.num_classes) == (3, (2, 2, 10), 4, 3)
    assert [model.dim * 2**level for level in range(3)] == [256, 512, 1024]
    assert [model.heads * 2**level for level in range(3)] == [3, 6, 12]
    assert (model.in_channels, model.dropout, model.tokens_per_block) == (3, 0.0, 1)
    assert (train.optimizer, train.learning_rate, train.weight_decay) == ("adam", 5e-5, 0.0)
    assert (train.batch_size, train.epochs, train.schedule, train.warmup_epochs) == (256, 800, "constant", 0.0)
    assert (train.betas, train.eps, train.clip_norm) == ((0.9, 0.999), 1e-8, 0.0)
    assert (train.label_smoothing, train.class_weights) == (0.0, "none")
    assert (data.shuffle, data.crop, data.scaling, data.standardise) == (False, "upstream", "stored", False)
    assert (config.engine.precision, config.prepare.sources[0].adapter) == ("fp32", "htnet_release")


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_key_is_documented(kind):
    docs = field_docs(kind)
    assert list(docs) == [field.name for field in dataclasses.fields(kind)]
    assert all(text.strip() and "|" not in text for text in docs.values())


def test_the_reference_names_every_key_with_its_default():
    text = reference()
    for key in leaves(to_plain(Config())):
        assert f"| `{key}` |" in text
    assert "| `prepare.sources.N.adapter` | `htnet_release`, `casme2`, `samm`, `smic`, `casme`," in text
    assert "| `train.betas` | list of 2 float | `[0.9, 0.999]` |" in text


def test_blocks_and_tokens_follow_from_the_sizes():
    assert HTNetConfig().blocks_per_side == (4, 2, 1)
    assert HTNetConfig(image_size=112).tokens_per_block == 16
