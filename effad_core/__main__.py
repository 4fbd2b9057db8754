"""`python -m effad_core` is the command `effad`."""

from effad_core.cli import main

if __name__ == "__main__":
    main()
