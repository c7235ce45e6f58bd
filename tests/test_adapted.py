"""Several adapters on one base."""

from collections.abc import Sequence
from pathlib import Path

import adapters
import pytest
import torch
from peft import PeftModel

from job import errors
from job.model import adapted

TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 39]}
PLAIN = {"target_modules": ["q_proj", "down_proj"]}
GROWN = {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny Llama."""
    return adapters.base(tmp_path / "base", tied=False)


@pytest.mark.parametrize("order", [("tokens", "plain", "more"), ("plain", "more", "tokens")], ids="-".join)
def test_each_adapter_computes_what_it_does_alone_whatever_is_beside_it(
    order: Sequence[str], base: Path, tmp_path: Path
) -> None:
    """Trained tokens, a plain LoRA, and more trained tokens, in any order."""
    kinds = {"tokens": TOKENS, "plain": PLAIN, "more": {**TOKENS, "trainable_token_indices": [5]}}
    alone = {}
    for name, how in kinds.items():
        adapters.adapter(adapters.plain(base), tmp_path / name, **how)
        alone[name] = adapters.logits(PeftModel.from_pretrained(adapters.plain(base), str(tmp_path / name)))

    together = adapted.load(adapters.plain(base), {name: tmp_path / name for name in order})

    for name in order:
        together.set_adapter(adapted.called(name))
        torch.testing.assert_close(adapters.logits(together), alone[name])
    with together.disable_adapter():
        torch.testing.assert_close(adapters.logits(together), adapters.logits(adapters.plain(base)))


def test_the_base_says_of_new_tokens_what_it_says_of_all_on_the_mean(base: Path, tmp_path: Path) -> None:
    """So that it does not say them; an adapter of the old vocabulary goes with one of a new."""
    grown = adapters.plain(base, tokens=43)
    grown.name_or_path = ""  # PEFT does not know that it has grown, and keeps nothing of what it was before
    adapters.adapter(grown, tmp_path / "grown", **GROWN)
    adapters.adapter(adapters.plain(base), tmp_path / "plain", **PLAIN)

    together = adapted.load(adapters.plain(base), {name: tmp_path / name for name in ("plain", "grown")})

    before = adapters.logits(adapters.plain(base))
    with together.disable_adapter():
        found = adapters.logits(together)
    torch.testing.assert_close(found[..., :40], before)
    torch.testing.assert_close(found[..., 40:], before.mean(-1, keepdim=True).expand(-1, -1, 3))


def test_two_vocabularies_of_other_sizes_are_an_error_with_both(base: Path, tmp_path: Path) -> None:
    """There is one base below all of them."""
    for tokens in (43, 44):
        adapters.adapter(adapters.plain(base, tokens=tokens), tmp_path / f"to-{tokens}", **GROWN)

    with pytest.raises(errors.ModelError, match=r"\(to-43 43, to-44 44 tokens\): load them one by one"):
        adapted.load(adapters.plain(base), {f"to-{tokens}": tmp_path / f"to-{tokens}" for tokens in (43, 44)})


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_adapters_that_do_not_work_beside_each_other_are_an_error(base: Path, tmp_path: Path) -> None:
    """PEFT loads them, and fails with the first question."""
    adapters.adapter(adapters.plain(base), tmp_path / "whole", **GROWN)
    adapters.adapter(adapters.plain(base), tmp_path / "tokens", **TOKENS)

    with pytest.raises(errors.ModelError, match=r"the adapter tokens in .* cannot be used beside the others \(perhaps"):
        adapted.load(adapters.plain(base), {name: tmp_path / name for name in ("tokens", "whole")})


@pytest.mark.parametrize("name", ["v1.0", "keys", "a b", "ü"])
def test_an_adapter_is_called_as_its_user_likes(name: str, base: Path, tmp_path: Path) -> None:
    """Whatever names modules of torch may have."""
    expected = adapters.logits(adapters.adapter(adapters.plain(base), tmp_path / "one", **PLAIN))

    made = adapted.load(adapters.plain(base), {name: tmp_path / "one"})

    torch.testing.assert_close(adapters.logits(made), expected)
