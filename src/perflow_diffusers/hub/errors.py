"""What can go wrong with artefacts: all are ValueErrors whose message says what was given and what to do."""


class ArtifactError(ValueError):
    """An artefact cannot be found, read, trusted, or used with this pipeline."""


class PushError(ArtifactError):
    """Something cannot be published; nothing was uploaded, or the message says what."""
