"""How the flow-matching base is trained: what its pipeline's network is called with, in fewer tokens."""

import pytest
import torch
from torch.nn.functional import pad

from perflow_diffusers.miniature import miniature_folder


@pytest.fixture(scope="module")
def pipe():
    from bases import Flow

    torch.manual_seed(0)
    pipe = Flow.new(miniature_folder() / "avatars" / "vae")
    for weight in pipe.transformer.parameters():
        if not weight.any():  # the last layers begin at zero, where every output is alike
            torch.nn.init.normal_(weight, std=0.02)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.double().requires_grad_(False)
    return pipe


def test_one_token_stands_for_the_256_zeros_of_the_third_text_encoder(pipe):
    from bases import T5_TOKENS, Flow

    prompts = ["a person with red hair", "a sad person with a hat"]
    tokens, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    z = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([900.0, 300.0], dtype=torch.float64)

    def call(tokens, pooled):
        return pipe.transformer(
            hidden_states=z, timestep=times, encoder_hidden_states=tokens, pooled_projections=pooled
        ).sample

    wanted = call(tokens, pooled)
    base = Flow(pipe)
    ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    few, same_pooled = base.encoded(ids)
    assert torch.equal(few, tokens[:, :-T5_TOKENS]) and torch.equal(same_pooled, pooled)
    assert not tokens[:, -T5_TOKENS:].any() and wanted.abs().mean() > 0.1
    torch.testing.assert_close(call(pad(few, (0, 0, 0, 1)), pooled), wanted, rtol=0, atol=1e-13)
    base.finish()
    assert torch.equal(call(tokens, pooled), wanted)


def test_the_loss_is_that_of_the_velocity(pipe):
    """A network that always answers zero has the mean square of noise minus data."""
    from bases import Flow

    base = Flow(pipe)
    latents = 0.5 * torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = torch.zeros(64, 32, dtype=torch.int64)

    class Zero(torch.nn.Module):
        def forward(self, hidden_states, **_):
            return type("Out", (), {"sample": torch.zeros_like(hidden_states)})

    torch.manual_seed(4)
    loss = base.loss(Zero(), latents, ids)
    base.finish()
    torch.manual_seed(4)
    noise = torch.randn_like(latents)
    assert float(loss) == pytest.approx(float((noise - latents).float().pow(2).mean()), rel=1e-6)
    assert 1.2 < float(loss) < 1.3  # 1 + 0.25
