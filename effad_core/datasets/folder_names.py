"""What the name of a folder or file says: good or bad parts, masks, a split, or nothing.

A name is read word by word: "GoodParts", "good_parts 2" and "GOOD-PARTS" are the same. Capitals,
accents, numbers and endings do not matter. `WORDS` holds the words that are understood. "not",
"non", "nicht" and the like turn good into bad and bad into good. Words of `NEUTRAL` say nothing;
any other word is `UNKNOWN`.
"""

import re
import unicodedata
from functools import lru_cache

NORMAL, ANOMALOUS, MASK = "normal", "anomalous", "mask"
TRAIN, VALIDATION, TEST = "train", "validation", "test"
PRIVATE, UNCLEAR, UNKNOWN = "private", "unclear", "unknown"

_SAID = {
    NORMAL: """
        good ok okay pass passed passing accept accepted acceptable normal nominal intact clean
        healthy perfect correct conform conforming conformant compliant approved pristine golden
        sound usable functional go
        gut gute gutteil intakt heil sauber io inordnung einwandfrei bestanden
        bon bons bonne bien conforme sain saine accepte
        bueno buena correcto correcta aceptado sano buono buona buoni accettato
        bom boa aprovado goed goede goedgekeurd dobry dobre dobra iyi saglam
        godkand godkendt godkjent hyva
        хорошие хороший годные годный годен норма
        良品 合格 正常 好品 양품 정상 합격""",
    ANOMALOUS: """
        bad ng nok ko nio fail failed failing failure fault faulty reject rejected defect defective
        abnormal abnormality anomaly anomalies anomalous outlier scrap error invalid unhealthy
        diseased sick irregular deviation unusable malfunction incorrect wrong flaw flawed
        poor inferior broken damage damaged bent bend scratch crack cracked dent hole cut poke
        squeeze squeezed missing pinhole contamination contaminated misplaced misaligned manipulated
        swap swapped torn rust rusty corrosion corroded stain dirt dirty burnt burned deformed
        deformation leak void porosity bubble chipped burr peeling wrinkle foreign discoloration
        discolored inclusion crazing pitted pitting fracture fractured blister delamination worn
        smudge warped gouge notch flipped frayed ripped incomplete
        schlecht schlechte schlechtteil fehler fehlerhaft defekt ausschuss kaputt mangel maengel
        mangelhaft anomal anomalie beschadigt beschaedigt kratzer riss risse beule delle bruch
        gebrochen verbogen verschmutzt schmutz fleck loch rost durchgefallen
        mauvais mauvaise defaut defectueux defectueuse rebut anormal anormale rayure fissure casse
        tache trou rejete
        mal malo mala defecto defectuoso rechazado rechazo anomalia fallo fallado grieta roto rota
        difetto difetti difettoso difettosi scarto scarti guasto anomalo anomali graffio crepa rotto
        ruim defeito defeituoso reprovado rejeitado trinca quebrado
        slecht slechte fout afgekeurd afkeur zly zla zle wada wady wadliwy wadliwe vada vadny vadne
        spatny spatne zmetek kotu hatali kusurlu
        underkand fejl huono hibas selejt
        брак бракованные дефект дефекты дефектные плохие плохой негодные негодный негоден
        不良 不合格 缺陷 异常 異常 瑕疵 次品 欠陥 傷 불량 결함 비정상 불합격 이상""",
    MASK: """
        mask groundtruth gt label annotation annot segmentation seg segm maske masque masques
        mascara mascaras maschera maschere""",
    TRAIN: """
        train training trainset trainieren entrainement apprentissage entrenamiento
        addestramento treino treinamento""",
    VALIDATION: "validation valid val validate validierung validacion validazione validacao",
    TEST: "test testing testset eval evaluation prueba",
    PRIVATE: "private",
    UNCLEAR: """
        positive negative neg unsure uncertain unlabeled unlabelled unsorted unclassified
        questionable suspicious suspect borderline doubtful true false unklar unsicher verdacht""",
}
_SAYS_NOTHING = """
    part piece image img picture pic photo frame sample data dataset set folder dir directory file
    unit item product object example crop tile teil bild bilder daten stuck stueck objekt aufnahme
    foto imagen imagenes immagine immagini pezzo pezzi pieza peca imagens goods
    all only more extra new old final raw original orig type kind public
    camera cam kamera line linie batch lot charge los station machine maschine run session series
    serie shift schicht day tag week woche month date view side left right top bottom front back
    inner outer center middle upper lower links rechts oben unten vorne hinten north south east west
    number nr num id version rev morning noon evening night early late spring summer autumn winter
    room site plant werk hall halle factory box tray sensor channel position angle scan video clip
    sequence seq subset split fold rgb gray grey png jpg jpeg bmp tif tiff webp
    small medium large big the of and und from at in on for by
    january february march april may june july august september october november december
    jan feb mar apr jun jul aug sep sept oct nov dec
    monday tuesday wednesday thursday friday saturday sunday mon tue wed thu fri sat sun
    画像 写真 部品 図 图像 图片 样本 樣本 照片 零件 이미지 사진 샘플"""
_NEGATION = "not non no un without nicht kein keine ohne sans pas senza sin nao niet nie ne не"
NOT = tuple(_NEGATION.split())
FREE = ("free", "frei", "less")
ENDINGS = ("s", "es", "ed", "e", "en", "n")
EAST_ASIAN = re.compile(r"[\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff]")
EAST_ASIAN_NOT = tuple("不非未無无")
WHOLE_LETTERS = str.maketrans("łøđı", "lodi")  # Unicode does not take them apart
FLIPPED = {NORMAL: ANOMALOUS, ANOMALOUS: NORMAL}


def plain(text: str) -> str:
    """Text without capitals, accents, and differences between ways to write a character."""
    parts = unicodedata.normalize("NFKD", text.casefold().translate(WHOLE_LETTERS))
    return "".join(char for char in parts if unicodedata.category(char) != "Mn")


NEUTRAL = frozenset(map(plain, _SAYS_NOTHING.split()))
FILLERS = tuple(sorted(w for w in NEUTRAL if len(w) > 2 and w.isascii()))  # "goodparts", "testset"
WORDS = {plain(word): meaning for meaning, words in _SAID.items() for word in words.split()}


def words(name: str) -> list[str]:
    """The words of a name, plain, without numbers: "GoodParts_2" -> ["good", "parts"]."""
    name = unicodedata.normalize("NFKC", name)
    name = re.sub(r"(?<=[a-zß-ÿ])(?=[A-ZÀ-Þ])", " ", name)
    name = re.sub(r"(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    name = re.sub(r"(?<=[A-Za-z])(?=[^\W\d_])(?![A-Za-zß-ɏ\u0300-\u036f])", " ", name)  # "OK画像"
    return re.findall(r"[^\W\d_]+", plain(name))


@lru_cache(maxsize=4096)
def meanings(name: str) -> frozenset[str]:
    """What a folder's name says; several things at once, as "test_good" does, or nothing.

    Args:
        name: of one folder, without its parents.

    Returns:
        Of the constants above. `UNCLEAR` stands for what must not be guessed: "positive", "almost
        good", "good and bad", and `NORMAL` beside a word that is not known. `UNKNOWN`: at least
        one word is not known.
    """
    found, negated, last = [], False, None
    rest = words(name)
    if rest and {*rest} <= {"class", "label", "klasse", "category"} and re.search(r"\d", name):
        return frozenset({UNCLEAR})  # "class_0", "label 1"
    while rest:
        for length in (3, 2, 1):  # "n.i.O.", "ground truth", "good"
            joined = "".join(rest[:length])
            meaning = _meaning(joined) if length == 1 else WORDS.get(joined)
            if meaning is not None and len(rest) >= length:
                break
        rest = rest[length:]
        if joined in NOT:
            negated = True
        elif joined in FREE and last is not None:  # "defect free"
            found[last] = FLIPPED[found[last]]
        elif meaning:
            found.append(FLIPPED.get(meaning, meaning) if negated else meaning)
            if meaning in FLIPPED:
                negated, last = False, len(found) - 1
        elif len(joined) > 1 and not _neutral(joined):
            found.append(UNKNOWN)
    said = frozenset(found)
    if NORMAL in said and said & {ANOMALOUS, UNKNOWN, UNCLEAR}:
        return said - {NORMAL, ANOMALOUS} | {UNCLEAR}
    return said


def unknown_words(name: str) -> tuple[str, ...]:
    """The words of a name that are neither understood nor neutral."""
    return tuple(w for w in words(name) if len(w) > 1 and _meaning(w) is None and not _neutral(w))


def _stems(word: str) -> list[str]:
    """A word, and what is left of it without a plural's or participle's ending."""
    cut = (word.removesuffix(end) for end in ENDINGS if word.endswith(end))
    return [word, *(stem for stem in cut if len(stem) > 3 or word in ("oks", "kos"))]


def _neutral(word: str) -> bool:
    return any(stem in NEUTRAL for stem in (word, word.removesuffix("s"), word.removesuffix("e")))


def _meaning(word: str) -> str | None:
    """What one plain word says; None if it is not known."""
    if _neutral(word):
        return None
    if EAST_ASIAN.search(word):
        return _east_asian(word)
    for stem in _stems(word):
        if stem in WORDS:
            return WORDS[stem]
    for filler in FILLERS:
        for end in (filler, filler + "s", filler + "e"):
            inner = word.removesuffix(end) if word.endswith(end) else word.removeprefix(end)
            if inner != word and inner in WORDS:
                return WORDS[inner]
    for sign in NOT:
        inner = word.removeprefix(sign)
        if inner != word and (found := next(filter(None, map(WORDS.get, _stems(inner))), None)):
            return FLIPPED.get(found, found)
    for sign in FREE:
        inner = word.removesuffix(sign)
        if inner != word and (found := next(filter(None, map(WORDS.get, _stems(inner))), None)):
            return FLIPPED.get(found, found)
    return None


def _east_asian(word: str) -> str | None:
    """What a Chinese, Japanese or Korean word says, which is written without spaces."""
    for meaning in (ANOMALOUS, NORMAL):
        for known in filter(EAST_ASIAN.search, WORDS):
            at = word.find(known)
            if at >= 0 and WORDS[known] == meaning:
                negated = at > 0 and word[at - 1] in EAST_ASIAN_NOT
                return FLIPPED[meaning] if negated else meaning
    return None


SYSTEM = {  # folders that programs make; plain name -> reason
    "@eadir": "thumbnails of a Synology NAS",
    "@tmp": "temporary files of a NAS",
    "@recycle": "the recycle bin of a NAS",
    "@sharebin": "the recycle bin of a NAS",
    "#recycle": "the recycle bin of a NAS",
    "#snapshot": "snapshots of a NAS",
    "@recently-snapshot": "snapshots of a NAS",
    "~snapshot": "snapshots of a NAS",
    "$recycle.bin": "the recycle bin of Windows",
    "recycler": "the recycle bin of Windows",
    "recycled": "the recycle bin of Windows",
    "system volume information": "a folder of Windows",
    "found.000": "fragments that a disk check found",
    "lost+found": "fragments that a disk check found",
    "__macosx": "file attributes of macOS",
    "network trash folder": "a folder of macOS",
    "temporary items": "a folder of macOS",
    "__pycache__": "a folder of Python",
    **dict.fromkeys(("thumbs", "thumb", "thumbnails", "thumbnail", "_thumbs"), "thumbnails"),
}


def system_reason(name: str) -> str | None:
    """Why a file or folder of this name is left out: programs made it. None: it is kept."""
    name = plain(name)
    if name.startswith("."):
        return "hidden"
    if name.startswith(("synophoto_", "synofile_")):
        return "thumbnails of a Synology NAS"
    if name.startswith("@syno"):
        return "a folder of a Synology NAS"
    return SYSTEM.get(name)


COMPANIONS = {  # the word in a file's name beside its image's -> what such a file is
    **dict.fromkeys(("mask", "masks", "gt", "groundtruth", "ground_truth", "ground-truth"), MASK),
    **dict.fromkeys(("label", "labels", "seg", "segmentation", "annotation", "maske"), MASK),
    **dict.fromkeys(("thumb", "thumbnail", "overlay", "heatmap", "preview"), "picture"),
}
_WORD = "|".join(sorted(COMPANIONS, key=len, reverse=True))
_AFTER = re.compile(rf"(?P<owner>.+?)[ ._-]+(?P<word>{_WORD})([ ._-]*\d+)?", re.DOTALL)
_BEFORE = re.compile(rf"(?P<word>{_WORD})[ ._-]+(?P<owner>.+)", re.DOTALL)
_MASK_WORD = "|".join(sorted((w for w in COMPANIONS if COMPANIONS[w] == MASK), key=len)[::-1])
_PICTURE = re.compile(r"^(img|image|rgb|photo|input)[ ._-]+|[ ._-]+(img|image|rgb|photo|input)$")


def companion(stem: str) -> tuple[str, str] | None:
    """What a file called like "0001_mask" or "GT_0001" belongs to, and what it then is.

    Args:
        stem: the file's name without its suffix.

    Returns:
        The stem of its image as `image_key` gives it, and "mask" or "picture" (a thumbnail, an
        overlay); None if the name has no such word. Whether there is that image is another matter.
    """
    stem = plain(stem)
    found = _AFTER.fullmatch(stem) or _BEFORE.fullmatch(stem)
    return (image_key(found["owner"]), COMPANIONS[found["word"]]) if found else None


def image_key(stem: str) -> str:
    """A plain stem without "img" or "image": "IMG_0001" and "mask_0001" belong together."""
    stem = plain(stem)
    return _PICTURE.sub("", stem) or stem


def without_mask_word(stem: str) -> str:
    """A mask's stem as its image's: without "_mask", "_GT" or the like at its end."""
    return re.sub(rf"[ ._-]+({_MASK_WORD})$", "", stem, flags=re.IGNORECASE)
