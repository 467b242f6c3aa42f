"""`python -m gadfly`, as `torchrun -m gadfly` needs it."""

from gadfly.cli import main

if __name__ == "__main__":
    main()
