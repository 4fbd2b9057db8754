"""What folders' and files' names say, in the words that people use."""

import unicodedata

from effad_core.datasets.folder_names import (
    ANOMALOUS,
    MASK,
    NEUTRAL,
    NORMAL,
    TEST,
    TRAIN,
    UNCLEAR,
    UNKNOWN,
    VALIDATION,
    WORDS,
    companion,
    image_key,
    meanings,
    plain,
    system_reason,
)

import pytest

PAIRS = """
    good bad|Good Bad|GOOD BAD|ok ko|OK NOK|ok ng|OK NG|pass fail|PASS FAIL|passed failed
    accept reject|accepted rejected|normal abnormal|normal anomaly|normal anomalies|intact broken
    clean scratch|clean dirty|healthy diseased|good defect|good defects|good defective|good faulty
    conforming nonconforming|conforming non-conforming|conform not_conform|acceptable unacceptable
    undamaged damaged|flawless flawed|defect-free defective|no_defects with_defects|perfect scrap
    GoodParts BadParts|goodparts badparts|good_images bad_images|OkImages NokImages|good1 bad1
    normal_dir abnormal_dir|0_good 1_bad|good_2024-05-01 bad_2024-05-01|correct incorrect|go NoGo
    IO NIO|iO niO|i.O. n.i.O.|gut schlecht|Gut Schlecht|Gutteile Schlechtteile|fehlerfrei fehlerhaft
    gut Ausschuss|in_Ordnung nicht_in_Ordnung|ok nicht_ok|OK Mängel|gut Kratzer|bestanden Fehler
    bon mauvais|bons défauts|conforme non_conforme|Bon Pas_bon|bien mal_defaut|normale anormale
    bonnes rebut
    bueno malo|buenos malos|correcto defectuoso|buono difetto|buoni scarti|conforme difettoso
    bom ruim|aprovado reprovado|goed fout|goedgekeurd afgekeurd|dobry zły|dobre vadne
    iyi kötü|sağlam hatalı
    годные брак|годные не_годные|OK画像 NG画像|良品 不良品|合格 不合格|正常 异常|正常样本 缺陷样本
    良品 非良品|양품 불량|정상 비정상
"""


@pytest.mark.parametrize(
    "pair", [p.strip() for p in PAIRS.replace("\n", "|").split("|") if p.strip()]
)
def test_good_and_bad_in_the_usual_words(pair):
    good, bad = pair.split()
    for form in ("NFC", "NFD"):
        assert meanings(unicodedata.normalize(form, good)) == {NORMAL}, good
        assert ANOMALOUS in meanings(unicodedata.normalize(form, bad)), bad
        assert NORMAL not in meanings(bad)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *((name, {TRAIN}) for name in ("train", "Train", "training", "train_set", "trainset")),
        *((name, {VALIDATION}) for name in ("val", "valid", "validation", "Validation_Set")),
        *((name, {TEST}) for name in ("test", "TEST", "testing", "test_public", "test-data")),
        *((name, {MASK}) for name in ("ground_truth", "GroundTruth", "ground truth", "masks")),
        *((name, {MASK}) for name in ("gt", "mask", "Masken", "labels", "mask_dir")),
        ("normal_test", {TEST, NORMAL}),
        ("test_bad", {TEST, ANOMALOUS}),
        ("train-good", {TRAIN, NORMAL}),
        *((name, {UNCLEAR}) for name in ("positive", "neg", "class_0", "label 1")),
        *((name, {UNCLEAR}) for name in ("good and bad", "unsorted", "unsure_ok")),
        *((name, {UNCLEAR, UNKNOWN}) for name in ("almost good", "good_maybe")),
        ("good_with_scratch", {UNCLEAR, UNKNOWN}),
        ("pass through", {UNCLEAR, UNKNOWN}),
        *((name, set()) for name in ("camera1", "2024-05-01", "batch_3", "0", "a", "line 0", "")),
        *((name, set()) for name in ("left", "images", "DATASET", "No. 5", "part 017")),
        *((name, {UNKNOWN}) for name in ("goodyear book", "bone", "ion", "baden", "passage")),
    ],
)
def test_other_names(name, said):
    assert meanings(name) == said


def test_no_word_has_two_meanings():
    assert not {plain(word) for word in NEUTRAL} & WORDS.keys()
    assert len(WORDS) > 250


@pytest.mark.parametrize(
    ("stem", "said"),
    [
        *(
            (stem, ("10000", MASK))
            for stem in ("10000_GT", "10000_mask", "10000-mask", "10000.mask")
        ),
        *((stem, ("10000", MASK)) for stem in ("GT_10000", "mask 10000", "10000_mask_2")),
        *((stem, ("10000", MASK)) for stem in ("10000_ground_truth", "img_10000_label")),
        ("10000_thumb", ("10000", "picture")),
        *((stem, None) for stem in ("10000", "gasmask", "mask", "weight_10000", "unmask_1")),
    ],
)
def test_files_made_of_images(stem, said):
    assert companion(stem) == said
    assert image_key("IMG_10000") == image_key("10000") == "10000"


@pytest.mark.parametrize(
    "name",
    [
        *("@eaDir", "#recycle", "#snapshot", "@Recycle", ".thumbnails", ".@__thumb", "__MACOSX"),
        *("$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs", ".git", "._a.png"),
        *(".DS_Store", "@SynoResource", "SYNOPHOTO_THUMB_M.png", ".Trash-1000", "RECYCLER"),
    ],
)
def test_system_folders_and_files(name):
    assert system_reason(name)


@pytest.mark.parametrize("name", ["thumbs up.png", "#1", "@home", "$5", "found", "good", "0.png"])
def test_names_that_only_look_like_those_of_systems(name):
    assert system_reason(name) is None
