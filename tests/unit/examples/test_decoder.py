from typing import Any

import pytest
import torch

from examples.decoder import Decoder, DecoderConfig, DecoderModule
from lightning_ted.tensor_parallel.plan import expand_plan

SMALL: dict[str, Any] = {
    "sequence_length": 12,
    "d_model": 32,
    "num_heads": 4,
    "ffn_width": 48,
    "expert_width": 40,
    "num_experts": 4,
}
CONFIGS = {
    "gpt": DecoderConfig.gpt(**SMALL),
    "gpt_dense": DecoderConfig.gpt(**SMALL, moe_every=0),
    "gpt_tied_vocab_parallel": DecoderConfig.gpt(**SMALL, tie_embeddings=True, vocab_parallel=True),
    "qwen3": DecoderConfig.qwen3_moe(**SMALL),
    "qwen3_grouped_queries": DecoderConfig.qwen3_moe(**SMALL, num_kv_heads=2),
    "qwen3_all_moe": DecoderConfig.qwen3_moe(**SMALL, moe_every=1, num_layers=3),
}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return CONFIGS[request.param]


def test_num_params_equals_the_built_model(config: DecoderConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    assert config.num_params() == sum(parameter.numel() for parameter in model.parameters())


def test_every_pattern_of_the_plan_matches_a_module(config: DecoderConfig) -> None:
    with torch.device("meta"):
        model = Decoder(config)
    assert set(model.tp_plan.values()) == {style.name for style in expand_plan(model, model.tp_plan).values()}


def test_a_later_token_does_not_change_an_earlier_logit(config: DecoderConfig) -> None:
    torch.manual_seed(0)
    model = Decoder(config).eval()
    tokens = torch.randint(256, (2, 12))
    changed = torch.cat((tokens[:, :8], (tokens[:, 8:] + 1) % 256), dim=1)
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8], rtol=1e-4, atol=1e-5)


def test_every_parameter_of_a_dense_model_gets_a_gradient() -> None:
    model = Decoder(DecoderConfig.qwen3_moe(**SMALL, moe_every=0))
    tokens = torch.randint(256, (2, 12))
    model.loss(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_embeddings_are_one_parameter() -> None:
    model = Decoder(CONFIGS["gpt_tied_vocab_parallel"])
    assert model.head.weight is model.embedding.weight


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_heads=3` does not divide `d_model=256`"):
        DecoderConfig(num_heads=3)
    with pytest.raises(ValueError, match="`num_kv_heads=3` does not divide `num_heads=8`"):
        DecoderConfig(num_kv_heads=3)


def test_generated_text_depends_on_the_seed_alone() -> None:
    module = DecoderModule(CONFIGS["gpt"])
    prompt = torch.tensor([1, 2, 3])
    first, again = module.generate(prompt, 20, seed=1), module.generate(prompt, 20, seed=1)
    assert first.tolist() == again.tolist()
    assert first.tolist() != module.generate(prompt, 20, seed=2).tolist()
    assert first[:3].tolist() == [1, 2, 3]
    assert len(first) == 23  # longer than the 12 positions of the model
    assert module.training


def test_zero_temperature_takes_the_likeliest_token() -> None:
    module = DecoderModule(CONFIGS["gpt"])
    prompt = torch.tensor([1, 2, 3])
    assert module.generate(prompt, 1, temperature=0)[-1] == module(prompt[None])[0, -1].argmax()


def test_the_module_is_rebuilt_from_its_hyperparameters() -> None:
    module = DecoderModule(CONFIGS["qwen3"], learning_rate=0.5)
    again = DecoderModule(**module.hparams)
    assert again.decoder.config == module.decoder.config
    assert again.learning_rate == 0.5
