"""An answer stands where a chat template puts it and ends as the template ends a turn, in eight families of models."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.errors import UserError
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.tasks import Pair, Prompter, Task

TASK = Task(name="t", template="{source}", chat_user="{source}")
PAIR = Pair(1, "Thou art 1.", "You are 1.")


@dataclass(frozen=True)
class Family:
    """A family's chat template, shortened, and its expected parts.

    Attributes:
        eos: what the tokenizer calls its EOS.
        end: what the template ends a turn with.
        lead: what the template writes before an answer.
    """

    template: str
    control: tuple[str, ...]
    eos: str
    end: str
    lead: str = ""

    def tokenizer(self) -> PLMTokenizer:
        alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        pairs = [("Ġ", "Y"), ("Ġ", "a"), ("Y", "o"), ("ĠY", "o")]  # what a space before the answer would change
        vocabulary = alphabet | {a + b: len(alphabet) + n for n, (a, b) in enumerate(pairs)}
        raw = Tokenizer(models.BPE(vocabulary, pairs))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.control])
        hf = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=self.eos, bos_token=self.control[0])
        hf.chat_template = self.template
        return PLMTokenizer(hf)


FAMILIES = {
    "Llama 3.2": Family(
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
        "<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
        "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
    ),
    "Gemma": Family(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n"
        "{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
    ),
    "Phi 3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
    ),
    "Phi 4": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        "<|endoftext|>",
        "<|im_end|>",
    ),
    "DeepSeek": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}"
        "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "Cohere": Family(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if m.role == 'user' else "
        "'<|CHATBOT_TOKEN|>' }}{{ m.content | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "Qwen 3": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
        "{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_end|>",
        "<|im_end|>",
    ),
    "Mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} "
        "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        "</s>",
        " ",
    ),
}
KWARGS = {"Qwen 3": {"enable_thinking": False}}
every_family = pytest.mark.parametrize("name", FAMILIES)


def prompter_of(name: str) -> Prompter:
    return Prompter(FAMILIES[name].tokenizer(), TASK, chat=True, chat_template_kwargs=KWARGS.get(name))


@every_family
def test_prompt_target_and_end_are_what_the_template_makes_of_the_whole_chat(name: str):
    family, prompter = FAMILIES[name], prompter_of(name)
    tokenizer = prompter.tokenizer
    assert prompter.end_token == tokenizer.hf.convert_tokens_to_ids(family.end)
    encoded = prompter.encode_pair(PAIR)
    rendered = tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": PAIR.source}, {"role": "assistant", "content": PAIR.target}],
        tokenize=False,
        **KWARGS.get(name, {}),
    )
    rendered = rendered.replace(date.today().strftime("%d %b %Y"), "26 Jul 2024")
    ids = tokenizer.hf(rendered, add_special_tokens=False).input_ids
    joined = [*encoded.prompt, *encoded.target, prompter.end_token]
    assert joined == ids[: len(joined)]
    assert tokenizer.decode(encoded.target) == family.lead + PAIR.target
    assert prompter.encode_prompt(PAIR.source) == encoded.prompt


@every_family
def test_an_answer_stops_where_a_turn_ends_whatever_the_plm_calls_its_eos(name: str):
    request = RequestBuilder(prompter_of(name), GenerateConfig(), None, 500).build("Thou art 1.")
    assert request.eos == (prompter_of(name).tokenizer.hf.convert_tokens_to_ids(FAMILIES[name].end),)


def test_thinking_is_switched_off_by_the_tasks_own_arguments():
    tokenizer = FAMILIES["Qwen 3"].tokenizer()
    thinking = Prompter(tokenizer, TASK, chat=True).text("hi")
    assert prompter_of("Qwen 3").text("hi") == thinking + "<think>\n\n</think>\n\n"


def test_a_template_that_names_the_day_gives_the_same_prompt_on_every_day():
    assert "Today Date: 26 Jul 2024\n" in prompter_of("Llama 3.2").text("hi")


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "add_generation_prompt", "strftime_now"])
def test_what_is_no_argument_of_templates_is_refused(name: str):
    prompter = Prompter(FAMILIES["Qwen 3"].tokenizer(), TASK, chat=True, chat_template_kwargs={name: "{{ 1 }}"})
    with pytest.raises(UserError, match=f"Task 't': chat_template_kwargs: '{name}' is no argument of a template"):
        prompter.encode_prompt("hi")
