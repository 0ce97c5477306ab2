"""`python -m khaosz` is the `khaosz` command."""

from khaosz.cli import main

if __name__ == "__main__":
    main()
