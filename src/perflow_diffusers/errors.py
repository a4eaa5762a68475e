"""All errors of this package that have a name: ValueErrors whose message says what was given and what to do."""


class WeightSourceError(ValueError):
    """Weights cannot be found, read, or trusted."""


class WeightWriteError(OSError, ValueError):
    """A file cannot be written; whatever was there before is unchanged."""


class DeltaError(ValueError):
    """Two sets of weights have no difference that could be stored."""


class MergeError(ValueError):
    """A delta does not fit the model, or the model is in no state to take it or give it back."""


class ArtifactError(ValueError):
    """An artefact cannot be found, read, trusted, or used with this pipeline."""


class HubError(ArtifactError, WeightSourceError):
    """The Hub, or the cache of what came from it, cannot give what was asked for, or cannot be asked like this."""


class Unreachable(HubError):
    """The Hub did not answer, or was not to be asked; what is in the cache may still do."""


class PushError(ArtifactError):
    """Something cannot be published; nothing was uploaded, or the message says what."""
