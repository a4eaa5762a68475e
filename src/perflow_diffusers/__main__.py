"""`python -m perflow_diffusers` is the command `perflow`."""

from perflow_diffusers.cli import main

if __name__ == "__main__":
    main()
