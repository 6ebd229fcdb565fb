"""``python -m fp8train``, for torchrun's ``-m``."""

from fp8train.cli import main

if __name__ == "__main__":
    main()
