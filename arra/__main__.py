"""`python -m arra` is the command `arra`."""

from arra.cli import main

if __name__ == "__main__":
    main()
