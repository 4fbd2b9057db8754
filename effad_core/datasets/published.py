"""The paper's three datasets, and whether a folder is one of their scenarios.

Results on other images must not stand beside the paper's, and a folder of one's own may well be
called `bottle` or `screw`. So a scenario is taken for a published one if its name and its numbers
of images are those of the archive.
"""

import os
from pathlib import Path

from effad_core.errors import printable
from effad_core.storage.files import as_path

from .images import SUFFIXES
from .layouts import list_scenarios
from .scenario import GOOD
from .visa import VISA, count_rows, is_visa_object

# Images for training and validation, normal and anomalous images for testing, as in the archives.
IMAGES = {
    "mvtec-ad": {
        "bottle": (209, 20, 63),
        "cable": (224, 58, 92),
        "capsule": (219, 23, 109),
        "carpet": (280, 28, 89),
        "grid": (264, 21, 57),
        "hazelnut": (391, 40, 70),
        "leather": (245, 32, 92),
        "metal_nut": (220, 22, 93),
        "pill": (267, 26, 141),
        "screw": (320, 41, 119),
        "tile": (230, 33, 84),
        "toothbrush": (60, 12, 30),
        "transistor": (213, 60, 40),
        "wood": (247, 19, 60),
        "zipper": (240, 32, 119),
    },
    "mvtec-loco": {
        "breakfast_box": (413, 102, 173),
        "juice_bottle": (389, 94, 236),
        "pushpins": (441, 138, 172),
        "screw_bag": (420, 122, 219),
        "splicing_connectors": (420, 119, 193),
    },
    "visa": VISA,
}
DATASETS = {name: tuple(scenarios) for name, scenarios in IMAGES.items()}


def published(path: str | os.PathLike) -> str | None:
    """The dataset that a scenario's folder is of, judged by its name and its numbers of images.

    Args:
        path: one scenario, as `open_folder` takes it.

    Returns:
        "mvtec-ad", "mvtec-loco", "visa", or None for any other folder.

    Raises:
        DataError: if VisA's table is damaged.
    """
    dataset, numbers, found = _compared(path)
    return dataset if found == numbers else None


def namesake_warning(path: str | os.PathLike) -> str | None:
    """A sentence for the user whose folder has a published scenario's name, but not its images.

    Args:
        path: as in `published`.

    Returns:
        The sentence, or None for any other folder.

    Raises:
        DataError: as `published`.
    """
    dataset, numbers, found = _compared(path)
    if found == numbers:
        return None
    return printable(
        f"{path} is called like a scenario of {dataset}, but its numbers of images (training, "
        f"normal test, anomalous test) are {found}, not {numbers}: its results are kept out of the "
        "paper's tables."
    )


def dataset_name(root: str | os.PathLike) -> str:
    """Which dataset a folder of scenarios is.

    Args:
        root: as in `list_scenarios`; it need not hold all scenarios of its dataset.

    Returns:
        "mvtec-ad", "mvtec-loco" or "visa" if all scenarios are of that dataset (see `published`),
        else the folder's own name.

    Raises:
        DataError: as `list_scenarios`.
    """
    found = {published(path) for path in list_scenarios(root)}
    if len(found) == 1 and None not in found:
        return found.pop()
    name = Path(os.path.abspath(as_path(root))).name
    return f"the folder {name}" if name in IMAGES else name


def _compared(path: str | os.PathLike) -> tuple[str | None, tuple | None, tuple | None]:
    """The published scenario that is called like a folder, and the folder's own images.

    Args:
        path: as in `published`.

    Returns:
        The scenario's dataset, its numbers of images, and the folder's; three times None if no
        published scenario is called like the folder.
    """
    path = Path(os.path.abspath(as_path(path)))
    for dataset, scenarios in IMAGES.items():
        if path.name in scenarios:
            return dataset, scenarios[path.name], _numbers(path)
    return None, None, None


def _numbers(path: Path) -> tuple[int, int, int]:
    """A folder's numbers of images, counted as those of `IMAGES` are."""
    if is_visa_object(path) and not os.path.isdir(path / "train" / GOOD):
        return count_rows(path)
    train = _count(path / "train" / GOOD) + _count(path / "validation" / GOOD)
    tested = {name: _count(path / "test" / name) for name in _names(path / "test")}
    normal = tested.pop(GOOD, 0)
    return train, normal, sum(tested.values())


def _count(folder: Path) -> int:
    """Images in a folder, not in those below it."""
    endings = (os.path.splitext(name)[1].lower() for name in _names(folder))
    return sum(ending in SUFFIXES for ending in endings)


def _names(folder: Path) -> list[str]:
    """What lies in a folder, without hidden files; nothing if it cannot be opened."""
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []
