"""MVTec LOCO's `defects_config.json`: which kinds of defects there are, and when each is found."""

import json
import sys
from pathlib import Path
from reprlib import repr as brief  # a strange value may be long

from effad_core.errors import DataError

from .scenario import DefectKind

CONFIG = "defects_config.json"
KEYS = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")


def read_defect_kinds(path: Path) -> tuple[DefectKind, ...]:
    """Read a `defects_config.json`.

    Args:
        path: a JSON list of objects with the keys `KEYS`.

    Returns:
        The kinds of defects, in the order of the file.

    Raises:
        DataError: if the file is not JSON, or an entry is incomplete, of the wrong type, out of
            range, or has the pixel value of an earlier one.
    """
    if not path.is_file() and not path.is_dir():  # a pipe would wait for ever
        raise DataError(f"{path} is no regular file: copy it again from the dataset.")
    try:
        entries = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}): copy it again from the dataset."
        ) from None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} is not a list of defects: copy it again from the dataset.")
    kinds = {}
    for number, entry in enumerate(entries, 1):
        kind = _kind(entry, f"{path}, entry {number}")
        if kind.pixel_value in kinds:
            raise DataError(
                f"{path}, entry {number} has the pixel_value {kind.pixel_value} of "
                f"'{kinds[kind.pixel_value].name}': give each defect its own."
            )
        kinds[kind.pixel_value] = kind
    return tuple(kinds.values())


def _kind(entry: object, where: str) -> DefectKind:
    missing = [key for key in KEYS if key not in entry] if isinstance(entry, dict) else KEYS
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}: add what is missing.")
    name, value, threshold, relative = (entry[key] for key in KEYS)
    if not isinstance(name, str) or not name:
        raise DataError(f"{where} has the defect_name {brief(name)}: write a text.")
    if type(value) is not int or not 1 <= value <= 255:
        raise DataError(f"{where} has the pixel_value {brief(value)}: write an integer in 1..255.")
    if type(relative) is not bool:
        raise DataError(
            f"{where} has the relative_saturation {brief(relative)}: write true or false."
        )
    highest = 1 if relative else sys.float_info.max
    if type(threshold) not in (int, float) or not 0 < threshold <= highest:
        allowed = "a share above 0, at most 1" if relative else "a number of pixels above 0"
        raise DataError(
            f"{where} has the saturation_threshold {brief(threshold)}: write {allowed}."
        )
    return DefectKind(name, value, float(threshold), relative)
