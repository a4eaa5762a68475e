"""PEFT's adapter configs: what they say is used, does not matter, or is refused; PEFT itself is the judge of each."""

import copy
import dataclasses
import json
import re
import warnings

import pytest
import torch
from lora_files import write_diffusers, write_peft
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    MergeError,
    WeightSourceError,
    compute_delta,
    convert_lora,
    merge_delta,
    merge_files,
    open_weights,
)
from perflow_diffusers.weights.read import adapter_config as table
from perflow_diffusers.weights.read.lora import as_delta

peft = pytest.importorskip("peft")

CONFIGS = (peft.LoraConfig, peft.LoHaConfig, peft.LoKrConfig)
TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
LINEAR = ["to_q", "to_out.0", "time_emb_proj"]


def peft_model(unet, config):
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own advice
        return peft.get_peft_model(copy.deepcopy(unet), config)


def saved(model, folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def trained(model, seed=3):
    """As after training: every number of the adapter has moved."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def weights_of(model):
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_merges_as_peft(unet, folder, merged):
    """What `merge_delta` makes of the saved folder is what PEFT's `merge_and_unload` makes of the model."""
    ours, wanted = copy.deepcopy(unet), weights_of(merged)
    merge_delta(ours, folder)
    for name, weight in weights_of(ours).items():
        assert torch.allclose(weight, wanted[name], rtol=1e-5, atol=2e-6), name


def test_the_tables_hold_every_field_of_peft():
    """A new field of PEFT fails here: decide in which table it belongs."""
    fields = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    tables = (table.READ, table.FREE, frozenset(table.REFUSED))
    assert frozenset.union(*tables) == fields
    assert sum(map(len, tables)) == len(fields)  # in one table each


def test_every_initialisation_of_peft_is_decided():
    """Names are read from PEFT's own annotation and the branches of its layer; none is left undecided."""
    import inspect

    from peft.tuners.lora.layer import LoraLayer

    annotation = str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type)
    branches = inspect.getsource(LoraLayer.update_layer)
    branches = " ".join(re.findall(r"init_lora_weights.*?:\n", branches))
    names = set(re.findall(r"""["']([a-z_]+)""", annotation + branches)) - {"pissa_niter_"}
    assert {"gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga"} <= names
    known = {*table._HARMLESS_INITS, *table._CONVERTIBLE, "loftq"}
    assert names <= known


@pytest.mark.parametrize(
    "init",
    [True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica", "olora", "pissa", "pissa_niter_4"],
)
def test_an_initialisation_that_changes_the_base_is_refused_and_no_other(unet, tmp_path, init):
    targets = TARGETS if init in (True, False, "gaussian", "Gaussian") else LINEAR
    options = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, **options)
    model = peft_model(unet, config)
    before = weights_of(unet)
    base = {name.replace(".base_layer", ""): value for name, value in weights_of(model.base_model.model).items()}
    changed = [name for name in before if not torch.equal(before[name], base[name])]
    saved(trained(model), tmp_path / "lora")
    if not changed:
        assert_merges_as_peft(unet, tmp_path / "lora", model.merge_and_unload())
        return
    for function in (merge_delta, lambda unet, source: as_delta(open_weights(source))):
        with pytest.raises(
            WeightSourceError, match=r"path_initial_model_for_weight_conv.*compute_delta\(base, merged\)"
        ):
            function(unet, tmp_path / "lora")
    merged = model.merge_and_unload()  # the advice works
    compute_delta(unet, merged, tmp_path / "delta.safetensors")
    assert_merges_as_peft(unet, tmp_path / "delta.safetensors", merged)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_way_out_of_peft_gives_a_lora_that_is_right(unet, tmp_path, init):
    """`path_initial_model_for_weight_conversion`: twice the rank, and the base is the plain one again."""
    model = peft_model(unet, peft.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR, init_lora_weights=init))
    saved(model, tmp_path / "start")
    start = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps({**start, "init_lora_weights": True}))
    trained(model)
    saved(model, tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_merges_as_peft(unet, tmp_path / "lora", model.merge_and_unload())


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_alphas_and_their_patterns_as_peft_has_them(unet, tmp_path, rslora):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=TARGETS,
        rank_pattern={"to_q": 2, r"mid_block.*conv1": 3},
        alpha_pattern={"^mid_block.attentions.0.proj_in": 5, "time_emb_proj": 11, r"attn1\.to_q": 2.5},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    model = peft_model(unet, config)
    saved(model, tmp_path / "lora")
    assert_merges_as_peft(unet, tmp_path / "lora", model.merge_and_unload())


def written(folder, factors, **fields):
    write_peft(folder, factors)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


ON = {
    "bias": "all",
    "modules_to_save": ["conv_out"],
    "trainable_token_indices": [1],
    "target_parameters": ["scale_shift_table"],
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [3],
    "arrow_config": {"top_k": 3},
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "field_of_next_year": 16,
    "init_lora_weights": "corda",
}


NOT_MERGED = ("alora_invocation_tokens", "arrow_config", "use_qalora")


def test_merging_is_advised_where_peft_merges():
    """aLoRA, Arrow and QALoRA raise in PEFT's own merge."""
    from peft.tuners.lora import variants

    for variant in (variants.ALoraLinearVariant, variants.ArrowLinearVariant, variants.QALoraLinearVariant):
        with pytest.raises((NotImplementedError, RuntimeError), match=r"support|Cannot merge"):
            variant.merge_safe(None, "default", torch.ones(1))
    assert set(NOT_MERGED) <= set(table.REFUSED)


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "PISSA", "init_of_next_year", 7])
def test_initialisations_that_need_data_or_quantisers_are_refused_too(unet, factors, tmp_path, init):
    """By PEFT's source: CorDA and LoRA-GA subtract from the base, LoftQ replaces it; an unknown one may do either."""
    convertible = str(init).lower() in ("corda", "lora_ga", "pissa")
    way_out = "path_initial_model_for_weight_conversion" if convertible else "merge_and_unload"
    with pytest.raises(WeightSourceError, match=rf"init_lora_weights={init!r}.*{way_out}"):
        merge_delta(unet, written(tmp_path / "lora", factors, init_lora_weights=init))


@pytest.mark.parametrize("field", list(ON))
@pytest.mark.parametrize("layout", ["folder", "header"])
def test_what_is_not_understood_is_an_error(unet, bits, same, factors, tmp_path, field, layout):
    assert set(table.REFUSED) <= set(ON)
    before = bits(unet)
    if layout == "folder":
        path = written(tmp_path / "lora", factors, **{field: ON[field]})
    else:
        path = write_diffusers(tmp_path / "lora.safetensors", factors)
        config = json.loads(open_weights(path).metadata["lora_adapter_metadata"])
        config[f"unet.{field}"] = ON[field]
        save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config)})
    save_file(weights_of(unet), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    for call in (
        lambda: merge_delta(unet, path),
        lambda: merge_files(tmp_path / "base.safetensors", path, out),
        lambda: convert_lora(path, out, "kohya"),
    ):
        way_out = "Use it with PEFT" if field in NOT_MERGED else r"merge_and_unload.*compute_delta"
        with pytest.raises(WeightSourceError, match=f"{field}=.*{way_out}"):
            call()
    assert same(bits(unet), before) and not out.exists()


def test_configs_of_each_part_of_a_pipeline_are_read(unet, factors, tmp_path):
    """diffusers' header has one config a part; another part's, or another pipeline's, does not count for the UNet."""
    path = write_diffusers(tmp_path / "lora.safetensors", factors)
    config = json.loads(open_weights(path).metadata["lora_adapter_metadata"])
    others = {"transformer.init_lora_weights": "pissa", "text_encoder.r": 4, "text_encoder.lora_alpha": 4}
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config | others)})
    merge_delta(unet, path)
    others["text_encoder.init_lora_weights"] = "pissa"
    save_file(load_file(path), path, {"lora_adapter_metadata": json.dumps(config | others)})
    with pytest.raises(WeightSourceError, match="init_lora_weights='pissa'"):
        merge_delta(unet, path)


def test_fields_at_their_default_are_silent(unet, factors, tmp_path, monkeypatch):
    """Off in any way, or what PEFT says that the default is, for a table that is older than PEFT."""
    monkeypatch.setattr(table, "FREE", table.FREE - {"qalora_group_size", "megatron_core"})
    fields = dict.fromkeys(("a", "b", "c", "d"))
    fields |= {"b": False, "c": [], "d": {}, "qalora_group_size": 16, "megatron_core": "megatron.core", "bias": "none"}
    merge_delta(unet, written(tmp_path / "lora", factors, **fields))
    with pytest.raises(WeightSourceError, match="qalora_group_size=8"):
        merge_delta(unet, written(tmp_path / "other", factors, qalora_group_size=8))


def test_the_config_that_peft_writes_is_understood(unet, tmp_path):
    for config in CONFIGS:
        fields = config(target_modules=["to_q"]).to_dict()
        fields = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
        source = dataclasses.replace(
            open_weights({"unet.conv_in.lora_A.weight": torch.ones(1, 1)}),
            metadata={"lora_adapter_metadata": json.dumps({f"unet.{name}": v for name, v in fields.items()})},
        )
        assert table.adapter_configs(source, ("unet",))["unet"].kind == config().peft_type.value


KINDS = {
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["to_q"], save_projection=True),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=2, target_modules=["to_q"]),
    "IA3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=8, target_modules=["to_q"]),
    "HRA": lambda: peft.HRAConfig(r=2, target_modules=["to_q"]),
    "RANDLORA": lambda: peft.RandLoraConfig(r=2, target_modules=["to_q"]),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_kinds_of_peft_are_named(unet, tmp_path, kind):
    saved(peft_model(unet, KINDS[kind]()), tmp_path / "adapter")
    with pytest.raises((WeightSourceError, MergeError), match=rf"PEFT's kind {kind}.*compute_delta"):
        merge_delta(unet, tmp_path / "adapter")


@pytest.mark.parametrize("text", ["[1]", "{", '{"r": "many"}', '{"alpha_pattern": {"(": 1}}', '{"lora_alpha": [2]}'])
def test_configs_that_cannot_be_read(unet, factors, tmp_path, text):
    write_peft(tmp_path / "lora", factors)
    (tmp_path / "lora" / "adapter_config.json").write_text(text)
    with pytest.raises(WeightSourceError, match=r"LoRA config of .* cannot be read"):
        merge_delta(unet, tmp_path / "lora")
