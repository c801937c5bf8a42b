"""``python -m lightning_ted`` is the command ``lightning-ted``."""

from lightning_ted.cli import main

if __name__ == "__main__":
    main()
