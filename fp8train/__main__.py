"""Lets ``python -m fp8train`` run the command line, as torchrun's ``-m`` does."""

from fp8train.cli import main

if __name__ == "__main__":
    main()
