"""Caches hold what direct encoding gives, to the bit; they survive a kill and refuse what they were not made for."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_pictures import make_folder

from perflow_diffusers import load_miniature
from perflow_diffusers.miniature import miniature_folder
from perflow_training.data import DataError, DataOptions, open_examples
from perflow_training.data.cache_writer import write_cache
from perflow_training.data.cached import CachedStream
from perflow_training.data.identity import model_identity
from perflow_training.teacher.conditions import time_ids
from perflow_training.teacher.encode import Encoders, pipeline_encoders, to_latents

BUCKETS = {"aspect_buckets": True, "bucket_step": 8, "bucket_max_ratio": 3.0}


def linear(model="linear") -> Encoders:
    """Encoders by arithmetic: two colours of every second pixel, and the caption's number."""

    def prompts(captions):
        values = torch.tensor([float(caption.split()[-1]) if caption else -1.0 for caption in captions])
        return {"prompt_embeds": values.view(-1, 1, 1).expand(-1, 2, 3), "pooled": values[:, None]}

    def images(pixels):
        return {"latents_mean": pixels[:, :2, ::2, ::2], "latents_std": pixels[:, 2:, ::2, ::2].abs()}

    return Encoders(model, prompts, images, lambda: prompts([""]), {"scaling_factor": 0.5, "shift_factor": 0.25})


def options_of(tmp_path, folder, **changes) -> DataOptions:
    values = {"resolution": 16, "dataloader_num_workers": 0, "train_cache_dir": str(tmp_path / "cache"), **changes}
    return DataOptions(train_data_dir=str(folder), **values)


def hashes(folder) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def drain(stream, batches, count=2) -> list:
    return [stream.batch(count) for _ in range(batches)]


def test_rows_are_what_the_pipelines_own_encoders_give(tmp_path):
    """The miniature in float32: posterior, prompt embeddings and the empty prompt, bit for bit."""
    pipe = load_miniature()
    prompts = ["a person with red hair", "a happy person with glasses", "a person with a hat on a blue background"]
    folder = make_folder(tmp_path / "pictures", 3, ((40, 32),))
    rows = [{"file_name": f"{number:03d}.png", "caption": prompt} for number, prompt in enumerate(prompts)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = options_of(tmp_path, folder, resolution=32, center_crop=True)
    name = model_identity(str(miniature_folder() / "avatars"))
    write_cache(
        tmp_path / "cache", options, pipeline_encoders(pipe, name), shard_size=4, batch_size=3, dtype=torch.float32
    )
    ordered = sorted(open_examples(options, seed=0, with_images=True).batch(3), key=lambda e: prompts.index(e.caption))
    with torch.no_grad():
        embeds = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        empty = pipe.encode_prompt("", "cpu", 1, True)[1]
        posterior = pipe.vae.encode(torch.stack([example.image for example in ordered])).latent_dist
    stored = load_file(tmp_path / "cache" / "shard-00000.safetensors")
    assert torch.equal(stored["32x32/latents_mean"], posterior.mean)
    assert torch.equal(stored["32x32/latents_std"], posterior.std)
    assert torch.equal(stored["32x32/prompt_embeds"], embeds)
    stream = CachedStream(options, seed=0, with_images=True, model=name)
    assert torch.equal(stream.empty_prompt["prompt_embeds"], empty)
    batch = stream.batch(3)
    places = [next(i for i in range(3) if torch.equal(embeds[i], row)) for row in batch.prompt_embeds]
    noise = (batch.latents / pipe.vae.config.scaling_factor - posterior.mean[places]) / posterior.std[places]
    assert sorted(places) == [0, 1, 2]
    assert (batch.pooled, batch.add_time_ids) == (None, None)
    assert abs(float(noise.mean())) < 0.15  # 768 normal numbers: four standard errors
    assert abs(float(noise.var()) - 1) < 0.21


def test_latents_follow_from_the_posterior_as_the_autoencoders_config_says():
    draw = torch.tensor([[1.0, 3.0]]).view(1, 2, 1, 1)
    assert to_latents(draw, {"scaling_factor": 0.5}).flatten().tolist() == [0.5, 1.5]
    assert to_latents(draw, {"scaling_factor": 0.5, "shift_factor": 1.0}).flatten().tolist() == [0.0, 1.0]
    normal = {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [2.0, 0.25]}
    assert to_latents(draw, normal).flatten().tolist() == [0.0, 2.0]


def test_buckets_sizes_and_skipped_examples_are_kept(tmp_path):
    folder = make_folder(tmp_path / "pictures", 12, ((20, 24), (16, 40)), missing=(3,), corrupt=(4,), broken=(5,))
    options = options_of(tmp_path, folder, resolution=32, **BUCKETS)
    manifest = write_cache(
        tmp_path / "cache", options, linear(), shard_size=5, batch_size=2, dtype=torch.float32, seed=1
    )
    assert (manifest["records"], manifest["count"]) == (12, 9)
    assert manifest["skipped"] == {"missing_captions": 1, "unreadable": 1, "broken": 1}
    stream = CachedStream(options, seed=0, with_images=True)
    seen: dict[int, int] = {}
    for batch in drain(stream, 30):
        rows = (batch.pooled[:, 0].int().tolist(), batch.latents, batch.add_time_ids)
        for number, latents, ids in zip(*rows, strict=True):
            seen[number] = seen.get(number, 0) + 1
            original, target = ([20, 24], [32, 32]) if number % 2 == 0 else ([16, 40], [16, 48])
            assert (ids[:2].tolist(), ids[4:].tolist()) == (original, target)
            assert latents.shape == (2, target[0] // 2, target[1] // 2)
    assert sorted(seen) == [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert (stream.report.missing_captions, stream.report.corrupt) == (1, 2)


def test_time_ids_stand_in_sdxls_order(tmp_path):
    folder = make_folder(tmp_path / "pictures", 2, ((20, 50),))
    options = options_of(tmp_path, folder, center_crop=True)
    write_cache(tmp_path / "cache", options, linear())
    direct = open_examples(options, seed=0, with_images=True).batch(2)
    with_prompts_only = options_of(tmp_path, folder, train_cache_dir=str(tmp_path / "prompts"))
    write_cache(tmp_path / "prompts", with_prompts_only, linear(), with_images=False)
    prompts = CachedStream(with_prompts_only, seed=0, with_images=False).batch(2)
    assert prompts.add_time_ids.tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    batch = CachedStream(options, seed=0, with_images=True).batch(2)
    assert torch.equal(batch.add_time_ids, time_ids([example.sizes for example in direct]))
    assert batch.add_time_ids.tolist() == [[20, 50, 0, 12, 16, 16]] * 2


@pytest.mark.parametrize("kill_at", [0, 1, 5, 9])
def test_killed_and_started_again_the_files_are_the_same(tmp_path, kill_at):
    """The run dies while it encodes, at any batch; what its manifest names is kept and not written again."""
    folder = make_folder(tmp_path / "pictures", 11, ((20, 24), (16, 40)), corrupt=(4,))
    options = options_of(tmp_path, folder, resolution=32, **BUCKETS)

    class Killed(BaseException):
        pass

    calls = []

    def dying(pixels):
        if len(calls) == kill_at:
            raise Killed
        calls.append(None)
        return linear().encode_images(pixels)

    shards = {"shard_size": 3, "batch_size": 1}
    whole = write_cache(tmp_path / "whole", options, linear(), **shards)
    good = linear()
    broken = Encoders(good.model, good.encode_prompts, dying, good.empty_prompt, good.scaling)
    with pytest.raises(Killed):
        write_cache(tmp_path / "cache", options, broken, **shards)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    with pytest.raises(DataError, match="is not complete"):
        CachedStream(options, seed=0, with_images=True)
    (tmp_path / "cache" / ".perflow-0a1b2c3d.tmp").write_bytes(b"half a shard")
    resumed = write_cache(tmp_path / "cache", options, linear(), **shards)
    assert resumed == whole
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert write_cache(tmp_path / "cache", options, broken, **shards) == whole  # nothing is left to do


def test_streamed_sources_are_cached_and_resumed_as_well(tmp_path):
    datasets = pytest.importorskip("datasets")
    for shard in range(3):
        rows = {"caption": [f"caption {4 * shard + row}" for row in range(4)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"part-{shard}.parquet")
    source = {"dataset_name": "parquet", "dataset_files": str(tmp_path / "part-*.parquet"), "dataset_streaming": True}
    options = DataOptions(**source, train_cache_dir=str(tmp_path / "cache"), dataloader_num_workers=0)

    class Killed(BaseException):
        pass

    def kill(done, total):
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        write_cache(tmp_path / "cache", options, linear(), with_images=False, shard_size=5, progress=kill)
    write_cache(tmp_path / "cache", options, linear(), with_images=False, shard_size=5)
    write_cache(tmp_path / "whole", options, linear(), with_images=False, shard_size=5)
    assert hashes(tmp_path / "cache") == hashes(tmp_path / "whole")
    batch = CachedStream(options, seed=0, with_images=False).batch(12)
    assert sorted(batch.pooled[:, 0].int().tolist()) == list(range(12))
    assert batch.latents is None
    with pytest.raises(DataError, match="prompts only"):
        CachedStream(options, seed=0, with_images=True)


def test_cached_batches_are_sliced_and_resumed_like_examples(tmp_path):
    folder = make_folder(tmp_path / "pictures", 9, ((20, 24), (16, 40)))
    options = options_of(tmp_path, folder, resolution=32, dataloader_num_workers=2, **BUCKETS)
    write_cache(tmp_path / "cache", options, linear(), shard_size=4)
    one = CachedStream(options, seed=7, with_images=True)
    two = [CachedStream(options, seed=7, with_images=True, process_index=i, num_processes=2) for i in (0, 1)]
    for _ in range(4):
        whole, parts = one.batch(4), [stream.batch(2) for stream in two]
        for column in ("latents", "prompt_embeds", "pooled", "add_time_ids"):
            assert torch.equal(getattr(whole, column), torch.cat([getattr(part, column) for part in parts]))
    state = json.loads(json.dumps(one.state_dict()))
    assert state == two[1].state_dict()
    rest = drain(one, 3, 4)
    one.load_state_dict(state)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(rest, drain(one, 3, 4), strict=True))
    for stream in (one, *two):
        stream.close()


def test_a_cache_of_something_else_is_refused(tmp_path):
    folder = make_folder(tmp_path / "pictures", 4)
    options = options_of(tmp_path, folder)
    write_cache(tmp_path / "cache", options, linear("a#1"))
    CachedStream(options, seed=0, with_images=True, model="renamed#1")
    with pytest.raises(DataError, match="made with the model a#1, not with b#2"):
        CachedStream(options, seed=0, with_images=True, model="b#2")
    with pytest.raises(DataError, match="made with the model a#1, not with b#2"):
        write_cache(tmp_path / "cache", options, linear("b#2"))
    with pytest.raises(DataError, match="`resolution=16`, not with 24"):
        CachedStream(options_of(tmp_path, folder, resolution=24), seed=0, with_images=True)
    with pytest.raises(DataError, match="`dtype=float16`, not with float32"):
        write_cache(tmp_path / "cache", options, linear("a#1"), dtype=torch.float32)
    (folder / "000.png").write_bytes(b"new")
    with pytest.raises(DataError, match="made from other data"):
        CachedStream(options, seed=0, with_images=True)
    alone = DataOptions(train_cache_dir=str(tmp_path / "cache"), dataloader_num_workers=0)
    CachedStream(alone, seed=0, with_images=True).batch(1)  # the source need not be there
    with pytest.raises(DataError, match="holds no cache"):
        CachedStream(DataOptions(train_cache_dir=str(tmp_path)), seed=0, with_images=True)


def test_damaged_files_are_found_when_a_cache_is_opened(tmp_path):
    write_cache(tmp_path / "cache", options_of(tmp_path, make_folder(tmp_path / "pictures", 4)), linear())
    options = DataOptions(train_cache_dir=str(tmp_path / "cache"), dataloader_num_workers=0)
    path = tmp_path / "cache" / "shard-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DataError, match="other contents"):
        CachedStream(options, seed=0, with_images=True)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="bytes, not"):
        CachedStream(options, seed=0, with_images=True, process_index=1, num_processes=2)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        CachedStream(options, seed=0, with_images=True)
    (tmp_path / "cache" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        CachedStream(options, seed=0, with_images=True)


def test_sources_without_usable_examples_make_no_cache(tmp_path):
    folder = make_folder(tmp_path / "pictures", 4, corrupt=range(4))
    with pytest.raises(DataError, match="no picture"):
        write_cache(tmp_path / "cache", options_of(tmp_path, folder), linear())


def test_local_models_are_told_apart_by_their_encoders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "config.json").write_text("{}")
        (tmp_path / name / "unet").mkdir()
    (tmp_path / "two" / "unet" / "config.json").write_text("{}")
    first, second = (model_identity(str(tmp_path / name)) for name in ("one", "two"))
    assert first.partition("#")[2] == second.partition("#")[2]
    (tmp_path / "two" / "vae" / "config.json").write_text("[]")
    assert model_identity(str(tmp_path / "two")) != second
    assert model_identity("org/model") == "org/model"
    assert model_identity("org/model", "main") == "org/model@main"


def test_pipelines_with_pooled_embeddings_give_them_under_their_names():
    """The order of SDXL's `encode_prompt`: prompt, negative prompt, pooled prompt, pooled negative prompt."""

    class Vae:
        config = {"scaling_factor": 0.13, "shift_factor": None}  # noqa: RUF012

    class Pipe:
        device, vae = "cpu", Vae()

        def encode_prompt(self, prompt, device, num_images_per_prompt, do_classifier_free_guidance):
            assert (num_images_per_prompt, do_classifier_free_guidance) == (1, prompt == "")
            rows = 1 if isinstance(prompt, str) else len(prompt)
            return tuple(torch.full((rows, *shape), float(i)) for i, shape in enumerate([(2, 3), (2, 3), (4,), (4,)]))

    encoders = pipeline_encoders(Pipe(), "xl")
    prompts, empty = encoders.encode_prompts(["a", "b"]), encoders.empty_prompt()
    assert {name: (tuple(rows.shape), rows.unique().tolist()) for name, rows in prompts.items()} == {
        "prompt_embeds": ((2, 2, 3), [0.0]),
        "pooled": ((2, 4), [2.0]),
    }
    assert {name: rows.unique().tolist() for name, rows in empty.items()} == {"prompt_embeds": [1.0], "pooled": [3.0]}
    assert encoders.scaling == {"scaling_factor": 0.13}
