"""Well-known checkpoints' settings: read as published and as each transformers writes them, the same logits; and what
is saved here is read by each transformers."""

from __future__ import annotations

import pytest

from tests.outside.files.environments import ENVIRONMENTS
from tests.outside.files.made import Made, check_logits, check_saved_here, make
from tests.outside.files.published import PUBLISHED, small
from tp_decoders.registry import config_from_hf


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    configs = {name: small(hf) for name, hf in PUBLISHED.items()}
    return make(request.param, tmp_path_factory.mktemp("published"), configs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_logits_are_those_of_transformers(name: str, made: Made) -> None:
    check_logits(made, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_reads_what_was_saved_here(name: str, made: Made) -> None:
    check_saved_here(made, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_its_own_sizes_are_understood(name: str) -> None:
    hf = PUBLISHED[name]
    config = config_from_hf(hf)
    assert config.vocab_size == hf["vocab_size"] and config.d_model == config.n_heads * config.head_dim
