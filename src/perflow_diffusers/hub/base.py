"""What a base says about itself, for its accelerators to be checked by: network, weights, noise, prediction."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers

from perflow_diffusers.families import ANY_COMPONENTS
from perflow_diffusers.flow import BASE_TYPES, flow_facts, noise_facts
from perflow_diffusers.hub.network import sample_base, signature
from perflow_diffusers.io.documents import read_json
from perflow_diffusers.schedulers.base_config import flow_refusal
from perflow_diffusers.weights.merge.layers import before_merges
from perflow_diffusers.weights.read.live import find_network


def base_facts(base: Any) -> dict[str, Any]:
    """What a base says about itself, as fields of an artefact: network, base_sample, noise, base_prediction_type.

    `base`: a pipeline, its folder, or a network (which says nothing of noise and prediction). What is merged into it
    does not count.
    """
    if isinstance(base, str | os.PathLike):
        folder = Path(base).expanduser()
        configs = (_configuration(folder / name / "config.json") for name in (*ANY_COMPONENTS, ""))
        network: Any = next((config for config in configs if config), {})
    else:
        network = find_network(base)
    facts = {"base_sample": sample_base(base_weights(base)), "network": signature(network)}
    facts.update(scheduler_facts(scheduler_config(base)))
    return {key: value for key, value in facts.items() if value}


def base_weights(base: Any) -> Any:
    """The weights of a base without what is merged into it; a path or weights as they are.

    Raises `MergeError` for a model that has forgotten them.
    """
    if isinstance(base, str | os.PathLike | Mapping):
        return base
    return before_merges(find_network(base))


def scheduler_config(base: Any) -> dict[str, Any]:
    """The configuration of a base's own scheduler; {} if it has none."""
    if isinstance(base, str | os.PathLike):
        return _configuration(Path(base).expanduser() / "scheduler" / "scheduler_config.json")
    return dict(getattr(getattr(base, "scheduler", None), "config", {}))


def scheduler_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields `noise` and `base_prediction_type`, as far as a complete scheduler configuration has them."""
    if config and flow_refusal(config) is None:
        return {"noise": flow_facts(config)}
    noise = noise_facts(config)
    if "trained_betas" in noise:
        noise["trained_betas"] = [float(beta) for beta in noise["trained_betas"]]
    facts: dict[str, Any] = {"noise": noise} if noise else {}
    if config.get("prediction_type") in BASE_TYPES:
        facts["base_prediction_type"] = config["prediction_type"]
    return facts


def _configuration(path: Path) -> dict[str, Any]:
    """A component's configuration with the defaults of its class, as the live component has it; {} without a file."""
    if not path.is_file():
        return {}
    content = read_json(path)
    kind = getattr(diffusers, str(content.get("_class_name")), None)
    known = inspect.signature(kind.__init__).parameters if inspect.isclass(kind) else {}
    defaults = {name: one.default for name, one in known.items() if one.default is not inspect.Parameter.empty}
    return {**defaults, **content}
