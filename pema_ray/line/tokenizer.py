"""Tokenises and detokenises for stages and services alike. Knows `tokenizers`, and nothing of models or owners.

Control tokens come from the tokenizer and its chat template, never from a user's text. A copy of the tokenizer gives
every control token a secret name that no text contains, so it tokenises `</s>` in a text as any other text. A chat
template's own tokens get their secret names before the whole chat is tokenised in one piece.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from pema_ray.errors import UserError

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTABLE = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_UNPRINTABLE)}
"""Character → byte, of byte-level BPEs (Radford et al. 2019, `bytes_to_unicode`)."""
_PROBE_TEXT = "a1я的あ"  # some of it is in the vocabulary of any language
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE_ANSWER = "Zq"
_MAX_FRAMES = 64  # cached: users of a service choose template arguments
_RESERVED_ARGUMENTS = {
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "strftime_now", "sanitize_control_tokens",
}  # fmt: skip
"""Arguments of transformers' own, such as another `chat_template`."""


@dataclass(frozen=True)
class AnswerFrame:
    """What a chat template puts around an answer.

    Attributes:
        lead: between the prompt and the answer's text: white space, mostly none.
        end: the control token after the text, which ends the turn; None without one.
    """

    lead: str
    end: int | None


class TextStream:
    """The text of one answer, token by token; the pieces join to `PLMTokenizer.decode` of all tokens."""

    def __init__(self, tokenizer: PLMTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes: whole characters only."""
        return self._utf8.decode(self._tokenizer.text_bytes(token))

    def finish(self) -> str:
        """The rest at the end of the answer: U+FFFD for an incomplete character."""
        return self._utf8.decode(b"", final=True)

    def fork(self) -> TextStream:
        """Another stream that begins with the same tokens."""
        fork = TextStream(self._tokenizer)
        fork._utf8.setstate(self._utf8.getstate())
        return fork


class PLMTokenizer:
    """The PLM's tokenizer. Threads may share one.

    Args:
        hf: a fast tokenizer of transformers; it is not changed.
        vocab_size: embedding rows of the PLM, `V`; None takes the tokenizer's own size.

    Raises:
        UserError: the tokenizer is a slow one, or its control tokens cannot be told from text.
    """

    def __init__(self, hf: Any, vocab_size: int | None = None) -> None:
        backend = getattr(hf, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"Tokenizer {type(hf).__name__} is not a fast one. Save it with a tokenizer.json and export it again."
            )
        self.hf = hf
        self.eos_token_id: int | None = hf.eos_token_id
        self.chat_template: str | dict[str, str] | None = hf.chat_template
        added = {token.content: (id, token) for id, token in backend.get_added_tokens_decoder().items()}
        self.vocab_size = vocab_size or 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._special = {text: id for text, (id, token) in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        self._vocabulary, self._decoder = backend.id_to_token, backend.decoder
        self._bytes: dict[int, bytes] = {}

        self._control = _ControlTokens([token for _, token in added.values()], self.chat_template)
        self._renamed = _renamed(backend, self._control.names, {text: id for text, (id, _) in added.items()})
        self._prefix = self._find_prefix()
        self._frames: dict[str, AnswerFrame] = {}

    def _find_prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before a text, from a comparison of two encodings."""
        bare = self._renamed.encode(_PROBE_TEXT, add_special_tokens=False).ids
        full = self._renamed.encode(_PROBE_TEXT, add_special_tokens=True).ids
        starts = [n for n in range(len(full)) if full[n : n + len(bare)] == bare]
        if not bare or not starts:
            raise UserError(f"The PLM's tokenizer cannot tokenise {_PROBE_TEXT!r}. Export another tokenizer.")
        return full[: starts[0]]

    # ── text to tokens ──────────────────────────────────────────────────────────

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Token ids `[T]` of a text. Special tokens that it mentions are text.

        Args:
            special_tokens: begin with the tokenizer's prefix (BOS); its suffix (EOS) is always left out.

        Raises:
            UserError: half a character, or a token that the PLM has no embedding for.
        """
        return [*(self._prefix if special_tokens else ()), *self.encode_rendered("", text)]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids `[T]` of a chat. Only the chat template writes control tokens.

        Args:
            template_arguments: more arguments of the template: `tools`, `documents`, `enable_thinking`, …

        Raises:
            UserError: there is no chat template, it refuses the messages, or as `encode` does.
        """
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt, template_arguments))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        today: date | None = None,
    ) -> str:
        """The text of a chat with the template's control tokens under their secret names; raises as `encode_chat`.

        `encode_rendered` tokenises it; `readable` shows it to people.

        Args:
            today: the date for templates that write one; None takes the clock's.
        """
        if not self.chat_template:
            raise UserError("This PLM's tokenizer has no chat template. Send a prompt in place of messages.")
        arguments = dict(template_arguments or {})
        if reserved := sorted(_RESERVED_ARGUMENTS & arguments.keys()):
            raise UserError(f"chat_template_kwargs: '{reserved[0]}' is no argument of a template. Leave it out.")
        try:
            template = self.hf.get_chat_template(None, tools=arguments.get("tools"))
            rendered = self.hf.apply_chat_template(
                self._control.mark(messages),
                chat_template=template if today is None else _dated(template, today),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._control.mark(arguments),
            )
        except Exception as error:  # a template is a program and can raise any type
            raise UserError(f"The tokenizer's chat template refuses the messages: {error}") from None
        return self._control.name_unmarked(rendered)

    def answer_frame(
        self, template_arguments: Mapping[str, Any] | None = None, today: date | None = None
    ) -> AnswerFrame:
        """What the chat template puts around an answer, by rendering one; an empty frame if it refuses."""
        key = json.dumps([template_arguments, today], sort_keys=True, default=str)
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            try:
                self._frames[key] = self._find_frame(template_arguments, today)
            except UserError:
                self._frames[key] = AnswerFrame("", None)
        return self._frames[key]

    def _find_frame(self, template_arguments: Mapping[str, Any] | None, today: date | None) -> AnswerFrame:
        question = [{"role": "user", "content": "a"}]
        exchange = [*question, {"role": "assistant", "content": _PROBE_ANSWER}]
        prompt = self.render_chat(question, True, template_arguments, today)
        before, probe, after = self.render_chat(exchange, False, template_arguments, today).rpartition(_PROBE_ANSWER)
        stripped = prompt.rstrip(" ")
        lead = before.removeprefix(stripped)
        if not before.startswith(stripped) or lead.strip():
            lead = prompt[len(stripped) :]  # the template renders past answers differently, such as without thoughts
        name = self._control.first_name(after) if probe else None
        return AnswerFrame(lead, None if name is None else self._renamed.token_to_id(name))

    def readable(self, rendered: str) -> str:
        """The output of `render_chat`, with the control tokens as people write them."""
        return self._control.readable(rendered)

    def encode_rendered(self, rendered: str, answer: str = "") -> list[int]:
        """Token ids `[T]` of `render_chat`'s output, or its beginning, and of an answer to it, in one piece.

        Raises:
            UserError: as `encode`.
        """
        named = rendered + self._control.name_not_special(answer)
        try:
            named.encode()
        except UnicodeEncodeError as error:
            at = len(self.readable(named[: error.start]))
            raise UserError(
                f"The text has half a character (a lone surrogate) at position {at}. Send whole characters."
            ) from None
        encoding = self._renamed.encode(named, add_special_tokens=False)
        ids = encoding.ids
        if ids and max(ids) >= self.vocab_size:
            first = next(n for n, id in enumerate(ids) if id >= self.vocab_size)
            at = len(self.readable(named[: encoding.offsets[first][0]]))
            raise UserError(
                f"Token {self.token_text(ids[first])!r} ({ids[first]}) at position {at} of the text has no embedding: "
                f"the PLM knows {self.vocab_size} tokens. Take it out of the text."
            )
        return ids

    # ── tokens to text ──────────────────────────────────────────────────────────

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer: without special tokens, with the space before its first word."""
        return b"".join(map(self.text_bytes, ids)).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        """A decoder for one answer, token by token."""
        return TextStream(self)

    def text_bytes(self, id: int) -> bytes:
        """The UTF-8 bytes that a token adds to an answer: none for a special token."""
        return b"" if id in self._special_ids else self.token_bytes(id)

    def token_bytes(self, id: int) -> bytes:
        """A token's own UTF-8 bytes, even of a part of a character; for a special token, those of its name."""
        if id not in self._bytes:
            self._bytes[id] = self._spell(id)
        return self._bytes[id]

    def token_text(self, id: int) -> str:
        """`token_bytes` as text, with U+FFFD for parts of characters."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def _spell(self, id: int) -> bytes:
        token = self._vocabulary(id)
        if token is None:  # an embedding row beyond the vocabulary
            return b""
        if id in self._special_ids:
            return token.encode()
        # Decoders treat the first and last token of a text differently, so this puts the token between two others.
        tail = self._join(["a", "a"])[1:]
        text = self._join(["a", token, "a"]).removesuffix(tail)[1:]
        if "\ufffd" not in text:
            return text.encode()
        if fallback := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(fallback[1], 16)])
        return bytes(_BYTE_LEVEL[c] for c in token) if all(c in _BYTE_LEVEL for c in token) else text.encode()

    def _join(self, tokens: list[str]) -> str:
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

    def special_id(self, text: str) -> int | None:
        """The id of the special token with this text; `decode` leaves it out."""
        return self._special.get(text)


class _ControlTokens:
    """Tells the control tokens that a tokenizer or its chat template writes from those that a text mentions.

    Control tokens are the special tokens, and the added tokens that the chat template writes.

    Attributes:
        names: token → secret name.
    """

    def __init__(self, added: Sequence[Any], template: str | dict[str, str] | None) -> None:
        written = "\n".join(template.values() if isinstance(template, dict) else [template or ""])
        tokens = [t for t in added if t.special or (t.content in written and not t.content.isspace())]
        nonce = str(secrets.randbits(64))
        self.names = {token.content: f"\ufdd0{nonce}.{n}\ufdd1" for n, token in enumerate(tokens)}
        self._contents = {name: text for text, name in self.names.items()}
        self._any_name = re.compile(f"\ufdd0{nonce}[.][0-9]+\ufdd1")
        self._any_not_special = re.compile(_any_of(token.content for token in tokens if not token.special))

        open_, close, break_ = (f"@{nonce}{c}" for c in ".,-")  # no filter of Jinja changes these characters
        self._open, self._close, self._break = open_, close, break_
        self._any_mark = re.compile(f"@{nonce}[.,-]")
        any_token = _any_of(self.names)
        self._any_mentioned = re.compile(rf"(?:{any_token})\s*")
        self._any_rendered = re.compile(rf"{re.escape(open_)}(?:{any_token})\s*{close}|({any_token})")
        self._heads = tuple({text[:n] for text in self.names for n in range(1, len(text))})
        self._tails = tuple({text[n:] for text in self.names for n in range(1, len(text))})

    def mark(self, value: Any) -> Any:
        """A template's input with marks around the control tokens that it mentions.

        A string that ends or begins with a part of a control token also gets a mark, since a template could join parts.
        White space goes within the marks: templates that split at `</think>` strip what follows.
        """
        if isinstance(value, str):
            marked = self._any_mentioned.sub(lambda match: self._open + match[0] + self._close, value)
            before = self._break if marked.startswith(self._tails) else ""
            return before + marked + (self._break if marked.endswith(self._heads) else "")
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        if value is None or isinstance(value, int | float):
            return value
        raise TypeError(f"messages hold text, numbers, lists and mappings, not {type(value).__name__}")

    def name_unmarked(self, rendered: str) -> str:
        """A template's output for `mark`'s: with secret names for its own control tokens, without marks."""
        named = self._any_rendered.sub(lambda match: self.names[match[1]] if match[1] else match[0], rendered)
        return self._any_mark.sub("", named)

    def first_name(self, named: str) -> str | None:
        """The secret name that a text begins with, white space aside."""
        match = self._any_name.match(named.lstrip())
        return None if match is None else match[0]

    def name_not_special(self, text: str) -> str:
        """A text with the control tokens that are not special, such as `<think>`, under their names."""
        return self._any_not_special.sub(lambda match: self.names[match[0]], text)

    def readable(self, named: str) -> str:
        """A text without secret names."""
        return self._any_name.sub(lambda match: self._contents[match[0]], named)


def _dated(template: str, today: date) -> str:
    """A chat template with a fixed date; transformers' `strftime_now` takes the clock's."""
    if "strftime_now" not in template:
        return template
    dates = json.dumps({match[2]: today.strftime(match[2]) for match in _STRFTIME.finditer(template)})
    expression = f"({dates}).get(format, '{today.isoformat()}')"
    return f"{{%- macro strftime_now(format) -%}}{{{{ {expression} }}}}{{%- endmacro %}}{template}"


_STRFTIME = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")


def _any_of(texts: Iterable[str]) -> str:
    """A regular expression for one of some texts, the longest first as tokenizers match."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def _renamed(backend: Any, names: Mapping[str, str], ids: Mapping[str, int]) -> Any:
    """A copy of a tokenizer in which control tokens have other names, in its vocabulary too.

    Otherwise a Unigram model, or a BPE whose merges lead there, would find `</s>` in plain text.
    """
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = None
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False, single_word=False)
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): id for text, id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & names.keys()]
    copy = Tokenizer.from_str(json.dumps(spec))
    for text, id in ids.items():
        if copy.token_to_id(names.get(text, text)) != id:
            raise UserError(f"The tokenizer's token {text!r} cannot be told from text. Export another tokenizer.")
    return copy
