"""Convert a model's tokenizer to a tokenizer.json, which runs without open_clip and ftfy."""

import json
import re
import string
from collections.abc import Iterable
from html import entities, unescape
from typing import Any

import open_clip
from ftfy import chardata
from open_clip.tokenizer import get_clean_fn
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase, Normalizer, Replace, Strip

from clipkd.models.create import find_text_tower
from clipkd.models.encoder import PROBES, Encoder

START, END = "<|startoftext|>", "<|endoftext|>"
"""transformers' names of open_clip's <start_of_text> and <end_of_text>."""

WORDS = r"(?i:'[sſ]|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words that CLIP's BPE splits further."""

FINAL_SIGMA = (
    r"(?<=\p{Cased}|\p{Cased}\p{Case_Ignorable}|\p{Cased}\p{Case_Ignorable}{2})Σ(?!\p{Case_Ignorable}*\p{Cased})"
)
"""A Σ that ends a word: Python lowers it to ς, `tokenizers` to σ."""

CHECKED = (
    *PROBES,
    *("", " \t\n ", "A photo\r\nof\u2003a  dog ", "it's I'LL we've 'twas ''s", "1234 3½ ①", "#$%!!! ...--- </w> a_b"),
    *("İstanbul ΣΟΦΟΣ ΟΔΥΣΣΕΥΣ.", "cafe\u0301 Å \u212b ﬁﬂ ŉ ǆ", "“a” ‘b’ c’s ʼn"),
    *("ＬＯＵＤ　ﾊﾟﾋﾟ ﾡￂ", "日本語 한국어 العربية हिन्दी"),
    *("👩‍👩‍👧‍👦 ❤️ 🇩🇪 👍🏽", "a\x00b\x7fc\ufeffd\ufffce", "&eacute;&copy &hellip;", "AT&amp;amp;T &lt;b&gt; &quot;x&quot;"),
    *("it&#39;s &#x27;y&#x27;&nbsp;z &rsquo; &#8220;q&#x201D;", "I &hearts; it &apos;s &EACUTE;"),
    *("x <|endoftext|> y<|startoftext|>!", "supercalifragilisticexpialidocious" * 9),
)  # fmt: skip
"""Texts for which a converted tokenizer must give the same ids."""


def convert_tokenizer(encoder: Encoder) -> Tokenizer:
    """Convert encoder.spec.tokenize, with its start and end tokens, truncation and padding.

    A causal tower that pools at the end token gets texts padded to the longest of the batch; any other sees its padding and
    gets it to the full context, as in training. CLIP's BPE uses transformers' names of the special tokens; spelled out in a
    caption, these stay ordinary text, as in training.

    Known differences, for which `tokenizers` has no rule: mojibake that ftfy repairs ("Ã©"); entities other than numbers and
    names of HTML 4's characters; entities of curly quotes in a text with a "<" or without their semicolon; captions with
    open_clip's own <start_of_text> or <end_of_text> (for a transformers tokenizer, its special tokens); letters newer than
    the Unicode tables of either side.

    Raises: ValueError if the ids of CHECKED cannot be reproduced.
    """
    tokenize: Any = encoder.spec.tokenize
    if isinstance(tokenize, open_clip.SimpleTokenizer):
        tokenizer = convert_bpe(tokenize)
        if sees_padding(encoder):
            tokenizer.enable_padding(pad_id=0, pad_token=tokenizer.id_to_token(0), length=tokenize.context_length)
        else:
            tokenizer.enable_padding(pad_id=tokenize.eot_token_id, pad_token=END)
    else:
        tokenizer = copy_fast(tokenize, encoder.name)
    check_tokenizer(encoder, tokenizer)
    return tokenizer


def sees_padding(encoder: Encoder) -> bool:
    """Whether a text's features depend on the tokens after its end token."""
    tower, _ = find_text_tower(encoder.model)
    pool_type = getattr(tower, "text_pool_type", None) or getattr(tower, "pool_type", None)
    return encoder.short_text_tower is None or pool_type not in ("argmax", "eos")


def convert_bpe(bpe: open_clip.SimpleTokenizer) -> Tokenizer:
    """Convert open_clip's byte-pair encoding, with cleaning and truncation but without padding.

    Raises: ValueError for additional special tokens and for texts shortened at random.
    """
    if bpe.reduction_fn is not None:
        raise ValueError("a tokenizer with a reduction_mask drops tokens at random, which no file can express")
    if len(bpe.all_special_ids) != 2:
        raise ValueError(
            f"the tokenizer has {len(bpe.all_special_ids)} special tokens; only start and end can be written"
        )
    names = {bpe.sot_token_id: START, bpe.eot_token_id: END}
    vocabulary = {names.get(number, token): number for token, number in bpe.encoder.items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[(a, b) for a, b in bpe.bpe_ranks], end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(cleaning(bpe.clean_fn))
    # Without ByteLevel's own regex, which would split runs of punctuation again.
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, bpe.sot_token_id), (END, bpe.eot_token_id)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])
    tokenizer.enable_truncation(bpe.context_length or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    return tokenizer


def copy_fast(tokenize: Any, name: str) -> Tokenizer:
    """Copy the `tokenizers` part of a transformers tokenizer, with the cleaning, truncation and padding of open_clip.

    Raises: ValueError if it has no such part, or open_clip changes its ids afterwards.
    """
    fast = getattr(getattr(tokenize, "tokenizer", None), "backend_tokenizer", None)
    if fast is None:
        raise ValueError(f"{name}: a {type(tokenize).__name__} has no tokenizer.json; use --to open_clip")
    for option in ("tokenizer_mode", "strip_sep_token"):
        if found := getattr(tokenize, option, None):
            raise ValueError(f"{name}: tokenizer.json cannot express {option}={found!r}; use --to open_clip")
    outer = tokenize.tokenizer
    tokenizer = Tokenizer.from_str(fast.to_str())
    if clean := getattr(tokenize, "clean_fn", None):
        own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([*cleaning(clean), *own])
    tokenizer.enable_truncation(tokenize.context_length, direction=outer.truncation_side)
    tokenizer.enable_padding(
        direction=outer.padding_side,
        pad_id=outer.pad_token_id,
        pad_token=outer.pad_token,
        length=tokenize.context_length,
    )
    return tokenizer


def cleaning(clean: Any) -> list[Normalizer]:
    """open_clip's cleaning of a caption: ftfy's repairs, entities, then spaces and case according to `clean`."""
    known = {get_clean_fn(name): name for name in ("lower", "whitespace", "canonicalize")}
    if clean not in known:
        raise ValueError(f"the tokenizer cleans texts by {clean}; tokenizer.json can express {sorted(known.values())}")
    last: list[Normalizer] = [Replace(Regex(r"\s+"), " "), Strip()]
    if known[clean] == "canonicalize":
        last = [Replace("_", " "), Replace(Regex(f"[{re.escape(string.punctuation)}]"), ""), *last]
    if known[clean] != "whitespace":
        last += [Replace(Regex(FINAL_SIGMA), "ς"), Lowercase()]
    return [*repairs(), *last]


def repairs() -> Iterable[Normalizer]:
    """ftfy.fix_text and html.unescape as rules, in an order that needs no second pass."""
    for wide, usual in chardata.WIDTH_MAP.items():
        yield Replace(chr(wide), usual)
    yield Replace(Regex("&(?:amp;|AMP;|#0*38;|#[xX]26;)+"), "&")
    for character, pattern in references().items():
        yield Replace(Regex(pattern), character)
    for number in range(0x80, 0xA0):
        yield Replace(chr(number), bytes([number]).decode("sloppy-windows-1252"))
    for ligature, letters in chardata.LIGATURES.items():
        yield Replace(chr(ligature), letters)
    yield Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"')
    yield Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'")
    yield Replace(Regex(r"\x1b\[[\d;]*[a-zA-Z]"), "")
    # ftfy leaves \t, \n, \f and \r; they become spaces.
    yield Replace(Regex(r"[\x00-\x08\x0b\x0e-\x1f\x7f\x{206a}-\x{206f}\x{feff}\x{fff9}-\x{fffc}]"), "")
    yield normalizers.NFC()


def references() -> dict[str, str]:
    """Character → regular expression of its entities, for the characters of HTML 4 and Windows-1252."""
    named: dict[str, list[str]] = {c: [] for c in (*map(chr, entities.codepoint2name), *string.punctuation)}
    numbered = {character: [ord(character)] for character in named}
    for number in range(0x80, 0xA0):
        numbered.setdefault(unescape(f"&#{number};"), []).append(number)
    for entity, character in chardata.HTML_ENTITIES.items():
        if character in named:
            named[character].append(entity[1:])
    for name, character in entities.html5.items():
        if not name.endswith(";"):  # an old name, valid without its semicolon
            named[character].append(f"{name}(?![0-9A-Za-z]*;)")
    numbers = {
        character: [f"#(?:{'|'.join(f'0*{n}(?![0-9])|[xX]0*(?i:{n:x})(?![0-9a-fA-F])' for n in found)});?"]
        for character, found in numbered.items()
    }
    return {character: f"&(?:{'|'.join([*named.get(character, []), *rest])})" for character, rest in numbers.items()}


def check_tokenizer(encoder: Encoder, tokenizer: Tokenizer) -> None:
    """Raises: ValueError if a text of CHECKED gets other ids, or other padding for a tower that sees it."""
    expected = encoder.spec.tokenize(list(CHECKED)).tolist()
    fixed = json.loads(tokenizer.to_str())["padding"]["strategy"] != "BatchLongest"
    for text, row, found in zip(CHECKED, expected, tokenizer.encode_batch(list(CHECKED)), strict=True):
        length = len(row) if fixed else sum(found.attention_mask)
        if found.ids[:length] != row[:length] or any(row[length:]):
            raise ValueError(
                f"{encoder.name}: its tokenizer cannot be written as tokenizer.json: {text[:60]!r} becomes "
                f"{found.ids[:length][:20]}, should be {row[:20]}; use --to open_clip"
            )
