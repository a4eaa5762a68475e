"""Names of this machine; no more, so that the command line knows them before torch is there."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
