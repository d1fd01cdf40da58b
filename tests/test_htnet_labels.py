"""Label schemes: the field's counts, datasets that do not go together, mappings of one's own, the official list."""

from __future__ import annotations

import pytest

from htnet.data.datasets.labels import Label, OfficialList, OutOfScheme
from htnet.data.datasets.schemes import SCHEMES, load_scheme
from htnet.data.samples import SampleId
from htnet.errors import InputError


def sample(dataset: str, subject: str = "s", clip: str = "c") -> SampleId:
    return SampleId(dataset=dataset, subject=subject, clip=clip)


@pytest.mark.parametrize("name", list(SCHEMES))
def test_every_word_of_a_scheme_has_one_of_its_classes_or_none(name):
    for dataset, (classes, words) in SCHEMES[name].items():
        scheme = load_scheme(name, [dataset])
        assert scheme.classes == classes
        for word, chosen in words.items():
            assert word == word.lower().strip()
            label = scheme.label(sample(dataset), f" {word.upper()} ", "here")
            assert isinstance(label, OutOfScheme) if chosen is None else scheme.classes[label.number] == chosen
        assert set(words.values()) - {None} == set(classes) or dataset == "smic"


def test_the_three_classes_are_megc2019s():
    scheme = load_scheme("megc2019_3class", ["casme2", "samm"])
    assert scheme.label(sample("casme2"), "repression", "").number == 0
    assert scheme.label(sample("casme2"), "sadness", "").rule == "label_scheme"
    assert scheme.label(sample("samm"), "Sadness", "").number == 0
    assert scheme.label(sample("samm"), "Other", "").rule == "label_scheme"


def test_an_unknown_word_dataset_or_scheme_is_named():
    with pytest.raises(InputError, match=r"here: must be one of .*got 'joy' \(label scheme megc2019_3class\)"):
        load_scheme("megc2019_3class", ["casme2"]).label(sample("casme2"), "joy", "here")
    with pytest.raises(InputError, match="7class is not defined for smic, only for casme2"):
        load_scheme("7class", ["smic"])
    with pytest.raises(InputError, match="must be one of megc2019_3class, 5class, 7class or a YAML file, got '4class'"):
        load_scheme("4class", [])


def test_datasets_whose_classes_differ_cannot_be_merged():
    with pytest.raises(InputError, match=r"casme2 has the classes happiness, .* and samm anger, .*cannot be merged"):
        load_scheme("5class", ["casme2", "samm"])
    assert load_scheme("5class", ["casme2", "casme2"]).classes[0] == "happiness"


GOOD = """
classes: [tense, calm]
words:
  casme: {Tense: tense, happiness: calm, fear: null}
  "*": {yes: calm}
"""


def test_a_mapping_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("yes", "'yes'"))
    scheme = load_scheme(str(path), ["casme"])
    assert scheme.label(sample("casme"), "TENSE", "").number == 0
    assert isinstance(scheme.label(sample("casme"), "fear", ""), OutOfScheme)
    assert scheme.label(sample("mine"), "yes", "").number == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("classes: [a, b]", "must be a mapping with the keys classes and words"),
        ("[", "not valid YAML"),
        ("classes: [a, no]\nwords: {}", r"classes must be a list of two or more names, got \['a', False\]"),
        ("classes: [a, b]\nwords: {x: {no: a}}", "not valid YAML: the key False is not a text: write it as 'no'"),
        ("classes: [a, b]\nwords: {x: {joy: no}}", r"words\.x\.joy must be one of a, b or null, got False"),
        ("classes: [a, b]\nwords: {x: {7: a}}", "not valid YAML: the key 7 is not a text: write it as '7'"),
        ("classes: [a, b]\nwords: {x: {yes: a}}", "not valid YAML: the key True is not a text"),
        ("classes: [a, b]\nwords: {x: {joy: a, joy: b}}", "not valid YAML: the key 'joy' is given twice"),
        ("- a", "the file must hold a mapping"),
        ("classes: [a, b]\nwords: {x: {joy: [a]}}", r"words\.x\.joy must be one of a, b or null"),
        ("classes: [a]\nwords: {}", "classes must be a list of two or more names"),
        ("classes: [a, a]\nwords: {}", "classes must differ, got a, a"),
        ("classes: [a, b]\nwords: []", "words must be a mapping"),
        ("classes: [a, b]\nwords: {x: [a]}", r"words\.x must be a mapping"),
        ("classes: [a, b]\nwords: {x: {joy: c}}", r"words\.x\.joy must be one of a, b or null, got 'c'"),
    ],
)
def test_a_mapping_that_is_none_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"mine\.yaml: {message}"):
        load_scheme(str(path), [])


@pytest.mark.parametrize("header", ["", "dataset,subject,clip,label\n", "sep=,\n", "\n,,,\n"])
def test_the_official_list_decides_clips_and_labels(tmp_path, header):
    path = tmp_path / "list.csv"
    path.write_text(header + "samm,6,006_1_2,0\ncasme2,sub01,EP02_01F,1\ncasme2,sub24,EP10_03,0.0\n,,,\n")
    scheme = load_scheme("megc2019_3class", ["casme2", "samm", "smic"], path)
    assert scheme.label(sample("samm", "006", "006_1_2"), "anger", "here") == Label(number=0)
    gone = scheme.label(sample("casme2", "sub05", "EP09_05f"), "disgust", "here")
    assert (gone.rule, str(path) in gone.reason) == ("official_list", True)
    assert scheme.label(sample("casme2", "sub05", "EP01_01"), "others", "here").rule == "label_scheme"
    moved = scheme.label(sample("casme2", "sub24", "EP10_03"), "surprise", "here")
    assert (moved.number, moved.notes) == (0, ("official_label",))
    assert "negative by" in moved.remarks[0]
    assert "the emotion is 'surprise' (here)" in moved.remarks[0]
    # nothing is said of a dataset that the list does not have
    assert scheme.label(sample("smic", "s01", "more"), "negative", "here") == Label(number=0)


def test_listed_clips_that_no_source_has_are_found(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("samm,6,006_1_2,0\ncasme2,sub01,EP02_01F,1\ncasme2,sub01,EP03,1\n")
    missing = OfficialList.read(path).missing([sample("casme2", "sub01", "EP03"), sample("smic", "s01", "a")])
    assert [(clip.id.clip, clip.row) for clip in missing] == [("EP02_01F", 2)]


def test_a_list_that_is_none_is_named(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("samm,6,006_1_2,0\nsamm,6\n")
    with pytest.raises(InputError, match=r"list\.csv, row 2, column clip: must not be empty"):
        OfficialList.read(path)
    path.write_text("samm,6,006_1_2,0\nsamm,006,006_1_2,1\n")
    with pytest.raises(InputError, match=r"row 2: clip samm/006/006_1_2 stands in row 1 already"):
        OfficialList.read(path)
    with pytest.raises(InputError, match=r"none\.csv: no such table"):
        OfficialList.read(tmp_path / "none.csv")
    path.write_text("samm,6,006_1_2,7\n")
    with pytest.raises(InputError, match=r"list\.csv, row 1: label must be in 0\.\.2, .*, got 7"):
        load_scheme("megc2019_3class", ["samm"], path)
    for text in ("", "dataset,subject,clip,label\n", ",,,\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"list\.csv: must hold at least one clip, got none"):
            OfficialList.read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("samm,6,006_1_2,1*\n", r"row 1, column label: must be a whole number, got '1\*'"),
        ("samm,6,006_1_2,positive\nsamm,6,006_1_3,0\n", r"row 1, column label: must be a whole number, got 'positive'"),
        ("samm,6,006_1_2,-1\n", r"row 1, column label: must not be negative, got -1"),
    ],
)
def test_a_first_row_is_no_header_without_its_words(tmp_path, text, said):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        OfficialList.read(tmp_path / "list.csv")


@pytest.mark.parametrize(
    "text",
    [
        "clip;subject;onset;label;dataset\n006_1_2;6;7;1,0;samm\n",
        "samm;6;006_1_2;1,0\n",
        "db\tsub\tfilename_o\tLabel\nsamm\t6\t006_1_2\t1.0\n",
    ],
)
def test_a_list_is_read_by_its_header_or_by_the_order(tmp_path, text):
    (tmp_path / "list.csv").write_text(text)
    assert OfficialList.read(tmp_path / "list.csv").find(sample("samm", "006", "006_1_2")).label == 1


def test_a_list_of_other_classes_does_not_relabel(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("casme2,sub01,EP01,2\n")
    scheme = load_scheme("5class", ["casme2"], path)
    with pytest.raises(InputError, match=r"list\.csv, row 1: must have the class of 5class, surprise \(3\), got 2"):
        scheme.label(sample("casme2", "sub01", "EP01"), "surprise", "here")


def test_a_word_of_a_mapping_in_two_spellings_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("classes: [a, b]\nwords: {x: {Joy: a, joy: b}}")
    with pytest.raises(InputError, match=r"words\.x has a word twice, in other capitals or blanks: Joy, joy"):
        load_scheme(str(tmp_path / "mine.yaml"), [])
