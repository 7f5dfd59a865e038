"""tokenizer.json against open_clip's own tokenizer: equal ids on odd captions, equal truncation and padding, known limits."""

import random
import unicodedata
from copy import deepcopy
from pathlib import Path
from typing import Any

import ftfy
import open_clip
import pytest
from ftfy import chardata
from tokenizers import Tokenizer

from clipkd.export.tokenizer import check_tokenizer, convert_bpe, convert_tokenizer
from clipkd.models.encoder import Encoder
from tests.export.students import clip_student

PIECES = {
    "words": "a photo of the DOG isn't it's we'll I'M they've 'S rock'n'roll naïve Über straße ÉCOLE cafe\u0301 ſ ǅ",
    "greek and turkish": "İstanbul ΣΟΦΟΣ ΟΔΥΣΣΕΥΣ Σ ἈΧΙΛΛΕΎΣ ΑΣ'Α ΑΣ. ıI",
    "digits": "1 23 4567 3.14 1,000 ½ ² ① Ⅷ ٣ १२ 𝟙",
    "punctuation": "! ?? ... --- #$% <> </w> _ __ a_b ~ ` ^ @ & && * ( ) [ ] { } | \\ / : ; ' '' \" ,",
    "curly quotes": "“ ” „ ‟ ‘ ’ ‚ ‛ ʼ « » ‹ › – — … •",
    "ligatures": " ".join(map(chr, chardata.LIGATURES)),
    "wide": " ".join(map(chr, chardata.WIDTH_MAP)),
    "control": " ".join([*map(chr, chardata.CONTROL_CHARS), "\x1b[31m"]),
    "entities": "&amp; &lt; &gt; &quot; &apos; &#39; &#039; &#x27; &nbsp; &amp;amp; &amp;quot; &amp;amp;lt; &eacute; &EACUTE; "
    "&copy &copy; &copyright &reg; &trade; &hellip; &mdash; &rsquo; &#8217; &#146; &#x2019; &alpha; &hearts; &AMP; &LT; &lt",
    "emoji": "👩‍👩‍👧‍👦 ❤️ 🇩🇪 👍🏽 😀 🏴󠁧󠁢󠁷󠁬󠁳󠁿 ⛄ ™ ©",
    "scripts": "日本語 中文 한국어 ﾊﾟ ｶﾞ か\u3099 العربية עברית \u200f فارسی हिन्दी ไทย Привет и\u0306 አማርኛ \u212b \u1e9b\u0323 ẞ",
    "special": "<|endoftext|> <|startoftext|> <|ENDOFTEXT|>",
}
SPACES = ["", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "\u3000", "\u2028", "\x0b", "\x0c", "\u202f"]


def odd_captions(count: int, seed: int) -> list[str]:
    """Captions of one kind of pieces mixed with words: ftfy takes some mixtures of kinds for broken encodings."""
    draw = random.Random(seed)
    kinds = [[*pieces.split(" "), *PIECES["words"].split(" ")] for pieces in PIECES.values()]
    return [
        "".join(draw.choice(kind) + draw.choice(SPACES) for _ in range(draw.choice([0, 1, 2, 4, 8, 40])))
        for kind in draw.choices(kinds, k=count)
    ]


def has_no_repair(text: str) -> bool:
    """Whether ftfy finds no mojibake, and no "<" keeps it from undoing entities before it straightens quotes."""
    return ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False, unescape_html=True)


def different(tokenize: open_clip.SimpleTokenizer, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    rows = tokenize(texts).tolist()
    found = [encoding.ids for encoding in map(tokenizer.encode, texts)]
    return [t for t, row, ids in zip(texts, rows, found, strict=True) if row != ids + [0] * (len(row) - len(ids))]


@pytest.fixture(scope="module")
def student() -> Encoder:
    return clip_student()


@pytest.fixture(scope="module")
def bpe() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def converted(bpe: open_clip.SimpleTokenizer) -> Tokenizer:
    return convert_bpe(bpe)


def hf_student(folder: Path, **text: Any) -> Encoder:
    words = {"hf_tokenizer_name": str(folder), "vocab_size": 100, "context_length": 10}
    return clip_student(text_cfg={**words, **text})


def test_a_caption_gets_the_ids_of_clip(converted: Tokenizer) -> None:
    assert converted.encode("A  cat's\n“photo”").ids == [49406, 320, 2368, 568, 257, 1125, 257, 49407]
    assert converted.encode("").ids == [49406, 49407]
    assert [converted.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>")] == [49406, 49407]


def test_three_thousand_odd_captions_get_open_clips_ids(bpe: open_clip.SimpleTokenizer, converted: Tokenizer) -> None:
    captions = [text for text in odd_captions(3000, seed=0) if has_no_repair(text)]
    assert len(captions) > 2800
    assert different(bpe, converted, captions) == []


def test_every_fortieth_character_gets_open_clips_ids(bpe: open_clip.SimpleTokenizer, converted: Tokenizer) -> None:
    # Assigned ones only: what is new to one side's Unicode tables may be a letter to the other's.
    characters = [chr(n) for n in (*range(0x80), *range(0x80, 0x1F000, 40), *chardata.LIGATURES, *chardata.WIDTH_MAP)]
    texts = [f"{c}a b{c}" for c in characters if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    assert len(texts) > 2000
    assert different(bpe, converted, texts) == []


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("a cafÃ©", "mojibake"),
        ("&zopf;", "HTML 4"),
        ("<b>it&rsquo;s", "curly quotes"),
        ("a <start_of_text>", "<start_of_text>"),
    ],
)
def test_the_limits_of_the_docstring_are_real(
    bpe: open_clip.SimpleTokenizer, converted: Tokenizer, text: str, limit: str
) -> None:
    assert different(bpe, converted, [text]) == [text]
    assert limit in (convert_tokenizer.__doc__ or "")


@pytest.mark.parametrize("clean", ["lower", "whitespace", "canonicalize"])
def test_each_cleaning_of_open_clip_is_kept(clean: str) -> None:
    tokenize = open_clip.SimpleTokenizer(clean=clean)
    captions = [text for text in odd_captions(500, seed=1) if has_no_repair(text)]
    assert different(tokenize, convert_bpe(tokenize), captions) == []


def test_a_causal_tower_gets_texts_cut_and_padded_to_the_longest_of_the_batch(student: Encoder) -> None:
    tokenizer = convert_tokenizer(student)
    ids = tokenizer.encode("a dog " * 100).ids
    assert ids == [49406, *[320, 1929] * 5, 49407]
    assert ids == student.spec.tokenize(["a dog " * 100])[0].tolist()
    short, long = tokenizer.encode_batch(["a cat", "a cat and a dog"])
    assert short.ids == [49406, 320, 2368, 49407, 49407, 49407, 49407]
    assert short.attention_mask == [1, 1, 1, 1, 0, 0, 0]
    assert long.ids == [49406, 320, 2368, 537, 320, 1929, 49407]


@pytest.mark.parametrize("text", [{"no_causal_mask": True, "pool_type": "last"}, {"pool_type": "last"}])
def test_a_tower_that_sees_its_padding_gets_that_of_training(text: dict[str, Any]) -> None:
    encoder = clip_student(text_cfg=text)
    tokenizer = convert_tokenizer(encoder)
    ids = tokenizer.encode("a cat").ids
    assert ids == [49406, 320, 2368, 49407, 0, 0, 0, 0, 0, 0, 0, 0]
    assert ids == encoder.spec.tokenize(["a cat"])[0].tolist()
    tokenizer.enable_padding(pad_id=7, pad_token="(", length=12)
    with pytest.raises(ValueError, match="should be"):
        check_tokenizer(encoder, tokenizer)


def test_a_transformers_tokenizer_is_copied_with_open_clips_cleaning(siglip_folder: Path) -> None:
    encoder = hf_student(siglip_folder, tokenizer_kwargs={"clean": "canonicalize"})
    tokenizer = convert_tokenizer(encoder)
    captions = ["A Drawing, of a CAT &amp; two “dogs”…", "", "cat " * 30, *odd_captions(200, seed=2)]
    captions = [text for text in captions if has_no_repair(text)]
    assert encoder.spec.tokenize(captions).tolist() == [found.ids for found in tokenizer.encode_batch(captions)]
    assert encoder.spec.tokenize.tokenizer.backend_tokenizer.normalizer is not tokenizer.normalizer  # type: ignore[attr-defined]


def test_a_tokenizer_that_no_file_can_express_is_refused(student: Encoder, siglip_folder: Path) -> None:
    for text, words in (
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "at random"),
        ({"tokenizer_kwargs": {"additional_special_tokens": ["<x>"]}, "vocab_size": 49409}, "3 special tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_tokenizer(clip_student(text_cfg=text))
    tokenize = open_clip.SimpleTokenizer()
    tokenize.clean_fn = lambda x: x.upper()
    with pytest.raises(ValueError, match=r"cleans texts by .*'canonicalize', 'lower', 'whitespace'"):
        convert_bpe(tokenize)
    for option, value in (("strip_sep_token", True), ("tokenizer_mode", "clips")):
        encoder = hf_student(siglip_folder)
        setattr(encoder.spec.tokenize, option, value)
        with pytest.raises(ValueError, match=f"cannot express {option}=.*use --to open_clip"):
            convert_tokenizer(encoder)
    encoder = deepcopy(student)
    object.__setattr__(encoder.spec, "tokenize", lambda texts: student.spec.tokenize(texts))
    with pytest.raises(ValueError, match=r"a function has no tokenizer\.json"):
        convert_tokenizer(encoder)
