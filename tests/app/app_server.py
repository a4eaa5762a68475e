"""`perflow app` in a process of its own."""

import socket
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`perflow app` in a process of its own."""

    def __init__(self, *options, port=None):
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}/"
        command = [
            sys.executable,
            "-m",
            "perflow_diffusers",
            "app",
            "--no-browser",
            "--port",
            str(self.port),
            *options,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(600):
            if self.process.poll() is not None:
                raise RuntimeError(self.process.stdout.read())
            try:
                urllib.request.urlopen(self.address + "gradio_api/app_id", timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError("the server did not start within a minute")

    def stop(self, kill=False):
        (self.process.kill if kill else self.process.terminate)()
        return self.process.communicate(timeout=30)[0]
