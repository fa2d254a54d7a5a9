"""Prove that a converted model reads what the checkpoint reads: the same ids of a text, the same prompts of a chat.

llama.cpp and Hugging Face's tokenizer both read the user's examples, the torture texts, and texts with the vocabulary's
own special tokens. For prompts Hugging Face's rule is: render the template, then tokenize the text without adding
special tokens, so that BOS does not occur twice. It is followed here with plain Jinja and the reference tokenizer, and
compared with the prompts as served.

The torture texts are those on which tokenizers differ. Each is short: llama.cpp's tokenizers take time quadratic in a
word's length, its regular expressions memory linear in it. Characters are of Unicode 12 or older, on which all tables
agree.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.errors import VerifyFailed
from convert.tokenizer.chat_template import (
    SPACE_FIRST,
    TEMPLATE_FIELD,
    ChatMessages,
    folder_format,
    named_tokens,
    renderer,
)
from convert.tokenizer.pieces import TokenType, read_tokenizer_config
from convert.tokenizer.pre_tokenizer import APPROXIMATE
from models.errors import BadGguf
from models.gguf.fields import Field, read_fields
from runtime.errors import EngineError, RequestError
from runtime.llama.model import load_tokenizer
from runtime.llama.tokenizer import Tokenizer
from runtime.prompt.prompter import Prompter

from .reference import ReferenceTokenizer, open_reference

MAX_SPECIAL = 64
_SHOWN_CHARS = 120
_SHOWN_IDS = 8
_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True)
class Mismatch:
    """A text with different ids from llama.cpp (`ours`) and from Hugging Face's tokenizer (`theirs`)."""

    text: str
    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    @property
    def first(self) -> int:
        """The index of the first token that differs."""
        pairs = enumerate(zip(self.ours, self.theirs, strict=False))
        return next((place for place, (a, b) in pairs if a != b), min(len(self.ours), len(self.theirs)))

    def __str__(self) -> str:
        start = max(0, self.first - 2)
        ours, theirs = (list(ids[start : start + _SHOWN_IDS]) for ids in (self.ours, self.theirs))
        shown = self.text if len(self.text) <= _SHOWN_CHARS else self.text[:_SHOWN_CHARS] + "…"
        return f"{shown!r} differs at token {self.first}: from {start} on llama.cpp has {ours}, Hugging Face {theirs}"


@dataclass(frozen=True)
class TokenizerParity:
    """The result of a comparison. `mismatches`: torture texts only, where llama.cpp has only an approximation.

    `limits`: in words, how texts were changed so that both sides can agree.
    """

    n_texts: int
    n_tokens: int
    mismatches: tuple[Mismatch, ...] = ()
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerPair:
    """The two sides: a GGUF's vocabulary in llama.cpp, and the tokenizer of the folder it was made from.

    `forced`: texts that only llama.cpp takes for special tokens (`</s>` in any vocabulary).
    """

    folder: Path
    fields: Mapping[str, Field]
    tokenizer: Tokenizer
    reference: ReferenceTokenizer
    forced: frozenset[str]


def open_pair(gguf: Path, folder: Path, reference: ReferenceTokenizer | None = None) -> TokenizerPair:
    """Load both sides, without weights; pass `reference` if it is loaded already.

    Raises VerifyFailed if llama.cpp cannot read the GGUF, TokenizerInvalid for the folder.
    """
    try:
        tokenizer, fields = load_tokenizer(gguf), read_fields(gguf)
    except (EngineError, BadGguf) as error:
        raise VerifyFailed(f"the converted vocabulary cannot be loaded: {error}") from error
    prefix = fields.get("tokenizer.ggml.add_space_prefix")
    reference = reference or open_reference(folder)
    reference.match_spacing(space_prefix=prefix is not None and prefix.value is True)
    return TokenizerPair(folder, fields, tokenizer, reference, frozenset(tokenizer.special_texts) - reference.special)


def check_tokenizer(
    pair: TokenizerPair, texts: Sequence[str], progress: Callable[[int, int], None] | None = None
) -> TokenizerParity:
    """Compare token ids on `texts`, on the torture texts and on texts with special tokens.

    Raises VerifyFailed with the first text that gets different ids. Torture texts may differ if llama.cpp only
    approximates the pre-tokenizer; the result lists them. `progress` receives the texts done and their total.
    """
    _check_ends(pair)
    torture = (*TEXTS, *(around(_special(pair.fields)) if pair.reference.knows_special else ()))
    n_tokens, total = 0, len(texts) + len(torture)
    mismatches: list[Mismatch] = []
    approximate = pair.fields["tokenizer.ggml.pre"].value in APPROXIMATE
    for done, text in enumerate((*texts, *torture)):
        ours, theirs = encode_both(pair, text)
        n_tokens += len(theirs)
        if ours != theirs and not pair.reference.equally_good(ours, theirs):
            mismatches.append(Mismatch(text, tuple(ours), tuple(theirs)))
            if done < len(texts) or not approximate:
                raise VerifyFailed(f"the vocabulary is not the checkpoint's: {mismatches[-1]}")
        if progress is not None:
            progress(done + 1, total)
    return TokenizerParity(total, n_tokens, tuple(mismatches), pair.reference.limits)


def encode_both(pair: TokenizerPair, text: str) -> tuple[list[int], list[int]]:
    """The ids of `text` from llama.cpp and from Hugging Face's tokenizer. Raises VerifyFailed if llama.cpp refuses it.

    Special tokens in `text` are recognised, unless it holds a forced one: then it is compared as the text of a message.
    """
    text = pair.reference.comparable(text)
    special = not any(mark in text for mark in pair.forced)
    try:
        ours = pair.tokenizer.encode(text, add_special=False, parse_special=special)
        return ours, pair.reference.encode(text, special=special)
    except (EngineError, RequestError) as error:
        raise VerifyFailed(f"llama.cpp cannot tokenise {text[:_SHOWN_CHARS]!r}: {error}") from error


def _check_ends(pair: TokenizerPair) -> None:
    """Raise VerifyFailed unless BOS and EOS are added as the files say, as far as llama.cpp has flags for that."""
    text, tokenizer, reference = "Hello", pair.tokenizer, pair.reference
    theirs, bare = reference.encode_whole(text), reference.encode(text)
    if theirs is None:
        return
    around_it = [token for token in theirs if token not in bare]
    ours = tokenizer.encode(text, add_special=True, parse_special=False)
    if set(around_it) <= {tokenizer.bos, tokenizer.eos} and ours != theirs:
        raise VerifyFailed(
            f"BOS or EOS are not added as in the checkpoint: {Mismatch(text, tuple(ours), tuple(theirs))}"
        )


def _special(fields: Mapping[str, Field]) -> list[str]:
    """The texts of special tokens, at most MAX_SPECIAL, from both ends of the vocabulary."""
    kinds = fields["tokenizer.ggml.token_type"].numbers or ()
    wanted = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}
    texts = fields["tokenizer.ggml.tokens"].strings_at(index for index, kind in enumerate(kinds) if kind in wanted)
    special = [text.decode() for text in texts.values() if text.strip()]
    half = MAX_SPECIAL // 2
    return special if len(special) <= MAX_SPECIAL else special[:half] + special[-half:]


@dataclass(frozen=True)
class TemplateParity:
    """The number of conversations with equal prompts, and warnings for the user.

    `skipped`: in words, which of the user's conversations were not compared, and why.
    """

    n_compared: int
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def check_template(
    pair: TokenizerPair, conversations: Sequence[ChatMessages], template_folder: Path | None = None
) -> TemplateParity:
    """Compare prompts as served with those of the folder's template and tokenizer, built-in conversations included.

    `template_folder`: the chat template's, if it is not the tokenizer's.

    A conversation ends with the user's turn. Skips conversations that the folder's template refuses, and those in which
    a message spells a control token: serving treats that as text. A model without a template compares nothing. Raises
    VerifyFailed with the first prompt that differs.
    """
    chat, tokenizer, reference = folder_format(template_folder or pair.folder), pair.tokenizer, pair.reference
    template = pair.fields.get(TEMPLATE_FIELD)
    text = template.value if template is not None and isinstance(template.value, str) else None
    if chat is None or chat.template is None or text is None:
        return TemplateParity(0)
    special = set(tokenizer.special_texts)
    prompter = Prompter(tokenizer, text, _CONTEXT_TOKENS)
    render = renderer(chat.template, named_tokens(read_tokenizer_config(pair.folder)))
    lead = " " if text.endswith(SPACE_FIRST + chat.template) else ""
    compared, extra_bos = 0, False
    refused, spelled = 0, list[str]()
    for place, conversation in enumerate((*conversations, *CONVERSATIONS)):
        plain = [{**message, "content": reference.comparable(str(message.get("content")))} for message in conversation]
        if found := [mark for message in plain for mark in special if mark in str(message.get("content"))]:
            spelled.append(found[0])
            continue
        if (expected := render(plain)) is None:
            refused += place < len(conversations)
            continue
        try:
            ours = prompter.render(plain)
            tokens = list(prompter.chat(plain))
        except (EngineError, RequestError) as error:
            raise VerifyFailed(f"the template as served refuses a conversation: {error}") from error
        # transformers does not write the space: its tokenizer puts it there
        extra_bos |= _compare_prompt(ours.removeprefix(lead), tokens, expected, reference, tokenizer.bos)
        compared += 1
    warning = "the template writes no BOS: llama.cpp adds it, as to any text; training may not have had it"
    return TemplateParity(
        compared, (warning,) if extra_bos else (), tuple(_skipped(len(conversations), refused, spelled))
    )


def _skipped(n_given: int, n_refused: int, spelled: Sequence[str]) -> Iterator[str]:
    """The user's conversations that were not compared."""
    if n_refused:
        yield f"{n_refused} of {n_given} conversations are not compared: the chat template refuses them"
    if spelled:
        yield (
            f"{len(spelled)} of {n_given} conversations are not compared: a message spells a control token "
            f"({spelled[0]!r}), which is read as text when it is served"
        )


def _compare_prompt(
    ours: str, tokens: list[int], expected: str, reference: ReferenceTokenizer, bos: int | None
) -> bool:
    """Raise VerifyFailed unless text and ids are Hugging Face's. True if only ours start with a BOS."""
    if ours != expected:
        raise VerifyFailed(f"the rendered prompt is {ours!r:.200}, Hugging Face's is {expected!r:.200}")
    theirs = reference.encode_rendered(ours)
    extra = tokens[:1] == [bos] and theirs[:1] != [bos]
    if tokens[extra:] != theirs:
        raise VerifyFailed(
            f"a prompt gets other tokens than Hugging Face's: {Mismatch(ours, tuple(tokens), tuple(theirs))}"
        )
    return extra


_LONG_WORD = 600
_SCRIPTS = (
    "The quick brown fox jumps over the lazy dog. I'm sure they'll say we've won, don't you? IT'S CAN'T WE'LL",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. ÄÖÜ ẞ Straße",
    "Voix ambiguë d'un cœur qui au zéphyr préfère les jattes de kiwis. ÉCOLE À L'ŒUVRE",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. ЁЛКА",
    "camelCase HTTPServer переменнаяИмя ÉCOLEécole naïveÄrger ΑθήναΠόλη XMLHttpRequest2Go",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. ΑΒΓ ΐ ᾳ",
    "我能吞下玻璃而不伤身体。價錢：１２３４元「引用」、、。",
    "いろはにほへと ちりぬるを ワカヨタレソ ｶﾞｷﾞ 々〆",
    "다람쥐 헌 쳇바퀴에 타고파 ㄱㄴㄷ",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت ١٢٣",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה שָׁלוֹם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण १२३",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "កាន់តែពិសេសអាច អាច Tiếng Việt: Đặng Thị Ngọc, ngày 3/4 ქართული հայերեն አማርኛ",
)
_CODE = (
    "def f(x: int) -> str:\n    return f'{x:>08.3f}' if x != 0 else \"zero\"  # ok?\n\n\nclass A:\n\tpass\n",
    '{"a": [1, 2.5e-10, null], "b": {"c": "\\u00e9\\n"}}',
    "<html><body class='x'>&amp; <br/></body></html> <!-- note -->",
    "for(i=0;i<10;++i){a[i]+=b->c**2;}//end\r\n#include <stdio.h>\r\n",
    "SELECT * FROM t WHERE a>=1 AND b<>'x'; $ git commit -m \"fix: #123\" && echo $?",
    "https://example.org/a/b?c=d&e=%20f#g user.name+tag@mail.example.org C:\\dir\\file.txt",
    '```````""""......!!!!!!?????? ------======= ~~~ ^^^ ||| <<< >>> ### @@@ %%% &&& *** ___',
)
_SPACES = (
    "one two  three   four    five     six",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \nend",
    "trailing spaces   ",
    "tab\tnew\nline\r\nreturn\rform\x0cfeed\x0bvertical",
    "no\u00a0break\u2003em\u2009thin\u3000wide\u202fnarrow\u2028line\u2029paragraph\u0085next",
    "a" + " " * 40 + "b" + "\n" * 20 + "c" + "\t" * 12 + "d",
)
_NUMBERS = (
    "0 1 12 123 1234 12345 123456 1234567 12345678 3.14159 -1,000,000.50 1e10 0xFF 1_000",
    "½ ¼ ² ³ Ⅷ ① ㊿ १२३ 八百 2024-01-31T23:59:59Z +49 (0)89 1234-567",
)
_SYMBOLS = (
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽👍🏿 🤷🏻\u200d♀️ 😶\u200d🌫️ 🇩🇪🇫🇷 1️⃣ ©️ ™ ✅ 🚀",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), ∑∫√∞≠≤≥±×÷ → ⇒ ░▒▓█ €£¥₹",
    "e\u0301 n\u0303 o\u0308 a\u030a\u0323 Z\u0351\u036b\u0343a\u0321\u034al\u0334g\u0328o\u0321 \u0301start",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word\ufeffbom soft\u00adhyphen",
    "\u202eright-to-left\u202c \u2066iso\u2069",
    "\ue000\ue123\uf8ff \U000f0000\U0010fffd private",
    "\ufffd\ufffdé\ufffd a\ufffdb \ud7ff\ue000 \uffff\ufffe \U0010ffff \u0080\u009f \x00\x01\x1b[0m\x7f",
    "“quoted” ‘single’ „low“ «guillemets» … – — ‑ · • § ¶ ¡¿",
)
_LOOKALIKES = (
    "<|im_start> <|im_end |> < |eot_id|> <|endoftext| <|not_a_token_of_any|> [INST [/INST ] <<SYS>",
    "< s> </ s> <s <bos <eo <end_of_tur <start_of_turn <0x0A> <0xGG> [PAD [UNK <unused <pad",
)
_WORDS = (
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "a" * _LONG_WORD,
    "ab" * (_LONG_WORD // 2),
    "é" * 60 + "語" * 60 + "😀" * 30,
    "xkcdQwzjVbfGhTrPmnLs" * 12,
    "",
    "a",
    "é",
)

TEXTS: tuple[str, ...] = (*_SCRIPTS, *_CODE, *_SPACES, *_NUMBERS, *_SYMBOLS, *_LOOKALIKES, *_WORDS)

CONVERSATIONS: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello, how are you?"},),
    ({"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Is 7 a prime number?"}),
    (
        {"role": "user", "content": "  two spaces before, a line break after\n"},
        {"role": "assistant", "content": "Noted.\n\nAnything else?"},
        {"role": "user", "content": "Übersetze: 'naïve café' → 日本語 👍🏽"},
    ),
    ({"role": "user", "content": _CODE[0]},),
)


def around(special: Sequence[str]) -> Iterator[str]:
    """Texts with real special tokens in them: inside a word, twice in a row, and as a turn of a conversation."""
    for text in special:
        yield f"before{text}after"
    if special:
        yield "".join(special)
        yield f"{special[0]}{special[0]}Hello{special[-1]}"
