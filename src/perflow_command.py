"""Entry point of the command `perflow`, in a module of its own: importing the package takes seconds.

Until then Ctrl-C ends the process at once, without a traceback out of whatever is being imported.
"""

import signal


def main() -> None:
    """Run the command; what it is given are the words of the command line."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from perflow_diffusers.cli import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
