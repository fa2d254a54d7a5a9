"""Texts on which tokenizers differ, for the proof of a vocabulary beside the user's own examples.

Each text is short: llama.cpp's tokenizers take time quadratic in a word's length, its regular expressions memory linear
in it. Characters are of Unicode 12 or older, on which all tables agree.
"""

from collections.abc import Iterator, Sequence

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
