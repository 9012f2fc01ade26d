"""A service behind a data owner's prefix answers as one whose prompts show the text that the prefix started from; so do
adapters that bring prefixes of their own."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import openai
import pytest
from api_kit import Service, save_adapter

from pema_ray.data_owner.prefixed import TrainedPrefix
from pema_ray.errors import UserError
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


async def test_adapters_bring_prefixes_of_their_own(tiny_plm, tiny_plm_folder, tmp_path: Path):
    local = LocalPLM(tiny_plm("llama"))
    card, tokenizer = (await local.describe()).card, (await local.lm_head()).tokenizer()
    shown = {"first": "the cat sat on", "second": "a dog and a"}
    save_adapter(card, tmp_path / "plain")
    live = {"plain": str(tmp_path / "plain"), "alone": str(tmp_path / "first" / "prefix")}
    for name, text in shown.items():
        replaces = tuple(tokenizer.encode(text))
        trained = TrainedPrefix(await local.read_prefix(replaces), replaces, card.fingerprint)
        save_adapter(trained.card(card), tmp_path / name)
        trained.save_pretrained(tmp_path / name / "prefix", card.name)
        live[name] = str(tmp_path / name)
    await local.end()
    prompt, asked = "{} the mat", {"max_tokens": 8, "temperature": 0}
    async with Service(tiny_plm_folder("llama"), {"adapters": live}) as service:

        async def answer(model: str, text: str) -> str:
            answered = await service.client.completions.create(model=model, prompt=prompt.format(text), **asked)
            return answered.choices[0].text

        expected = [await answer("plain", text) for text in shown.values()]
        assert expected == await asyncio.gather(*(answer(name, text) for name, text in shown.items()))
        assert await answer("alone", shown["first"]) == await answer(card.name, shown["first"])
        with pytest.raises(openai.APIError, match=r"takes the place of the first .* tokens of every prompt"):
            await answer("first", shown["second"])
        prefixes = {predictor.prefix for predictor in service.owner.decoder.predictors.values()} - {None}
        assert set(service.owner._prefixed.named) == {prefix.name for prefix in prefixes}
        del prefixes
        await service.owner.change({"adapters": {"plain": live["plain"]}})
        gc.collect()
        assert not service.owner._prefixed.named  # nobody holds them any more
    async with Service(tiny_plm_folder("llama"), {}, prefix_positions=3) as service:
        with pytest.raises(UserError, match=r"A prefix of \d+ positions is longer than is kept here"):
            await service.owner.change({"adapters": {"first": live["first"]}})
    async with Service(tiny_plm_folder("llama"), {}, prefix_positions=0) as service:
        with pytest.raises(UserError, match=r"adapters.first: was trained behind a prefix, and this PLM owner takes"):
            await service.owner.change({"adapters": {"first": str(tmp_path / "first")}})
