"""devices: launchers that would shard the model are refused."""

import pytest

from proteus_cache.errors import UsageError
from proteus_cache.train.devices import make_accelerator


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_a_launcher_that_shards_the_model_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "true")

    with pytest.raises(UsageError, match=f"{name} is set: students are trained data-parallel only"):
        make_accelerator("cpu", "fp32")
