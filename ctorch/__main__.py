"""``python -m ctorch`` is the command line ``ctorch``."""

from ctorch.cli import main

if __name__ == "__main__":
    main()
