"""A call that is refused: in one sentence, before anything changes."""

import pytest
import torch


def bits(pipe):
    return {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}


def refused(call, *words, pipe=None):
    """The call raises a ValueError of one sentence or few that has all `words`, and changes nothing."""
    before = None if pipe is None else (bits(pipe), pipe.scheduler)
    with pytest.raises(ValueError) as caught:
        call()
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said and len(said) < 500
    if before is not None:
        assert pipe.scheduler is before[1]
        assert all(torch.equal(weight, before[0][name]) for name, weight in pipe.unet.state_dict().items())
    return said
