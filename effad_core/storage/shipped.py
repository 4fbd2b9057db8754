"""Where the files are that come with the package, and where what it makes goes."""

from importlib.resources import files
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def shipped(name: str) -> Path:
    """A file of the folder `data` of the repository, which an installed package holds too.

    Args:
        name: its path there, for example "teachers/pdn_small.safetensors".

    Returns:
        Its path; the file may be missing.

    Example:
        >>> shipped("paper_results.json").is_file()
        True
    """
    installed = Path(str(files("effad_core") / "data"))
    return (installed if installed.is_dir() else CHECKOUT / "data") / name


def drawn_data() -> Path:
    """The folder for data that is drawn or downloaded: `data` of the checkout, if this is one, so
    that it is the same for all notebooks; else `data` below the working directory."""
    return CHECKOUT / "data" if (CHECKOUT / "pyproject.toml").is_file() else Path("data")
