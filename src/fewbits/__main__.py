"""`python -m fewbits`, as torchrun starts it."""

from fewbits.cli import main

if __name__ == "__main__":
    main()
