"""A service behind a data owner's prefix answers as one whose prompts show the text that the prefix started from."""

from __future__ import annotations

from pathlib import Path

import openai
import pytest
from api_kit import Service, save_adapter

from pema_ray.data_owner.prefixed import TrainedPrefix
from pema_ray.plm_owner.engine import LocalPLM


async def test_answers_are_those_of_the_replaced_text(tiny_plm, tiny_plm_folder, tmp_path: Path):
    local = LocalPLM(tiny_plm("llama"))
    card, tokenizer = (await local.describe()).card, (await local.lm_head()).tokenizer()
    shown = "the cat sat on"
    replaces = tuple(tokenizer.encode(shown))
    trained = TrainedPrefix(await local.read_prefix(replaces), replaces, card.fingerprint)
    await local.end()
    prompts = [f"{shown} {rest}" for rest in ("the mat", "a dog and")]
    answers = []
    for name, prefix in (("plain", None), ("behind", trained)):
        save_adapter(card if prefix is None else trained.card(card), tmp_path / name)
        live = {"adapters": {"mine": str(tmp_path / name)}}
        async with Service(tiny_plm_folder("llama"), live, prefix=prefix) as service:
            asked = {"model": "mine", "max_tokens": 8, "temperature": 0}
            answers.append(
                [(await service.client.completions.create(prompt=p, **asked)).choices[0].text for p in prompts]
            )
            if prefix is not None:
                with pytest.raises(openai.APIError, match=r"takes the place of the first .* tokens of every prompt"):
                    await service.client.completions.create(prompt="another beginning of it", **asked)
    plain, behind = answers
    assert behind == plain and len(set(plain)) == 2
